"""A table and a generator small enough to know every stored pixel in closed form."""

import os
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from cfssl.bank.build import build
from cfssl.bank.gate import apply_gate
from cfssl.bank.parts import Part
from cfssl.bank.settings import GateSettings
from cfssl.bank.staging import staged
from cfssl.bank.store import Bank
from cfssl.data.pixels import to_signed
from cfssl.data.prepare import save_prepared
from cfssl.data.splits import SplitSettings
from cfssl.data.table import Attribute, ImageTable
from cfssl.generators.base import propagate
from cfssl.scm.graph import CausalGraph

SCANNERS = ("A", "B", "C")
SHIFT = torch.tensor([0.0, 0.3, -0.5])  # of the grey level, by scanner
DISEASE = 0.25  # added by disease
ATTRIBUTES = {
    "scanner": Attribute("scanner", "categorical", SCANNERS, declared=True),
    "disease": Attribute("disease", "binary", ("no", "yes"), declared=True),
    "age": Attribute("age", "continuous", declared=True),
}
VIEWS = [*({"scanner": name} for name in SCANNERS), {"age": 30.0}, {"scanner": "B", "disease": "yes"}]


def toy_table(
    folder: Path, count: int = 20, shape=(1, 6, 5), dtype=np.uint8, missing=(), ageless=()
) -> ImageTable:
    """Noise images; `missing` rows have no disease, `ageless` rows no age."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, np.iinfo(dtype).max + 1, (count, *shape), dtype=dtype)
    frame = pd.DataFrame(
        {
            "scanner": rng.choice(SCANNERS, count),
            "disease": rng.choice(["no", "yes"], count).astype(object),
            "age": rng.uniform(20, 90, count).astype(np.float32),
            "split": "train",
        }
    )
    frame.loc[list(missing), "disease"] = None
    frame.loc[list(ageless), "age"] = np.nan
    split = SplitSettings(may_be_empty=("val", "test"))
    return save_prepared(folder, "toy", frame, ATTRIBUTES, images, split=split)


def build_toy(folder: Path, table: ImageTable, **settings) -> Bank | None:
    """A bank of four shards, each of two batches."""
    settings = {"rows": table.rows(), "generator": ToyGenerator(), "views": VIEWS, "seed": 3, **settings}
    build(folder, table, **{"rows_per_shard": 6, "batch": 4, **settings})
    return Bank.open(folder) if "shards" not in settings else None


def build_slowly(folder: Path, table_folder: Path) -> None:
    """For a process that is going to be killed."""
    torch.set_num_threads(1)
    build_toy(folder, ImageTable.open(table_folder), generator=ToyGenerator(pause=0.001), rows_per_shard=2)


def build_together(folder: Path, table_folder: Path, barrier) -> None:
    """For processes that build the same bank at once."""
    torch.set_num_threads(1)
    table = ImageTable.open(table_folder)
    barrier.wait()
    build_toy(folder, table, rows_per_shard=2)


def build_part_together(folder: Path, table_folder: Path, part: Part, barrier) -> None:
    """For processes that build parts of the same bank at once."""
    torch.set_num_threads(1)
    table = ImageTable.open(table_folder)
    barrier.wait()
    build_toy(folder, table, rows_per_shard=2, shards=part.of(10))


def stage_together(path: Path, place: Path, barrier) -> None:
    """For processes that copy the same bank at once."""
    bank = Bank.open(path)
    barrier.wait()
    assert len(staged(bank, place)) == len(bank)


class ToyModel:
    """Disease given age with random abduction: disease* = [age* + noise > 60], the noise of a row from its
    own stream."""

    def __init__(self, graph):
        self.graph, self.calls = graph, 0

    def counterfactual(self, values, do, rng):
        self.calls += 1
        result = {**values, **do}
        if "disease" not in do and "age" in do:
            noise = torch.cat([torch.randn(1, generator=own) for own in rng]) * 20
            result["disease"] = (result["age"] + noise > 60).long()
        return result


class ToyGenerator:
    """x = u + SHIFT[scanner] + DISEASE * disease."""

    fingerprint = "toy-1"

    def __init__(self, pause: float = 0.0) -> None:
        self.graph = CausalGraph({"disease": ["age"]}, ["scanner", "disease", "age"], ["scanner", "disease"])
        self.scm = ToyModel(self.graph)
        self.pause, self.calls, self.sizes = pause, 0, []

    def fit(self, table, run):
        raise NotImplementedError

    def _offset(self, pa):
        return (SHIFT[pa["scanner"]] + DISEASE * pa["disease"])[:, None, None, None]

    def abduct(self, x, pa):
        self.calls += 1
        self.sizes.append(len(x))
        return {"u": x - self._offset(pa)}

    def act(self, u, pa, do, rng):
        return propagate(self.scm, pa, do, rng)

    def predict(self, u, pa_cf):
        time.sleep(self.pause)
        return u["u"] + self._offset(pa_cf)


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, hidden ones too."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class ToyJudge:
    """Knows the stored views, and disagrees with those of `wrong`, (item, slot) each: probability 0.2 instead
    of 0.9 where a scanner or a disease was set, 2.5 standard deviations instead of 0.5 where an age was."""

    def __init__(self, bank: Bank, wrong=()) -> None:
        self.wrong, self.seen = set(wrong), []
        self.names = {}
        for slot in range(1, bank.plan.slots):
            views = to_signed(bank.gather(np.arange(len(bank)), np.full(len(bank), slot)))
            for item, view in enumerate(views):
                self.names.setdefault(
                    (view.numpy().tobytes(), target_text(bank.views[slot - 1])), (item, slot)
                )

    def see(self, images):
        assert images.dtype == torch.float32
        return {"images": images}

    def agreement(self, seen, target):
        images = seen["images"]
        assert {len(value) for value in target.values()} == {len(images)}
        asked = [
            target_text({name: natural(name, value[place]) for name, value in target.items()})
            for place in range(len(images))
        ]
        found = [self.names[view.numpy().tobytes(), text] for view, text in zip(images, asked, strict=True)]
        self.seen += found
        wrong = np.array([view in self.wrong for view in found])
        agreement, error = np.where(wrong, 0.2, 0.9), np.where(wrong, 2.5, 0.5)
        nothing = np.full(len(images), np.nan)
        return (nothing if set(target) == {"age"} else agreement), (error if "age" in target else nothing)


def target_text(view) -> str:
    return ", ".join(f"{name}={value}" for name, value in view.items())


def natural(name, value):
    attribute = ATTRIBUTES[name]
    return float(value) if attribute.kind == "continuous" else attribute.categories[int(value)]


def gate_and_die(folder: Path, wrong, settings: GateSettings, renames: int, late: bool) -> None:
    """For a process that dies, as if killed, at the `renames`-th file that the gate puts into its place:
    before, or `late` after it."""
    torch.set_num_threads(1)
    replace, seen = Path.replace, []

    def dying(path, target):
        seen.append(target)
        if len(seen) == renames and not late:
            os._exit(9)
        replace(path, target)
        if len(seen) == renames:
            os._exit(9)

    Path.replace = dying
    apply_gate(folder, ToyJudge(Bank.open(folder), wrong), settings, "judge-1", ATTRIBUTES)

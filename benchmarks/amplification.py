"""Do hard labels in counterfactual fine-tuning amplify attributes that were not intervened on, and do soft
labels not?

    python benchmarks/amplification.py --data-root PATH [--jobs 2]

Worlds: `digits` (Morpho-MNIST with three added attributes) and `chest` (phantom_chest), whose recorded
labels are partly wrong, so that the best possible AUC of every attribute is known (benchmarks/worlds.py).
Three seeds of every network; per seed one base HVAE, from which all arms start with the same order, noise and
interventions: no fine-tuning, hard, soft, and the control shuffled, whose soft targets are those of other
images. The guide is trained on one half of the training images, the judge, another network with another seed,
on the other half. All interventions of a test image are scored once. Resumable: everything lives in
content-addressed stages.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
import worlds
from amplification_report import World, figures_of, table_of
from arms import (
    arm,
    base,
    finished,
    in_batches,
    in_processes,
    load_arrays,
    plain,
    predictor,
    save_arrays,
    seconds_spent,
)
from record import write_results
from torch import Tensor

from cfssl.data.pixels import to_signed
from cfssl.data.table import ImageTable
from cfssl.generators.finetune import FinetuneSettings, FinetuneTrainSettings, mean_free_energy
from cfssl.generators.hvae import HVAEGenerator
from cfssl.generators.hvae_settings import HVAESettings, HVAETrainSettings
from cfssl.generators.hvae_small import SmallNetworkSettings
from cfssl.generators.targets import AttributeRule, AttributeRuleSettings, Counterfactual
from cfssl.measure.predictor import AttributePredictor, PredictorSettings, PredictorTrainSettings
from cfssl.seeds import torch_generator
from cfssl.stages import GENERATOR_CODE, TABLE_CODE, keyed_stage

SEEDS = (0, 1, 2)
EVERYWHERE = ("none", "hard", "soft")
ARMS = {"digits": (*EVERYWHERE, "shuffled"), "chest": EVERYWHERE}  # one world is enough for the control
DRAW = 1  # of the worlds; budgets were chosen on draw 100
ADDED = {"digits": ("ramp", "grating", "patch"), "chest": ("sex", "scanner", "disease")}
OTHERS = {"digits": ("thickness", "intensity", "digit"), "chest": ("age",)}
GRAPHS: dict[str, dict[str, tuple[str, ...]]] = {"digits": {"intensity": ("thickness",)}, "chest": {}}
WIDTHS = {"digits": (12, 24, 32, 48), "chest": (16, 24, 32, 48)}
EPOCHS = {"digits": 6, "chest": 8}
FINE = {"digits": (4, 64), "chest": (5, 32)}  # epochs, batch


class Shuffled(AttributeRule):
    """The control: soft targets that belong to other images of the batch say nothing about this one."""

    def factual(self, made: Counterfactual) -> dict[str, Tensor]:
        return {name: value.roll(1, 0) for name, value in super().factual(made).items()}


def generator_settings(world: str, seed: int) -> HVAESettings:
    return HVAESettings(
        parents=(*OTHERS[world], *ADDED[world]),
        graph=GRAPHS[world],
        network=SmallNetworkSettings(widths=WIDTHS[world]),
        sigma="shared",
        beta=1.0,
        train=HVAETrainSettings(epochs=EPOCHS[world], batch=FINE[world][1], seed=seed),
    )


def predictor_settings(world: str, role: str, seed: int) -> PredictorSettings:
    """The judge is wider, of another seed, and has seen the other half of the training images."""
    train = PredictorTrainSettings(epochs=12, seed=seed if role == "guide" else 1000 + seed)
    width, part = (16, "first") if role == "guide" else (20, "second")
    return PredictorSettings(attributes=ADDED[world], width=width, part=part, train=train)  # type: ignore[arg-type]


def finetune_settings(world: str, rule: str, seed: int) -> FinetuneSettings:
    epochs, batch = FINE[world]
    name: Any = "hard" if rule == "hard" else "soft"
    return FinetuneSettings(
        rules=(AttributeRuleSettings(predictor_settings(world, "guide", seed), name),),
        do=ADDED[world],
        train=FinetuneTrainSettings(lr=3e-4, epochs=epochs, batch=batch, seed=seed),
    )


def world_table(world: str, runs: Path, data_root: str | None) -> ImageTable:
    stage = keyed_stage(runs, "table", world, DRAW, worlds.settings(world), code=TABLE_CODE)

    def make(folder: Path) -> None:
        if world == "chest":
            worlds.chest(runs, folder / "table", DRAW)
        elif data_root is None:
            raise SystemExit("amplification.py: digits need --data-root, the folder that holds morphomnist/")
        else:
            worlds.digits(Path(data_root) / "morphomnist", folder / "table", DRAW)

    return ImageTable.open(finished(stage, make).parent)


def generator_of(world: str, name: str, seed: int, runs: Path, table: ImageTable) -> HVAEGenerator:
    settings = generator_settings(world, seed)
    if name == "none":
        return base(runs, table, settings)[0]
    guide = predictor(runs, table, predictor_settings(world, "guide", seed))
    rule = Shuffled(guide, is_soft=True) if name == "shuffled" else AttributeRule(guide, name == "soft")
    return arm(runs, table, settings, finetune_settings(world, name, seed), [rule], name)


def scores(world: str, name: str, seed: int, runs: Path, table: ImageTable) -> dict[str, np.ndarray]:
    """Judge's probabilities of class 1, (N,) each: `real/j`, `do_k/j`; the guide's, `guide/j`; values set,
    `target/k`; reconstruction error `composition` in grey levels at t_u = 0; `free_energy` on validation
    images."""
    judge = predictor(runs, table, predictor_settings(world, "judge", seed))
    guide = predictor(runs, table, predictor_settings(world, "guide", seed))
    assert judge.fingerprint != guide.fingerprint
    settings = plain(generator_settings(world, seed)), plain(finetune_settings(world, name, seed))
    stage = keyed_stage(
        runs, "scores", name, settings, judge.fingerprint, table.fingerprint, code=(*GENERATOR_CODE,)
    )

    def make(folder: Path) -> None:
        generator = generator_of(world, name, seed, runs, table)
        save_arrays(stage.product, scored(world, generator, judge, guide, table))

    return load_arrays(finished(stage, make))


def scored(
    world: str,
    generator: HVAEGenerator,
    judge: AttributePredictor,
    guide: AttributePredictor,
    table: ImageTable,
) -> dict[str, np.ndarray]:
    rows = table.rows("test")
    x, pa = to_signed(table.images.read(rows)), table.encode(generator.graph.variables, rows)
    found: dict[str, np.ndarray] = {}
    # Values of other test images: drawn from the marginal, the same for all arms and seeds.
    order = torch.randperm(len(rows), generator=torch_generator("amplification", world))
    do = {name: pa[name][order] for name in ADDED[world]}

    def seen(images: Tensor, by: AttributePredictor = judge) -> dict[str, np.ndarray]:
        outputs = by(images)
        return {name: by.probabilities(outputs, name)[:, 1].numpy() for name in ADDED[world]}

    def batch(part: slice) -> dict[str, np.ndarray]:
        own = {name: value[part] for name, value in pa.items()}
        u = generator.abduct(x[part], own)
        error = (generator.predict(u, own, residual=0.0) - x[part]).abs().flatten(1).mean(1) * 127.5
        result = {"composition": error.numpy()}
        result |= {f"real/{name}": value for name, value in seen(x[part]).items()}
        result |= {f"guide/{name}": value for name, value in seen(x[part], guide).items()}
        for name, values in do.items():
            changed = generator.predict(u, own | {name: values[part]})
            result |= {f"do_{name}/{other}": value for other, value in seen(changed).items()}
        return result

    parts = in_batches(len(rows), batch)
    found = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    energy = mean_free_energy(generator, table, table.rows("val"), generator.settings.train)
    found |= {f"target/{name}": values.numpy() for name, values in do.items()}
    return found | {"free_energy": np.array(energy)}


def prepare_seed(world: str, seed: int, options: argparse.Namespace) -> None:
    """All arms of one seed."""
    table = world_table(world, options.runs, options.data_root)
    for name in ARMS[world]:
        scores(world, name, seed, options.runs, table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--data-root", help="folder with morphomnist/")
    parser.add_argument("--runs", type=Path, default=Path("runs/amplification"))
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", nargs=2, metavar=("WORLD", "SEED"), help="prepare one seed of one world")
    options = parser.parse_args()
    if options.only:
        torch.set_num_threads(1)
        prepare_seed(options.only[0], int(options.only[1]), options)
        return
    for world in ADDED:
        world_table(world, options.runs, options.data_root)
    in_processes([["--only", world, str(seed)] for seed in SEEDS for world in ADDED], options.jobs)
    figures: dict[str, Any] = {}
    sections = []
    for world in ADDED:
        table = world_table(world, options.runs, options.data_root)
        kept = {(n, s): scores(world, n, s, options.runs, table) for n in ARMS[world] for s in SEEDS}
        graph = generator_settings(world, 0).causal_graph(table.attributes)
        judged = World(world, table, graph, ADDED[world], kept, SEEDS)
        found = figures_of(judged, ARMS[world])
        figures |= found
        sections.append(table_of(judged, ARMS[world], found))
    protocol = {
        "digits": f"{worlds.settings('digits')}, generator {EPOCHS['digits']} epochs, fine-tuning "
        f"{FINE['digits'][0]} epochs of batch {FINE['digits'][1]}",
        "chest": f"{worlds.settings('chest')}, generator {EPOCHS['chest']} epochs, fine-tuning "
        f"{FINE['chest'][0]} epochs of batch {FINE['chest'][1]}",
        "arms": "from one base per seed, with the same steps, order, noise and interventions; shuffled: soft "
        "targets of other images",
        "selection": "last weights; budgets were chosen on another draw of the digits (draw 100, seed 0)",
        "time": f"sum of the stages over {options.jobs} single-threaded processes side by side",
        "judge": "other seed, width and half of the training images than the guide; test images once",
        "ceiling": "AUC of the true signal against the recorded labels of the test images",
        "interval": "differences: variance of 2,000 paired resamples of test images and of seeds; single "
        "arms: 95 % t interval over seeds",
    }
    minutes = seconds_spent(options.runs) / 60 / options.jobs
    write_results("amplification", figures, protocol, SEEDS, minutes, "\n".join(sections))


if __name__ == "__main__":
    main()

"""Building a bank: every pixel against the closed form of the toy generator, every interruption against an
uninterrupted build."""

import json
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import bank_toys as toys
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from bank_toys import (
    ATTRIBUTES,
    DISEASE,
    SCANNERS,
    SHIFT,
    VIEWS,
    ToyGenerator,
    build_slowly,
    build_together,
    build_toy,
    snapshot,
    toy_table,
)

from cfssl.bank.build import plan_bank, plan_views, shard_megabytes
from cfssl.bank.records import size_and_checksum, write_record
from cfssl.bank.settings import BankSettings
from cfssl.bank.shards import begin, finish, view_checksum, write_shard
from cfssl.bank.store import Bank
from cfssl.bank.verify import verify
from cfssl.errors import UserError
from cfssl.seeds import derive_seed
from cfssl.writers import WEEK, machine, owner


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return toy_table(tmp_path_factory.mktemp("table"), missing=[7, 11])


def dead_process():
    """The number of a process that is no more."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


# views ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("do", "expected"),
    [
        ({}, []),
        ({"scanner": "all"}, [{"scanner": name} for name in SCANNERS]),
        ({"scanner": ["C", "A"]}, [{"scanner": "C"}, {"scanner": "A"}]),
        ({"scanner": "B", "age": [30, 60.5]}, [{"scanner": "B"}, {"age": 30}, {"age": 60.5}]),
        ({"scanner": ["B", "B"]}, [{"scanner": "B"}]),
        (
            [{"scanner": ["A", "B"], "disease": "all"}, {"scanner": "B"}],
            [{"scanner": s, "disease": d} for s in "AB" for d in ("no", "yes")] + [{"scanner": "B"}],
        ),
    ],
)
def test_plans_become_lists_of_interventions(do, expected):
    assert plan_views(do, ToyGenerator().graph, ATTRIBUTES) == expected


def test_a_recipe_sets_variables_one_at_a_time_or_together():
    alone = BankSettings(do={"scanner": ("B",), "disease": "all"})
    together = BankSettings(do=({"scanner": ("B",), "disease": "all"}, {"age": (30,)}))
    graph, yes = ToyGenerator().graph, [{"disease": value} for value in ("no", "yes")]
    assert plan_views(alone.do, graph, ATTRIBUTES) == [{"scanner": "B"}, *yes]
    joint = [{"scanner": "B", **disease} for disease in yes]
    assert plan_views(together.do, graph, ATTRIBUTES) == [*joint, {"age": 30}]
    for settings in (alone, together):
        assert plan_views(settings.interventions, graph, ATTRIBUTES) == plan_views(
            settings.do, graph, ATTRIBUTES
        )
    assert alone.variables == ("scanner", "disease")
    assert together.variables == ("scanner", "disease", "age")


@pytest.mark.parametrize(
    ("do", "message"),
    [
        ({"scaner": "all"}, "do.. names 'scaner', expected one of age, disease, scanner"),
        ({"scanner": ["A", "Z"]}, "scanner='Z'. names no category of scanner, expected one of 'A', 'B', 'C'"),
        ({"disease": [1]}, "names no category of disease"),
        ({"age": "all"}, "age=all. needs categories"),
        ({"age": ["old"]}, "expected a finite number"),
        ({"age": [float("nan")]}, "expected a finite number"),
    ],
)
def test_impossible_plans_are_refused(do, message):
    with pytest.raises(UserError, match=message):
        plan_views(do, ToyGenerator().graph, ATTRIBUTES)


def test_an_intervention_that_cannot_reach_the_image_is_refused():
    graph = toys.CausalGraph({"age": ["scanner"]}, ["scanner", "age"], ["scanner"])
    with pytest.raises(UserError, match="cannot change the image, whose parents are scanner"):
        plan_views({"age": [30]}, graph, ATTRIBUTES)


# pixels and index -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_every_stored_pixel_is_the_rounded_truth(tmp_path, dtype):
    table = toy_table(tmp_path / "table", shape=(2, 4, 3), dtype=dtype, missing=[7, 11])
    bank = build_toy(tmp_path / "bank", table)
    frame, real = table.frame, table.images.read(np.arange(20))
    top = np.iinfo(dtype).max
    noisy = bank.index["counterfactual.disease"].to_numpy().reshape(20, 6)
    for item in range(20):
        slots = np.arange(6)
        found = bank.gather(np.full(6, item), slots)
        np.testing.assert_array_equal(found[0], real[item])
        scanner, disease = frame["scanner"][item], frame["disease"][item]
        for slot, view in enumerate(VIEWS, 1):
            own = {"scanner": scanner, "disease": disease}
            unchanged = all(own.get(name) == value for name, value in view.items())
            if item in (7, 11) or unchanged:
                assert not bank.available[item, slot]
                np.testing.assert_array_equal(found[slot], real[item])
                continue
            assert bank.available[item, slot]
            new = {**own, "disease": noisy[item, slot], **view}
            shift = {name: float(SHIFT[SCANNERS.index(name)]) for name in SCANNERS}
            moved = shift[new["scanner"]] - shift[scanner]
            moved += DISEASE * ((new["disease"] == "yes") - (disease == "yes"))
            truth = np.clip(real[item].astype(np.float64) + moved * top / 2, 0, top)
            # Nearest level; the float32 the images pass through decides ties.
            assert np.abs(found[slot] - truth).max() <= 0.5 + 2e-6 * top


def test_rounding_leaves_no_shift_between_real_and_counterfactual(tmp_path):
    """A do() that changes nothing in the image must return the image, not one level less."""

    class Unchanging(ToyGenerator):
        def _offset(self, pa):
            return torch.full((len(pa["scanner"]), 1, 1, 1), 0.1)

    for dtype in (np.uint8, np.uint16):
        table = toy_table(tmp_path / f"table-{dtype.__name__}", dtype=dtype)
        bank = build_toy(tmp_path / f"bank-{dtype.__name__}", table, generator=Unchanging(), views=VIEWS[:3])
        assert bank.available[:, 1:].sum() == 40
        views = bank.gather(np.arange(20), np.tile(np.arange(4), (20, 1))).astype(int)
        assert np.abs(views - views[:, :1]).max() <= (0 if dtype == np.uint8 else 1)  # float32 has 24 bits


def test_the_index_tells_what_every_slot_shows(tmp_path, table):
    bank = build_toy(tmp_path / "bank", table, rows=np.array([15, 7, 2, 9, 11, 0, 4]))
    index, frame = bank.index, table.frame
    np.testing.assert_array_equal(bank.rows, [15, 7, 2, 9, 11, 0, 4])
    assert list(index["item"]) == [item for item in range(7) for _ in range(6)]
    assert list(index["slot"]) == list(range(6)) * 7
    for line in index.to_dict("records"):
        view = bank.gather(np.array([line["item"]]), np.array([line["slot"]]))[0]
        assert line["checksum"] == view_checksum(view)
        do = VIEWS[line["slot"] - 1] if line["slot"] else None
        assert (None if pd.isna(line["do"]) else json.loads(line["do"])) == do
        is_generated = line["available"] and line["slot"] > 0
        own_seed = derive_seed(3, "bank", line["row"], json.dumps(do, sort_keys=True))
        assert line["seed"] == (own_seed if is_generated and do == {"age": 30.0} else -1)
        for name in ATTRIBUTES:
            factual, value = frame[name][line["row"]], line[f"counterfactual.{name}"]
            assert line[f"factual.{name}"] == factual or pd.isna(factual)
            if is_generated and name in do:
                assert value == do[name]
            elif not (is_generated and name == "disease" and "age" in do):
                assert value == factual or pd.isna(factual)


def test_random_abduction_depends_on_seed_row_and_do_only(tmp_path, table):
    everything = build_toy(tmp_path / "all", table, views=[{"age": 60.0}])
    apart = build_toy(
        tmp_path / "apart",
        table,
        views=[{"scanner": "A"}, {"age": 60.0}],
        rows=table.rows()[::-1].copy(),
        rows_per_shard=4,
        batch=3,
    )
    found = apart.gather(np.arange(20)[::-1], np.full(20, 2))
    np.testing.assert_array_equal(found, everything.gather(np.arange(20), np.ones(20, dtype=int)))
    other = build_toy(tmp_path / "other", table, views=[{"age": 60.0}], seed=4)
    diseases = [bank.index["counterfactual.disease"].tolist() for bank in (everything, other)]
    assert diseases[0] != diseases[1]


def test_a_bank_without_generator_holds_the_real_images(tmp_path, table):
    bank = build_toy(tmp_path / "bank", table, generator=None, views=[])
    assert bank.views == ()
    assert bank.plan.generator is None
    found = bank.gather(np.arange(20), np.zeros((20, 1), dtype=int))[:, 0]
    np.testing.assert_array_equal(found, table.images.read(np.arange(20)))


def test_the_shards_of_large_banks_are_larger():
    sizes = [shard_megabytes(2**20 * total) for total in (1, 65536, 131072, 10**6, 10**9)]
    assert sizes == [64, 64, 128, pytest.approx(10**6 / 1024), 1024]


def test_shards_are_sized_by_bytes_and_hold_at_least_one_item(table):
    view = 30
    arguments = (table, table.rows(), ToyGenerator(), VIEWS, 0)
    assert plan_bank(*arguments, megabytes=5.5 * 6 * view / 2**20).rows_per_shard == 5
    assert plan_bank(*arguments, megabytes=view / 2**20).rows_per_shard == 1
    assert plan_bank(*arguments).shard_count == 1


@pytest.mark.parametrize(
    ("rows", "found"), [([], "0 rows"), ([0, 20], "2 rows"), ([-1], "1 rows"), ([3, 3], "1 of them")]
)
def test_rows_that_are_no_rows_are_refused(tmp_path, table, rows, found):
    with pytest.raises(UserError, match=f"rows 0 to 19 .* {found}"):
        build_toy(tmp_path / "bank", table, rows=np.array(rows, dtype=int))
    assert not (tmp_path / "bank").exists()


def test_a_generator_that_returns_no_images_is_refused(tmp_path, table):
    class Diverged(ToyGenerator):
        def predict(self, u, pa_cf):
            return super().predict(u, pa_cf) * float("nan")

    class Cropped(ToyGenerator):
        def predict(self, u, pa_cf):
            return super().predict(u, pa_cf)[..., 1:]

    with pytest.raises(UserError, match=r"NaN or infinite pixels .* table row"):
        build_toy(tmp_path / "nan", table, generator=Diverged())
    with pytest.raises(UserError, match=r"returned \(\d, 1, 6, 4\) .* expected \(\d, 1, 6, 5\)"):
        build_toy(tmp_path / "cropped", table, generator=Cropped())
    with pytest.raises(UserError, match="has no generator"):
        build_toy(tmp_path / "none", table, generator=None)


def test_a_row_needs_the_parents_of_the_image_and_what_the_do_concerns(tmp_path):
    """Without an age a scanner can be replaced, but nobody can be made thirty."""
    table = toy_table(tmp_path / "table", missing=[7, 11], ageless=[3, 7])
    bank = build_toy(tmp_path / "bank", table, views=[{"scanner": "A"}, {"age": 30.0}])
    scanner = table.frame["scanner"].to_numpy()
    rows = np.arange(20)
    np.testing.assert_array_equal(bank.available[:, 1], (scanner != "A") & ~np.isin(rows, [7, 11]))
    np.testing.assert_array_equal(bank.available[:, 2], ~np.isin(rows, [3, 7, 11]))
    whole = build_toy(tmp_path / "whole", toy_table(tmp_path / "other"), views=[{"scanner": "A"}])
    np.testing.assert_array_equal(bank.gather(rows, rows * 0 + 1)[3], whole.gather(rows, rows * 0 + 1)[3])


def test_the_attributes_of_a_batch_go_through_the_causal_model_together(tmp_path, table):
    generator = ToyGenerator()
    rows = table.rows(known=["disease"])[:12]
    build_toy(tmp_path / "bank", table, generator=generator, rows=rows, views=[{"age": 30.0}, {"age": 60.0}])
    assert generator.scm.calls == 2 * 4  # two shards of two batches, two views


def test_an_array_in_another_memory_order_is_stored_the_same(tmp_path, table):
    plan = plan_bank(table, table.rows(), ToyGenerator(), VIEWS, 3, rows_per_shard=6, batch=4)
    build_toy(tmp_path / "bank", table)
    images = np.load(tmp_path / "bank" / "shard-00001.npy")
    index = pq.read_table(tmp_path / "bank" / "shard-00001.parquet")
    before = snapshot(tmp_path / "bank")
    write_shard(tmp_path / "bank", plan, 1, np.asfortranarray(images), index)
    assert snapshot(tmp_path / "bank") == before


# going on, and refusing to ----------------------------------------------------------------------------------


def test_batches_are_cut_from_each_shard_alone(tmp_path, table):
    generator = ToyGenerator()
    build_toy(tmp_path / "bank", table, generator=generator, rows=table.rows(known=["disease"]))
    assert generator.sizes == [4, 2, 4, 2, 4, 2]


def test_shards_built_apart_and_in_any_order_give_the_same_bytes(tmp_path, table):
    build_toy(tmp_path / "whole", table)
    for shard in (3, 0, 2):
        build_toy(tmp_path / "parts", table, shards=[shard])
    with pytest.raises(UserError, match="3 of 4 shards, missing or damaged are the numbers 1; build"):
        finish(tmp_path / "parts")
    with pytest.raises(UserError, match=r"unfinished \(3 of 4 shards\)"):
        Bank.open(tmp_path / "parts")
    build_toy(tmp_path / "parts", table, shards=range(1, 2))
    finish(tmp_path / "parts")
    assert snapshot(tmp_path / "parts") == snapshot(tmp_path / "whole")
    with pytest.raises(UserError, match="expected 0 to 3"):
        build_toy(tmp_path / "parts", table, shards=range(3, 5))


def test_whole_shards_are_not_computed_again(tmp_path, table):
    build_toy(tmp_path / "bank", table)
    before = snapshot(tmp_path / "bank")
    (tmp_path / "bank" / "shard-00002.npy").unlink()
    generator, calls = ToyGenerator(), []
    build_toy(tmp_path / "bank", table, generator=generator, progress=lambda *counts: calls.append(counts))
    assert generator.calls == 2  # the two batches of one shard
    assert calls == [(6, 20), (12, 20), (18, 20), (20, 20)]
    assert snapshot(tmp_path / "bank") == before


def test_any_truncated_or_missing_file_is_made_again(tmp_path, table):
    build_toy(tmp_path / "bank", table)
    before = snapshot(tmp_path / "bank")
    rng = np.random.default_rng(0)
    for name, content in before.items():
        # Without its last byte, a line feed, a JSON file still says the same.
        for size in [None, 0, *rng.integers(1, len(content) - 1, 3)]:
            file = tmp_path / "bank" / name
            if size is not None:
                file.write_bytes(content[:size])
            elif name != "bank.json":  # without it the folder is nobody's
                file.unlink()
            left = f".shard-00001.npy.{machine()}-{dead_process()}.x7.part"
            (tmp_path / "bank" / left).write_bytes(b"of a killed process")
            build_toy(tmp_path / "bank", table)
            assert snapshot(tmp_path / "bank") == before, (name, size)


def test_a_build_killed_again_and_again_ends_with_the_same_bytes(tmp_path, table):
    build_toy(tmp_path / "whole", table, rows_per_shard=2)
    context = multiprocessing.get_context("forkserver")  # the imports are paid once
    context.set_forkserver_preload(["cfssl.bank.build", "cfssl.bank.store", "cfssl.data.prepare"])
    rng = np.random.default_rng(0)
    deaths, killed = 0, tmp_path / "killed"
    while True:
        process = context.Process(target=build_slowly, args=(killed, table.folder))
        process.start()
        known = len(list(killed.glob("*"))) if killed.exists() else 0
        while process.is_alive() and (len(list(killed.glob("*"))) if killed.exists() else 0) <= known:
            time.sleep(0.001)  # let it come as far as writing something new
        process.join(rng.uniform(0, 0.02 * 1.05**deaths))  # lives grow, so that a busy machine gets there too
        process.kill()
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -9
        deaths += 1
        assert deaths < 200, "the build makes no progress between kills"
    assert deaths >= 3
    assert snapshot(killed) == snapshot(tmp_path / "whole")
    assert verify(Bank.open(killed)) == []


def test_builders_that_start_at_once_make_one_bank(tmp_path, table):
    build_toy(tmp_path / "whole", table, rows_per_shard=2)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["cfssl.bank.build", "cfssl.bank.store", "cfssl.data.prepare"])
    for attempt in range(4):
        folder, barrier = tmp_path / f"bank-{attempt}", context.Barrier(4)
        arguments = (folder, table.folder, barrier)
        processes = [context.Process(target=build_together, args=arguments) for _ in range(4)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        assert [process.exitcode for process in processes] == [0] * 4
        assert snapshot(folder) == snapshot(tmp_path / "whole")


def test_a_builder_that_begins_late_leaves_a_finished_bank_finished(tmp_path, table, monkeypatch):
    """Between its look into the folder and its writing, another builder may have done everything."""
    plan = plan_bank(table, table.rows(), ToyGenerator(), VIEWS, 3, rows_per_shard=6, batch=4)
    folder, exists = tmp_path / "bank", Path.exists
    finished: list[dict[str, bytes]] = []

    def late(path):
        found = exists(path)
        if path == folder / "bank.json" and not finished:
            finished.append({})
            build_toy(folder, table)
            finished[0] = snapshot(folder)
        return found

    monkeypatch.setattr(Path, "exists", late)
    begin(folder, plan)
    assert snapshot(folder) == finished[0] != {}


def test_what_living_builders_write_is_left_alone(tmp_path, table):
    build_toy(tmp_path / "bank", table)
    before = snapshot(tmp_path / "bank")
    mine, dead, another = owner(), f"{machine()}-{dead_process()}", f"0123456789ab-{dead_process()}"
    left = {  # name -> (days since the last write, stays)
        f".shard-00001.npy.{mine}.x7.part": (0, True),
        f".bank.json.{mine}.new.part": (0, True),
        f".shard-00002.npy.{mine}.x7.part": (8, True),
        f".shard-00002.npy.{dead}.x7.part": (0, False),
        f".shard-00002.npy.{another}.x7.part": (6, True),
        f".shard-00003.npy.{another}.x7.part": (8, False),
        ".shard-00003.npy.x7.part": (6, True),
        ".index.parquet.x7.part": (8, False),
    }
    for name, (days, _) in left.items():
        (tmp_path / "bank" / name).write_bytes(b"half a shard")
        then = time.time() - days * WEEK / 7
        os.utime(tmp_path / "bank" / name, (then, then))
    build_toy(tmp_path / "bank", table)
    assert set(snapshot(tmp_path / "bank")) == set(before) | {n for n, (_, stays) in left.items() if stays}


def test_damaged_pixels_are_made_again_when_the_build_is_asked_to_check(tmp_path, table):
    build_toy(tmp_path / "bank", table)
    before = snapshot(tmp_path / "bank")
    file = tmp_path / "bank" / "shard-00002.npy"
    content = bytearray(file.read_bytes())
    content[-1] ^= 4
    file.write_bytes(content)
    build_toy(tmp_path / "bank", table)
    assert [finding[:15] for finding in verify(Bank.open(tmp_path / "bank"))] == ["shard-00002.npy"]
    generator = ToyGenerator()
    build_toy(tmp_path / "bank", table, generator=generator, check=True)
    assert generator.calls == 2  # of this shard alone
    assert snapshot(tmp_path / "bank") == before


@pytest.mark.parametrize("file", ["shard-00001.json", "index.parquet", "bank.json"])
def test_what_is_said_twice_is_mended_without_the_generator(tmp_path, table, file):
    build_toy(tmp_path / "bank", table)
    before = snapshot(tmp_path / "bank")
    content = bytearray(before[file])
    content[len(content) // 2] ^= 1
    (tmp_path / "bank" / file).write_bytes(content)
    generator = ToyGenerator()
    build_toy(tmp_path / "bank", table, generator=generator)
    assert generator.calls == 0
    assert snapshot(tmp_path / "bank") == before


def test_a_part_of_the_index_that_does_not_fit_the_plan_is_refused(tmp_path, table):
    """By somebody else's builder, whose checksums are right."""
    build_toy(tmp_path / "bank", table, shards=range(4))
    part, record = tmp_path / "bank" / "shard-00002.parquet", tmp_path / "bank" / "shard-00002.json"
    pq.write_table(pq.read_table(part).slice(2), part)
    content = json.loads(record.read_text())
    content["shard"]["index"] = size_and_checksum(part)
    write_record(record, content)
    with pytest.raises(UserError, match=r"shard-00002\.parquet has 34 rows of .*, expected 36 of"):
        finish(tmp_path / "bank")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 4}, "seed is 3, now 4"),
        ({"views": VIEWS[:2]}, "views is"),
        ({"batch": 5}, "batch is 4, now 5"),
        ({"device": "cuda"}, "device is cpu, now cuda"),
        ({"rows": np.arange(10)}, "rows is 20, now 10"),
        ({"rows": np.arange(20)[::-1].copy()}, "rows_fingerprint is"),
        ({"generator": "other"}, "generator is toy-1, now toy-2"),
    ],
)
@pytest.mark.parametrize("state", ["finished", "unfinished", "bank.json damaged"])
def test_a_folder_with_another_plan_is_refused_and_left_alone(tmp_path, table, change, named, state):
    folder = tmp_path / "bank"
    build_toy(folder, table, **({"shards": [1]} if state == "unfinished" else {}))
    if state == "bank.json damaged":
        (folder / "bank.json").write_text("{")
        named = "is damaged and shard-00000.json belongs to a bank with another plan"
    if change.get("generator") == "other":
        change = {"generator": ToyGenerator()}
        change["generator"].fingerprint = "toy-2"
    before = snapshot(folder)
    with pytest.raises(UserError, match=f"{named}.*nothing was changed: choose another folder"):
        build_toy(folder, table, **change)
    assert snapshot(folder) == before


def test_a_folder_with_other_files_is_refused(tmp_path, table):
    (tmp_path / "bank").mkdir()
    (tmp_path / "bank" / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match=r"holds 'thesis.tex' but no bank.json"):
        build_toy(tmp_path / "bank", table)
    assert snapshot(tmp_path / "bank") == {"thesis.tex": b"precious"}

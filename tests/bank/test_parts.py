"""A bank in parts: whoever builds which of them, and how often, it is the bank that one process builds."""

import json
import multiprocessing
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bank_toys import build_part_together, build_toy, snapshot, toy_table
from hypothesis import given
from hypothesis import strategies as st

from cfssl.bank.parts import Part, parts_with, ranges
from cfssl.bank.shards import finish
from cfssl.bank.store import Bank
from cfssl.bank.verify import verify
from cfssl.cli import main
from cfssl.errors import UserError
from cfssl.pipeline import Pipeline
from cfssl.recipe import parse_recipe, write_recipe

PHANTOM: dict[str, Any] = {
    "name": "parts",
    "data": {"name": "phantom_chest", "count": 240},
    "generator": {"name": "oracle", "parents": ["scanner"]},
    "bank": {"do": {"scanner": "all"}, "shard_megabytes": 1},
    "backbone": {"name": "test_resnet"},
    "train": {"epochs": 1, "batch": 48},
    "hardware": {"accelerator": "cpu"},
}


@given(total=st.integers(0, 60), count=st.integers(1, 80))
def test_parts_are_the_shards_split_as_evenly_as_possible(total: int, count: int) -> None:
    split = [part.tolist() for part in np.array_split(np.arange(total), count)]
    assert [list(Part(index, count).of(total)) for index in range(count)] == split


@given(st.sets(st.integers(0, 29)), st.integers(1, 12))
def test_the_parts_of_missing_shards_are_those_that_hold_them(shards: set[int], count: int) -> None:
    split = [set(part.tolist()) for part in np.array_split(np.arange(30), count)]
    assert parts_with(shards, 30, count) == [index for index, part in enumerate(split) if part & shards]


def test_ranges_are_written_short() -> None:
    assert ranges([3, 4, 5, 9]) == "3 to 5, 9"
    assert ranges(range(0, 40, 2)) == "0, 2, 4, 6, 8, 10, 12, 14 and 12 more"


SLURM = {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "16"}


@pytest.mark.parametrize(("text", "part"), [("0/1", (0, 1)), ("7/8", (7, 8)), ("array", (3, 16))])
def test_a_part_is_read_from_a_word(text: str, part: tuple[int, int]) -> None:
    assert Part.parse(text, SLURM) == Part(*part)


@pytest.mark.parametrize(
    ("text", "environment", "message"),
    [
        ("8/8", SLURM, "Part 8 of 8 was asked for, expected one of the parts 0 to 7 of 8"),
        ("0/0", SLURM, "Part 0 of 0 .* there is at least one"),
        ("1", SLURM, "The part is '1', expected INDEX/COUNT or array"),
        ("-1/3", SLURM, "The part is '-1/3'"),
        ("array", {}, "SLURM_ARRAY_TASK_ID is not set, so this is no task of an array job"),
        ("array", {"SLURM_ARRAY_TASK_ID": "3"}, "SLURM_ARRAY_TASK_COUNT is not set"),
        ("array", {**SLURM, "SLURM_ARRAY_TASK_ID": "16"}, "Part 16 of 16 .* counted from 0"),
    ],
)
def test_what_is_no_part_is_refused(text: str, environment: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Part.parse(text, environment)


def test_parts_built_at_once_and_twice_make_the_same_bank(tmp_path: Path) -> None:
    table = toy_table(tmp_path / "table", missing=[7, 11])
    build_toy(tmp_path / "whole", table, rows_per_shard=2)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["cfssl.bank.build", "cfssl.bank.store", "cfssl.data.prepare"])
    barrier, folder = context.Barrier(4), tmp_path / "parts"
    parts = [Part(0, 3), Part(1, 3), Part(1, 3), Part(2, 3)]
    processes = [
        context.Process(target=build_part_together, args=(folder, table.folder, part, barrier))
        for part in parts
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    finish(folder)
    assert snapshot(folder) == snapshot(tmp_path / "whole")
    assert verify(Bank.open(folder)) == []


def test_missing_shards_are_named_with_their_parts(tmp_path: Path) -> None:
    table = toy_table(tmp_path / "table")
    build_toy(tmp_path / "bank", table, rows_per_shard=2, shards=[0, 1, 2, 5, 8, 9])
    with pytest.raises(
        UserError,
        match="6 of 10 shards, missing or damaged are the numbers 3 to 4, 6 to 7, in the parts 1 to 2 of 4",
    ):
        finish(tmp_path / "bank", parts=4)


# a recipe's bank --------------------------------------------------------------------------------------------


def job(runs: Path, **sections: Any) -> Pipeline:
    return Pipeline(parse_recipe({**PHANTOM, **sections}, "parts"), runs, quiet=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    made = job(tmp_path_factory.mktemp("whole"))
    assert made.generation.bank.shard_count == 3
    return made


@pytest.fixture
def fitted(tmp_path: Path) -> Pipeline:
    made = job(tmp_path)
    assert made.generation.generator is not None
    return made


def test_a_bank_of_parts_is_the_bank_of_its_recipe(whole: Pipeline, fitted: Pipeline) -> None:
    runs, counts = fitted.runs, [2, 2, 5, 5]
    parts = [
        job(runs).generation.build_part(index, count)
        for index, count in zip([0, 0, 1, 4], counts, strict=True)
    ]
    assert parts == [range(2), range(2), range(1, 2), range(3, 3)]
    with pytest.raises(
        UserError, match="2 of 3 shards, missing or damaged are the numbers 2, in the parts 1 of 2"
    ):
        job(runs).generation.finish_bank(parts=2)
    assert not fitted.generation.bank_stage.done
    job(runs).generation.build_part(1, 2)
    bank = job(runs).generation.finish_bank(parts=2)
    assert fitted.generation.bank_stage.done
    assert snapshot(bank.path) == snapshot(whole.generation.bank.path)
    assert job(runs).generation.build_part(0, 2) == range(2)  # of a finished bank: nothing to do
    assert snapshot(bank.path) == snapshot(whole.generation.bank.path)


def test_a_build_without_a_part_goes_on_with_what_parts_left(whole: Pipeline, fitted: Pipeline) -> None:
    job(fitted.runs).generation.build_part(1, 2)
    made = fitted.generation.bank_stage.folder / "bank" / "shard-00002.npy"
    before = made.stat().st_mtime_ns
    bank = job(fitted.runs).generation.bank
    assert made.stat().st_mtime_ns == before
    assert snapshot(bank.path) == snapshot(whole.generation.bank.path)


def test_parts_do_not_train_the_generator(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"no table and no generator yet.* `cfssl fit` .* once before its parts"
    ):
        job(tmp_path).generation.build_part(0, 2)
    real = {"generator": None, "bank": {"shard_megabytes": 1}}
    with pytest.raises(UserError, match=r"no table yet.* `cfssl check`"):
        job(tmp_path, **real).generation.build_part(0, 2)
    assert list(tmp_path.iterdir()) == []


def test_the_verbs_build_a_task_of_an_array_job_and_finish(
    whole: Pipeline, fitted: Pipeline, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = fitted.runs / "parts.yaml"
    write_recipe(fitted.recipe, recipe)

    def call(*words: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["cfssl", "bank", *words, "--runs", str(fitted.runs), "--quiet"])
        with pytest.raises(SystemExit) as stop:
            main()
        printed = capsys.readouterr()
        return int(stop.value.code or 0), printed.out + printed.err

    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "2")
    code, printed = call("build", str(recipe), "--part", "array")
    assert code == 0
    assert "part 1 of 2, 1 shards" in printed
    code, printed = call("finish", str(recipe), "--parts", "2")
    assert code == 2
    assert "in the parts 0 of 2" in printed
    assert call("build", str(recipe), "--part", "0/2")[0] == 0
    code, printed = call("finish", str(recipe))
    assert code == 0
    folder = Path(printed.split()[-1])
    assert snapshot(folder) == snapshot(whole.generation.bank.path)
    done = json.loads((folder.parent / "done.json").read_text())
    assert done["stage"] == "bank"

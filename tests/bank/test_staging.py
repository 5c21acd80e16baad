"""A bank on a disk of the node: the copy reads as the original does, or there is none."""

import errno
import multiprocessing
import os
import pickle
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bank_toys import build_toy, snapshot, stage_together, toy_table

from cfssl.bank import staging
from cfssl.bank.staging import expanded, staged
from cfssl.bank.store import Bank
from cfssl.errors import UserError
from cfssl.pipeline import Pipeline
from cfssl.recipe import parse_recipe

SHARDS = [f"shard-{shard:05d}.npy" for shard in range(4)]
FILES = {*SHARDS, "index.parquet", "bank.json"}


@pytest.fixture
def bank(tmp_path: Path) -> Bank:
    made = build_toy(tmp_path / "bank", toy_table(tmp_path / "table", missing=[7, 11]))
    assert made is not None
    return made


def everything(bank: Bank) -> bytes:
    items = np.arange(len(bank))
    pixels = bank.gather(items, np.tile(np.arange(bank.plan.slots), (len(bank), 1)))
    return pixels.tobytes() + bank.rows.tobytes() + bank.available.tobytes()


def test_the_copy_reads_as_the_original_and_holds_what_reading_needs(bank: Bank, tmp_path: Path) -> None:
    copy = staged(bank, tmp_path / "node")
    assert copy.path.parent == tmp_path / "node"
    assert copy.fingerprint == bank.fingerprint
    assert everything(copy) == everything(bank)
    files, original = snapshot(copy.path), snapshot(bank.path)
    assert files == {name: original[name] for name in FILES}
    assert everything(pickle.loads(pickle.dumps(copy))) == everything(bank)  # noqa: S301


def test_a_whole_copy_is_used_again_and_each_damaged_file_alone_is_copied_again(
    bank: Bank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, copied = staged(bank, tmp_path / "node").path, []
    whole, copy = snapshot(folder), staging._copy

    def counting(file: Path, *rest: Any) -> None:
        copied.append(file.name)
        copy(file, *rest)

    monkeypatch.setattr(staging, "_copy", counting)
    staged(bank, tmp_path / "node")
    assert copied == []
    (folder / SHARDS[0]).write_bytes(whole[SHARDS[0]][:-1])
    (folder / SHARDS[1]).unlink()
    (folder / SHARDS[2]).write_bytes(b"\0" + whole[SHARDS[2]][1:])
    (folder / "index.parquet").write_bytes(b"")
    (folder / "bank.json").write_bytes(b"{")
    assert everything(staged(bank, tmp_path / "node")) == everything(bank)
    assert sorted(copied) == ["index.parquet", *SHARDS[:3]]
    assert snapshot(folder) == whole


def test_processes_that_stage_at_once_share_one_copy(bank: Bank, tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["cfssl.bank.build", "cfssl.bank.store", "cfssl.data.prepare"])
    barrier = context.Barrier(3)
    processes = [
        context.Process(target=stage_together, args=(bank.path, tmp_path / "node", barrier)) for _ in range(3)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 3
    (folder,) = (tmp_path / "node").iterdir()
    original = snapshot(bank.path)
    assert snapshot(folder) == {name: original[name] for name in FILES}


def test_what_a_killed_process_left_is_removed(bank: Bank, tmp_path: Path) -> None:
    folder = tmp_path / "node" / f"bank-{bank.fingerprint}"
    folder.mkdir(parents=True)
    dead = multiprocessing.get_context("fork").Process(target=int)
    dead.start()
    dead.join()
    left = folder / f".{SHARDS[1]}.{staging.owner().split('-')[0]}-{dead.pid}.x7.part"
    left.write_bytes(b"half a shard")
    staged(bank, tmp_path / "node")
    assert set(snapshot(folder)) == FILES


def test_a_damaged_original_is_refused_and_not_copied(bank: Bank, tmp_path: Path) -> None:
    content = bytearray((bank.path / SHARDS[2]).read_bytes())
    content[-1] ^= 1
    (bank.path / SHARDS[2]).write_bytes(content)
    with pytest.raises(UserError, match=r"shard-00002\.npy is damaged.*bank verify"):
        staged(bank, tmp_path / "node")
    (folder,) = (tmp_path / "node").iterdir()
    assert not {SHARDS[2], "bank.json"} & set(snapshot(folder))


def test_too_little_space_is_one_sentence_before_anything_is_copied(
    bank: Bank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "free")
    needed = sum(entry["bytes"] for entry in (*bank.shards, bank.index_entry))
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage(needed - 1))
    with pytest.raises(UserError, match=r"does not fit into .*node.* GB are free .*hardware\.stage: null"):
        staged(bank, tmp_path / "node")
    assert list((tmp_path / "node").rglob("*.npy")) == []
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage(needed))
    copy = staged(bank, tmp_path / "node")
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage(0))  # a copy that is there needs none
    assert staged(bank, tmp_path / "node").path == copy.path


def test_a_disk_that_fills_up_meanwhile_is_told(
    bank: Bank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"does not fit into .*the disk is full at"):
        staged(bank, tmp_path / "node")


def test_variables_in_the_place_are_those_of_the_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCRATCH_OF_JOB", "/scratch/17")
    assert (
        expanded("$SCRATCH_OF_JOB/banks") == expanded("${SCRATCH_OF_JOB}/banks") == Path("/scratch/17/banks")
    )
    monkeypatch.delenv("SCRATCH_OF_JOB")
    with pytest.raises(
        UserError, match=r"\$SCRATCH_OF_JOB/banks, but the environment variable SCRATCH_OF_JOB"
    ):
        expanded("$SCRATCH_OF_JOB/banks")


def test_batches_of_the_copy_are_those_of_the_bank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NODE", str(tmp_path / "node"))
    content: dict[str, Any] = {
        "name": "staged",
        "data": {"name": "phantom_chest", "count": 240},
        "generator": {"name": "oracle", "parents": ["scanner"]},
        "bank": {"do": {"scanner": "all"}},
        "views": {"counterfactual": {"variable": "scanner"}},
        "train": {"epochs": 1, "batch": 24},
    }
    jobs = [
        Pipeline(
            parse_recipe({**content, "hardware": {"accelerator": "cpu", "stage": place}}, "x"), tmp_path, True
        )
        for place in (None, "$NODE")
    ]
    assert jobs[0].encoder_stage == jobs[1].encoder_stage
    data = [job.view_data() for job in jobs]
    paths = [job.generation.staged_bank.path for job in jobs]
    assert paths[0] == jobs[0].generation.bank.path
    assert paths[1].parent == tmp_path / "node"
    for step in range(2):
        first, second = (own[step][0] for own in data)
        for name in ("images", "slot", "affine", "row"):
            assert torch.equal(getattr(first, name), getattr(second, name))

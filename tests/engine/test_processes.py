"""Several processes that train together do what one does, end together, and leave the same files."""

from pathlib import Path
from typing import Any

import pytest
import torch
from trainings import STEPS, Blocks, Crops, Images, dino, trained

from cfssl.engine.checkpoint import load_checkpoint
from cfssl.engine.processes import agreed, count, first_says, largest, rank, together
from cfssl.engine.run import HardwareSettings, read_metrics
from cfssl.engine.world import World, meeting_place, world
from cfssl.errors import UserError


def state(folder: Path) -> dict[str, Any]:
    return load_checkpoint(folder / "checkpoint.safetensors")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained by one process."""
    folder = tmp_path_factory.mktemp("alone")
    assert trained(folder, 1, Images(parts=2)) == [0]
    return folder


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained by two."""
    folder = tmp_path_factory.mktemp("both")
    assert trained(folder, 2, Images(parts=2)) == [0, 0]
    return folder


def assert_close(found: Path, expected: Path) -> None:
    first, second = state(found), state(expected)
    for part in ("task", "optimizer"):
        torch.testing.assert_close(first[part], second[part], rtol=1e-9, atol=1e-8)
    assert first["step"] == second["step"] == STEPS


def test_two_processes_train_as_one_does_with_batch_statistics_and_micro_batches(
    alone: Path, both: Path
) -> None:
    assert_close(both, alone)
    assert state(both)["task"]["steps_seen"] == STEPS
    lines, expected = (read_metrics(folder / "metrics.jsonl") for folder in (both, alone))
    assert [line["step"] for line in lines] == [4, 9, 11]
    assert [line["loss"] for line in lines] == pytest.approx([line["loss"] for line in expected], rel=1e-5)


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (2, 2)])
def test_another_number_of_processes_goes_on_where_one_stopped(
    tmp_path: Path, both: Path, alone: Path, before: int, after: int
) -> None:
    assert trained(tmp_path, before, Images(parts=2), stop_at=7) == [0] * before
    assert state(tmp_path)["step"] == 7
    assert trained(tmp_path, after, Images(parts=2)) == [0] * after
    assert_close(tmp_path, alone)
    if before == after:
        found, expected = (state(folder)["task"] for folder in (tmp_path, both))
        assert all(torch.equal(value, expected[name]) for name, value in found.items())
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [4, 9, 11]


@pytest.mark.parametrize("fails", [0, 1])
def test_an_error_in_one_process_ends_all_and_is_named(tmp_path: Path, fails: int) -> None:
    codes = trained(tmp_path, 2, Images(fails=fails))
    assert codes[fails] == 3
    assert (tmp_path / f"{fails}.txt").read_text() == "ValueError: no image 5"
    if codes[1 - fails] != 2:  # which the watch gives a process that has not noticed
        words = (tmp_path / f"{1 - fails}.txt").read_text()
        assert words == f"UserError: Process {fails} of 2 stopped: no image 5"
        assert codes[1 - fails] == 3
    assert state(tmp_path)["step"] == 4


def test_a_killed_process_ends_the_other_and_both_go_on_from_the_checkpoint(tmp_path: Path) -> None:
    assert trained(tmp_path, 2, Images(fails=1, killed=True)) == [3, -9]
    assert "gone without a word" in (tmp_path / "0.txt").read_text()
    assert trained(tmp_path, 2) == [0, 0]
    assert trained(tmp_path / "whole", 2) == [0, 0]
    found, expected = (state(folder)["task"] for folder in (tmp_path, tmp_path / "whole"))
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


def test_a_signal_to_one_process_stops_all_at_the_same_step(tmp_path: Path) -> None:
    assert trained(tmp_path, 2, Images(signalled=1)) == [3, 3]
    assert [(tmp_path / f"{place}.txt").read_text() for place in (0, 1)] == ["Interrupted: SIGUSR2"] * 2
    assert state(tmp_path)["step"] == 5


def test_sharded_weights_are_trained_as_whole_ones_and_go_on_either_way(tmp_path: Path) -> None:
    assert trained(tmp_path / "whole", 1, task=Blocks) == [0]
    assert trained(tmp_path / "sharded", 2, strategy="fsdp", task=Blocks) == [0, 0]
    assert trained(tmp_path / "resumed", 1, task=Blocks, stop_at=6) == [0]
    assert trained(tmp_path / "resumed", 2, strategy="fsdp", task=Blocks, stop_at=9) == [0, 0]
    assert trained(tmp_path / "resumed", 2, strategy="ddp", task=Blocks) == [0, 0]
    expected = state(tmp_path / "whole")
    for name in ("sharded", "resumed"):
        found = state(tmp_path / name)
        for part in ("task", "optimizer"):
            torch.testing.assert_close(found[part], expected[part], rtol=1e-3, atol=1e-5)


def test_a_sharded_vision_transformer_learns_what_a_whole_one_does(tmp_path: Path) -> None:
    lines = []
    for size, strategy in ((1, "ddp"), (2, "fsdp")):
        assert trained(tmp_path / strategy, size, Crops(), strategy, task=dino, stop_at=5) == [0] * size
        lines += read_metrics(tmp_path / strategy / "metrics.jsonl")
    assert lines[1] == pytest.approx(lines[0], rel=1e-2)  # gradients as large as here amplify rounding
    assert trained(tmp_path / "fsdp", 1, Crops(), task=dino, stop_at=7) == [0]


def test_alone_nothing_is_agreed_with_anybody() -> None:
    assert (rank(), count(), largest(7), agreed(True), first_says("yes")) == (0, 1, 7, True, "yes")
    with together(HardwareSettings(accelerator="cpu"), "train"):
        assert count() == 1


@pytest.mark.parametrize(
    ("started", "hardware", "expected"),
    [
        ("1", {"nodes": 2}, "hardware.nodes is 2, but this process was started alone"),
        ("3", {"devices": 2}, "is 2 x 1, but 3 processes were started"),
        ("2", {}, "is 1 x 1, but 2 processes were started"),
    ],
)
def test_other_processes_than_the_recipe_asks_for_are_refused(
    monkeypatch: pytest.MonkeyPatch, started: str, hardware: dict[str, int], expected: str
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", started)
    settings = HardwareSettings(accelerator="cpu", **hardware)
    with pytest.raises(UserError, match=expected), together(settings, "train"):
        raise AssertionError("it has begun")


def test_a_process_knows_its_place_from_torchrun_or_a_step_of_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_NTASKS", "4")  # of a batch script, which is one process
    monkeypatch.setenv("SLURM_PROCID", "3")
    monkeypatch.setenv("SLURM_LOCALID", "1")
    assert world() == World(0, 1, 0)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    assert world() == World(3, 4, 1)
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert world() == World(2, 8, 0)
    monkeypatch.setenv("MASTER_ADDR", "no-such-node.invalid")
    monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.setenv("SLURM_LAUNCH_NODE_IPADDR", "127.0.0.3")
    assert meeting_place() == "tcp://127.0.0.3:29500"

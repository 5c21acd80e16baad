"""How far jobs are: what a scheduler with accounting says, what one without says, and what logs say."""

import os
from pathlib import Path

import pytest

from cfssl.errors import UserError
from cfssl.files import write_json, write_text
from cfssl.launch.status import (
    last_word,
    live_steps,
    progress,
    slurm_states,
    status,
    submission_of,
    submissions,
)
from cfssl.launch.submission import Submission


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose scripts go before those of the machine."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


def command(folder: Path, name: str, text: str, code: int = 0) -> None:
    path = folder / name
    write_text(folder / f"{name}.txt", text)
    write_text(path, f'#!/bin/sh\necho "$@" >> {folder}/{name}.calls\ncat {folder}/{name}.txt\nexit {code}\n')
    path.chmod(0o755)


ACCOUNTED = """JobID|State|NodeList
7|COMPLETED|n1
9_0|RUNNING|n2
9_[1-3]|PENDING|None assigned
12|CANCELLED by 0|n1
"""
CONTROLLED = (
    "JobId=9 ArrayJobId=9 ArrayTaskId=1-3 JobName=cfssl-bank JobState=PENDING Reason=Resources NodeList=\n"
    "JobId=10 ArrayJobId=9 ArrayTaskId=0 JobName=cfssl-bank JobState=RUNNING NodeList=n2 Restarts=0\n"
)


def test_accounting_says_the_states_of_jobs_and_of_every_part_of_an_array(commands: Path) -> None:
    command(commands, "sacct", ACCOUNTED)
    found = slurm_states(["7", "9_0", "9_1", "12"])
    assert {number: found[number] for number in ("7", "9_0", "9_1", "9_3", "12")} == {
        "7": "COMPLETED",
        "9_0": "RUNNING",
        "9_1": "PENDING",
        "9_3": "PENDING",
        "12": "CANCELLED",
    }
    assert "12,7,9" in (commands / "sacct.calls").read_text()


def test_without_accounting_the_controller_says_the_same(commands: Path) -> None:
    command(commands, "sacct", "Slurm accounting storage is disabled", 1)
    command(commands, "scontrol", CONTROLLED)
    found = slurm_states(["9_0", "9_1", "9_2", "9_3"])
    assert found["9_0"] == "RUNNING"
    assert [found[f"9_{index}"] for index in (1, 2, 3)] == ["PENDING"] * 3


def submitted(runs: Path, cluster: str = "slurm") -> Submission:
    found = Submission.new(runs)
    job = {"kind": "bank", "recipe": "r", "needs": [], "waits": [], "state": None}
    entries = [
        {**job, "key": "b-parts", "step": "bank-1", "parts": 2, "ids": ["9_0", "9_1"]},
        {**job, "key": "b", "step": "bank-1", "parts": None, "ids": ["12"]},
        {**job, "key": "e", "kind": "encoder", "step": "encoder-2", "parts": None, "ids": ["7"]},
    ]
    write_json(found.folder / "jobs.json", {"cluster": cluster, "jobs": entries})
    return found


def test_a_step_is_under_way_while_the_job_that_completes_it_is(commands: Path, tmp_path: Path) -> None:
    command(
        commands,
        "sacct",
        "JobID|State|NodeList\n9_0|RUNNING|n1\n9_1|FAILED|n1\n12|PENDING|\n7|COMPLETED|n1\n",
    )
    submitted(tmp_path / "runs")
    assert live_steps(tmp_path / "runs") == {"bank-1": ("12",)}
    submitted(tmp_path / "here", "local")
    assert live_steps(tmp_path / "here") == {}


def test_every_part_has_a_line_with_its_last_word_and_a_failed_one_its_reason(
    commands: Path, tmp_path: Path
) -> None:
    command(commands, "sacct", ACCOUNTED)
    found = submitted(tmp_path)
    found.logs.mkdir()
    write_text(found.logs / "9_0_0_log.err", "bank: 1/9\rbank: 5/9\nsubmitit INFO (now) - something\n")
    write_text(
        found.logs / "12_0_log.err",
        "Traceback (most recent call last):\ncfssl.errors.UserError: no shard 3.\nsrun: error: n1: task 0\n",
    )
    lines = status(tmp_path, found)
    assert [(of.number, of.state) for of in lines] == [
        ("9_0", "RUNNING"),
        ("9_1", "PENDING"),
        ("12", "CANCELLED"),
        ("7", "COMPLETED"),
    ]
    assert [of.last for of in lines] == ["bank: 5/9", "", "cfssl.errors.UserError: no shard 3.", ""]


def test_progress_is_what_the_stage_has_written(tmp_path: Path) -> None:
    assert progress(tmp_path / "encoder-1", "encoder") == ""
    (tmp_path / "bank").mkdir()
    for name in ("shard-00000.json", "shard-00000.npy", "shard-00001.json"):
        (tmp_path / "bank" / name).touch()
    assert progress(tmp_path, "bank") == "2 shards"
    write_text(tmp_path / "metrics.jsonl", '{"step": 9, "loss": 1.0}\n{"step": 19, "lo')
    assert progress(tmp_path, "encoder") == "step 9"
    write_json(tmp_path / "done.json", {})
    assert progress(tmp_path, "encoder") == "done"


def test_a_long_log_is_read_from_its_end(tmp_path: Path) -> None:
    write_text(tmp_path / "3_0_log.err", "x" * 100_000 + "\nthe end\n")
    assert last_word(tmp_path, "3", "RUNNING") == "the end"


def test_a_submission_is_found_by_its_number(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing was submitted"):
        submission_of(tmp_path, None)
    first, second = Submission.new(tmp_path), Submission.new(tmp_path)
    assert [of.folder for of in submissions(tmp_path)] == [first.folder, second.folder]
    assert submission_of(tmp_path, None).folder == second.folder
    assert submission_of(tmp_path, 1).folder == first.folder
    with pytest.raises(UserError, match="there is no submission 7"):
        submission_of(tmp_path, 7)
    assert first.record == {"jobs": []}

"""What a job does: one step, saved and queued again when it is told to stop; on this machine, without
SLURM."""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from cfssl.cli import main
from cfssl.engine.checkpoint import load_checkpoint
from cfssl.engine.interruption import Interrupted
from cfssl.errors import UserError
from cfssl.launch import job as module
from cfssl.launch.job import StepJob
from cfssl.launch.profile import Profile
from cfssl.launch.status import status, submission_of
from cfssl.launch.steps import steps
from cfssl.launch.submission import Submission, plan
from cfssl.pipeline import Pipeline
from cfssl.recipe import load_recipe, parse_recipe, write_recipe

TINY: dict[str, Any] = {
    "name": "tiny",
    "data": {"name": "phantom_chest", "count": 120, "splits": {"train": 0.5, "val": 0.2, "test": 0.3}},
    "objective": {"name": "simclr", "hidden": 16, "output": 8},
    "views": {"size": 32},
    "backbone": {"name": "test_byobnet"},
    "train": {"epochs": 8, "batch": 20, "log_every": 1},
    "hardware": {"accelerator": "cpu", "threads": 1},
    "evaluate": [{"name": "knn", "target": "disease"}],
}


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    write_recipe(parse_recipe(TINY, "x"), path)
    return path


def pipeline(recipe: Path, runs: Path) -> Pipeline:
    return Pipeline(load_recipe(recipe), runs, quiet=True)


def weights(recipe: Path, runs: Path) -> bytes:
    return pipeline(recipe, runs).encoder_stage.product.read_bytes()


def of_kind(recipe: Path, runs: Path, kind: str) -> StepJob:
    names = [step.name for step in steps(pipeline(recipe, runs)) if step.kind == kind]
    return StepJob(str(recipe), str(runs), names[0])


def test_steps_one_after_the_other_make_what_a_run_makes(recipe: Path, tmp_path: Path) -> None:
    pipeline(recipe, tmp_path / "run").run()
    for step in steps(pipeline(recipe, tmp_path / "steps")):
        assert StepJob(str(recipe), str(tmp_path / "steps"), step.name)() == step.name
    assert weights(recipe, tmp_path / "steps") == weights(recipe, tmp_path / "run")
    for name in ("knn-disease.json", "report.html"):
        assert (tmp_path / "steps" / "tiny" / name).is_file()
    results = [
        json.loads((tmp_path / of / "tiny" / "knn-disease.json").read_text()) for of in ("run", "steps")
    ]
    assert results[0][0]["overall"] == results[1][0]["overall"]


@pytest.mark.parametrize("is_early", [True, False])
def test_a_job_that_is_told_to_stop_saves_is_queued_again_and_ends_with_the_same_weights(
    recipe: Path, tmp_path: Path, is_early: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """USR2, before the first step, when there is nothing to save, and in the middle; whoever queues jobs
    again is called when the checkpoint is there."""
    runs, seen = tmp_path / "asked", []
    pipeline(recipe, tmp_path / "whole").objective  # noqa: B018
    own = of_kind(recipe, runs, "encoder")
    pipeline(recipe, runs).table  # noqa: B018
    folder = pipeline(recipe, runs).encoder_stage.folder

    def requeue(number: int, frame: object) -> None:
        path = folder / "checkpoint.safetensors"
        seen.append(load_checkpoint(path)["step"] if path.exists() else None)

    from cfssl.data.views import ViewData

    real = ViewData.__getitem__

    def asking(self: ViewData, step: int) -> Any:
        if step == (0 if is_early else 7):
            os.kill(os.getpid(), signal.SIGUSR2)
        return real(self, step)

    before = signal.signal(signal.SIGUSR2, requeue)
    try:
        with monkeypatch.context() as patched:
            patched.setattr(ViewData, "__getitem__", asking)
            with pytest.raises(Interrupted):
                own()
        assert seen == [None if is_early else 7]
        assert signal.getsignal(signal.SIGUSR2) is requeue
        again = own.checkpoint().function
        assert again == own
        again()
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert weights(recipe, runs) == weights(recipe, tmp_path / "whole")


def test_a_job_that_is_cancelled_is_not_queued_again(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    before = signal.signal(signal.SIGUSR2, lambda number, frame: seen.append(number))

    def cancelled(self: StepJob, interruption: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(StepJob, "make", cancelled)
    try:
        with pytest.raises(Interrupted, match="SIGTERM"):
            of_kind(recipe, tmp_path, "table")()
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert seen == []


def test_a_job_says_where_the_code_is_another_than_when_it_was_submitted(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "git_state", lambda: {"commit": "abc", "dirty": False})
    module.warn_of_other_code(("abc", False))
    assert capsys.readouterr().err == ""
    module.warn_of_other_code(("abd", True))
    expected = "cfssl: warning: submitted at abd with local changes, runs at abc.\n"
    assert capsys.readouterr().err == expected


def test_a_step_that_is_no_more_is_refused(recipe: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no step encoder-0 any more"):
        StepJob(str(recipe), str(tmp_path / "runs"), "encoder-0")()


@pytest.mark.slow
def test_on_this_machine_a_submission_runs_to_its_end_and_a_second_one_does_what_is_left(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = tmp_path / "runs"
    monkeypatch.setattr(
        sys, "argv", ["cfssl", "submit", str(recipe), "--cluster", "local", "--runs", str(runs)]
    )
    main_of(0)
    pipeline(recipe, tmp_path / "run").objective  # noqa: B018
    assert weights(recipe, runs) == weights(recipe, tmp_path / "run")
    found = status(runs, submission_of(runs, None))
    assert [of.kind for of in found] == ["table", "bank", "encoder", "features", "evaluation", "report"]
    assert {of.state for of in found} == {"COMPLETED"}
    left = plan([pipeline(recipe, runs)], Profile(cluster="local"))
    assert [of.kind for of in left.jobs] == ["report"]


def test_a_failed_job_is_named_with_its_reason_and_what_needs_it_is_left_out(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> bool:
        raise UserError("the loss is not finite.")

    monkeypatch.setattr("cfssl.pipeline.fit", fails)
    job = pipeline(recipe, tmp_path / "runs")
    submission = Submission.new(tmp_path / "runs")
    with pytest.raises(UserError, match=r"1 of 6 jobs failed \(encoder-.*\); cfssl status says why"):
        submission.submit(plan([job], Profile()), Profile(cluster="debug"))
    states = {of.kind: of.state for of in status(tmp_path / "runs", submission)}
    assert states == {
        "table": "COMPLETED",
        "bank": "COMPLETED",
        "encoder": "FAILED",
        "features": "LEFT OUT",
        "evaluation": "LEFT OUT",
        "report": "LEFT OUT",
    }


def main_of(code: int) -> None:
    try:
        main()
    except SystemExit as stop:
        assert stop.code == code  # noqa: PT017

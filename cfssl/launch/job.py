"""What a job of the cluster does: one step of a recipe, in a process that may be told to stop at any time.

submitit asks for the job again where it gets USR2, the signal that SLURM sends before a time limit and before
preemption. Here the signal belongs to the step first, which saves what it has (see
cfssl/engine/interruption.py); then submitit gets it, and queues the job with a fresh `StepJob` on the same
stages. On SIGTERM alone (somebody cancels the job, or the cluster takes the node without asking) the step
saves, and it is for SLURM to say whether the job comes again.
"""

import os
import signal
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from cfssl.engine.interruption import Interrupted, Interruption
from cfssl.errors import UserError
from cfssl.launch.steps import steps
from cfssl.pipeline import Pipeline, lead
from cfssl.provenance import git_state
from cfssl.recipe import load_recipe

REQUEUE = signal.SIGUSR2
LINGER = 60.0  # seconds in which the end of a job whose step is saved is left to SLURM


@dataclass(frozen=True)
class StepJob:
    """Makes the step `step` of a resolved `recipe`, or its `part` (index, count). `tasks`: (per node, nodes)
    of the job, where the recipe has to know of them. `code`: the git state in which it was submitted. Called
    by submitit on the node, in every task."""

    recipe: str
    runs: str
    step: str
    part: tuple[int, int] | None = None
    tasks: tuple[int, int] | None = None
    code: tuple[str | None, bool | None] = (None, None)

    def __call__(self) -> str:
        """Returns the name of the step. Raises what the step raises."""
        handler, interruption = signal.getsignal(REQUEUE), Interruption()
        warn_of_other_code(self.code)
        try:
            with interruption.listening():
                lead(partial(self.make, interruption), interruption)
        except Interrupted as stop:
            print(f"cfssl: {self.step} is saved ({stop}).", file=sys.stderr, flush=True)
            if stop.number == REQUEUE and callable(handler):
                handler(REQUEUE, None)  # returns in all tasks but the first, which asks for the whole job
            linger()
            raise
        return self.step

    def make(self, interruption: Interruption) -> None:
        """The step itself."""
        devices, nodes = self.tasks or (None, None)
        together = [f"hardware.devices={devices}", f"hardware.nodes={nodes}"] if self.tasks else []
        recipe = load_recipe(Path(self.recipe), together)
        job = Pipeline(recipe, Path(self.runs), interruption=interruption)
        found = {step.name: step for step in steps(job)}
        if self.step not in found:
            raise UserError(
                f"The recipe {self.recipe} has no step {self.step} any more, because code or data have "
                "changed since it was submitted; submit it again."
            )
        step = found[self.step]
        if self.part is None:
            step.make()
        else:
            assert step.make_part is not None
            step.make_part(*self.part)

    def checkpoint(self) -> Any:
        """What submitit queues again: the same job, with nothing of this process in it."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(replace(self))


def linger() -> None:
    """Waits to be ended: a job that ends by itself has failed, in the eyes of SLURM, and one that is ended is
    preempted, queued again or cancelled."""
    if "SLURM_JOB_ID" in os.environ:
        time.sleep(LINGER)


def warn_of_other_code(submitted: tuple[str | None, bool | None]) -> None:
    """Says where the code is not what it was when the job was submitted."""
    now = git_state()
    if (now["commit"], now["dirty"]) != submitted:
        was, found = (
            f"{commit or 'no commit'}{' with local changes' if dirty else ''}"
            for commit, dirty in (submitted, (now["commit"], now["dirty"]))
        )
        print(f"cfssl: warning: submitted at {was}, runs at {found}.", file=sys.stderr, flush=True)

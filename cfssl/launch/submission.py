"""From recipes to jobs: which steps are to be done, what each waits for, and the handing over to submitit.

Recipes that share a stage share its job, and a job of an earlier submission that is still waiting or running
is waited for instead of being submitted again. `RUNS/submissions/<number>/` keeps the resolved recipes, the
jobs and their logs; jobs.json is written after every job, so that a submission that is cut short is known.
"""

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from submitit import AutoExecutor
from submitit.core.utils import FailedSubmissionError

from cfssl.errors import UserError
from cfssl.files import read_json, write_json
from cfssl.launch.job import StepJob
from cfssl.launch.profile import KINDS, Profile, Resources
from cfssl.launch.steps import Step, steps
from cfssl.pipeline import Pipeline
from cfssl.provenance import git_state
from cfssl.recipe import write_recipe

SUBMISSIONS = "submissions"
DONE, FAILED, LEFT_OUT = "COMPLETED", "FAILED", "LEFT OUT"  # as SLURM says it, and what it does not know


@dataclass(frozen=True)
class Job:
    """One job, or an array of them: the step `step` of the recipe called `recipe` at once, or those of its
    `parts` parts whose numbers are in `indices`. `needs`: keys of jobs, `waits`: ids of jobs of earlier
    submissions."""

    key: str
    kind: str
    step: str
    recipe: str
    parts: int | None = None
    indices: tuple[int, ...] = ()
    needs: tuple[str, ...] = ()
    waits: tuple[str, ...] = ()


@dataclass
class Plan:
    """`jobs` in an order in which each comes after what it needs. `pipelines`: by the name of the recipe.
    `done`: steps that are there; `waiting`: steps that jobs of earlier submissions are making, with their
    ids."""

    pipelines: dict[str, Pipeline]
    jobs: list[Job] = field(default_factory=list)
    done: list[str] = field(default_factory=list)
    waiting: dict[str, tuple[str, ...]] = field(default_factory=dict)


def plan(
    pipelines: Sequence[Pipeline], profile: Profile, live: Mapping[str, tuple[str, ...]] | None = None
) -> Plan:
    """What has to be done for all recipes. `live`: ids of jobs that are making a step already. Raises
    `UserError` for two different recipes of one name, which would share a folder."""
    found = Plan({})
    for job in pipelines:
        name = job.recipe.name
        if name in found.pipelines and found.pipelines[name].recipe != job.recipe:
            raise UserError(
                f"Two different recipes are called {name!r} and would write their reports into the same "
                f"folder {job.folder}; give one of them another name."
            )
        found.pipelines[name] = job
    last: dict[str, str] = {}  # step -> key of the job that completes it
    for name, job in found.pipelines.items():
        for step in steps(job):
            if step.name in last or step.name in found.done or step.name in found.waiting:
                continue
            if step.is_done():
                found.done.append(step.name)
            elif live and step.name in live:
                found.waiting[step.name] = tuple(live[step.name])
            else:
                _add(found, step, name, profile.resources(step.kind), last)
    return found


def _add(found: Plan, step: Step, recipe: str, resources: Resources, last: dict[str, str]) -> None:
    keys = [last[name] for name in step.needs if name in last]
    # What something else waits for already need not be waited for.
    before: dict[str, set[str]] = {}
    for job in found.jobs:
        before[job.key] = {*job.needs}.union(*(before[key] for key in job.needs))
    implied = set().union(*(before[key] for key in keys))
    needs = tuple(key for key in keys if key not in implied)
    waits = tuple(number for name in step.needs for number in found.waiting.get(name, ()))
    own = step.kind, step.name, recipe
    parts = resources.parts if step.missing_parts is not None else 1
    missing = step.missing_parts(parts) if step.missing_parts is not None and parts > 1 else []
    if missing:
        key = f"{step.name}-parts"
        found.jobs.append(Job(key, *own, parts, tuple(missing), needs, waits))
        needs, waits = (key,), ()
    found.jobs.append(Job(step.name, *own, needs=needs, waits=waits))
    last[step.name] = step.name


def tasks(profile: Profile, kind: str) -> tuple[int, int]:
    """Of a job: how many per node, and on how many nodes."""
    resources = profile.resources(kind)
    several = max(1, resources.gpus) if kind == "encoder" else 1
    return resources.tasks or several, resources.nodes


def sbatch_parameters(profile: Profile, kind: str, name: str) -> dict[str, Any]:
    """What submitit is told about jobs of a kind on SLURM."""
    resources = profile.resources(kind)
    per_node, nodes = tasks(profile, kind)
    found = {
        "name": name,
        "timeout_min": resources.minutes,
        "nodes": nodes,
        "tasks_per_node": per_node,
        "cpus_per_task": resources.cpus,
        "gpus_per_node": resources.gpus or None,
        "mem_gb": resources.memory_gb,
        "slurm_partition": resources.partition,
        "slurm_account": resources.account,
        "slurm_qos": resources.qos,
        "slurm_constraint": resources.constraint,
        "slurm_array_parallelism": resources.parallel,
        "slurm_signal_delay_s": profile.signal_seconds,
        "slurm_setup": list(profile.setup) or None,
        "slurm_additional_parameters": {"requeue": True, **resources.slurm},
    }
    return {key: value for key, value in found.items() if value is not None}


def described(found: Plan, profile: Profile) -> list[str]:
    """The plan for a person, a line each: what is there, what is waited for, and what every job gets."""
    lines = [f"there already: {name}" for name in found.done]
    lines += [f"waits for job {', '.join(ids)}: {name}" for name, ids in found.waiting.items()]
    for job in found.jobs:
        after = f" after {', '.join(job.needs)}" if job.needs else ""
        array = f", {len(job.indices)} of {job.parts} parts" if job.parts else ""
        lines.append(f"{job.step}{array} ({job.recipe}){after}")
    if profile.cluster == "slurm":
        for kind in KINDS:
            if any(job.kind == kind for job in found.jobs):
                own = sbatch_parameters(profile, kind, f"cfssl-{kind}")
                lines.append(f"{kind}: " + ", ".join(f"{name}={value}" for name, value in own.items()))
    return lines


class Submission:
    """A folder of submitted jobs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def new(cls, runs: Path) -> "Submission":
        """A folder that no other submission has: job ids come again on a fresh cluster, their logs must not
        meet."""
        parent = runs / SUBMISSIONS
        parent.mkdir(parents=True, exist_ok=True)
        number = 1 + max((int(path.name) for path in parent.iterdir() if path.name.isdigit()), default=0)
        while True:
            try:
                (parent / f"{number:04d}").mkdir()
            except FileExistsError:  # somebody else submits at this moment
                number += 1
                continue
            return cls(parent / f"{number:04d}")

    @property
    def logs(self) -> Path:
        return self.folder / "jobs"

    @property
    def record(self) -> dict[str, Any]:
        """What jobs.json says; without jobs where it was never written."""
        path = self.folder / "jobs.json"
        found: dict[str, Any] = read_json(path) if path.exists() else {"jobs": []}
        return found

    def submit(self, found: Plan, profile: Profile) -> list[dict[str, Any]]:
        """Hands all jobs over to the cluster of the profile, each after what it needs; on the local cluster
        and in debug, when that is done. Returns their entries in jobs.json. Raises `UserError` when a job of
        these two failed, after all that do not need it."""
        state, recipes = git_state(), {}
        for name, job in found.pipelines.items():
            recipes[name] = (self.folder / f"{name}.yaml").resolve()
            write_recipe(job.recipe, recipes[name])
        runs = next(iter(found.pipelines.values())).production.runs.resolve()
        header = {
            "submitted": datetime.now(UTC).isoformat(timespec="seconds"),
            "cluster": profile.cluster,
            "git": state,
        }
        entries: list[dict[str, Any]] = []

        def keep(job: Job, ids: Sequence[str], state: str | None) -> None:
            """Notes a job; `state` of one that is over."""
            entries.append({**asdict(job), "ids": list(ids), "state": state})
            write_json(self.folder / "jobs.json", {**header, "jobs": entries})

        def works(job: Job) -> list[StepJob]:
            parts = [None] if job.parts is None else [(index, job.parts) for index in job.indices]
            code = state["commit"], state["dirty"]
            share = tasks(profile, job.kind)
            own = str(recipes[job.recipe]), str(runs), job.step
            return [StepJob(*own, part, share if share != (1, 1) else None, code) for part in parts]

        hand_over = to_slurm if profile.cluster == "slurm" else to_this_machine
        hand_over(found.jobs, works, profile, self.logs, keep)
        return entries


Keep = Callable[[Job, Sequence[str], str | None], None]
Works = Callable[[Job], list[StepJob]]


def to_slurm(jobs: Sequence[Job], works: Works, profile: Profile, logs: Path, keep: Keep) -> None:
    """Submits all `jobs`, those of several parts as arrays. SLURM drops a job when one that it needs
    fails."""
    if shutil.which("sbatch") is None:
        raise UserError(
            "The profile says slurm, and there is no sbatch here; submit from a login node, or take "
            "--cluster local."
        )
    ids: dict[str, str] = {}
    for job in jobs:
        executor = AutoExecutor(logs, cluster="slurm", slurm_max_num_timeout=profile.requeues)
        parameters = sbatch_parameters(profile, job.kind, f"cfssl-{job.kind}")
        before = (*job.waits, *(ids[key] for key in job.needs))
        if before:
            parameters["slurm_additional_parameters"] |= {
                "dependency": f"afterok:{':'.join(before)}",
                "kill-on-invalid-dep": "yes",
            }
        try:
            executor.update_parameters(**parameters)
            with executor.batch():
                submitted = [executor.submit(work) for work in works(job)]
        except (ValueError, FailedSubmissionError) as error:
            raise UserError(
                f"SLURM does not take the job of {job.step}: {' '.join(str(error).split())[-300:]} Mend the "
                f"profile; jobs submitted before it wait under {logs.parent}."
            ) from None
        ids[job.key] = submitted[0].job_id.split("_")[0]
        keep(job, [of.job_id for of in submitted], None)


def to_this_machine(jobs: Sequence[Job], works: Works, profile: Profile, logs: Path, keep: Keep) -> None:
    """Runs all `jobs` in processes of this machine, `parallel` at a time, or one by one in this process. What
    needs a failed job is left out."""
    waiting, states = list(jobs), dict[str, str]()
    running: dict[str, tuple[Job, list[Any]]] = {}

    def start(job: Job) -> list[Any]:
        executor = AutoExecutor(logs, cluster=profile.cluster, local_max_num_timeout=profile.requeues)
        resources = profile.resources(job.kind)
        if profile.cluster == "local":
            executor.update_parameters(
                timeout_min=resources.minutes,
                gpus_per_node=resources.gpus,
                tasks_per_node=tasks(profile, job.kind)[0],
                local_setup=list(profile.setup),
            )
        return [executor.submit(work) for work in works(job)]

    while waiting or running:
        for job in list(waiting):
            needed = [states.get(key) for key in job.needs]
            if any(state not in (None, DONE) for state in needed):
                states[job.key] = LEFT_OUT
                keep(job, [], LEFT_OUT)
            elif None in needed or len(running) >= profile.parallel:
                continue
            else:
                running[job.key] = job, start(job)
            waiting.remove(job)
        for key, (job, submitted) in list(running.items()):
            if all(of.done() for of in submitted) if profile.cluster == "local" else True:
                failed = [of.exception() for of in submitted]
                states[key] = FAILED if any(failed) else DONE
                keep(job, [of.job_id for of in submitted], states[key])
                del running[key]
        if profile.cluster == "local":
            time.sleep(0.2)
    bad = [job.step for job in jobs if states[job.key] == FAILED]
    if bad:
        raise UserError(
            f"{len(bad)} of {len(jobs)} jobs failed ({', '.join(bad)}); cfssl status says why, and the same "
            "command does what is left."
        )

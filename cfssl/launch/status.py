"""How far submitted jobs are: their states from the scheduler, the progress of their stages, the last word of
their logs, and of those that failed the reason."""

import re
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cfssl.engine.run import read_metrics
from cfssl.errors import UserError
from cfssl.launch.submission import SUBMISSIONS, Submission

LIVE = (
    "PENDING",
    "RUNNING",
    "REQUEUED",
    "REQUEUE_HOLD",
    "SUSPENDED",
    "COMPLETING",
    "CONFIGURING",
    "PREEMPTED",
)
UNKNOWN = "UNKNOWN"
WIDTH = 100  # characters of a log line


@dataclass(frozen=True)
class JobStatus:
    """Of one job, or one part of an array. `state` as SLURM calls it; `progress` of its stage; `last`: the
    last line of its log, and of a failed one the reason."""

    number: str
    step: str
    kind: str
    recipe: str
    state: str
    progress: str
    last: str


def submissions(runs: Path) -> list[Submission]:
    """All of them, the oldest first."""
    folder = runs / SUBMISSIONS
    return [Submission(path) for path in sorted(folder.glob("[0-9]*"))] if folder.is_dir() else []


def submission_of(runs: Path, number: int | None) -> Submission:
    """The one with this number, or the last. Raises `UserError` where there is none."""
    found = submissions(runs)
    chosen = [of for of in found if number is None or int(of.folder.name) == number]
    if not chosen:
        which = "nothing was submitted" if number is None else f"there is no submission {number}"
        raise UserError(f"Under {runs} {which}; cfssl submit does that, and --runs names another folder.")
    return chosen[-1]


def status(runs: Path, submission: Submission) -> list[JobStatus]:
    """Of every job of a submission, every part of an array apart."""
    entries = submission.record["jobs"]
    states = states_of(submission)
    found = []
    for entry in entries:
        for number in entry["ids"] or ["-"]:
            state = states.get(number, UNKNOWN)
            folder = runs / "stages" / entry["step"]
            if (folder / "done.json").exists() and state == UNKNOWN:
                state = "COMPLETED"
            last = last_word(submission.logs, number, state)
            own = entry["step"], entry["kind"], entry["recipe"]
            found.append(JobStatus(number, *own, state, progress(folder, entry["kind"]), last))
    return found


def live_steps(runs: Path) -> dict[str, tuple[str, ...]]:
    """Steps that jobs of the cluster are going to complete, and the ids of these jobs."""
    found: dict[str, tuple[str, ...]] = {}
    for submission in submissions(runs):
        states = states_of(submission)
        for entry in submission.record["jobs"]:
            ids = [number for number in entry["ids"] if states.get(number) in LIVE]
            if ids and entry["parts"] is None:
                found[entry["step"]] = tuple(ids)
    return found


def states_of(submission: Submission) -> dict[str, str]:
    """Job id -> state."""
    record = submission.record
    known = {number: of["state"] for of in record["jobs"] for number in of["ids"] or ["-"] if of["state"]}
    if record.get("cluster") != "slurm":
        return known
    return known | slurm_states(number for of in record["jobs"] for number in of["ids"])


def slurm_states(ids: Iterable[str]) -> dict[str, str]:
    """What SLURM says of jobs, those of arrays as ARRAY_INDEX: by its accounting, or, on a cluster that keeps
    none, by its controller, which forgets jobs some time after their end."""
    from submitit.slurm.slurm import SlurmInfoWatcher

    numbers = sorted({number.split("_")[0] for number in ids})
    if not numbers:
        return {}
    command = ["sacct", "-X", "-o", "JobID,State,NodeList", "--parsable2", "-j", ",".join(numbers)]
    told = subprocess.run(command, capture_output=True, text=True, check=False)
    text = told.stdout if told.returncode == 0 else controller_table(numbers)
    found: Mapping[str, Mapping[str, str]] = SlurmInfoWatcher().read_info(text)
    return {number: of["State"].split()[0] for number, of in found.items()}


def controller_table(numbers: Iterable[str]) -> str:
    """As sacct prints it, by scontrol."""
    lines = ["JobID|State|NodeList"]
    for number in numbers:
        shown = subprocess.run(
            ["scontrol", "show", "job", "-o", number], capture_output=True, text=True, check=False
        )
        for line in shown.stdout.splitlines():
            fields = dict(re.findall(r"(\S+?)=(\S*)", line))
            if "JobState" in fields:
                task = fields.get("ArrayTaskId")
                name = fields["JobId"]
                if task is not None:
                    name = f"{fields['ArrayJobId']}_{task if task.isdigit() else f'[{task}]'}"
                lines.append("|".join([name, fields["JobState"], fields.get("NodeList", "")]))
    return "\n".join(lines)


def progress(folder: Path, kind: str) -> str:
    """Of a stage: done, the last step that was logged, or the shards that are there."""
    if (folder / "done.json").exists():
        return "done"
    if kind == "bank":
        count = len(list((folder / "bank").glob("shard-*.json"))) if (folder / "bank").is_dir() else 0
        return f"{count} shards" if count else ""
    metrics = folder / "metrics.jsonl"
    lines = read_metrics(metrics) if metrics.exists() else []
    return f"step {lines[-1]['step']}" if lines else ""


def last_word(logs: Path, number: str, state: str) -> str:
    """The last line of a job's log; of one that failed, of its errors."""
    from submitit.core.utils import JobPaths

    paths = JobPaths(logs, number, 0)
    for path in (paths.stderr, paths.stdout):
        lines = [line.strip() for line in re.split(r"[\r\n]+", tail(path))]
        lines = [line for line in lines if line and not line.startswith("submitit INFO")]
        if state not in (*LIVE, "COMPLETED"):
            errors = [line for line in lines if "Error" in line or line.startswith("cfssl:")]
            lines = errors or lines
        if lines:
            return lines[-1][:WIDTH]
    return ""


def tail(path: Path, size: int = 20_000) -> str:
    """The end of a text file that may be missing or growing."""
    if not path.is_file():
        return ""
    with path.open("rb") as stream:
        stream.seek(max(0, path.stat().st_size - size))
        return stream.read().decode(errors="replace")


def as_table(found: Iterable[JobStatus]) -> Any:
    """For a terminal."""
    from rich.table import Table

    table = Table("job", "step", "recipe", "state", "progress", "last line")
    for of in found:
        colour = {"COMPLETED": "green", "RUNNING": "cyan"}.get(of.state, "" if of.state in LIVE else "red")
        state = f"[{colour}]{of.state}[/]" if colour else of.state
        table.add_row(of.number, of.step, of.recipe, state, of.progress, of.last)
    return table

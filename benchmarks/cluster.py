"""A recipe on a real SLURM, with everything that happens to jobs there, against the same recipe on this
machine.

    python benchmarks/cluster.py

slurm/up.sh brings a cluster of two nodes up on this machine. `cfssl submit` sends two experiments there that
share table, generator and bank (an array of two parts) and differ in their seed, so that their trainings run
side by side. An urgent job takes both nodes away while they train; later one of the nodes is killed, with
everything on it. Both trainings have to come back by themselves, and weights and bank have to be those of a
run on this machine, byte for byte. The node is started again, and a third training runs on both at once
(gloo, a process on each): it has to end with the weights of two processes that this machine starts itself.
`requeue_seconds`: from the moment the urgent job is submitted until a displaced training has made another
step.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from record import figure, markdown_table, write_results

from cfssl.engine.run import read_metrics
from cfssl.launch.status import status, submission_of
from cfssl.launch.sweeps import pipelines
from cfssl.pipeline import Pipeline
from cfssl.recipe import load_recipe, parse_recipe, write_recipe

ROOT = Path(__file__).parent.parent
TOOLS = ("slurmctld", "slurmd", "munged", "sbatch")
PATH = f"{os.environ['PATH']}:/usr/sbin"
PORT = 27300
PATIENCE = 240.0  # seconds, for anything
RECIPE: dict[str, Any] = {
    "name": "trial",
    "data": {"name": "phantom_chest", "count": 240, "splits": {"train": 0.6, "val": 0.2, "test": 0.2}},
    "generator": {
        "name": "hvae",
        "parents": ["scanner"],
        "network": {"name": "small", "widths": [8, 8, 8, 8], "blocks": 1},
        "train": {"epochs": 1, "batch": 24},
    },
    "bank": {"do": {"scanner": "all"}, "shard_megabytes": 1},
    "views": {"size": 32, "counterfactual": {"variable": "scanner", "view": 1}},
    "objective": {"name": "simclr", "hidden": 32, "output": 16},
    "backbone": {"name": "test_byobnet"},
    "train": {"epochs": 100, "batch": 24, "checkpoint_every": 1000, "log_every": 5},
    "hardware": {"accelerator": "cpu", "threads": 1},
    "evaluate": [{"name": "linear_probe", "target": "disease", "by": ["scanner"]}],
}
SEEDS = "train.seed=0,1"
URGENT_SECONDS = 2
TOGETHER = ("name=together", "train.seed=2", "train.epochs=5", "evaluate=[]")  # of the training on both nodes


def missing_tools() -> list[str]:
    """What of SLURM is not installed."""
    return [tool for tool in TOOLS if shutil.which(tool, path=PATH) is None]


@contextmanager
def cluster(folder: Path) -> Iterator[None]:
    """A SLURM of two nodes whose commands this process and its children reach; down afterwards."""
    before = {name: os.environ.get(name) for name in ("SLURM_CONF", "PATH", "PORT")}
    os.environ |= {"PATH": PATH, "PORT": str(PORT)}
    subprocess.run([ROOT / "slurm" / "up.sh", folder], check=True, stdout=subprocess.DEVNULL)
    os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
    try:
        yield
    finally:
        subprocess.run([ROOT / "slurm" / "down.sh", folder], check=True, stdout=subprocess.DEVNULL)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def until(what: str, happens: Callable[[], Any]) -> Any:
    """Waits for it. Raises RuntimeError when it takes too long."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        if found := happens():
            return found
        time.sleep(0.3)
    raise RuntimeError(f"waited {PATIENCE:.0f} seconds for {what}")


def last_step(job: Pipeline) -> int:
    """Of the training, -1 before the first line."""
    lines = read_metrics(job.metrics_path) if job.metrics_path.exists() else []
    return max((line["step"] for line in lines), default=-1)


def shown(number: str) -> dict[str, str]:
    """What SLURM knows of a job."""
    done = subprocess.run(
        ["scontrol", "show", "job", "-o", number], capture_output=True, text=True, check=True
    )
    return dict(entry.partition("=")[::2] for entry in done.stdout.split())


def finished(runs: Path) -> bool:
    """Whether all jobs of the last submission are over. Raises RuntimeError when one failed."""
    states = status(runs, submission_of(runs, None))
    bad = [of for of in states if of.state not in ("COMPLETED", "PENDING", "RUNNING", "COMPLETING")]
    # A job that is being queued again is in several states for a moment.
    bad = [of for of in bad if of.state in ("FAILED", "CANCELLED", "TIMEOUT", "OUT_OF_MEMORY", "DEADLINE")]
    if bad:
        raise RuntimeError(f"jobs failed: {bad}")
    return bool(states) and all(of.state == "COMPLETED" for of in states)


def kill_node(folder: Path, node: str) -> None:
    """Everything on it at once, as when its power fails: the daemon, and all processes of its jobs."""
    daemon = folder / "pids" / f"slurmd-{node}"
    victims = [daemon.read_text().strip()]
    queue = ["squeue", "-h", "-w", node, "-o", "%A"]
    for job in subprocess.run(queue, capture_output=True, text=True, check=True).stdout.split():
        keeper = ["pgrep", "-f", rf"slurmstepd: \[{job}\."]
        victims += subprocess.run(keeper, capture_output=True, text=True, check=False).stdout.split()
        victims += processes_of(job)
    subprocess.run(["kill", "-9", *victims], check=False)
    daemon.unlink()


def start_node(folder: Path, node: str) -> None:
    """Its daemon again, as slurm/up.sh starts it."""
    with (folder / "logs" / f"slurmd-{node}.out").open("a") as log:
        process = subprocess.Popen(
            ["slurmd", "-D", "-N", node],
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
    (folder / "pids" / f"slurmd-{node}").write_text(str(process.pid))


def processes_of(job: str) -> list[str]:
    """Of this machine, those that SLURM started for a job."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"SLURM_JOB_ID={job}\0".encode() in path.read_bytes():
                found.append(path.parent.name)
        except OSError:  # it has ended, or is somebody else's
            continue
    return found


def encoder_of(recipe: Path, runs: Path) -> Path:
    """The weights of the training on both nodes, or of two processes here."""
    return Pipeline(load_recipe(recipe, TOGETHER), runs).encoder_stage.product


def bank_bytes(job: Pipeline) -> dict[str, bytes]:
    """The shards of a bank."""
    folder = job.generation.bank_stage.folder / "bank"
    return {path.name: path.read_bytes() for path in folder.glob("shard-*.npy")}


def scenario(folder: Path) -> dict[str, Any]:
    """Everything in the docstring, in `folder`; see `main` for what comes back."""
    recipe, profile = folder / "trial.yaml", ROOT / "slurm" / "profiles" / "trial.yaml"
    write_recipe(parse_recipe(RECIPE, "trial"), recipe)
    here, there = folder / "here", folder / "there"
    for job in pipelines([str(recipe)], [SEEDS], here):
        job.objective  # noqa: B018
    pair = [sys.executable, "-m", "cfssl", "pretrain", recipe, *TOGETHER, "hardware.devices=2"]
    subprocess.run([*pair, "--quiet", "--runs", here], check=True, cwd=folder)
    found: dict[str, Any] = {}
    with cluster(folder / "cluster"):
        submit = [sys.executable, "-m", "cfssl", "submit", str(recipe), "--sweep", SEEDS]
        subprocess.run([*submit, "--profile", profile, "--runs", there], check=True, cwd=folder)
        jobs = pipelines([str(recipe)], [SEEDS], there)
        encoders = {
            job.recipe.name: next(
                entry["ids"][0]
                for entry in submission_of(there, None).record["jobs"]
                if entry["step"] == job.encoder_stage.folder.name
            )
            for job in jobs
        }
        until("both trainings to be under way", lambda: all(last_step(job) >= 20 for job in jobs))
        began = time.monotonic()
        urgent = ["sbatch", "-p", "urgent", "-N2", "--exclusive", "-o", "/dev/null"]
        subprocess.run([*urgent, "--wrap", f"sleep {URGENT_SECONDS}"], check=True, stdout=subprocess.DEVNULL)
        until(
            "the trainings to be displaced",
            lambda: all(int(shown(number)["Restarts"]) > 0 for number in encoders.values()),
        )
        steps = [last_step(job) for job in jobs]  # of the processes that have ended
        until(
            "a displaced training to go on",
            lambda: any(last_step(job) > step for job, step in zip(jobs, steps, strict=True)),
        )
        found["requeue_seconds"] = time.monotonic() - began
        victim = until(
            "a training that can lose its node",
            lambda: next(
                (
                    of
                    for job in jobs
                    if (of := shown(encoders[job.recipe.name]))["JobState"] == "RUNNING"
                    and last_step(job) > 40
                ),
                None,
            ),
        )
        kill_node(folder / "cluster", victim["NodeList"])
        until("all jobs to end", lambda: finished(there))
        start_node(folder / "cluster", victim["NodeList"])
        both = folder / "both.yaml"
        both.write_text(profile.read_text() + "  encoder: {nodes: 2}\n")
        alone = [sys.executable, "-m", "cfssl", "submit", str(recipe), *TOGETHER, "--profile", str(both)]
        subprocess.run([*alone, "--runs", there], check=True, cwd=folder)
        until("the training on both nodes to end", lambda: finished(there))
        found["restarts"] = {name: int(shown(number)["Restarts"]) for name, number in encoders.items()}
        found["killed"] = victim["JobId"]
    same = [
        Pipeline(job.recipe, here).encoder_stage.product.read_bytes()
        == job.encoder_stage.product.read_bytes()
        for job in jobs
    ]
    found["weights_equal"] = all(same)
    found["two_nodes_equal"] = encoder_of(recipe, there).read_bytes() == encoder_of(recipe, here).read_bytes()
    found["bank_equal"] = bank_bytes(jobs[0]) == bank_bytes(Pipeline(jobs[0].recipe, here))
    found["shards"] = len(bank_bytes(jobs[0]))
    found["reports"] = all((there / job.recipe.name / "report.html").is_file() for job in jobs)
    return found


def main() -> None:
    if missing := missing_tools():
        sys.exit(
            f"{', '.join(missing)} not found; Debian: apt-get install slurmctld slurmd slurm-client munge."
        )
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        found = scenario(Path(name))
    minutes = (time.monotonic() - began) / 60
    figures = {
        "ci_minutes": figure(minutes, unit="minutes, with the runs on this machine"),
        "requeue_seconds": figure(found["requeue_seconds"], unit="seconds"),
        "weights_equal": figure(float(found["weights_equal"] and found["bank_equal"]), unit="1: yes, 0: no"),
        "two_nodes_equal": figure(float(found["two_nodes_equal"]), unit="1: yes, 0: no"),
    }
    protocol = {
        "cluster": "slurm/up.sh: two nodes of two cores on one machine; slurm/profiles/trial.yaml",
        "urgent job": f"both nodes for {URGENT_SECONDS} seconds; of the time until a training goes on, 6 "
        "seconds are SLURM's own wait before it starts a job again",
    }
    header = ["training", "times it was queued again"]
    rows = [[name, str(count)] for name, count in found["restarts"].items()]
    write_results("cluster", figures, protocol, [0, 1], minutes, markdown_table(header, rows))


if __name__ == "__main__":
    main()

"""Nothing is lost when a process is killed: kill -9 at random moments of every long stage and of the report.

    python benchmarks/faults.py [--kills 200]

A small recipe (phantom, HVAE, bank of several shards, SimCLR with a checkpoint every five steps, probe and
fine-tuning, report) is run once without any fault. Then processes that run it are killed at a moment drawn
uniformly from the time that a stage took there, up to five times in a row on the same folder, and one more is
left alone. `lost_items`: finished stages and whole shards that were there after a kill and are missing or
other bytes after the next process; `unequal_results`: of the runs that were left alone in the end, those
whose weights, bank, metrics or results are not those of the run without faults, byte for byte, and those that
failed. Processes are forked from one that has imported everything, so that a kill costs no start.
"""

import argparse
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from record import figure, markdown_table, write_results

from cfssl.files import read_json
from cfssl.pipeline import Pipeline
from cfssl.recipe import parse_recipe
from cfssl.seeds import numpy_generator
from cfssl.summary import report_of

IN_A_ROW = 5
VICTIMS = ("generator", "bank", "encoder", "classifier", "evaluation", "report")
RECIPE: dict[str, Any] = {
    "name": "faults",
    "data": {"name": "phantom_chest", "count": 400, "splits": {"train": 0.6, "val": 0.2, "test": 0.2}},
    "generator": {
        "name": "hvae",
        "parents": ["scanner"],
        "network": {"name": "small", "widths": [8, 8, 8, 8], "blocks": 1},
        "train": {"epochs": 3, "batch": 24, "checkpoint_every": 5},
    },
    "bank": {"do": {"scanner": "all"}, "shard_megabytes": 1},
    "views": {"size": 32, "counterfactual": {"variable": "scanner", "view": 1}},
    "objective": {"name": "simclr", "hidden": 32, "output": 16},
    "backbone": {"name": "test_byobnet"},
    "train": {"epochs": 6, "batch": 24, "checkpoint_every": 5},
    "hardware": {"accelerator": "cpu", "threads": 1},
    "evaluate": [
        {"name": "linear_probe", "target": "disease", "by": ["scanner"]},
        {
            "name": "finetune",
            "target": "disease",
            "checks": 2,
            "least_steps": 1,
            "train": {"epochs": 3, "batch": 24, "checkpoint_every": 5},
        },
    ],
}


def run(runs: Path) -> None:
    """Everything, in a process of its own."""
    sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115  until the process ends
    job = Pipeline(parse_recipe(RECIPE, "faults"), runs, quiet=True)
    job.run()
    report_of(job)


def start(runs: Path) -> multiprocessing.process.BaseProcess:
    process = multiprocessing.get_context("fork").Process(target=run, args=(runs,))
    process.start()
    return process


def stage(runs: Path, name: str) -> Path | None:
    """The folder of a stage, once there is one; of the report, that of the recipe."""
    if name == "report":
        done = next((runs / "stages").glob("evaluation-*/done.json"), None)
        return None if done is None or len(evaluations(runs)) < len(RECIPE["evaluate"]) else runs / "faults"
    return next((runs / "stages").glob(f"{name}-*"), None) if (runs / "stages").is_dir() else None


def evaluations(runs: Path) -> list[Path]:
    return list((runs / "stages").glob("evaluation-*/done.json"))


def whole(runs: Path) -> dict[str, bytes]:
    """What a process has finished, by its place: products of stages that are done, and shards with a record.
    Times and states of git differ from process to process and are left out."""
    found: dict[str, bytes] = {}
    for done in (runs / "stages").glob("*/done.json"):
        for path in done.parent.rglob("*"):
            if path.suffix in (".safetensors", ".npy", ".npz"):
                found[str(path.relative_to(runs))] = path.read_bytes()
    for record in (runs / "stages").glob("bank-*/bank/shard-*.json"):
        for path in (record, record.with_suffix(".npy")):
            found[str(path.relative_to(runs))] = path.read_bytes()
    return found


def results(runs: Path) -> list[Any]:
    """What the evaluations say, without what differs from process to process, and every line of metrics."""
    found: list[Any] = [path.read_text() for path in sorted((runs / "stages").glob("*/metrics.jsonl"))]
    for path in sorted((runs / "faults").glob("*-disease.json")):
        for result in read_json(path):
            result.pop("git")
            found.append(result)
    return found


def without(reference: Path, runs: Path, victim: str) -> None:
    """A copy of the finished run in which the stage `victim` and what follows from it is to be made."""
    shutil.copytree(reference, runs)
    order = ["table", "generator", "bank", "encoder", "features", "classifier", "evaluation", "report"]
    for name in order[order.index(victim) :]:
        for folder in (runs / "stages").glob(f"{name}-*"):
            shutil.rmtree(folder)
    shutil.rmtree(runs / "faults")


def durations(runs: Path) -> dict[str, float]:
    """Seconds that every stage took; the report is what came after the last evaluation."""
    found: dict[str, float] = {}
    for path in (runs / "stages").glob("*/done.json"):
        record = read_json(path)
        found[record["stage"]] = found.get(record["stage"], 0.0) + record["seconds"]
    last = max(path.stat().st_mtime for path in evaluations(runs))
    return found | {"report": (runs / "faults" / "report.html").stat().st_mtime - last}


def moments(victim: str, seconds: float, seed: int) -> Iterator[float]:
    """Moments to kill at, in seconds after the stage has begun, uniform over its length."""
    rng = numpy_generator("faults", victim, seed)
    while True:
        yield float(rng.uniform(0, seconds))


def killed(runs: Path, victim: str, after: float) -> bool:
    """Runs until `after` seconds into the stage, then kills; False when it was over before."""
    process = start(runs)
    while process.is_alive() and stage(runs, victim) is None:
        time.sleep(0.002)
    process.join(after)
    if not process.is_alive():
        return False
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    return True


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=200)
    options = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        process = start(folder / "reference")
        process.join()
        if process.exitcode:
            raise RuntimeError("the run without faults failed")
        seconds = durations(folder / "reference")
        expected, told = whole(folder / "reference"), results(folder / "reference")
        rows, kills, lost, unequal = [], 0, 0, 0
        for place, victim in enumerate(VICTIMS):
            share = options.kills * (place + 1) // len(VICTIMS) - options.kills * place // len(VICTIMS)
            moment, done, bad, gone, runs_made = moments(victim, seconds[victim], 0), 0, 0, 0, 0
            while done < share:
                runs = folder / "run"
                without(folder / "reference", runs, victim)
                there = whole(runs)
                for _ in range(min(IN_A_ROW, share - done)):
                    if not killed(runs, victim, next(moment)):
                        break
                    done += 1
                    now = whole(runs)
                    gone += sum(now.get(path) != content for path, content in there.items())
                    there = now
                process = start(runs)
                process.join()
                now = whole(runs)
                gone += sum(now.get(path) != content for path, content in there.items())
                bad += bool(process.exitcode) or now != expected or results(runs) != told
                runs_made += 1
                shutil.rmtree(runs)
            rows.append([victim, f"{seconds[victim]:.1f}", str(done), str(runs_made), str(gone), str(bad)])
            print(*rows[-1], flush=True)
            kills, lost, unequal = kills + done, lost + gone, unequal + bad
    figures = {
        "kills": figure(float(kills), unit="kill -9"),
        "lost_items": figure(float(lost), unit="stages and shards"),
        "unequal_results": figure(float(unequal), unit="runs"),
    }
    protocol = {
        "moment": "uniform over the time the stage took without faults, after its folder has appeared; up to "
        f"{IN_A_ROW} kills in a row on one folder, then a run that is left alone",
        "equal": "weights, bank and scores byte for byte, results as values",
    }
    header = ["stage", "seconds without faults", "kills", "runs", "lost", "unequal"]
    minutes = (time.monotonic() - began) / 60
    write_results("faults", figures, protocol, [0], minutes, markdown_table(header, rows))


if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)
    main()

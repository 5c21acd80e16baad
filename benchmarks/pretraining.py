"""Encoders that a benchmark pre-trains from recipes: every stage of every arm made once, and what their test
scores say, arm against arm.

An arm is (world, name); its task for a seed is a recipe file and overrides. Arms of a world share table,
split and test rows, so that their differences are paired.
"""

import os
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from record import figure, markdown_table, with_interval

from cfssl.evaluate.grouped import MISSING
from cfssl.evaluate.groups import paired_gap, paired_mean_of_groups, paired_worst_group
from cfssl.files import read_json
from cfssl.pipeline import Pipeline
from cfssl.recipe import load_recipe
from cfssl.stages import Stage

RECIPES = Path(__file__).parent.parent / "recipes"
RESAMPLES = 2000
ONE_THREAD = ("hardware.threads=1", "hardware.accelerator=cpu")
# Not the draw of the phantom on which any budget was chosen.
DRAWN = ("data.count=6000", "data.splits={train: 0.4, val: 0.1, test: 0.5}", "data.seed=1", *ONE_THREAD)
INTERVAL = (
    f"differences: 95 %, value +/- t sqrt(variance of {RESAMPLES:,} paired bootstrap resamples of the test "
    "rows + variance of the seeds' mean), Welch-Satterthwaite degrees of freedom; single arms and "
    "generators: 95 % t interval over seeds"
)
Arm = tuple[str, str]  # world, name


@dataclass(frozen=True)
class Task:
    """What one arm does with one seed: a file of recipes/ and overrides."""

    recipe: str
    overrides: tuple[str, ...]

    def pipeline(self, runs: Path) -> Pipeline:
        return Pipeline(load_recipe(RECIPES / self.recipe, self.overrides), runs, quiet=True)

    def command(self, verb: str, runs: Path) -> list[str]:
        """What makes the stage of `verb`, in a process of its own."""
        quiet = [] if verb == "check" else ["--quiet"]
        start = [sys.executable, "-m", "cfssl", *verb.split(), *quiet, "--runs", str(runs)]
        return [*start, str(RECIPES / self.recipe), *self.overrides]


def probe(target: str, by: str, fractions: Sequence[float], seed: int) -> str:
    """The linear probe, as an item of `evaluate`. Every training seed has a labelled subset of its own, the
    same for all arms."""
    shares = ", ".join(map(str, fractions))
    return f"{{name: linear_probe, target: {target}, by: [{by}], fractions: [{shares}], seeds: [{seed}]}}"


def stages_of(job: Pipeline) -> dict[str, Stage]:
    """The long stages, by the verb that makes them; `evaluate` has those of its networks besides."""
    found = {"check": job.table_stage, "bank build": job.generation.bank_stage, "pretrain": job.encoder_stage}
    if job.recipe.silver is not None:
        found["label"] = job.labelling.stage
    generator = job.generation.generator_stage
    return found if generator is None else {**found, "fit": generator}


VERBS = ("check", "fit", "judge", "bank build", "pretrain")  # "label" and "evaluate" are made as well


def make_all(tasks: Iterable[Task], runs: Path, jobs: int, verbs: Sequence[str] = VERBS) -> None:
    """Every stage of every task, `jobs` single-threaded processes at a time; what tasks share is made first,
    judges of banks one after the other."""
    pipelines = [(task, task.pipeline(runs)) for task in tasks]
    for verb in verbs:
        started = time.monotonic()
        if verb == "label":
            missing = {job.labelling.stage.key: job for _, job in pipelines if job.recipe.silver is not None}
            for job in missing.values():
                job.labelling.table  # noqa: B018
            continue
        if verb == "judge":
            gated = {job.generation.judge_stages[0].key: job for _, job in pipelines if job.recipe.bank.gate}
            for job in gated.values():
                assert job.recipe.audit is not None  # a gate asks the audit's judge
                job.generation.measure(job.recipe.audit.judge)
            continue
        wave: dict[str, Task] = {}
        for task, job in pipelines:
            stage = job.evaluation.stages()[-1] if verb == "evaluate" else stages_of(job).get(verb)
            if stage is not None and not stage.done:
                wave.setdefault(stage.key, task)
        run_verb(verb, list(wave.values()), runs, jobs)
        print(f"{verb}: {len(wave)} jobs, {time.monotonic() - started:.0f} s", flush=True)


def run_verb(verb: str, tasks: Sequence[Task], runs: Path, jobs: int) -> None:
    """`Task.command` of every task. Raises RuntimeError with what the first failing one said."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def run(task: Task) -> None:
        command = task.command(verb, runs)
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed: {done.stderr[-2000:]}")

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(run, tasks))


def minutes(pipelines: Iterable[Pipeline], jobs: int) -> float:
    """How long every stage took, each counted once however often the benchmark was resumed, over `jobs` side
    by side."""
    stages = {stage.key: stage for job in pipelines for stage in timed_stages(job)}
    records = [stage.folder / "done.json" for stage in stages.values() if stage.done]
    return sum(read_json(record)["seconds"] for record in records) / jobs / 60


def timed_stages(job: Pipeline) -> list[Stage]:
    """Those in which time goes; the encoder of an arm that is not pre-trained is never made."""
    networks = [stage for trial in job.evaluation.trials for stage in job.evaluation.network_stages(trial)]
    return [*stages_of(job).values(), *networks]


class Trials:
    """All arms with all seeds. `tasks`: (world, name, seed) -> task, whose first evaluation is what the
    differences are of, a linear probe with the training seed for its labelled subsets."""

    def __init__(self, tasks: Mapping[tuple[str, str, int], Task], seeds: Sequence[int], runs: Path) -> None:
        self.tasks, self.seeds, self.runs = dict(tasks), tuple(seeds), runs
        self.jobs = {key: task.pipeline(runs) for key, task in tasks.items()}

    @cached_property
    def scores(self) -> dict[tuple[str, str, int], dict[str, np.ndarray]]:
        """What `evaluations.evaluate` returned."""
        return {key: job.evaluation.scores(job.recipe.evaluate[0].label) for key, job in self.jobs.items()}

    def of(self, arm: Arm, fraction: float) -> list[np.ndarray]:
        """Test scores (n, classes) of every seed."""
        found = [self.scores[(*arm, seed)] for seed in self.seeds]
        if any(not np.array_equal(entry["row"], found[0]["row"]) for entry in found):
            raise RuntimeError(f"the seeds of {arm} were scored on different test rows")
        return [entry[f"scores-{fraction:g}-{seed}"] for entry, seed in zip(found, self.seeds, strict=True)]

    def difference(
        self,
        first: Arm,
        second: Arm,
        by: str,
        groups: Sequence[str] | None = None,
        fraction: float = 1.0,
        gap: bool = False,
    ) -> dict[str, Any]:
        """AUC points, first minus second: the mean over `groups`, or each arm's own worst group without them,
        or with `gap` the difference between the best and the worst group."""
        arrays = self.scores[(*first, self.seeds[0])]
        if not np.array_equal(arrays["row"], self.scores[(*second, self.seeds[0])]["row"]):
            raise RuntimeError(f"{first} and {second} were scored on different test rows")
        table = self.jobs[(*first, self.seeds[0])].table
        test = table.frame.iloc[arrays["row"]]
        patients = test[table.group].to_numpy() if table.group else None
        options: dict[str, Any] = {"patients": patients, "resamples": RESAMPLES}
        data = arrays["y"], self.of(first, fraction), self.of(second, fraction), test[by].to_numpy()
        if gap:
            found = paired_gap(*data, **options)
        elif groups is None:
            found = paired_worst_group(*data, **options)
        else:
            found = paired_mean_of_groups(*data, groups, **options)
        points = [100 * found[name] for name in ("value", "low", "high")]
        return figure(*points, unit="AUC points", seeds=[100 * value for value in found["seeds"]])

    def auc(self, arm: Arm, by: str, fraction: float = 1.0, evaluation: int = 0) -> dict[str, list[float]]:
        """Per group: one AUC per seed. Rows without a label are no group."""
        table: dict[str, list[float]] = {}
        for seed in self.seeds:
            job = self.jobs[(*arm, seed)]
            label = job.recipe.evaluate[evaluation].label
            result = next(
                entry
                for entry in job.evaluation.results()
                if f"{entry['evaluation']}-{entry['target']}" == label
                and entry["protocol"]["label_fraction"] == fraction
            )
            for group, row in result["groups"][by]["table"].items():
                if group != MISSING:
                    table.setdefault(group, []).append(row["auc"]["value"])
        return table

    def auc_table(self, shown: Mapping[str, Arm], by: str, fraction: float = 1.0, evaluation: int = 0) -> str:
        """Mean AUC over seeds (and its standard deviation) per group, worst group and gap."""
        rows = []
        header: list[str] = []
        for name, arm in shown.items():
            table = self.auc(arm, by, fraction, evaluation)
            header = ["arm", *table, "worst", "gap"]
            means = {group: float(np.mean(values)) for group, values in table.items()}
            cells = [f"{np.mean(values):.3f} ({np.std(values, ddof=1):.3f})" for values in table.values()]
            worst = min(means, key=means.__getitem__)
            rows.append([name, *cells, worst, f"{max(means.values()) - means[worst]:.3f}"])
        return markdown_table(header, rows)


def figures_section(figures: Mapping[str, dict[str, Any]]) -> str:
    """All figures, for people."""
    rows = []
    for name, entry in figures.items():
        digits = 1 if entry["unit"] == "AUC points" else 3
        seeds = ", ".join(f"{value:.3g}" for value in entry["seeds"] or [])
        rows.append([name, with_interval(entry, digits), entry["unit"], seeds])
    return "## Figures\n\n" + markdown_table(["figure", "value [95 %]", "unit", "seeds"], rows)

"""Is a network that was pre-trained densely, with counterfactuals, the better segmenter when few masks are
there?

    python benchmarks/dense_segmentation.py --data-root DATA [--imagenet FILE] [--jobs 2]
    python benchmarks/dense_segmentation.py --choose     (the learning rates below, on another draw)

Two worlds, three pre-training seeds. phantom: lungs with their effusions are the truth, silver masks miss the
effusions, counterfactuals are true ones of scanner and disease, one of them at random in view 1; the hard
group is the diseased. real: covid_cxr, human masks of the lungs, silver masks by a segmentor that has seen
openist_cxr (normal chests) alone, counterfactuals of the view by an HVAE; the hard group is AP supine.

Every arm has the same encoder and decoder with the same initial weights, two views per image, the same number
of steps and the same images; then the whole network is trained on the masks of the same few patients, new
weights alike in all arms. `cf_` before an arm: view 1 shows a counterfactual, else the image itself. SSDCL
has views that differ in look alone, and no first stage. `imagenet` is an EfficientNet-Lite0 with released
weights and `lite0_scratch` the same without, neither pre-trained further: a larger network than the others.

Differences are Dice points over the same test images, patients resampled. Whatever has to be chosen among
arms (the best other dense method, the better silver variant) is chosen by validation Dice, so a difference to
a best arm is not one to the luckiest on test. Resumable: everything lives in content-addressed stages.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pretraining import INTERVAL, ONE_THREAD, RESAMPLES, Arm, Task, Trials, figures_section, make_all, minutes
from record import figure, markdown_table, over_seeds, write_results

from cfssl.evaluate.grouped import Arms, mean_of

SEEDS = (0, 1, 2)
STEPS = 250
BATCH = 32
DENSE = ("vader", "densecl", "pixpro", "vicregl")  # the other methods without labels
DECODED = ("vader", "dvd", "mvd", "ssdcl", "segmentation", "s_dvd", "s_mvd")  # train the decoder as well
NEW = "{stride: 2}"  # the decoder of the others, of the same shape
METHODS = ("simclr", *DENSE, "dvd", "mvd", "ssdcl", "segmentation", "s_dvd", "s_mvd")
NAMES = {
    "scratch": "from scratch",
    "lite0_scratch": "EfficientNet-Lite0 from scratch",
    "imagenet": "EfficientNet-Lite0, ImageNet",
    "simclr": "SimCLR",
    "vader": "VADeR",
    "densecl": "DenseCL",
    "pixpro": "PixPro",
    "vicregl": "VICRegL",
    "dvd": "DVD-CL",
    "mvd": "MVD-CL",
    "ssdcl": "SSDCL",
    "segmentation": "silver segmentation",
    "s_dvd": "S-DVD-CL",
    "s_mvd": "S-MVD-CL",
}
CHOICES = (1e-3, 5e-3)
RATES = {  # chosen by --choose, see pilots.md
    "simclr": 5e-3,
    "vader": 1e-3,
    "densecl": 1e-3,
    "pixpro": 1e-3,
    "vicregl": 5e-3,
    "dvd": 5e-3,
    "mvd": 1e-3,
    "ssdcl": 5e-3,
    "segmentation": 5e-3,
    "s_dvd": 1e-3,
    "s_mvd": 1e-3,
}
REAL = ("generator=null", "bank.do={}", "views.counterfactual=null")
ALIKE = "crop_scale: [1.0, 1.0], crop_ratio: [1.0, 1.0], rotation: 0"  # views that differ in look alone


@dataclass(frozen=True)
class World:
    """`recipe` with `overrides` and `counterfactuals` is DVD-CL. `silver`: the masks that the supervised
    arms learn from. `images` in its training rows, of which a `fraction` of the patients has gold masks.
    `hard`: an attribute and a value of it."""

    name: str
    recipe: str
    overrides: tuple[str, ...]
    counterfactuals: tuple[str, ...]
    structures: str
    silver: str
    by: str
    images: int
    fraction: float
    hard: tuple[str, str]

    @property
    def epochs(self) -> int:
        """That make about STEPS steps."""
        return round(STEPS / (self.images // BATCH))


def phantom(seed: int) -> World:
    """`seed` of its draw."""
    return World(
        "phantom",
        "phantom_dvd.yaml",
        (
            f"data={{count: 2000, seed: {seed}, splits: {{train: 0.5, val: 0.05, test: 0.45}}}}",
            "views.size=64",
        ),
        (
            "generator={name: oracle, parents: [scanner, disease]}",
            "bank.do={scanner: all, disease: all}",
            "views.counterfactual={variable: null, view: 1, probability: 1.0}",
        ),
        structures="[left_lung, right_lung]",
        silver="[silver_left_lung, silver_right_lung]",
        by="[disease, scanner, [scanner, disease]]",
        images=1000,
        fraction=0.01,
        hard=("disease", "yes"),
    )


def real(data_root: Path) -> World:
    root = data_root.resolve()
    return World(
        "real",
        "covid_cxr_dvd.yaml",
        (f"data.root={root}", f"silver.data.root={root}"),
        (),
        structures="[lungs]",
        silver="[silver_lungs]",
        by="[view, covid]",
        images=305,
        fraction=0.08,
        hard=("view", "AP Supine"),
    )


def objectives(world: World) -> dict[str, str]:
    """The objective of every method; sizes as in the recipes of the phantom."""
    points = "points: 32, temperature: 0.2, decoder: {stride: 2}"
    silver = f"structures: {world.silver}"
    return {
        "simclr": "{name: simclr, temperature: 0.1, hidden: 256}",
        "vader": "{name: vader, temperature: 0.2, decoder: {stride: 2}}",
        "densecl": "{name: densecl, stride: 8, hidden: 256}",
        "pixpro": "{name: pixpro, stride: 8, hidden: 256, output: 128}",
        "vicregl": "{name: vicregl, stride: 8, hidden: 256, output: 256}",
        "dvd": f"{{name: dvd, {points}}}",
        "mvd": f"{{name: mvd, {points}}}",
        "ssdcl": f"{{name: s_mvd, {silver}, {points}}}",
        "segmentation": f"{{name: segmentation, {silver}, decoder: {{stride: 2}}}}",
        "s_dvd": f"{{name: s_dvd, {silver}, {points}}}",
        "s_mvd": f"{{name: s_mvd, {silver}, {points}}}",
    }


def fine_tuning(world: World, seed: int, start: str, decoder: str) -> str:
    """`evaluate`: every training seed has gold patients of its own, the same for all arms."""
    return (
        f"evaluate=[{{name: segment, structures: {world.structures}, by: {world.by}, start: {start}, "
        f"fractions: [{world.fraction}], seeds: [{seed}], decoder: {decoder}, train: {{batch: 8}}}}]"
    )


def task(world: World, method: str, seed: int, rate: float, has_counterfactuals: bool) -> Task:
    """Of one arm that is pre-trained."""
    overrides = [
        *ONE_THREAD,
        *world.overrides,
        "monitor=null",
        f"train={{epochs: {world.epochs}, batch: {BATCH}, lr: {rate}, seed: {seed}}}",
        f"objective={objectives(world)[method]}",
        fine_tuning(world, seed, "pretrained", "null" if method in DECODED else NEW),
    ]
    if method == "ssdcl":
        overrides.append(f"views.geometry={{{ALIKE}}}")
    overrides += world.counterfactuals if has_counterfactuals else REAL
    return Task(world.recipe, tuple(overrides))


def initial(world: World, seed: int, *backbone: str) -> Task:
    """Of one arm that is not."""
    plain = (*ONE_THREAD, *world.overrides, *REAL, "monitor=null", f"train.seed={seed}", *backbone)
    return Task(world.recipe, (*plain, fine_tuning(world, seed, "initial", NEW)))


def arms(worlds: Sequence[World], imagenet: Path | None) -> dict[tuple[str, str, int], Task]:
    """(world, arm, seed) -> task."""
    found: dict[tuple[str, str, int], Task] = {}
    for world in worlds:
        for seed in SEEDS:
            found[world.name, "scratch", seed] = initial(world, seed)
            if imagenet is not None:
                large = "backbone={name: tf_efficientnet_lite0}"
                found[world.name, "lite0_scratch", seed] = initial(world, seed, large)
                weights = f"init={{backbone: {imagenet.resolve()}}}"
                found[world.name, "imagenet", seed] = initial(world, seed, large, weights)
            for method in METHODS:
                for prefix in ("", "cf_"):
                    arm = task(world, method, seed, RATES[method], prefix != "")
                    found[world.name, prefix + method, seed] = arm
    return found


class Segmented(Trials):
    """Trials whose first evaluation is a segmentation of a few patients' masks."""

    def images(self, arm: Arm, measure: str) -> list[np.ndarray]:
        """A measure of every test image (n,), the mean over structures, of every seed."""
        found = [self.scores[(*arm, seed)] for seed in self.seeds]
        if any(not np.array_equal(entry["row"], found[0]["row"]) for entry in found):
            raise RuntimeError(f"the seeds of {arm} were scored on different test rows")
        names = [next(key for key in entry if key.startswith(f"{measure}-")) for entry in found]
        return [entry[name].mean(1) for entry, name in zip(found, names, strict=True)]

    def labels(self, arm: Arm, by: str) -> np.ndarray:
        """The attribute `by` of the test images (n,)."""
        key = (*arm, self.seeds[0])
        labels: np.ndarray = self.jobs[key].table.frame.iloc[self.scores[key]["row"]][by].to_numpy()
        return labels

    def mean(self, arm: Arm, measure: str, hard: tuple[str, str] | None = None) -> list[float]:
        """Over test images, or those of the hard group, of every seed."""
        keep = slice(None) if hard is None else self.labels(arm, hard[0]) == hard[1]
        return [float(values[keep].mean()) for values in self.images(arm, measure)]

    def validation(self, arm: Arm) -> float:
        """The Dice of the chosen moment on the validation rows, mean over seeds."""
        found = []
        for seed in self.seeds:
            protocol = self.jobs[(*arm, seed)].evaluation.results()[0]["protocol"]
            found.append(protocol["val_dice"])
        return float(np.mean(found))

    def dice_points(self, first: Arm, second: Arm, hard: tuple[str, str] | None = None) -> dict[str, Any]:
        """First minus second on the same test images."""
        key = (*first, self.seeds[0])
        rows = self.scores[key]["row"]
        if not np.array_equal(rows, self.scores[(*second, self.seeds[0])]["row"]):
            raise RuntimeError(f"{first} and {second} were scored on different test rows")
        table = self.jobs[key].table
        patients = table.frame.iloc[rows][table.group].to_numpy() if table.group else None
        a, b = ([mean_of(values) for values in self.images(arm, "dice")] for arm in (first, second))
        both = Arms(a, b, len(rows), lambda _: "", patients=patients, resamples=RESAMPLES)
        found = (
            both.overall() if hard is None else both.mean_of_groups(self.labels(first, hard[0]), [hard[1]])
        )
        points = [100 * found[name] for name in ("value", "low", "high")]
        return figure(*points, unit="Dice points", seeds=[100 * value for value in found["seeds"]])


def comparisons(trials: Segmented, world: World) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """The figures of a world, and which arms validation chose."""

    def arm(name: str) -> Arm:
        return world.name, name

    def best(*names: str) -> str:
        return max(names, key=lambda name: trials.validation(arm(name)))

    other = best(*(prefix + name for name in DENSE for prefix in ("", "cf_")))
    plain_other = best(*DENSE)
    silver = best("segmentation", "cf_segmentation")
    supervised = best("cf_s_dvd", "cf_s_mvd")
    pairs = {
        "dvd_minus_best_dense": ("cf_dvd", other, None),
        "mvd_minus_best_dense": ("cf_mvd", other, None),
        "dvd_minus_best_dense_no_cf": ("dvd", plain_other, None),
        "mvd_minus_best_dense_no_cf": ("mvd", plain_other, None),
        "s_best_minus_silver": (supervised, silver, None),
        "hard_s_best_minus_silver": (supervised, silver, world.hard),
        "s_best_minus_scratch": (supervised, "scratch", None),
        "dvd_minus_scratch": ("cf_dvd", "scratch", None),
        "dvd_minus_simclr": ("cf_dvd", "cf_simclr", None),
        **{f"cf_gain_{name}": (f"cf_{name}", name, None) for name in METHODS},
        **{f"hard_cf_gain_{name}": (f"cf_{name}", name, world.hard) for name in METHODS},
    }
    figures = {
        f"{world.name}_{name}": trials.dice_points(arm(first), arm(second), hard)
        for name, (first, second, hard) in pairs.items()
    }
    chosen = {
        f"{world.name}: best other dense method": other,
        f"{world.name}: the same without counterfactuals": plain_other,
        f"{world.name}: silver segmentation": silver,
        f"{world.name}: silver variant": supervised,
    }
    return figures, chosen


def levels(trials: Segmented, world: World, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Dice points and HD95 (pixels of 64) of every arm, over all test images and in the hard group."""
    figures = {}
    for name in names:
        for group, hard in (("", None), ("hard_", world.hard)):
            dice = [100 * value for value in trials.mean((world.name, name), "dice", hard)]
            distance = trials.mean((world.name, name), "hd95", hard)
            figures[f"{world.name}_{group}dice_{name}"] = over_seeds(dice, "Dice points")
            figures[f"{world.name}_{group}hd95_{name}"] = over_seeds(distance, "pixels")
    return figures


def table(trials: Segmented, world: World, names: Sequence[str]) -> str:
    """As in the paper, with the hard group apart."""
    rest = f"{world.hard[0]} other than {world.hard[1]}"
    header = [
        "arm",
        "Dice",
        f"Dice, {world.hard[1]}",
        f"Dice, {rest}",
        "HD95",
        f"HD95, {world.hard[1]}",
        "ASD",
    ]
    rows = []
    for name in names:
        arm = world.name, name
        is_hard = trials.labels(arm, world.hard[0]) == world.hard[1]
        easy = [float(values[~is_hard].mean()) for values in trials.images(arm, "dice")]
        cells = [
            *(
                spread(values, 100)
                for values in (trials.mean(arm, "dice"), trials.mean(arm, "dice", world.hard), easy)
            ),
            *(spread(trials.mean(arm, "hd95", hard)) for hard in (None, world.hard)),
            spread(trials.mean(arm, "asd")),
        ]
        rows.append([title(name), *cells])
    return markdown_table(header, rows)


def title(name: str) -> str:
    return NAMES[name] if name in NAMES else f"{NAMES[name.removeprefix('cf_')]}, counterfactuals"


def spread(values: Sequence[float], scale: float = 1) -> str:
    """The mean over seeds (and its standard deviation)."""
    return f"{scale * np.mean(values):.2f} ({scale * np.std(values, ddof=1):.2f})"


def silver_quality(trials: Segmented, world: World) -> dict[str, dict[str, Any]]:
    """Dice of the silver masks themselves with the gold ones, on the test images."""
    job = trials.jobs[world.name, "s_dvd", SEEDS[0]]
    rows = trials.scores[world.name, "s_dvd", SEEDS[0]]["row"]
    gold, silver = (
        job.labelling.table.masks_of(names.strip("[]").split(", ")).read(rows) > 0
        for names in (world.structures, world.silver)
    )
    dice = 2 * (gold & silver).sum((2, 3)) / np.maximum(gold.sum((2, 3)) + silver.sum((2, 3)), 1)
    hard = trials.labels((world.name, "s_dvd"), world.hard[0]) == world.hard[1]
    return {
        f"{world.name}_{group}silver_dice": figure(100 * float(dice[keep].mean()), unit="Dice points")
        for group, keep in (("", slice(None)), ("hard_", hard))
    }


def choose(runs: Path, jobs: int) -> None:
    """Prints the Dice of every method, without counterfactuals, at either learning rate on another draw."""
    world = phantom(100)
    trials = {
        rate: Segmented(
            {(world.name, method, 0): task(world, method, 0, rate, False) for method in METHODS}, (0,), runs
        )
        for rate in CHOICES
    }
    make([of for trial in trials.values() for of in trial.tasks.values()], runs, jobs)
    for method in METHODS:
        found = {rate: trial.mean((world.name, method), "dice")[0] for rate, trial in trials.items()}
        print(method, *(f"{rate:g}: {100 * value:.2f}" for rate, value in found.items()))


def make(tasks: Sequence[Task], runs: Path, jobs: int) -> None:
    """All stages of all tasks."""
    make_all(tasks, runs, jobs, verbs=("check", "fit", "label", "bank build", "evaluate"))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-root", type=Path, help="the folder of covid_cxr.npz and openist_cxr.npz")
    parser.add_argument("--imagenet", type=Path, help="weights of timm's tf_efficientnet_lite0")
    parser.add_argument("--runs", type=Path, default=Path("runs/dense_segmentation"))
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time, one thread each")
    parser.add_argument("--choose", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.jobs)
    if options.choose:
        choose(options.runs, options.jobs)
        return
    worlds = [phantom(1), *([real(options.data_root)] if options.data_root else [])]
    trials = Segmented(arms(worlds, options.imagenet), SEEDS, options.runs)
    make(list(trials.tasks.values()), options.runs, options.jobs)
    untrained = ["scratch"] + ["lite0_scratch", "imagenet"] * (options.imagenet is not None)
    names = [*untrained, *(prefix + method for method in METHODS for prefix in ("", "cf_"))]
    figures: dict[str, dict[str, Any]] = {}
    chosen: dict[str, str] = {}
    sections = []
    for world in worlds:
        found, best = comparisons(trials, world)
        figures |= found | levels(trials, world, names) | silver_quality(trials, world)
        chosen |= best
        head = f"## {world.name}: test images, mean over seeds (standard deviation)"
        sections.append(f"{head}\n\n{table(trials, world, names)}")
    of_arms = ("_dice_", "_hd95_")
    shown = {name: entry for name, entry in figures.items() if not any(part in name for part in of_arms)}
    rates = ", ".join(f"{name} {rate:g}" for name, rate in RATES.items())
    protocol = {
        **{world.name: described(trials, world) for world in worlds},
        "budget": f"about {STEPS} steps of {BATCH} images, two views each, for every pre-trained arm; the "
        "same fine-tuning for all, whose best of 10 moments is chosen by validation Dice",
        "learning rates": f"{' or '.join(f'{rate:g}' for rate in CHOICES)}, chosen per method on another "
        f"draw of the phantom (--choose), without counterfactuals: {rates}",
        **chosen,
        "interval": INTERVAL.replace("AUC", "Dice"),
        "time": f"sum of the stages over {options.jobs} single-threaded processes side by side",
    }
    sections.append(figures_section(shown))
    spent = minutes(trials.jobs.values(), options.jobs)
    write_results("dense_segmentation", figures, protocol, SEEDS, spent, "\n".join(sections))


def described(trials: Segmented, world: World) -> str:
    """The data of a world, in words."""
    result = trials.jobs[world.name, "scratch", SEEDS[0]].evaluation.results()[0]
    rows = result["protocol"]
    words = [*world.overrides, *world.counterfactuals]
    overrides = ", ".join(word for word in words if not word.split("=")[0].endswith("root"))
    return (
        f"recipes/{world.recipe} {overrides}".strip()
        + f"; gold masks of {world.fraction:.0%} of the training "
        f"patients ({rows['train_rows']} images with seed {SEEDS[0]}), {rows['val_rows']} validation and "
        f"{result['n']} test images; hard: {world.hard[0]} {world.hard[1]}"
    )


if __name__ == "__main__":
    main()

"""How fast, how stable and how consistent are CHRO-maps?

    python benchmarks/chromap.py [--runs DIR] [--jobs 2] [--repeats 7] [--paper-repeats 1]

The embeddings are those of dense networks that recipes/phantom_dvd.yaml trains briefly with true
counterfactuals, one per seed, applied to patients of the test split and to their true counterfactuals on the
other three scanners. Times are those of one image with four views of 224 px. Let nothing else run.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pretraining import ONE_THREAD, Task, make_all
from record import figure, markdown_table, over_repeats, over_seeds, write_results

from cfssl.data.phantoms.chest import MASKS, SCANNERS
from cfssl.evaluate.features import to_unit, whole_view
from cfssl.files import atomic_folder
from cfssl.generators.base import intervention
from cfssl.pipeline import Pipeline
from cfssl.visualise.chromap import (
    PRESETS,
    ChromapSettings,
    State,
    align,
    colorize,
    fit,
    is_foreground,
    overlay,
    transform,
)
from cfssl.visualise.chromap_colour import to_oklab
from cfssl.visualise.chromap_consistency import consistency, overall
from cfssl.visualise.chromap_files import chromaps
from cfssl.visualise.chromap_views import Views

SEEDS, DRAWS = (0, 1, 2), 5  # of the training; of the sample of pixels
PATIENTS, KEPT, SIZE, TIMED_SIZE = 8, 2, 64, (224, 224)
TRAINING = (
    *ONE_THREAD,
    "name=chromap",
    "generator={name: oracle, parents: [scanner]}",
    "data={name: phantom_chest, size: 64, count: 2400, splits: {train: 0.8, val: 0.1, test: 0.1}, seed: 1}",
    "train.epochs=10",
    "monitor=null",
    "evaluate=[]",
)
CLASSES = {place + 1: name.replace("_", " ") for place, name in enumerate(MASKS)}


def task(seed: int) -> Task:
    return Task("phantom_dvd.yaml", (*TRAINING, f"train.seed={seed}"))


@torch.no_grad()
def patients(job: Pipeline, size: tuple[int, int] | None = None, count: int = PATIENTS) -> list[Views]:
    """Test patients of the trained network: the image and its true counterfactuals on the other scanners.
    `size`: of the images, where it is not their own."""
    table, network = job.table, job.objective.network
    assert table.truth is not None
    assert table.masks is not None
    rows = table.rows("test")[:count]
    own = table.encode(("scanner",), rows)["scanner"].numpy()
    real, masks = table.images.read(rows), table.masks.read(rows)[:, : len(MASKS)]
    made = [
        table.truth.counterfactual(rows, intervention({"scanner": name}, table.attributes, len(rows)))
        for name in SCANNERS
    ]
    found = []
    for row in range(len(rows)):
        others = [code for code in range(len(SCANNERS)) if code != own[row]]
        images = to_unit(np.stack([real[row], *(made[code][row] for code in others)]))  # (4, 1, H, W)
        classes = np.max(masks[row] * np.arange(1, len(MASKS) + 1, dtype=np.uint8)[:, None, None], axis=0)
        if size is not None:
            images = np.stack([whole_view(image, size, "constant") for image in images])
        maps = network(torch.from_numpy(images)).numpy()
        names = [f"scanner {SCANNERS[own[row]]}", *(f"do(scanner={list(SCANNERS)[code]})" for code in others)]
        labels = None if size is not None else np.repeat(classes[None], 4, axis=0)
        found.append(Views(maps, images[:, 0].clip(0, 1), masks=labels, names=names))
    return found


def coloured(views: Views, settings: ChromapSettings) -> np.ndarray:
    """The whole computation: from embeddings to the overlay."""
    state = fit([views], settings)
    places = transform(state, views.unit)
    return overlay(state, places, views.images, is_foreground(state, views.unit))


def seconds(work: Callable[[], object], repeats: int) -> np.ndarray:
    """(repeats,) of the wall clock."""
    taken = []
    for _ in range(repeats):
        begun = time.perf_counter()
        work()
        taken.append(time.perf_counter() - begun)
    return np.array(taken)


def speeds(job: Pipeline, repeats: int, paper_repeats: int) -> dict[str, dict[str, Any]]:
    (given,) = patients(job, TIMED_SIZE, 1)

    def fresh() -> Views:
        return replace(given)  # what has been computed is not kept

    def all_files() -> None:
        with tempfile.TemporaryDirectory() as folder:
            chromaps(Path(folder) / "chromap", [fresh()])

    coloured(fresh(), PRESETS["default"])
    coloured(small(given), PRESETS["paper"])  # compiles
    times = {
        "seconds_default": seconds(lambda: coloured(fresh(), PRESETS["default"]), repeats),
        "seconds_default_all_files": seconds(all_files, repeats),
    }
    found = {name: over_repeats(values, "s") for name, values in times.items()}
    paper = seconds(lambda: coloured(fresh(), PRESETS["paper"]), paper_repeats)
    found["seconds_paper"] = figure(float(np.median(paper)), unit="s")
    return found


def small(views: Views) -> Views:
    """A corner, for what only has to run once."""
    return Views(views.unit[:, :, :24, :24], views.images[:, :24, :24])


def shown(state: State, images: Sequence[Views]) -> list[np.ndarray]:
    """OKLab of the flat colours per image; background as strong as the rest."""
    return [to_oklab(colorize(state, transform(state, views.unit))) for views in images]


def change(first: State, second: State, images: Sequence[Views], others: Sequence[Views]) -> float:
    """The mean OKLab distance of a pixel's colours: of `images` under `first`, `others` under `second`."""
    pairs = zip(shown(first, images), shown(second, others), strict=True)
    return float(np.mean([np.linalg.norm(a - b, axis=-1).mean() for a, b in pairs]))


def aligned(state: State, onto: State, images: Sequence[Views], others: Sequence[Views]) -> State:
    """`state` of `images`, turned onto the colours of `others` under `onto`."""
    here, there = (
        np.concatenate([transform(which, views.unit).reshape(-1, 2) for views in of])
        for which, of in ((state, images), (onto, others))
    )
    return align(state, here, there)


def stability(images: Sequence[Views]) -> dict[str, float]:
    """How far colours move when other pixels are drawn, or the images come in another order."""
    settings = PRESETS["default"]
    states = [fit(images, replace(settings, seed=seed)) for seed in range(DRAWS)]
    first = states[0]
    turned = [aligned(state, first, images, images) for state in states[1:]]
    return {
        "colour_change_between_seeds": np.mean([change(first, s, images, images) for s in states[1:]]),
        "colour_change_between_seeds_aligned": np.mean([change(first, s, images, images) for s in turned]),
        "colour_change_image_order": change(first, fit(images[::-1], settings), images, images),
    }


def paper_stability(views: Views) -> float:
    """The same of the published preset on one image, after alignment."""
    first, second = (fit([views], replace(PRESETS["paper"], seed=seed)) for seed in (0, 1))
    return change(first, aligned(second, first, [views], [views]), [views], [views])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=Path, default=Path("runs/chromap"))
    parser.add_argument("--jobs", type=int, default=2, help="trainings at a time, one thread each")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--paper-repeats", type=int, default=1)
    parser.add_argument("--keep", type=Path, help="write the CHRO-maps of the first network there")
    options = parser.parse_args()
    begun = time.monotonic()
    make_all([task(seed) for seed in SEEDS], options.runs, options.jobs)
    torch.set_num_threads(2)
    jobs = [task(seed).pipeline(options.runs) for seed in SEEDS]
    images = [patients(job) for job in jobs]
    states = [fit(of_seed) for of_seed in images]
    measured: dict[str, list[float]] = {}
    for place, (state, of_seed) in enumerate(zip(states, images, strict=True)):
        entries = [entry for views in of_seed for entry in consistency(state, views, CLASSES)]
        total = overall(entries)
        values = stability(of_seed) | {
            "view_consistency": total["cosine"],
            "view_consistency_shuffled": total["cosine_shuffled"],
            "view_colour_change": total["colour"],
            "view_colour_change_shuffled": total["colour_shuffled"],
            "colour_change_between_seeds_paper": paper_stability(of_seed[0]),
        }
        other = (place + 1) % len(SEEDS)
        pair = of_seed, images[other]
        turned = aligned(state, states[other], *pair)
        values["colour_change_between_models"] = change(state, states[other], *pair)
        values["colour_change_between_models_aligned"] = change(turned, states[other], *pair)
        for name, value in values.items():
            measured.setdefault(name, []).append(float(value))  # type: ignore[arg-type]
    figures = {
        name: over_seeds(values, "cosine" if name.startswith("view_consistency") else "OKLab distance")
        for name, values in measured.items()
    }
    figures = speeds(jobs[0], options.repeats, options.paper_repeats) | figures
    if options.keep is not None:
        with atomic_folder(options.keep) as folder:
            kept = images[0][:KEPT]
            names = [f"patient {index}" for index in range(len(kept))]
            chromaps(folder, kept, names=names, class_names=CLASSES)
    rows = [[name, text(entry), entry["unit"]] for name, entry in figures.items()]
    tables = markdown_table(["figure", "value [95 %]", "unit"], rows)
    minutes = (time.monotonic() - begun) / 60
    write_results("chromap", figures, protocol(options), SEEDS, minutes, tables)


def text(entry: dict[str, Any]) -> str:
    if entry["low"] is None:
        return f"{entry['value']:.4g}"
    return f"{entry['value']:.4g} [{entry['low']:.4g}, {entry['high']:.4g}]"


def protocol(options: argparse.Namespace) -> dict[str, str]:
    return {
        "embeddings": f"maps of recipes/phantom_dvd.yaml ({', '.join(TRAINING[3:6])}), one network per "
        f"seed; {PATIENTS} test patients of {SIZE} px with their true counterfactuals on the other three "
        "scanners",
        "times": "one patient with four views of 224 px (images enlarged, map of 112 px interpolated): "
        "embeddings to overlay, wall clock, two threads, "
        f"medians of {options.repeats}; paper: {options.paper_repeats}, after a run that compiles; all "
        "files: figure, arrays, page and numbers as well",
        "colour change": "mean OKLab distance of a pixel's colour, 0.02 is just seen; between seeds: "
        f"{DRAWS} draws of the pixels that colours are fitted to (2,000 per patient), against the first; "
        "paper: UMAP of all pixels of one patient under two seeds, after alignment; models: networks of two "
        "training seeds, before and after alignment",
        "view consistency": "mean cosine between a pixel and the same pixel of a counterfactual view; "
        "shuffled: with a random pixel of that view",
        "interval": "95 %: t over training seeds, bootstrap over repeats of times",
    }


if __name__ == "__main__":
    main()

"""`cfssl demo`: the whole pipeline on the embedded phantom, three arms that differ in one thing each, and one
page."""

import time
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from cfssl.pipeline import Pipeline
from cfssl.recipe import load_recipe
from cfssl.summary import compare, print_result

ARMS = {
    "SimCLR": ("two augmentations of the real image", ["name=demo-simclr", "views.counterfactual=null"]),
    "SimCLR+": (
        "two augmentations of one image, real or counterfactual",
        ["name=demo-simclr-plus", "views.counterfactual.view=[0,1]", "views.counterfactual.shared=true"],
    ),
    "CF-SimCLR": ("the real image, and its counterfactual on another scanner", ["name=demo-cf-simclr"]),
}


def run_demo(runs: Path, overrides: Sequence[str] = (), quiet: bool = False) -> Path:
    """Runs what is missing under `runs`, prints the results and returns the path of report.html."""
    started = time.monotonic()
    with resources.as_file(resources.files("cfssl") / "demo.yaml") as recipe:
        jobs = {
            name: Pipeline(load_recipe(recipe, [*own, *overrides]), runs, quiet)
            for name, (_, own) in ARMS.items()
        }
    for job in jobs.values():
        job.run()
    minutes = (time.monotonic() - started) / 60
    descriptions = {name: text for name, (text, _) in ARMS.items()}
    page = compare(
        jobs, runs / "demo", "Counterfactual views on phantom_chest", descriptions, minutes=minutes
    )
    for name, job in jobs.items():
        print(f"\n{name}: {descriptions[name]}")
        for result in job.evaluations():
            print_result(result)
    print(f"\n{minutes:.1f} minutes")
    return page

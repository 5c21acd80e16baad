"""`cfssl demo`: the whole pipeline on the embedded phantom, three arms that differ in one thing each, and one
page."""

import time
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from cfssl.engine.interruption import Interruption
from cfssl.errors import UserError
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


def run_demo(
    runs: Path,
    overrides: Sequence[str] = (),
    quiet: bool = False,
    interruption: Interruption | None = None,
) -> Path:
    """Runs what is missing under `runs`, prints the results and returns the path of report.html."""
    started = time.monotonic()
    jobs = arms(runs, overrides, quiet, interruption)
    for job in jobs.values():
        job.run()
    minutes = (time.monotonic() - started) / 60
    descriptions = {name: text for name, (text, _) in ARMS.items()}
    page = compare(
        jobs, runs / "demo", "Counterfactual views on phantom_chest", descriptions, minutes=minutes
    )
    for name, job in jobs.items():
        print(f"\n{name}: {descriptions[name]}")
        for result in job.evaluation.results():
            print_result(result)
    print(f"\n{minutes:.1f} minutes")
    return page


def arms(
    runs: Path,
    overrides: Sequence[str] = (),
    quiet: bool = False,
    interruption: Interruption | None = None,
) -> dict[str, Pipeline]:
    """Name of the arm -> its pipeline. What makes an arm is said after the overrides, which so change all
    arms alike; an override of one of these settings itself would be void and is refused."""
    fixed = {setting.partition("=")[0] for _, own in ARMS.values() for setting in own}
    void = [entry for entry in overrides if entry.partition("=")[0] in fixed]
    if void:
        raise UserError(
            f"The override {void[0]!r} is void in the demo, whose arms differ in {', '.join(sorted(fixed))}; "
            "write a recipe of your own for it and call cfssl run."
        )
    with resources.as_file(resources.files("cfssl") / "demo.yaml") as recipe:
        return {
            name: Pipeline(load_recipe(recipe, [*overrides, *own]), runs, quiet, interruption)
            for name, (_, own) in ARMS.items()
        }

"""The scripts of benchmarks/ can be started, and what they share does what it says."""

import dataclasses
import importlib
from pathlib import Path

import dense_segmentation
import hidden_change
import numpy as np
import pytest
import torch
from pretraining import RECIPES, Task, minutes

from cfssl.files import write_json
from cfssl.recipe import load_recipe

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.mark.parametrize("name", sorted(path.stem for path in BENCHMARKS.glob("*.py")))
def test_every_script_can_be_imported(name: str) -> None:
    """Against code that has moved away under it."""
    module = importlib.import_module(name)
    assert module.__doc__


def test_arms_of_the_dense_benchmark_differ_in_what_they_are_named_for_alone(tmp_path: Path) -> None:
    worlds = [dense_segmentation.phantom(1), dense_segmentation.real(tmp_path)]
    tasks = dense_segmentation.arms(worlds, None)
    recipes = {
        key[:2]: load_recipe(RECIPES / task.recipe, task.overrides)
        for key, task in tasks.items()
        if key[2] == 1
    }
    trained = {key: recipe for key, recipe in recipes.items() if key[1] != "scratch"}
    assert len(trained) == 2 * 22
    keys = {tasks["phantom", arm, 1].pipeline(tmp_path).encoder_stage.key for _, arm in trained}
    assert len(keys) == 22
    for (_, arm), recipe in recipes.items():
        assert (recipe.views.count, recipe.views.size, recipe.backbone.name) == (2, 64, "test_byobnet")
        assert (recipe.train.batch, recipe.train.seed, recipe.monitor) == (32, 1, None)
        assert (recipe.views.counterfactual is not None) == arm.startswith("cf_")
        assert (recipe.generator is not None) == bool(recipe.bank.do) == arm.startswith("cf_")
        (segment,) = recipe.evaluate
        assert segment.start == ("initial" if arm == "scratch" else "pretrained")
        has_decoder = getattr(recipe.objective, "decoder", None) is not None
        stride = recipe.objective.decoder.stride if has_decoder else segment.decoder.stride
        assert stride == 2
        assert (segment.decoder is None) == (has_decoder and arm != "scratch")
        still = recipe.views.geometry.rotation == 0
        assert still == (arm.removeprefix("cf_") == "ssdcl")
    for world in ("phantom", "real"):
        budgets = {recipe.train.epochs for key, recipe in trained.items() if key[0] == world}
        assert len(budgets) == 1
        own = dataclasses.replace(recipes[world, "scratch"].evaluate[0], decoder=None)
        for key, recipe in recipes.items():
            if key[0] == world:
                assert dataclasses.replace(recipe.evaluate[0], decoder=None, start="initial") == own


def test_the_bank_with_a_hidden_change_shows_the_other_disease_on_the_scanner_that_it_names(
    tmp_path: Path,
) -> None:
    small = ("data={count: 60, seed: 3}", "hardware.accelerator=cpu")
    recipe = "phantom_cf_simclr_oracle.yaml"
    honest = Task(recipe, small).pipeline(tmp_path)
    job = hidden_change.HiddenChangeTask(recipe, small).pipeline(tmp_path)
    assert job.encoder_stage.key != honest.encoder_stage.key
    assert job.generation.generator_stage == honest.generation.generator_stage
    bank, table = job.generation.bank, job.table
    assert bank.views == honest.generation.bank.views
    items = np.arange(len(bank))
    turned = 1 - table.encode(["disease"], bank.rows)["disease"]
    for slot, view in enumerate(bank.views, 1):
        made = items[bank.made[:, slot]]
        code = table.attributes["scanner"].categories.index(view["scanner"])
        parents = {"scanner": torch.full((len(made),), code), "disease": turned[made]}
        assert table.truth is not None
        expected = table.truth.counterfactual(bank.rows[made], parents)
        np.testing.assert_array_equal(bank.gather(made, np.full(len(made), slot)), expected)
    assert not np.array_equal(
        bank.gather(items, np.full(len(items), 1)),
        honest.generation.bank.gather(items, np.full(len(items), 1)),
    )


def test_what_runs_beside_each_other_is_timed_once_and_what_was_never_made_not_at_all(tmp_path: Path) -> None:
    world = dense_segmentation.phantom(1)
    arms = [dense_segmentation.initial(world, 0), dense_segmentation.initial(world, 0)]
    jobs = [task.pipeline(tmp_path) for task in arms]
    assert minutes(jobs, 2) == 0
    for stage in (jobs[0].table_stage, jobs[0].evaluation.network_stages(jobs[0].evaluation.trials[0])[0]):
        stage.folder.mkdir(parents=True)
        stage.product.parent.mkdir(exist_ok=True)
        stage.product.touch()
        write_json(stage.folder / "done.json", {"seconds": 60})
    assert minutes(jobs, 2) == 1

"""CHRO-maps of a recipe: what is embedded, of which images, and where it lands."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from cfssl.chromaps import asked_for, chromaps_of, embedded, mask_codes, shown_stride
from cfssl.errors import UserError
from cfssl.evaluate.features import to_unit
from cfssl.experiment import ChromapsSettings
from cfssl.files import read_json
from cfssl.models.backbone import BackboneSettings, create_backbone
from cfssl.pipeline import Pipeline
from cfssl.recipe import parse_recipe

CONTENT = {
    "name": "tiny",
    "data": {"name": "phantom_chest", "count": 120, "silver": True},
    "generator": {"name": "oracle", "parents": ["scanner"]},
    "bank": {"do": {"scanner": ["A", "B"]}},
    "views": {"counterfactual": {"variable": "scanner", "view": 1, "probability": 0.5}},
    "backbone": {"name": "test_resnet"},
    "train": {"epochs": 1, "batch": 48},
    "hardware": {"accelerator": "cpu"},
}
DENSE = {
    "name": "s_dvd",
    "structures": ["silver_left_lung", "silver_right_lung"],
    "points": 16,
    "decoder": {"stride": 2, "widths": [8, 8, 8, 8, 8]},
}


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    content = CONTENT | {"objective": DENSE, "chromap": {"images": 2}}
    return Pipeline(parse_recipe(content, "tiny"), tmp_path_factory.mktemp("runs"), quiet=True)


@pytest.mark.slow
def test_every_available_view_of_an_image_is_coloured_beside_it(job: Pipeline, tmp_path: Path) -> None:
    found = chromaps_of(job, tmp_path, job.recipe.chromap)
    assert found == read_json(tmp_path / "chromap.json")
    assert len(found["images"]) == 2
    assert (tmp_path / "chromap.html").stat().st_size > 10_000
    bank = job.generation.bank
    for index, name in enumerate(found["images"]):
        row = int(name.removeprefix("row "))
        item = int(np.flatnonzero(bank.rows == row)[0])
        arrays = np.load(tmp_path / f"image-{index:03d}.npz")
        assert len(found["images"][name]) == bank.available[item].sum() - 1  # each against the real one
        assert any(array.shape[:1] == (bank.available[item].sum(),) for array in arrays.values())


@pytest.mark.slow
def test_a_dense_objective_is_seen_through_its_decoder(job: Pipeline) -> None:
    images = to_unit(job.table.images.read(np.arange(3)))
    found = embedded(job.objective, images)
    assert found.shape == (3, 8, 32, 32)
    with torch.no_grad():
        expected = job.objective.network.eval()(torch.from_numpy(images))
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-6)


@pytest.mark.slow
def test_classes_are_the_masks_that_the_objective_learns_from(job: Pipeline) -> None:
    rows = np.arange(5)
    codes, names = mask_codes(job, rows)
    assert names == {1: "silver left lung", 2: "silver right lung"}
    masks = job.table.masks.read(rows)[:, [job.table.mask_names.index(name) for name in DENSE["structures"]]]
    np.testing.assert_array_equal(codes, np.where(masks[:, 1], 2, masks[:, 0]))


@pytest.mark.slow
def test_where_no_labels_are_learned_the_human_masks_are_the_classes(job: Pipeline) -> None:
    """Silver lungs, which lie on the lungs, would hide them."""
    recipe = parse_recipe(CONTENT | {"objective": {"name": "simclr"}}, "x")
    codes, names = mask_codes(Pipeline(recipe, job.production.runs, quiet=True), np.arange(5))
    assert list(names.values()) == ["left lung", "right lung", "heart", "effusion"]
    assert set(np.unique(codes)) >= {0, 1, 2, 3}


def test_an_encoder_is_seen_through_its_coarsest_grid_of_eight_cells() -> None:
    encoder = create_backbone(BackboneSettings("test_resnet"), 1, 64, 0)
    assert shown_stride(encoder, 64) == 8
    assert shown_stride(encoder, 256) == 32
    assert shown_stride(encoder, 8) == 2


def test_the_command_line_goes_before_the_recipe() -> None:
    recipe = ChromapsSettings(images=5)
    assert asked_for(None, None, None) == ChromapsSettings()
    assert asked_for(recipe, None, "paper") == replace(recipe, preset="paper")
    assert asked_for(recipe, 2, None).images == 2
    with pytest.raises(UserError, match="--preset is 'nice'; choose one of default, paper"):
        asked_for(None, None, "nice")

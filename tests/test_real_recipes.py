"""The recipes on real images run end to end; one epoch of everything, so the figures mean nothing."""

from pathlib import Path

import numpy as np
import pytest

from cfssl.pipeline import Pipeline
from cfssl.recipe import load_recipe
from cfssl.summary import report_of

RECIPES = Path(__file__).parent.parent / "recipes"
SHORT = ["train.epochs=1", "hardware.accelerator=cpu"]
SHORT_GENERATOR = [
    "generator.train.epochs=1",
    "generator.network={name: small, widths: [8, 8, 8, 8], blocks: 1}",
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.mark.slow
@pytest.mark.real_data
@pytest.mark.parametrize(
    ("name", "groups"),
    [
        ("ham10000_simclr", {"vidir_molemax", "vidir_modern", "rosendahl", "vienna_dias"}),
        ("ham10000_cf_simclr", {"vidir_molemax", "vidir_modern", "rosendahl", "vienna_dias"}),
        ("ham10000_simclr_plus", {"vidir_molemax", "vidir_modern", "rosendahl", "vienna_dias"}),
        ("ham10000_cf_dino", {"vidir_molemax", "vidir_modern", "rosendahl", "vienna_dias"}),
        ("ham10000_sex_cf_simclr", {"vidir_molemax", "vidir_modern", "rosendahl", "vienna_dias"}),
        ("covid_cxr_simclr", {"PA", "AP", "AP Supine", "(missing)"}),
        ("covid_cxr_cf_simclr", {"PA", "AP", "AP Supine", "(missing)"}),
    ],
)
def test_a_recipe_on_real_images_runs(name: str, groups: set[str], shared_data: Path, runs: Path) -> None:
    learned = [] if name in ("ham10000_simclr", "covid_cxr_simclr") else SHORT_GENERATOR
    shallow = ["backbone.options.depth=1"] if "dino" in name else []
    overrides = [f"data.root={shared_data}", *SHORT, *learned, *shallow]
    job = Pipeline(load_recipe(RECIPES / f"{name}.yaml", overrides), runs, quiet=True)
    results = job.run()
    assert report_of(job).stat().st_size > 100_000
    assert set(results[0]["groups"][job.recipe.evaluate[0].by[0]]["table"]) == groups
    group = job.table.frame[job.table.group]
    for split in ("train", "val", "test"):
        inside = job.table.frame["split"] == split
        assert not set(group[inside]) & set(group[~inside])
    if job.recipe.generator is not None:
        (variable,) = job.recipe.bank.do
        known = job.table.frame[variable].notna().to_numpy()[job.generation.bank.rows]
        # images whose acquisition is unknown keep their real image; the others have every value but their own
        bank = job.generation.bank
        np.testing.assert_array_equal(bank.available[:, 1:].sum(1), np.where(known, len(bank.views) - 1, 0))

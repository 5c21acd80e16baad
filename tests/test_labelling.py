"""The silver side of a recipe: made once, kept under its key, refused before anything is trained, written as
a table that is read again."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cfssl.cli import main
from cfssl.errors import UserError
from cfssl.pipeline import Pipeline
from cfssl.recipe import load_recipe, parse_recipe

RECIPES = Path(__file__).parent.parent / "recipes"
TINY: dict[str, Any] = {
    "name": "tiny",
    "data": {"name": "phantom_chest", "count": 120},
    "silver": {
        "data": {"name": "phantom_chest", "count": 140, "domains": {"A": 1.0}, "seed": 1},
        "segmentor": {
            "structures": ["left_lung", "heart"],
            "widths": [4, 8],
            "train": {"epochs": 1, "batch": 16},
        },
    },
    "objective": {"name": "simclr", "hidden": 16, "output": 8},
    "backbone": {"name": "test_resnet"},
    "train": {"epochs": 1, "batch": 48},
    "hardware": {"accelerator": "cpu"},
}
NAMES = ["silver_left_lung", "silver_heart"]


def job(runs: Path, **changes: Any) -> Pipeline:
    """The tiny recipe with values replaced at dotted paths (`__` between keys)."""
    content = json.loads(json.dumps(TINY))
    for path, value in changes.items():
        *above, last = path.split("__")
        node = content
        for part in above:
            node = node[part]
        node[last] = value
    return Pipeline(parse_recipe(content, "tiny"), runs, quiet=True)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    pipeline = job(tmp_path_factory.mktemp("runs"))
    pipeline.run()
    return pipeline


def test_a_run_makes_the_silver_masks_once(done: Pipeline) -> None:
    assert [stage.name for stage in done.stages()] == [
        "table",
        "table",
        "measure",
        "silver",
        "bank",
        "encoder",
    ]
    assert {record["stage"] for record in done.production.used.values()} >= {"measure", "silver"}
    again = job(done.runs)
    again.labelling.table  # noqa: B018
    assert all(record["reused"] for record in again.production.used.values())


def test_every_image_of_the_recipe_s_table_has_silver_masks_beside_its_own(done: Pipeline) -> None:
    table, rows = done.labelling.table, np.arange(120)
    assert list(table.mask_names) == [*done.table.mask_names, *NAMES]
    assert table.fingerprint == done.table.fingerprint
    assert table.truth is not None
    sure = table.confidence([*NAMES, "heart"], rows)
    assert ((sure >= 0) & (sure <= 1)).all()
    assert (sure[:, 2] == 1).all()
    score = done.labelling.score
    assert set(score) == {"validation", "own"}
    assert score["own"]["left_lung"]["images"] == 120
    assert score["validation"]["heart"]["images"] == len(done.labelling.source.rows("val"))
    masks, gold = (table.masks_of([name]).read(rows)[:, 0].astype(bool) for name in ("silver_heart", "heart"))
    dice = 2 * (masks & gold).sum((1, 2)) / (masks.sum((1, 2)) + gold.sum((1, 2)))
    assert score["own"]["heart"]["dice"] == pytest.approx(dice.mean())


def test_a_recipe_without_silver_has_its_own_masks_alone(done: Pipeline, tmp_path: Path) -> None:
    plain = job(done.runs, silver=None)
    assert plain.labelling.table.mask_names == done.table.mask_names
    assert plain.labelling.stages() == []
    with pytest.raises(UserError, match="tiny makes no silver masks; add a silver section"):
        plain.labelling.export(tmp_path / "out.npz")


@pytest.mark.parametrize(
    ("changes", "remade"),
    [
        ({}, []),
        ({"silver__threshold": 0.4}, ["silver"]),
        ({"data__seed": 5}, ["table", "silver"]),
        ({"silver__segmentor__train": {"epochs": 2, "batch": 16}}, ["measure", "silver"]),
        ({"silver__data__seed": 2}, ["table", "measure", "silver"]),
        ({"name": "renamed"}, []),
    ],
)
def test_a_change_remakes_what_follows_from_it(
    done: Pipeline, changes: dict[str, Any], remade: list[str]
) -> None:
    changed = job(done.runs, **changes)
    stages = [changed.table_stage, *changed.labelling.stages()]
    assert [stage.name for stage in stages if not stage.done] == remade
    assert set(stages) <= set(changed.stages())


@pytest.mark.parametrize(
    ("structures", "follows"),
    [(["silver_heart"], True), (["left_lung", "silver_heart"], True), (["left_lung", "heart"], False)],
)
def test_an_encoder_depends_on_silver_masks_where_its_objective_takes_them(
    done: Pipeline, structures: list[str], follows: bool
) -> None:
    objective = {"name": "s_dvd", "structures": structures}
    first, second = (
        job(done.runs, objective=objective, silver__threshold=threshold).encoder_stage.key
        for threshold in (0.5, 0.4)
    )
    assert (first != second) == follows


def test_an_objective_sees_silver_masks_as_labels_of_its_views(done: Pipeline) -> None:
    """Oracle: under views that show the whole image as it is, the labels are the stored masks."""
    whole = {"crop_scale": [1.0, 1.0], "crop_ratio": [1.0, 1.0], "rotation": 0, "horizontal_flip": 0}
    structures = ["silver_heart", "left_lung"]
    views = job(
        done.runs, objective={"name": "s_dvd", "structures": structures}, views={"geometry": whole}
    ).view_data()
    batch = views[0][0]
    assert batch.labels is not None
    stored = done.labelling.table.masks_of(structures).read(batch.row.numpy()) > 0
    for view in range(batch.images.shape[1]):
        np.testing.assert_array_equal(batch.labels[:, view], stored)
    assert batch.confidence is None
    weighed = job(done.runs, objective={"name": "s_dvd", "structures": structures, "label_confidence": True})
    batch = weighed.view_data()[0][0]
    assert batch.confidence is not None
    expected = done.labelling.table.confidence(structures, batch.row.numpy())
    np.testing.assert_array_equal(batch.confidence.numpy(), expected)
    assert expected[:, 0].std() > 0  # of the silver mask
    assert (expected[:, 1] == 1).all()  # of the table's own
    with pytest.raises(UserError, match=r"objective\.structures = 'silver_hart': no such mask; the nearest"):
        job(done.runs, objective={"name": "s_dvd", "structures": ["silver_hart"]}).table  # noqa: B018


@pytest.mark.parametrize(
    ("changes", "sentences"),
    [
        (
            {"silver__data__size": 128},
            ["its images are 1 x 128 x 128 and those of phantom_chest are 1 x 64 x 64"],
        ),
        ({"data__silver": True}, ["Table 'phantom_chest' already has 'silver_left_lung'"]),
        (
            {"silver__segmentor__structures": ["hart"], "silver__segmentor__train": {"batch": 500}},
            ["no such mask; the nearest is 'heart'", "silver.segmentor.train.batch = 500: only"],
        ),
    ],
)
def test_tables_that_do_not_fit_each_other_are_refused_at_once_and_untrained(
    done: Pipeline, changes: dict[str, Any], sentences: list[str]
) -> None:
    unfit = job(done.runs, **changes)
    with pytest.raises(UserError) as caught:
        unfit.labelling.table  # noqa: B018
    assert "silver.data (phantom_chest) does not fit the recipe tiny" in str(caught.value)
    assert str(caught.value).count("\n  - ") == len(sentences)
    assert all(sentence in str(caught.value) for sentence in sentences)
    assert not unfit.labelling.stage.folder.exists()


def call(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: object
) -> tuple[int, str]:
    """The entry point in this process: exit code and what it printed, standard error last."""
    monkeypatch.setattr(sys, "argv", ["cfssl", *map(str, words)])
    with pytest.raises(SystemExit) as caught:
        main()
    printed = capsys.readouterr()
    return int(caught.value.code or 0), printed.out + printed.err


def test_the_verb_writes_a_table_that_is_read_again_and_a_sheet(
    done: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tiny.yaml").write_text(json.dumps(TINY))
    words = "silver", tmp_path / "tiny.yaml", tmp_path / "out.npz", "--runs", done.runs, "--quiet"
    code, printed = call(monkeypatch, capsys, *words)
    assert code == 0, printed
    assert "left_lung: Dice 0." in printed
    assert "validation images of phantom_chest" in printed
    assert "120 images of phantom_chest that have such a mask" in printed
    assert printed.splitlines()[-2:] == [str(tmp_path / "out.npz"), str(tmp_path / "out.png")]
    with Image.open(tmp_path / "out.png") as sheet:
        assert min(sheet.size) > 6 * 128
    masks = {name: name for name in done.labelling.table.mask_names}
    data = {"name": "table", "path": str(tmp_path / "out.npz"), "masks": masks, "group": "patient"}
    again = job(tmp_path / "runs", data=data, silver=None).labelling.table
    rows, before = np.arange(120), done.labelling.table
    np.testing.assert_array_equal(again.images.read(rows), before.images.read(rows))
    everything = list(before.mask_names)
    assert list(again.mask_names) == everything
    np.testing.assert_array_equal(
        again.masks_of(everything).read(rows), before.masks_of(everything).read(rows)
    )
    np.testing.assert_array_equal(again.confidence(everything, rows), before.confidence(everything, rows))
    assert again.attributes.keys() - before.attributes.keys() == {"confidence_left_lung", "confidence_heart"}
    assert (again.frame["split"] == before.frame["split"]).all()
    content = (tmp_path / "out.npz").read_bytes()
    code, printed = call(monkeypatch, capsys, *words)
    assert (code, "out.npz exists and is not overwritten" in printed) == (2, True)
    assert (tmp_path / "out.npz").read_bytes() == content


def test_check_names_the_silver_masks_and_trains_nothing(
    done: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "tiny.yaml").write_text(json.dumps(TINY))
    code, printed = call(monkeypatch, capsys, "check", tmp_path / "tiny.yaml", "--runs", tmp_path, "--quiet")
    assert code == 0, printed
    images = f"{len(done.labelling.source.rows('train'))} training images of phantom_chest"
    assert f"silver masks: silver_left_lung, silver_heart, by a segmentor of {images}" in printed
    assert {folder.name.split("-")[0] for folder in (tmp_path / "stages").iterdir()} == {"table"}


@pytest.mark.slow
@pytest.mark.real_data
def test_silver_lungs_of_radiographs_agree_with_human_ones(shared_data: Path, tmp_path: Path) -> None:
    """The segmentor has seen normal chests alone, their lungs drawn without the part behind the heart."""
    roots = [f"data.root={shared_data}", f"silver.data.root={shared_data}", "hardware.accelerator=cpu"]
    short = ["silver.segmentor.train.epochs=30"]
    job = Pipeline(load_recipe(RECIPES / "covid_cxr_silver.yaml", [*roots, *short]), tmp_path, quiet=True)
    score = job.labelling.score
    print(*job.labelling.score_text(), sep="\n")
    assert score["own"]["lungs"]["images"] == 418
    assert score["validation"]["lungs"]["dice"] > 0.93
    assert 0.75 < score["own"]["lungs"]["dice"] < score["validation"]["lungs"]["dice"]
    assert score["own"]["lungs"]["correlation"] > 0.5

"""Segmentations as stages: one per network, shared where nothing that moves it differs, and drawn and
reported."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cfssl.check import describe
from cfssl.errors import UserError
from cfssl.evaluate.segment import segmenter
from cfssl.pipeline import Pipeline
from cfssl.recipe import parse_recipe
from cfssl.segmentation import extremes
from cfssl.summary import compare

LUNGS = ["left_lung", "right_lung"]
SEGMENT: dict[str, Any] = {
    "name": "segment",
    "structures": LUNGS,
    "by": ["scanner", ["scanner", "disease"]],
    "fractions": [0.5, 1.0],
    "resamples": 20,
    "decoder": {"widths": [8, 8, 8, 8, 8]},
    "checks": 2,
    "least_steps": 4,
    "train": {"epochs": 1, "batch": 16},
}
INITIAL = {**SEGMENT, "start": "initial", "fractions": [1.0]}
TINY: dict[str, Any] = {
    "name": "tiny",
    "data": {"name": "phantom_chest", "count": 160},
    "backbone": {"name": "test_resnet"},
    "train": {"epochs": 1, "batch": 48},
    "evaluate": [SEGMENT, INITIAL],
    "hardware": {"accelerator": "cpu"},
}


def job(runs: Path, **changes: Any) -> Pipeline:
    return Pipeline(parse_recipe({**TINY, **changes}, "tiny"), runs, quiet=True)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    pipeline = job(tmp_path_factory.mktemp("runs"))
    pipeline.run()
    return pipeline


def test_every_structure_and_their_mean_have_a_result_with_products_of_groups(done: Pipeline) -> None:
    label = "segment-left_lung+right_lung"
    files = {file.stem: json.loads(file.read_text()) for file in done.folder.glob("segment-*.json")}
    assert sorted(files) == [label, f"{label}-initial"]
    of = files[label]
    mean = "mean of left_lung, right_lung"
    assert [result["target"] for result in of] == [mean, *LUNGS, mean, *LUNGS]
    assert [result["protocol"]["label_fraction"] for result in of] == [0.5] * 3 + [1.0] * 3
    patients = [result["protocol"]["train_rows"] for result in (of[0], of[3])]
    assert patients[0] == round(patients[1] / 2)
    assert "A x no" in of[0]["groups"]["scanner x disease"]["table"]
    arrays = done.evaluation.scores(label)
    assert of[3]["overall"]["dice"]["value"] == pytest.approx(arrays["dice-1-0"].mean())
    assert (of[0]["variant"], files[f"{label}-initial"][0]["variant"]) == ("", "from the initial weights")
    for stem in files:
        width, height = Image.open(done.folder / f"{stem}.png").size
        assert min(width, height) > 300


@pytest.mark.parametrize(
    ("change", "remade"),
    [
        ({}, []),
        ({"evaluate": [{**SEGMENT, "resamples": 10}, INITIAL]}, ["evaluation"]),
        ({"evaluate": [{**SEGMENT, "tolerance": 2.0}, INITIAL]}, ["evaluation"]),
        ({"evaluate": [{**SEGMENT, "fractions": [1.0]}]}, ["evaluation"]),
        ({"evaluate": [{**SEGMENT, "seeds": [0, 1]}]}, ["segmenter", "segmenter", "evaluation"]),
        ({"evaluate": [{**SEGMENT, "learns": "head"}]}, ["segmenter", "segmenter", "evaluation"]),
        ({"evaluate": [{**INITIAL, "folds": 2}]}, ["segmenter", "segmenter", "evaluation"]),
        # another objective is another pre-training, and the initial weights are what they were
        (
            {"objective": {"name": "simclr", "temperature": 0.3}},
            ["encoder", "segmenter", "segmenter", "evaluation"],
        ),
        (
            {"train": {"epochs": 1, "batch": 48, "seed": 1}},
            ["encoder", *["segmenter"] * 3, *["evaluation"] * 2],
        ),
    ],
)
def test_a_change_remakes_what_it_concerns(done: Pipeline, change: dict[str, Any], remade: list[str]) -> None:
    assert [stage.name for stage in job(done.runs, **change).stages() if not stage.done] == remade


def test_the_initial_network_is_the_encoder_before_training(done: Pipeline) -> None:
    start, trained = done.initial().encoder.state_dict(), done.pretrained().encoder.state_dict()
    fresh = job(done.runs.parent / "elsewhere").new_encoder()[0].state_dict()
    assert all((value == fresh[name]).all() for name, value in start.items())
    assert not all((value == trained[name]).all() for name, value in start.items())


def test_a_decoder_that_the_objective_trained_goes_on_where_it_stopped(done: Pipeline) -> None:
    objective = {"name": "dvd", "points": 16, "decoder": SEGMENT["decoder"]}
    own = {**SEGMENT, "fractions": [1.0], "decoder": None, "by": []}
    dense = job(done.runs, name="dense", objective=objective, evaluate=[own])
    start = dense.pretrained()
    assert start.dense is dense.objective.network
    assert start.dense is not None
    assert start.dense.encoder is start.encoder
    begun = segmenter(dense.recipe.evaluate[0], start, 1, 0).dense.state_dict()
    trained, fresh = dense.objective.network.state_dict(), dense.new_objective().network.state_dict()
    assert all((value == trained[name]).all() for name, value in begun.items())
    decoder = [name for name in trained if name.startswith("decoder") and trained[name].ndim > 1]
    assert decoder
    assert not any((fresh[name] == trained[name]).all() for name in decoder)
    dense.run()
    assert (dense.folder / "segment-left_lung+right_lung.json").is_file()


def test_a_page_shows_tables_pictures_and_differences_of_segmentations(done: Pipeline) -> None:
    other = job(done.runs, name="other", evaluate=[{**SEGMENT, "fractions": [1.0]}])
    page = compare({"one": done, "other": other}, done.runs / "both", "Two arms").read_text()
    for heading in (
        "Segmentation of mean of left_lung, right_lung",
        "Segmentation of left_lung (from the initial weights)",
        "Dice by scanner x disease",
        "Segmentation: one, left_lung+right_lung-initial",
        "Segmentation of right_lung, each arm&#39;s worst scanner x disease",
    ):
        assert heading in page, heading


def test_a_check_shows_the_groups_of_a_segmentation(
    done: Pipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    describe(done)
    shown = capsys.readouterr().out
    assert "segmenter" in shown
    assert "disease" in shown


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"structures": ["lungs"]}, r"evaluate\[0\].structures = 'lungs': no such mask"),
        ({"labelled": {"scanner": ["E"]}}, "labelled accepts 'E' of column 'scanner'"),
        ({"by": [["scanner", "age"]]}, r"evaluate\[0\].by = 'age': is continuous"),
        ({"decoder": {"widths": [8, 8]}}, "The decoder has 2 widths"),
        ({"folds": 1000}, "into 1000 folds"),
        (
            {"structures": [*LUNGS, "left_lung"]},
            r"structures names 'left_lung', which evaluate\[0\] segments",
        ),
    ],
)
def test_what_cannot_be_segmented_is_refused_before_training(
    tmp_path: Path, changes: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        job(tmp_path, evaluate=[{**SEGMENT, **changes}]).table  # noqa: B018


def test_extremes_are_the_best_the_middle_and_the_worst_and_none_is_shown_twice() -> None:
    figures = np.array([0.5, 0.9, 0.1, 0.8, 0.3, 0.7, 0.2])
    assert extremes(figures, 2) == {"best": [1, 3], "median": [0, 4], "worst": [6, 2]}
    assert extremes(figures[:2], 4) == {"best": [1], "median": [], "worst": [0]}
    assert extremes(figures[:1], 4) == {"best": [0], "median": [], "worst": []}

"""Evaluations as stages: which are shared, which are made anew, and which external sets are refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from cfssl.check import describe
from cfssl.errors import UserError
from cfssl.evaluate.features import extract
from cfssl.evaluate.finetune import load_tuned, tuned_scores
from cfssl.evaluation import same_ids
from cfssl.pipeline import Pipeline
from cfssl.recipe import parse_recipe
from cfssl.seeds import numpy_generator
from cfssl.summary import compare

THERE = {"name": "phantom_chest", "count": 160, "size": 128, "domains": {"C": 0.5, "D": 0.5}, "seed": 1}
TINY: dict[str, Any] = {
    "name": "tiny",
    "data": {"name": "phantom_chest", "count": 240},
    "backbone": {"name": "test_resnet"},
    "train": {"epochs": 1, "batch": 48},
    "external": {"there": THERE},
    "evaluate": [
        {"name": "knn", "target": "disease", "by": ["sex"], "resamples": 20, "external": ["there"]},
        {"name": "linear_probe", "target": "sex", "resamples": 20},
    ],
    "hardware": {"accelerator": "cpu"},
}


def job(runs: Path, **changes: Any) -> Pipeline:
    return Pipeline(parse_recipe({**TINY, **changes}, "tiny"), runs, quiet=True)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    pipeline = job(tmp_path_factory.mktemp("runs"))
    pipeline.run()
    return pipeline


def test_every_way_has_a_file_that_says_what_was_fitted_and_asked(done: Pipeline) -> None:
    files = {file.stem: json.loads(file.read_text()) for file in done.folder.glob("*-*.json")}
    labels = ["knn-disease", "knn-disease@there-own", "knn-disease@there-transferred", "linear_probe-sex"]
    assert sorted(files) == labels
    there, home = (done.evaluation.table_of(name).fingerprint for name in ("there", None))
    tables = {
        label: (result["protocol"]["fitted_on"]["fingerprint"], result["data"]["fingerprint"])
        for label, (result,) in files.items()
    }
    assert [tables[label] for label in labels] == [(home, home), (there, there), (home, there), (home, home)]
    assert "external" not in files["knn-disease"][0]
    (moved,) = files["knn-disease@there-transferred"]
    assert (moved["external"], moved["way"]) == ("there", "transferred")
    assert moved["compared_with_training"]["images"]["in_both"] == 0
    assert not moved["compared_with_training"]["ids"]["mean_the_same"]


def test_a_check_says_what_is_evaluated_elsewhere_and_what_it_shares_with_the_training(
    done: Pipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    describe(job(done.runs))
    shown = " ".join(capsys.readouterr().out.split())
    assert "External set there: phantom_chest, 160 images of 1 x 128 x 128" in shown
    assert "no image in common with the train and val splits of phantom_chest" in shown
    counts = done.evaluation.table_of("there").frame["split"].value_counts()
    assert f"images │ {counts['train']} │ {counts['val']} │ {counts['test']} │ 160" in shown


def test_external_images_of_another_size_are_seen_as_whole_views(done: Pipeline) -> None:
    table = done.evaluation.table_of("there")
    assert (table.images.shape, done.table.images.shape) == ((1, 128, 128), (1, 64, 64))
    rows = np.array([0, 150])
    expected = extract(done.encoder, table, rows, (64, 64), quiet=True)
    np.testing.assert_allclose(done.evaluation.features("there")[rows], expected, rtol=1e-3, atol=1e-4)


def evaluate(*changes: dict[str, Any]) -> list[dict[str, Any]]:
    """The evaluations of TINY with one section changed each."""
    return [own | change for own, change in zip(TINY["evaluate"], [*changes, {}], strict=False)]


@pytest.mark.parametrize(
    ("change", "remade"),
    [
        # another external set leaves alone what is fitted and tested at home
        (
            {"external": {"there": {**THERE, "seed": 2}}},
            ["table", "external", "features", *["evaluation"] * 2],
        ),
        ({"external": {"elsewhere": THERE}, "evaluate": evaluate({"external": ["elsewhere"]})}, []),
        ({"external": {}, "evaluate": evaluate({"external": []})}, []),
        ({"evaluate": evaluate({"resamples": 10})}, ["evaluation"] * 3),
        ({"evaluate": evaluate({}, {"external": ["there"]})}, ["evaluation"] * 2),
    ],
)
def test_a_change_remakes_what_it_concerns_and_a_name_concerns_nothing(
    done: Pipeline, change: dict[str, Any], remade: list[str]
) -> None:
    changed = job(done.runs, **change)
    assert [stage.name for stage in changed.evaluation.stages() if not stage.done] == remade


def test_arms_are_compared_on_every_external_set_that_both_have(done: Pipeline) -> None:
    other = job(done.runs, name="other", train={**TINY["train"], "seed": 1})
    page = compare({"one": done, "other": other}, done.runs / "both", "Two arms").read_text()
    assert "k nearest neighbours of disease on the external set there, fitted there (own)" in page
    assert "on the external set there, fitted on phantom_chest (transferred)" in page
    for of in ("disease", "disease on there (own)", "disease on there (transferred)"):
        assert f"k nearest neighbours of {of}, all" in page
        assert f"k nearest neighbours of {of}, gap between each arm&#39;s best and worst sex" in page
    for trial in other.evaluation.trials:
        (result,) = json.loads((other.folder / f"{trial.label}.json").read_text())
        assert f"{result['overall']['auc']['value']:.3f}" in page


def test_fine_tuning_is_trained_once_per_fraction_and_seed_and_asked_everywhere(done: Pipeline) -> None:
    tuning = {
        "name": "finetune",
        "target": "disease",
        "by": ["sex"],
        "fractions": [0.25, 1.0],
        "seeds": [0, 1],
        "resamples": 20,
        "external": ["there"],
        "least_steps": 4,
        "checks": 2,
        "train": {"epochs": 1, "batch": 16},
    }
    tuned = job(done.runs, name="tuned", evaluate=[tuning])
    results = tuned.run()
    labels = [trial.label for trial in tuned.evaluation.trials]
    assert labels == ["finetune-disease", "finetune-disease@there-own", "finetune-disease@there-transferred"]
    made = [stage.name for stage in tuned.evaluation.stages()]
    # two fractions of two seeds, on two tables; nothing is trained again to be asked elsewhere
    assert made == ["table", "external", *["classifier"] * 8, *["evaluation"] * 3]
    at_home, own, moved = (tuned.evaluation.scores(label) for label in labels)
    assert list(at_home) == ["row", "y", *(f"scores-{f}-{s}" for f in ("0.25", "1") for s in (0, 1))]
    for result in results:
        protocol = result["protocol"]
        assert protocol["epoch_chosen_on"] == "validation AUC"
        assert [line["epoch"] for line in protocol["epoch_grid"]][-1] == protocol["epochs"]
        assert 0 <= result["overall"]["brier"]["value"] <= 1
        assert "between trainings is not in them" in protocol["intervals"]
    # the transferred network is the very one that was chosen at home
    home, there = (tuned.evaluation.table_of(name) for name in (None, "there"))
    stage = tuned.evaluation.classifier_stage(tuned.evaluation.trials[0], 1.0, 1)
    network, _ = load_tuned(stage.product, tuned.encoder, 2)
    for table, arrays in ((home, at_home), (there, moved)):
        scores = tuned_scores(network, table, arrays["row"], (64, 64), "constant")
        np.testing.assert_allclose(arrays["scores-1-1"], scores, rtol=1e-3, atol=1e-4)
    assert not np.allclose(own["scores-1-1"], moved["scores-1-1"])
    assert not list(stage.folder.glob("checkpoint*"))
    (summary, whole) = json.loads((tuned.folder / "finetune-disease-seeds.json").read_text())
    values = [result["overall"]["auc"]["value"] for result in results[:2]]
    assert (summary["label_fraction"], whole["seeds"]) == (0.25, [0, 1])
    assert summary["overall"]["auc"]["mean"] == pytest.approx(np.mean(values))
    again = job(done.runs, name="tuned", evaluate=[tuning | {"resamples": 10, "fractions": [1.0]}])
    assert [stage.name for stage in again.evaluation.stages() if not stage.done] == ["evaluation"] * 3
    longer = job(done.runs, name="tuned", evaluate=[tuning | {"checks": 3}])
    assert [stage.name for stage in longer.evaluation.stages() if not stage.done] == [
        *["classifier"] * 8,
        *["evaluation"] * 3,
    ]


def npz(folder: Path, name: str, channels: int = 1, **columns: Any) -> dict[str, Any]:
    """A table of 60 images, all different."""
    images = numpy_generator(name).integers(0, 256, (60, 32, 32, channels), dtype=np.uint8)
    np.savez(folder / f"{name}.npz", images=images.squeeze(-1) if channels == 1 else images)
    pd.DataFrame({"patient": np.arange(60), **columns}).to_csv(folder / f"{name}.csv", index=False)
    return {"name": "table", "root": str(folder), "path": f"{name}.npz", "group": "patient"}


def with_external(runs: Path, home: dict[str, Any], there: dict[str, Any]) -> Pipeline:
    return job(
        runs,
        data=home,
        external={"there": there},
        train={"epochs": 1, "batch": 16},
        evaluate=[{"name": "knn", "target": "dx", "by": ["site"], "resamples": 5, "external": ["there"]}],
    )


def test_an_external_set_that_cannot_be_used_is_refused_with_all_reasons(tmp_path: Path) -> None:
    dx, site = np.arange(60) % 2, np.array(["a", "b"])[np.arange(60) // 2 % 2]
    declared = {"attributes": {"dx": {"kind": "categorical"}}}
    home = npz(tmp_path, "home", dx=dx, site=site) | declared
    there = npz(tmp_path, "there", channels=3, dx=dx + np.arange(60) // 59) | declared
    wrong = with_external(tmp_path / "runs", home, there)
    with pytest.raises(UserError, match=r"external set there .* does not fit the recipe tiny") as caught:
        wrong.run()
    message = str(caught.value)
    assert "its images have 3 channels and the encoder's 1" in message
    assert "its 'dx' is categorical of '0', '1', '2', and that of home has '0', '1', in this order" in message
    assert "it has no discrete attribute 'site', by which knn-dx forms groups" in message
    assert not wrong.folder.exists()
    lacking = npz(tmp_path, "lacking", dx=dx * (np.arange(60) < 3), site=site) | declared
    with pytest.raises(UserError, match=r"image is '1' .'dx' of knn-dx.; every category is needed"):
        with_external(tmp_path / "runs", home, lacking).run()


def test_two_selections_of_one_file_are_the_same_patients(tmp_path: Path) -> None:
    """As in the published code: patients of the held-out scanner that are trained on by another one."""
    machine = np.array(["old", "new"])[np.arange(60) % 2]
    columns = {"dx": np.arange(60) // 2 % 2, "site": np.arange(60) // 4 % 2, "machine": machine}
    whole = npz(tmp_path, "whole", **columns) | {"attributes": {"dx": {"kind": "binary"}}}
    pd.DataFrame({"patient": np.arange(60) // 2, **columns}).to_csv(tmp_path / "whole.csv", index=False)
    home, there = (whole | {"where": {"machine": [name]}} for name in ("old", "new"))
    with pytest.raises(
        UserError, match=r"shares 2\d values of the group column 'patient' .* the same source"
    ):
        with_external(tmp_path / "runs", home, there).run()
    (tmp_path / "copy.npz").write_bytes((tmp_path / "whole.npz").read_bytes())
    (tmp_path / "copy.csv").write_bytes((tmp_path / "whole.csv").read_bytes())
    again = home | {"path": "copy.npz", "where": {"machine": ["old", "new"]}}
    with pytest.raises(UserError, match=r"holds 2. images that are also in the train or val split of whole"):
        with_external(tmp_path / "runs", home, again).run()


def test_ids_mean_the_same_in_one_file_under_all_its_names_and_in_one_phantom_world(tmp_path: Path) -> None:
    table = npz(tmp_path, "t", dx=0) | {"attributes": {"dx": {"kind": "continuous"}}}
    (tmp_path / "link").symlink_to(tmp_path)

    def settings(content: dict[str, Any]) -> Any:
        return parse_recipe({"name": "x", "data": content}, "x").data

    base = settings(table)
    assert same_ids(base, settings(table | {"root": str(tmp_path / "link"), "where": {"dx": "present"}}))
    assert not same_ids(base, settings(table | {"path": "u.npz"}))
    phantom = settings(THERE)
    assert same_ids(phantom, settings(THERE | {"count": 99, "size": 64}))
    assert not same_ids(phantom, settings(THERE | {"seed": 2}))
    assert not same_ids(phantom, settings({"name": "phantom_tube", "seed": 1}))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"external": {}}, r"evaluate\[0\].external names 'there', which is no external set"),
        (
            {"external": {"there": THERE, "spare": {**THERE, "seed": 3}}},
            "external.spare is evaluated by nothing",
        ),
        ({"external": {"there": TINY["data"]}}, "external.there is the very table of data"),
        ({"external": {"a@b": THERE}}, "external"),
        (
            {"external": {"there": {**THERE, "cuont": 3}}},
            r"there.cuont = 3: unknown key; did you mean 'count'",
        ),
    ],
)
def test_external_sets_that_make_no_sense_are_refused_with_the_recipe(
    tmp_path: Path, changes: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        job(tmp_path, **changes)

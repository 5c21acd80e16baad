"""An external set is new to the encoder, and what is fitted where and asked where is what the way says."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

from cfssl.data.prepare import save_prepared
from cfssl.data.table import SPLITS, Attribute, ImageTable
from cfssl.errors import UserError
from cfssl.evaluate.evaluations import evaluate, probe
from cfssl.evaluate.external import compared
from cfssl.evaluate.probe import linear_probe
from cfssl.evaluate.settings import ProbeSettings
from cfssl.seeds import numpy_generator

SPLIT = np.repeat(SPLITS, [40, 20, 20])


def table_of(folder: Path, name: str, first: int, patients: Any = None, **columns: Any) -> ImageTable:
    """80 images, the `first`, first + 1, ... of a series of which no two are alike."""
    images = np.arange(4 * first, 4 * (first + 80), dtype=np.uint16).reshape(80, 1, 2, 2)
    frame = pd.DataFrame({"split": SPLIT, **columns})
    if patients is not None:
        frame["patient"] = patients
    attributes = {key: Attribute(key, "binary", ("no", "yes")) for key in columns}
    group = None if patients is None else "patient"
    return save_prepared(folder / name, name, frame, attributes, images, group=group)


def test_an_image_that_was_trained_on_or_chosen_on_is_refused_and_one_that_was_tested_is_not(
    tmp_path: Path,
) -> None:
    table = table_of(tmp_path, "home", 0)
    new = table_of(tmp_path, "new", 60)  # its first 20 are the test images of home
    assert compared(table, new, "x", has_same_ids=False) == {
        "images": {"of": [60, 80], "in_both": 0},
        "ids": None,
    }
    for first, twins in ((59, 1), (30, 30)):
        seen = table_of(tmp_path, f"seen {first}", first)
        with pytest.raises(UserError, match=rf"external set x .* holds {twins} images that are also in the"):
            compared(table, seen, "x", has_same_ids=False)


def test_patients_in_both_tables_are_refused_where_ids_mean_the_same_and_counted_where_not(
    tmp_path: Path,
) -> None:
    table = table_of(tmp_path, "home", 0, [f"p{row}" for row in range(80)])
    elsewhere = table_of(tmp_path, "elsewhere", 100, [f"p{row}" for row in range(57, 137)])  # three of val
    found = compared(table, elsewhere, "x", has_same_ids=False)["ids"]
    assert found == {"column": "patient", "of": [60, 80], "in_both": 3, "mean_the_same": False}
    with pytest.raises(
        UserError, match=r"shares 3 values of the group column 'patient'.*'p57', 'p58', 'p59'"
    ):
        compared(table, elsewhere, "x", has_same_ids=True)
    others = table_of(tmp_path, "others", 200, [f"p{row}" for row in range(60, 140)])  # test patients of home
    assert compared(table, others, "x", has_same_ids=True)["ids"]["in_both"] == 0


def test_a_table_whose_patients_cross_splits_is_refused(tmp_path: Path) -> None:
    table = table_of(tmp_path, "home", 0, [f"p{row}" for row in range(80)])
    elsewhere = table_of(tmp_path, "elsewhere", 100, [f"q{row}" for row in range(80)])
    path = elsewhere.folder / "table.parquet"
    crossed = pd.read_parquet(path)
    crossed.loc[79, "patient"] = "q7"
    crossed.to_parquet(path)
    with pytest.raises(UserError, match="'patient' of elsewhere have images in more than one split"):
        compared(table, ImageTable.open(elsewhere.folder), "x", has_same_ids=False)


def drawn(name: str, slope: float) -> tuple[np.ndarray, np.ndarray]:
    """Classes and features of 80 rows; the first feature tells the class with the sign of `slope`."""
    rng = numpy_generator("external", name)
    y = np.arange(80) % 2
    return y, rng.normal(size=(80, 3)) + slope * np.outer(y, [1, 0, 0])


@pytest.mark.parametrize("name", ["linear_probe", "knn"])
def test_the_transferred_classifier_is_that_of_the_table_and_the_own_one_knows_nothing_of_it(
    tmp_path: Path, name: Any
) -> None:
    (home_y, home_x), (there_y, there_x) = drawn("home", 4.0), drawn("there", -4.0)
    words = np.array(["no", "yes"])
    home = table_of(tmp_path, "home", 0, disease=words[home_y])
    there = table_of(tmp_path, "there", 100, disease=words[there_y])
    settings = ProbeSettings(name, "disease", resamples=20)
    (at_home,), _ = evaluate(settings, home, probe(settings, home_x))
    (own,), _ = evaluate(settings, there, probe(settings, there_x))
    (moved,), arrays = evaluate(settings, home, probe(settings, home_x, there_x), there)
    rows = {split: np.flatnonzero(split == SPLIT) for split in SPLITS}
    np.testing.assert_array_equal(arrays["row"], rows["test"])
    np.testing.assert_array_equal(arrays["y"], there_y[rows["test"]])
    # the sign is turned there: what was learned at home is worse than chance, what was learned there is not
    auc = {
        key: result["overall"]["auc"]["value"]
        for key, result in {"home": at_home, "own": own, "moved": moved}.items()
    }
    assert auc["home"] > 0.8
    assert auc["own"] > 0.8
    assert auc["moved"] < 0.2
    assert auc["moved"] == pytest.approx(roc_auc_score(arrays["y"], arrays["scores-1-0"][:, 1]))
    setting = "C" if name == "linear_probe" else "k"
    assert moved["protocol"][f"{setting}_grid"] == at_home["protocol"][f"{setting}_grid"]
    assert [r["protocol"]["fitted_on"]["table"] for r in (at_home, own, moved)] == ["home", "there", "home"]
    assert [r["data"]["table"] for r in (at_home, own, moved)] == ["home", "there", "there"]
    assert moved["data"]["fingerprint"] == there.fingerprint
    if name == "linear_probe":
        known = [part for split in ("train", "val") for part in (home_x[rows[split]], home_y[rows[split]])]
        expected = linear_probe(*known, there_x[rows["test"]], 2)
        np.testing.assert_allclose(arrays["scores-1-0"], expected.scores)


def test_missing_targets_are_those_of_the_rows_that_a_trial_uses(tmp_path: Path) -> None:
    (home_y, home_x), (there_y, there_x) = drawn("home", 2.0), drawn("there", 2.0)
    words = np.array(["no", "yes"], dtype=object)
    labels = {"home": words[home_y], "there": words[there_y]}
    labels["home"][[0, 41, 79]] = None  # train, val, test
    labels["there"][[1, 2, 60, 61, 62]] = None  # two of train, three of test
    tables = {
        name: table_of(tmp_path, name, 100 * place, disease=of)
        for place, (name, of) in enumerate(labels.items())
    }
    settings = ProbeSettings("knn", "disease", resamples=5)
    classify = probe(settings, home_x, there_x)
    (moved,), _ = evaluate(settings, tables["home"], classify, tables["there"])
    assert moved["protocol"]["rows_without_target"] == 2 + 3
    assert (moved["protocol"]["train_rows"], moved["protocol"]["val_rows"], moved["n"]) == (39, 19, 17)


def test_a_category_that_the_external_test_rows_lack_is_refused(tmp_path: Path) -> None:
    y, x = drawn("home", 2.0)
    words = np.array(["no", "yes"], dtype=object)
    home, there = (words[y].copy() for _ in range(2))
    there[60:] = "no"
    tables = [
        table_of(tmp_path, name, first, disease=of)
        for name, first, of in (("home", 0, home), ("there", 100, there))
    ]
    settings = ProbeSettings("knn", "disease", resamples=5)
    with pytest.raises(UserError, match="knn-disease of there cannot work: no test image is 'yes'"):
        evaluate(settings, tables[0], probe(settings, x, x), tables[1])

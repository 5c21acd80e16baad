"""An evaluation chooses on validation rows, draws whole patients, keeps the share of strata, and says so."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

from cfssl.data.prepare import save_prepared
from cfssl.data.table import SPLITS, Attribute, ImageTable
from cfssl.errors import UserError
from cfssl.evaluate.evaluations import METRICS, choice_of, evaluate, probabilities, probe
from cfssl.evaluate.knn import knn
from cfssl.evaluate.probe import linear_probe, log_odds, subset_labels
from cfssl.evaluate.settings import ProbeSettings
from cfssl.seeds import numpy_generator

ATTRIBUTES = {
    "disease": Attribute("disease", "binary", ("no", "yes")),
    "scanner": Attribute("scanner", "categorical", ("A", "B")),
}


def table_of(folder: Path, group: str | None = None, **columns: Any) -> ImageTable:
    frame = pd.DataFrame(columns)
    attributes = {name: ATTRIBUTES[name] for name in columns if name in ATTRIBUTES}
    images = np.arange(4 * len(frame), dtype=np.uint16).reshape(-1, 1, 2, 2)  # no two alike
    return save_prepared(folder, "toy", frame, attributes, images, group=group)


def evaluated(settings: ProbeSettings, features: np.ndarray, table: ImageTable) -> Any:
    return evaluate(settings, table, probe(settings, features))


def names(y: np.ndarray) -> np.ndarray:
    return np.array(["no", "yes"], dtype=object)[y]


Splits = dict[str, tuple[np.ndarray, np.ndarray]]


def opposite_for_the_probe() -> Splits:
    """Two features, signal + noise and noise. Their difference, which a weakly regularised fit finds, is the
    signal where the noise is shared (train, val); where its sign is turned (test) their mean is, which a
    strongly regularised one is nearer to."""
    rng = numpy_generator("opposite")
    splits: Splits = {}
    for split in SPLITS:
        y = np.arange(300) % 2
        signal, noise = y + 0.5 * rng.normal(size=300), 2 * rng.normal(size=300)
        splits[split] = np.stack([signal + noise, -noise if split == "test" else noise], axis=1), y
    return splits


def opposite_for_knn() -> Splits:
    """Points on a circle, 1 in its right half, with islands of six of the other class. Validation points lie
    on the islands and are of their class (few neighbours know it), test points are of the class around."""
    rng = numpy_generator("islands")
    islands = np.array([-1.2, -1.0, -0.8, -0.6, 0.6, 0.8, 1.0, 1.2])
    wide = np.linspace(-1.5, 1.5, 800)
    around = np.r_[wide > 0, np.repeat(islands < 0, 6)].astype(int)
    places = np.r_[wide, np.repeat(islands, 6) + 1e-5 * rng.normal(size=48)]
    at = np.repeat(islands, 10)
    angles = {"train": (places, around), "val": (at, (at < 0) * 1), "test": (at, (at > 0) * 1)}
    return {
        split: (np.stack([np.cos(angle), np.sin(angle)], axis=1), y) for split, (angle, y) in angles.items()
    }


@pytest.mark.parametrize(
    ("name", "setting", "splits"),
    [("linear_probe", "C", opposite_for_the_probe()), ("knn", "k", opposite_for_knn())],
)
def test_the_setting_is_chosen_on_validation_rows_though_test_rows_want_the_opposite(
    tmp_path: Path, name: str, setting: str, splits: Splits
) -> None:
    y = np.concatenate([splits[split][1] for split in SPLITS])
    features = np.concatenate([splits[split][0] for split in SPLITS])
    where = np.repeat(SPLITS, [len(splits[split][1]) for split in SPLITS])
    table = table_of(tmp_path / "t", disease=names(y), split=where)
    (result,), _ = evaluated(ProbeSettings(name, "disease", resamples=5), features, table)  # type: ignore[arg-type]
    protocol = result["protocol"]
    grid = {line[setting]: line["auc"] for line in protocol[f"{setting}_grid"]}
    assert protocol[setting] == max(grid, key=grid.__getitem__)
    classify = linear_probe if name == "linear_probe" else knn
    (train_x, train_y), (val_x, val_y), (test_x, test_y) = (splits[split] for split in SPLITS)
    chosen = classify(train_x, train_y, val_x, val_y, test_x, 2)
    wanted = classify(train_x, train_y, test_x, test_y, test_x, 2)
    assert protocol[setting] == getattr(chosen, setting) != getattr(wanted, setting)
    assert result["overall"]["auc"]["value"] == pytest.approx(roc_auc_score(test_y, chosen.scores[:, 1]))
    assert result["overall"]["auc"]["value"] < roc_auc_score(test_y, wanted.scores[:, 1]) - 0.05
    assert protocol["val_rows"] == len(val_y)


def patients_and_scanners() -> tuple[dict[str, Any], np.ndarray]:
    """480 images of 120 patients, four alike of each, a third of them of scanner B."""
    rng = numpy_generator("patients")
    patient = np.arange(480) // 4
    y = patient % 2
    features = np.repeat(rng.normal(size=(120, 3)), 4, axis=0) + y[:, None] * [1.0, 0.5, 0]
    scanner = np.array(["A", "A", "B"], dtype=object)[rng.integers(3, size=120)][patient]
    columns = {
        "disease": names(y),
        "scanner": scanner,
        "patient": [f"p{number}" for number in patient],
        "split": np.array(SPLITS, dtype=object)[patient // 2 % 3],
    }
    return columns, features + 0.01 * rng.normal(size=features.shape)


def test_images_of_a_patient_are_drawn_together_and_widen_the_interval(tmp_path: Path) -> None:
    columns, features = patients_and_scanners()
    settings = ProbeSettings("linear_probe", "disease", by=("scanner",), resamples=400)
    width, results = {}, {}
    for group in (None, "patient"):
        table = table_of(tmp_path / str(group), group, **columns)
        (results[group],), _ = evaluated(settings, features, table)
        interval = results[group]["overall"]["auc"]
        width[group] = interval["high"] - interval["low"]
    assert width["patient"] == pytest.approx(2 * width[None], rel=0.2)  # four copies: sqrt(4)
    assert (results[None]["patients"], results["patient"]["patients"]) == (None, 40)
    assert "whole groups (patient) at a time" in results["patient"]["protocol"]["intervals"]
    assert "groups" not in results[None]["protocol"]["intervals"]


def test_a_label_subset_is_stratified_by_the_first_grouping(tmp_path: Path) -> None:
    columns, features = patients_and_scanners()
    table = table_of(tmp_path / "t", **columns)
    settings = ProbeSettings(
        "linear_probe", "disease", by=("scanner",), fractions=(0.2, 1.0), seeds=(3, 4), resamples=5
    )
    results, arrays = evaluated(settings, features, table)
    rows = {split: np.flatnonzero(columns["split"] == split) for split in SPLITS}
    y = (columns["disease"] == "yes").astype(int)
    assert list(arrays) == ["row", "y", "scores-0.2-3", "scores-0.2-4", "scores-1-3"]
    np.testing.assert_array_equal(arrays["row"], rows["test"])
    np.testing.assert_array_equal(arrays["y"], y[rows["test"]])
    others = features[rows["val"]], y[rows["val"]], features[rows["test"]], 2
    for seed in (3, 4):
        scores = {}
        for name, strata in (("stratified", columns["scanner"][rows["train"]]), ("not", None)):
            kept = rows["train"][subset_labels(y[rows["train"]], strata, 0.2, seed)]
            scores[name] = linear_probe(features[kept], y[kept], *others).scores
        np.testing.assert_allclose(arrays[f"scores-0.2-{seed}"], scores["stratified"])
        assert not np.allclose(scores["stratified"], scores["not"])
    for result, seed in zip(results, (3, 4, 3), strict=True):
        protocol = result["protocol"]
        is_subset = protocol["label_fraction"] < 1
        assert protocol["train_rows"] == (32 if is_subset else 160)
        assert result["seeds"]["labels"] == seed
        assert (f"seed {seed}" in protocol["label_subset"]) == is_subset
        assert ("variance between label subsets is not in" in protocol["intervals"]) == is_subset


def test_rows_without_target_are_counted_and_take_no_part(tmp_path: Path) -> None:
    columns, features = patients_and_scanners()
    unknown = np.arange(480) % 40 < 4
    columns["disease"] = np.where(unknown, None, columns["disease"])
    table = table_of(tmp_path / "t", **columns)
    (result,), arrays = evaluated(ProbeSettings("knn", "disease", resamples=5), features, table)
    assert result["protocol"]["rows_without_target"] == unknown.sum()
    assert not unknown[arrays["row"]].any()
    assert result["n"] == ((columns["split"] == "test") & ~unknown).sum() == len(arrays["y"])
    assert result["data"] == {"table": "toy", "fingerprint": table.fingerprint}
    assert set(METRICS) < set(result["overall"])
    json.dumps(result, allow_nan=False)


def test_a_split_that_lacks_a_category_is_refused_by_its_name(tmp_path: Path) -> None:
    columns, features = patients_and_scanners()
    columns["disease"][(columns["split"] == "val") & (columns["disease"] == "yes")] = None
    table = table_of(tmp_path / "t", **columns)
    with pytest.raises(UserError, match="evaluation knn-disease of toy cannot work: no val image is 'yes'"):
        evaluated(ProbeSettings("knn", "disease"), features, table)


def test_a_choice_at_either_end_of_its_grid_is_flagged() -> None:
    grid = [{"k": 5, "auc": 0.7}, {"k": 10, "auc": 0.8}, {"k": 20, "auc": 0.6}]
    flags = [choice_of("k", chosen, grid)["k_at_edge_of_grid"] for chosen in (5, 10, 20)]
    assert flags == [True, False, True]


def test_probabilities_are_those_that_the_scores_were_made_from() -> None:
    rng = numpy_generator("decisions")
    for decision in (rng.normal(size=(50, 3)), rng.normal(size=50)):
        softmax = np.exp(decision if decision.ndim == 2 else np.stack([0 * decision, decision], axis=1))
        softmax /= softmax.sum(1, keepdims=True)
        np.testing.assert_allclose(probabilities("linear_probe", log_odds(decision)), softmax)
    votes = np.array([[0.0, 1.0], [0.25, 0.75]])
    np.testing.assert_array_equal(probabilities("knn", votes), votes)

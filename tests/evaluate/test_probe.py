"""Properties of the linear probe and of label fractions; oracles: scikit-learn by hand, and counting."""

import warnings
from itertools import pairwise

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from cfssl.errors import UserError
from cfssl.evaluate.probe import linear_probe, log_odds, subset_labels
from cfssl.seeds import numpy_generator


def splits(classes: int, count: int = 400, features: int = 20):
    rng = numpy_generator("splits", classes)
    centres = rng.normal(size=(classes, features)) * 0.4
    result = []
    for _ in range(3):
        y = rng.integers(classes, size=count)
        scale = np.logspace(-2, 2, features)  # standardisation matters
        result += [((rng.normal(size=(count, features)) + centres[y]) * scale).astype(np.float32), y]
    return result


@pytest.mark.parametrize("classes", [2, 3])
def test_probe_equals_scikit_learn_with_the_c_that_is_best_on_validation(classes):
    train_x, train_y, val_x, val_y, test_x, test_y = splits(classes)
    grid = (1e-4, 1e-2, 1.0)
    result = linear_probe(train_x, train_y, val_x, val_y, test_x, classes, grid)
    oracle = {}
    for c in grid:
        model = make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=2000, tol=1e-6))
        model.fit(train_x.astype(np.float64), train_y)
        scores = model.predict_proba(val_x.astype(np.float64))
        oracle[c] = (roc_auc_score(val_y, scores[:, 1] if classes == 2 else scores, multi_class="ovr"), model)
    assert [line["C"] for line in result.table] == sorted(grid)
    assert [line["auc"] for line in result.table] == pytest.approx([oracle[c][0] for c in grid], abs=2e-3)
    best = max(result.table, key=lambda line: line["auc"])["C"]
    assert best == result.C
    probabilities = oracle[best][1].predict_proba(test_x.astype(np.float64))
    np.testing.assert_allclose(1 / (1 + np.exp(-result.scores)), probabilities, atol=5e-3)
    assert result.scores.dtype == np.float64
    assert result.has_converged
    assert (result.scores.argmax(1) == test_y).mean() > 1.3 / classes


def test_choice_follows_the_validation_rows():
    train_x, train_y, val_x, val_y, test_x, _ = splits(2)
    grid = np.logspace(-5, 2, 8)
    chosen = {
        linear_probe(train_x, train_y, val_x[i : i + 30], val_y[i : i + 30], test_x, 2, grid).C
        for i in range(0, 300, 30)
    }
    assert len(chosen) > 1


def test_test_rows_do_not_act_on_one_another_or_on_the_choice():
    train_x, train_y, val_x, val_y, test_x, _ = splits(2)
    whole = linear_probe(train_x, train_y, val_x, val_y, test_x, 2)
    part = linear_probe(train_x, train_y, val_x, val_y, test_x[:7] * 1.0, 2)
    assert (whole.C, whole.table) == (part.C, part.table)
    np.testing.assert_allclose(whole.scores[:7], part.scores, rtol=1e-12)


def test_failed_convergence_is_reported_and_no_warning_is_spilled():
    train_x, train_y, val_x, val_y, test_x, _ = splits(3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = linear_probe(train_x, train_y, val_x, val_y, test_x, 3, (100.0,), max_iterations=2)
    assert not result.has_converged
    assert result.table[0]["converged"] is False
    assert result.table[0]["iterations"] == 2


@pytest.mark.parametrize("classes", [2, 3])
def test_rows_are_ranked_though_their_probabilities_round_to_one(classes):
    train_x, train_y, val_x, val_y, test_x, _ = splits(classes)
    result = linear_probe(train_x, train_y, val_x, val_y, 1000 * test_x, classes, (1.0,))
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000)).fit(train_x, train_y)
    assert len(np.unique(model.predict_proba(1000 * test_x)[:, 1])) < 0.9 * len(test_x)
    for label in range(classes):
        assert len(np.unique(result.scores[:, label])) == len(test_x)


def test_log_odds_are_those_of_softmax_and_sigmoid_in_extended_precision():
    logits = numpy_generator("logits").normal(size=(200, 4)) * np.logspace(-2, 3.5, 200)[:, None]
    wide = logits.astype(np.longdouble)  # exp ends at 1e308 in float64, here at 1e4932
    for label in range(4):
        others = np.exp(np.delete(wide, label, axis=1) - wide[:, [label]]).sum(1)
        np.testing.assert_allclose(log_odds(logits)[:, label], -np.log(others), rtol=1e-12, atol=1e-12)
    binary = log_odds(logits[:, 0])
    np.testing.assert_array_equal(binary, np.stack([-logits[:, 0], logits[:, 0]], axis=1))


def test_probes_that_cannot_work_are_refused_in_a_sentence():
    train_x, train_y, val_x, val_y, test_x, _ = splits(2)
    with pytest.raises(UserError, match="training rows of the probe have none of class 1"):
        linear_probe(train_x, train_y * 0, val_x, val_y, test_x, 2)
    with pytest.raises(UserError, match="validation rows have none of class 1"):
        linear_probe(train_x, train_y, val_x, val_y * 0, test_x, 2)
    with pytest.raises(UserError, match="1 of 400 test features are not finite"):
        linear_probe(
            train_x, train_y, val_x, val_y, np.where(np.arange(400)[:, None] == 3, np.nan, test_x), 2
        )


def labelled(count: int = 5000):
    rng = numpy_generator("labelled")
    return rng.choice(3, count, p=[0.8, 0.15, 0.05]), rng.choice(
        np.array(["A", "B", "C"]), count, p=[0.7, 0.25, 0.05]
    )


def test_label_subsets_are_nested_and_have_the_size_asked_for():
    y, scanner = labelled()
    for seed in range(3):
        subsets = [subset_labels(y, scanner, fraction, seed) for fraction in (0.01, 0.1, 0.5, 1)]
        assert [len(rows) for rows in subsets] == [50, 500, 2500, 5000]
        for small, large in pairwise(subsets):
            assert set(small) < set(large)
            assert (np.diff(small) > 0).all()


def test_label_subsets_keep_the_share_of_every_class_and_group():
    y, scanner = labelled()
    for fraction in (0.01, 0.1):
        rows = subset_labels(y, scanner, fraction, 0)
        for label in range(3):
            for group in "ABC":
                expected = fraction * ((y == label) & (scanner == group)).sum()
                found = ((y[rows] == label) & (scanner[rows] == group)).sum()
                assert abs(found - expected) <= 1.5


def test_label_subsets_hold_every_class_however_small():
    y, scanner = labelled(200)
    for seed in range(20):
        rows = subset_labels(y, scanner, 0.005, seed)
        assert sorted(y[rows]) == [0, 1, 2]


def test_every_row_of_a_class_is_chosen_equally_often_over_seeds():
    y = np.repeat([0, 1], [90, 10])
    times = np.zeros(100)
    for seed in range(1000):
        times[subset_labels(y, None, 0.2, seed)] += 1
    assert np.abs(times / 1000 - 0.2).max() < 0.05


def test_label_subset_is_a_function_of_its_seed_and_refuses_impossible_fractions():
    y, scanner = labelled()
    assert np.array_equal(subset_labels(y, scanner, 0.1, 4), subset_labels(y, scanner, 0.1, 4))
    assert not np.array_equal(subset_labels(y, scanner, 0.1, 4), subset_labels(y, scanner, 0.1, 5))
    for fraction in (0, 1.5):
        with pytest.raises(UserError, match="label fraction"):
            subset_labels(y, scanner, fraction, 0)

"""Properties of kNN; the oracle is a brute-force twin in float64."""

import numpy as np
import pytest

from cfssl.errors import UserError
from cfssl.evaluate.knn import knn, neighbours, vote
from cfssl.evaluate.metrics import auc, once
from cfssl.seeds import numpy_generator


def splits(count: int = 300, classes: int = 3, features: int = 16):
    rng = numpy_generator("knn")
    centres = rng.normal(size=(classes, features))
    result = []
    for _ in range(3):
        y = rng.integers(classes, size=count)
        lengths = rng.uniform(0.1, 10, size=(count, 1))  # only the direction may count
        result += [((rng.normal(size=(count, features)) + 0.5 * centres[y]) * lengths).astype(np.float32), y]
    return result


def brute_force(train_x, train_y, queries, k, classes, temperature):
    train, queries = (
        x.astype(np.float64) / np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True)
        for x in (train_x, queries)
    )
    scores = np.zeros((len(queries), classes))
    for row, similarity in enumerate(queries @ train.T):
        nearest = np.argsort(-similarity)[:k]
        weights = np.exp(similarity[nearest] / temperature)
        for place, weight in zip(nearest, weights / weights.sum(), strict=True):
            scores[row, train_y[place]] += weight
    return scores


@pytest.mark.parametrize("k", [1, 7, 300])
def test_scores_equal_the_brute_force_twin(k):
    train_x, train_y, val_x, val_y, test_x, _ = splits()
    result = knn(train_x, train_y, val_x, val_y, test_x, 3, (k,), temperature=0.07)
    np.testing.assert_allclose(result.scores, brute_force(train_x, train_y, test_x, k, 3, 0.07), atol=1e-5)
    np.testing.assert_allclose(result.scores.sum(1), 1)


def test_neighbours_of_the_bank_itself_are_itself():
    train_x = splits()[0]
    similarity, place = neighbours(train_x, train_x, 3)
    assert np.array_equal(place[:, 0], np.arange(len(train_x)))
    np.testing.assert_allclose(similarity[:, 0], 1, atol=1e-6)
    assert (np.diff(similarity, axis=1) <= 0).all()


def test_k_is_the_best_on_validation_and_clipped_to_the_bank():
    train_x, train_y, val_x, val_y, test_x, _ = splits()
    result = knn(train_x[:40], train_y[:40], val_x, val_y, test_x, 3, (1, 5, 20, 100, 200))
    assert [line["k"] for line in result.table] == [1, 5, 20, 40]
    for line in result.table:
        scores = brute_force(train_x[:40], train_y[:40], val_x, line["k"], 3, 0.07)
        assert line["auc"] == pytest.approx(once(auc, val_y, scores), abs=1e-3)
    assert result.k == max(result.table, key=lambda line: line["auc"])["k"]


def test_temperature_acts_and_a_hot_vote_counts_heads():
    similarity, labels = np.array([[0.9, 0.5, 0.4]]), np.array([[0, 1, 1]])
    assert vote(similarity, labels, 2, 0.07)[0, 0] > 0.99
    np.testing.assert_allclose(vote(similarity, labels, 2, 1e6), [[1 / 3, 2 / 3]], atol=1e-5)


def test_features_that_are_not_finite_are_refused():
    train_x, train_y, val_x, val_y, test_x, _ = splits()
    with pytest.raises(UserError, match="training features are not finite"):
        knn(train_x * np.nan, train_y, val_x, val_y, test_x, 3)
    with pytest.raises(UserError, match="none of class 2"):
        knn(train_x, train_y, val_x, np.minimum(val_y, 1), test_x, 3)

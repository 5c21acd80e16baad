"""kNN classification on the features of a frozen encoder (weighted vote of Wu et al. 2018, section 3.4).

    score_c = sum_{i in kNN, y_i = c} exp(s_i / T) / sum_{i in kNN} exp(s_i / T)

with s_i the cosine similarity and T = 0.07.

What enters: features (n, F) and classes (n,) of the three splits. What leaves: class scores of the test rows
and how k was chosen.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cfssl.evaluate.choice import checked, choose

GRID_OF_K = (5, 10, 20, 50, 100, 200)
TEMPERATURE = 0.07


@dataclass(frozen=True)
class KnnResult:
    """`scores` (n, classes) float64, rows summing to 1; `k` chosen; `table`: for every k {"k", "auc"} on
    validation rows.
    """

    scores: np.ndarray
    k: int
    table: tuple[dict[str, Any], ...]


def knn(
    train_x: np.ndarray,
    train_y: np.ndarray,
    val_x: np.ndarray,
    val_y: np.ndarray,
    test_x: np.ndarray,
    classes: int,
    grid_of_k: Sequence[int] = GRID_OF_K,
    temperature: float = TEMPERATURE,
) -> KnnResult:
    """Chooses k, at most the number of training rows, by validation AUC (ties: the smallest), scores test.

    Raises UserError where the validation rows lack a class.
    """
    checked(train_x, train_y, "training")
    grid = sorted({min(k, len(train_x)) for k in grid_of_k})
    similarity, place = neighbours(train_x, checked(val_x, val_y, "validation"), max(grid))

    def score(k: float) -> tuple[np.ndarray, dict[str, Any]]:
        return vote(similarity[:, : int(k)], train_y[place[:, : int(k)]], classes, temperature), {}

    choice = choose("k", grid, score, val_y)
    k = int(choice.best)
    similarity, place = neighbours(train_x, checked(test_x, None, "test"), k)
    return KnnResult(vote(similarity, train_y[place], classes, temperature), k, choice.table)


def neighbours(bank: np.ndarray, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosine similarity (n, k) float32, descending, and place in `bank` (n, k) of the k nearest rows, found
    exactly.
    """
    import faiss

    index = faiss.IndexFlatIP(bank.shape[1])
    index.add(_unit(bank))
    return index.search(_unit(queries), min(k, len(bank)))


def vote(
    similarity: np.ndarray, labels: np.ndarray, classes: int, temperature: float = TEMPERATURE
) -> np.ndarray:
    """Similarities (n, k) and classes (n, k) of the neighbours -> class scores (n, classes) float64."""
    logits = similarity.astype(np.float64) / temperature
    weights = np.exp(logits - logits.max(1, keepdims=True))
    weights /= weights.sum(1, keepdims=True)
    return np.stack([np.where(labels == label, weights, 0).sum(1) for label in range(classes)], axis=1)


def _unit(features: np.ndarray) -> np.ndarray:
    """L2-normalised, float32, contiguous: what faiss takes."""
    features = np.asarray(features, dtype=np.float64)
    norm = np.linalg.norm(features, axis=1, keepdims=True)
    return np.ascontiguousarray(features / np.maximum(norm, 1e-12), dtype=np.float32)

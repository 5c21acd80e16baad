"""What can be known of an encoder while it is trained: how far its features separate a target, how much of
their space they use, and whether they collapse.

What enters: the encoder, up to R training and R validation images, and what the objective logged. What leaves
every so many steps, for a line of metrics.jsonl:

    knn_auc, probe_auc   of the target on validation images, with a fixed k and C (nothing is chosen here)
    feature_std          sqrt(F) times the mean standard deviation of the L2-normalised features: 1 where they
                         spread equally in all directions, 0 where they are one point (Chen and He 2021,
                         section 4.1)
    effective_rank       exp of the entropy of the singular values' shares (Roy and Vetterli 2007; RankMe,
                         Garrido et al. 2023) of the L2-normalised features about their mean: with the mean
                         left in, pooled activations, none of them negative, all have a rank near 1
    collapse             names of the warnings

Test images are never seen.
"""

import math
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from cfssl.data.table import ImageTable
from cfssl.engine.loop import Observation
from cfssl.engine.run import Run, read_metrics
from cfssl.evaluate.features import extract
from cfssl.evaluate.knn import knn
from cfssl.evaluate.probe import linear_probe, subset_labels
from cfssl.evaluate.settings import MonitorSettings

# Fixed, so that a curve shows the encoder and not a choice: in the middle of the grids of the evaluations.
K = 20
C = 1e-2

# Ten architectures with random weights have 0.006 to 0.4 on the phantom; one point has the rounding of
# float32, below 1e-5.
SMALLEST_STD = 1e-3
# The same ten have 13 to 158 directions, 5 % of what was possible at the least.
FEWEST_DIRECTIONS = 3.0
SMALLEST_RANK_SHARE = 0.01  # of the rank that is possible
# Of a teacher's targets over K prototypes, as shares of log K: what they tell about the image (the entropy of
# the mean target less the mean entropy), 0.01 nats for K = 65,536; and the entropy of the mean target, where
# 0.1 nats are 1.1 prototypes in use.
LEAST_INFORMATION = 1e-3
LEAST_MARGINAL = 1e-2

COMPLETE = "complete collapse"
DIMENSIONAL = "dimensional collapse"
UNIFORM = "uniform teacher"
ONE_HOT = "one-hot teacher"


class Monitor:
    """An observer of the training loop. `encoder` is looked at as the evaluations do: whole images of `size`
    (height, width) with `border`, frozen, in eval mode. `every`: steps between two looks. `run`: whose
    metrics.jsonl says what the objective logged, and which warnings were given before."""

    def __init__(
        self,
        settings: MonitorSettings,
        encoder: nn.Module,
        table: ImageTable,
        size: tuple[int, int],
        border: str,
        every: int,
        run: Run,
    ) -> None:
        self.settings, self.encoder, self.table = settings, encoder, table
        self.size, self.border, self.every, self.run = size, border, every, run

    def __call__(self, step: int) -> Observation:
        """Measures, warns on standard error about what was not warned of before, and stops if it is to."""
        lines = read_metrics(self.run.metrics_path) if self.run.metrics_path.exists() else []
        bank, bank_y = self.features("train")
        numbers = spread(bank)
        if self.settings.target is not None:
            numbers |= separation(bank, bank_y, *self.features("val"), self.classes)
        warnings = collapses(numbers | latest_parts(lines), bank.shape)
        known = first_warnings(lines)
        for name, sentence in warnings.items():
            if name not in known:
                print(f"cfssl: step {step}: {name}: {sentence}", file=sys.stderr, flush=True)
        stop = None
        if warnings and self.settings.stop_on_collapse:
            name, sentence = next(iter(warnings.items()))
            stop = f"{name} at step {step}: {sentence}"
        return Observation({**numbers, "collapse": list(warnings)}, stop)

    @property
    def classes(self) -> int:
        assert self.settings.target is not None
        return len(self.table.attributes[self.settings.target].categories)

    def features(self, split: str) -> tuple[np.ndarray, np.ndarray]:
        """Features (R, F) and classes (R,), all 0 without a target, of the same rows every time."""
        rows, y = monitored_rows(self.table, split, self.settings)
        return extract(self.encoder, self.table, rows, self.size, self.border, quiet=True), y


def monitored_rows(table: ImageTable, split: str, settings: MonitorSettings) -> tuple[np.ndarray, np.ndarray]:
    """Up to `settings.rows` rows of a split, with every class of the target among them, and their classes."""
    target = () if settings.target is None else (settings.target,)
    rows = table.rows(split, known=target)
    y = table.encode(target, rows)[target[0]].numpy() if target else np.zeros(len(rows), np.int64)
    kept = subset_labels(y, None, min(1.0, settings.rows / len(rows)), seed=0)
    return rows[kept], y[kept]


def spread(features: np.ndarray) -> dict[str, float]:
    """Standard deviation and effective rank of features (R, F), as the module docstring defines them."""
    from lightly.utils.debug import std_of_l2_normalized

    z = torch.from_numpy(features).double()
    unit = nn.functional.normalize(z, dim=1).numpy()
    return {
        "feature_std": float(std_of_l2_normalized(z)) * math.sqrt(z.shape[1]),
        "effective_rank": effective_rank(unit - unit.mean(0)),
    }


def effective_rank(matrix: np.ndarray) -> float:
    """exp(-sum p log p) of the shares p of the singular values; 0 of a matrix of zeros."""
    from scipy.stats import entropy

    values = np.linalg.svd(matrix, compute_uv=False)
    return float(np.exp(entropy(values))) if values.any() else 0.0


def separation(
    bank: np.ndarray, bank_y: np.ndarray, val: np.ndarray, val_y: np.ndarray, classes: int
) -> dict[str, float]:
    """AUC of kNN and linear probe, fitted on `bank`, on the validation rows."""
    data = bank, bank_y, val, val_y, val, classes
    return {
        "knn_auc": knn(*data, grid_of_k=(K,)).table[0]["auc"],
        "probe_auc": linear_probe(*data, grid_of_C=(C,)).table[0]["auc"],
    }


def collapses(numbers: Mapping[str, float], shape: tuple[int, ...]) -> dict[str, str]:
    """Warnings, name -> sentence. `shape` (R, F) of the features bounds their rank."""
    found = {}
    std, rank = numbers["feature_std"], numbers["effective_rank"]
    needed = max(FEWEST_DIRECTIONS, SMALLEST_RANK_SHARE * min(shape))
    if std < SMALLEST_STD:
        found[COMPLETE] = (
            f"the features of all images are nearly one point (standard deviation {std:.2g}, expected more "
            f"than {SMALLEST_STD:g}); lower train.lr, or check that the views of an image differ."
        )
    elif rank < needed:
        found[DIMENSIONAL] = (
            f"the features vary along few directions (effective rank {rank:.2g} of {min(shape)}, expected "
            f"more than {needed:.2g}); lower train.lr, or use stronger augmentations."
        )
    return found | teacher_collapses(numbers.get("teacher_entropy"), numbers.get("marginal_entropy"))


def teacher_collapses(entropy: float | None, marginal: float | None) -> dict[str, str]:
    """Of an objective with a teacher: the mean `entropy` of its targets and the `marginal` one, of the mean
    target, as shares of the greatest possible. Their difference is what a target tells about the image."""
    if entropy is None or marginal is None:
        return {}
    if marginal < LEAST_MARGINAL:
        return {
            ONE_HOT: f"the teacher gives every image the same prototype (entropy of the mean target "
            f"{marginal:.2g} of the greatest, expected more than {LEAST_MARGINAL:g}); raise the teacher's "
            "temperature, or check its centring."
        }
    if marginal - entropy < LEAST_INFORMATION:
        return {
            UNIFORM: f"the teacher's targets are the same for all images (they tell "
            f"{marginal - entropy:.2g} of what they could about the image, expected more than "
            f"{LEAST_INFORMATION:g}); lower the teacher's temperature."
        }
    return {}


def latest_parts(lines: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """The objective's parts as last logged."""
    *_, latest = ({}, *(line for line in lines if "loss" in line))
    return dict(latest)


def first_warnings(lines: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """Name of each warning in a metrics.jsonl -> the first step at which it was given."""
    found: dict[str, int] = {}
    for line in lines:
        for name in line.get("collapse", ()):
            found.setdefault(name, line["step"])
    return found

"""The axioms against a world where everything is known: an additive toy, and the phantom's oracle."""

import numpy as np
import pytest
import torch

from cfssl.data.table import Attribute, Attributes
from cfssl.evaluate.counterfactual import (
    composition,
    distance_to_truth,
    effectiveness,
    grey_levels,
    reversibility,
)
from cfssl.generators.base import Exogenous
from cfssl.scm.graph import CausalGraph

ATTRIBUTES = {"scanner": Attribute("scanner", "categorical", ("A", "B", "C"))}


class Shift:
    """x = u + 0.1 scanner; `forgets` is what abduction loses of u."""

    graph = CausalGraph({}, ("scanner",), ("scanner",))
    scm = None
    fingerprint = "shift"

    def __init__(self, forgets: float = 0.0) -> None:
        self.forgets = forgets

    def fit(self, table: object, run: object) -> None: ...

    def abduct(self, x: torch.Tensor, pa: Attributes) -> Exogenous:
        shift = 0.1 * pa["scanner"].float().view(-1, 1, 1, 1)
        mean = (x - shift) * (1 - self.forgets)
        return {"mean": mean, "rest": x - shift - mean}

    def predict(self, u: Exogenous, pa_cf: Attributes, residual: float = 1.0) -> torch.Tensor:
        shift = 0.1 * pa_cf["scanner"].float().view(-1, 1, 1, 1)
        return u["mean"] + residual * u["rest"] + shift


X = torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 0.5
PA = {"scanner": torch.tensor([0, 1, 2, 0, 1])}
DO = {"scanner": torch.tensor([2, 2, 0, 1, 0])}


def test_grey_levels_are_the_mean_absolute_difference_in_255ths() -> None:
    first, second = torch.zeros(2, 1, 4, 4), torch.zeros(2, 1, 4, 4)
    second[1] = 2 / 255 * 10
    np.testing.assert_allclose(grey_levels(first, second), [0, 10], rtol=1e-6)


def test_composition_is_zero_with_the_residual_and_shows_what_the_network_forgets_without() -> None:
    assert composition(Shift(forgets=0.5), X, PA, cycles=3).max() < 1e-4
    lost = composition(Shift(forgets=0.5), X, PA, residual=0.0)
    expected = 0.5 * grey_levels(X - 0.1 * PA["scanner"].view(-1, 1, 1, 1), torch.zeros_like(X))
    np.testing.assert_allclose(lost, expected, rtol=1e-4)
    twice = composition(Shift(forgets=0.5), X[:1], {"scanner": PA["scanner"][:1]}, cycles=2, residual=0.0)
    np.testing.assert_allclose(twice, 1.5 * lost[:1], rtol=1e-4)


def test_an_invertible_generator_is_reversible_and_a_forgetful_cycle_is_not() -> None:
    assert reversibility(Shift(), X, PA, DO, cycles=5).max() < 1e-4

    class Clipped(Shift):
        def predict(self, u: Exogenous, pa_cf: Attributes, residual: float = 1.0) -> torch.Tensor:
            return super().predict(u, pa_cf, residual).clamp(0.1, 0.3)

    assert reversibility(Clipped(), X, PA, DO).mean() > 1


def test_effectiveness_counts_what_the_classifier_sees() -> None:
    def classifier(images: torch.Tensor) -> torch.Tensor:
        seen = (images.mean((1, 2, 3)) * 10).round().long().clamp(0, 2)
        return torch.nn.functional.one_hot(seen, 3).float()

    images = torch.tensor([0.0, 0.1, 0.2, 0.2]).view(-1, 1, 1, 1).expand(-1, 1, 4, 4) * 2 - 1
    found = effectiveness(classifier, images, torch.tensor([0, 1, 2, 0]))
    assert found.tolist() == [True, True, True, False]


def test_distance_to_truth_is_zero_for_the_truth_and_the_shift_for_the_unchanged_image() -> None:
    truth = X + 0.1
    generated, unchanged = distance_to_truth(truth, truth, X)
    np.testing.assert_allclose(generated, 0)
    assert unchanged == pytest.approx(np.full(5, 12.75), rel=1e-4)

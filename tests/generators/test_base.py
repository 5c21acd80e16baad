"""Pearl's three steps against a structural model with a closed form, and pixels against exact arithmetic."""

from fractions import Fraction

import numpy as np
import pytest
import torch

from cfssl.data.table import Attribute
from cfssl.errors import UserError
from cfssl.generators.base import (
    counterfactual,
    counterfactual_attributes,
    intervention,
    to_signed,
    to_stored,
)
from cfssl.scm.graph import CausalGraph

ATTRIBUTES = {
    "scanner": Attribute("scanner", "categorical", ("A", "B", "C")),
    "age": Attribute("age", "continuous"),
    "size": Attribute("size", "continuous"),
}


class Doubling:
    """size = 2 age + u; hands back every attribute as a new tensor, invariant ones with a rounding error."""

    def counterfactual(self, values, do, rng):
        residual = values["size"] - 2 * values["age"]
        result = {
            name: value + 1e-3 if value.is_floating_point() else value + 0 for name, value in values.items()
        }
        result.update(do)
        result["size"] = 2 * result["age"] + residual
        return result


class Additive:
    """x = u + scanner + size / 100."""

    def __init__(self, scm):
        self.graph = CausalGraph({"size": ["age"]}, ["scanner", "age", "size"], ["scanner", "size"])
        self.scm = scm

    def _mean(self, pa):
        return (pa["scanner"] + pa["size"] / 100)[:, None, None, None]

    def abduct(self, x, pa):
        return {"u": x - self._mean(pa)}

    def predict(self, u, pa_cf):
        return u["u"] + self._mean(pa_cf)


@pytest.fixture
def factual():
    pa = {
        "scanner": torch.tensor([0, 1, 2, 1]),
        "age": torch.tensor([20.0, 30.0, 40.0, 50.0]),
        "size": torch.tensor([41.0, 59.0, 80.0, 104.0]),
    }
    return torch.rand(4, 1, 3, 3, generator=torch.Generator().manual_seed(0)), pa


def test_a_cause_takes_its_effects_with_it_and_leaves_the_rest_bit_equal(factual):
    x, pa = factual
    do = intervention({"age": 60.0}, ATTRIBUTES, 4)
    x_cf, pa_cf = counterfactual(Additive(Doubling()), x, pa, do, torch.Generator())
    torch.testing.assert_close(pa_cf["size"], torch.tensor([121.0, 119.0, 120.0, 124.0]))
    assert pa_cf["scanner"] is pa["scanner"]
    assert torch.equal(pa_cf["age"], do["age"])
    torch.testing.assert_close(
        x_cf - x, ((pa_cf["size"] - pa["size"]) / 100)[:, None, None, None].expand_as(x)
    )


def test_an_intervention_without_descendants_needs_no_causal_model(factual):
    x, pa = factual
    do = intervention({"scanner": "C"}, ATTRIBUTES, 4)
    x_cf, pa_cf = counterfactual(Additive(None), x, pa, do, torch.Generator())
    assert pa_cf["age"] is pa["age"]
    assert pa_cf["size"] is pa["size"]
    torch.testing.assert_close(x_cf - x, (2 - pa["scanner"]).float()[:, None, None, None].expand_as(x))


def test_null_intervention_returns_the_image(factual):
    x, pa = factual
    for do in ({"scanner": pa["scanner"]}, {"age": pa["age"]}):
        x_cf, pa_cf = counterfactual(Additive(Doubling()), x, pa, do, torch.Generator())
        torch.testing.assert_close(x_cf, x)
        assert all(torch.equal(pa_cf[name], pa[name]) for name in pa)


def test_one_value_stands_for_the_whole_batch(factual):
    _, pa = factual
    pa_cf = counterfactual_attributes(Additive(None), pa, {"scanner": torch.tensor(1)}, torch.Generator())
    assert torch.equal(pa_cf["scanner"], torch.ones(4, dtype=torch.long))


def test_descendants_without_a_causal_model_are_refused_by_name(factual):
    _, pa = factual
    with pytest.raises(UserError, match=r"do\(age\) also changes size, but the generator has no model"):
        counterfactual_attributes(Additive(None), pa, {"age": pa["age"]}, torch.Generator())


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_every_stored_level_survives_the_way_to_floats_and_back(dtype):
    levels = np.arange(np.iinfo(dtype).max + 1, dtype=dtype)
    x = to_signed(levels)
    assert x.dtype == torch.float32
    assert (x.min(), x.max()) == (-1, 1)
    np.testing.assert_array_equal(to_stored(x, np.dtype(dtype)), levels)


def test_floats_are_stored_as_the_nearest_level_and_clipped():
    x = torch.linspace(-1.2, 1.2, 4001)
    stored = to_stored(x, np.dtype(np.uint8))
    for value, level in zip(x.tolist(), stored.tolist(), strict=True):
        exact = min(max((Fraction(value) + 1) * Fraction(255, 2), Fraction(0)), Fraction(255))
        assert abs(level - exact) <= Fraction(1, 2) + Fraction(1, 10000)
    assert (stored[0], stored[-1]) == (0, 255)

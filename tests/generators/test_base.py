"""Pearl's three steps against a structural model with a closed form, and pixels against exact arithmetic."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn

from cfssl.data.pixels import to_signed, to_stored
from cfssl.data.table import Attribute
from cfssl.errors import UserError
from cfssl.generators.base import counterfactual, intervention, propagate
from cfssl.scm.graph import CausalGraph
from cfssl.scm.mechanisms import CausalModelSettings, create_mechanism
from cfssl.scm.model import StructuralCausalModel

ATTRIBUTES = {
    "scanner": Attribute("scanner", "categorical", ("A", "B", "C")),
    "age": Attribute("age", "continuous"),
    "size": Attribute("size", "continuous"),
}


GRAPH = CausalGraph({"size": ["age"]}, ["scanner", "age", "size"], ["scanner", "size"])


class Doubling(nn.Module):
    """size = 2 age + u."""

    def fit(self, values, parents, rng):
        """Known."""

    def abduct(self, values, parents, rng):
        return values - 2 * parents["age"]

    def predict(self, u, parents):
        return 2 * parents["age"] + u


class Rounding(StructuralCausalModel):
    """Hands back every attribute as a new tensor, with an error in it."""

    def counterfactual(self, values, do, rng):
        result = super().counterfactual(values, do, rng)
        return {
            name: value + 1 if name not in GRAPH.affected(do) else value for name, value in result.items()
        }


class Additive:
    """x = u + scanner + size / 100."""

    graph = GRAPH

    def __init__(self, model=StructuralCausalModel):
        roots = {
            name: create_mechanism(ATTRIBUTES[name], [], CausalModelSettings()) for name in ("scanner", "age")
        }
        self.scm = model(GRAPH, ATTRIBUTES, known={**roots, "size": Doubling()})

    def _mean(self, pa):
        return (pa["scanner"] + pa["size"] / 100)[:, None, None, None]

    def abduct(self, x, pa):
        return {"u": x - self._mean(pa)}

    def act(self, u, pa, do, rng):
        return propagate(self.scm, pa, do, rng)

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
    x_cf, pa_cf = counterfactual(Additive(), x, pa, do, torch.Generator())
    torch.testing.assert_close(pa_cf["size"], torch.tensor([121.0, 119.0, 120.0, 124.0]))
    assert pa_cf["scanner"] is pa["scanner"]
    assert torch.equal(pa_cf["age"], do["age"])
    torch.testing.assert_close(
        x_cf - x, ((pa_cf["size"] - pa["size"]) / 100)[:, None, None, None].expand_as(x)
    )


def test_invariant_attributes_are_the_tensors_that_came_in_whatever_the_model_makes_of_them(factual):
    x, pa = factual
    x_cf, pa_cf = counterfactual(
        Additive(Rounding), x, pa, intervention({"scanner": "C"}, ATTRIBUTES, 4), torch.Generator()
    )
    assert pa_cf["age"] is pa["age"]
    assert pa_cf["size"] is pa["size"]
    torch.testing.assert_close(x_cf - x, (2 - pa["scanner"]).float()[:, None, None, None].expand_as(x))


def test_an_intervention_without_descendants_needs_no_fitted_model(factual):
    x, pa = factual
    generator = Additive(lambda graph, attributes, known: StructuralCausalModel(graph, attributes))
    counterfactual(generator, x, pa, {"scanner": pa["scanner"]}, torch.Generator())
    with pytest.raises(UserError, match="no fitted mechanisms"):
        counterfactual(generator, x, pa, {"age": pa["age"]}, torch.Generator())


@pytest.mark.parametrize(
    ("do", "message"),
    [
        ({"scanner": torch.full((4,), 7)}, r"do\(scanner\) has values that are no category codes"),
        ({"scanner": torch.full((4,), -1)}, "no category codes"),
        ({"scanner": torch.full((4,), 1.7)}, "no category codes"),
        ({"scanner": torch.zeros(3, dtype=torch.long)}, "shape"),
        ({"size": torch.full((4,), float("inf"))}, "not finite"),
        ({"age": torch.full((4,), float("nan"))}, "not finite"),
        ({"weight": torch.zeros(4)}, "'weight'"),
    ],
)
def test_values_that_no_attribute_can_take_are_refused_with_descendants_and_without(factual, do, message):
    x, pa = factual
    with pytest.raises(UserError, match=message):
        counterfactual(Additive(), x, pa, do, torch.Generator())


def test_null_intervention_returns_the_image(factual):
    x, pa = factual
    for do in ({"scanner": pa["scanner"]}, {"age": pa["age"]}):
        x_cf, pa_cf = counterfactual(Additive(), x, pa, do, torch.Generator())
        torch.testing.assert_close(x_cf, x)
        assert all(torch.equal(pa_cf[name], pa[name]) for name in pa)


def test_one_value_stands_for_the_whole_batch(factual):
    x, pa = factual
    _, pa_cf = counterfactual(Additive(), x, pa, {"scanner": torch.tensor(1)}, torch.Generator())
    assert torch.equal(pa_cf["scanner"], torch.ones(4, dtype=torch.long))


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

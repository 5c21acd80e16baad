"""Properties of abduct-act-predict over attributes; the oracle is a linear-Gaussian closed form."""

import pytest
import torch
from torch import nn

from cfssl.data.table import Attribute
from cfssl.errors import UserError
from cfssl.scm.graph import CausalGraph
from cfssl.scm.mechanisms import CausalModelSettings
from cfssl.scm.model import StructuralCausalModel
from cfssl.seeds import torch_generator

ATTRIBUTES = {
    "scanner": Attribute("scanner", "categorical", ("A", "B", "C")),
    "type": Attribute(
        "type", "binary", ("F", "M")
    ),  # a name that nn.ModuleDict refuses as a key, and the next has a dot
    "age": Attribute("age", "continuous"),
    "disease": Attribute("disease", "binary", ("no", "yes")),
    "lung.volume": Attribute("lung.volume", "continuous"),
}
GRAPH = CausalGraph(
    {"disease": ["age", "type"], "lung.volume": ["disease", "age"]},
    list(ATTRIBUTES),
    ["scanner", "lung.volume"],
)
QUICK = CausalModelSettings(hidden=(8,), steps=200, lr=1e-2)


def world(count: int):
    rng = torch_generator("world")
    age = torch.rand(count, generator=rng) * 60 + 20
    female = torch.randint(2, (count,), generator=rng)
    disease = torch.bernoulli(torch.sigmoid((age - 50) / 10 + female - 0.5), generator=rng).long()
    volume = 5000 - 10 * age - 800 * disease + 300 * torch.randn(count, generator=rng)
    scanner = torch.randint(3, (count,), generator=rng)
    return {"scanner": scanner, "type": female, "age": age, "disease": disease, "lung.volume": volume}


@pytest.fixture(scope="module")
def values():
    return world(1500)


@pytest.fixture(scope="module")
def scm(values):
    model = StructuralCausalModel(GRAPH, ATTRIBUTES, QUICK)
    model.fit(values, torch_generator("fit"))
    return model


@pytest.mark.parametrize(
    "do", [["age"], ["scanner"], ["disease", "type"], ["lung.volume"], ["age", "lung.volume"]]
)
def test_only_affected_variables_change_and_invariant_ones_are_bit_equal(scm, values, do):
    other = {name: values[name].flip(0) for name in do}
    result = scm.counterfactual({**values, "outside the graph": values["age"]}, other, torch_generator("cf"))
    for name in GRAPH.invariant(do):
        assert torch.equal(result[name], values[name])
    for name in do:
        assert torch.equal(result[name], other[name])
    for name in GRAPH.affected(do):
        assert not torch.equal(result[name], values[name])
        assert result[name].dtype == values[name].dtype
    assert torch.equal(result["outside the graph"], values["age"])


@pytest.mark.parametrize(
    "do", [["age"], ["age", "type"], ["age", "type", "scanner", "disease", "lung.volume"], []]
)
def test_null_intervention_returns_the_values(scm, values, do):
    result = scm.counterfactual(values, {name: values[name] for name in do}, torch_generator("cf"))
    for name in ("scanner", "type", "disease"):
        assert torch.equal(result[name], values[name])
    for name in ("age", "lung.volume"):
        torch.testing.assert_close(result[name], values[name], rtol=1e-5, atol=0)


def test_counterfactual_leaves_its_arguments_as_they_were(scm, values):
    before = {name: column.clone() for name, column in values.items()}
    do = {"age": torch.full_like(values["age"], 80.0)}
    result = scm.counterfactual(values, do, torch_generator("cf"))
    result["age"].zero_()
    assert do["age"].min() == 80
    assert all(torch.equal(values[name], before[name]) for name in values)


def test_ageing_raises_the_disease_and_shrinks_the_lung(scm, values):
    result = scm.counterfactual(values, {"age": values["age"] + 20}, torch_generator("cf"))
    assert result["disease"].double().mean() > values["disease"].double().mean() + 0.1
    # Gumbel-max is monotone here: nobody is healed by what makes the disease likelier for two classes.
    assert (result["disease"] >= values["disease"]).all()
    unchanged = result["disease"] == values["disease"]
    shift = (result["lung.volume"] - values["lung.volume"])[unchanged]
    assert shift.mean().item() == pytest.approx(-200, abs=60)


def test_a_scalar_intervention_counts_for_every_row(scm, values):
    one = scm.counterfactual(values, {"type": torch.tensor(1)}, torch_generator("cf"))
    every = scm.counterfactual(values, {"type": torch.ones_like(values["type"])}, torch_generator("cf"))
    assert all(torch.equal(one[name], every[name]) for name in values)


class LinearGaussian(nn.Module):
    """a = intercept + sum_p weight_p p + scale u, known exactly."""

    def __init__(self, intercept: float, weights: dict[str, float], scale: float) -> None:
        super().__init__()
        self.intercept, self.weights, self.scale = intercept, weights, scale

    def location(self, parents):
        return self.intercept + sum(weight * parents[name] for name, weight in self.weights.items())

    def fit(self, values, parents, rng):
        """Known."""

    def log_prob(self, values, parents):
        return torch.distributions.Normal(self.location(parents), self.scale).log_prob(values)

    def noise(self, count, rng):
        return torch.randn(count, generator=rng)

    def abduct(self, values, parents, rng):
        return (values - self.location(parents)) / self.scale

    def predict(self, u, parents):
        return self.location(parents) + self.scale * u


# x -> m -> y and x -> y: x moves y by 3 directly and by 2 * -1 through m.
CHAIN = CausalGraph({"m": ["x"], "y": ["x", "m"]}, ["y", "x", "m"], ["y"])
LINEAR = {
    "x": LinearGaussian(1, {}, 2),
    "m": LinearGaussian(-1, {"x": 2.0}, 0.5),
    "y": LinearGaussian(0.5, {"x": 3, "m": -1}, 1),
}
REAL = {name: Attribute(name, "continuous") for name in CHAIN.variables}


def exact_chain() -> StructuralCausalModel:
    return StructuralCausalModel(CHAIN, REAL, known=LINEAR)


def test_known_linear_gaussian_counterfactuals_equal_the_closed_form():
    scm = exact_chain()
    values = scm.sample(500, torch_generator("sample"))
    x = torch.randn(500, generator=torch_generator("x"))
    result = scm.counterfactual(values, {"x": x}, torch_generator("cf"))
    step = x - values["x"]
    torch.testing.assert_close(result["m"], values["m"] + 2 * step, rtol=0, atol=1e-5)
    torch.testing.assert_close(result["y"], values["y"] + (3 - 2) * step, rtol=0, atol=2e-5)


def test_intervening_on_ancestor_and_descendant_together_cuts_the_path_between_them():
    scm = exact_chain()
    values = scm.sample(500, torch_generator("sample"))
    x, m = torch.randn(2, 500, generator=torch_generator("x"))
    result = scm.counterfactual(values, {"m": m, "x": x}, torch_generator("cf"))
    assert torch.equal(result["x"], x)
    assert torch.equal(result["m"], m)
    closed = values["y"] + 3 * (x - values["x"]) - (m - values["m"])
    torch.testing.assert_close(result["y"], closed, rtol=0, atol=1e-5)


def test_learned_linear_gaussian_counterfactuals_approach_the_closed_form():
    values = exact_chain().sample(6000, torch_generator("sample"))
    scm = StructuralCausalModel(CHAIN, REAL, CausalModelSettings(hidden=(), steps=600))
    scm.fit(values, torch_generator("fit"))
    result = scm.counterfactual(values, {"x": values["x"] + 2}, torch_generator("cf"))
    assert (result["m"] - values["m"] - 4).abs().max() < 0.25
    assert (result["y"] - values["y"] - 2).abs().max() < 0.4


def test_known_mechanisms_are_kept_beside_learned_ones():
    values = exact_chain().sample(300, torch_generator("sample"))
    scm = StructuralCausalModel(CHAIN, REAL, QUICK, known={"m": LINEAR["m"]})
    with pytest.raises(UserError, match="fit"):
        scm.counterfactual(values, {"x": values["x"]}, torch_generator("cf"))
    scm.fit(values, torch_generator("fit"))
    result = scm.counterfactual(values, {"x": values["x"] + 1}, torch_generator("cf"))
    torch.testing.assert_close(result["m"], values["m"] + 2, rtol=0, atol=1e-5)


@pytest.mark.parametrize("order", [slice(None), slice(None, None, -1), slice(3, 40)])
def test_with_a_stream_per_row_a_row_does_not_depend_on_its_neighbours(scm, values, order):
    rows = torch.arange(60).numpy()[order].tolist()
    do = {"age": values["age"] + 15}

    def counterfactual(rows):
        streams = [torch_generator("row", row) for row in rows]
        chosen = [{name: column[rows] for name, column in part.items()} for part in (values, do)]
        return scm.counterfactual(*chosen, streams)

    together = counterfactual(rows)
    for place, row in enumerate(rows):
        for name, value in counterfactual([row]).items():
            assert torch.equal(value, together[name][place : place + 1])
    assert not torch.equal(together["disease"], values["disease"][rows])


def test_a_stream_per_row_gives_what_the_stream_gives_for_a_batch_of_one(scm, values):
    one = {name: column[:1] for name, column in values.items()}
    do = {"age": torch.tensor([75.0])}
    for seed in range(20):
        alone = scm.counterfactual(one, do, torch_generator(seed))
        assert torch.equal(alone["disease"], scm.counterfactual(one, do, [torch_generator(seed)])["disease"])


def test_fit_is_a_function_of_its_generator_and_leaves_the_global_one_alone(values):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    states = []
    for seed in (1, 1, 2):
        scm = StructuralCausalModel(GRAPH, ATTRIBUTES, CausalModelSettings(hidden=(4,), steps=5))
        scm.fit(values, torch_generator(seed))
        scm.counterfactual(values, {"age": values["age"] + 1}, torch_generator(seed))
        scm.sample(10, torch_generator(seed))
        states.append(torch.cat([tensor.double().flatten() for tensor in scm.state_dict().values()]))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


def test_fitting_again_forgets_the_first_fit(values):
    scm = StructuralCausalModel(GRAPH, ATTRIBUTES, CausalModelSettings(hidden=(4,), steps=5))
    scm.fit(values, torch_generator(1))
    first = {name: tensor.clone() for name, tensor in scm.state_dict().items()}
    scm.fit({name: column[:100] for name, column in values.items()}, torch_generator(2))
    scm.fit(values, torch_generator(1))
    assert all(torch.equal(tensor, first[name]) for name, tensor in scm.state_dict().items())


def test_state_dict_round_trip_gives_the_same_counterfactuals(scm, values):
    loaded = StructuralCausalModel(GRAPH, ATTRIBUTES, QUICK)
    loaded.load_state_dict(scm.state_dict())
    for name, column in scm.counterfactual(values, {"age": values["age"] + 9}, torch_generator("cf")).items():
        again = loaded.counterfactual(values, {"age": values["age"] + 9}, torch_generator("cf"))[name]
        assert torch.equal(column, again)


def test_samples_resemble_the_training_joint(scm, values):
    sample = scm.sample(8000, torch_generator("sample"))
    for name in ("age", "lung.volume"):
        assert sample[name].mean().item() == pytest.approx(values[name].mean().item(), rel=0.05)
    for code in range(2):
        share = (sample["disease"][sample["type"] == code]).double().mean().item()
        assert share == pytest.approx(
            values["disease"][values["type"] == code].double().mean().item(), abs=0.06
        )


@pytest.mark.parametrize(
    ("do", "message"),
    [
        ({"weight": torch.zeros(1500)}, "'weight'"),
        ({"scanner": torch.full((1500,), 3)}, "category codes"),
        ({"scanner": torch.zeros(1500)}, "category codes"),
        ({"age": torch.full((1500,), float("nan"))}, "not finite"),
        ({"age": torch.zeros(3)}, "shape"),
    ],
)
def test_impossible_interventions_are_refused_with_the_variable_that_is_wrong(scm, values, do, message):
    with pytest.raises(UserError, match=message):
        scm.counterfactual(values, do, torch_generator("cf"))


@pytest.mark.parametrize("mechanism", ["affine", "spline"])
def test_a_fit_that_diverges_is_refused_by_the_name_of_its_variable(values, mechanism):
    settings = CausalModelSettings(lr=1e30, steps=20, mechanisms={"lung.volume": mechanism})
    graph = CausalGraph({"lung.volume": ["age"]}, ["age", "lung.volume"], [])
    model = StructuralCausalModel(graph, ATTRIBUTES, settings)
    with pytest.raises(UserError, match=r"mechanism of 'lung\.volume' has diverged .* lower"):
        model.fit(values, torch_generator("fit"))
    with pytest.raises(UserError, match="no fitted mechanisms"):
        model.sample(3, torch_generator("sample"))


def test_missing_attributes_and_wrong_names_are_refused(scm, values):
    without_age = {name: column for name, column in values.items() if name != "age"}
    with pytest.raises(UserError, match="lack age"):
        scm.counterfactual(without_age, {"type": values["type"]}, torch_generator("cf"))
    # An intervention that does not concern the missing attribute goes on.
    scm.counterfactual(without_age, {"scanner": values["scanner"]}, torch_generator("cf"))
    with pytest.raises(UserError, match="no training rows"):
        scm.fit({name: column[:0] for name, column in values.items()}, torch_generator("fit"))
    with pytest.raises(UserError, match="'weight'"):
        StructuralCausalModel(CausalGraph({}, ["weight"], []), ATTRIBUTES)
    with pytest.raises(UserError, match="'weight'"):
        StructuralCausalModel(GRAPH, ATTRIBUTES, CausalModelSettings(mechanisms={"weight": "affine"}))

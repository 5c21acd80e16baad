"""The attribute graphs of the published systems: Morpho-MNIST, brain MRI and chest radiographs.

Each is drawn from a known causal model of the published shape, fitted, and asked for counterfactuals whose
truth is known.
"""

import math

import numpy as np
import pytest
import torch
from scipy.stats import kstest

from cfssl.data.morphomnist import abduct_intensity_noise, intensity_given_thickness
from cfssl.data.table import Attribute, Attributes
from cfssl.scm import CausalGraph, CausalModelSettings, StructuralCausalModel
from cfssl.seeds import torch_generator

COUNT = 4000


def continuous(*names: str) -> dict[str, Attribute]:
    return {name: Attribute(name, "continuous") for name in names}


def morphomnist(rng: torch.Generator) -> Attributes:
    seed = int(torch.randint(2**31, (), generator=rng))
    t = torch.from_numpy(0.5 + np.random.default_rng(seed).gamma(10, 1 / 5, COUNT)).float()
    i = intensity_given_thickness(torch.randn(COUNT, generator=rng), t)
    return {"thickness": t, "intensity": i, "digit": torch.randint(10, (COUNT,), generator=rng)}


BRAIN_EDGES = {"brain": ("sex", "age"), "ventricle": ("brain", "age")}


def brain_volume(sex: torch.Tensor, age: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    return 1_150_000 + 120_000 * sex - 3_000 * (age - 60) + 80_000 * noise


def ventricle_volume(brain: torch.Tensor, age: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    return (10.3 + 0.03 * (age - 60) + 1e-6 * (brain - 1_200_000) + 0.4 * noise).exp()


def brain(rng: torch.Generator) -> tuple[Attributes, Attributes]:
    """Values, and the noise they were made with."""
    u = {name: torch.randn(COUNT, generator=rng) for name in ("brain", "ventricle")}
    sex, age = torch.randint(2, (COUNT,), generator=rng), 44 + 29 * torch.rand(COUNT, generator=rng)
    volume = brain_volume(sex, age, u["brain"])
    values = {
        "sex": sex,
        "age": age,
        "brain": volume,
        "ventricle": ventricle_volume(volume, age, u["ventricle"]),
    }
    return values | {"sequence": torch.randint(2, (COUNT,), generator=rng)}, u


def finding_probability(age: torch.Tensor) -> torch.Tensor:
    return torch.sigmoid((age - 60) / 12)


def chest(rng: torch.Generator) -> Attributes:
    age = 20 + 70 * torch.rand(COUNT, generator=rng)
    finding = (torch.rand(COUNT, generator=rng) < finding_probability(age)).long()
    race = torch.multinomial(torch.tensor([0.7, 0.2, 0.1]), COUNT, replacement=True, generator=rng)
    return {"age": age, "sex": torch.randint(2, (COUNT,), generator=rng), "race": race, "finding": finding}


def fitted(
    edges: dict[str, tuple[str, ...]], attributes: dict[str, Attribute], values: Attributes, **mechanisms: str
) -> StructuralCausalModel:
    graph = CausalGraph(edges, tuple(attributes), tuple(attributes))
    settings = CausalModelSettings(mechanisms=mechanisms, steps=400)  # type: ignore[arg-type]
    model = StructuralCausalModel(graph, attributes, settings)
    model.fit(values, torch_generator("fit"))
    return model


def test_a_thicker_digit_gets_the_intensity_that_its_own_noise_makes() -> None:
    values = morphomnist(torch_generator("morphomnist"))
    attributes = continuous("thickness", "intensity") | {
        "digit": Attribute("digit", "categorical", tuple("0123456789"))
    }
    model = fitted({"intensity": ("thickness",)}, attributes, values, intensity="spline", thickness="spline")
    thicker = values["thickness"] * 1.15
    found = model.counterfactual(values, {"thickness": thicker}, torch_generator("cf"))
    eps = abduct_intensity_noise(values["intensity"], values["thickness"])
    truth = intensity_given_thickness(eps, thicker)
    inner = (values["thickness"] > 1.5) & (thicker < 4)  # where training has digits
    moved = (truth - values["intensity"]).abs()[inner].mean()
    assert (found["intensity"] - truth).abs()[inner].mean() < 0.15 * moved
    assert torch.equal(found["digit"], values["digit"])
    null = model.counterfactual(values, {"thickness": values["thickness"]}, torch_generator("cf"))
    torch.testing.assert_close(null["intensity"], values["intensity"], rtol=1e-6, atol=1e-4)


def test_an_older_brain_shrinks_and_its_ventricles_follow_both() -> None:
    values, u = brain(torch_generator("brain"))
    attributes = continuous("age", "brain", "ventricle") | {
        name: Attribute(name, "binary", ("a", "b")) for name in ("sex", "sequence")
    }
    model = fitted(BRAIN_EDGES, attributes, values, ventricle="spline")
    older = (values["age"] + 6).clamp(max=73)
    found = model.counterfactual(values, {"age": older}, torch_generator("cf"))
    volume = brain_volume(values["sex"], older, u["brain"])
    torch.testing.assert_close(found["brain"], volume, rtol=0, atol=12_000)  # a seventh of the noise
    truth = ventricle_volume(volume, older, u["ventricle"])
    error = (found["ventricle"].log() - truth.log()).abs()
    assert error.mean() < 0.1 * 0.4 + 0.03
    for name in ("sex", "sequence"):
        assert torch.equal(found[name], values[name])
    smaller = model.counterfactual(values, {"brain": volume}, torch_generator("cf"))
    assert torch.equal(smaller["age"], values["age"])  # a parent does not follow its child


def test_findings_follow_age_and_keep_their_own_noise() -> None:
    values = chest(torch_generator("chest"))
    attributes = continuous("age") | {
        "sex": Attribute("sex", "binary", ("F", "M")),
        "race": Attribute("race", "categorical", ("white", "asian", "black")),
        "finding": Attribute("finding", "binary", ("no", "yes")),
    }
    model = fitted({"finding": ("age",)}, attributes, values, age="spline")
    null = model.counterfactual(values, {"age": values["age"]}, torch_generator("cf"))
    assert torch.equal(null["finding"], values["finding"])  # the published inverse returns 88 to 92 %
    mechanism = model.mechanism("finding")
    u = mechanism.abduct(values["finding"], {"age": values["age"]}, torch_generator("u"))
    assert u.mean() == pytest.approx(0.5772, abs=0.06)
    assert kstest(u.flatten().numpy(), "gumbel_r").statistic < 1.6 / math.sqrt(u.numel()) + 0.01
    older = torch.full_like(values["age"], 80.0)
    found = model.counterfactual(values, {"age": older}, torch_generator("cf"))
    assert found["finding"].float().mean() == pytest.approx(float(finding_probability(older[:1])), abs=0.04)
    # The sick stay sick: their noise was on that side already.
    was_younger = values["age"] < 80
    assert (found["finding"] >= values["finding"])[was_younger].float().mean() > 0.995
    for name in ("sex", "race"):
        assert torch.equal(found[name], values[name])

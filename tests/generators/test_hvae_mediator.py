"""The latents as a mediator of the parents, conditioning dropout, free bits, and what settings refuse."""

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch.distributions import Normal, kl_divergence

from cfssl.data.batches import read_batch
from cfssl.data.phantoms import chest
from cfssl.data.pixels import to_signed
from cfssl.data.prepare import save_prepared
from cfssl.data.table import ImageTable
from cfssl.engine.run import HardwareSettings, Run
from cfssl.errors import UserError
from cfssl.generators import hvae_training
from cfssl.generators.hvae import HVAEGenerator
from cfssl.generators.hvae_likelihood import Gaussian, Likelihood
from cfssl.generators.hvae_network import HVAE
from cfssl.generators.hvae_settings import HVAESettings, HVAETrainSettings
from cfssl.generators.hvae_small import SmallNetworkSettings
from cfssl.generators.hvae_training import HVAETask, dropped_path, free_energy, hide
from cfssl.seeds import torch_generator

PARENTS = ("scanner", "sex")
CPU = HardwareSettings(accelerator="cpu")
TINY = SmallNetworkSettings(widths=(8, 8, 8, 8), latents=(2, 2, 2), blocks=1)
SMALL_TABLE = 160


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> ImageTable:
    frame, images, masks, truth = chest.build(chest.ChestWorld(), count=SMALL_TABLE, seed=0)
    folder = tmp_path_factory.mktemp("hvae") / "table"
    save_prepared(
        folder, "phantom_chest", frame, chest.ATTRIBUTES, images, masks, chest.MASKS, group="patient"
    )
    return ImageTable.open(folder, truth)


def settings(**options: Any) -> HVAESettings:
    train = HVAETrainSettings(epochs=1, batch=32)
    return HVAESettings(**{"parents": PARENTS, "train": train, "network": TINY, **options})


def away_from_the_start(net: HVAE) -> HVAE:
    """So that every path carries something."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return net


def generator_of(table: ImageTable, **options: Any) -> HVAEGenerator:
    generator = HVAEGenerator(settings(**options), table.attributes, table.images.shape)
    away_from_the_start(generator.network)
    return generator


def images(table: ImageTable, count: int = 6) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    rows = table.rows("test")[:count]
    return to_signed(table.images.read(rows)), table.encode(PARENTS, rows)


def moved(pa: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return pa | {"scanner": (pa["scanner"] + 1) % 4}


def mediator_network() -> HVAE:
    torch.manual_seed(0)
    return away_from_the_start(TINY.build(1, 32, 5, "pixel", 0.1, mediator=True))


@torch.no_grad()
def test_the_prior_of_a_mediator_depends_on_the_parents() -> None:
    net = mediator_network()
    noise = net.split_noise(torch.randn(2, net.noise_size))
    context = torch.randn(2, 5)
    first, second = net.sample_latents(noise, context), net.sample_latents(noise, context + 1)
    assert not any(torch.equal(*pair) for pair in zip(first, second, strict=True))
    with pytest.raises(ValueError, match="given the parents' context"):
        net.sample_latents(noise)


@torch.no_grad()
@pytest.mark.parametrize("weight", [0.3, 0.5])
def test_the_counterfactual_mediator_is_made_in_one_ancestral_pass(weight: float) -> None:
    """Level by level by hand: each prior reads the counterfactual latents above it, not the image's own and
    not those of another pass."""
    net = mediator_network()
    x, context, context_cf = torch.rand(2, 1, 32, 32), torch.randn(2, 5), torch.randn(2, 5)
    noise = net.split_noise(torch.randn(2, net.noise_size))
    found = net.infer(x, context, noise)
    path = net.path_start.expand(2, -1, -1, -1)
    expected = []
    for level, q, u in zip(net.levels, found.posterior, noise, strict=True):
        prior, feature = level.read_prior(level.enter_path(path), context_cf)
        mean = weight * q.mean + (1 - weight) * prior.mean
        variance = weight**2 * q.sigma**2 + (1 - weight) ** 2 * prior.sigma**2
        expected.append(mean + variance.sqrt() * u)
        path = feature if level is net.levels[-1] else level.advance_path(feature, expected[-1])
    for z, wanted in zip(net.mediate(found.posterior, noise, context_cf, weight), expected, strict=True):
        torch.testing.assert_close(z, wanted)


@torch.no_grad()
def test_at_the_ends_of_the_weight_the_mediator_is_the_factual_one_or_a_sample() -> None:
    net = mediator_network()
    x, context, context_cf = torch.rand(2, 1, 32, 32), torch.randn(2, 5), torch.randn(2, 5)
    noise = net.split_noise(torch.randn(2, net.noise_size))
    found = net.infer(x, context, noise)
    for weight, expected in ((1.0, found.latents), (0.0, net.sample_latents(noise, context_cf))):
        for z, wanted in zip(net.mediate(found.posterior, noise, context_cf, weight), expected, strict=True):
            torch.testing.assert_close(z, wanted)


@torch.no_grad()
@pytest.mark.parametrize("temperature", [None, 0.7])
def test_abduction_keeps_the_posterior_and_its_noise(table: ImageTable, temperature: float | None) -> None:
    generator = generator_of(table, prior="mediator")
    x, pa = images(table)
    noise = None
    if temperature is not None:
        noise = temperature * torch.randn(len(x), generator.network.noise_size)
    u = generator.abduct(x, pa, noise)
    for level in range(3):
        standardised = (u[f"z{level}"] - u[f"mean{level}"]) / u[f"log_sigma{level}"].exp()
        torch.testing.assert_close(u[f"noise{level}"], standardised, atol=1e-4, rtol=1e-4)
        assert (u[f"noise{level}"] == 0).all() == (temperature is None)
    assert set(generator_of(table).abduct(x, pa)) == {"z0", "z1", "z2", "u"}


def test_a_null_intervention_is_the_identity_where_the_mediator_stays(table: ImageTable) -> None:
    x, pa = images(table)
    for weight, identity in ((1.0, True), (0.5, False)):
        generator = generator_of(table, prior="mediator", mediator_weight=weight)
        off = (generator.predict(generator.abduct(x, pa), pa) - x).abs().max()
        assert (off < 1e-5) == identity


@pytest.mark.parametrize(
    "options", [{}, {"prior": "mediator", "mediator_weight": 1.0}], ids=["exogenous", "a = 1"]
)
def test_without_a_moving_mediator_the_total_effect_is_the_direct_one(
    table: ImageTable, options: dict[str, Any]
) -> None:
    generator = generator_of(table, **options)
    x, pa = images(table)
    effects = generator.effects(x, pa, moved(pa))
    assert effects["indirect"].abs().max() < 1e-5
    torch.testing.assert_close(effects["total"], effects["direct"], atol=1e-5, rtol=0)
    assert effects["direct"].abs().max() > 1e-3
    if not options:
        assert (effects["indirect"] == 0).all()
        assert torch.equal(effects["total"], effects["direct"])


@torch.no_grad()
def test_the_effects_of_a_mediator_are_their_definitions(table: ImageTable) -> None:
    generator = generator_of(table, prior="mediator", mediator_weight=0.4)
    net = generator.network
    x, pa = images(table)
    context, context_cf = generator.context(pa), generator.context(moved(pa))
    found = net.infer(x, context)
    zero = net.split_noise(torch.zeros(len(x), net.noise_size))
    z, z_cf = found.latents, net.mediate(found.posterior, zero, context_cf, 0.4)
    u = (x - found.likelihood.mean) / found.likelihood.sigma

    def g(parents: torch.Tensor, latents: list[torch.Tensor]) -> torch.Tensor:
        likelihood = net.decode(latents, parents)
        return (likelihood.mean + likelihood.sigma * u).clamp(-1, 1)

    expected = {
        "direct": g(context_cf, z) - x,
        "indirect": g(context, z_cf) - x,
        "total": g(context_cf, z_cf) - x,
    }
    effects = generator.effects(x, pa, moved(pa))
    for name, wanted in expected.items():
        torch.testing.assert_close(effects[name], wanted, atol=1e-5, rtol=0)
    total = generator.predict(generator.abduct(x, pa), moved(pa)) - x
    torch.testing.assert_close(effects["total"], total, atol=1e-5, rtol=0)
    assert expected["indirect"].abs().max() > 1e-3


def test_effects_add_up_where_the_two_ways_do_not_interact(
    table: ImageTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With an image that is a sum of a part of pa and a part of z they do; with the network they need not."""
    generator = generator_of(table, prior="mediator", sigma="fixed")
    x, pa = 0.1 * torch.randn(6, 1, 64, 64), images(table)[1]

    def additive(latents: list[torch.Tensor], context: torch.Tensor) -> Likelihood:
        parts = [z.mean((1, 2, 3)) for z in latents]
        mean = 0.01 * (torch.stack(parts).sum(0) + context.sum(1))
        return Likelihood(mean[:, None, None, None].expand(-1, 1, 64, 64), torch.tensor(-2.0))

    off = {}
    for name in ("network", "additive"):
        if name == "additive":
            monkeypatch.setattr(generator.network, "decode", additive)
        effects = generator.effects(x, pa, moved(pa))
        off[name] = float((effects["total"] - effects["direct"] - effects["indirect"]).abs().max())
    assert off["additive"] < 1e-6
    assert off["network"] > 1e-5


@pytest.mark.parametrize("mediator", [False, True])
def test_the_divergences_are_maps_whose_sum_is_the_kl(
    mediator: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    net = away_from_the_start(TINY.build(1, 32, 5, "pixel", 0.1, mediator=mediator))
    priors: list[Gaussian] = []
    for level in net.levels:

        def read(path: Any, context: Any, read: Any = level.read_prior) -> Any:
            priors.append(read(path, context)[0])
            return read(path, context)

        monkeypatch.setattr(level, "read_prior", read)
    found = net.infer(torch.rand(3, 1, 32, 32), torch.randn(3, 5))
    for kl, q, p in zip(found.divergences, found.posterior, priors, strict=True):
        expected = kl_divergence(Normal(q.mean, q.sigma), Normal(p.mean, p.sigma))
        torch.testing.assert_close(kl, expected, atol=1e-4, rtol=1e-4)
    energy = free_energy(net, torch.rand(3, 1, 32, 32), found, 2.0, settings())
    whole = sum(kl.flatten(1).sum(1) for kl in found.divergences).mean() / 1024  # type: ignore[union-attr]
    torch.testing.assert_close(energy["kl"], whole)
    torch.testing.assert_close(energy["loss"], energy["nll"] + 2 * energy["kl"])


def test_free_bits_are_a_floor_per_level_and_channel_on_the_mean_of_the_batch() -> None:
    torch.manual_seed(0)
    net = away_from_the_start(TINY.build(1, 32, 5, "pixel", 0.1, mediator=False))
    x = torch.rand(4, 1, 32, 32)
    found = net.infer(x, torch.randn(4, 5))
    sums = [
        float(kl[:, c].detach().sum((1, 2)).double().mean()) for kl in found.divergences for c in range(2)
    ]
    floor = float(np.median(sums))
    assert min(sums) < floor < max(sums)
    expected = sum(max(floor, value) for value in sums) / 1024
    energy = free_energy(net, x, found, 1.0, settings(free_bits=floor))
    assert float(energy["kl"]) == pytest.approx(expected, rel=1e-5)
    # a channel below the floor is not pressed further
    everything = free_energy(net, x, found, 1.0, settings(free_bits=2 * max(sums)))["kl"]
    gradients = torch.autograd.grad(everything, [kl.mean for kl in found.posterior], allow_unused=True)
    assert all(gradient is None or (gradient == 0).all() for gradient in gradients)


def test_a_path_is_hidden_from_in_a_third_of_the_steps_each() -> None:
    count = 6000
    found = Counter(dropped_path(3, step) for step in range(count))
    assert set(found) == {"prior", "likelihood", "none"}
    deviation = (count * 2 / 9) ** 0.5
    assert all(abs(number - count / 3) < 4 * deviation for number in found.values())
    assert dropped_path(3, 17) == dropped_path(3, 17)
    assert [dropped_path(3, step) for step in range(20)] != [dropped_path(4, step) for step in range(20)]


def test_hiding_zeroes_the_columns_of_the_named_parents_alone(table: ImageTable) -> None:
    encoder = generator_of(table).encoder
    context = torch.ones(2, encoder.width)
    assert hide(context, encoder, ("scanner",)).tolist() == [[0.0] * 4 + [1.0]] * 2
    assert hide(context, encoder, ("sex",)).tolist() == [[1.0] * 4 + [0.0]] * 2


@pytest.mark.parametrize("path", ["prior", "likelihood", "none"])
def test_a_step_hides_parents_from_one_path_and_never_from_the_posterior(
    table: ImageTable, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    """Moving the hidden parent moves what that path makes only where it is not hidden."""
    generator = generator_of(table, prior="mediator", conditioning_dropout=("scanner",))
    net = generator.network
    task = HVAETask(net, generator.encoder, generator.network, generator.settings, steps=10)
    monkeypatch.setattr(hvae_training, "dropped_path", lambda seed, step: path)
    seen: dict[str, torch.Tensor] = {}

    def keep(method: str, name: str, place: int) -> None:
        original = getattr(net.levels[0], method)

        def call(*arguments: Any) -> Any:
            seen[name] = arguments[place]
            return original(*arguments)

        monkeypatch.setattr(net.levels[0], method, call)

    keep("read_prior", "prior", 1)
    keep("read_posterior", "posterior", 2)
    keep("advance", "likelihood", 3)
    rows = table.rows("train")[:8]
    batch = read_batch(table, rows, table.encode(PARENTS, rows), [])
    batch.noise = torch.randn(8, net.noise_size)
    task(batch, 0)
    whole = generator.context(batch.attributes)
    hidden = hide(whole, generator.encoder, ("scanner",))
    for name, found in seen.items():
        assert torch.equal(found, hidden if name == path else whole), name


@pytest.mark.parametrize(
    ("likelihood", "sigma", "prior"),
    list(
        itertools.product(
            ["gaussian", "discretised"], ["pixel", "shared", "fixed"], ["exogenous", "mediator"]
        )
    ),
)
def test_gradients_of_every_reading_are_finite_and_reach_every_weight(
    table: ImageTable, likelihood: str, sigma: str, prior: str
) -> None:
    generator = generator_of(table, likelihood=likelihood, sigma=sigma, prior=prior, fixed_sigma=0.001)
    net = generator.network.requires_grad_(True)
    task = HVAETask(net, generator.encoder, generator.network, generator.settings, steps=10)
    net.requires_grad_(True)
    rows = table.rows("train")[:4]
    batch = read_batch(table, rows, table.encode(PARENTS, rows), [])
    batch.noise = torch.randn(4, net.noise_size)
    task(batch, 0)["loss"].backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name


def test_a_mediator_is_fitted_saved_loaded_and_sampled(table: ImageTable, tmp_path: Path) -> None:
    options = {"prior": "mediator", "likelihood": "discretised", "conditioning_dropout": ("scanner",)}
    generator, again = (
        HVAEGenerator(settings(**options), table.attributes, table.images.shape) for _ in range(2)
    )
    generator.fit(table, Run(tmp_path, CPU, quiet=True))
    generator.save(tmp_path / "g.safetensors")
    again.load(tmp_path / "g.safetensors")
    x, pa = images(table)
    made = [g.predict(g.abduct(x, pa), moved(pa)) for g in (generator, again)]
    assert torch.equal(*made)
    assert torch.isfinite(made[0]).all()
    samples = [g.sample(pa, torch_generator("sample")) for g in (generator, again)]
    assert torch.equal(*samples)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"conditioning_dropout": ("sex",)}, "an exogenous prior sees none; set prior: mediator"),
        ({"mediator_weight": 0.6}, "the prior is exogenous; set prior: mediator or leave it out"),
        (
            {"prior": "mediator", "conditioning_dropout": ("age",)},
            r"names age, expected some of parents \(scanner, sex\)",
        ),
        ({"first_sigma": 2.0}, "only a fixed sigma can fall, and sigma is pixel; set sigma: fixed"),
        ({"sigma": "fixed", "first_sigma": 0.1}, "to fixed_sigma, which is 0.1; make it larger"),
    ],
)
def test_settings_that_cannot_act_are_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        settings(**options)


def test_grey_levels_of_16_bits_are_refused(tmp_path: Path) -> None:
    frame, stored, masks, _ = chest.build(chest.ChestWorld(), count=SMALL_TABLE, seed=0)
    deep = save_prepared(
        tmp_path / "t", "deep", frame, chest.ATTRIBUTES, stored.astype(np.uint16) * 257, masks, chest.MASKS
    )
    generator = HVAEGenerator(settings(likelihood="discretised"), deep.attributes, deep.images.shape)
    with pytest.raises(UserError, match="for 8-bit images, and deep holds uint16; set it to gaussian"):
        generator.fit(deep, Run(tmp_path, CPU, quiet=True))

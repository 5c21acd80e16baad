"""The HVAE: no parent reaches the prior, the likelihood is its formula, training resumes, abduction and
prediction are exact."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch.distributions import Normal, kl_divergence

from cfssl.data import order
from cfssl.data.batches import ImageData, read_batch
from cfssl.data.phantoms import chest
from cfssl.data.pixels import to_signed
from cfssl.data.prepare import save_prepared
from cfssl.data.table import Attribute, Attributes, ImageTable
from cfssl.engine.checkpoint import save_checkpoint
from cfssl.engine.run import HardwareSettings, Run
from cfssl.errors import UserError
from cfssl.evaluate.counterfactual import composition, reversibility
from cfssl.generators import hvae
from cfssl.generators.hvae import HVAEGenerator
from cfssl.generators.hvae_likelihood import LOG_SIGMA_X, Gaussian, Likelihood, SigmaKind, gaussian_nll
from cfssl.generators.hvae_network import HVAE, LOG_SIGMA_Z, gaussian_kl
from cfssl.generators.hvae_settings import HVAESettings, HVAETrainSettings
from cfssl.generators.hvae_small import S_HVAE_32, S_HVAE_64, SmallNetworkSettings
from cfssl.generators.hvae_training import HVAETask, half_uniform_weights
from cfssl.seeds import numpy_generator, torch_generator

PARENTS = ("scanner", "sex")
CPU = HardwareSettings(accelerator="cpu")
TINY = SmallNetworkSettings(widths=(8, 8, 8, 8), latents=(2, 2, 2), blocks=1)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> ImageTable:
    frame, images, masks, truth = chest.build(chest.ChestWorld(), count=160, seed=0)
    folder = tmp_path_factory.mktemp("hvae") / "table"
    save_prepared(
        folder, "phantom_chest", frame, chest.ATTRIBUTES, images, masks, chest.MASKS, group="patient"
    )
    return ImageTable.open(folder, truth)


def settings(**options: object) -> HVAESettings:
    train = HVAETrainSettings(epochs=2, batch=32)
    return HVAESettings(**{"parents": PARENTS, "train": train, "network": TINY, **options})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def fitted(table: ImageTable, tmp_path_factory: pytest.TempPathFactory) -> HVAEGenerator:
    generator = HVAEGenerator(settings(balance="scanner"), table.attributes, table.images.shape)
    generator.fit(table, Run(tmp_path_factory.mktemp("fit"), CPU, quiet=True))
    return generator


def network(
    sigma: SigmaKind = "pixel",
    unshuffle: int = 2,
    channels: int = 1,
    fixed_sigma: float = 0.1,
    whole: int = 0,
) -> HVAE:
    torch.manual_seed(0)
    net = replace(TINY, whole=whole).build(channels, 32 * unshuffle, 5, sigma, fixed_sigma, mediator=False)
    with torch.no_grad():  # away from the zero-initialised start, so that every path carries something
        for parameter in net.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return net


@pytest.mark.parametrize("whole", [0, 3])
def test_the_prior_does_not_see_the_parents(whole: int) -> None:
    """Moving the parents at fixed z leaves every prior parameter as it is, and none of them has a gradient to
    the parents."""
    net = network(whole=whole)
    noise = net.split_noise(torch.randn(3, net.noise_size))
    context = torch.randn(3, 5, requires_grad=True)
    latents = [z.detach() for z in net.sample_latents(noise)]
    path = net.path_start.expand(3, -1, -1, -1)
    h = net.start.expand(3, -1, -1, -1)
    total = torch.zeros(())
    for level, z in zip(net.levels, latents, strict=True):
        path, h = level.enter_path(path), level.enter(h)
        prior, feature = level.read_prior(path, None)
        total = total + prior.mean.square().sum() + prior.log_sigma.sum()
        h = level.advance(h, feature, z, context)
        path = feature if level is net.levels[-1] else level.advance_path(feature, z)
    assert torch.autograd.grad(total, context, allow_unused=True, retain_graph=True)[0] is None
    # the check can fail: the decoder state does depend on them
    assert torch.autograd.grad(h.sum(), context)[0].abs().sum() > 0


def record_priors(net: HVAE, monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Every prior mean and log sigma that the network reads from now on."""
    found: list[torch.Tensor] = []
    for level in net.levels:

        def read(path: torch.Tensor, context: None, read=level.read_prior) -> tuple[Gaussian, torch.Tensor]:
            prior, feature = read(path, context)
            found.extend([prior.mean, prior.log_sigma])
            return prior, feature

        monkeypatch.setattr(level, "read_prior", read)
    return found


@pytest.mark.parametrize("whole", [0, 3])
@torch.no_grad()
def test_inference_lets_neither_the_parents_nor_the_image_reach_the_prior_but_through_z(
    whole: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the latents held, `infer` reads the same prior for other parents and another image, bit by bit."""
    net = network(whole=whole)
    held = [torch.randn(2, *shape) for shape in net.latent_shapes]
    for level, z in zip(net.levels, held, strict=True):
        monkeypatch.setattr(
            level, "read_posterior", lambda h, encoded, context, z=z: Gaussian(z, torch.zeros_like(z))
        )
    found = record_priors(net, monkeypatch)
    x, context = torch.rand(2, 2, 1, 64, 64) * 2 - 1, torch.randn(2, 2, 5)
    first, second = net.infer(x[0], context[0]), net.infer(x[1], context[1])
    assert all(torch.equal(*pair) for pair in zip(first.latents, second.latents, strict=True))
    half = 2 * len(net.levels)
    assert len(found) == 2 * half
    assert all(torch.equal(a, b) for a, b in zip(found[:half], found[half:], strict=True))
    assert not torch.equal(
        first.likelihood.mean, second.likelihood.mean
    )  # while the image follows the parents


@pytest.mark.parametrize("whole", [0, 3])
@torch.no_grad()
def test_latents_are_sampled_from_the_prior_that_inference_compares_with(
    whole: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = network(whole=whole)
    noise = net.split_noise(torch.randn(2, net.noise_size))
    sampled = net.sample_latents(noise)
    found = record_priors(net, monkeypatch)
    for level, z in zip(net.levels, sampled, strict=True):
        monkeypatch.setattr(
            level, "read_posterior", lambda h, encoded, context, z=z: Gaussian(z, torch.zeros_like(z))
        )
    net.infer(torch.zeros(2, 1, 64, 64), torch.randn(2, 5))
    for level, z in enumerate(sampled):
        mean, log_sigma = found[2 * level : 2 * level + 2]
        torch.testing.assert_close(z, mean + log_sigma.exp() * noise[level])


@pytest.mark.parametrize("whole", [0, 3])
@pytest.mark.parametrize("sigma", ["pixel", "shared", "fixed"])
def test_inference_and_decoding_give_one_likelihood_for_the_same_latents(sigma: str, whole: int) -> None:
    net = network(sigma, whole=whole)
    x, context = torch.rand(2, 1, 64, 64) * 2 - 1, torch.randn(2, 5)
    noise = net.split_noise(torch.randn(2, net.noise_size))
    found = net.infer(x, context, noise)
    inferred, decoded = found.likelihood, net.decode(found.latents, context)
    torch.testing.assert_close(decoded.mean, inferred.mean)
    torch.testing.assert_close(decoded.log_sigma, inferred.log_sigma)
    assert all((kl >= -1e-4).all() for kl in found.divergences)
    for kl, z, q in zip(found.divergences, found.latents, found.posterior, strict=True):
        assert kl.shape == z.shape == q.mean.shape
    assert inferred.mean.shape == x.shape


@pytest.mark.parametrize(("unshuffle", "side", "channels"), [(1, 32, 1), (2, 64, 3), (4, 128, 1)])
def test_sizes_are_constructible_and_keep_the_shape(unshuffle: int, side: int, channels: int) -> None:
    net = network(unshuffle=unshuffle, channels=channels)
    x = torch.rand(1, channels, side, side)
    found = net.infer(x, torch.zeros(1, 5))
    assert found.likelihood.mean.shape == x.shape
    assert [z.shape[2:] for z in found.latents] == [(4, 4), (8, 8), (16, 16)]
    found = network(unshuffle=unshuffle, channels=channels, whole=3).infer(x, torch.zeros(1, 5))
    assert found.likelihood.mean.shape == x.shape
    assert found.latents[0].shape == (1, 3, 1, 1)


@pytest.mark.parametrize(("widths", "side", "count"), [(S_HVAE_32, 32, 395_114), (S_HVAE_64, 64, 404_968)])
def test_the_published_small_sizes_have_their_parameters(
    widths: tuple[int, int, int, int], side: int, count: int
) -> None:
    """About .35 M in the source, whose prior had no path of its own."""
    attributes = {name: chest.ATTRIBUTES[name] for name in PARENTS}
    small = HVAESettings(parents=PARENTS, network=SmallNetworkSettings(widths=widths))
    generator = HVAEGenerator(small, attributes, (1, side, side))
    assert sum(parameter.numel() for parameter in generator.network.parameters()) == count
    x, pa = torch.zeros(1, 1, side, side), {name: torch.zeros(1, dtype=torch.long) for name in PARENTS}
    assert generator.predict(generator.abduct(x, pa), pa).shape == x.shape
    assert HVAESettings(parents=PARENTS).network == SmallNetworkSettings(widths=S_HVAE_64)


@pytest.mark.parametrize("edge", [1e-3, float(np.e)])
def test_every_fixed_sigma_that_the_settings_allow_is_the_one_used(edge: float) -> None:
    """Also one finer than the clamp of a learned sigma: it cannot collapse."""
    net = network("fixed", fixed_sigma=HVAESettings(parents=PARENTS, fixed_sigma=edge).fixed_sigma)
    likelihood = net.infer(torch.zeros(1, 1, 64, 64), torch.zeros(1, 5)).likelihood
    assert float(likelihood.sigma) == pytest.approx(edge, rel=1e-5)
    with pytest.raises(ValidationError, match="fixed_sigma"):
        HVAESettings(parents=PARENTS, fixed_sigma=edge * (0.99 if edge < 1 else 1.01))


def test_widths_that_cannot_be_normalised_in_four_groups_are_refused() -> None:
    with pytest.raises(ValidationError, match="multiple of 4"):
        SmallNetworkSettings(widths=(10, 24, 32, 48))


@torch.no_grad()
@pytest.mark.parametrize("sigma", ["pixel", "shared"])
@pytest.mark.parametrize(("extreme", "bound"), [(-100.0, 0), (100.0, 1)])
def test_log_sigmas_are_clamped(sigma: str, extreme: float, bound: int) -> None:
    net = network(sigma)
    for level in net.levels:
        level.prior.bias += extreme
        level.posterior.bias += extreme
        path = net.path_start.expand(2, -1, -1, -1)
        if level is net.levels[0]:
            assert (level.read_prior(path, None)[0].log_sigma == LOG_SIGMA_Z[bound]).all()
    if sigma == "shared":
        net.output.head.log_sigma += extreme
    else:
        net.output.head.conv.bias += extreme
    noise = net.split_noise(torch.randn(2, net.noise_size))
    found = net.infer(torch.zeros(2, 1, 64, 64), torch.zeros(2, 5), noise)
    assert (found.likelihood.log_sigma == LOG_SIGMA_X[bound]).all()
    assert all(torch.isfinite(kl).all() for kl in found.divergences)


def test_kl_and_nll_are_those_of_torch_distributions_in_float64() -> None:
    shape = (3, 2, 4, 4)
    mean_q, log_q, mean_p, log_p = (torch.randn(shape, dtype=torch.float64) for _ in range(4))
    expected = kl_divergence(Normal(mean_q, log_q.exp()), Normal(mean_p, log_p.exp()))
    torch.testing.assert_close(gaussian_kl(Gaussian(mean_q, log_q), Gaussian(mean_p, log_p)), expected)
    x = torch.randn(shape, dtype=torch.float64)
    expected = -Normal(mean_q, log_q.exp()).log_prob(x).flatten(1).mean(1)
    torch.testing.assert_close(gaussian_nll(x, Likelihood(mean_q, log_q)), expected)
    shared = torch.tensor(-0.7, dtype=torch.float64)
    expected = -Normal(mean_q, shared.exp()).log_prob(x).flatten(1).mean(1)
    torch.testing.assert_close(gaussian_nll(x, Likelihood(mean_q, shared)), expected)


def test_null_intervention_returns_the_image_with_the_whole_residual(
    fitted: HVAEGenerator, table: ImageTable
) -> None:
    rows = table.rows("test")
    x, pa = to_signed(table.images.read(rows)), table.encode(PARENTS, rows)
    assert composition(fitted, x, pa, cycles=1).max() < 1e-3  # grey levels
    assert composition(fitted, x, pa, cycles=10).max() < 1e-2
    # without the residual the network alone reconstructs, and a barely trained one does so badly
    assert composition(fitted, x, pa, residual=0.0).mean() > 1.0


@torch.no_grad()
def by_hand(generator: HVAEGenerator, x: torch.Tensor, pa: Attributes, pa_cf: Attributes) -> torch.Tensor:
    """x* = clip(mu* + sigma* (x - mu) / sigma) in float64, from the network's word on z = E q(z | x, pa)."""
    network, encoder = generator.network, generator.encoder
    latents = network.infer(x, encoder(pa)).latents
    factual, counter = (network.decode(latents, encoder(parents)) for parents in (pa, pa_cf))
    u = (x.double() - factual.mean) / factual.log_sigma.double().exp()
    return (counter.mean + counter.log_sigma.double().exp() * u).clamp(-1, 1).float()


def test_reversibility_is_that_of_two_counterfactuals_by_hand(
    fitted: HVAEGenerator, table: ImageTable
) -> None:
    rows = table.rows("test")
    x, pa = to_signed(table.images.read(rows)), table.encode(PARENTS, rows)
    do = {"scanner": (pa["scanner"] + 1) % 4}
    back = by_hand(fitted, by_hand(fitted, x, pa, pa | do), pa | do, pa)
    expected = (back.double() - x.double()).abs().mean((1, 2, 3)).numpy() * 127.5
    np.testing.assert_allclose(reversibility(fitted, x, pa, do), expected, atol=1e-3)
    assert expected.min() > 0.01


@pytest.mark.parametrize("sigma", ["pixel", "shared", "fixed"])
def test_the_counterfactual_is_the_new_mean_and_the_rescaled_residual(sigma: str, table: ImageTable) -> None:
    generator = HVAEGenerator(settings(sigma=sigma), table.attributes, table.images.shape)
    rows = table.rows("test")[:6]
    x, pa = to_signed(table.images.read(rows)), table.encode(PARENTS, rows)
    pa_cf = {**pa, "scanner": (pa["scanner"] + 1) % 4}
    found = generator.predict(generator.abduct(x, pa), pa_cf)
    torch.testing.assert_close(found, by_hand(generator, x, pa, pa_cf), atol=1e-5, rtol=0)
    latents = generator.network.infer(x, generator.encoder(pa)).latents
    factual, counter = (generator.network.decode(latents, generator.encoder(p)) for p in (pa, pa_cf))
    if sigma == "pixel":  # the scale does follow the scanner
        assert (factual.sigma / counter.sigma - 1).abs().max() > 0.01
    else:  # so the residual is carried over unchanged
        unscaled = (x + counter.mean - factual.mean).clamp(-1, 1)
        torch.testing.assert_close(found, unscaled, atol=1e-5, rtol=0)


def test_fit_interrupted_and_continued_gives_the_same_generator(table: ImageTable, tmp_path: Path) -> None:
    def fit_in(folder: Path, stop_at: int | None = None) -> HVAEGenerator:
        generator = HVAEGenerator(settings(), table.attributes, table.images.shape)
        generator.fit(table, Run(folder, CPU, quiet=True, stop_at=stop_at))
        return generator

    whole = fit_in(tmp_path / "whole")
    interrupted = fit_in(tmp_path / "parts", stop_at=3)
    with pytest.raises(UserError, match="has not been fitted"):
        _ = interrupted.fingerprint
    resumed = fit_in(tmp_path / "parts")
    assert resumed.fingerprint == whole.fingerprint


def test_saved_and_loaded_it_makes_the_same_images(
    fitted: HVAEGenerator, table: ImageTable, tmp_path: Path
) -> None:
    fitted.save(tmp_path / "g.safetensors")
    again = HVAEGenerator(settings(balance="scanner"), table.attributes, table.images.shape)
    again.load(tmp_path / "g.safetensors")
    rows = table.rows("val")[:4]
    x, pa = to_signed(table.images.read(rows)), table.encode(PARENTS, rows)
    assert torch.equal(again.predict(again.abduct(x, pa), pa), fitted.predict(fitted.abduct(x, pa), pa))
    assert again.fingerprint == fitted.fingerprint


def scanners(*names: str) -> dict[str, Attribute]:
    return chest.ATTRIBUTES | {"scanner": Attribute("scanner", "categorical", names)}


@pytest.mark.parametrize(
    ("options", "attributes", "shape", "named"),
    [
        (
            {"network": SmallNetworkSettings(widths=(16, 8, 8, 8), latents=(2, 2, 2), blocks=1)},
            None,
            None,
            r"settings\.network\.widths is \[8, 8, 8, 8\], expected \[16, 8, 8, 8\]",
        ),
        ({"beta": 1.0}, None, None, r"settings\.beta is 5\.0, expected 1\.0"),
        ({"fixed_sigma": 0.2}, None, None, r"settings\.fixed_sigma is 0\.1, expected 0\.2"),
        ({"train": HVAETrainSettings(epochs=2, batch=16)}, None, None, r"train\.batch is 32, expected 16"),
        ({"graph": {"sex": ["scanner"]}}, None, None, r"graph\.edges\.sex is None, expected \['scanner'\]"),
        ({"parents": ("sex", "scanner")}, None, None, r"settings\.parents is \['scanner', 'sex'\]"),
        (
            {},
            scanners("A", "B", "D", "C"),
            None,
            r"attributes\.scanner is \['categorical', 'A', 'B', 'C', 'D'\]",
        ),
        ({}, None, (1, 32, 32), r"shape is \[1, 64, 64\], expected \[1, 32, 32\]"),
    ],
)
def test_a_file_of_another_generator_is_refused_with_what_differs(
    fitted: HVAEGenerator, table: ImageTable, tmp_path: Path, options, attributes, shape, named: str
) -> None:
    """Also where the weights would fit: with the scanners in another order, one would be another."""
    fitted.save(tmp_path / "g.safetensors")
    given = settings(**({"balance": "scanner"} | options))
    other = HVAEGenerator(given, attributes or table.attributes, shape or table.images.shape)
    with pytest.raises(UserError, match=rf"another HVAE generator \(.*{named}.*fit it again"):
        other.load(tmp_path / "g.safetensors")
    with pytest.raises(UserError, match="has not been fitted"):
        _ = other.fingerprint


def test_the_fingerprint_tells_of_weights_settings_graph_and_categories(
    table: ImageTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hvae, "fit", lambda *arguments: True)  # all have the weights they are created with

    def found(attributes: dict[str, Attribute] = table.attributes, **options: object) -> str:
        generator = HVAEGenerator(settings(**options), attributes, table.images.shape)
        generator.fit(table, Run(tmp_path, CPU, quiet=True))
        return generator.fingerprint

    seed = HVAETrainSettings(epochs=2, batch=32, seed=1)
    different = [
        found(),
        found(train=seed),
        found(fixed_sigma=0.2),
        found(graph={"sex": ["scanner"]}),
        found(scanners("D", "C", "B", "A")),
    ]
    assert found() == different[0]
    assert len(set(different)) == len(different)


def test_a_generator_that_was_not_fitted_cannot_be_saved(table: ImageTable, tmp_path: Path) -> None:
    generator = HVAEGenerator(settings(), table.attributes, table.images.shape)
    with pytest.raises(UserError, match="has not been fitted; there is nothing to save"):
        generator.save(tmp_path / "g.safetensors")
    save_checkpoint(tmp_path / "other.safetensors", {"step": 3})
    with pytest.raises(UserError, match="holds no HVAE generator"):
        generator.load(tmp_path / "other.safetensors")
    assert not (tmp_path / "g.safetensors").exists()


def test_four_micro_batches_equal_one_batch(table: ImageTable, tmp_path: Path) -> None:
    """Noise belongs to the item, so accumulation sees the same latents."""

    def weights(accumulate: int) -> torch.Tensor:
        train = HVAETrainSettings(epochs=1, batch=16, accumulate=accumulate, lr=1e-3)
        generator = HVAEGenerator(settings(train=train), table.attributes, table.images.shape)
        generator.fit(table, Run(tmp_path / str(accumulate), CPU, quiet=True))
        return torch.cat([parameter.flatten() for parameter in generator.network.parameters()])

    torch.testing.assert_close(weights(4), weights(1), rtol=1e-3, atol=2e-4)


def test_the_averaged_weights_follow_the_formula(table: ImageTable, tmp_path: Path) -> None:
    generator = HVAEGenerator(settings(ema=0.6), table.attributes, table.images.shape)
    net = generator._network()
    start = [parameter.clone() for parameter in net.parameters()]
    task = HVAETask(net, generator.encoder, generator.network, generator.settings, steps=5)
    expected = [parameter.clone() for parameter in generator.network.parameters()]
    for step in range(5):
        with torch.no_grad():
            for parameter in net.parameters():
                parameter += 0.1
        task.after_step(step)
        decay = min(0.6, 1 - 1 / (step + 1))
        expected = [decay * e + (1 - decay) * p for e, p in zip(expected, net.parameters(), strict=True)]
    for averaged, wanted in zip(generator.network.parameters(), expected, strict=True):
        torch.testing.assert_close(averaged, wanted)
    assert not torch.equal(start[0], expected[0])


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_the_averaged_weights_are_those_of_the_fitted_generator(
    table: ImageTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ema: float
) -> None:
    trained: list[list[torch.Tensor]] = []
    after_step = HVAETask.after_step

    def recording(task: HVAETask, step: int) -> None:
        trained.append([parameter.detach().clone() for parameter in task.network.parameters()])
        after_step(task, step)

    monkeypatch.setattr(HVAETask, "after_step", recording)
    generator = HVAEGenerator(settings(ema=ema), table.attributes, table.images.shape)
    generator.fit(table, Run(tmp_path, CPU, quiet=True))
    expected = trained[0]
    for step, current in enumerate(trained):
        decay = min(ema, 1 - 1 / (step + 1))
        expected = [decay * e + (1 - decay) * p for e, p in zip(expected, current, strict=True)]
    for averaged, wanted in zip(generator.network.parameters(), expected, strict=True):
        torch.testing.assert_close(averaged, wanted)
    moved = [not torch.equal(*pair) for pair in zip(expected, trained[-1], strict=True)]
    assert any(moved) == (ema > 0)


def test_only_the_network_that_is_trained_is_in_training_mode(table: ImageTable, tmp_path: Path) -> None:
    generator = HVAEGenerator(settings(), table.attributes, table.images.shape)
    task = HVAETask(generator._network(), generator.encoder, generator.network, generator.settings, steps=5)
    task.train()
    assert all(module.training for module in task.network.modules())
    assert not any(module.training for module in generator.network.modules())
    generator.fit(table, Run(tmp_path, CPU, quiet=True))
    assert not any(module.training for module in generator.network.modules())


def test_creating_and_fitting_leave_the_global_random_generator_alone(
    table: ImageTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its seed neither: `torch.manual_seed` would reach every GPU."""
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("the GPUs were seeded"))
    monkeypatch.setattr(hvae, "fit", lambda *arguments: True)  # the loop has its own tests
    torch.random.default_generator.manual_seed(5)
    before = torch.get_rng_state()
    states = []
    for seed in (0, 0, 1):
        train = HVAETrainSettings(epochs=1, batch=32, seed=seed)
        generator = HVAEGenerator(settings(train=train), table.attributes, table.images.shape)
        generator.fit(table, Run(tmp_path, CPU, quiet=True))
        states.append(torch.cat([parameter.flatten() for parameter in generator.network.parameters()]))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


def test_beta_rises_from_a_tenth_to_its_value_over_the_warmup(table: ImageTable) -> None:
    generator = HVAEGenerator(settings(beta=4.0, beta_warmup=0.2), table.attributes, table.images.shape)
    task = HVAETask(generator._network(), generator.encoder, generator.network, generator.settings, steps=100)
    rows = table.rows("train")[:8]
    noise = torch.randn(8, generator.network.noise_size)
    batch = read_batch(table, rows, table.encode(PARENTS, rows), [])
    batch.noise = noise
    betas = []
    with torch.no_grad():
        for step in (0, 10, 20, 99):
            parts = task(batch, step)
            betas.append(float((parts["loss"] - parts["nll"]) / parts["kl"]))
    assert betas == pytest.approx([0.4, 2.2, 4.0, 4.0], rel=1e-3)


@torch.no_grad()
def test_a_falling_sigma_weighs_the_pixels_in_equal_ratios(table: ImageTable) -> None:
    falling = settings(sigma="fixed", first_sigma=3.2, fixed_sigma=0.1)
    generator = HVAEGenerator(falling, table.attributes, table.images.shape)
    task = HVAETask(generator._network(), generator.encoder, generator.network, falling, steps=101)
    rows = table.rows("train")[:8]
    batch = read_batch(table, rows, table.encode(PARENTS, rows), [])
    batch.noise = torch.zeros(8, generator.network.noise_size)
    inference = task.network.infer(batch.x, generator.context(batch.attributes))
    for step, sigma in ((0, 3.2), (20, 1.6), (40, 0.8), (100, 0.1)):
        expected = -torch.distributions.Normal(inference.likelihood.mean, sigma).log_prob(batch.x).mean()
        assert float(task(batch, step)["nll"]) == pytest.approx(float(expected), rel=1e-4)
    # what is made is made with the last one
    assert float(inference.likelihood.sigma) == pytest.approx(0.1)


@torch.no_grad()
def test_samples_are_the_means_of_latents_from_the_prior(fitted: HVAEGenerator) -> None:
    pa = {"scanner": torch.tensor([0, 0, 3]), "sex": torch.tensor([0, 0, 0])}
    found = fitted.sample(pa, torch_generator("sample"))
    assert torch.equal(found, fitted.sample(pa, torch_generator("sample")))
    noise = torch.randn(3, fitted.network.noise_size, generator=torch_generator("sample"))
    latents = fitted.network.sample_latents(fitted.network.split_noise(noise))
    expected = fitted.network.decode(latents, fitted.encoder(pa)).mean.clamp(-1, 1)
    assert torch.equal(found, expected)
    assert not torch.equal(found[0], found[1])  # other noise
    moved = fitted.sample(pa | {"scanner": torch.tensor([1, 1, 1])}, torch_generator("sample"))
    assert not torch.equal(found[2], moved[2])  # another parent


def test_training_lowers_the_loss(table: ImageTable, tmp_path: Path) -> None:
    from cfssl.engine.run import read_metrics

    train = HVAETrainSettings(epochs=12, batch=32, log_every=6)
    generator = HVAEGenerator(settings(train=train), table.attributes, table.images.shape)
    generator.fit(table, Run(tmp_path, CPU, quiet=True))
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert lines[-1]["nll"] < lines[0]["nll"] - 0.3


def test_half_uniform_sampling_has_the_published_shares() -> None:
    codes = np.repeat([0, 1, 2, 3], [600, 250, 100, 50])
    weights = half_uniform_weights(codes)
    shares = np.bincount(codes, weights=weights)
    np.testing.assert_allclose(shares, 0.5 / 4 + 0.5 * np.array([0.6, 0.25, 0.1, 0.05]))


def image_data(table: ImageTable, weights: np.ndarray | None = None) -> ImageData:
    rows = table.rows("train")
    parents = table.encode(PARENTS, rows)
    train = HVAETrainSettings(batch=32, epochs=3)
    return ImageData(table, rows, parents, train, noise_size=10, weights=weights)


@pytest.mark.parametrize("weighted", [False, True])
def test_data_are_a_function_of_the_step(table: ImageTable, weighted: bool) -> None:
    weights = np.arange(1.0, 97.0) if weighted else None
    data = image_data(table, weights)
    first, other, again = data[2][0], data[3][0], data[2][0]
    data[7]  # another epoch in between
    for batch in (again, data[2][0], image_data(table, weights)[2][0]):
        assert torch.equal(first.x, batch.x)
        assert torch.equal(first.noise, batch.noise)
    assert not torch.equal(other.noise, first.noise)
    assert not torch.equal(other.x, first.x)


def test_every_epoch_is_a_permutation_of_its_own_that_is_drawn_once(
    table: ImageTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = []
    monkeypatch.setattr(order, "numpy_generator", lambda *key: drawn.append(key) or numpy_generator(*key))
    data = image_data(table)
    epochs = [np.concatenate([data.items(3 * epoch + place) for place in range(3)]) for epoch in range(3)]
    for items in epochs:
        assert sorted(items) == list(range(96))
    assert not np.array_equal(epochs[0], epochs[1])
    assert drawn == [(0, "epoch", epoch) for epoch in range(3)]


def test_weighted_draws_are_those_of_numpys_choice(table: ImageTable) -> None:
    weights = half_uniform_weights(table.encode(["scanner"], table.rows("train"))["scanner"].numpy())
    data = image_data(table, weights)
    for step in range(9):
        expected = numpy_generator(0, "draw", step).choice(96, 32, p=weights)
        np.testing.assert_array_equal(data.items(step), expected)


def test_fit_draws_the_values_of_the_balanced_attribute_half_uniformly(
    table: ImageTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    monkeypatch.setattr(hvae, "fit", lambda task, data, *arguments: seen.append(data) or True)
    for balance in (None, "scanner"):
        generator = HVAEGenerator(settings(balance=balance), table.attributes, table.images.shape)
        generator.fit(table, Run(tmp_path, CPU, quiet=True))
    codes = table.encode(["scanner"], table.rows("train"))["scanner"].numpy()
    share = np.bincount(codes, minlength=4) / len(codes)
    for data, expected in zip(seen, (share, 0.5 / 4 + 0.5 * share), strict=True):
        drawn = np.concatenate([codes[data.items(step)] for step in range(300)])
        np.testing.assert_allclose(np.bincount(drawn, minlength=4) / len(drawn), expected, atol=0.02)


def test_impossible_inputs_are_one_sentence(table: ImageTable, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"square images of 32, 64, 128 or 256 pixels, and these are 48x48"):
        HVAEGenerator(settings(), table.attributes, (1, 48, 48))
    with pytest.raises(UserError, match=r"generator\.parents or generator\.graph names 'scaner', expected"):
        HVAEGenerator(HVAESettings(parents=("scaner",)), table.attributes, table.images.shape)
    for name in ("left_upper", "disease"):  # continuous, and no variable of the graph
        with pytest.raises(UserError, match=rf"generator\.balance is '{name}', expected .* \(scanner, sex"):
            HVAEGenerator(
                HVAESettings(parents=(*PARENTS, "left_upper"), balance=name),
                table.attributes,
                table.images.shape,
            )
    generator = HVAEGenerator(
        settings(train=HVAETrainSettings(batch=1000)), table.attributes, table.images.shape
    )
    with pytest.raises(UserError, match=r"generator\.train\.batch is 1000, but only"):
        generator.fit(table, Run(tmp_path, CPU, quiet=True))

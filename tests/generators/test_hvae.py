"""The HVAE: no parent reaches the prior, the likelihood is its formula, training resumes, abduction and
prediction are exact."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributions import Normal, kl_divergence

from cfssl.data.phantoms import chest
from cfssl.data.prepare import save_prepared
from cfssl.data.table import ImageTable
from cfssl.engine.run import HardwareSettings, Run
from cfssl.errors import UserError
from cfssl.evaluate.counterfactual import composition, reversibility
from cfssl.generators.base import to_signed
from cfssl.generators.hvae import (
    HVAEGenerator,
    HVAESettings,
    HVAETask,
    HVAETrainSettings,
    ImageData,
    half_uniform_weights,
)
from cfssl.generators.hvae_network import HVAE, Likelihood, gaussian_kl, gaussian_nll

PARENTS = ("scanner", "sex")
CPU = HardwareSettings(accelerator="cpu")
TINY = {"widths": (8, 8, 8, 8), "latents": (2, 2, 2), "blocks": 1}


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> ImageTable:
    frame, images, masks, truth = chest.build(chest.ChestWorld(), count=160, seed=0)
    folder = tmp_path_factory.mktemp("hvae") / "table"
    save_prepared(
        folder, "phantom_chest", frame, chest.ATTRIBUTES, images, masks, chest.MASKS, group="patient"
    )
    return ImageTable.open(folder, truth)


def settings(**options: object) -> HVAESettings:
    train = options.pop("train", HVAETrainSettings(epochs=2, batch=32))
    return HVAESettings(parents=PARENTS, train=train, **{**TINY, **options})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def fitted(table: ImageTable, tmp_path_factory: pytest.TempPathFactory) -> HVAEGenerator:
    generator = HVAEGenerator(settings(balance="scanner"), table.attributes, table.images.shape)
    generator.fit(table, Run(tmp_path_factory.mktemp("fit"), CPU, quiet=True))
    return generator


def network(sigma: str = "pixel", unshuffle: int = 2, channels: int = 1) -> HVAE:
    torch.manual_seed(0)
    net = HVAE(channels, 5, unshuffle, (8, 8, 8, 8), (2, 2, 2), 1, sigma, 0.1)
    with torch.no_grad():  # away from the zero-initialised start, so that every path carries something
        for parameter in net.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return net


def test_the_prior_does_not_see_the_parents() -> None:
    """Moving the parents at fixed z leaves every prior parameter as it is, and none of them has a gradient to
    the parents."""
    net = network()
    noise = net.split_noise(torch.randn(3, net.noise_size))
    context = torch.randn(3, 5, requires_grad=True)
    latents = [z.detach() for z in net.sample_latents(noise)]
    path = net.path_start.expand(3, -1, -1, -1)
    h = net.start.expand(3, -1, -1, -1)
    total = torch.zeros(())
    for index, (level, z) in enumerate(zip(net.levels, latents, strict=True)):
        mean, log_sigma, feature = level.read_prior(path)
        total = total + mean.square().sum() + log_sigma.sum()
        h, path = net._advance(index, h, path, feature, z, context)
    assert torch.autograd.grad(total, context, allow_unused=True, retain_graph=True)[0] is None
    # the check can fail: the decoder state does depend on them
    assert torch.autograd.grad(h.sum(), context)[0].abs().sum() > 0


@pytest.mark.parametrize("sigma", ["pixel", "shared", "fixed"])
def test_inference_and_decoding_give_one_likelihood_for_the_same_latents(sigma: str) -> None:
    net = network(sigma)
    x, context = torch.rand(2, 1, 64, 64) * 2 - 1, torch.randn(2, 5)
    noise = net.split_noise(torch.randn(2, net.noise_size))
    latents, divergences, inferred = net.infer(x, context, noise)
    decoded = net.decode(latents, context)
    torch.testing.assert_close(decoded.mean, inferred.mean)
    torch.testing.assert_close(decoded.log_sigma, inferred.log_sigma)
    assert all((kl >= -1e-4).all() for kl in divergences)
    assert inferred.mean.shape == x.shape


@pytest.mark.parametrize(("unshuffle", "side", "channels"), [(1, 32, 1), (2, 64, 3), (4, 128, 1)])
def test_sizes_are_constructible_and_keep_the_shape(unshuffle: int, side: int, channels: int) -> None:
    net = network(unshuffle=unshuffle, channels=channels)
    x = torch.rand(1, channels, side, side)
    assert net.infer(x, torch.zeros(1, 5))[2].mean.shape == x.shape
    assert [z.shape[2:] for z in net.infer(x, torch.zeros(1, 5))[0]] == [(4, 4), (8, 8), (16, 16)]


def test_the_published_small_sizes_have_about_their_parameters() -> None:
    attributes = {name: chest.ATTRIBUTES[name] for name in ("scanner", "sex")}
    for side in (32, 64):
        generator = HVAEGenerator(HVAESettings(parents=PARENTS), attributes, (1, side, side))
        count = sum(parameter.numel() for parameter in generator.network.parameters())
        assert 0.3e6 < count < 0.5e6, (side, count)


def test_kl_and_nll_are_those_of_torch_distributions_in_float64() -> None:
    shape = (3, 2, 4, 4)
    mean_q, log_q, mean_p, log_p = (torch.randn(shape, dtype=torch.float64) for _ in range(4))
    expected = kl_divergence(Normal(mean_q, log_q.exp()), Normal(mean_p, log_p.exp()))
    torch.testing.assert_close(gaussian_kl(mean_q, log_q, mean_p, log_p), expected)
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
    assert reversibility(fitted, x, pa, {"scanner": (pa["scanner"] + 1) % 4}).mean() < 60


def test_with_a_fixed_sigma_the_counterfactual_is_x_plus_the_change_of_the_mean(table: ImageTable) -> None:
    generator = HVAEGenerator(settings(sigma="fixed"), table.attributes, table.images.shape)
    rows = table.rows("test")[:6]
    x, pa = to_signed(table.images.read(rows)), table.encode(PARENTS, rows)
    pa_cf = {**pa, "scanner": (pa["scanner"] + 1) % 4}
    u = generator.abduct(x, pa)
    latents = [u[f"z{level}"] for level in range(3)]
    factual, counter = (generator.network.decode(latents, generator.encoder(p)).mean for p in (pa, pa_cf))
    torch.testing.assert_close(
        generator.predict(u, pa_cf), (x + counter - factual).clamp(-1, 1), atol=1e-5, rtol=0
    )


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
    other = HVAEGenerator(settings(widths=(16, 8, 8, 8)), table.attributes, table.images.shape)
    with pytest.raises(UserError, match="was not written by this generator's settings"):
        other.load(tmp_path / "g.safetensors")


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


def test_data_are_a_function_of_the_step(table: ImageTable) -> None:
    rows = table.rows("train")
    parents = table.encode(PARENTS, rows)
    data = ImageData(table, rows, parents, 10, HVAETrainSettings(batch=32, epochs=3))
    first, again = data[2][0], data[2][0]
    assert torch.equal(first.x, again.x)
    assert torch.equal(first.noise, again.noise)
    assert not torch.equal(data[3][0].noise, first.noise)


def test_impossible_inputs_are_one_sentence(table: ImageTable, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"square images of 32, 64, 128 or 256 pixels, and these are 48x48"):
        HVAEGenerator(settings(), table.attributes, (1, 48, 48))
    with pytest.raises(UserError, match=r"\['scaner'\], which the table does not have"):
        HVAEGenerator(HVAESettings(parents=("scaner",)), table.attributes, table.images.shape)
    generator = HVAEGenerator(
        settings(train=HVAETrainSettings(batch=1000)), table.attributes, table.images.shape
    )
    with pytest.raises(UserError, match=r"generator\.train\.batch is 1000, but only"):
        generator.fit(table, Run(tmp_path, CPU, quiet=True))

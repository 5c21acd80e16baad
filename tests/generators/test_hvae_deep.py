"""The published networks: sizes of the table, structure of the strings, and what cannot be built."""

from typing import Any

import pytest
import torch
from pydantic import ValidationError

from cfssl.errors import UserError
from cfssl.generators.hvae_deep import DeepBlock, PublishedNetworkSettings
from cfssl.generators.hvae_network import HVAE
from cfssl.generators.hvae_sizes import SIZES

TINY = {
    "encoder": "8b1d2,4b1d4,1b1",
    "decoder": "1b1,4b2,8b2",
    "widths": [8, 12, 16],
    "latents": [3, 2, 1],
    "z_max_res": 4,
}


def published(side: int, context: int, mediator: bool = False, **options: Any) -> HVAE:
    settings = PublishedNetworkSettings(**options)
    return settings.build(1, side, context, "pixel", 0.1, mediator)


def away_from_the_start(net: HVAE) -> HVAE:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return net


@pytest.mark.parametrize(
    ("size", "side", "context", "millions", "stochastic", "levels"),
    [
        ("morphomnist", 32, 12, 2.04, 20, 20),
        ("ukbb64", 64, 4, 55.1, 66, 66),
        ("ukbb192", 192, 4, 17.4, 38, 40),
        ("mimic192", 192, 6, 7.98, 38, 40),
        ("mimic224", 224, 6, 15.4, 55, 63),
        ("embed224", 224, 6, None, 55, 63),
        ("celeba64", 64, 4, None, 24, 24),
    ],
)
def test_the_published_sizes_are_those_of_the_table(
    size: Any, side: int, context: int, millions: float | None, stochastic: int, levels: int
) -> None:
    with torch.device("meta"):
        net = published(side, context, size=size)
        found = net.infer(torch.zeros(2, 1, side, side), torch.zeros(2, context))
    assert found.likelihood.mean.shape == (2, 1, side, side)
    assert (len(net.latent_shapes), len(net.levels)) == (stochastic, levels)
    assert [tuple(z.shape[1:]) for z in found.latents] == list(net.latent_shapes)
    assert max(shape[1] for shape in net.latent_shapes) <= SIZES[size].z_max_res
    if millions is not None:
        count = sum(parameter.numel() for parameter in net.parameters())
        assert count / 1e6 == pytest.approx(millions, rel=0.01)


@torch.no_grad()
def test_morphomnist_runs_and_starts_with_a_standard_normal_prior() -> None:
    net = published(32, 12, size="morphomnist")
    x, context = torch.rand(2, 1, 32, 32) * 2 - 1, torch.randn(2, 12)
    found = net.infer(x, context, net.split_noise(torch.randn(2, net.noise_size)))
    assert found.likelihood.mean.shape == x.shape
    assert torch.isfinite(found.likelihood.mean).all()
    for q, kl in zip(found.posterior, found.divergences, strict=True):
        standard = 0.5 * (q.mean**2 + q.sigma**2 - 1) - q.log_sigma
        torch.testing.assert_close(kl, standard)


@pytest.mark.slow
@torch.no_grad()
def test_a_network_for_192_pixels_runs() -> None:
    net = published(192, 6, size="mimic192")
    x = torch.rand(1, 1, 192, 192) * 2 - 1
    assert net.infer(x, torch.zeros(1, 6)).likelihood.mean.shape == x.shape


@pytest.mark.parametrize("kind", ["default", "light"])
@pytest.mark.parametrize("mediator", [False, True])
def test_inference_and_decoding_agree_and_every_weight_is_used(kind: str, mediator: bool) -> None:
    net = away_from_the_start(published(8, 3, mediator, block=kind, **TINY))
    assert net.latent_shapes == ((3, 1, 1), (2, 4, 4), (2, 4, 4))
    assert len(net.levels) == 5
    x, context = torch.rand(2, 1, 8, 8) * 2 - 1, torch.randn(2, 3)
    found = net.infer(x, context, net.split_noise(torch.randn(2, net.noise_size)))
    decoded = net.decode(found.latents, context)
    torch.testing.assert_close(decoded.mean, found.likelihood.mean)
    total = sum(kl.sum() for kl in found.divergences) + found.likelihood.mean.square().sum()
    (total + found.likelihood.log_sigma.square().sum()).backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name


@torch.no_grad()
@pytest.mark.parametrize("mediator", [False, True])
def test_the_prior_sees_the_parents_of_a_mediator_alone(mediator: bool) -> None:
    net = away_from_the_start(published(8, 3, mediator, **TINY))
    noise = net.split_noise(torch.randn(2, net.noise_size))
    first, second = (net.sample_latents(noise, torch.full((2, 3), value)) for value in (0.0, 1.0))
    equal = [torch.equal(*pair) for pair in zip(first, second, strict=True)]
    assert equal == [not mediator] * 3


@torch.no_grad()
def test_blocks_are_scaled_with_the_depth() -> None:
    torch.manual_seed(0)
    net = published(8, 3, **TINY)
    for level in net.levels:
        assert (level.prior.last.weight == 0).all()
    # uniform in +-1 / sqrt(fan in) at first
    block: DeepBlock = net.levels[1].update
    bound = block.last.weight[0].numel() ** -0.5 / len(net.levels) ** 0.5
    assert 0.7 * bound < float(block.last.weight.abs().max()) <= bound
    block = net.encoder.blocks[0]  # type: ignore[assignment, index, union-attr]
    bound = block.last.weight[0].numel() ** -0.5 / 5**0.5
    assert 0.5 * bound < float(block.last.weight.abs().max()) <= bound


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            {"encoder": "64b0d2,32b1d32,1b1", "decoder": "1b1,32b1,64b1"},
            "no block before its first downsampl",
        ),
        ({"encoder": "64b1d2,16b1d16,1b1"}, "does not get from 64 to 16"),
        ({"encoder": "64b1d2,32b1"}, "expected to end at one pixel"),
        ({"encoder": "64x1"}, "stage '64x1' of '64x1', expected e.g. 32b3d2"),
        ({"decoder": "1b4,4b4,8b4,16b4"}, "pass different resolutions"),
        ({"decoder": "1b0,4b4"}, "stage '1b0'"),
        ({"widths": [16, 32]}, "2 numbers, expected one for each of the 5"),
        ({"latents": [16]}, "1 numbers, expected one for each of the 5"),
        ({"widths": [2, 32, 64, 128, 256]}, "greater than or equal to 4"),
    ],
)
def test_networks_that_cannot_be_built_are_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        PublishedNetworkSettings(**options)


def test_images_of_another_side_are_refused() -> None:
    with pytest.raises(UserError, match="takes images of 192 pixels, and these are 64x64"):
        published(64, 3, size="ukbb192")

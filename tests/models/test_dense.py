"""Dense networks: maps of any timm encoder, the same for every seed, exact at points."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from cfssl.errors import UserError
from cfssl.models.backbone import BackboneSettings, create_backbone
from cfssl.models.dense import DecoderSettings, create_dense, dense_head, gather_points, levels
from cfssl.seeds import torch_generator

ENCODERS = {
    "resnet18": {},
    "test_resnet": {},
    "test_byobnet": {},
    "mobilenetv3_small_050": {},
    "convnext_atto": {},
    "tf_efficientnet_lite0": {},
    "test_vit": {},
    "vit_tiny_patch16_224": {"patch_size": 8, "depth": 4},
}


def encoder_of(name: str, size: int = 64, **options: int) -> nn.Module:
    return create_backbone(BackboneSettings(name, options={**ENCODERS.get(name, {}), **options}), 1, size, 0)


def images(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch_generator("images"))


@pytest.mark.parametrize("name", ENCODERS)
def test_any_encoder_gives_a_map_of_the_images_size_and_its_own_pooled_features(name: str) -> None:
    encoder, x = encoder_of(name), images(2, 1, 64, 64)
    network = create_dense(encoder, DecoderSettings(), 1, seed=0).eval()
    maps, pooled = network.decoded(x)
    assert maps.shape == (2, network.width, 64, 64)
    assert torch.equal(maps, network(x))
    torch.testing.assert_close(pooled, encoder.eval()(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ENCODERS)
def test_every_level_reaches_the_map_and_every_weight_of_the_decoder_learns(name: str) -> None:
    network = create_dense(encoder_of(name), DecoderSettings(), 1, seed=0)
    (network(images(4, 1, 64, 64)) ** 2).mean().backward()
    for key, parameter in network.decoder.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.abs().sum() > 0, key
    first = next(network.encoder.parameters())
    assert first.grad is not None
    assert first.grad.abs().sum() > 0


@pytest.mark.parametrize("stride", [1, 2, 4])
def test_the_map_has_the_stride_that_was_asked_for(stride: int) -> None:
    network = create_dense(encoder_of("test_resnet"), DecoderSettings(stride=stride), 1, seed=0)
    assert network(images(2, 1, 64, 96)).shape == (2, network.width, 64 // stride, 96 // stride)


def test_sides_that_the_encoder_cannot_halve_are_continued_and_cut() -> None:
    network = create_dense(encoder_of("test_resnet"), DecoderSettings(), 1, seed=0).eval()
    x = images(2, 1, 50, 70)
    found = network(x)
    assert found.shape == (2, network.width, 50, 70)
    continued = torch.cat([x, x[:, :, -1:].expand(-1, -1, 14, -1)], dim=2)
    continued = torch.cat([continued, continued[..., -1:].expand(-1, -1, -1, 26)], dim=3)
    torch.testing.assert_close(found, network(continued)[:, :, :50, :70])


def test_the_decoder_is_a_function_of_the_seed_alone() -> None:
    first, again, other = (
        create_dense(encoder_of("test_resnet"), DecoderSettings(), 1, seed).decoder.state_dict()
        for seed in (3, 3, 4)
    )
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


def test_a_vision_transformer_gives_layers_evenly_spaced_in_depth() -> None:
    encoder = encoder_of("vit_tiny_patch16_224", patch_size=16, depth=12)
    assert levels(encoder, 1) == ([3, 7, 11], [2, 4, 8, 16], [1, 192, 192, 192])
    assert levels(encoder_of("convnext_atto"), 3) == ([0, 1, 2, 3], [2, 4, 8, 16, 32], [3, 40, 80, 160, 320])


def test_widths_norm_and_stride_act() -> None:
    encoder = encoder_of("test_resnet")
    widths = create_dense(encoder, DecoderSettings(widths=(16, 16, 8, 8, 4)), 1, 0)
    assert widths(images(2, 1, 64, 64)).shape[1] == 4
    kinds = {
        norm: {
            type(module)
            for module in create_dense(encoder, DecoderSettings(norm=norm), 1, 0).decoder.modules()
        }
        for norm in ("batch", "instance")
    }
    assert nn.BatchNorm2d in kinds["batch"]
    assert nn.InstanceNorm2d in kinds["instance"]
    assert nn.BatchNorm2d not in kinds["instance"]


def test_what_cannot_be_decoded_is_refused_in_one_sentence() -> None:
    with pytest.raises(UserError, match=r"has 2 widths \(8, 8\), but the encoder has 5 levels"):
        create_dense(encoder_of("test_resnet"), DecoderSettings(widths=(8, 8)), 1, 0)
    with pytest.raises(UserError, match="gives no intermediate maps"):
        create_dense(nn.Linear(3, 3), DecoderSettings(), 1, 0)
    with pytest.raises(UserError, match="stride 14"):
        create_dense(encoder_of("test_vit", size=56, patch_size=14), DecoderSettings(), 1, 0)


def test_gathering_before_projecting_is_projecting_before_gathering() -> None:
    maps, points = images(2, 8, 16, 12).double(), 2 * images(2, 50, 2).double() - 1
    head = dense_head(8, 32, 16, seed=0).double()
    linear = nn.Sequential(head[0])  # bilinear weights pass through what is linear
    whole = linear(maps.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    torch.testing.assert_close(linear(gather_points(maps, points)), gather_points(whole, points))
    centres = torch.tensor(
        [[(2 * x + 1) / 12 - 1, (2 * y + 1) / 16 - 1] for x in range(12) for y in range(16)]
    )
    centres = centres.double().expand(2, -1, -1)
    whole = head(maps.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)  # at pixel centres, of the whole head
    torch.testing.assert_close(head(gather_points(maps, centres)), gather_points(whole, centres))


def test_points_are_read_where_they_lie_at_any_stride() -> None:
    for side in (16, 32):
        centre = (2 * torch.arange(side) + 1) / side - 1
        ramp = torch.stack([centre.expand(side, side), centre[:, None].expand(side, side)])[None]
        points = 1.8 * images(1, 100, 2) - 0.9
        torch.testing.assert_close(gather_points(ramp, points), points, atol=1e-5, rtol=0)
        near = gather_points(ramp, points, "nearest")
        assert (near - points).abs().max() <= 1 / side + 1e-6


def test_the_head_has_no_memory_of_other_points() -> None:
    head, points = dense_head(8, 32, 16, seed=0), images(5, 7, 8)
    alone = torch.stack([head(point) for item in points for point in item]).reshape(5, 7, 16)
    torch.testing.assert_close(head(points), alone)
    assert math.isclose(sum(p.numel() for p in head.parameters()), 8 * 32 + 32 + 32 * 16 + 16)
    np.testing.assert_array_equal(dense_head(8, 32, 16, 0)[0].weight.detach(), head[0].weight.detach())

"""The map of a volume has its grid, depends on the seed alone and learns at the places it should."""

import dataclasses
from typing import Any

import pytest
import torch

from cfssl.models.dense import dense_head, gather_points
from cfssl.models.volume import VolumeSettings, create_volume_network
from cfssl.seeds import torch_generator

SMALL = VolumeSettings(widths=(4, 8, 8), output=6, residuals=1)


def volumes(*size: int) -> torch.Tensor:
    return torch.rand(2, 1, *size, generator=torch_generator("volumes"))


@pytest.mark.parametrize("size", [(8, 8, 8), (5, 9, 6)])
def test_a_map_has_the_grid_of_its_volume(size: tuple[int, ...]) -> None:
    network = create_volume_network(SMALL, 1, 0).eval()
    found = network(volumes(*size))
    assert found.shape == (2, SMALL.output, *size) == (2, network.width, *size)
    assert found.isfinite().all()


def test_padding_is_the_continuation_of_the_last_voxels() -> None:
    network, x = create_volume_network(SMALL, 1, 0).eval(), volumes(8, 8, 6)
    continued = torch.cat([x, x[..., -1:], x[..., -1:]], dim=-1)
    torch.testing.assert_close(network(x), network(continued)[..., :6])


@pytest.mark.parametrize(
    "change", [{}, {"widths": (4, 8, 12)}, {"output": 5}, {"residuals": 2}, {"norm": "batch"}], ids=str
)
def test_weights_are_a_function_of_seed_and_settings(change: dict[str, Any]) -> None:
    x = volumes(8, 8, 8)
    one, same, other = (
        create_volume_network(settings, 1, seed).train()(x)
        for settings, seed in (
            (SMALL, 0),
            (SMALL, 0),
            (dataclasses.replace(SMALL, **change), 0 if change else 1),
        )
    )
    assert torch.equal(one, same)
    assert one.shape != other.shape or not torch.equal(one, other)


def test_points_of_a_volume_are_gathered_and_projected_in_either_order() -> None:
    maps = create_volume_network(SMALL, 1, 0).eval()(volumes(8, 6, 4))
    head = dense_head(SMALL.output, 7, 5, 0)
    z, y, x = (torch.arange(side) for side in maps.shape[2:])
    index = torch.stack(torch.meshgrid(z, y, x, indexing="ij"), -1).flatten(0, 2)  # every voxel
    sides = torch.tensor(maps.shape[2:])
    points = ((2 * index + 1) / sides - 1).flip(-1)[None].expand(2, -1, -1)  # (x, y, z)
    gathered = head(gather_points(maps, points))
    projected = head(maps.permute(0, 2, 3, 4, 1)).flatten(1, 3)
    torch.testing.assert_close(gathered, projected, rtol=1e-4, atol=1e-5)

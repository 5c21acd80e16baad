"""Dense networks for volumes: MONAI's residual U-Net in three dimensions, as a map and not as classes.

Tables can hold volumes, but no view, bank or objective takes them: this is the network for those who bring
their own loop. What works at points of a map (`dense_head`, `gather_points`) takes its maps as it does those
of images.
"""

from typing import Annotated, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import nn

from cfssl.models.seeded import seeded
from cfssl.settings import STRICT, Count


@dataclass(frozen=True, config=STRICT)
class VolumeSettings:
    """`widths`: channels of the levels, each at half the grid of the one before. `output`: channels of the
    map. `residuals`: residual units of a level. `norm`: of its convolutions; volumes leave room for few of
    them in a batch, hence none over the batch by default."""

    widths: Annotated[tuple[Count, ...], Field(min_length=2)] = (16, 32, 64, 128)
    output: Count = 32
    residuals: Count = 2
    norm: Literal["instance", "batch"] = "instance"


class VolumeNetwork(nn.Module):
    """Volumes (B, C, D, H, W) float32 in [0, 1] -> a map (B, output, D, H, W). Sides that are no multiple of
    the coarsest stride are continued by their last voxels, and the map is cut."""

    def __init__(self, settings: VolumeSettings, channels: int) -> None:
        """`channels`: C."""
        super().__init__()
        from monai.networks.nets.unet import UNet

        steps = len(settings.widths) - 1
        self.width, self.stride = settings.output, 2**steps
        self.network = UNet(
            spatial_dims=3,
            in_channels=channels,
            out_channels=settings.output,
            channels=settings.widths,
            strides=[2] * steps,
            num_res_units=settings.residuals,
            norm=settings.norm,
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        depth, height, width = x.shape[2:]
        rest = [part for side in (width, height, depth) for part in (0, -side % self.stride)]
        found: torch.Tensor = self.network(nn.functional.pad(x, rest, mode="replicate"))
        return found[:, :, :depth, :height, :width]


def create_volume_network(settings: VolumeSettings, channels: int, seed: int) -> VolumeNetwork:
    """Its initial weights are a function of the seed alone."""
    network = seeded(lambda: VolumeNetwork(settings, channels), seed, "volume")
    assert isinstance(network, VolumeNetwork)
    return network

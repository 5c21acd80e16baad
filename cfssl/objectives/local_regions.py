"""Local contrast within an image (Chaitanya et al. 2020, section 3.2): a region of an image is like the same
region of its other view, and unlike other regions of the two.

The paper's views differ in intensity alone, so that equal indices are equal places; here places are matched
through the views' maps, which is the same for views without geometry. A region is a block of points of the
decoder's map, projected as one. Other images are no negatives. The paper starts from an encoder with a global
loss behind it (`init.backbone`) and trains the decoder's first blocks: `decoder: {stride: 4}` of a network
with five levels.
"""

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import nn

from cfssl.data.views import ViewBatch
from cfssl.models.dense import DecoderSettings, create_dense, gather_points
from cfssl.models.seeded import seeded
from cfssl.objectives.gathered import mean_of_all
from cfssl.objectives.points import apply, inverse, item_generators, matched_points, uniform
from cfssl.settings import STRICT, Count, Positive


@dataclass(frozen=True, config=STRICT)
class LocalRegionsSettings:
    """`regions`: per image. `negatives`: of each, drawn among the other regions of both views. `side`: of a
    region, in points of the map. `output`: width of the linear projection."""

    name: Literal["local_regions"] = "local_regions"
    temperature: Positive = 0.1
    regions: Annotated[int, Field(ge=2)] = 13
    negatives: Count = 5
    side: Count = 3
    output: Count = 128
    decoder: DecoderSettings = Field(default_factory=lambda: DecoderSettings(stride=4))

    def __post_init__(self) -> None:
        if self.negatives > 2 * (self.regions - 1):
            raise ValueError(
                f"negatives is {self.negatives}, but the other {self.regions - 1} regions of two views are "
                f"{2 * (self.regions - 1)}; lower it"
            )


class LocalRegions(nn.Module):
    """`forward(batch, step)` takes two views per item and returns {"loss", "overlap"}; `network` holds
    encoder and decoder, `student`, the encoder, is what gets exported."""

    def __init__(self, encoder: nn.Module, settings: LocalRegionsSettings, seed: int, channels: int) -> None:
        """Raises `UserError` for an encoder that cannot be decoded."""
        super().__init__()
        self.settings, self.seed = settings, seed
        self.network = create_dense(encoder, settings.decoder, channels, seed)
        features = self.network.width * settings.side**2
        self.head = seeded(lambda: nn.Linear(features, settings.output), seed, "region head")

    @property
    def student(self) -> nn.Module:
        """The encoder."""
        return self.network.encoder

    def forward(self, batch: ViewBatch, step: int) -> dict[str, torch.Tensor]:
        settings = self.settings
        images = batch.images.flatten(0, 1).contiguous(memory_format=torch.channels_last)
        maps = self.network(images).unflatten(0, (-1, 2))
        generators = item_generators(batch.position, self.seed, "points", step)
        pair = matched_points(batch.affine, batch.valid, settings.regions, generators)
        to_source, from_source = batch.affine[:, 0].double(), inverse(batch.affine[:, 1].double())
        offsets = region_offsets(settings.side, maps.shape[3:], pair.first.device)
        first = (pair.first[:, :, None] + offsets).flatten(1, 2)  # (B, regions side^2, 2)
        second = apply(from_source, apply(to_source, first.double())).float()
        z = torch.stack(
            [
                self.head(
                    gather_points(maps[:, view], points).unflatten(1, (settings.regions, -1)).flatten(2)
                )
                for view, points in enumerate((first, second))
            ],
            dim=1,
        )  # (B, 2, regions, output)
        with torch.autocast(z.device.type, enabled=False):
            losses = region_contrast(z.float(), settings.temperature, settings.negatives, generators)
            weights = pair.is_known.float()
            loss = mean_of_all((losses * weights).sum(), weights.sum())
        return {"loss": loss, "overlap": weights.mean()}

    def after_step(self, step: int) -> None:
        """Nothing moves outside the optimiser."""


def region_offsets(side: int, size: torch.Size | tuple[int, int], device: torch.device) -> torch.Tensor:
    """(side^2, 2): from a region's centre to its points, a point of a map of `size` (h, w) apart."""
    height, width = size
    steps = torch.arange(side, device=device, dtype=torch.float32) - (side - 1) / 2
    x, y = torch.meshgrid(steps * 2 / width, steps * 2 / height, indexing="xy")
    return torch.stack([x, y], dim=-1).flatten(0, 1)


def region_contrast(
    z: torch.Tensor, temperature: float, negatives: int, generators: Sequence[torch.Generator]
) -> torch.Tensor:
    """Of regions z (B, 2, R, D) of two views: the mean over both views and all regions of

        -log( exp(s_pos) / (exp(s_pos) + sum_n exp(s_n)) ),

    with s cosines over the temperature, the same region of the other view as positive, and `negatives` of
    the 2 (R - 1) other regions of either view, drawn anew for each (Chaitanya et al. 2020, equation 2);
    (B,)."""
    regions = z.shape[2]
    z = nn.functional.normalize(z, dim=3)
    every = z.flatten(1, 2)  # (B, 2R, D)
    similarity = every @ every.mT / temperature  # (B, 2R, 2R)
    place = torch.arange(2 * regions, device=z.device)
    is_same = place[:, None] % regions == place % regions
    keys = uniform(generators, *similarity.shape[1:]).to(z.device).masked_fill(is_same, 2.0)
    drawn = keys.topk(negatives, dim=2, largest=False).indices
    positive = similarity[:, place, (place + regions) % (2 * regions)][..., None]
    logits = torch.cat([positive, similarity.gather(2, drawn)], dim=2)
    return (logits.logsumexp(2) - logits[..., 0]).mean(1)

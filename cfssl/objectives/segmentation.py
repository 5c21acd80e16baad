"""Training on silver labels as if they were gold: the reference arm of the silver variants of dense contrast
("Segmentation" in Lafargue-Hauret et al. 2026).

The encoder under its decoder, with one sigmoid per structure, learns the masks of its views, real or
counterfactual, by MONAI's Dice plus cross-entropy. Pixels from outside of the image count in no loss.
"""

from typing import Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import nn

from cfssl.data.views import ViewBatch
from cfssl.models.dense import DecoderSettings, create_dense
from cfssl.models.seeded import seeded
from cfssl.objectives.dense import Structures
from cfssl.settings import STRICT

SURE = 20.0  # a logit whose cross-entropy is nothing


@dataclass(frozen=True, config=STRICT)
class SegmentationSettings:
    """`structures`: the masks to learn, which may overlap."""

    structures: Structures = Field(kw_only=True)
    name: Literal["segmentation"] = "segmentation"
    decoder: DecoderSettings = Field(default_factory=DecoderSettings)


class Segmentation(nn.Module):
    """`forward(batch, step)` takes any number of views with their labels and returns {"loss", "dice"};
    `network` holds encoder and decoder, `student`, the encoder, is what gets exported."""

    def __init__(self, encoder: nn.Module, settings: SegmentationSettings, seed: int, channels: int) -> None:
        """`channels` of the images. Raises `UserError` for an encoder that cannot be decoded."""
        super().__init__()
        self.network = create_dense(encoder, settings.decoder, channels, seed)
        width, count = self.network.width, len(settings.structures)
        self.head = seeded(lambda: nn.Conv2d(width, count, 1), seed, "silver_head")

    @property
    def student(self) -> nn.Module:
        """The encoder."""
        return self.network.encoder

    def forward(self, batch: ViewBatch, step: int) -> dict[str, torch.Tensor]:
        assert batch.labels is not None, "the views have their masks"
        images = batch.images.flatten(0, 1).contiguous(memory_format=torch.channels_last)
        true, valid = batch.labels.flatten(0, 1), batch.valid.flatten(0, 1)[:, None]
        logits = self.head(self.network(images))
        with torch.autocast(logits.device.type, enabled=False):
            logits = nn.functional.interpolate(
                logits.float(), size=true.shape[2:], mode="bilinear", align_corners=False
            )
            loss = mask_loss(logits, true.float(), valid)
        found = (logits.detach() > 0) & valid
        both, sizes = (found & true).sum(), (found.int() + (true & valid)).sum()
        return {"loss": loss, "dice": 2 * both / sizes.clamp(min=1)}

    def after_step(self, step: int) -> None:
        """Nothing moves outside the optimiser."""


def mask_loss(logits: torch.Tensor, true: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """MONAI's Dice loss plus binary cross-entropy of logits and masks (B, S, H, W), a mean over structures;
    where `valid` (B, 1, H, W) is False, logits surely and rightly say that nothing is there."""
    from monai.losses import DiceCELoss

    # One pixel is added above and below, so that an absent structure that is not found costs nothing.
    of_one = DiceCELoss(sigmoid=True, smooth_nr=1.0, smooth_dr=1.0)
    logits, true = logits.masked_fill(~valid, -SURE), true * valid
    # One structure at a time: with several channels MONAI's cross-entropy is that of a softmax.
    channels = zip(logits.split(1, dim=1), true.split(1, dim=1), strict=True)
    return torch.stack([of_one(*channel) for channel in channels]).mean()

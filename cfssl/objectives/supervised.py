"""Cross-entropy on an attribute: the supervised reference arm, and the independent predictors that judge
counterfactuals."""

from typing import Literal

import torch
from pydantic.dataclasses import dataclass
from torch import nn

from cfssl.data.views import ViewBatch
from cfssl.models.backbone import feature_size
from cfssl.models.heads import linear_head
from cfssl.settings import STRICT


@dataclass(frozen=True, config=STRICT)
class SupervisedSettings:
    """`target`: a categorical or binary attribute; images where it is missing are left out of the
    training."""

    target: str
    name: Literal["supervised"] = "supervised"


class Supervised(nn.Module):
    """Every view of an item is classified. `forward` returns {"loss", "accuracy"}; `logits(images)`
    classifies."""

    views = None  # any number

    def __init__(self, encoder: nn.Module, settings: SupervisedSettings, classes: int, seed: int) -> None:
        super().__init__()
        self.student = encoder
        self.target = settings.target
        self.head = linear_head(feature_size(encoder), classes, seed)

    def logits(self, images: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) in [0, 1] -> (B, classes)."""
        return self.head(self.student(images.contiguous(memory_format=torch.channels_last)))

    def forward(self, batch: ViewBatch, step: int) -> dict[str, torch.Tensor]:
        views = batch.images.shape[1]
        logits = self.logits(batch.images.flatten(0, 1))  # (B V, classes)
        target = batch.attributes[self.target].repeat_interleave(views)
        with torch.autocast(logits.device.type, enabled=False):
            loss = nn.functional.cross_entropy(logits.float(), target)
        return {"loss": loss, "accuracy": (logits.argmax(1) == target).float().mean()}

    def after_step(self, step: int) -> None:
        """Nothing moves outside the optimiser."""

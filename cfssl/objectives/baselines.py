"""Methods beside SimCLR and DINOv2, built from lightly's heads and losses: BYOL (Grill et al. 2020), MoCo v3
(Chen et al. 2021), VICReg (Bardes et al. 2022) and Barlow Twins (Zbontar et al. 2021).

All take two views per item, and learn that they show the same: the first two by predicting what a teacher
makes of the other view (`Bootstrap`), the last two by making both projections equal while their coordinates
stay apart (`Twins`).
"""

import copy
from collections.abc import Callable
from typing import Literal

import torch
from pydantic.dataclasses import dataclass
from torch import nn

from cfssl.data.views import ViewBatch
from cfssl.engine.schedules import cosine
from cfssl.models.backbone import feature_size
from cfssl.models.heads import lightly_head
from cfssl.objectives.gathered import gathered
from cfssl.objectives.teacher import Teacher
from cfssl.settings import STRICT, Count, NonNegative, Positive, Probability

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True, config=STRICT)
class BYOLSettings:
    """`hidden` and `output`: widths of projection and prediction. `momentum` of the teacher, by half a cosine
    to 1."""

    name: Literal["byol"] = "byol"
    hidden: Count = 4096
    output: Count = 256
    momentum: Probability = 0.996


@dataclass(frozen=True, config=STRICT)
class MoCoSettings:
    """`temperature` of the contrast; `hidden`, `output` and `momentum` as of BYOL."""

    name: Literal["moco_v3"] = "moco_v3"
    hidden: Count = 4096
    output: Count = 256
    temperature: Positive = 0.2
    momentum: Probability = 0.99


@dataclass(frozen=True, config=STRICT)
class VICRegSettings:
    """Weights of the three terms (lambda, mu and nu of the paper); `hidden` and `output`: widths of the
    projection."""

    name: Literal["vicreg"] = "vicreg"
    hidden: Count = 8192
    output: Count = 8192
    invariance: NonNegative = 25.0
    variance: NonNegative = 25.0
    covariance: NonNegative = 1.0


@dataclass(frozen=True, config=STRICT)
class BarlowTwinsSettings:
    """`redundancy`: weight of what is off the diagonal (lambda of the paper); `hidden` and `output`: widths
    of the projection."""

    name: Literal["barlow_twins"] = "barlow_twins"
    hidden: Count = 8192
    output: Count = 8192
    redundancy: NonNegative = 5e-3


BaselineSettings = BYOLSettings | MoCoSettings | VICRegSettings | BarlowTwinsSettings


def create_baseline(settings: BaselineSettings, encoder: nn.Module, seed: int, steps: int) -> nn.Module:
    """The method around `encoder`, for a training of `steps`."""
    from lightly.loss import BarlowTwinsLoss, VICRegLoss

    features, hidden, output = feature_size(encoder), settings.hidden, settings.output
    name = f"{settings.name} projector"

    def head(kind: str, name: str, *sizes: int, **options: bool | int) -> nn.Module:
        return lightly_head(kind, seed, name, *sizes, **options)

    match settings:
        case BYOLSettings():
            projectors = [head("BYOLProjectionHead", name, features, hidden, output) for _ in range(2)]
            predictor = head("BYOLPredictionHead", "byol predictor", output, hidden, output)
            return Bootstrap(encoder, projectors, predictor, distance, settings.momentum, steps)
        case MoCoSettings():
            layers = {"batch_norm": True, "num_layers": 3}
            projectors = [head("MoCoProjectionHead", name, features, hidden, output, **layers) for _ in "ab"]
            layers["num_layers"] = 2
            predictor = head("MoCoProjectionHead", "moco predictor", output, hidden, output, **layers)
            loss = Contrast(settings.temperature)
            return Bootstrap(encoder, projectors, predictor, loss, settings.momentum, steps)
        case VICRegSettings():
            weights = settings.invariance, settings.variance, settings.covariance
            projector = head("VICRegProjectionHead", name, features, hidden, output)
            return Twins(encoder, projector, VICRegLoss(*weights))
        case BarlowTwinsSettings():
            projector = head("BarlowTwinsProjectionHead", name, features, hidden, output)
            return Twins(encoder, projector, BarlowTwinsLoss(settings.redundancy))


class Bootstrap(nn.Module):
    """The student predicts, from each view, the teacher's projection of the other; the loss is the sum over
    both. `forward(batch, step)` returns {"loss"}; `student` is what gets exported."""

    def __init__(
        self,
        encoder: nn.Module,
        projectors: list[nn.Module],
        predictor: nn.Module,
        loss: Loss,
        momentum: float,
        steps: int,
    ) -> None:
        """`projectors`: the student's and the teacher's. `loss` takes predictions and projections, (B, D)
        each."""
        super().__init__()
        self.student, self.predictor, self.loss = encoder, predictor, loss
        self.projector, copied = projectors
        self.momentum, self.steps = momentum, steps
        self.teacher = Teacher({"encoder": copy.deepcopy(encoder), "projector": copied}, self._students())

    def _students(self) -> dict[str, nn.Module]:
        return {"encoder": self.student, "projector": self.projector}

    def forward(self, batch: ViewBatch, step: int) -> dict[str, torch.Tensor]:
        images = batch.images.flatten(0, 1).contiguous(memory_format=torch.channels_last)  # (2B, C, H, W)
        with torch.no_grad():
            z = self.teacher["projector"](self.teacher["encoder"](images))
        p = self.predictor(self.projector(self.student(images)))
        with torch.autocast(images.device.type, enabled=False):
            (p_first, p_second), (z_first, z_second) = (
                part.float().unflatten(0, (-1, 2)).unbind(1) for part in (p, z)
            )
            return {"loss": self.loss(p_first, z_second) + self.loss(p_second, z_first)}

    def after_step(self, step: int) -> None:
        """The teacher follows."""
        self.teacher.follow(self._students(), cosine(step, self.steps, self.momentum, 1.0))


class Twins(nn.Module):
    """`loss` of the projections (B, D) of both views, those of all processes: where lightly gathers, each
    process still normalises by its own statistics. `forward(batch, step)` returns {"loss"}; `student` is
    what gets exported."""

    def __init__(self, encoder: nn.Module, projector: nn.Module, loss: nn.Module) -> None:
        super().__init__()
        self.student, self.projector, self.loss = encoder, projector, loss

    def forward(self, batch: ViewBatch, step: int) -> dict[str, torch.Tensor]:
        images = batch.images.flatten(0, 1).contiguous(memory_format=torch.channels_last)  # (2B, C, H, W)
        z = self.projector(self.student(images)).unflatten(0, (-1, 2))  # (B, 2, D)
        with torch.autocast(z.device.type, enabled=False):
            return {"loss": self.loss(*gathered(z.float()).unbind(1))}

    def after_step(self, step: int) -> None:
        """Nothing moves outside the optimiser."""


def distance(predictions: torch.Tensor, projections: torch.Tensor) -> torch.Tensor:
    """BYOL, equation 2: the mean squared distance of unit vectors, 2 - 2 cos."""
    from lightly.loss import NegativeCosineSimilarity

    return 2 + 2 * NegativeCosineSimilarity()(predictions, projections)


class Contrast(nn.Module):
    """MoCo v3, algorithm 1: cross-entropy of picking the own projection among those of all items of all
    processes, times 2 tau."""

    def __init__(self, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature

    def forward(self, predictions: torch.Tensor, projections: torch.Tensor) -> torch.Tensor:
        from lightly.utils import dist

        q, k = (nn.functional.normalize(part, dim=1) for part in (predictions, projections))
        k = gathered(k)
        own = torch.arange(len(q), device=q.device) + dist.rank() * len(q)
        return 2 * self.temperature * nn.functional.cross_entropy(q @ k.T / self.temperature, own)

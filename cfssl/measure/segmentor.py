"""A frozen network that says where the structures of an image are: the guide of segmentor-guided fine-tuning,
or the judge of an audit.

Enters: a table with masks. Leaves: a probability per pixel and structure, with gradients to the image and
none to the weights. A small U-Net (Ronneberger et al. 2015) with one sigmoid per structure, so structures may
overlap, trained on binary cross-entropy plus Dice (Milletari et al. 2016); group normalisation in place of
batch statistics, for the reason given in predictor.py.
"""

import math
import sys
from pathlib import Path
from typing import Annotated, Self

import numpy as np
import torch
from pydantic import Field, TypeAdapter
from pydantic.dataclasses import dataclass
from torch import nn

from cfssl.data.batches import ImageBatch, ImageData
from cfssl.data.table import ImageTable
from cfssl.engine.loop import TrainSettings, fit
from cfssl.engine.run import Run
from cfssl.errors import UserError, nearest, quoted
from cfssl.measure.frozen import Record, measured, stem
from cfssl.measure.sampling import GROUPS, AugmentSettings, Part, Width, augmented, noise_size, rows_of_part
from cfssl.models.seeded import seeded
from cfssl.settings import STRICT, Count, Positive


@dataclass(frozen=True, config=STRICT)
class SegmentorTrainSettings(TrainSettings):
    """What suits some thousand images."""

    epochs: Count = 12
    batch: Count = 32
    lr: Positive = 3e-3


@dataclass(frozen=True, config=STRICT)
class SegmentorAugmentSettings(AugmentSettings):
    """Tones are varied more than for a predictor: they say nothing about where a structure ends."""

    contrast: Annotated[float, Field(ge=0)] = 0.2
    brightness: Annotated[float, Field(ge=0)] = 0.1
    gamma: Annotated[float, Field(ge=0)] = 0.2


@dataclass(frozen=True, config=STRICT)
class SegmentorSettings:
    """`structures`: names of the table's masks. `widths`: channels of the levels, each at half the grid of
    the one before. `part`: the training rows it learns from; a guide and a judge take different halves."""

    structures: tuple[str, ...]
    widths: Annotated[tuple[Width, ...], Field(min_length=2)] = (16, 32, 64)
    part: Part = "all"
    augment: SegmentorAugmentSettings = Field(default_factory=SegmentorAugmentSettings)
    train: SegmentorTrainSettings = Field(default_factory=SegmentorTrainSettings)


def block(before: int, width: int) -> nn.Sequential:
    """Two normalised convolutions."""
    parts: list[nn.Module] = []
    for channels in (before, width):
        parts += [nn.Conv2d(channels, width, 3, padding=1), nn.GroupNorm(GROUPS, width), nn.SiLU()]
    return nn.Sequential(*parts)


class UNet(nn.Module):
    """x (B, C, H, W) -> logits (B, S, H, W). Works on a grid `fold` times coarser, its pixels folded into
    channels and back."""

    def __init__(self, channels: int, structures: int, fold: int, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.fold, self.unfold = nn.PixelUnshuffle(fold), nn.PixelShuffle(fold)
        befores = (channels * fold**2, *widths[:-1])
        self.down = nn.ModuleList(block(b, w) for b, w in zip(befores, widths, strict=True))
        self.up = nn.ModuleList(
            block(coarse + fine, fine) for fine, coarse in zip(widths[-2::-1], widths[:0:-1], strict=True)
        )
        self.out = nn.Conv2d(widths[0], structures * fold**2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.fold(x)
        levels = []
        for index, down in enumerate(self.down):
            x = down(nn.functional.max_pool2d(x, 2) if index else x)
            levels.append(x)
        for up, fine in zip(self.up, levels[-2::-1], strict=True):
            x = nn.functional.interpolate(x, size=fine.shape[2:], mode="nearest")
            x = up(torch.cat([x, fine], dim=1))
        logits: torch.Tensor = self.unfold(self.out(x))
        return logits.float()


def soft_dice(p: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """2 |p m| / (|p| + |m|) per image and structure, (B, S), of probabilities and masks (B, S, H, W); one
    pixel is added above and below, so that an absent structure that is not found scores 1."""
    both = (p * masks).sum((2, 3))
    return (2 * both + 1) / (p.sum((2, 3)) + masks.sum((2, 3)) + 1)


class SegmentorTask(nn.Module):
    """Minimises binary cross-entropy + (1 - Dice) on augmented images."""

    def __init__(self, network: UNet, augment: AugmentSettings) -> None:
        super().__init__()
        self.network, self.augment = network, augment

    def forward(self, batch: ImageBatch, step: int) -> dict[str, torch.Tensor]:
        x, masks = augmented(batch.x, batch.masks, batch.noise, self.augment)
        logits = self.network(x)
        bce = nn.functional.binary_cross_entropy_with_logits(logits, masks)
        dice = soft_dice(logits.sigmoid(), masks).mean()
        return {"loss": bce + 1 - dice, "bce": bce, "dice": dice}

    def after_step(self, step: int) -> None:
        """Nothing is averaged."""


class Segmentor(nn.Module):
    """See the module docstring. Created from settings, the table's mask names and image shape, then `fit` or
    `load`. Frozen and in eval mode from the start: `fit` trains another network and takes its weights
    over."""

    def __init__(
        self, settings: SegmentorSettings, mask_names: tuple[str, ...], shape: tuple[int, ...]
    ) -> None:
        """Raises `UserError` for a structure that the table has no mask of, none at all, or volumes."""
        super().__init__()
        for name in settings.structures:
            if name not in mask_names:
                raise UserError(
                    f"The segmentor is to find {name!r}, and the table has no such mask"
                    f"{nearest(name, mask_names)}."
                )
        if not settings.structures:
            raise UserError("The segmentor has no structure to find; name at least one.")
        self.settings, self.shape = settings, tuple(shape)
        self.network = self._network().requires_grad_(False).eval()
        identity = TypeAdapter(SegmentorSettings).dump_python(settings, mode="json")
        self.record = Record("segmentor", {"settings": identity, "shape": list(shape)})
        self.eval()

    @property
    def structures(self) -> tuple[str, ...]:
        """Names of the channels."""
        return self.settings.structures

    @property
    def fingerprint(self) -> str:
        """Of weights, settings and code. Raises `UserError` before `fit` or `load`."""
        return self.record.fingerprint

    def train(self, mode: bool = True) -> Self:
        """Stays in eval mode."""
        return super().train(False)

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """x (B, C, H, W) float32 in [-1, 1] -> (B, S, H, W)."""
        logits: torch.Tensor = self.network(x)
        return logits

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (B, C, H, W) float32 in [-1, 1] -> probabilities (B, S, H, W), each structure on its own."""
        return self.logits(x).sigmoid()

    def fit(self, table: ImageTable, run: Run, rows: np.ndarray | None = None) -> None:
        """Trains on the training rows (or those of `rows`) of the settings' part that have a mask of one of
        the structures at least; how many have none is printed."""
        s = self.settings
        known = rows_of_part(table, table.rows("train"), s.part)
        known = known if rows is None else known[np.isin(known, rows)]
        masked = known[self._masked(table, known)]
        if len(masked) == 0:
            raise UserError(
                f"None of the {len(known)} training rows of {table.name} has a mask of "
                f"{quoted(s.structures)}; the segmentor needs some."
            )
        if len(masked) < len(known) and not run.quiet:
            print(
                f"segmentor: {len(known) - len(masked)} of {len(known)} training images have no mask and are "
                "left out",
                file=sys.stderr,
            )
        network = self._network()
        data = ImageData(
            table,
            masked,
            {},
            s.train,
            masks=s.structures,
            noise_size=noise_size(self.shape),
            section="segmentor.train",
        )
        if fit(SegmentorTask(network, s.augment), data, s.train, run, "segmentor"):
            self.network.load_state_dict(network.state_dict())
            self.record.seal(self.network)

    def save(self, path: Path) -> None:
        """Raises `UserError` before `fit` or `load`."""
        self.record.save(path, self.network)

    def load(self, path: Path) -> None:
        """Raises `UserError` when the file belongs to other settings or images."""
        self.record.load(path, self.network)

    @torch.no_grad()
    def score(self, table: ImageTable, split: str) -> dict[str, dict[str, float]]:
        """How well real images are read, so that a bad judge is noticed: per structure, over the rows of
        `split` whose mask of it is not empty, `images`, mean `dice` of the pixels above 1/2, and `area_r2`:
        the squared correlation of their number with the mask's (NaN where either does not vary)."""
        rows = table.rows(split)
        shape = (3, len(rows), len(self.structures))
        found, wanted, both = np.zeros(shape)
        for places, batch in measured(table, rows, self.network, self.structures):
            p = (self(batch.x) > 0.5).float()
            for counts, pixels in ((found, p), (wanted, batch.masks), (both, p * batch.masks)):
                counts[places] = pixels.sum((2, 3)).cpu().numpy()
        scores = {}
        for channel, name in enumerate(self.structures):
            has = wanted[:, channel] > 0
            a, b, common = (counts[has, channel] for counts in (found, wanted, both))
            varies = has.any() and a.std() > 0 and b.std() > 0
            scores[name] = {
                "images": float(has.sum()),
                "dice": float(np.mean(2 * common / (a + b))) if has.any() else math.nan,
                "area_r2": float(np.corrcoef(a, b)[0, 1] ** 2) if varies else math.nan,
            }
        return scores

    def _network(self) -> UNet:
        """As the seed starts it."""
        s, fold = self.settings, stem(self.shape, "segmentor")
        network = seeded(
            lambda: UNet(self.shape[0], len(s.structures), fold, s.widths), s.train.seed, "segmentor"
        )
        assert isinstance(network, UNet)
        return network

    def _masked(self, table: ImageTable, rows: np.ndarray) -> np.ndarray:
        """Which of `rows` (N,) have a pixel of any structure."""
        masked = np.zeros(len(rows), dtype=bool)
        for places, batch in measured(table, rows, self.network, self.structures):
            masked[places] = batch.masks.flatten(1).any(1).cpu().numpy()
        return masked

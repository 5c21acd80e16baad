"""What generators, predictors and segmentors are trained on: whole images in the order of a seed."""

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import torch

from cfssl.data.order import EpochOrder
from cfssl.data.pixels import to_signed
from cfssl.data.table import Attributes, ImageTable
from cfssl.errors import UserError
from cfssl.seeds import numpy_generator, torch_generator


class Schedule(Protocol):
    """The part of the training settings that decides which rows a step takes."""

    @property
    def epochs(self) -> int: ...
    @property
    def batch(self) -> int: ...
    @property
    def accumulate(self) -> int: ...
    @property
    def seed(self) -> int: ...


class ImageBatch:
    """`x` (B, C, H, W) float32 in [-1, 1], `attributes` (B,) each, `masks` (B, S, H, W) float32 of 0 and 1 (S
    may be 0), and standard normal `noise` (B, N) (N may be 0)."""

    def __init__(
        self, x: torch.Tensor, attributes: Attributes, masks: torch.Tensor, noise: torch.Tensor
    ) -> None:
        self.x, self.attributes, self.masks, self.noise = x, attributes, masks, noise

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, part: slice) -> "ImageBatch":
        attributes = {name: value[part] for name, value in self.attributes.items()}
        return ImageBatch(self.x[part], attributes, self.masks[part], self.noise[part])

    def to(self, device: Any, **keywords: Any) -> "ImageBatch":
        attributes = {name: value.to(device, **keywords) for name, value in self.attributes.items()}
        x, masks, noise = (part.to(device, **keywords) for part in (self.x, self.masks, self.noise))
        return ImageBatch(x, attributes, masks, noise)


class ImageData:
    """Step data: `data[step]` is the list of micro-batches of that step, a pure function of (seed, step).

    `attributes` belong to `rows`, (N,) each. Rows are drawn with replacement by `weights` (N,) when given,
    else by a permutation per epoch. `masks`: which of the table's masks each batch carries. `noise_size`:
    standard normal numbers per image. `section` names the settings in the error for a batch that is too
    large.
    """

    def __init__(
        self,
        table: ImageTable,
        rows: np.ndarray,
        attributes: Attributes,
        settings: Schedule,
        *,
        masks: tuple[str, ...] = (),
        noise_size: int = 0,
        weights: np.ndarray | None = None,
        section: str = "train",
    ) -> None:
        self.table, self.rows, self.attributes = table, rows, attributes
        self.channels = [table.mask_names.index(name) for name in masks]
        self.noise_size = noise_size
        self.seed, self.accumulate, self.batch = settings.seed, settings.accumulate, settings.batch
        if len(rows) < self.batch:
            raise UserError(
                f"{section}.batch is {self.batch}, but only {len(rows)} training images have all that is "
                "needed; lower it."
            )
        self.order = EpochOrder(len(rows), self.batch, settings.epochs, self.seed)
        cumulative = None if weights is None else np.cumsum(weights)
        self._cumulative = None if cumulative is None else cumulative / cumulative[-1]

    def __len__(self) -> int:
        return len(self.order)

    def items(self, step: int) -> np.ndarray:
        """The places (batch,) in `rows` of a step."""
        if self._cumulative is not None:
            level = numpy_generator(self.seed, "draw", step).random(self.batch)
            return np.searchsorted(self._cumulative, level, side="right")
        return self.order.items(step)

    def __getitem__(self, step: int) -> list[ImageBatch]:
        items = self.items(step)
        whole = read_batch(self.table, self.rows[items], self._of(items), self.channels)
        whole.noise = torch.randn(
            len(items), self.noise_size, generator=torch_generator(self.seed, "noise", step)
        )
        size = len(items) // self.accumulate
        return [whole[part * size : (part + 1) * size] for part in range(self.accumulate)]

    def _of(self, items: np.ndarray) -> Attributes:
        places = torch.from_numpy(items)
        return {name: values[places] for name, values in self.attributes.items()}


def read_batch(
    table: ImageTable, rows: np.ndarray, attributes: Mapping[str, torch.Tensor], channels: list[int]
) -> ImageBatch:
    """The images of `rows` with their attributes and the masks in `channels`; without noise."""
    x = to_signed(table.images.read(rows))
    masks = torch.zeros(len(rows), 0, *x.shape[2:])
    if channels:
        assert table.masks is not None  # channels are places in its mask_names
        masks = torch.from_numpy(table.masks.read(rows)[:, channels]).gt(0).float()
    return ImageBatch(x, dict(attributes), masks, torch.zeros(len(rows), 0))

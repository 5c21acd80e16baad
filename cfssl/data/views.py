"""Views: from stored images and their counterfactuals to the batches that every objective takes.

Which stored image a view shows is decided by its plan (plan.py); here every view gets its own geometry and
look.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass as plain_dataclass
from dataclasses import fields
from typing import Any, Literal, Self

import numpy as np
import torch
from pydantic import Field
from pydantic.dataclasses import dataclass

from cfssl.data.augment import Photometric, PhotometricSettings
from cfssl.data.geometry import GeometrySettings, sample_affines, valid_mask, warp
from cfssl.data.order import EpochOrder
from cfssl.data.plan import CounterfactualPlan, SlotPlan, ViewSource
from cfssl.errors import UserError
from cfssl.seeds import derive_seed, numpy_generator
from cfssl.settings import STRICT, Count


@plain_dataclass(frozen=True)
class ViewBatch:
    """One type for every objective. B items, V views each."""

    images: torch.Tensor  # (B, V, C, H, W) float32 in [0, 1]
    is_counterfactual: torch.Tensor  # (B, V) bool
    slot: torch.Tensor  # (B, V) long: which stored image the view shows, 0 = real, k = k-th do() of the bank
    affine: torch.Tensor  # (B, V, 2, 3) float32, view -> source in normalised pixel-centre coordinates
    valid: torch.Tensor  # (B, V, H, W) bool: the pixel is made of source pixels alone
    attributes: dict[str, torch.Tensor]  # factual, (B,) each
    row: torch.Tensor  # (B,) long: row of the table
    labels: torch.Tensor | None = None  # (B, V, M, H, W) masks warped with the views
    local: Self | None = None  # further views of the same items, of a size of their own (multi-crop)

    def __len__(self) -> int:
        return len(self.images)

    def to(self, device: Any, **keywords: Any) -> Self:
        def move(value: Any) -> Any:
            if isinstance(value, dict):
                return {name: move(entry) for name, entry in value.items()}
            return value if value is None else value.to(device, **keywords)

        return type(self)(**{field.name: move(getattr(self, field.name)) for field in fields(self)})

    def pin_memory(self) -> Self:
        def pin(value: Any) -> Any:
            if isinstance(value, dict):
                return {name: pin(entry) for name, entry in value.items()}
            return value if value is None else value.pin_memory()

        return type(self)(**{field.name: pin(getattr(self, field.name)) for field in fields(self)})


@dataclass(frozen=True, config=STRICT)
class ViewSettings:
    """`count` views per image of `size` pixels (None: the stored size), with independent geometry and
    look."""

    count: Count = 2
    size: Count | None = None
    counterfactual: CounterfactualPlan | None = None
    geometry: GeometrySettings = Field(default_factory=GeometrySettings)
    photometric: PhotometricSettings = Field(default_factory=PhotometricSettings)
    border: Literal["constant", "reflect"] = "constant"

    def __post_init__(self) -> None:
        outside = (
            [view for view in self.counterfactual.view if view >= self.count] if self.counterfactual else []
        )
        if outside:
            raise ValueError(
                f"counterfactual.view names view {outside[0]}, but the views are 0..{self.count - 1}"
            )

    def shape(self, stored: tuple[int, ...]) -> tuple[int, tuple[int, int]]:
        """Channels and (height, width) of the views of images of the shape `stored` (C, H, W)."""
        channels, height, width = stored
        return channels, (self.size or height, self.size or width)


class ViewData:
    """Step data for the training loop: `data[step]` is the list of `accumulate` ViewBatches of that step.

    Everything is a pure function of (seed, step): the order of the items (order.py), and plan, geometry and
    look, which are drawn from seeds of their own for the whole batch, so that micro-batches are the same
    views, cut. What an objective makes of them is another matter:
    one that compares the images of a batch with each other, or normalises over them, sees micro-batches only.
    """

    def __init__(
        self,
        source: ViewSource,
        settings: ViewSettings,
        batch: int,
        epochs: int,
        seed: int,
        accumulate: int = 1,
        attributes: Mapping[str, torch.Tensor] | None = None,
        categories: Sequence[str] = (),
    ) -> None:
        """`attributes`: factual values (N,) of the source's items. `categories`: of the variable that the
        view plan intervenes on. Raises `UserError` when an epoch has no full batch or the source cannot serve
        the plan."""
        if len(source) < batch:
            raise UserError(
                f"train.batch is {batch}, but only {len(source)} images can be trained on; lower train.batch."
            )
        if batch % accumulate:
            raise UserError(f"train.batch ({batch}) must be a multiple of train.accumulate ({accumulate}).")
        self.source, self.settings, self.accumulate, self.seed = source, settings, accumulate, seed
        self.order = EpochOrder(len(source), batch, epochs, seed)
        self.attributes = dict(attributes or {})
        self.plan = SlotPlan(source, settings.count, settings.counterfactual, categories)
        self.photometric = Photometric(settings.photometric)

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, step: int) -> list[ViewBatch]:
        items = self.order.items(step)
        count = self.settings.count
        height, width = self.source.shape[1:]
        slots = self.plan.draw(numpy_generator(self.seed, "plan", step), items)
        affines = sample_affines(
            numpy_generator(self.seed, "geometry", step),
            len(items) * count,
            self.settings.geometry,
            width / height,
        ).reshape(len(items), count, 2, 3)
        size = self.settings.size
        view_size = (size, size) if size else (height, width)
        stored = self.source.gather(items, slots)
        images = np.empty((len(items), count, stored.shape[2], *view_size), dtype=np.float32)
        scale = np.float32(1 / np.iinfo(stored.dtype).max)
        for position in range(len(items)):
            for view in range(count):
                # (C, H, W) integers -> (H, W, C) float32 in [0, 1]
                source_image = stored[position, view].transpose(1, 2, 0).astype(np.float32) * scale
                warped = warp(source_image, affines[position, view], view_size, self.settings.border)
                warped = warped.reshape(*view_size, -1)  # OpenCV drops a single channel
                seed = derive_seed(self.seed, "look", step, position, view)
                images[position, view] = self.photometric(warped, seed).transpose(2, 0, 1)
        valid = valid_mask(affines.reshape(-1, 2, 3), view_size, (height, width))
        whole = ViewBatch(
            images=torch.from_numpy(images),
            is_counterfactual=torch.from_numpy(slots > 0),
            slot=torch.from_numpy(slots),
            affine=torch.from_numpy(affines.astype(np.float32)),
            valid=torch.from_numpy(valid.reshape(len(items), count, *view_size)),
            attributes={name: values[torch.from_numpy(items)] for name, values in self.attributes.items()},
            row=torch.from_numpy(self.source.rows[items].astype(np.int64)),
        )
        return split(whole, self.accumulate)


def split(batch: ViewBatch, parts: int) -> list[ViewBatch]:
    """Equal micro-batches, in order."""
    if parts == 1:
        return [batch]
    size = len(batch) // parts

    def cut(value: Any, part: int) -> Any:
        if isinstance(value, dict):
            return {name: cut(entry, part) for name, entry in value.items()}
        if isinstance(value, ViewBatch):
            return split(value, parts)[part]
        return value if value is None else value[part * size : (part + 1) * size]

    names = [field.name for field in fields(batch)]
    return [type(batch)(**{name: cut(getattr(batch, name), part) for name in names}) for part in range(parts)]

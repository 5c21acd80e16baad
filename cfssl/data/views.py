"""Views: from stored images and their counterfactuals to the batches that every objective takes.

Which stored image a view shows is decided by its plan (plan.py); here every view gets its own geometry and
look.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass as plain_dataclass
from dataclasses import fields, replace
from typing import Any, Literal, Self

import numpy as np
import torch
from pydantic import Field
from pydantic.dataclasses import dataclass

from cfssl.data.augment import Photometric, PhotometricSettings, tone_curve
from cfssl.data.geometry import GeometrySettings, sample_affines, valid_mask, warp, warp_labels
from cfssl.data.order import EpochOrder
from cfssl.data.plan import CounterfactualPlan, Domain, IntensityPlan, SlotPlan, ViewSource, view_numbers
from cfssl.errors import UserError
from cfssl.seeds import derive_seed, numpy_generator
from cfssl.settings import STRICT, Count, ShareRange

REDRAWS = 10  # of a local crop that shows nothing
FLAT = 1e-6  # a smaller range of grey levels is rounding: uint16 has steps of 1.5e-5


@plain_dataclass(frozen=True)
class ViewBatch:
    """One type for every objective. B items, V views each."""

    images: torch.Tensor  # (B, V, C, H, W) float32 in [0, 1]
    is_counterfactual: torch.Tensor  # (B, V) bool
    slot: torch.Tensor  # (B, V) long: which stored image the view shows, 0 = real, k = k-th do() of the bank
    affine: torch.Tensor  # (B, V, 2, 3) float32, view -> source in normalised pixel-centre coordinates
    valid: torch.Tensor  # (B, V, H, W) bool: the pixel is made of source pixels alone
    attributes: dict[str, torch.Tensor]  # factual, (B,) each; a code of -1 is a missing value
    row: torch.Tensor  # (B,) long: row of the table
    position: tuple[int, ...]  # B places in the batch of the whole step, of which seeds are made
    labels: torch.Tensor | None = None  # (B, V, M, H, W) bool: masks of the real image, warped as the views
    confidence: torch.Tensor | None = None  # (B, M) float32 in [0, 1]: how far these masks can be trusted
    change: torch.Tensor | None = None  # (B, V, H, W) float32 in [0, 1]: stored image shown minus real one
    local: Self | None = None  # further views of the same items, of a size of their own (multi-crop)

    def __len__(self) -> int:
        return len(self.images)

    def to(self, device: Any, **keywords: Any) -> Self:
        def move(value: Any) -> Any:
            if isinstance(value, dict):
                return {name: move(entry) for name, entry in value.items()}
            return value.to(device, **keywords) if hasattr(value, "to") else value

        return type(self)(**{field.name: move(getattr(self, field.name)) for field in fields(self)})

    def pin_memory(self) -> Self:
        def pin(value: Any) -> Any:
            if isinstance(value, dict):
                return {name: pin(entry) for name, entry in value.items()}
            return value.pin_memory() if hasattr(value, "pin_memory") else value

        return type(self)(**{field.name: pin(getattr(self, field.name)) for field in fields(self)})


@dataclass(frozen=True, config=STRICT)
class LocalGeometrySettings(GeometrySettings):
    """Of smaller crops by default."""

    crop_scale: ShareRange = (0.05, 0.2)


@dataclass(frozen=True, config=STRICT)
class LocalViewSettings:
    """Multi-crop: `count` further views of `size` pixels per image, each with a geometry and look of its own.
    A crop that is constant, such as one of air alone, is drawn again, up to ten times."""

    size: Count
    count: Count = 8
    geometry: LocalGeometrySettings = Field(default_factory=LocalGeometrySettings)
    photometric: PhotometricSettings = Field(default_factory=PhotometricSettings)


@dataclass(frozen=True, config=STRICT)
class ViewSettings:
    """`count` views per image of `size` pixels (None: the stored size), with independent geometry and
    look; `local` adds smaller ones. `second_photometric`: the look of half of the `count` views, drawn per
    item, so that it does not tell which of them are counterfactual (DINO's two looks)."""

    count: Count = 2
    size: Count | None = None
    local: LocalViewSettings | None = None
    counterfactual: CounterfactualPlan | None = None
    intensity: IntensityPlan | None = None
    geometry: GeometrySettings = Field(default_factory=GeometrySettings)
    photometric: PhotometricSettings = Field(default_factory=PhotometricSettings)
    second_photometric: PhotometricSettings | None = None
    border: Literal["constant", "reflect"] = "constant"

    def __post_init__(self) -> None:
        for name in ("counterfactual", "intensity"):
            try:
                self.numbers(getattr(self, name))
            except ValueError as error:
                raise ValueError(f"{name}.{error}") from None
        if self.second_photometric is not None and self.count < 2:
            raise ValueError("second_photometric is the look of half of the views, and there is 1; drop it")

    def numbers(self, plan: CounterfactualPlan | IntensityPlan | None) -> tuple[int, ...]:
        """The numbers of the views that a plan names; the local ones follow on the global ones."""
        if plan is None:
            return ()
        return view_numbers(plan.view, plan.shared, self.count, self.local.count if self.local else 0)

    def refuse_colours(self, channels: int) -> None:
        """Raises `UserError` for looks that change the colours of images without any."""
        looks = {
            "photometric": self.photometric,
            "second_photometric": self.second_photometric,
            "local.photometric": self.local.photometric if self.local else None,
        }
        for name, look in looks.items():
            if look is not None and look.colours and channels != 3:
                raise UserError(
                    f"views.{name}.{look.colours[0]} changes colours, which needs 3 channels, but the images "
                    f"have {channels}; set it to 0."
                )

    def shape(self, stored: tuple[int, ...]) -> tuple[int, tuple[int, int]]:
        """Channels and (height, width) of the views of images of the shape `stored` (C, H, W)."""
        channels, height, width = stored
        return channels, (self.size or height, self.size or width)


class ViewData:
    """Step data for the training loop: `data[step]` is the list of `accumulate` ViewBatches of that step.

    Everything is a pure function of (seed, step): the order of the items (order.py), and plan, geometry and
    look, which are drawn from seeds of their own for the whole batch, so that micro-batches, and what several
    processes share, are the same views, cut. What an objective makes of them is another matter:
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
        domains: Mapping[Domain, int] | None = None,
        masks: Callable[[np.ndarray], np.ndarray] | None = None,
        confidence: Callable[[np.ndarray], np.ndarray] | None = None,
        changes: bool = False,
    ) -> None:
        """`attributes`: factual values (N,) of the source's items. `domains`: how many of them have each
        value of the variables that the view plan intervenes on, see `domain_counts`. `masks`: of table rows
        (n,), as (n, M, H, W) of 0 and 1; they become the labels of the global views, counterfactual or not.
        `confidence`: of these masks, as (n, M) in [0, 1].
        `changes`: the global views tell where and how much what they show differs from the real image,
        before any look, by the channel that differs most. Raises `UserError` when an epoch has no full batch
        or the source cannot serve the plan."""
        if len(source) < batch:
            raise UserError(
                f"train.batch is {batch}, but only {len(source)} images can be trained on; lower train.batch."
            )
        if batch % accumulate:
            raise UserError(f"train.batch ({batch}) must be a multiple of train.accumulate ({accumulate}).")
        self.source, self.settings, self.accumulate, self.seed = source, settings, accumulate, seed
        self.order = EpochOrder(len(source), batch, epochs, seed)
        self.positions = np.arange(batch)  # of each step's batch, which are shown
        self.attributes, self.masks, self.changes = dict(attributes or {}), masks, changes
        self.confidence = confidence
        local = settings.local
        plan, others = settings.counterfactual, local.count if local else 0
        self.plan = SlotPlan(source, settings.count, plan, domains, others)
        settings.refuse_colours(source.shape[0])
        self.kinds = [_Kind(settings, 0, settings.shape(source.shape)[1])]
        if local is not None:
            self.kinds.append(_Kind(local, settings.count, (local.size, local.size)))

    def __len__(self) -> int:
        return len(self.order)

    def share(self, rank: int, size: int) -> "ViewData":
        """What the process `rank` of `size` trains on: an equal part of every micro-batch, in order; the
        other views are not even made. Raises `UserError` where the parts would not be equal."""
        parts = size * self.accumulate
        if len(self.positions) % parts:
            raise UserError(
                f"train.batch ({len(self.positions)}) must be a multiple of train.accumulate x "
                f"hardware.devices x hardware.nodes ({parts})."
            )
        shared = copy.copy(self)
        shared.positions = self.positions.reshape(self.accumulate, size, -1)[:, rank].flatten()
        return shared

    def __getitem__(self, step: int) -> list[ViewBatch]:
        items = self.order.items(step)
        slots = self.plan.draw(numpy_generator(self.seed, "plan", step), items)  # (B, all views)
        items, slots = items[self.positions], slots[self.positions]
        # Views that show the same stored image share it.
        place = np.arange(len(items))[:, None]
        shown, where = np.unique(place * (slots.max() + 1) + slots, return_inverse=True)
        place, slot = np.divmod(shown, slots.max() + 1)
        stored = self.source.gather(items[place], slot[:, None])[:, 0]  # (n, C, H, W)
        where, highest = where.reshape(slots.shape), np.iinfo(stored.dtype).max
        curves = self._curves(step, np.arange(highest + 1) / highest)

        def image(place: int, view: int) -> np.ndarray:
            """(H, W, C) float32 in [0, 1] of the stored integers (C, H, W)."""
            levels = stored[where[place, view]].transpose(1, 2, 0)
            curve = curves.get((place, view))
            return levels.astype(np.float32) * np.float32(1 / highest) if curve is None else curve[levels]

        whole, *others = [self._cut(kind, step, items, slots, image) for kind in self.kinds]
        return split(replace(whole, local=others[0]) if others else whole, self.accumulate)

    def _curves(self, step: int, levels: np.ndarray) -> dict[tuple[int, int], np.ndarray]:
        """The value of every grey level in the views of the step that the intensity plan changes, by
        (place among the positions, view)."""
        plan, numbers = self.settings.intensity, self.settings.numbers(self.settings.intensity)
        if plan is None:
            return {}
        together = [numbers] if plan.shared else [(number,) for number in numbers]
        applied = numpy_generator(self.seed, "intensity", step).random((self.order.batch, len(together)))
        curves = {}
        for place, draw in np.argwhere(applied[self.positions] < plan.probability).tolist():
            rng = numpy_generator(self.seed, "tone", step, int(self.positions[place]), together[draw][0])
            curve = tone_curve(rng, plan.strength, levels)
            curves.update({(place, view): curve for view in together[draw]})
        return curves

    def _cut(
        self,
        kind: "_Kind",
        step: int,
        items: np.ndarray,
        slots: np.ndarray,
        image: Callable[[int, int], np.ndarray],
    ) -> ViewBatch:
        """The views of one size; `image(place, view)` is what a view is cut from."""
        channels, height, width = self.source.shape
        geometry, border = kind.settings.geometry, self.settings.border
        rng = numpy_generator(self.seed, "local geometry" if kind.is_local else "geometry", step)
        affines = sample_affines(rng, self.order.batch * kind.count, geometry, width / height)
        affines = affines.reshape(self.order.batch, kind.count, 2, 3)[self.positions]
        looks = kind.draw_looks(numpy_generator(self.seed, "looks", step), self.order.batch)
        images = np.empty((len(items), kind.count, channels, *kind.size), dtype=np.float32)
        for place, position in enumerate(self.positions.tolist()):
            for number, view in enumerate(kind.numbers):
                source = image(place, view)
                warped = warp(source, affines[place, number], kind.size, border)
                for attempt in range(REDRAWS if kind.is_local else 0):
                    if not is_constant(warped, affines[place, number], (height, width)):
                        break
                    rng = numpy_generator(self.seed, "redraw", step, position, view, attempt)
                    affines[place, number] = sample_affines(rng, 1, geometry, width / height)[0]
                    warped = warp(source, affines[place, number], kind.size, border)
                warped = warped.reshape(*kind.size, -1)  # OpenCV drops a single channel
                seed = derive_seed(self.seed, "look", step, position, view)
                images[place, number] = looks[position][number](warped, seed).transpose(2, 0, 1)
        labels = None
        if self.masks is not None and not kind.is_local:
            masks = self.masks(self.source.rows[items])
            warped_masks = [
                [warp_labels(own, affine, kind.size) for affine in views]
                for own, views in zip(masks, affines, strict=True)
            ]
            labels = torch.from_numpy(np.array(warped_masks) > 0)
        confidence = None
        if self.confidence is not None and not kind.is_local:
            confidence = torch.from_numpy(self.confidence(self.source.rows[items]))
        change = None
        if self.changes and not kind.is_local:
            change = torch.from_numpy(self._change(items, slots[:, kind.numbers], affines, kind.size))
        valid = valid_mask(affines.reshape(-1, 2, 3), kind.size, (height, width))
        chosen = torch.from_numpy(slots[:, kind.numbers])
        return ViewBatch(
            images=torch.from_numpy(images),
            is_counterfactual=chosen > 0,
            slot=chosen,
            affine=torch.from_numpy(affines.astype(np.float32)),
            valid=torch.from_numpy(valid.reshape(images.shape[:2] + kind.size)),
            attributes={name: values[torch.from_numpy(items)] for name, values in self.attributes.items()},
            row=torch.from_numpy(self.source.rows[items].astype(np.int64)),
            position=tuple(self.positions.tolist()),
            labels=labels,
            confidence=confidence,
            change=change,
        )

    def _change(
        self, items: np.ndarray, slots: np.ndarray, affines: np.ndarray, size: tuple[int, int]
    ) -> np.ndarray:
        """(B, V, h, w) float32 in [0, 1] for slots (B, V) of items (B,) seen through affines (B, V, 2, 3)."""
        stored = self.source.gather(items, np.hstack([np.zeros_like(slots[:, :1]), slots]))
        levels = stored.astype(np.float32) / np.iinfo(stored.dtype).max
        differences = np.abs(levels[:, 1:] - levels[:, :1]).max(axis=2)  # (B, V, H, W)
        return np.array(
            [
                [warp(view, affine, size) for view, affine in zip(*own, strict=True)]
                for own in zip(differences, affines, strict=True)
            ]
        )


class _Kind:
    """Views of one size: the global ones, or the local ones, which are numbered from `first`."""

    def __init__(self, settings: ViewSettings | LocalViewSettings, first: int, size: tuple[int, int]) -> None:
        self.settings, self.size, self.is_local = settings, size, first > 0
        self.count, self.numbers = settings.count, list(range(first, first + settings.count))
        second = settings.second_photometric if isinstance(settings, ViewSettings) else None
        self.look = Photometric(settings.photometric)
        self.second_look = self.look if second is None else Photometric(second)

    def draw_looks(self, rng: np.random.Generator, items: int) -> list[list[Photometric]]:
        """Of every view of every item: half of them have the second look, of two a fair coin says which."""
        is_second = rng.random((items, self.count)).argsort(axis=1) < self.count // 2
        return [[self.second_look if second else self.look for second in item] for item in is_second]


def is_constant(view: np.ndarray, affine: np.ndarray, source_size: tuple[int, int]) -> bool:
    """Whether a view (H, W) or (H, W, C) shows one grey level where it shows the source at all."""
    shown = view[valid_mask(affine[None], view.shape[:2], source_size)[0]]
    return len(shown) == 0 or np.ptp(shown, axis=0).max() <= FLAT


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

"""Views: from stored images and their counterfactuals to the batches that every objective takes.

Which view is counterfactual is decided here, by a view plan, and never inside an objective. With domain
labels 0..D-1 and a uniform target this gives the pairs of counterfactual contrastive learning (Roschewitz et
al. 2024, 2025):

| method    | plan                                      | view 0               | view 1               |
|-----------|-------------------------------------------|----------------------|----------------------|
| SimCLR    | none                                      | real                 | the same real image  |
| CF-SimCLR | view: [1], probability p                  | real, always         | counterfactual w.p. p|
| SimCLR+   | view: [0, 1], shared: true, probability p | counterfactual w.p. p| the same as view 0   |

p = 1 - 1/D with a uniform target makes the marginal domain of the counterfactual view uniform ("balanced").
D counts the categories of the attribute, and the bank has to hold all of them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass as plain_dataclass
from dataclasses import fields
from typing import Annotated, Any, Literal, Protocol, Self

import numpy as np
import torch
from pydantic import BeforeValidator, Field
from pydantic.dataclasses import dataclass

from cfssl.data.augment import Photometric, PhotometricSettings
from cfssl.data.geometry import GeometrySettings, sample_affines, valid_mask, warp
from cfssl.errors import UserError
from cfssl.seeds import derive_seed, numpy_generator
from cfssl.settings import STRICT, Count, NonNegative, Probability


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

    def __len__(self) -> int:
        return len(self.images)

    def to(self, device: Any, **keywords: Any) -> Self:
        def move(value: Any) -> Any:
            if isinstance(value, dict):
                return {name: move(entry) for name, entry in value.items()}
            return value.to(device, **keywords) if isinstance(value, torch.Tensor) else value

        return type(self)(**{field.name: move(getattr(self, field.name)) for field in fields(self)})

    def pin_memory(self) -> Self:
        def pin(value: Any) -> Any:
            if isinstance(value, dict):
                return {name: pin(entry) for name, entry in value.items()}
            return value.pin_memory() if isinstance(value, torch.Tensor) else value

        return type(self)(**{field.name: pin(getattr(self, field.name)) for field in fields(self)})


def _as_tuple(value: Any) -> Any:
    return (value,) if isinstance(value, int) and not isinstance(value, bool) else value


@dataclass(frozen=True, config=STRICT)
class CounterfactualPlan:
    """`variable`: the attribute intervened on. `view`: which views are counterfactual. `probability`: of
    being so, or "balanced" = 1 - 1/D for a uniform target. `target`: "uniform" over the other values, or
    weights by value (own value excluded, renormalised). `shared`: all named views show the same image
    (SimCLR+); otherwise each draws its own target."""

    variable: str
    view: Annotated[tuple[Annotated[int, Field(ge=0)], ...], BeforeValidator(_as_tuple)] = (1,)
    probability: Probability | Literal["balanced"] = "balanced"
    target: Literal["uniform"] | dict[str, NonNegative] = "uniform"
    shared: bool = False

    def __post_init__(self) -> None:
        if not self.view or len(set(self.view)) < len(self.view):
            raise ValueError(f"view is {list(self.view)}; name at least one view, and each once")
        if self.shared and len(self.view) == 1:
            raise ValueError(f"shared acts on several views, and view names {self.view[0]} alone")
        if self.target == "uniform":
            return
        if not any(self.target.values()):
            raise ValueError(f"target is {self.target}; give at least one value a weight above 0")
        if self.probability == "balanced":
            raise ValueError(
                "probability balanced makes the domains uniform, and target weights do not; give it a number"
            )

    def chance(self, held: Sequence[str], categories: Sequence[str]) -> float:
        """p, given the values of the variable that the bank holds and the categories of the attribute.

        Raises `UserError` for target values that the bank does not hold, and for "balanced" unless it holds
        every category.
        """
        unknown = [] if self.target == "uniform" else sorted(set(self.target) - set(held))
        if unknown:
            raise UserError(
                f"views.counterfactual.target names {unknown}, but the bank's values of {self.variable} are "
                f"{sorted(held)}; correct it or add them to bank.do."
            )
        if self.probability != "balanced":
            return self.probability
        if not categories or set(held) != set(categories):
            found = f"its categories are {list(categories)}" if categories else "it has no categories"
            raise UserError(
                "views.counterfactual.probability is balanced, which needs every category of "
                f"{self.variable} in the bank; the bank holds {sorted(held)} and {found}. Set bank.do: "
                f"{{{self.variable}: all}}, or give probability a number."
            )
        return 1 - 1 / len(categories)


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


class ViewSource(Protocol):
    """What the views are cut from: a bank. Slot 0 of an item is its real image, slot k its k-th
    counterfactual."""

    @property
    def rows(self) -> np.ndarray:
        """(N,) table rows."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """(C, H, W) of one image."""
        ...

    @property
    def views(self) -> Sequence[Mapping[str, Any]]:
        """The do() of slots 1..K."""
        ...

    @property
    def available(self) -> np.ndarray:
        """(N, 1 + K) bool."""
        ...

    def __len__(self) -> int: ...

    def gather(self, items: np.ndarray, slots: np.ndarray) -> np.ndarray:
        """(n, V, C, H, W) for items (n,) and slots (n, V), integers."""
        ...


class SlotPlan:
    """The stored image that each view shows, drawn by a `CounterfactualPlan`; all real without one."""

    def __init__(
        self,
        source: ViewSource,
        views: int,
        plan: CounterfactualPlan | None,
        categories: Sequence[str] = (),
    ) -> None:
        """`categories`: of the plan's variable. Raises `UserError` when the source cannot serve the plan."""
        self.views, self.plan = views, plan
        if plan is None:
            return
        values = {
            slot: str(view[plan.variable])
            for slot, view in enumerate(source.views, 1)
            if set(view) == {plan.variable}
        }
        if not values:
            raise UserError(
                f"The view plan intervenes on {plan.variable!r}, but the bank holds "
                f"{[dict(view) for view in source.views] or 'real images only'}; add {plan.variable!r} to "
                "bank.do."
            )
        self.slots = np.array(list(values))
        self.probability = plan.chance(list(values.values()), categories)
        # (N, K'): weight of every available target; a row's own value is not available as a counterfactual.
        weights = [
            1.0 if plan.target == "uniform" else plan.target.get(value, 0.0) for value in values.values()
        ]
        self.weights = source.available[:, self.slots] * np.array(weights)

    def draw(self, rng: np.random.Generator, items: np.ndarray) -> np.ndarray:
        """Slots (B, V) of the items; an item without any available target shows its real image."""
        slots = np.zeros((len(items), self.views), dtype=np.int64)
        if self.plan is None:
            return slots
        draws = 1 if self.plan.shared else len(self.plan.view)
        applied = rng.random((len(items), draws)) < self.probability
        point = rng.random((len(items), draws))
        cumulative = np.cumsum(self.weights[items], axis=1)
        total = cumulative[:, -1:]
        chosen = (
            (point[:, :, None] * total[:, None] >= cumulative[:, None, :])
            .sum(axis=2)
            .clip(max=len(self.slots) - 1)
        )
        drawn = np.where(applied & (total > 0), self.slots[chosen], 0)
        slots[:, list(self.plan.view)] = drawn
        return slots


class ViewData:
    """Step data for the training loop: `data[step]` is the list of `accumulate` ViewBatches of that step.

    Everything is a pure function of (seed, step): each epoch is a seeded permutation cut into full batches
    (the remainder is left out), and plan, geometry and look are drawn from seeds of their own for the whole
    batch, so that micro-batches are the same views, cut. What an objective makes of them is another matter:
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
        self.source, self.settings, self.batch, self.accumulate = source, settings, batch, accumulate
        self.epochs, self.seed = epochs, seed
        self.attributes = dict(attributes or {})
        self.plan = SlotPlan(source, settings.count, settings.counterfactual, categories)
        self.photometric = Photometric(settings.photometric)
        self.steps_per_epoch = len(source) // batch
        self._epoch: tuple[int, np.ndarray] | None = None

    def __len__(self) -> int:
        return self.steps_per_epoch * self.epochs

    def items(self, step: int) -> np.ndarray:
        """The items (batch,) of a step."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = epoch, numpy_generator(self.seed, "epoch", epoch).permutation(len(self.source))
        return self._epoch[1][place * self.batch : (place + 1) * self.batch]

    def __getitem__(self, step: int) -> list[ViewBatch]:
        items = self.items(step)
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
        return value[part * size : (part + 1) * size] if isinstance(value, torch.Tensor) else value

    names = [field.name for field in fields(batch)]
    return [type(batch)(**{name: cut(getattr(batch, name), part) for name in names}) for part in range(parts)]

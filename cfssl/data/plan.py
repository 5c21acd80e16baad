"""View plans: which stored image each view shows, real or counterfactual.

This is decided here and never inside an objective. Views are numbered, the global ones first, then the local
crops of multi-crop methods. With domain labels 0..D-1 and a uniform target, counterfactual contrastive
learning (Roschewitz et al. 2024, 2025) and its controls are

| method                | `views.counterfactual`                       | image A       | image B       |
|-----------------------|----------------------------------------------|---------------|---------------|
| SimCLR, DINO          | none                                         | real          | the same      |
| CF-SimCLR             | {variable: scanner}                          | real          | cf, chance p  |
| CF-DINO               | {variable: scanner, shared: true}            | real          | cf, chance p  |
| SimCLR+, DINO+        | {variable: scanner, view: all, shared: true} | cf, chance p  | the same      |
| CF-SimCLR on PadChest | {variable: scanner, probability: 1}          | real          | cf            |
| random intensity      | none, but `intensity: {probability: p}`      | real          | curve, chance |
|                       | (with `shared: true` for DINO)               |               | p             |

The first half of the global and of the local views shows A, the second half B: `view: second_half`, the
default, is view 1 of 2, and with 2 global and 8 local views 1, 6, 7, 8 and 9. `shared` makes all of them show
the one image B. The control "random intensity" asks whether counterfactuals do more than any change of
intensity would: B is the real image, seen through a random tone curve that knows no scanner.

p = 1 - 1/D with a uniform target makes the marginal domain of the counterfactual view uniform ("balanced").
D counts the categories of the attribute, of several attributes their combinations, and the bank has to hold
all of them.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Protocol

import numpy as np
from pydantic import BeforeValidator, Discriminator, Field, Tag
from pydantic.dataclasses import dataclass

from cfssl.errors import UserError
from cfssl.settings import STRICT, NonNegative, Probability, Share

Domain = tuple[str, ...]  # one value of each variable of a plan


def _as_tuple(value: Any) -> Any:
    return (value,) if isinstance(value, int) and not isinstance(value, bool) else value


Numbers = Annotated[
    tuple[Annotated[int, Field(ge=0)], ...],
    BeforeValidator(_as_tuple, json_schema_input_type=int | tuple[int, ...]),
]
Views = Annotated[
    Annotated[Literal["second_half", "all"], Tag("a word")] | Annotated[Numbers, Tag("numbers")],
    Discriminator(lambda value: "a word" if isinstance(value, str) else "numbers"),
]


@dataclass(frozen=True, config=STRICT)
class CounterfactualPlan:
    """`variable`: the attribute intervened on. `view`: which views are counterfactual, by their numbers, or
    "second_half" of the global and of the local ones, or "all". `probability`: of being so, or "balanced" =
    1 - 1/D for a uniform target. `target`: "uniform" over the other values, or weights by value (own value
    excluded, renormalised). `shared`: all named views show the same image; otherwise each draws its own
    target."""

    variable: str
    view: Views = "second_half"
    probability: Probability | Literal["balanced"] = "balanced"
    target: Literal["uniform"] | dict[str, NonNegative] = "uniform"
    shared: bool = False

    def __post_init__(self) -> None:
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
class IntensityPlan:
    """Which views show their image through a random tone curve (augment.py), before their own look; see the
    table. `probability`: of doing so. `view`: as of a counterfactual plan. `strength`: by how much of the
    range the curve moves at most. `shared`: one curve for all named views of an item."""

    probability: Probability
    view: Views = "second_half"
    strength: Share = 0.25
    shared: bool = False


def view_numbers(view: Views, shared: bool, count: int, local: int = 0) -> tuple[int, ...]:
    """The numbers of the views that a plan names, in its order, among `count` global views and `local` ones
    after them.

    Raises `ValueError` for views that are not there or named twice, for halves of odd numbers, and for one
    view that shares its image with no other.
    """
    if view == "second_half":
        if count % 2 or local % 2:
            views = f"{count} views" + (f" and {local} local ones" if local else "")
            raise ValueError(f"view is second_half, but there are {views}; make them even or number them")
        chosen = (*range(count // 2, count), *range(count + local // 2, count + local))
    else:
        chosen = tuple(range(count + local)) if view == "all" else tuple(view)
    if not chosen or len(set(chosen)) < len(chosen):
        raise ValueError(f"view is {list(chosen)}; name at least one view, and each once")
    if outside := [number for number in chosen if number >= count + local]:
        raise ValueError(f"view names view {outside[0]}, but the views are 0..{count + local - 1}")
    if shared and len(chosen) == 1:
        raise ValueError(f"shared acts on several views, and view names {chosen[0]} alone")
    return chosen


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
        count: int,
        plan: CounterfactualPlan | None,
        categories: Sequence[str] = (),
        local: int = 0,
    ) -> None:
        """Of `count` global views and `local` ones after them. `categories`: of the plan's variable. Raises
        `UserError` when the source cannot serve the plan."""
        self.views = count + local
        self.named: list[list[int]] = []  # views that are drawn together
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
        self.shared, self.slots = plan.shared, np.array(list(values))
        self.probability = plan.chance(list(values.values()), categories)
        # (N, K'): weight of every available target; a row's own value is not available as a counterfactual.
        weights = [
            1.0 if plan.target == "uniform" else plan.target.get(value, 0.0) for value in values.values()
        ]
        self.weights = source.available[:, self.slots] * np.array(weights)
        numbers = view_numbers(plan.view, plan.shared, count, local)
        # Local views draw after the global ones, so that these are the same with and without them.
        kinds = [[number for number in numbers if (number >= count) == is_local] for is_local in (0, 1)]
        self.named = [list(numbers)] if plan.shared else [kind for kind in kinds if kind]

    def draw(self, rng: np.random.Generator, items: np.ndarray) -> np.ndarray:
        """Slots (B, V) of the items; an item without any available target shows its real image."""
        slots = np.zeros((len(items), self.views), dtype=np.int64)
        for named in self.named:
            slots[:, named] = self._drawn(rng, items, 1 if self.shared else len(named))
        return slots

    def _drawn(self, rng: np.random.Generator, items: np.ndarray, draws: int) -> np.ndarray:
        """Slots (B, draws), each drawn for itself."""
        applied = rng.random((len(items), draws)) < self.probability
        point = rng.random((len(items), draws))
        cumulative = np.cumsum(self.weights[items], axis=1)
        total = cumulative[:, -1:]
        chosen = (
            (point[:, :, None] * total[:, None] >= cumulative[:, None, :])
            .sum(axis=2)
            .clip(max=len(self.slots) - 1)
        )
        return np.where(applied & (total > 0), self.slots[chosen], 0)

"""View plans: which stored image each view shows, real or counterfactual.

This is decided here and never inside an objective. With domain labels 0..D-1 and a uniform target it gives
the pairs of counterfactual contrastive learning (Roschewitz et al. 2024, 2025):

| method    | plan                                      | view 0               | view 1               |
|-----------|-------------------------------------------|----------------------|----------------------|
| SimCLR    | none                                      | real                 | the same real image  |
| CF-SimCLR | view: [1], probability p                  | real, always         | counterfactual w.p. p|
| SimCLR+   | view: [0, 1], shared: true, probability p | counterfactual w.p. p| the same as view 0   |

p = 1 - 1/D with a uniform target makes the marginal domain of the counterfactual view uniform ("balanced").
D counts the categories of the attribute, and the bank has to hold all of them.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Protocol

import numpy as np
from pydantic import BeforeValidator, Field
from pydantic.dataclasses import dataclass

from cfssl.errors import UserError
from cfssl.settings import STRICT, NonNegative, Probability


def _as_tuple(value: Any) -> Any:
    return (value,) if isinstance(value, int) and not isinstance(value, bool) else value


@dataclass(frozen=True, config=STRICT)
class CounterfactualPlan:
    """`variable`: the attribute intervened on. `view`: which views are counterfactual. `probability`: of
    being so, or "balanced" = 1 - 1/D for a uniform target. `target`: "uniform" over the other values, or
    weights by value (own value excluded, renormalised). `shared`: all named views show the same image
    (SimCLR+); otherwise each draws its own target."""

    variable: str
    view: Annotated[
        tuple[Annotated[int, Field(ge=0)], ...],
        BeforeValidator(_as_tuple, json_schema_input_type=int | tuple[int, ...]),
    ] = (1,)
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

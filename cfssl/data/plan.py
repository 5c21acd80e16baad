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
D counts the categories of the attribute, of several attributes that are set together (`variable: [scanner,
sex]`) their combinations, and the bank has to hold all of them.

Dense methods (Lafargue-Hauret et al. 2026) show the real image in view 0 and each of its counterfactuals
once in the others: `{view: [1, 2, 3], distinct: true, probability: 1, variable: null}`, where null stands for
every do() of the bank, there of the scanner, the disease and both. With two views, `{variable: null,
probability: 1}` shows one of them at random, and there are as many views as without counterfactuals.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Protocol

import numpy as np
from pydantic import BeforeValidator, Discriminator, Field, Tag
from pydantic.dataclasses import dataclass

from cfssl.data.table import ImageTable
from cfssl.errors import UserError
from cfssl.settings import STRICT, NonNegative, Probability, Share

Domain = tuple[str, ...]  # a value of each variable of a plan


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
    """`variable`: the attribute intervened on, several that are set together, or null for every do() of the
    bank. `view`: which views are counterfactual, by their numbers, or "second_half" of the global and of the
    local ones, or "all".
    `probability`: of being so, or "balanced" = 1 - 1/D for a uniform target. `target`: "uniform" over the
    other values; "rare", by 1 / (number of training rows with the value); or weights by value, of several
    variables by variable and value, which are multiplied. The own value is always excluded, the rest
    renormalised. `shared`: all named views show the same image; otherwise each draws its own target, and with
    `distinct` one that no other view of its size has: where an item has fewer than views, the last show
    its real image."""

    variable: str | Annotated[tuple[str, ...], Field(min_length=1)] | None
    view: Views = "second_half"
    probability: Probability | Literal["balanced"] = "balanced"
    target: Literal["uniform", "rare"] | dict[str, NonNegative | dict[str, NonNegative]] = "uniform"
    shared: bool = False
    distinct: bool = False

    def __post_init__(self) -> None:
        if self.shared and self.distinct:
            raise ValueError("shared shows one image in all views and distinct another in each; choose one")
        if self.variable is None and (self.target != "uniform" or self.probability == "balanced"):
            raise ValueError(
                "variable is null, which knows no values to weigh or to balance; leave target uniform and "
                "give probability a number"
            )
        if len(set(self.variables)) < len(self.variables):
            raise ValueError(f"variable is {list(self.variables)}; name each once")
        if self.target == "uniform":
            return
        if self.target != "rare":
            self._refuse_weights(self.target)
        if self.probability == "balanced":
            raise ValueError(
                "probability balanced makes the domains uniform, and target weights do not; give it a number"
            )

    def _refuse_weights(self, target: Mapping[str, Any]) -> None:
        joint = not isinstance(self.variable, str)
        if any(isinstance(weight, dict) != joint for weight in target.values()):
            form = f"{{{self.variables[0]}: {{A: 1.0}}}}" if joint else "{A: 1.0}"
            raise ValueError(f"target is {target}; write weights as {form} for variable {self.variable!r}")
        if strangers := sorted(set(target) - set(self.variables)) if joint else []:
            raise ValueError(f"target weighs {strangers}, but variable is {list(self.variables)}")
        if not target or not all(any(weights.values()) for weights in self.weights.values()):
            raise ValueError(f"target is {target}; give at least one value a weight above 0")

    @property
    def variables(self) -> tuple[str, ...]:
        """What is set together; nothing where it is every do() of the bank."""
        return (self.variable,) if isinstance(self.variable, str) else self.variable or ()

    @property
    def weights(self) -> Mapping[str, Mapping[str, float]]:
        """Of the values of each variable that has them."""
        target: Any = {} if isinstance(self.target, str) else self.target
        return {self.variable: target} if target and isinstance(self.variable, str) else target

    def held(self, views: Sequence[Mapping[str, Any]]) -> dict[int, Domain]:
        """The domain of each slot whose do() sets the variables of this plan and no others; `views`: the
        do()s of slots 1..K.

        Raises `UserError` when there is none.
        """
        if self.variable is None:
            if not views:
                raise UserError(
                    "The view plan shows every do() of the bank, which holds real images only; name what to "
                    "intervene on in bank.do, or set views.counterfactual: null."
                )
            return {slot: tuple(map(str, view.values())) for slot, view in enumerate(views, 1)}
        found = {
            slot: tuple(str(view[name]) for name in self.variables)
            for slot, view in enumerate(views, 1)
            if set(view) == set(self.variables)
        }
        if not found:
            names = ", ".join(map(repr, self.variables))
            together = " together" if len(self.variables) > 1 else ""
            raise UserError(
                f"The view plan intervenes on {names}{together}, but the bank holds "
                f"{[dict(view) for view in views] or 'real images only'}; add {names} to bank.do{together}."
            )
        return found

    def chance(self, held: Sequence[Domain], domains: Mapping[Domain, int]) -> float:
        """p, given the domains that the bank holds, and all there are (`domain_counts`).

        Raises `UserError` for "balanced" unless the bank holds every domain.
        """
        if self.probability != "balanced":
            return self.probability
        if not domains or set(held) != set(domains):
            categories = f"its categories are {_shown(domains)}" if domains else "it has no categories"
            each = ", ".join(f"{name}: all" for name in self.variables)
            do = f"{{{each}}}" if isinstance(self.variable, str) else f"[{{{each}}}]"
            raise UserError(
                "views.counterfactual.probability is balanced, which needs every category of "
                f"{' and '.join(self.variables)} in the bank; the bank holds {_shown(sorted(held))} and "
                f"{categories}. Set bank.do: {do}, or give probability a number."
            )
        return 1 - 1 / len(domains)

    def target_weights(self, held: Sequence[Domain], domains: Mapping[Domain, int]) -> np.ndarray:
        """How often each of the domains `held` is the target, as relative weights (K',) for an image that
        could take all. A domain that no row has counts as if one row had it.

        Raises `UserError` for values that the bank does not hold, and where "rare" has nothing to count.
        """
        if self.variable is None:
            return np.ones(len(held))
        if self.target == "rare":
            if not domains:
                raise UserError(
                    "views.counterfactual.target is rare, which counts the rows of each category, and "
                    f"{' and '.join(self.variables)} has none; write uniform or weights."
                )
            return np.array([1 / max(domains[domain], 1) for domain in held])
        for place, (name, weights) in enumerate((name, self.weights.get(name)) for name in self.variables):
            values = {domain[place] for domain in held}
            if unknown := sorted(set(weights or ()) - values):
                raise UserError(
                    f"views.counterfactual.target names {unknown}, but the bank's values of {name} are "
                    f"{sorted(values)}; correct it or add them to bank.do."
                )
        found = [
            math.prod(
                self.weights[name].get(value, 0.0)
                for name, value in zip(self.variables, domain, strict=True)
                if name in self.weights
            )
            for domain in held
        ]
        if not any(found):
            raise UserError(
                f"views.counterfactual.target gives none of the bank's {_shown(held)} a weight above 0; "
                "correct it or add to bank.do."
            )
        return np.array(found, dtype=np.float64)


def domain_counts(table: ImageTable, variables: Sequence[str], rows: np.ndarray) -> dict[Domain, int]:
    """How many of `rows` have each combination of categories of the variables, 0 for those that none has;
    nothing where one of them is continuous or there is none."""
    categories = [table.attributes[name].categories for name in variables]
    if not categories or not all(categories):
        return {}
    counts = dict.fromkeys(itertools.product(*categories), 0)
    known = table.frame[list(variables)].iloc[rows].dropna()
    for values, count in known.value_counts(sort=False).items():
        assert isinstance(values, tuple)
        counts[tuple(map(str, values))] += count
    return counts


def _shown(domains: Sequence[Domain] | Mapping[Domain, int]) -> list[str]:
    return [", ".join(domain) for domain in domains]


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
        domains: Mapping[Domain, int] | None = None,
        local: int = 0,
    ) -> None:
        """Of `count` global views and `local` ones after them. `domains`: see `domain_counts`, of the plan's
        variables. Raises `UserError` when the source cannot serve the plan."""
        self.views = count + local
        self.named: list[list[int]] = []  # views that are drawn together
        if plan is None:
            return
        held = plan.held(source.views)
        self.shared, self.distinct, self.slots = plan.shared, plan.distinct, np.array(list(held))
        self.probability = plan.chance(list(held.values()), domains or {})
        self.available = source.available
        self.target_weights = plan.target_weights(list(held.values()), domains or {})
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

    def _weights(self, items: np.ndarray) -> np.ndarray:
        """Of every target, (B, K'); a row's own value is not available as a counterfactual. Not kept for all
        items, of which there may be very many."""
        return self.available[items[:, None], self.slots] * self.target_weights

    def _drawn(self, rng: np.random.Generator, items: np.ndarray, draws: int) -> np.ndarray:
        """Slots (B, draws), each drawn for itself, or the first of them all where they are distinct."""
        applied = rng.random((len(items), draws)) < self.probability
        if self.distinct:
            return np.where(applied, self._without_replacement(rng, items, draws), 0)
        point = rng.random((len(items), draws))
        cumulative = np.cumsum(self._weights(items), axis=1)
        total = cumulative[:, -1:]
        chosen = (
            (point[:, :, None] * total[:, None] >= cumulative[:, None, :])
            .sum(axis=2)
            .clip(max=len(self.slots) - 1)
        )
        return np.where(applied & (total > 0), self.slots[chosen], 0)

    def _without_replacement(self, rng: np.random.Generator, items: np.ndarray, draws: int) -> np.ndarray:
        """Slots (B, draws), no counterfactual twice, 0 when there are no more: the order of exponential times
        with these rates is that of weighted draws without replacement."""
        weights = self._weights(items)
        times = np.full(weights.shape, np.inf)
        np.divide(rng.standard_exponential(weights.shape), weights, out=times, where=weights > 0)
        order = np.argsort(times, axis=1)[:, :draws]
        found = np.zeros((len(items), draws), dtype=np.int64)
        is_available = np.isfinite(np.take_along_axis(times, order, axis=1))
        found[:, : order.shape[1]] = np.where(is_available, self.slots[order], 0)
        return found

"""What every generator is, and Pearl's three steps in terms of it: abduct, act, predict (Pearl 2009, section
7.1).

Enters: images with their factual parents, and an intervention. Leaves: counterfactual images with their
counterfactual parents. The attribute side of the model decides what an intervention changes besides the
intervened variables; the generator only ever sees parents that are already propagated.
"""

from collections.abc import Mapping
from typing import Protocol

import numpy as np
import torch

from cfssl.data.table import Attribute, Attributes, ImageTable
from cfssl.engine.run import Run
from cfssl.errors import UserError
from cfssl.scm.graph import CausalGraph
from cfssl.scm.model import StructuralCausalModel

Exogenous = dict[
    str, torch.Tensor
]  # what abduction returns; the batch is the first dimension of every tensor


class Generator(Protocol):
    """An image mechanism x = f(u, pa) that can be inverted. A null intervention goes through the same code as
    any other."""

    @property
    def graph(self) -> CausalGraph:
        """Of the attributes; its image parents are what `predict` looks at."""
        ...

    @property
    def scm(self) -> StructuralCausalModel | None:
        """The attribute side, on the CPU; None where no do() has descendants."""
        ...

    @property
    def fingerprint(self) -> str:
        """Of the fitted weights, the settings and the code. Raises UserError before `fit` or `load`."""
        ...

    def fit(self, table: ImageTable, run: Run) -> None:
        """Learns from the training split of `table`; writes its log and checkpoints into `run.folder`."""
        ...

    def abduct(self, x: torch.Tensor, pa: Attributes) -> Exogenous:
        """x (B, C, H, W) float32 in [-1, 1] with its factual parents -> the exogenous variables of each
        image."""
        ...

    def predict(self, u: Exogenous, pa_cf: Attributes) -> torch.Tensor:
        """The images (B, C, H, W) float32 in [-1, 1] that `u` would have been under the parents `pa_cf`."""
        ...


def counterfactual(
    generator: Generator,
    x: torch.Tensor,
    pa: Attributes,
    do: Mapping[str, torch.Tensor],
    rng: torch.Generator,
) -> tuple[torch.Tensor, Attributes]:
    """The image and the attributes that would have been, had `do` been the case.

    x (B, C, H, W) float32 in [-1, 1]; `pa` holds every variable of the graph, (B,) each, on the device of x;
    `do` maps variables to values (B,). `rng` serves the abduction of the attributes. Returns x* of the same
    shape and range, and pa*.
    """
    u = generator.abduct(x, pa)
    pa_cf = counterfactual_attributes(generator, pa, do, rng)
    return generator.predict(u, pa_cf), pa_cf


def counterfactual_attributes(
    generator: Generator, pa: Attributes, do: Mapping[str, torch.Tensor], rng: torch.Generator
) -> Attributes:
    """pa* (B,) each: `do` and what follows from it; invariant attributes are the very tensors that came in.

    Raises UserError when the intervention has descendants and the generator has no model of them.
    """
    affected = generator.graph.affected(do)
    if affected == set(do):  # nothing descends from the intervened variables: acting is all there is to do
        changed = {name: value.to(pa[name]).expand_as(pa[name]) for name, value in do.items()}
    elif generator.scm is not None:
        changed = generator.scm.counterfactual(pa, do, rng)
    else:
        raise UserError(
            f"do({', '.join(sorted(do))}) also changes {', '.join(sorted(affected - set(do)))}, but the "
            "generator has no model of the attributes to predict these with; give it one, or remove their "
            "edges from the graph."
        )
    return {name: changed[name] if name in affected else value for name, value in pa.items()}


def intervention(
    do: Mapping[str, str | float], attributes: Mapping[str, Attribute], count: int
) -> dict[str, torch.Tensor]:
    """`{"scanner": "B"}` as tensors (count,): codes (long) of categories, float32 for continuous attributes.

    Raises UserError for an unknown attribute, an unknown category, or a value that is not a finite number.
    """
    return {name: torch.full((count,), _code(value, name, attributes)) for name, value in do.items()}


def _code(value: str | float, name: str, attributes: Mapping[str, Attribute]) -> int | float:
    if name not in attributes:
        raise UserError(
            f"do() names {name!r}, expected an attribute of the table: {', '.join(sorted(attributes))}; "
            "correct it."
        )
    attribute = attributes[name]
    if attribute.kind == "continuous":
        if isinstance(value, str) or not np.isfinite(value):
            raise UserError(
                f"do({name}={value!r}) sets a continuous attribute, expected a finite number; write e.g. "
                f"{name}: [60.0]."
            )
        return float(value)
    if value not in attribute.categories:
        raise UserError(
            f"do({name}={value!r}) names no category of {name}, expected one of "
            f"{', '.join(map(repr, attribute.categories))}; correct it or put the value in quotes."
        )
    return attribute.categories.index(str(value))


def to_signed(stored: np.ndarray) -> torch.Tensor:
    """Stored pixels, uint8 or uint16, any shape -> float32 in [-1, 1]."""
    return torch.from_numpy(stored.astype(np.float32) / _half_range(stored.dtype) - 1)


def to_stored(x: torch.Tensor, dtype: np.dtype) -> np.ndarray:
    """Float images in [-1, 1] -> stored pixels: clipped and rounded to the nearest level, so that `to_stored`
    inverts `to_signed`.

    Truncation would make every counterfactual half a level darker than its real image, which an encoder can
    see. Not for NaN.
    """
    levels = (x.detach().cpu().numpy().astype(np.float32) + 1) * _half_range(dtype)
    return np.rint(levels).clip(0, np.iinfo(dtype).max).astype(dtype)


def _half_range(dtype: np.dtype) -> np.float32:
    return np.float32(np.iinfo(dtype).max / 2)

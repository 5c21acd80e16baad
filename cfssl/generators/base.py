"""What every generator is, and Pearl's three steps in terms of it: abduct, act, predict (Pearl 2009, section
7.1).

Enters: images with their factual parents, and an intervention. Leaves: counterfactual images with their
counterfactual parents. `act` decides what an intervention changes besides the intervened variables; `predict`
only ever sees parents that are already propagated.
"""

from collections.abc import Mapping
from typing import Protocol

import numpy as np
import torch

from cfssl.data.table import Attribute, Attributes, ImageTable
from cfssl.engine.run import Run
from cfssl.errors import UserError
from cfssl.scm.graph import CausalGraph
from cfssl.scm.mechanisms import Randomness
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

    def act(
        self, u: Exogenous, pa: Attributes, do: Mapping[str, torch.Tensor], rng: Randomness
    ) -> Attributes:
        """pa* (B,) each, on the device of `pa`: `do` (B,) or () each, and what follows from it. Invariant
        attributes are the very tensors that came in. `u` comes from `abduct`; `rng` (on the CPU) serves the
        abduction of attributes. Raises UserError for values that an attribute cannot take."""
        ...

    def predict(self, u: Exogenous, pa_cf: Attributes) -> torch.Tensor:
        """The images (B, C, H, W) float32 in [-1, 1] that `u` would have been under the parents `pa_cf`."""
        ...


def counterfactual(
    generator: Generator,
    x: torch.Tensor,
    pa: Attributes,
    do: Mapping[str, torch.Tensor],
    rng: Randomness,
) -> tuple[torch.Tensor, Attributes]:
    """The image and the attributes that would have been, had `do` been the case.

    x (B, C, H, W) float32 in [-1, 1]; `pa` holds the parents of the image and what the do() needs, (B,) each,
    on the device of x; `do` and `rng` as in `Generator.act`. Returns x* of the same shape and range, and pa*.
    """
    u = generator.abduct(x, pa)
    pa_cf = generator.act(u, pa, do, rng)
    return generator.predict(u, pa_cf), pa_cf


def propagate(
    scm: StructuralCausalModel, pa: Attributes, do: Mapping[str, torch.Tensor], rng: Randomness
) -> Attributes:
    """`Generator.act` by a causal model of the attributes, which lies on the CPU, wherever `pa` does."""
    changed = scm.counterfactual(_on_cpu(pa), _on_cpu(do), rng)
    affected = scm.graph.affected(do)
    return {name: changed[name].to(value.device) if name in affected else value for name, value in pa.items()}


def _on_cpu(values: Mapping[str, torch.Tensor]) -> Attributes:
    return {name: value.cpu() for name, value in values.items()}


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

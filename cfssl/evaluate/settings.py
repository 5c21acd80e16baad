"""What is evaluated, as a recipe says it."""

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from cfssl.settings import STRICT, Count


@dataclass(frozen=True, config=STRICT)
class EvaluationSettings:
    """`target`: a binary or categorical attribute. `by`: attributes that form the groups. `fractions`: shares
    of the labelled training rows. `seeds` redraw the label subset. Choices (C of the probe, k of kNN) are
    made on the validation rows."""

    name: Literal["linear_probe", "knn"]
    target: str
    by: tuple[str, ...] = ()
    fractions: tuple[Annotated[float, Field(gt=0, le=1)], ...] = (1.0,)
    seeds: tuple[int, ...] = (0,)
    resamples: Count = 1000

    @property
    def label(self) -> str:
        """Names the result file."""
        return f"{self.name}-{self.target}"

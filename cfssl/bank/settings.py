"""What a bank holds, as a recipe says it."""

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag
from pydantic.dataclasses import dataclass

from cfssl.settings import STRICT, Count, Positive, Probability


@dataclass(frozen=True, config=STRICT)
class GateSettings:
    """Which counterfactuals are shown to an encoder. `probability`: the least that the judge has to give to
    the value that a discrete attribute was set to. `error`: the most by which it may miss that of a
    continuous one, in standard deviations over its training rows.

    `unchanged`: the most by which the judge's opinion of an attribute may move from the real image to its
    counterfactual, unless the do() affects it: in total variation of a discrete one, in these standard
    deviations of a continuous one."""

    probability: Probability = 0.5
    error: Positive = 1.0
    unchanged: dict[str, Positive] = Field(default_factory=dict)


Values = dict[str, Literal["all"] | tuple[str | float, ...]]
Joint = tuple[Annotated[Values, Field(min_length=1)], ...]


@dataclass(frozen=True, config=STRICT)
class BankSettings:
    """`do`: variable -> the values to set it to ("all": every category). Each value is one counterfactual per
    image; an image's own value is not made again. A list of such mappings holds joint interventions: each
    sets all its variables at the same time, to every combination of their values. `shard_megabytes`: size of
    one file; null: 64, and more in a bank of more than 1,024 such files. `gate`: rejects what does not show
    its do(); null: all is shown."""

    do: Annotated[
        Annotated[Values, Tag("one at a time")] | Annotated[Joint, Tag("together")],
        Discriminator(lambda value: "one at a time" if isinstance(value, Mapping) else "together"),
    ] = Field(default_factory=dict)
    shard_megabytes: Count | None = None
    gate: GateSettings | None = None

    @property
    def interventions(self) -> Joint:
        """The variables that are set together, with their values."""
        if isinstance(self.do, tuple):
            return self.do
        return tuple({name: values} for name, values in self.do.items())

    @property
    def variables(self) -> tuple[str, ...]:
        """The variables intervened on, alone or together."""
        return tuple(dict.fromkeys(name for joint in self.interventions for name in joint))

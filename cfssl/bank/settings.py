"""What a bank holds, as a recipe says it."""

from typing import Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from cfssl.settings import STRICT, Count


@dataclass(frozen=True, config=STRICT)
class BankSettings:
    """`do`: variable -> the values to set it to ("all": every category). Each value is one counterfactual per
    image; an image's own value is not made again. `shard_megabytes`: size of one file; null: 64, and more in
    a bank of more than 1,024 such files."""

    do: dict[str, Literal["all"] | tuple[str | float, ...]] = Field(default_factory=dict)
    shard_megabytes: Count | None = None

    @property
    def variables(self) -> set[str]:
        """The variables intervened on."""
        return set(self.do)

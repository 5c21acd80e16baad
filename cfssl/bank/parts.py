"""A bank in parts: ranges of its shards, which the tasks of an array job build side by side and without
knowing of each other.

Enters: the number of a part among how many. Leaves: the shards that it consists of, as a pure function of
these numbers, so that a part may be built again, or by two tasks at once.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from cfssl.errors import UserError

ARRAY = "array"  # the part that an array job of SLURM says
ARRAY_VARIABLES = "SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT"
SHOWN_RANGES = 8  # of numbers in a message


@dataclass(frozen=True)
class Part:
    """The `index`-th of `count` parts, counted from 0."""

    index: int
    count: int

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise UserError(
                f"Part {self.index} of {self.count} was asked for, expected one of the parts 0 to "
                f"{self.count - 1} of {self.count}; parts are counted from 0 and there is at least one: "
                "correct INDEX/COUNT."
            )

    @classmethod
    def parse(cls, text: str, environment: Mapping[str, str]) -> "Part":
        """From "INDEX/COUNT", or "array": what SLURM calls this task of an array job. Raises `UserError` for
        other texts, and where the array job is not numbered from 0."""
        if text == ARRAY:
            absent = [name for name in ARRAY_VARIABLES if name not in environment]
            if absent:
                raise UserError(
                    f"The part is {text}, but {absent[0]} is not set, so this is no task of an array job; "
                    "write INDEX/COUNT, e.g. 0/16."
                )
            text = "/".join(environment[name] for name in ARRAY_VARIABLES)
        if not re.fullmatch(r"[0-9]+/[0-9]+", text):
            raise UserError(f"The part is {text!r}, expected INDEX/COUNT or array; write e.g. 0/16.")
        index, count = map(int, text.split("/"))
        return cls(index, count)

    def of(self, total: int) -> range:
        """Which of `total` shards: parts follow each other and differ by one at most; those beyond the number
        of shards are empty."""
        size, larger = divmod(total, self.count)
        start = self.index * size + min(self.index, larger)
        return range(start, start + size + (self.index < larger))


def parts_with(shards: Iterable[int], total: int, count: int) -> list[int]:
    """The numbers of those of `count` parts of `total` shards that hold any of `shards`."""
    wanted = set(shards)
    return [index for index in range(count) if not wanted.isdisjoint(Part(index, count).of(total))]


def ranges(numbers: Iterable[int]) -> str:
    """Ascending numbers for a message: "3 to 5, 9"."""
    found: list[list[int]] = []
    for number in numbers:
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    texts = [f"{first} to {last}" if last > first else str(first) for first, last in found]
    more = len(texts) - SHOWN_RANGES
    return ", ".join(texts[:SHOWN_RANGES]) + (f" and {more} more" if more > 0 else "")

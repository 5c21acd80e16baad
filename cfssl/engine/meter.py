"""Means of loss parts between two lines of the log."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import distributed

from cfssl.engine.processes import count


class Meter:
    """Adds up on the device, so that only reading synchronises."""

    def __init__(self) -> None:
        self.sums: dict[str, torch.Tensor] = {}
        self.steps = 0

    def add(self, micro_batches: Sequence[dict[str, torch.Tensor]]) -> None:
        """The parts of one step, by micro-batch; every part is a scalar."""
        for parts in micro_batches:
            for name, value in parts.items():
                addend = value.detach().double() / len(micro_batches)
                self.sums[name] = self.sums[name] + addend if name in self.sums else addend
        self.steps += 1

    def pool(self) -> None:
        """The sums become their means over the processes that train together."""
        if count() > 1 and self.sums:
            means = torch.stack(list(self.sums.values()))
            distributed.all_reduce(means)
            self.sums = dict(zip(self.sums, means / count(), strict=True))

    @property
    def is_finite(self) -> bool:
        return all(bool(value.isfinite()) for value in self.sums.values())

    def means(self) -> dict[str, float]:
        """The means over the steps added; starts again from nothing."""
        means = {name: float(value) / self.steps for name, value in self.sums.items()}
        self.sums, self.steps = {}, 0
        return means

    def state_dict(self) -> dict[str, Any]:
        return {"sums": {name: float(value) for name, value in self.sums.items()}, "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sums = {name: torch.tensor(value, dtype=torch.float64) for name, value in state["sums"].items()}
        self.steps = state["steps"]

"""Skipping of exploding steps relative to a running median of gradient norms.

A fixed skip threshold can deadlock a run: once the norm sits above it every step is skipped for ever. Here a
step is skipped when its norm is not finite or exceeds `skip_factor` times the median of the norms lately
seen, skipped ones included, so the median follows a lasting change; and a run of skips ends the training with
an error instead of pretending to train.
"""

import math
import statistics
from typing import Any

from cfssl.errors import UserError

WINDOW = 100  # norms remembered
SETTLE = 20  # norms needed before anything but a non-finite one is skipped
PATIENCE = 20  # consecutive skips that end the run


class GradientGuard:
    """`skip_factor`: see above, None for skipping only non-finite norms."""

    def __init__(self, skip_factor: float | None) -> None:
        self.skip_factor = skip_factor
        self.norms: list[float] = []
        self.consecutive = 0
        self.skipped = 0

    def allows(self, norm: float) -> bool:
        """Whether to take the step whose gradients have this norm before clipping.

        Raises `UserError` after 20 skips in a row.
        """
        finite = math.isfinite(norm)
        settled = len(self.norms) >= SETTLE
        too_large = (
            settled
            and self.skip_factor is not None
            and norm > self.skip_factor * statistics.median(self.norms)
        )
        if finite:
            self.norms = [*self.norms[1 - WINDOW :], norm]
        if finite and not too_large:
            self.consecutive = 0
            return True
        self.consecutive += 1
        self.skipped += 1
        if self.consecutive >= PATIENCE:
            raise UserError(
                f"Training stopped: {PATIENCE} steps in a row were skipped because their gradient norm was "
                f"{'above the running median' if finite else 'not finite'} (last norm {norm:.3g}); lower "
                "the learning rate or look at the data."
            )
        return False

    def state_dict(self) -> dict[str, Any]:
        return {"norms": self.norms, "consecutive": self.consecutive, "skipped": self.skipped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.norms = list(state["norms"])
        self.consecutive, self.skipped = state["consecutive"], state["skipped"]

"""Which items each step of a training takes, as a pure function of (seed, step)."""

import numpy as np

from cfssl.seeds import numpy_generator


class EpochOrder:
    """Every epoch a seeded permutation of `count` items, cut into full batches; the remainder is left out."""

    def __init__(self, count: int, batch: int, epochs: int, seed: int) -> None:
        self.count, self.batch, self.epochs, self.seed = count, batch, epochs, seed
        self.steps_per_epoch = count // batch
        self._epoch: tuple[int, np.ndarray] | None = None  # the permutation in use

    def __len__(self) -> int:
        return self.steps_per_epoch * self.epochs

    def items(self, step: int) -> np.ndarray:
        """The items (batch,) of a step."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if self._epoch is None or self._epoch[0] != epoch:
            # Every loading process holds the permutation of its epoch: of 10^8 items 0.4 GB, not 0.8.
            numbers = np.arange(self.count, dtype=np.uint32)
            self._epoch = epoch, numpy_generator(self.seed, "epoch", epoch).permutation(numbers)
        return self._epoch[1][place * self.batch : (place + 1) * self.batch].astype(np.int64)

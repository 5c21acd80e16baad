"""Seeds as pure functions of what they are for, so that nothing depends on the order in which random numbers
are drawn."""

import hashlib

import numpy as np
import torch


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from its parts, e.g. `derive_seed(run_seed, "augment", step, position)`."""
    digest = hashlib.blake2b("\x1f".join(str(part) for part in parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def torch_generator(*parts: int | str) -> torch.Generator:
    """A CPU `torch.Generator` seeded by `derive_seed(*parts)`."""
    return torch.Generator().manual_seed(derive_seed(*parts))


def numpy_generator(*parts: int | str) -> np.random.Generator:
    """A `numpy.random.Generator` seeded by `derive_seed(*parts)`."""
    return np.random.default_rng(derive_seed(*parts))

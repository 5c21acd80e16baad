"""Initialisation as a function of a seed."""

from collections.abc import Callable

import torch
from torch import nn

from cfssl.seeds import derive_seed


def seeded(build: Callable[[], nn.Module], seed: int, name: str) -> nn.Module:
    """`build()` under a random stream of its own; the global one is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, name))
        return build()

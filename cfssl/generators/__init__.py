"""Generators by name. They meet the objectives only in the bank."""

from pathlib import Path
from typing import Protocol

import torch

from cfssl.data.table import ImageTable
from cfssl.generators.base import Generator
from cfssl.generators.fitted import FittedSettings, load_fitted
from cfssl.generators.hvae import HVAEGenerator, HVAESettings
from cfssl.generators.oracle import OracleGenerator, OracleSettings

GeneratorSettings = HVAESettings | FittedSettings | OracleSettings


class FittedGenerator(Generator, Protocol):
    """A generator that can be kept: what `save` writes, `load` restores into one created from the same
    settings.

    `to` moves the image side; images and parents are then given on that device.
    """

    def save(self, path: Path) -> None: ...
    def load(self, path: Path) -> None: ...
    def to(self, device: torch.device) -> None: ...


def create_generator(settings: GeneratorSettings, table: ImageTable) -> FittedGenerator:
    """The generator of `settings` for the attributes and image shape of `table`, not yet fitted unless they
    name a fitted one."""
    if isinstance(settings, FittedSettings):
        return load_fitted(settings, table)
    if isinstance(settings, OracleSettings):
        return OracleGenerator(settings, table)
    return HVAEGenerator(settings, table.attributes, table.images.shape)

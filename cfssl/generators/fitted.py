"""A generator that was fitted before, by this recipe's author or by somebody else.

Enters: a file that `HVAEGenerator.save` wrote; beside the weights it holds settings, graph, attributes and
image shape, so that nothing of them is said again. Leaves: the generator as it was fitted, for any table that
codes these attributes alike and has images of this shape. Its own means and standard deviations of continuous
attributes stay.
"""

import hashlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError, field_validator
from pydantic.dataclasses import dataclass

from cfssl.data.table import Attribute, ImageTable
from cfssl.errors import UserError
from cfssl.generators.hvae import HVAEGenerator, coding, saved_identity
from cfssl.generators.hvae_settings import HVAESettings
from cfssl.scm.graph import CausalGraph
from cfssl.settings import STRICT


@dataclass(frozen=True, config=STRICT)
class FittedSettings:
    """`file`: the generator.safetensors that `cfssl fit` left in its folder, fine-tuned or not. Refuses a
    file that is missing or holds anything else."""

    file: str
    name: Literal["fitted"] = "fitted"

    @field_validator("file")
    @classmethod
    def _holds_a_generator(cls, file: str) -> str:
        _saved_settings(Path(file))
        return file

    @cached_property
    def hvae(self) -> HVAESettings:
        """What it was fitted with."""
        return _saved_settings(Path(self.file))

    @property
    def parents(self) -> tuple[str, ...]:
        """The attributes that cause the image."""
        return self.hvae.parents

    @property
    def graph(self) -> dict[str, tuple[str, ...]]:
        """Child attribute -> its parents."""
        return self.hvae.graph

    def causal_graph(self, attributes: Mapping[str, Attribute]) -> CausalGraph:
        """See `GraphSettings.causal_graph`."""
        return self.hvae.causal_graph(attributes)

    @property
    def content(self) -> str:
        """Fingerprint of the file's bytes, wherever it lies."""
        with Path(self.file).open("rb") as stream:
            return hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def load_fitted(settings: FittedSettings, table: ImageTable) -> HVAEGenerator:
    """The generator of the file, ready for `table`. Raises `UserError` when it was fitted to data of another
    kind, see `refuse_other_data`, or by another version of cfssl."""
    refuse_other_data(settings, table)
    generator = HVAEGenerator(settings.hvae, table.attributes, table.images.shape)
    generator.load(Path(settings.file))
    return generator


def refuse_other_data(settings: FittedSettings, table: ImageTable) -> None:
    """Raises `UserError` where the table lacks an attribute of the generator, codes it in another way, or has
    images of another shape or depth."""
    found = saved_identity(Path(settings.file))
    mismatches = []
    for name, own in found["attributes"].items():
        attribute = table.attributes.get(name)
        if attribute is None:
            mismatches.append(f"the table has no {name!r}")
        elif own != coding(attribute):
            mismatches.append(f"{name!r} is {_said(own)} there and {_said(coding(attribute))} in the table")
    if found["shape"] != list(table.images.shape):
        shapes = [" x ".join(map(str, shape)) for shape in (found["shape"], table.images.shape)]
        mismatches.append(f"images are {shapes[0]} there and {shapes[1]} in the table")
    if settings.hvae.likelihood == "discretised" and table.images.dtype != "uint8":
        mismatches.append(f"its likelihood is of 8-bit images and the table holds {table.images.dtype}")
    if mismatches:
        raise UserError(
            f"The generator of {settings.file} does not fit the table {table.name}: {'; '.join(mismatches)}; "
            "code the table as it was, or fit a generator to this one."
        )


def _said(coded: Sequence[str]) -> str:
    kind, *categories = coded
    return f"{kind} ({', '.join(categories)})" if categories else kind


def _saved_settings(path: Path) -> HVAESettings:
    content: Any = saved_identity(path).get("settings")
    try:
        return TypeAdapter(HVAESettings).validate_python(content)
    except ValidationError as error:
        raise UserError(
            f"{path} was written by another version of cfssl, whose settings this one does not take "
            f"({error.errors()[0]['msg'].lower()}); fit it again."
        ) from None

"""The oracle: a generator that knows the truth, for worlds that were rendered.

It abducts by recognition: the pixels of an image identify its row of the table, whose exogenous noise the
world still holds. Prediction renders that row again under other parents. It bounds what any learned generator
can reach.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from pydantic.dataclasses import dataclass

from cfssl.data.table import Attributes, ImageTable
from cfssl.engine.checkpoint import load_checkpoint, save_checkpoint
from cfssl.engine.run import Run
from cfssl.errors import UserError
from cfssl.generators.base import Exogenous, propagate, to_signed, to_stored
from cfssl.generators.parents import GraphSettings
from cfssl.provenance import code_version, fingerprint
from cfssl.scm.mechanisms import Randomness
from cfssl.scm.model import StructuralCausalModel
from cfssl.seeds import torch_generator
from cfssl.settings import STRICT

CHUNK = 1024  # images hashed at a time


@dataclass(frozen=True, config=STRICT)
class OracleSettings(GraphSettings):
    """Nothing is learned of the image; the attribute mechanisms are, as for every generator."""

    name: Literal["oracle"] = "oracle"


class OracleGenerator:
    """Created for one table with a `truth`; raises `UserError` for a table that has none."""

    def __init__(self, settings: OracleSettings, table: ImageTable) -> None:
        if table.truth is None:
            raise UserError(
                f"The oracle generator needs a world that can be rendered again, and {table.name} holds "
                "given images; "
                "use generator.name: hvae."
            )
        self.table, self.truth = table, table.truth
        self.graph = settings.causal_graph(table.attributes)
        self.scm = StructuralCausalModel(self.graph, table.attributes, settings.attributes)
        self._rows: dict[
            bytes, int
        ] = {}  # pixels -> row, of the table's images and of all that was rendered since

    @property
    def fingerprint(self) -> str:
        """Of the world it renders, the graph and the code."""
        code = code_version("generators/oracle.py", "data/phantoms")
        return fingerprint("oracle", self.table.fingerprint, self.graph.to_json(), code)

    def fit(self, table: ImageTable, run: Run) -> None:
        """Fits the attribute mechanisms on the training rows."""
        rows = table.rows("train", known=self.graph.variables)
        self.scm.fit(table.encode(self.graph.variables, rows), torch_generator("oracle"))

    def abduct(self, x: torch.Tensor, pa: Attributes) -> Exogenous:
        """x (B, C, H, W) float32 in [-1, 1] -> {"row": (B,)}. Raises `UserError` for an image that the world
        did not render."""
        if not self._rows:
            self._index()
        digests = [_digest(image) for image in to_stored(x, self.table.images.dtype)]
        strange = [place for place, digest in enumerate(digests) if digest not in self._rows]
        if strange:
            raise UserError(
                f"{len(strange)} of {len(digests)} images (the first at place {strange[0]} of the batch) "
                f"are not in {self.table.name}; "
                "the oracle recognises whole, unaugmented images of its own world only."
            )
        return {"row": torch.tensor([self._rows[digest] for digest in digests])}

    def act(
        self, u: Exogenous, pa: Attributes, do: Mapping[str, torch.Tensor], rng: Randomness
    ) -> Attributes:
        """See `Generator.act`."""
        return propagate(self.scm, pa, do, rng)

    def predict(self, u: Exogenous, pa_cf: Attributes) -> torch.Tensor:
        """The rows of `u` rendered with the parents `pa_cf`; parents outside the graph keep their factual
        values."""
        parents = {name: pa_cf[name].cpu() for name in self.graph.image_parents}
        rows = u["row"].cpu().numpy()
        rendered = self.truth.counterfactual(rows, parents)
        # Its own counterfactuals are recognised as well, so that an intervention can be taken back.
        self._rows.update(zip(map(_digest, rendered), rows.tolist(), strict=True))
        return to_signed(rendered).to(next(iter(pa_cf.values())).device)

    def save(self, path: Path) -> None:
        """The attribute mechanisms, and which world they belong to."""
        save_checkpoint(path, {"table": self.table.fingerprint, "scm": dict(self.scm.state_dict())})

    def load(self, path: Path) -> None:
        """Raises `UserError` when the file belongs to another world."""
        state = load_checkpoint(path)
        if state["table"] != self.table.fingerprint:
            raise UserError(
                f"{path} was written for the table {state['table']}, and this is {self.table.fingerprint}; "
                "fit it again."
            )
        self.scm.load_state_dict(state["scm"])

    def to(self, device: torch.device) -> None:
        """Rendering happens on the CPU, and images come back from there whatever `device` is."""

    def _index(self) -> None:
        for start in range(0, len(self.table), CHUNK):
            rows = np.arange(start, min(start + CHUNK, len(self.table)))
            self._rows.update(zip(map(_digest, self.table.images.read(rows)), rows.tolist(), strict=True))


def _digest(image: np.ndarray) -> bytes:
    return hashlib.blake2b(np.ascontiguousarray(image).data, digest_size=16).digest()

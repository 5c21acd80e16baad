"""The oracle: a generator that knows the truth, for worlds that were rendered.

It abducts by recognition: the pixels of an image identify its row of the table, whose exogenous noise the
world still holds. What follows from an intervention is told by the world's own mechanisms and that noise, and
prediction renders the row again under other parents. It bounds what any learned generator can reach.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from pydantic.dataclasses import dataclass

from cfssl.data.pixels import to_signed, to_stored
from cfssl.data.table import Attributes, ImageTable
from cfssl.engine.checkpoint import load_checkpoint, save_checkpoint
from cfssl.engine.run import Run
from cfssl.errors import UserError
from cfssl.generators.base import Exogenous
from cfssl.generators.settings import GraphSettings
from cfssl.provenance import code_version, fingerprint
from cfssl.scm.mechanisms import Randomness
from cfssl.scm.model import as_values, refuse_missing
from cfssl.settings import STRICT
from cfssl.stages import ORACLE_CODE

CHUNK = 1024  # images hashed at a time
REMEMBERED = 2**16  # counterfactuals that are recognised, the last ones rendered


@dataclass(frozen=True, config=STRICT)
class OracleSettings(GraphSettings):
    """Nothing is learned. An attribute that `graph` makes no descendant of an intervention keeps its value,
    whatever the world would say."""

    name: Literal["oracle"] = "oracle"


class OracleGenerator:
    """Created for one table with a `truth`; raises `UserError` for a table that has none."""

    def __init__(self, settings: OracleSettings, table: ImageTable) -> None:
        if table.truth is None:
            raise UserError(
                f"The oracle generator needs a world that can be rendered again, and {table.name} holds "
                "given images; use generator.name: hvae."
            )
        self.table, self.truth = table, table.truth
        self.graph = settings.causal_graph(table.attributes)
        self._is_ready = False
        self._rows: dict[bytes, int] = {}  # pixels -> row, of the table's images
        self._rendered: OrderedDict[bytes, int] = OrderedDict()  # as well, of the last counterfactuals

    @property
    def fingerprint(self) -> str:
        """Of the world it renders, the graph and the code. Raises UserError before `fit` or `load`."""
        self._refuse_unfitted("before it makes counterfactuals")
        code = code_version(*ORACLE_CODE)
        return fingerprint("oracle", self._identity, code)

    def fit(self, table: ImageTable, run: Run) -> None:
        """Makes sure that `table` is the one whose world it knows; there is nothing to learn."""
        if table.fingerprint != self.table.fingerprint:
            raise UserError(
                f"The oracle generator knows the world of the table {self.table.fingerprint}, and was given "
                f"{table.fingerprint} to fit; create it for that table."
            )
        self._is_ready = True

    def abduct(self, x: torch.Tensor, pa: Attributes) -> Exogenous:
        """x (B, C, H, W) float32 in [-1, 1] -> {"row": (B,)}. Raises `UserError` for an image that the world
        did not render."""
        if not self._rows:
            self._index()
        digests = [_digest(image) for image in to_stored(x, self.table.images.dtype)]
        rows = [self._rows.get(digest, self._rendered.get(digest)) for digest in digests]
        strange = [place for place, row in enumerate(rows) if row is None]
        if strange:
            raise UserError(
                f"{len(strange)} of {len(digests)} images (the first at place {strange[0]} of the batch) "
                f"are not in {self.table.name}, nor among its last {REMEMBERED} counterfactuals; the oracle "
                "recognises whole, unaugmented images of its own world only."
            )
        return {"row": torch.tensor(rows)}

    def act(
        self, u: Exogenous, pa: Attributes, do: Mapping[str, torch.Tensor], rng: Randomness
    ) -> Attributes:
        """See `Generator.act`. Nothing is random: the world's mechanisms and the rows' own noise tell what
        follows."""
        refuse_missing(pa, self.graph.concerned(do))
        affected = self.graph.affected(do)
        following = affected - set(do)
        factual = {name: pa[name].cpu() for name in self.graph.variables if name in pa}
        changed = as_values({n: v.cpu() for n, v in do.items()}, self.table.attributes, like=factual)
        if following:
            given = {name: value for name, value in factual.items() if name not in following} | changed
            changed = self.truth.attributes(u["row"].cpu().numpy(), given)
        return {n: changed[n].to(value.device) if n in affected else value for n, value in pa.items()}

    def predict(self, u: Exogenous, pa_cf: Attributes) -> torch.Tensor:
        """The rows of `u` rendered with the parents `pa_cf`; parents outside the graph keep their factual
        values."""
        parents = {name: pa_cf[name].cpu() for name in self.graph.image_parents}
        rows = u["row"].cpu().numpy()
        rendered = self.truth.counterfactual(rows, parents)
        # Its own counterfactuals are recognised as well, so that an intervention can be taken back.
        for image, row in zip(rendered, rows.tolist(), strict=True):
            digest = _digest(image)
            self._rendered[digest] = row
            self._rendered.move_to_end(digest)
            if len(self._rendered) > REMEMBERED:
                self._rendered.popitem(last=False)
        return to_signed(rendered).to(next(iter(pa_cf.values())).device)

    def save(self, path: Path) -> None:
        """Which world and which graph it knows. Raises `UserError` before `fit` or `load`."""
        self._refuse_unfitted(f"before it is saved in {path}")
        save_checkpoint(path, {"oracle": self._identity})

    def load(self, path: Path) -> None:
        """Raises `UserError` when the file belongs to another world or graph."""
        state = load_checkpoint(path)
        found = state.get("oracle") if isinstance(state, dict) else None
        if found != self._identity:
            raise UserError(
                f"{path} was written for the oracle of {found}, and this is the one of {self._identity}; fit "
                "it again."
            )
        self._is_ready = True

    def to(self, device: torch.device) -> None:
        """Rendering happens on the CPU, and images come back from there whatever `device` is."""

    @property
    def _identity(self) -> dict[str, object]:
        return {"table": self.table.fingerprint, "graph": self.graph.to_json()}

    def _refuse_unfitted(self, when: str) -> None:
        if not self._is_ready:
            raise UserError(f"The oracle generator has not been fitted; fit or load it {when}.")

    def _index(self) -> None:
        for start in range(0, len(self.table), CHUNK):
            rows = np.arange(start, min(start + CHUNK, len(self.table)))
            self._rows.update(zip(map(_digest, self.table.images.read(rows)), rows.tolist(), strict=True))


def _digest(image: np.ndarray) -> bytes:
    return hashlib.blake2b(np.ascontiguousarray(image).data, digest_size=16).digest()

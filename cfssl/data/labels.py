"""Masks by name, whoever drew them: those of a table, and silver ones that a segmentor made of its images.

Enters: a prepared table, and perhaps a folder as `cfssl.silver.write_silver` leaves it: `silver.json`,
`masks.npy` (N, S, H, W) uint8 of 0 and 1, and `confidence.parquet`. Leaves: a table with the masks of both,
and how far each of them can be trusted. Objectives, views and evaluations ask for masks by name alone.
"""

from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from cfssl.data.table import ImageArray, ImageTable, MappedArray, Truth
from cfssl.errors import UserError, nearest, quoted
from cfssl.files import read_json

FORMAT = 1  # of a folder of silver masks; raised when an older reader would misread it


def silver_name(structure: str) -> str:
    """What the silver mask of a structure is called."""
    return f"silver_{structure}"


def confidence_name(structure: str) -> str:
    """The column with the confidence of the silver mask of a structure."""
    return f"confidence_{structure}"


class SilverMasks:
    """A folder of silver masks. `structures`: its channels, as the segmentor knows them; `names`: as a table
    offers them."""

    def __init__(self, folder: Path) -> None:
        """Raises `UserError` when the folder is no such thing or its files do not belong together."""
        record = read_json(folder / "silver.json")
        if record.get("format") != FORMAT:
            raise UserError(
                f"{folder} holds silver masks of format {record.get('format')!r} and this version reads "
                f"format {FORMAT}; delete the folder and make them again."
            )
        self.folder = folder
        self.table: str = record["table"]
        self.structures: tuple[str, ...] = tuple(record["structures"])
        self.names = tuple(map(silver_name, self.structures))
        self.masks = MappedArray(folder / "masks.npy")
        found, expected = (len(self.masks), *self.masks.shape), tuple(record["shape"])
        if found != expected or self.masks.dtype != np.uint8:
            raise UserError(
                f"{self.masks.path} holds {self.masks.dtype} of shape {found}, its silver.json says uint8 of "
                f"{expected}; delete the folder and make the silver masks again."
            )

    @cached_property
    def confidence(self) -> pd.DataFrame:
        """A column per structure, float32 in [0, 1], a row per image; see `cfssl.silver.silver_of`."""
        frame = pd.read_parquet(self.folder / "confidence.parquet")
        if len(frame) != len(self.masks):
            raise UserError(
                f"{self.folder} holds {len(self.masks)} silver masks and the confidence of {len(frame)}; "
                "delete the folder and make them again."
            )
        return frame


class ChosenMasks:
    """Channels of several arrays of masks as one `ImageArray`: each is an array and a place in it."""

    def __init__(self, channels: Sequence[tuple[ImageArray, int]]) -> None:
        self.channels = tuple(channels)

    @property
    def shape(self) -> tuple[int, ...]:
        return len(self.channels), *self.channels[0][0].shape[1:]

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(np.uint8)

    def __len__(self) -> int:
        return len(self.channels[0][0])

    def read(self, rows: np.ndarray) -> np.ndarray:
        """Masks (n, M, H, W) uint8 of 0 and 1; every array is read once."""
        arrays = {id(array): array for array, _ in self.channels}
        read = {key: array.read(rows) for key, array in arrays.items()}
        return np.stack([read[id(array)][:, place] for array, place in self.channels], axis=1)


class LabelledTable(ImageTable):
    """A table whose `masks` and `mask_names` are its own and, after these, the silver ones. Its fingerprint
    stays that of the table: what depends on silver masks has to depend on their stage."""

    def __init__(self, folder: Path, truth: Truth | None = None, silver: Path | None = None) -> None:
        """`silver`: a folder of silver masks. Raises `UserError` when they were made for another table, or
        when the table has masks of the same names."""
        super().__init__(folder, truth)
        self.silver = None if silver is None else SilverMasks(silver)
        arrays = [(self.masks, self.mask_names)] if self.masks is not None else []
        if self.silver is not None:
            if self.silver.table != self.fingerprint:
                raise UserError(
                    f"The silver masks in {silver} were made for the table {self.silver.table}, and "
                    f"{self.name} is {self.fingerprint}; make them for this table."
                )
            refuse_taken_names(self, self.silver.structures)
            arrays.append((self.silver.masks, self.silver.names))
        self._channels = {name: (array, place) for array, names in arrays for place, name in enumerate(names)}
        self.mask_names = tuple(self._channels)
        self.masks = ChosenMasks(list(self._channels.values())) if self._channels else None

    def __reduce__(self) -> tuple[Any, ...]:
        return LabelledTable, (self.folder, self.truth, self.silver and self.silver.folder)

    def masks_of(self, names: Sequence[str]) -> ChosenMasks:
        """The masks `names`, in this order. Raises `UserError` for a name that is no mask, or for none."""
        if not names:
            raise UserError(f"No mask of table {self.name!r} was asked for; name at least one.")
        for name in names:
            self._require_mask(name)
        return ChosenMasks([self._channels[name] for name in names])

    def confidence(self, names: Iterable[str], rows: np.ndarray) -> np.ndarray:
        """How far the masks `names` of `rows` (n,) can be trusted: (n, M) float32 in [0, 1].

        A silver mask has the confidence that was stored with it, or that the table itself holds in the column
        `confidence_<structure>` beside a mask `silver_<structure>` (as the output of `cfssl silver` does);
        any other mask is taken at its word, 1. Raises `UserError` for a name that is no mask, and where the
        column lacks a value."""
        rows, columns = np.asarray(rows, dtype=np.int64), []
        for name in names:
            self._require_mask(name)
            structure = name.removeprefix(silver_name(""))
            column = confidence_name(structure)
            if self.silver is not None and name in self.silver.names:
                columns.append(self.silver.confidence[structure].to_numpy(np.float32)[rows])
            elif name == silver_name(structure) and column in self.attributes:
                columns.append(self.encode([column], rows)[column].numpy())
            else:
                columns.append(np.ones(len(rows), dtype=np.float32))
        return np.stack(columns, axis=1) if columns else np.empty((len(rows), 0), dtype=np.float32)

    def _require_mask(self, name: str) -> None:
        if name not in self._channels:
            raise UserError(f"Table {self.name!r} has no mask {name!r}{nearest(name, self.mask_names)}.")


def refuse_taken_names(table: ImageTable, structures: Iterable[str]) -> None:
    """Raises `UserError` where the silver masks of `structures`, or the columns of their confidence, would
    have names that the table has given already."""
    given = {*table.mask_names, *table.attributes, *table.frame.columns}
    wanted = [name(structure) for structure in structures for name in (silver_name, confidence_name)]
    if taken := [name for name in wanted if name in given]:
        raise UserError(
            f"Table {table.name!r} already has {quoted(taken)}, which silver masks would be called; rename "
            "its masks and columns, or make no silver masks of these structures."
        )

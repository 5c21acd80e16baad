"""The table: one row per image, typed attributes, splits, images read through a memory map.

A prepared table is a folder: `table.json` (attributes, shapes, fingerprint, source), `table.parquet` (one
row per image), `images.npy` and perhaps `masks.npy`. `cfssl.data.prepare` writes it; this file reads it, in
time independent of the number of images.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, get_args

import numpy as np
import pandas as pd
import torch

from cfssl.data.regions import AreaSpec
from cfssl.errors import UserError, listed, nearest, quoted
from cfssl.files import read_json

Kind = Literal["categorical", "binary", "continuous"]
Attributes = dict[str, torch.Tensor]
"""Values of a batch: categorical and binary as long codes (B,) indexing `Attribute.categories`, continuous
as float32 (B,) in physical units. Never missing."""

FORMAT = 1  # of the prepared folder; raised when an older reader would misread it
SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Attribute:
    """A typed column of the table. The order of `categories` is the code; a binary attribute has exactly
    two, negative first.

    `declared` is False where kind and categories were inferred from the values.
    """

    name: str
    kind: Kind
    categories: tuple[str, ...] = ()
    declared: bool = False

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise UserError(
                f"Attribute {self.name!r} has kind {self.kind!r}; choose one of {', '.join(get_args(Kind))}."
            )
        if self.kind == "continuous" and self.categories:
            raise UserError(
                f"Attribute {self.name!r} is continuous and has categories; remove them or declare it "
                "categorical."
            )
        if self.kind == "binary" and len(self.categories) != 2:
            raise UserError(
                f"Attribute {self.name!r} is binary and has {len(self.categories)} categories "
                f"({quoted(self.categories)}); give exactly two, mark further values as `missing`, or "
                "declare it categorical."
            )
        if self.kind == "categorical" and not self.categories:
            raise UserError(
                f"Attribute {self.name!r} is categorical and has no value at all; check its column."
            )
        if len(set(self.categories)) < len(self.categories):
            raise UserError(
                f"Attribute {self.name!r} lists a category twice ({quoted(self.categories)}); list each once."
            )

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "kind": self.kind,
            "categories": list(self.categories),
            "declared": self.declared,
        }

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "Attribute":
        return cls(content["name"], content["kind"], tuple(content["categories"]), content["declared"])


class AttributeSummary(NamedTuple):
    """What `cfssl check` shows of an attribute.

    `values`: the categories, or (lowest, highest) of a continuous attribute.
    """

    name: str
    kind: Kind
    declared: bool
    values: tuple[str, ...] | tuple[float, float]
    missing: int


class ImageArray(Protocol):
    """A lazily read stack of equal images.

    `shape` is that of one image, (C, H, W), or (C, D, H, W) for volumes.
    """

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> np.dtype[Any]: ...
    def __len__(self) -> int: ...
    def read(self, rows: np.ndarray) -> np.ndarray:
        """Images (n, C, H, W) of the given rows, a copy in `dtype`."""
        ...


class Truth(Protocol):
    """The known causal model of a phantom."""

    def counterfactual(self, rows: np.ndarray, parents: Attributes) -> np.ndarray:
        """Images (n, C, H, W) uint8, rendered again with the rows' own exogenous noise and the given
        parents.
        """
        ...

    def attributes(self, rows: np.ndarray, do: Attributes) -> Attributes:
        """All attributes (n,) of `rows` under `do`: what it sets, what follows from that with the rows' own
        noise, and the factual rest."""
        ...


class MappedArray:
    """An `ImageArray` over a `.npy` file.

    Sent to another process, it travels as its path and is mapped again there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._array = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise UserError(
                f"{path} cannot be mapped ({error}); delete its folder and prepare the table again."
            ) from None

    @property
    def shape(self) -> tuple[int, ...]:
        return self._array.shape[1:]

    @property
    def dtype(self) -> np.dtype[Any]:
        return self._array.dtype

    def __len__(self) -> int:
        return len(self._array)

    def read(self, rows: np.ndarray) -> np.ndarray:
        return np.asarray(self._array[np.asarray(rows, dtype=np.int64)])

    def __reduce__(self) -> tuple[Any, ...]:
        return MappedArray, (self.path,)


class ImageTable:
    """A prepared table, immutable.

    Made by `ImageTable.open`, `cfssl.data.prepare.prepare` or `save_prepared`.
    """

    def __init__(self, folder: Path, truth: Truth | None = None) -> None:
        """Use `open`."""
        record = read_json(folder / "table.json")
        if record.get("format") != FORMAT:
            raise UserError(
                f"{folder} is a table of format {record.get('format')!r} and this version reads format "
                f"{FORMAT}; prepare it again."
            )
        self.folder = folder
        self.name: str = record["name"]
        self.fingerprint: str = record["fingerprint"]
        self.group: str | None = record["group"]
        self.source: dict[str, Any] | None = record["source"]
        self.truth = truth
        self.attributes = {item["name"]: Attribute.from_json(item) for item in record["attributes"]}
        self.left_out: dict[str, str] = record.get("left_out", {})
        # Which attributes are areas of a mask, and how they are measured.
        self.areas = {name: AreaSpec(**spec) for name, spec in record.get("areas", {}).items()}
        self.mask_names: tuple[str, ...] = tuple(record["mask_names"])
        self.images: ImageArray = self._mapped("images.npy", record, record["shape"], record["dtype"])
        self.masks: ImageArray | None = None
        if self.mask_names:
            self.masks = self._mapped(
                "masks.npy", record, [len(self.mask_names), *record["shape"][1:]], "uint8"
            )
        self._columns: dict[str, np.ndarray] = {}

    @classmethod
    def open(cls, folder: Path | str, truth: Truth | None = None) -> "ImageTable":
        """Opens a prepared folder: reads `table.json` and maps the arrays; the frame is read when first used.

        Raises `UserError` when the folder is no prepared table or its files do not belong together.
        """
        return cls(Path(folder), truth)

    def __reduce__(self) -> tuple[Any, ...]:
        return ImageTable, (self.folder, self.truth)

    def __len__(self) -> int:
        return len(self.images)

    @property
    def frame(self) -> pd.DataFrame:
        """One row per image: natural values (strings, floats), missing stays missing; column `split`.

        A shallow copy, so that columns added to it do not reach the table.
        """
        return self._frame.copy(deep=False)

    def rows(self, split: str | None = None, known: Iterable[str] = ()) -> np.ndarray:
        """Row numbers (int64, ascending) of a split, or of all, where each attribute in `known` is present.

        Raises `UserError` for a name that is no split or no attribute.
        """
        if split is not None and split not in SPLITS:
            raise UserError(f"There is no split {split!r}; choose one of {', '.join(SPLITS)}.")
        keep = np.ones(len(self), dtype=bool)
        if split is not None:
            keep &= (self._frame["split"] == split).to_numpy(bool)
        for name in known:
            self._require(name)
            keep &= self._frame[name].notna().to_numpy()
        return np.flatnonzero(keep).astype(np.int64)

    def encode(self, names: Iterable[str], rows: np.ndarray) -> Attributes:
        """The attributes `names` of `rows` (n,) as tensors (n,): long codes, or float32 in physical units.

        Raises `UserError` naming attribute, row and value where a value is missing or no attribute has that
        name.
        """
        encoded: Attributes = {}
        rows = np.asarray(rows, dtype=np.int64)
        for name in names:
            values = self._encoded(name)[rows]
            absent = np.isnan(values) if values.dtype.kind == "f" else values < 0
            if absent.any():
                raise UserError(
                    f"Attribute {name!r} is missing in {listed(rows[absent])} of table {self.name!r}, where "
                    "a value is needed; use only rows in which it is known, or filter with `where: "
                    f"{{{name}: present}}`."
                )
            encoded[name] = torch.from_numpy(values)
        return encoded

    def codes(self, name: str, rows: np.ndarray) -> torch.Tensor:
        """Codes (n,) long of a discrete attribute or of the group column, equal for equal values and -1 where
        the value is missing. Raises `UserError` for other columns."""
        if name == self.group:
            return torch.from_numpy(pd.factorize(self._frame[name])[0].astype(np.int64)[rows])
        if name not in self.attributes or self.attributes[name].kind == "continuous":
            raise UserError(
                f"Table {self.name!r} has no discrete attribute or group {name!r}"
                f"{nearest(name, self.coded_names)}."
            )
        return torch.from_numpy(self._encoded(name)[rows])

    @property
    def coded_names(self) -> list[str]:
        """The columns that `codes` takes."""
        discrete = [name for name, attribute in self.attributes.items() if attribute.kind != "continuous"]
        return discrete + ([self.group] if self.group is not None else [])

    def summary(self) -> list[AttributeSummary]:
        """One line per attribute, in the order of the table. Reads the frame."""
        lines = []
        for name, attribute in self.attributes.items():
            column = self._frame[name]
            values: tuple[str, ...] | tuple[float, float] = attribute.categories
            if attribute.kind == "continuous":
                values = (float(column.min()), float(column.max()))
            lines.append(
                AttributeSummary(name, attribute.kind, attribute.declared, values, int(column.isna().sum()))
            )
        return lines

    @cached_property
    def _frame(self) -> pd.DataFrame:
        frame = pd.read_parquet(self.folder / "table.parquet")
        if len(frame) != len(self):
            raise UserError(
                f"{self.folder} holds {len(self)} images and a frame of {len(frame)} rows; prepare it again."
            )
        return frame

    def _encoded(self, name: str) -> np.ndarray:
        """The whole column: int64 codes with -1 for missing, or float32 with NaN."""
        self._require(name)
        if name not in self._columns:
            self._columns[name] = encode_column(self._frame[name], self.attributes[name])
        return self._columns[name]

    def _require(self, name: str) -> None:
        if name not in self.attributes:
            raise UserError(f"Table {self.name!r} has no attribute {name!r}{nearest(name, self.attributes)}.")

    def _mapped(self, file: str, record: dict[str, Any], shape: Sequence[int], dtype: str) -> MappedArray:
        array = MappedArray(self.folder / file)
        if (len(array), array.shape, str(array.dtype)) != (record["rows"], tuple(shape), dtype):
            raise UserError(
                f"{array.path} holds {len(array)} {array.dtype} arrays of shape {array.shape}, its "
                f"table.json says {record['rows']} {dtype} of {tuple(shape)}; delete the folder and prepare "
                "the table again."
            )
        return array


class MaskReader:
    """Some of a table's masks, by name: of rows (n,) as (n, M, H, W) uint8, in the order of `names`."""

    def __init__(self, table: ImageTable, names: Sequence[str]) -> None:
        """Raises `UserError` for a mask that the table does not have."""
        for name in names:
            if name not in table.mask_names:
                raise UserError(
                    f"Table {table.name!r} has no mask {name!r}{nearest(name, table.mask_names)}."
                )
        assert table.masks is not None  # it has the names
        self.masks, self.places = table.masks, [table.mask_names.index(name) for name in names]

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        return self.masks.read(rows)[:, self.places]


def encode_column(column: pd.Series, attribute: Attribute) -> np.ndarray:
    """A column of natural values (N,) as int64 codes (-1 missing) or float32 (NaN missing).

    Raises `UserError` naming rows and values that are no category, no number or not finite.
    """
    if attribute.kind == "continuous":
        numbers = pd.to_numeric(column, errors="coerce").to_numpy(np.float64, na_value=np.nan)
        bad = column.notna().to_numpy() & ~np.isfinite(numbers)
        expected = "finite numbers"
        values: np.ndarray = numbers.astype(np.float32)
    else:
        codes = {category: code for code, category in enumerate(attribute.categories)}
        values = texts(column).map(codes).fillna(-1).to_numpy(np.int64)
        bad = column.notna().to_numpy() & (values < 0)
        expected = f"one of {quoted(attribute.categories)}"
    if bad.any():
        found = [f"{row} ({value!r})" for row, value in column[bad].head(3).items()]
        raise UserError(
            f"Attribute {attribute.name!r} has values that are not {expected}, in "
            f"{listed(found, int(bad.sum()))}; correct them, extend `categories`, or list them under "
            "`missing`."
        )
    return values


def texts(column: pd.Series) -> pd.Series:
    """A column as category names; missing stays missing.

    Whole numbers lose the decimal point: 1.0 and 1 are both "1".
    """

    if isinstance(column.dtype, pd.StringDtype):
        return column

    def text(value: Any) -> str:
        if isinstance(value, float | np.floating) and float(value).is_integer():
            return str(int(value))
        return str(value)

    return column.map(text, na_action="ignore").astype("str")

"""What a user points at: a CSV or Parquet file naming images, an `.npz` of arrays, or a folder of images.

Enter: `TableSource`, the settings. Leave: `Source`, the frame with typed attributes and where each row's
image and masks are; no pixel has been read yet.

Rows are counted from 0 in messages, in the order of the file.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd

from cfssl.data.columns import AttributeSpec, Selected, Where, natural, read_columns, require, select
from cfssl.data.npz import ArrayHeader, npz_headers, read_npz, stream_npz
from cfssl.data.readers import NOT_READ, READERS, read_image, reader_for, suffix_of
from cfssl.data.regions import Layout
from cfssl.data.splits import SplitSettings
from cfssl.data.table import SPLITS, Attribute, texts
from cfssl.errors import UserError, listed, nearest

TABLES = (".csv", ".parquet")


@dataclass(frozen=True)
class TableSource:
    """Where images and attributes are, and how to read them.

    path: CSV, Parquet, `.npz`, or a folder of images. A CSV of the same name beside an `.npz` adds columns,
        row by row.
    images: the column naming image files relative to the table (default "image"), or the array of an `.npz`
        (default "images", or `train_images`, `val_images`, `test_images`, which also give the splits).
    masks: column or array of a mask, or {mask name: column or array}.
    size: (height, width); channels: 1 or 3. Without them all images must be equal.
    attributes: {name: spec}; columns not named here are inferred.
    group: column whose values (patients) stay in one split.
    where: {column: accepted values, or "present"}; all must hold.
    areas: {mask name: region layout}; each mask's areas become attributes `<mask>_<region>_area`, see
        data/regions.py.
    """

    path: Path
    name: str | None = None
    images: str | None = None
    masks: str | Mapping[str, str] | None = None
    size: tuple[int, int] | None = None
    channels: Literal[1, 3] | None = None
    attributes: Mapping[str, AttributeSpec] | None = None
    group: str | None = None
    where: Where | None = None
    missing: tuple[str, ...] = ()
    areas: Mapping[str, Layout] | None = None
    split: SplitSettings = field(default_factory=SplitSettings)

    @property
    def mask_columns(self) -> dict[str, str]:
        """Mask name to column or array."""
        return {self.masks: self.masks} if isinstance(self.masks, str) else dict(self.masks or {})

    def select(self, frame: pd.DataFrame, ignore: Mapping[str, str | None] | None = None) -> Selected:
        """Rows and attributes of the raw columns; `ignore` as in `columns.select`."""
        roles = {self.split.column: None} if self.split.column else {}
        return select(
            frame,
            self.path,
            self.attributes or {},
            self.where or {},
            self.group,
            {**(ignore or {}), **roles},
        )


class Item(NamedTuple):
    """One row's image and masks, read when called."""

    image: Callable[[], np.ndarray]
    masks: tuple[Callable[[], np.ndarray], ...]


@dataclass(frozen=True)
class Source:
    """A loaded frame (its index counts the rows of the file) and its images.

    `files`: everything the contents depend on. `left_out`: why a column is no attribute.
    """

    name: str
    frame: pd.DataFrame
    attributes: dict[str, Attribute]
    left_out: dict[str, str]
    mask_names: tuple[str, ...]
    files: tuple[Path, ...]
    items: Callable[[], Iterator[Item]]
    labels: Callable[[int], str]  # position in the frame -> what a message calls the row


def load_source(source: TableSource) -> Source:
    """Frame, attributes and image places of a source. Raises `UserError`; reads no pixels."""
    return {"folder": _folder, "npz": _npz, "table": _files}[kind_of(source.path)](source)


def kind_of(path: Path) -> Literal["folder", "npz", "table"]:
    """What a path is, by its suffix. Raises `UserError` where it is nothing of that."""
    if not path.exists():
        raise UserError(f"{path} does not exist; check the path of the data.")
    if path.is_dir():
        return "folder"
    if path.suffix.lower() == ".npz":
        return "npz"
    if path.suffix.lower() in TABLES:
        return "table"
    raise UserError(
        f"{path} is no table; expected a folder of images or a file ending in {', '.join((*TABLES, '.npz'))}."
    )


def _files(source: TableSource) -> Source:
    frame = read_columns(source.path, source.missing)
    image_column = source.images or "image"
    columns = {
        image_column: "image column",
        **dict.fromkeys(source.mask_columns.values(), "mask column"),
    }
    for column, what in columns.items():
        require(frame, column, source.path, what)
    selected = source.select(frame, dict.fromkeys(columns))
    frame = selected.frame
    paths = {}
    for column, what in columns.items():
        empty = frame.index[frame[column].isna()]
        if len(empty):
            raise UserError(
                f"The {what} {column!r} of {source.path} is empty in {listed(empty)}; fill it in, or leave "
                f"these rows out with `where: {{{column}: present}}`."
            )
        paths[column] = [source.path.parent / str(cell) for cell in frame[column]]
        absent = [row for row, path in zip(frame.index, paths[column], strict=True) if not path.is_file()]
        if absent:
            raise UserError(
                f"Column {column!r} of {source.path} names files that do not exist, in {listed(absent)}, "
                f"the first being {source.path.parent / str(frame[column][absent[0]])}; paths are relative "
                "to the table."
            )
        for path in paths[column]:
            reader_for(path)
    repeated = frame[image_column].duplicated(keep=False)
    if repeated.any():
        again = frame.index[frame[image_column].duplicated()]
        raise UserError(
            f"{source.path} names an image more than once, again in {listed(again)}, the first being "
            f"{frame[image_column][again[0]]!r}; keep one row per image."
        )
    images = paths[image_column]
    masks = [paths[column] for column in source.mask_columns.values()]
    return Source(
        name=source.name or source.path.stem,
        frame=frame,
        attributes=selected.attributes,
        left_out=selected.left_out,
        mask_names=tuple(source.mask_columns),
        files=(source.path, *dict.fromkeys(itertools.chain(*paths.values()))),
        items=lambda: (
            Item(_reading(image), tuple(map(_reading, own)))
            for image, *own in zip(images, *masks, strict=True)
        ),
        labels=lambda place: f"row {frame.index[place]} ({images[place].name})",
    )


def _folder(source: TableSource) -> Source:
    if source.masks or source.images:
        raise UserError(
            f"{source.path} is a folder, which has no columns for `images` or `masks`; list image and mask "
            "files in a CSV."
        )
    inside = sorted(
        path for path in source.path.rglob("*") if path.is_file() and not path.name.startswith(".")
    )
    found = [path for path in inside if suffix_of(path) in (*READERS, *NOT_READ)]
    if not found:
        raise UserError(
            f"{source.path} holds no image ({', '.join(READERS)}) in any of its folders; check the path of "
            "the data."
        )
    parts = [path.relative_to(source.path).parts for path in found]
    columns: dict[str, list[str | None]] = {
        "file": ["/".join(part) for part in parts],
        "folder": ["/".join(p[:-1]) or None for p in parts],
    }
    for level in range(max(map(len, parts)) - 1):
        columns[f"folder{level + 1}"] = [part[level] if len(part) > level + 1 else None for part in parts]
    part = "part of the path, which is a label only where it is declared"
    selected = source.select(pd.DataFrame(columns, dtype="str"), dict.fromkeys(columns, part))
    frame = selected.frame
    chosen = [source.path / str(file) for file in frame["file"]]
    for path in chosen:
        reader_for(path)
    return Source(
        name=source.name or source.path.name,
        frame=frame,
        attributes=selected.attributes,
        left_out=selected.left_out,
        mask_names=(),
        files=tuple(chosen),
        items=lambda: (Item(_reading(path), ()) for path in chosen),
        labels=lambda place: f"row {frame.index[place]} ({frame['file'].iloc[place]})",
    )


def _npz(source: TableSource) -> Source:
    path, headers = source.path, npz_headers(source.path)
    wanted = source.images or "images"
    parts: tuple[str, ...] = ("",)
    if wanted not in headers:
        parts = tuple(f"{split}_" for split in SPLITS if f"{split}_{wanted}" in headers)
        if not parts:
            pictures = [name for name, header in headers.items() if len(header.shape) in (3, 4)]
            raise UserError(
                f"{path} has no array {wanted!r} of images{nearest(wanted, pictures)}; name one in `images`."
            )
    lengths = {part: headers[part + wanted].shape[0] for part in parts}
    frame = _npz_columns(path, headers, lengths, source.missing)
    beside = path.with_suffix(".csv")
    if beside.exists():
        frame = _merged(frame, read_columns(beside, source.missing), path, beside)
    if parts != ("",) and "split" not in frame:
        frame["split"] = np.repeat([part.rstrip("_") for part in parts], list(lengths.values()))
    for array in (wanted, *source.mask_columns.values()):
        for part, length in lengths.items():
            if part + array not in headers:
                raise UserError(f"{path} has no array {part + array!r}{nearest(part + array, headers)}.")
            shape = headers[part + array].shape
            if len(shape) not in (3, 4) or shape[0] != length:
                raise UserError(
                    f"Array {part + array!r} of {path} has shape {shape}; expected {length} images (N, H, "
                    "W), (N, C, H, W)."
                )
    if not len(frame):
        raise UserError(f"Array {wanted!r} of {path} holds no image; check how the file was written.")
    keep = np.zeros(len(frame), dtype=bool)
    selected = source.select(frame)
    frame = selected.frame
    keep[frame.index] = True

    def items() -> Iterator[Item]:
        names = [wanted, *source.mask_columns.values()]
        streams = [_stream(path, [part + name for part in parts], headers) for name in names]
        for kept, arrays in zip(keep, zip(*streams, strict=True), strict=True):
            if kept:
                image, *masks = (_constant(array) for array in arrays)
                yield Item(image, tuple(masks))

    return Source(
        name=source.name or path.stem,
        frame=frame,
        attributes=selected.attributes,
        left_out=selected.left_out,
        mask_names=tuple(source.mask_columns),
        files=(path, beside) if beside.exists() else (path,),
        items=items,
        labels=lambda place: f"row {frame.index[place]}",
    )


def _npz_columns(
    path: Path, headers: Mapping[str, ArrayHeader], lengths: Mapping[str, int], missing: Sequence[str]
) -> pd.DataFrame:
    """Every array with one value per image is a column."""
    first = next(iter(lengths))
    columns = {}
    for name in (name.removeprefix(first) for name in headers if name.startswith(first)):
        shapes = {part: headers[part + name].shape for part in lengths if part + name in headers}
        if all(shapes.get(part) in ((length,), (length, 1)) for part, length in lengths.items()):
            values = np.concatenate([read_npz(path, part + name).reshape(-1) for part in lengths])
            columns[name] = natural(
                pd.Series(np.char.decode(values) if values.dtype.kind == "S" else values), missing
            )
    return pd.DataFrame(columns, index=pd.RangeIndex(sum(lengths.values())))


def _merged(frame: pd.DataFrame, beside: pd.DataFrame, path: Path, csv: Path) -> pd.DataFrame:
    if len(beside) != len(frame):
        raise UserError(
            f"{csv} has {len(beside)} rows and {path} {len(frame)} images; the rows of both must correspond."
        )
    for column in beside.columns.intersection(frame.columns):
        one, other = texts(beside[column]), texts(frame[column])
        differ = frame.index[~((one == other) | (one.isna() & other.isna()))]
        if len(differ):
            raise UserError(
                f"Column {column!r} differs between {csv} and {path} in {listed(differ)}; correct or remove "
                "one of them."
            )
    return pd.concat([frame, beside.drop(columns=frame.columns, errors="ignore")], axis=1)


def _stream(path: Path, names: Sequence[str], headers: Mapping[str, ArrayHeader]) -> Iterator[np.ndarray]:
    """The items of several arrays one after the other."""
    for name in names:
        yield from _images(path, name, headers[name].shape)


def _images(path: Path, name: str, shape: tuple[int, ...]) -> Iterator[np.ndarray]:
    """Items of an array as (H, W) or (H, W, C)."""
    first, last = (shape[1] in (1, 3), shape[3] in (1, 3)) if len(shape) == 4 else (False, True)
    if first == last:
        raise UserError(
            f"Array {name!r} of {path} has shape {shape}, in which the channels (1 or 3) cannot be told; "
            "save it as (N, H, W)."
        )
    return (item.transpose(1, 2, 0) for item in stream_npz(path, name)) if first else stream_npz(path, name)


def _reading(path: Path) -> Callable[[], np.ndarray]:
    return lambda: read_image(path)


def _constant(array: np.ndarray) -> Callable[[], np.ndarray]:
    return lambda: array

"""What a user points at: a CSV or Parquet file naming images, an `.npz` of arrays, or a folder of images.

Enter: `TableSource`, the settings. Leave: `Source`, the frame with typed attributes and where each row's
image and masks are; no pixel has been read yet.

Rows are counted from 0 in messages, in the order of the file.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd

from cfssl.data.columns import AttributeSpec, natural, positives, read_columns, resolve_attribute, typed
from cfssl.data.npz import ArrayHeader, npz_headers, read_npz, stream_npz
from cfssl.data.readers import NOT_READ, READERS, read_image, reader_for, suffix_of
from cfssl.data.splits import SplitSettings
from cfssl.data.table import SPLITS, Attribute, texts
from cfssl.errors import UserError, listed, nearest, quoted

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
    """

    path: Path
    name: str | None = None
    images: str | None = None
    masks: str | Mapping[str, str] | None = None
    size: tuple[int, int] | None = None
    channels: Literal[1, 3] | None = None
    attributes: Mapping[str, AttributeSpec] | None = None
    group: str | None = None
    where: Mapping[str, Sequence[Any] | Literal["present"]] | None = None
    missing: tuple[str, ...] = ()
    split: SplitSettings = field(default_factory=SplitSettings)

    @property
    def mask_columns(self) -> dict[str, str]:
        """Mask name to column or array."""
        return {self.masks: self.masks} if isinstance(self.masks, str) else dict(self.masks or {})


class Item(NamedTuple):
    """One row's image and masks, read when called."""

    image: Callable[[], np.ndarray]
    masks: tuple[Callable[[], np.ndarray], ...]


@dataclass(frozen=True)
class Source:
    """A loaded frame (its index counts the rows of the file) and its images.

    `files`: everything the contents depend on.
    """

    name: str
    frame: pd.DataFrame
    attributes: dict[str, Attribute]
    mask_names: tuple[str, ...]
    files: tuple[Path, ...]
    items: Callable[[], Iterator[Item]]
    labels: Callable[[int], str]  # position in the frame -> what a message calls the row


def load_source(source: TableSource) -> Source:
    """Frame, attributes and image places of a source. Raises `UserError`; reads no pixels."""
    if not source.path.exists():
        raise UserError(f"{source.path} does not exist; check the path of the data.")
    if source.path.is_dir():
        read = _folder
    elif source.path.suffix.lower() == ".npz":
        read = _npz
    elif source.path.suffix.lower() in TABLES:
        read = _files
    else:
        raise UserError(
            f"{source.path} is no table; expected a folder of images or a file ending in "
            f"{', '.join((*TABLES, '.npz'))}."
        )
    return read(source)


def _files(source: TableSource) -> Source:
    frame = read_columns(source.path, source.missing)
    image_column = source.images or "image"
    columns = {
        image_column: "image column",
        **dict.fromkeys(source.mask_columns.values(), "mask column"),
    }
    for column, what in columns.items():
        _require(frame, column, source.path, what)
    frame, attributes = _select(source, frame, ignore=set(columns))
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
        attributes=attributes,
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
    # where a file lies is a label only if the user says so
    frame, attributes = _select(source, pd.DataFrame(columns, dtype="str"), ignore=set(columns))
    chosen = [source.path / str(file) for file in frame["file"]]
    for path in chosen:
        reader_for(path)
    return Source(
        name=source.name or source.path.name,
        frame=frame,
        attributes=attributes,
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
    total = len(frame)
    frame, attributes = _select(source, frame, ignore=set())
    keep = np.zeros(total, dtype=bool)
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
        attributes=attributes,
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


def _select(
    source: TableSource, frame: pd.DataFrame, ignore: set[str]
) -> tuple[pd.DataFrame, dict[str, Attribute]]:
    """Derived columns, then `where`, then types: the frame with its remaining rows (index kept) and its
    attributes.

    ignore: columns that are not taken for attributes unless declared.
    """
    specs = dict(source.attributes or {})
    ignore = ignore | {column for column in (source.group, source.split.column, "split") if column}
    derived = {}
    for name, spec in specs.items():
        column = spec.column or name
        _require(frame, column, source.path, f"column for attribute {name!r}")
        if name == "split" or (spec.column not in (None, name) and name in frame.columns):
            raise UserError(
                f"Attribute {name!r} has the name of another column of {source.path}; choose another name."
            )
        derived[name] = positives(name, spec, frame[column]) if spec.positive else frame[column]
        if spec.column and not spec.positive:
            ignore.add(spec.column)  # renamed
    frame = frame.assign(**derived)
    frame = _filtered(source, frame)
    if source.group is not None:
        _require(frame, source.group, source.path, "group column")
        frame[source.group] = texts(frame[source.group])
    attributes = {}
    for name in [*specs, *(column for column in frame.columns if column not in ignore | set(specs))]:
        attribute = resolve_attribute(name, frame[name], specs.get(name))
        if attribute is not None:
            attributes[name] = attribute
    return typed(frame, attributes), attributes


def _filtered(source: TableSource, frame: pd.DataFrame) -> pd.DataFrame:
    keep = np.ones(len(frame), dtype=bool)
    for column, accepted in (source.where or {}).items():
        _require(frame, column, source.path, "column for `where`")
        if isinstance(accepted, str):
            if accepted != "present":
                raise UserError(
                    f"`where.{column}` is {accepted!r}; give a list of accepted values, or the word present."
                )
            keep &= frame[column].notna().to_numpy()
        else:
            values = set(texts(pd.Series(list(accepted), dtype=object)))
            held = texts(frame[column])
            if not held.isin(values).any():
                raise UserError(
                    f"`where.{column}` accepts {quoted(accepted)}, and {source.path} holds "
                    f"{quoted(held.dropna().unique())}."
                )
            keep &= held.isin(values).to_numpy()
    if not keep.any():
        raise UserError(
            f"The filters `where` ({quoted(source.where or {})}) together leave no row of {source.path}; "
            "relax them."
        )
    return frame[keep].copy()


def _require(frame: pd.DataFrame, column: str, path: Path, what: str) -> None:
    if column not in frame.columns:
        raise UserError(f"{path} has no {what} {column!r}{nearest(column, frame.columns)}.")

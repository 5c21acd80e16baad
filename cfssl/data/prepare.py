"""From a source to a prepared table: every image is read once, and never decoded again.

Enter: a `TableSource`, or arrays in memory (phantoms). Leaves: the folder that `ImageTable.open` reads.

A prepared table stands for the files it was made from. Its content key holds what can be seen without opening
anything: the settings, size and time of the table file, and the times of the folders in a folder of images.
The image files that a table names are not in the key; they are written down beside the table, and compared
with it by `changed_files`.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from cfssl.data.columns import typed
from cfssl.data.readers import ADVICE, BadImage, standardise, standardise_mask
from cfssl.data.regions import AreaSpec, declared_areas
from cfssl.data.sources import Source, TableSource, kind_of, load_source
from cfssl.data.splits import SplitSettings
from cfssl.data.table import Attribute, ImageTable
from cfssl.data.writer import CHUNK_BYTES, Chunk, Progress, is_table, write_table
from cfssl.errors import UserError, nearest, quoted
from cfssl.files import read_json


def prepare(source: TableSource, folder: Path | str, progress: Progress | None = None) -> ImageTable:
    """Reads everything `source` names into `folder` and opens it; a folder prepared from the same files as
    they are now is opened as it is.

    progress: called with (images done, images in all). Raises `UserError`, and then leaves what was at
        `folder` as it was.
    """
    folder = Path(folder)
    state = source_state(source)
    if is_table(folder) and read_json(folder / "table.json").get("source") == state:
        table = ImageTable.open(folder)
        if not changed_files(table).changed:
            return table
    loaded = load_source(source)
    areas = declared_areas(source.areas or {}, loaded.mask_names)
    refuse_taken(areas, loaded.frame, source.path)
    return write_table(
        folder,
        name=loaded.name,
        frame=loaded.frame,
        attributes=loaded.attributes | {name: Attribute(name, "continuous", declared=True) for name in areas},
        left_out=loaded.left_out,
        areas=areas,
        chunks=_read(loaded, source, state),
        mask_names=loaded.mask_names,
        group=source.group,
        split=source.split,
        source=state,
        files=_states(loaded.files),
        progress=progress,
    )


def source_state(source: TableSource) -> dict[str, Any]:
    """The settings and what can be seen of the source without opening it, as JSON: size and time of change of
    the table file, or times of the folders in a folder of images. Its fingerprint is the content key of the
    prepared table.

    Raises `UserError` where there is no source.
    """
    kind = kind_of(source.path)
    path = source.path.parent.resolve() / source.path.name  # images lie relative to where the table lies
    seen: list[Any]
    if kind == "folder":
        seen = sorted([folder, Path(folder).stat().st_mtime_ns] for folder, _, _ in os.walk(path))
    else:
        beside = [path.with_suffix(".csv")] if kind == "npz" else []
        stats = [(file.name, file.stat()) for file in (path, *beside) if file.exists()]
        seen = [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]
    return {"settings": plain(source) | {"path": str(path)}, "seen": seen}


class Comparison(NamedTuple):
    """`changed`: files that are not as they were when the table was made. `compared` of `total`."""

    changed: list[Path]
    compared: int
    total: int


def changed_files(table: ImageTable, most: int | None = None) -> Comparison:
    """Compares the files that a table was made from with what they are now: all, or `most` of them, evenly
    spread. A table made from arrays has none."""
    record = table.folder / "files.parquet"
    if not record.is_file():
        return Comparison([], 0, 0)
    files = pd.read_parquet(record)
    total = len(files)
    if most is not None and total > most:
        files = files.iloc[np.linspace(0, total - 1, most).astype(np.int64)]
    changed = []
    for path, size, time in zip(files["path"], files["size"], files["time"], strict=True):
        try:
            stat = os.stat(path)  # noqa: PTH116  a third of the time of Path.stat, and there may be millions
        except OSError:
            changed.append(Path(path))
            continue
        if (stat.st_size, stat.st_mtime_ns) != (size, time):
            changed.append(Path(path))
    return Comparison(changed, len(files), total)


def save_prepared(
    folder: Path | str,
    name: str,
    frame: pd.DataFrame,
    attributes: Mapping[str, Attribute],
    images: np.ndarray,
    masks: np.ndarray | None = None,
    mask_names: Sequence[str] = (),
    group: str | None = None,
    split: SplitSettings | None = None,
    source: Mapping[str, Any] | None = None,
    areas: Mapping[str, AreaSpec] | None = None,
    progress: Progress | None = None,
) -> ImageTable:
    """Writes arrays in memory as a prepared table, replacing the table that was at `folder`.

    images: (N, C, H, W) uint8 or uint16, volumes (N, C, D, H, W). masks: (N, M, H, W) of 0 and 1, one
        channel per mask name.
    frame: N rows; a column `split` is taken as given splits unless `split.fractions` asks for own ones.
    source: anything JSON holds that says where the arrays come from.
    areas: which attributes are areas of a mask, and how they were measured. Raises `UserError` where these do
        not fit together.
    """
    if images.ndim not in (4, 5) or images.dtype not in (np.uint8, np.uint16):
        raise UserError(
            f"Images of {name!r} are {images.dtype} of shape {images.shape}; expected uint8 or uint16 (N, "
            "C, H, W)."
        )
    if len(frame) != len(images) or not len(images):
        raise UserError(
            f"Table {name!r} has {len(frame)} rows and {len(images)} images; give one row per image."
        )
    expected = (len(images), len(mask_names), *images.shape[2:])
    if (masks is None) != (not mask_names) or (masks is not None and masks.shape != expected):
        raise UserError(
            f"Masks of {name!r} have shape {None if masks is None else masks.shape}; expected {expected}, a "
            "channel per name."
        )
    if masks is not None and int(masks.max(initial=0)) > 1:
        raise UserError(f"Masks of {name!r} hold values up to {masks.max()}; expected 0 and 1.")
    for attribute in attributes:
        if attribute not in frame.columns:
            raise UserError(
                f"Table {name!r} has no column for attribute "
                f"{attribute!r}{nearest(attribute, frame.columns)}."
            )

    if areas and images.ndim != 4:
        raise UserError(f"Table {name!r} holds volumes, and areas are measured on images; leave `areas` out.")
    for area, spec in (areas or {}).items():
        if area not in attributes:
            raise UserError(
                f"Table {name!r} has no attribute for the area {area!r}{nearest(area, attributes)}."
            )
        for mask in (spec.structure, spec.map_structure):
            if mask not in mask_names:
                raise UserError(
                    f"Area {area!r} of table {name!r} is measured on {mask!r}, which is no "
                    f"mask{nearest(mask, mask_names)}."
                )

    def chunks() -> Iterator[Chunk]:
        step = max(1, CHUNK_BYTES // max(1, images[:1].nbytes))
        for start in range(0, len(images), step):
            rows = slice(start, start + step)
            yield images[rows], None if masks is None else masks[rows].astype(np.uint8)

    return write_table(
        Path(folder),
        name=name,
        frame=typed(frame.reset_index(drop=True), attributes),
        attributes=attributes,
        left_out={},
        areas=areas or {},
        chunks=chunks(),
        mask_names=mask_names,
        group=group,
        split=split or SplitSettings(),
        source=None if source is None else json.loads(json.dumps(source)),
        files=None,
        progress=progress,
    )


def refuse_taken(areas: Mapping[str, AreaSpec], frame: pd.DataFrame, path: Path) -> None:
    """Raises `UserError` where an area would have the name of a column."""
    taken = [name for name in areas if name in frame.columns]
    if taken:
        raise UserError(
            f"{path} has {'columns' if len(taken) > 1 else 'a column'} {quoted(taken)}, and `areas` measures "
            "attributes of the same name; rename the columns or the masks."
        )


def _states(files: Sequence[Path]) -> pd.DataFrame:
    """Size and time of change of every file."""
    paths = [str(path.absolute()) for path in files]
    stats = [os.stat(path) for path in paths]  # noqa: PTH116
    return pd.DataFrame(
        {
            "path": paths,
            "size": [stat.st_size for stat in stats],
            "time": [stat.st_mtime_ns for stat in stats],
        }
    )


def plain(value: Any) -> Any:
    """Settings as JSON would give them back."""
    if is_dataclass(value):
        return {item.name: plain(getattr(value, item.name)) for item in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, str) or not isinstance(value, Sequence):
        return str(value) if isinstance(value, Path) else value
    return [plain(item) for item in value]


def _read(loaded: Source, source: TableSource, state: dict[str, Any]) -> Iterator[Chunk]:
    """Standardised images in chunks.

    Raises one `UserError` at the end that counts everything that is wrong, or where the source is no longer
    in the `state` in which it was when its key was computed.
    """
    problems: dict[str, list[str]] = {}
    images: list[np.ndarray] = []
    masks: list[np.ndarray] = []
    first: np.ndarray | None = None
    for place, item in enumerate(loaded.items()):
        try:
            image = standardise(item.image(), source.size, source.channels)
            first = image if first is None else first
            _check_equal(image, first)
            own = [standardise_mask(mask(), source.size, image.shape[1:]) for mask in item.masks]
        except BadImage as problem:
            problems.setdefault(problem.kind, []).append(f"{loaded.labels(place)}: {problem.detail}")
        else:
            if not problems:  # otherwise nothing will be kept, and the rest is read only to be judged
                images.append(image)
                masks.extend(np.stack(own)[None] if own else ())
        if images and len(images) * images[0].nbytes >= CHUNK_BYTES:
            yield np.stack(images), np.stack(masks) if masks else None
            images, masks = [], []
    if problems:
        count = len(loaded.frame)
        raise UserError(
            " ".join(
                f"{len(found)} of {count} images of {source.path} {kind} "
                f"({'; '.join(found[:3])}{'; ...' if len(found) > 3 else ''}); {ADVICE[kind]}."
                for kind, found in problems.items()
            )
        )
    if source_state(source) != state:
        raise UserError(f"{source.path} was changed while it was read; run again.")
    if images:
        yield np.stack(images), np.stack(masks) if masks else None


def _check_equal(image: np.ndarray, first: np.ndarray) -> None:
    if image.dtype != first.dtype:
        raise BadImage("differ in depth", f"{image.dtype}, the first image {first.dtype}")
    if len(image) != len(first):
        raise BadImage("differ in channels", f"{len(image)}, the first image {len(first)}")
    if image.shape != first.shape:
        raise BadImage(
            "differ in size",
            f"{image.shape[1]}×{image.shape[2]}, the first image {first.shape[1]}×{first.shape[2]}",
        )

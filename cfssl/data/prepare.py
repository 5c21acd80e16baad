"""From a source to a prepared table: every image is read once, and never decoded again.

Enter: a `TableSource`, or arrays in memory (phantoms). Leaves: the folder that `ImageTable.open` reads. It
is written under a temporary name beside its place, flushed to disk and renamed, so it is either whole or
absent. Memory is bounded by one chunk of images.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import pandas as pd

from cfssl.data.columns import typed
from cfssl.data.readers import ADVICE, BadImage, standardise, standardise_mask
from cfssl.data.sources import Source, TableSource, load_source
from cfssl.data.splits import SplitSettings, assign_splits
from cfssl.data.table import FORMAT, Attribute, ImageTable
from cfssl.errors import UserError, nearest
from cfssl.files import fsync_directory, read_json, write_json
from cfssl.provenance import fingerprint

CHUNK_BYTES = 1 << 24
Progress = Callable[[int, int], None]
Chunk = tuple[np.ndarray, np.ndarray | None]  # images (n, C, H, W), masks (n, M, H, W)


def prepare(source: TableSource, folder: Path | str, progress: Progress | None = None) -> ImageTable:
    """Reads everything `source` names into `folder` and opens it; a folder prepared from the same state is
    opened as it is.

    progress: called with (images done, images in all). Raises `UserError`, and then leaves what was at
        `folder` as it was.
    """
    folder = Path(folder)
    loaded = load_source(source)
    state = _state(source, loaded)
    if _is_table(folder) and read_json(folder / "table.json").get("source") == state:
        return ImageTable.open(folder)
    return _write(
        folder,
        name=loaded.name,
        frame=loaded.frame,
        attributes=loaded.attributes,
        chunks=_read(loaded, source),
        mask_names=loaded.mask_names,
        group=source.group,
        split=source.split,
        source=state,
        progress=progress,
    )


def source_state(source: TableSource) -> dict[str, Any]:
    """What the prepared table depends on, as JSON: the settings, and size and time of change of every file.

    Its fingerprint is the content key of the prepared table. Raises `UserError` where the source cannot be
    read.
    """
    return _state(source, load_source(source))


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
    progress: Progress | None = None,
) -> ImageTable:
    """Writes arrays in memory as a prepared table, replacing the table that was at `folder`.

    images: (N, C, H, W) uint8 or uint16, volumes (N, C, D, H, W). masks: (N, M, H, W) of 0 and 1, one
        channel per mask name.
    frame: N rows; a column `split` is taken as given splits unless `split.fractions` asks for own ones.
    source: anything JSON holds that says where the arrays come from. Raises `UserError` where these do not
        fit together.
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

    def chunks() -> Iterator[Chunk]:
        step = max(1, CHUNK_BYTES // max(1, images[:1].nbytes))
        for start in range(0, len(images), step):
            rows = slice(start, start + step)
            yield images[rows], None if masks is None else masks[rows].astype(np.uint8)

    return _write(
        Path(folder),
        name=name,
        frame=typed(frame.reset_index(drop=True), attributes),
        attributes=attributes,
        chunks=chunks(),
        mask_names=mask_names,
        group=group,
        split=split or SplitSettings(),
        source=None if source is None else json.loads(json.dumps(source)),
        progress=progress,
    )


def _state(source: TableSource, loaded: Source) -> dict[str, Any]:
    digest = hashlib.blake2b(digest_size=16)
    total = 0
    for path in loaded.files:
        stat = path.stat()
        total += stat.st_size
        digest.update(f"{path.resolve()}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    settings = _plain(source) | {"path": str(source.path.resolve())}
    return {"settings": settings, "files": len(loaded.files), "bytes": total, "digest": digest.hexdigest()}


def _plain(value: Any) -> Any:
    """Settings as JSON would give them back."""
    if is_dataclass(value):
        return {item.name: _plain(getattr(value, item.name)) for item in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, str) or not isinstance(value, Sequence):
        return str(value) if isinstance(value, Path) else value
    return [_plain(item) for item in value]


def _read(loaded: Source, source: TableSource) -> Iterator[Chunk]:
    """Standardised images in chunks.

    Raises one `UserError` at the end that counts everything that is wrong.
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


def _write(
    folder: Path,
    *,
    name: str,
    frame: pd.DataFrame,
    attributes: Mapping[str, Attribute],
    chunks: Iterator[Chunk],
    mask_names: Sequence[str],
    group: str | None,
    split: SplitSettings,
    source: dict[str, Any] | None,
    progress: Progress | None,
) -> ImageTable:
    if folder.exists() and not _is_table(folder) and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(
            f"{folder} exists and is no prepared table; it is not overwritten, choose another folder."
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.", suffix=".part"))
    try:
        pixels, content = _write_arrays(temporary, chunks, len(frame), progress)
        splits, keep = assign_splits(frame, attributes, group, content, split)
        frame = frame.assign(split=splits)
        if not keep.all():
            frame = frame[keep]
            for file in ("images.npy", "masks.npy") if mask_names else ("images.npy",):
                _keep_rows(temporary / file, np.flatnonzero(keep))
        frame.to_parquet(temporary / "table.parquet", index=False)
        _fsync(temporary / "table.parquet")
        described = [attribute.to_json() for attribute in attributes.values()]
        content_key = fingerprint(
            pixels,
            hashlib.blake2b(frame.to_csv(index=False).encode()).hexdigest(),
            described,
            list(mask_names),
            group,
        )
        array = np.load(temporary / "images.npy", mmap_mode="r")
        record = {
            "format": FORMAT,
            "name": name,
            "rows": len(frame),
            "shape": list(array.shape[1:]),
            "dtype": str(array.dtype),
            "mask_names": list(mask_names),
            "attributes": described,
            "group": group,
            "fingerprint": content_key,
            "source": source,
        }
        write_json(temporary / "table.json", record)
        temporary.chmod(0o755)  # mkdtemp makes private folders; tables are shared with colleagues
        _put_in_place(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return ImageTable.open(folder)


def _write_arrays(
    folder: Path, chunks: Iterator[Chunk], count: int, progress: Progress | None
) -> tuple[str, np.ndarray]:
    """Writes images.npy and masks.npy.

    Returns a hash of everything, and a number per row (N,) that is equal where the pixels are identical.
    """
    digests = np.zeros((count, 2), dtype=np.uint64)
    everything = hashlib.blake2b(digest_size=16)
    done = 0
    with (
        ArrayFile(folder / "images.npy", count) as image_file,
        ArrayFile(folder / "masks.npy", count) as mask_file,
    ):
        for images, masks in chunks:
            if done == 0:
                everything.update(f"{images.shape[1:]} {images.dtype}".encode())
            image_file.append(images)
            for row, image in enumerate(images, start=done):
                digest = hashlib.blake2b(np.ascontiguousarray(image).data, digest_size=16).digest()
                digests[row] = np.frombuffer(digest, np.uint64)
            if masks is not None:
                mask_file.append(masks)
                everything.update(np.ascontiguousarray(masks).data)
            done += len(images)
            if progress is not None:
                progress(done, count)
    everything.update(digests.tobytes())
    return everything.hexdigest(), pd.DataFrame(digests).groupby([0, 1], sort=False).ngroup().to_numpy()


class ArrayFile:
    """A `.npy` of `count` items, appended to. Written as a stream: a full disk is then an error and not a
    crash, which is what writing through a memory map would make of it."""

    def __init__(self, path: Path, count: int) -> None:
        self.path, self.count = path, count
        self._stream: IO[bytes] | None = None

    def append(self, items: np.ndarray) -> None:
        """Adds items (n, ...); the first ones fix shape and type."""
        try:
            if self._stream is None:
                self._stream = self.path.open("wb")
                header = {
                    "descr": np.lib.format.dtype_to_descr(items.dtype),
                    "fortran_order": False,
                    "shape": (self.count, *items.shape[1:]),
                }
                np.lib.format.write_array_header_1_0(self._stream, header)
            self._stream.write(np.ascontiguousarray(items).data)
        except OSError as error:
            raise UserError(f"{self.path} cannot be written ({error.strerror}); free space there.") from None

    def __enter__(self) -> "ArrayFile":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._stream is not None:
            self._stream.flush()
            os.fsync(self._stream.fileno())
            self._stream.close()


def _keep_rows(path: Path, rows: np.ndarray) -> None:
    """Rewrites an array with only the given rows."""
    old = np.load(path, mmap_mode="r")
    fewer = path.with_suffix(".fewer")
    step = max(1, CHUNK_BYTES // old[:1].nbytes)
    with ArrayFile(fewer, len(rows)) as new:
        for start in range(0, len(rows), step):
            new.append(old[rows[start : start + step]])
    fewer.replace(path)


def _put_in_place(temporary: Path, folder: Path) -> None:
    """Renames, moving a table that is in the way aside first. Of two writers the later one stays."""
    fsync_directory(temporary)
    aside = temporary.with_suffix(".old")
    if _is_table(folder):
        folder.rename(aside)
    try:
        temporary.rename(folder)
    except OSError:
        if aside.exists() and not folder.exists():
            aside.rename(folder)
        if not _is_table(folder):  # else another process finished the same table in between, which is as good
            raise
    fsync_directory(folder.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _is_table(folder: Path) -> bool:
    return (folder / "table.json").is_file()


def _fsync(path: Path) -> None:
    with path.open("rb") as stream:
        os.fsync(stream.fileno())

"""The folder of a prepared table, written whole or not at all.

Enter: a frame with typed attributes, and images in chunks. Leaves: the folder that `ImageTable.open` reads.
Memory is bounded by one chunk of images.
"""

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import pandas as pd
import torch

from cfssl.data.regions import AreaSpec, measure_areas
from cfssl.data.splits import SplitSettings, assign_splits
from cfssl.data.table import FORMAT, Attribute, ImageTable
from cfssl.errors import UserError
from cfssl.files import atomic_folder, write_json
from cfssl.provenance import fingerprint

CHUNK_BYTES = 1 << 24
Progress = Callable[[int, int], None]
Chunk = tuple[np.ndarray, np.ndarray | None]  # images (n, C, H, W), masks (n, M, H, W)


def write_table(
    folder: Path,
    *,
    name: str,
    frame: pd.DataFrame,
    attributes: Mapping[str, Attribute],
    left_out: Mapping[str, str],
    areas: Mapping[str, AreaSpec],
    chunks: Iterator[Chunk],
    mask_names: Sequence[str],
    group: str | None,
    split: SplitSettings,
    source: dict[str, Any] | None,
    files: pd.DataFrame | None,
    progress: Progress | None,
) -> ImageTable:
    """Writes `folder`, replacing the table that was there, and opens it.

    areas: how attributes are measured on the masks; those without a column are measured here, and are missing
        where the mask they are laid out on is empty.
    files: what the table was made from, kept beside it as files.parquet. Raises `UserError`, and then leaves
    what was at `folder` as it was.
    """
    if folder.exists() and not is_table(folder) and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(
            f"{folder} exists and is no prepared table; it is not overwritten, choose another folder."
        )
    with atomic_folder(folder) as temporary:
        pixels, content = _write_arrays(temporary, chunks, len(frame), progress)
        unmeasured = {name: spec for name, spec in areas.items() if name not in frame}
        if unmeasured:
            frame = frame.assign(**_measured(temporary / "masks.npy", mask_names, unmeasured))
        splits, keep = assign_splits(frame, attributes, group, content, split)
        frame = frame.assign(split=splits)
        if not keep.all():
            frame = frame[keep]
            for file in ("images.npy", "masks.npy") if mask_names else ("images.npy",):
                _keep_rows(temporary / file, np.flatnonzero(keep))
        _write_parquet(temporary / "table.parquet", frame)
        if files is not None:
            _write_parquet(temporary / "files.parquet", files)
        described = [attribute.to_json() for attribute in attributes.values()]
        measures = {name: spec.to_json() for name, spec in areas.items()}
        content_key = fingerprint(
            pixels,
            hashlib.blake2b(frame.to_csv(index=False).encode()).hexdigest(),
            described,
            list(mask_names),
            group,
            *([measures] if measures else []),
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
            "left_out": dict(left_out),
            "areas": measures,
            "group": group,
            "fingerprint": content_key,
            "source": source,
        }
        write_json(temporary / "table.json", record)
    return ImageTable.open(folder)


def is_table(folder: Path) -> bool:
    """Whether a prepared table lies there."""
    return (folder / "table.json").is_file()


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


def _measured(path: Path, mask_names: Sequence[str], specs: Mapping[str, AreaSpec]) -> dict[str, np.ndarray]:
    """The areas `specs` of written masks: columns (N,) float64, NaN where the mask that says where the
    regions are is empty."""
    array = np.load(path, mmap_mode="r")
    step = max(1, CHUNK_BYTES // (4 * len(specs) * array[0, 0].size))
    chunks: dict[str, list[np.ndarray]] = {name: [] for name in specs}
    for start in range(0, len(array), step):
        masks = torch.from_numpy(array[start : start + step].copy())
        present = masks.flatten(2).any(dim=2).bool()
        for name, values in measure_areas(masks, mask_names, specs).items():
            known = present[:, list(mask_names).index(specs[name].map_structure)]
            chunks[name].append(values.double().where(known, torch.nan).numpy())
    return {name: np.concatenate(parts) for name, parts in chunks.items()}


def _keep_rows(path: Path, rows: np.ndarray) -> None:
    """Rewrites an array with only the given rows."""
    old = np.load(path, mmap_mode="r")
    fewer = path.with_suffix(".fewer")
    step = max(1, CHUNK_BYTES // old[:1].nbytes)
    with ArrayFile(fewer, len(rows)) as new:
        for start in range(0, len(rows), step):
            new.append(old[rows[start : start + step]])
    fewer.replace(path)


def _write_parquet(path: Path, frame: pd.DataFrame) -> None:
    frame.to_parquet(path, index=False)
    with path.open("rb") as stream:
        os.fsync(stream.fileno())

"""A table as one `.npz`, which is a table source itself.

Enters: a prepared table, with silver masks or without. Leaves: a file that `data: {name: table, path: ...}`
reads: the array `images`, an array per mask under its name, an array per column, and the confidence of silver
masks as columns `confidence_<structure>`. Memory is bounded by one chunk of images.
"""

import sys
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from cfssl.data.labels import LabelledTable, confidence_name
from cfssl.data.table import ImageArray, texts
from cfssl.data.writer import CHUNK_BYTES
from cfssl.errors import UserError, quoted
from cfssl.files import atomic_path

IMAGES = "images"


def refuse_taken_place(path: Path) -> None:
    """Raises `UserError` where `path` is no `.npz` or exists, or its sheet does, or a CSV beside it, which
    would be read with it."""
    if path.suffix != ".npz":
        raise UserError(f"{path} is to hold a table of arrays; give it a name that ends in .npz.")
    for place in (path, path.with_suffix(".png"), path.with_suffix(".csv")):
        if place.exists():
            raise UserError(f"{place} exists and is not overwritten; choose another name, or remove it.")


def write_archive(path: Path, table: LabelledTable) -> None:
    """Writes `table` to `path`, whole or not at all. Missing texts become empty, as in a CSV. Columns that
    have the name of an array, such as those that named the files, are left out, which is said on standard
    error. Raises `UserError` for a mask that is called as the images are."""
    if IMAGES in table.mask_names:
        raise UserError(
            f"Table {table.name!r} has a mask {IMAGES!r}, which is what its images are called; rename it."
        )
    columns = table.frame
    if table.silver is not None:
        sure = table.silver.confidence
        columns = columns.assign(
            **{confidence_name(name): sure[name].to_numpy() for name in table.silver.structures}
        )
    taken = [name for name in columns if name in (IMAGES, *table.mask_names)]
    if taken:
        print(
            f"{path.name}: left out the columns {quoted(taken)}, whose names arrays have now", file=sys.stderr
        )
    channels, *size = table.images.shape
    with atomic_path(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
        shape = (len(table), *size) if channels == 1 else (len(table), channels, *size)
        _add(archive, IMAGES, shape, table.images.dtype, _chunks(table.images))
        for name in table.mask_names:
            masks = table.masks_of([name])
            _add(archive, name, (len(table), *size), masks.dtype, _chunks(masks))
        for name in columns.columns.difference(taken, sort=False):
            column = columns[name]
            numbers = column.dtype.kind in "iuf"
            values = column.to_numpy() if numbers else texts(column).fillna("").to_numpy(dtype=np.str_)
            _add(archive, name, values.shape, values.dtype, [values])


def _chunks(array: ImageArray) -> Iterator[np.ndarray]:
    step = max(1, CHUNK_BYTES // max(1, array.read(np.arange(1)).nbytes))
    for start in range(0, len(array), step):
        yield array.read(np.arange(start, min(start + step, len(array))))


def _add(
    archive: zipfile.ZipFile,
    name: str,
    shape: tuple[int, ...],
    dtype: np.dtype[np.generic],
    chunks: Iterable[np.ndarray],
) -> None:
    """One array of the archive from its consecutive parts."""
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    with archive.open(f"{name}.npy", "w", force_zip64=True) as stream:
        np.lib.format.write_array_header_1_0(stream, header)
        for chunk in chunks:
            stream.write(np.ascontiguousarray(chunk).tobytes())

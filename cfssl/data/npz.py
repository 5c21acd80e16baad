"""Arrays inside `.npz` files, read item by item or whole, and never half: the checksum of an array is always
compared, which needs reading it to its end.

Enter: paths. Leave: headers and arrays. A damaged file is one `UserError`.
"""

import io
import lzma
import math
import os
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from cfssl.errors import UserError

# What zipfile, its decompressors and numpy's parser of headers raise on damaged files.
DAMAGE = (
    *(OSError, EOFError, ValueError, SyntaxError, TypeError, LookupError, RuntimeError, ArithmeticError),
    *(MemoryError, struct.error, tokenize.TokenError, zipfile.BadZipFile, zlib.error, lzma.LZMAError),
)


class ArrayHeader(NamedTuple):
    """What an array in an `.npz` is, without reading it."""

    shape: tuple[int, ...]
    dtype: np.dtype[np.generic]


def npz_headers(path: Path) -> dict[str, ArrayHeader]:
    """Names, shapes and types of the arrays in an `.npz`.

    Raises `UserError` where it is broken or holds pickled objects.
    """
    headers, column_by_column = {}, set()
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            if _count(path, len(archive.comment)) not in (len(members), 0xFFFF):  # 0xFFFF: more than that
                raise ValueError("its directory has lost an array")
            for member in members:
                name = member.filename.removesuffix(".npy")
                with archive.open(member) as stream:
                    shape, fortran, dtype = _header(stream)
                    size = stream.tell() + math.prod(shape) * dtype.itemsize
                if size != member.file_size and not dtype.hasobject:
                    raise ValueError(f"array {name!r} has {member.file_size} bytes, its header says {size}")
                headers[name] = ArrayHeader(shape, dtype)
                if fortran and len(shape) > 1:
                    column_by_column.add(name)
    except DAMAGE as error:
        raise UserError(
            f"{path} is not a readable .npz file ({reason(error)}); save it again with "
            "numpy.savez_compressed."
        ) from None
    for name, header in headers.items():
        if header.dtype.hasobject or name in column_by_column:
            what = "holds Python objects" if header.dtype.hasobject else "is stored column by column"
            raise UserError(f"Array {name!r} of {path} {what}; save it again as a plain, C-ordered array.")
    return headers


def stream_npz(path: Path, name: str) -> Iterator[np.ndarray]:
    """The items of array `name` along its first axis, one by one; the array is never in memory as a whole.

    Damage may be found only after the last item. Raises `UserError`.
    """
    try:
        with zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as stream:
            shape, _, dtype = _header(stream)
            size = math.prod(shape[1:]) * dtype.itemsize
            for _ in range(shape[0]):
                content = stream.read(size)
                if len(content) < size:
                    raise ValueError("the array ends early")
                yield np.frombuffer(content, dtype).reshape(shape[1:])
            if stream.read(1):  # the checksum is compared once the end has been seen
                raise ValueError("the array is longer than its header says")
    except DAMAGE as error:
        raise _damaged(path, name, error) from None


def read_npz(path: Path, name: str) -> np.ndarray:
    """Array `name` as a whole. Raises `UserError`."""
    try:
        with zipfile.ZipFile(path) as archive:
            content = archive.read(f"{name}.npy")
        return np.lib.format.read_array(io.BytesIO(content), allow_pickle=False)
    except DAMAGE as error:
        raise _damaged(path, name, error) from None


def reason(error: BaseException) -> str:
    """An exception of a decoder, on one line and not too long."""
    return " ".join(str(error).split())[:160] or type(error).__name__


def _damaged(path: Path, name: str, error: BaseException) -> UserError:
    return UserError(
        f"Array {name!r} of {path} cannot be read ({reason(error)}); save it again with "
        "numpy.savez_compressed."
    )


def _count(path: Path, comment: int) -> int:
    """How many members the last record of an archive counts. zipfile does not compare: a damaged length in
    its directory hides the next member."""
    with path.open("rb") as file:
        file.seek(-22 - comment, os.SEEK_END)
        return int(struct.unpack("<10xH10x", file.read(22))[0])


def _header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[np.generic]]:
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(stream)

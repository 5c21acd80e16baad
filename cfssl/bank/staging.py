"""A bank copied to a disk of the node that reads it.

Enters: an opened bank, and a place such as `$SLURM_TMPDIR`. Leaves: the same bank, opened there. Files are
read once, from their beginning and in large pieces, and compared with their checksums on the way, so that
whoever reads the copy need not compare again. Any number of processes of a node may stage at once, without
locks: each takes what is missing in an order of its own, writes it under a temporary name and renames it.
"""

import errno
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xxhash

from cfssl.bank.records import remove_abandoned, size_of
from cfssl.bank.shards import shard_file
from cfssl.bank.store import Bank
from cfssl.errors import UserError
from cfssl.files import atomic_path, copy_file
from cfssl.seeds import numpy_generator
from cfssl.writers import owner

PIECE = 8 * 2**20  # bytes that are read at a time
HEAD = (
    4096  # bytes of a copy that are compared with the original's when it is used again; a header is shorter
)
UNSET = re.compile(r"\$\{?(\w+)")


def staged(bank: Bank, place: Path | str) -> Bank:
    """The copy of `bank` in a folder of its own under `place`, made or completed where it is not whole; a
    file of it is whole when its size and its first bytes are those of the original.

    Raises `UserError` when `place` names an environment variable that is not set, when there is not enough
    space, and when a file of the bank does not agree with its checksum.
    """
    folder = expanded(place) / f"bank-{bank.fingerprint}"
    folder.mkdir(parents=True, exist_ok=True)
    remove_abandoned(folder)
    entries = {shard_file(bank.path, shard, "npy"): entry for shard, entry in enumerate(bank.shards)}
    entries[bank.path / "index.parquet"] = bank.index_entry
    missing = [file for file, entry in entries.items() if not _is_whole(folder / file.name, file, entry)]
    _refuse_short_space(folder, bank.path, sum(entries[file]["bytes"] for file in missing))
    for number in numpy_generator("stage", owner()).permutation(len(missing)):
        file = missing[number]
        if not _is_whole(folder / file.name, file, entries[file]):  # by another process meanwhile
            _copy(file, folder / file.name, entries[file])
    copy_file(bank.path / "bank.json", folder / "bank.json")
    return Bank.open(folder, *bank.expected, is_checked=True)


def expanded(place: Path | str) -> Path:
    """`place` with the environment variables and the home folder that it names. Raises `UserError` for a
    variable that is not set."""
    text = os.path.expandvars(place)
    if unset := UNSET.search(text):
        raise UserError(
            f"hardware.stage is {place}, but the environment variable {unset[1]} is not set here; name a "
            "folder on a disk of this node, or set hardware.stage: null to read the bank where it is."
        )
    return Path(text).expanduser()


def _is_whole(copy: Path, file: Path, entry: Mapping[str, Any]) -> bool:
    return size_of(copy) == entry["bytes"] and _head(copy) == _head(file)


def _head(file: Path) -> bytes:
    with file.open("rb", buffering=0) as stream:
        return stream.read(HEAD)


def _copy(file: Path, copy: Path, entry: Mapping[str, Any]) -> None:
    digest, piece = xxhash.xxh3_128(), memoryview(bytearray(PIECE))
    try:
        with atomic_path(copy) as temporary:
            with file.open("rb", buffering=0) as source, temporary.open("wb", buffering=0) as target:
                while count := source.readinto(piece):
                    digest.update(piece[:count])
                    target.write(piece[:count])
            if digest.hexdigest() != entry["checksum"]:
                raise UserError(
                    f"{file} is damaged: its checksum is {digest.hexdigest()}, expected {entry['checksum']}; "
                    "delete the file and run the build of this bank again (`cfssl bank verify "
                    f"{file.parent}` names the views)."
                )
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise _short(copy.parent, file.parent, f"the disk is full at {copy.name}") from None


def _refuse_short_space(folder: Path, bank: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise _short(folder, bank, f"{free / 1e9:.3f} GB are free and {needed / 1e9:.3f} GB are missing")


def _short(folder: Path, bank: Path, what: str) -> UserError:
    return UserError(
        f"The bank {bank} does not fit into {folder.parent}, where hardware.stage puts it: {what}; free "
        "space there, choose another place, or set hardware.stage: null to read the bank where it is."
    )

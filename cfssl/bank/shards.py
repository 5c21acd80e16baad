"""How a bank lies on disk, and how it is written: shard by shard, every file either whole or absent.

    bank.json             the plan (what is stored, made from which table, by which generator), and size and
                          checksum of every other file
    shard-00000.npy       (n, 1+K, C, H, W) uint8 or uint16: the real image, then its K counterfactuals
    shard-00000.parquet   the shard's part of the index
    shard-00000.json      the shard's record, written last: a shard with a record is whole
    index.parquet         one row per (item, slot): the parts of all shards in order

Enters: whole shards (`write_shard`) from any number of processes that need not know of each other, and then
`finish`. Leaves: a folder for `cfssl.bank.store`. A build may be killed at any time and goes on where it was.
What is said twice mends each other: bank.json and the records, the index and its parts. Records (JSON) are
sealed with a fingerprint of their content, other files are described by their size and checksum.
"""

import math
import mmap
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from cfssl.errors import UserError
from cfssl.files import atomic_path, fsync_directory, read_json, write_json
from cfssl.provenance import fingerprint
from cfssl.writers import is_abandoned, owner

FORMAT = 2  # of the folder; raised when an older reader would misread it

View = dict[str, str | float]  # a do(), e.g. {"scanner": "B"}


@dataclass(frozen=True)
class Plan:
    """All that decides the bytes of a bank. `views` are the do()s of slots 1..K, in order; `table` and
    `generator` are fingerprints. `batch` and `device` (cpu or cuda; None without a generator) belong to it
    because a convolution may round differently in another batch size and on another kind of device.
    """

    dtype: str
    shape: tuple[int, ...]
    rows: int
    rows_fingerprint: str
    rows_per_shard: int
    batch: int
    views: tuple[View, ...]
    table: str
    generator: str | None
    graph: dict[str, Any] | None
    seed: int
    device: str | None = None

    @property
    def slots(self) -> int:
        """1 + K."""
        return 1 + len(self.views)

    @property
    def shard_count(self) -> int:
        return math.ceil(self.rows / self.rows_per_shard)

    @property
    def view_bytes(self) -> int:
        """Of one stored image."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    @property
    def key(self) -> str:
        return fingerprint(self.to_json())

    def items(self, shard: int) -> range:
        """The items that lie in a shard."""
        start = shard * self.rows_per_shard
        return range(start, min(start + self.rows_per_shard, self.rows))

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "shape": list(self.shape), "views": [dict(view) for view in self.views]}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "Plan":
        return cls(**{**content, "shape": tuple(content["shape"]), "views": tuple(content["views"])})


def begin(folder: Path, plan: Plan) -> None:
    """Makes `folder` the place of a bank with this plan; any number of processes may do so at once.

    Raises `UserError`, with nothing touched, when the folder holds a bank with another plan, or other files.
    """
    path = folder / "bank.json"
    if not path.exists():
        _refuse_strangers(folder)
        if create_record(path, _bank_record(plan)):
            return
    found = read_bank_record(path, may_be_damaged=True)
    if found is None:
        _refuse_shards_of_another_plan(folder, plan)
        write_record(path, _bank_record(plan))
        return
    _refuse_another_plan(folder, found["plan"], plan.to_json())
    for shard, entry in enumerate(found["shards"] or ()):
        sidecar = shard_file(folder, shard, "json")
        if read_record(sidecar) is None and is_sound(shard_file(folder, shard, "npy"), entry):
            write_record(sidecar, {"plan": plan.key, "shard": entry})


def write_shard(folder: Path, plan: Plan, shard: int, images: np.ndarray, index: pa.Table) -> None:
    """Stores one shard, its record last. `images` (n, 1+K, C, H, W) in the plan's dtype; `index` has a row
    per item and slot, item by item. One process per shard at a time."""
    expected = (len(plan.items(shard)), plan.slots, *plan.shape)
    if images.shape != expected or images.dtype != np.dtype(plan.dtype):
        raise ValueError(
            f"Shard {shard} is {images.dtype} {images.shape}, the plan says {plan.dtype} {expected}."
        )
    if len(index) != expected[0] * plan.slots:
        raise ValueError(f"Shard {shard} has {len(index)} index rows, expected {expected[0] * plan.slots}.")
    data, part = shard_file(folder, shard, "npy"), shard_file(folder, shard, "parquet")
    with atomic_path(data) as temporary, temporary.open("wb") as stream:
        np.save(stream, np.ascontiguousarray(images), allow_pickle=False)
    with atomic_path(part) as temporary:
        pq.write_table(index, temporary, row_group_size=len(index))
    entry = {"rows": len(images), **size_and_checksum(data), "index": size_and_checksum(part)}
    write_record(shard_file(folder, shard, "json"), {"plan": plan.key, "shard": entry})


def complete_shard(folder: Path, plan: Plan, shard: int, check: bool = False) -> dict[str, Any] | None:
    """Rows, bytes and checksums of a shard that is whole and belongs to this plan, else None. Its part of the
    index is compared with its checksum; its pixels when asked to `check`, else their size."""
    record = read_record(shard_file(folder, shard, "json"))
    if record is None or record["plan"] != plan.key:
        return None
    entry, pixels = record["shard"], shard_file(folder, shard, "npy")
    is_whole = is_sound(pixels, entry) if check else size_of(pixels) == entry["bytes"]
    return entry if is_whole and is_sound(shard_file(folder, shard, "parquet"), entry["index"]) else None


def finish(folder: Path) -> None:
    """Joins the shards' parts of the index and completes bank.json, after all builders; several may do so at
    once. A finished bank with the same shards is left as it is. Raises `UserError` while shards are
    missing."""
    path, index = folder / "bank.json", folder / "index.parquet"
    record = read_bank_record(path)
    plan = Plan.from_json(record["plan"])
    found = [complete_shard(folder, plan, shard) for shard in range(plan.shard_count)]
    missing = [shard for shard, entry in enumerate(found) if entry is None]
    if missing:
        raise UserError(
            f"{folder} has {len(found) - len(missing)} of {len(found)} shards, the first missing or damaged "
            f"one is number {missing[0]}; build the missing shards before finishing the bank."
        )
    if record["shards"] != found or not is_sound(index, record["index"]):
        with atomic_path(index) as temporary:
            _join_parts(folder, plan, temporary)
        write_record(path, _bank_record(plan, found, size_and_checksum(index)))
    remove_abandoned(folder)


def read_bank_record(path: Path, may_be_damaged: bool = False) -> Any:
    """The content of bank.json. Raises `UserError` when it is missing, has an unknown format or is damaged;
    returns None for a damaged one that may be so."""
    if not path.exists():
        raise UserError(f"{path.parent} is no bank, it has no bank.json; check the path or build the bank.")
    found = _format_of(path)
    if isinstance(found, int) and found != FORMAT:
        raise UserError(
            f"{path} has format {found}, this version of cfssl reads format {FORMAT}; build the bank again "
            "in another folder."
        )
    record = read_record(path)
    if record is None and not may_be_damaged:
        raise UserError(
            f"{path} is damaged or was edited by hand; build this bank again, which writes the file anew."
        )
    return record


def shard_file(folder: Path, shard: int, kind: str) -> Path:
    """`kind`: npy, parquet or json."""
    return folder / f"shard-{shard:05d}.{kind}"


def view_checksum(view: np.ndarray) -> bytes:
    """16 bytes that tell of the bytes of one stored image."""
    return xxhash.xxh3_128_digest(np.ascontiguousarray(view).data)


def _bank_record(
    plan: Plan, shards: list[Any] | None = None, index: dict[str, Any] | None = None
) -> dict[str, Any]:
    """What bank.json holds; `shards` and `index` are None until the bank is finished."""
    return {"format": FORMAT, "plan": plan.to_json(), "index": index, "shards": shards}


def _join_parts(folder: Path, plan: Plan, target: Path) -> None:
    """Writes the parts of the index one after the other, a row group each."""
    with pq.ParquetWriter(target, pq.read_schema(shard_file(folder, 0, "parquet"))) as writer:
        for shard in range(plan.shard_count):
            file, expected = shard_file(folder, shard, "parquet"), len(plan.items(shard)) * plan.slots
            part = pq.read_table(file)
            if len(part) != expected or part.schema != writer.schema:
                raise UserError(
                    f"{file} has {len(part)} rows of {part.schema.names}, expected {expected} of "
                    f"{writer.schema.names}; delete it and build this shard again."
                )
            writer.write_table(part, row_group_size=expected)


def _format_of(path: Path) -> Any:
    try:
        found = read_json(path)
    except (UserError, UnicodeDecodeError):
        return None
    return found.get("format") if isinstance(found, dict) else None


def _refuse_strangers(folder: Path) -> None:
    if not folder.exists():
        return
    strangers = [entry.name for entry in folder.iterdir() if entry.suffix != ".part"]
    # Looked at again: another builder may have begun meanwhile, and bank.json is its first file.
    if strangers and not (folder / "bank.json").exists():
        raise UserError(
            f"{folder} holds {min(strangers)!r} but no bank.json, expected an empty folder or a bank to go "
            "on with; choose another folder."
        )


def _refuse_another_plan(folder: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    differing = [
        f"{name} is {found.get(name)}, now {wanted[name]}"
        for name in wanted
        if found.get(name) != wanted[name]
    ]
    if differing:
        raise UserError(
            f"{folder} holds a bank with another plan ({'; '.join(differing)}); nothing was changed: choose "
            "another folder."
        )


def _refuse_shards_of_another_plan(folder: Path, plan: Plan) -> None:
    """Where bank.json is damaged, the shards still know whose they are."""
    for sidecar in sorted(folder.glob("shard-*.json")):
        record = read_record(sidecar)
        if record is not None and record["plan"] != plan.key:
            raise UserError(
                f"{folder / 'bank.json'} is damaged and {sidecar.name} belongs to a bank with another plan "
                f"({record['plan']}, not {plan.key}); nothing was changed: choose another folder."
            )


def write_record(path: Path, content: Mapping[str, Any]) -> None:
    """Writes sealed JSON, in the place of what is there."""
    write_json(path, sealed(content))


def create_record(path: Path, content: Mapping[str, Any]) -> bool:
    """Writes sealed JSON where there is no file yet, and returns whether it did. Of several processes that
    try at once, one does."""
    own = path.with_name(f".{path.name}.{owner()}.new.part")
    write_json(own, sealed(content))
    try:
        os.link(own, path)
    except FileExistsError:
        return False
    except OSError:  # no links on this file system: of two processes within a moment both would write
        if path.exists():
            return False
        own.replace(path)
    finally:
        own.unlink(missing_ok=True)
    fsync_directory(path.parent)
    return True


def read_record(path: Path) -> Any:
    """The content of a sealed JSON file with its fingerprint; None where it is missing or not as it was
    written."""
    try:
        found = read_json(path)
        return found if isinstance(found, dict) and found == sealed(found) else None
    except ValueError:  # UserError, UnicodeDecodeError, and numbers that are none
        return None


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """`content` with the fingerprint of all the rest of it."""
    rest = {name: value for name, value in content.items() if name != "fingerprint"}
    return {**rest, "fingerprint": fingerprint(rest)}


def remove_abandoned(folder: Path) -> None:
    """Removes the temporary files of writers that are certainly gone."""
    for file in folder.glob(".*.part"):
        if is_abandoned(file, time.time()):
            file.unlink(missing_ok=True)


def size_of(file: Path) -> int | None:
    """Bytes of a file, None where there is none."""
    return file.stat().st_size if file.is_file() else None


def size_and_checksum(file: Path) -> dict[str, Any]:
    """Of the whole file, header included. xxh3 reads 64 MB in 4 ms where blake2b takes 70; it is there to
    find accidents, not forgers."""
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return {"bytes": len(content), "checksum": xxhash.xxh3_128_hexdigest(content)}


def is_sound(file: Path, entry: Mapping[str, Any]) -> bool:
    """Whether a file is there with the size and checksum of its entry."""
    return size_of(file) == entry["bytes"] and size_and_checksum(file)["checksum"] == entry["checksum"]

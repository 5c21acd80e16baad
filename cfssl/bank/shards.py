"""How a bank lies on disk, and how it is written: shard by shard, every file either whole or absent.

    bank.json             the plan (what is stored, made from which table, by which generator), and size and
                          checksum of every shard
    shard-00000.npy       (n, 1+K, C, H, W) uint8 or uint16: the real image, then its K counterfactuals
    shard-00000.parquet   the shard's part of the index
    shard-00000.json      the shard's record, written last: a shard with a record is whole
    index.parquet         one row per (item, slot): the parts of all shards in order

Enters: whole shards (`write_shard`) from any number of processes that need not know of each other, and then
`finish`. Leaves: a folder for `cfssl.bank.store`. A build may be killed at any time and goes on where it was.
"""

import math
import mmap
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from cfssl.errors import UserError
from cfssl.files import atomic_path, read_json, write_json
from cfssl.provenance import fingerprint

FORMAT = 1  # of the folder; raised when an older reader would misread it

View = dict[str, str | float]  # a do(), e.g. {"scanner": "B"}


@dataclass(frozen=True)
class Plan:
    """All that decides the bytes of a bank. `views` are the do()s of slots 1..K, in order; `table` and
    `generator` are fingerprints. `batch` belongs to it because a convolution may round differently in another
    batch size.
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
    if path.exists():
        found = read_record(path, may_be_damaged=True)
        if found is not None:
            _refuse_another_plan(folder, found["plan"], plan.to_json())
            return
        _refuse_shards_of_another_plan(folder, plan)
    elif folder.exists():
        strangers = sorted(entry.name for entry in folder.iterdir() if entry.suffix != ".part")
        if strangers:
            raise UserError(
                f"{folder} holds {strangers[0]!r} but no bank.json, expected an empty folder or a bank to go "
                "on with; choose another folder."
            )
    write_record(path, plan, None, None)


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
        np.save(stream, images, allow_pickle=False)
    with atomic_path(part) as temporary:
        pq.write_table(index, temporary)
    shard_entry = {"rows": len(images), **size_and_checksum(data)}
    record = {"plan": plan.key, "shard": shard_entry, "index": size_and_checksum(part)}
    write_json(shard_file(folder, shard, "json"), record)


def complete_shard(folder: Path, plan: Plan, shard: int) -> dict[str, Any] | None:
    """Rows, bytes and checksum of a shard that is whole and belongs to this plan, else None. Compares sizes;
    contents are for `verify`."""
    record = _read_sidecar(shard_file(folder, shard, "json"))
    if record is None or record["plan"] != plan.key:
        return None
    files = {"npy": record["shard"], "parquet": record["index"]}
    is_whole = all(
        size_of(shard_file(folder, shard, kind)) == entry["bytes"] for kind, entry in files.items()
    )
    return record["shard"] if is_whole else None


def finish(folder: Path) -> None:
    """Joins the shards' parts of the index and completes bank.json; once, after all builders. A finished bank
    with the same shards is left as it is. Raises `UserError` while shards are missing."""
    record = read_record(folder / "bank.json")
    plan = Plan.from_json(record["plan"])
    found = [complete_shard(folder, plan, shard) for shard in range(plan.shard_count)]
    missing = [shard for shard, entry in enumerate(found) if entry is None]
    if missing:
        raise UserError(
            f"{folder} has {len(found) - len(missing)} of {len(found)} shards, the first missing one is "
            f"number {missing[0]}; build the missing shards before finishing the bank."
        )
    index = folder / "index.parquet"
    if record["shards"] != found or not is_sound(index, record["index"]):
        with (
            atomic_path(index) as temporary,
            pq.ParquetWriter(temporary, pq.read_schema(shard_file(folder, 0, "parquet"))) as writer,
        ):
            for shard in range(plan.shard_count):
                writer.write_table(pq.read_table(shard_file(folder, shard, "parquet")))
        write_record(folder / "bank.json", plan, found, size_and_checksum(index))
    for leftover in folder.glob(".*.part"):  # of builders that were killed
        leftover.unlink()


def add_columns(folder: Path, columns: Mapping[str, np.ndarray]) -> None:
    """Adds or replaces columns of a finished bank's index, e.g. quality scores: one value per item and slot,
    item by item, as in `Bank.index`. The pixels' fingerprint stays the same."""
    record = read_record(folder / "bank.json")
    path = folder / "index.parquet"
    index = pq.read_table(path)
    for name, values in columns.items():
        if name in index.column_names:
            index = index.drop_columns([name])
        index = index.append_column(name, pa.array(values))
    with atomic_path(path) as temporary:
        pq.write_table(index, temporary)
    write_record(
        folder / "bank.json", Plan.from_json(record["plan"]), record["shards"], size_and_checksum(path)
    )


def read_record(path: Path, may_be_damaged: bool = False) -> Any:
    """The content of bank.json. Raises `UserError` when it is missing, has an unknown format or is damaged;
    returns None for a damaged one that may be so."""
    if not path.exists():
        raise UserError(f"{path.parent} is no bank, it has no bank.json; check the path or build the bank.")
    record = _read_sidecar(path)
    if isinstance(record, dict) and record.get("format") != FORMAT:
        raise UserError(
            f"{path} has format {record.get('format')!r}, this version of cfssl reads format {FORMAT}; build "
            "the bank again in another folder."
        )
    if isinstance(record, dict) and record.get("fingerprint") == fingerprint(
        record.get("plan"), record.get("shards")
    ):
        return record
    if may_be_damaged:
        return None
    raise UserError(
        f"{path} is damaged or was edited by hand; build this bank again, which writes the file anew."
    )


def write_record(path: Path, plan: Plan, shards: list[Any] | None, index: dict[str, Any] | None) -> None:
    """bank.json; `shards` and `index` are None until the bank is finished."""
    key = fingerprint(plan.to_json(), shards)
    content = {"format": FORMAT, "fingerprint": key, "plan": plan.to_json(), "index": index, "shards": shards}
    write_json(path, content)


def shard_file(folder: Path, shard: int, kind: str) -> Path:
    """`kind`: npy, parquet or json."""
    return folder / f"shard-{shard:05d}.{kind}"


def view_checksum(view: np.ndarray) -> str:
    """32 hex digits of the bytes of one stored image."""
    return xxhash.xxh3_128_hexdigest(view.data)


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


def _read_sidecar(path: Path) -> Any:
    """JSON, or None where the file is missing or was cut off."""
    try:
        return read_json(path)
    except (UserError, UnicodeDecodeError):
        return None


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
        record = _read_sidecar(sidecar)
        if record is not None and record["plan"] != plan.key:
            raise UserError(
                f"{folder / 'bank.json'} is damaged and {sidecar.name} belongs to a bank with another plan "
                f"({record['plan']}, not {plan.key}); nothing was changed: choose another folder."
            )

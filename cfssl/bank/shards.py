"""How a bank lies on disk, and how it is written: shard by shard, every file either whole or absent.

    bank.json             the plan (what is stored, made from which table, by which generator), and size and
                          checksum of every other file
    shard-00000.npy       (n, 1+K, C, H, W) uint8 or uint16: the real image, then its K counterfactuals
    shard-00000.parquet   the shard's part of the index
    shard-00000.json      the shard's record, written last: a shard with a record is whole
    index.parquet         one row per (item, slot): the parts of all shards in order; of a gated bank (see
                          `cfssl.bank.gate`) with the gate's columns, and bank.json with what it let through

Enters: whole shards (`write_shard`) from any number of processes that need not know of each other, and then
`finish`. Leaves: a folder for `cfssl.bank.store`. A build may be killed at any time and goes on where it was.
What is said twice mends each other: bank.json and the records, the index and its parts. A gate is said once,
so mending drops it, and it has to be applied again. Index and bank.json are written in this order: killed in
between, the bank refuses to open until `finish` has mended it.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from cfssl.bank.parts import parts_with, ranges
from cfssl.bank.records import (
    create_record,
    is_sound,
    read_record,
    remove_abandoned,
    size_and_checksum,
    size_of,
    write_record,
)
from cfssl.errors import UserError
from cfssl.files import atomic_path, read_json
from cfssl.provenance import fingerprint

FORMAT = 2  # of the folder; raised when an older reader would misread it
GATED_FORMAT = 3  # of a gated bank: a reader of format 2 would show what the gate rejects

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


def finish(folder: Path, parts: int | None = None) -> None:
    """Joins the shards' parts of the index and completes bank.json, after all builders; several may do so at
    once. A finished bank with the same shards is left as it is. Raises `UserError` while shards are missing;
    it names them, and of a bank that is built in `parts` (see `cfssl.bank.parts`) those that they lie in."""
    record = read_bank_record(folder / "bank.json")
    plan = Plan.from_json(record["plan"])
    found = [complete_shard(folder, plan, shard) for shard in range(plan.shard_count)]
    missing = [shard for shard, entry in enumerate(found) if entry is None]
    if missing:
        where = f", in the parts {ranges(parts_with(missing, len(found), parts))} of {parts}" if parts else ""
        raise UserError(
            f"{folder} has {len(found) - len(missing)} of {len(found)} shards, missing or damaged are the "
            f"numbers {ranges(missing)}{where}; build these before finishing the bank."
        )
    if record["shards"] != found or not is_sound(folder / "index.parquet", record["index"]):
        _write_index(folder, plan, found)
    remove_abandoned(folder)


def write_gate(
    folder: Path, shards: list[Any], columns: Mapping[str, np.ndarray], gate: Mapping[str, Any]
) -> None:
    """Writes the index of a finished bank anew, with the further `columns` (N, 1+K), and bank.json with the
    record `gate`. Columns and record of an earlier gate go. Raises `UserError`, with nothing touched, unless
    the bank still has the `shards` that were judged."""
    record = read_bank_record(folder / "bank.json")
    plan = Plan.from_json(record["plan"])
    found = [complete_shard(folder, plan, shard) for shard in range(plan.shard_count)]
    if not shards == found == record["shards"]:
        raise UserError(
            f"The bank {folder} is not what it was when its views were judged: shards were damaged or built "
            "again; run the build of this bank again, then its gate."
        )
    _write_index(folder, plan, shards, columns, gate)


def read_bank_record(path: Path, may_be_damaged: bool = False) -> Any:
    """The content of bank.json. Raises `UserError` when it is missing, has an unknown format or is damaged;
    returns None for a damaged one that may be so."""
    if not path.exists():
        raise UserError(f"{path.parent} is no bank, it has no bank.json; check the path or build the bank.")
    found = _format_of(path)
    if isinstance(found, int) and found not in (FORMAT, GATED_FORMAT):
        raise UserError(
            f"{path} has format {found}, this version of cfssl reads formats {FORMAT} and {GATED_FORMAT}; "
            "build the bank again in another folder."
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
    plan: Plan,
    shards: list[Any] | None = None,
    index: dict[str, Any] | None = None,
    gate: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What bank.json holds; `shards` and `index` are None until the bank is finished, and there is no `gate`
    until one was applied."""
    record = {"format": FORMAT, "plan": plan.to_json(), "index": index, "shards": shards}
    return record if gate is None else {**record, "format": GATED_FORMAT, "gate": dict(gate)}


def _write_index(
    folder: Path,
    plan: Plan,
    shards: list[Any],
    columns: Mapping[str, np.ndarray] | None = None,
    gate: Mapping[str, Any] | None = None,
) -> None:
    """Writes index.parquet, then bank.json. The index is described before it is in its place, where another
    process may already have put its own."""
    with atomic_path(folder / "index.parquet") as temporary:
        _join_parts(folder, plan, temporary, columns or {})
        index = size_and_checksum(temporary)
    write_record(folder / "bank.json", _bank_record(plan, shards, index, gate))


def _join_parts(folder: Path, plan: Plan, target: Path, columns: Mapping[str, np.ndarray]) -> None:
    """Writes the parts of the index one after the other, a row group each, with the further `columns` (N,
    1+K)."""
    schema = pq.read_schema(shard_file(folder, 0, "parquet"))
    whole = schema
    for name, values in columns.items():
        whole = whole.append(pa.field(name, pa.from_numpy_dtype(values.dtype)))
    with pq.ParquetWriter(target, whole) as writer:
        for shard in range(plan.shard_count):
            file, items = shard_file(folder, shard, "parquet"), plan.items(shard)
            part, expected = pq.read_table(file), len(items) * plan.slots
            if len(part) != expected or part.schema != schema:
                raise UserError(
                    f"{file} has {len(part)} rows of {part.schema.names}, expected {expected} of "
                    f"{schema.names}; delete it and build this shard again."
                )
            for name, values in columns.items():
                part = part.append_column(name, pa.array(values[items.start : items.stop].ravel()))
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

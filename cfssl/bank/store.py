"""The bank as a training loop sees it: a folder of memory-mapped shards, read without decoding anything.

Enters: a folder written by `cfssl.bank.shards`. Leaves: `Bank.gather`, which turns item and slot numbers into
pixels at the speed of memory, and `verify`, which names every damaged view. Slot 0 is the real image, slot k
the k-th do().
"""

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from cfssl.bank.maps import ShardMaps
from cfssl.bank.records import is_sound, read_record, refuse_wrong_size, sealed, size_of
from cfssl.bank.shards import Plan, complete_shard, read_bank_record, shard_file, view_checksum
from cfssl.errors import UserError


class Bank:
    """An opened bank. Opening costs one JSON file and one `stat` per shard; a shard is mapped, and its
    checksum compared, when it is first read (see `cfssl.bank.maps`), and the index whenever it is read.
    Sent to another process, a bank travels as its path and is opened again there.

    `shards`: rows, size and checksums of each shard, as bank.json tells them. `gate`: what the gate of the
    bank let through (see `cfssl.bank.gate.apply_gate`); None of a bank without one.
    """

    def __init__(
        self,
        path: Path | str,
        table_fingerprint: str | None = None,
        generator_fingerprint: str | None = None,
    ) -> None:
        """Use `open`."""
        self.path = Path(path)
        record = read_bank_record(self.path / "bank.json")
        self.plan = Plan.from_json(record["plan"])
        self._expected = table_fingerprint, generator_fingerprint
        self._refuse_other("table", table_fingerprint, self.plan.table)
        self._refuse_other("generator", generator_fingerprint, self.plan.generator)
        if record["shards"] is None:
            count = self.plan.shard_count
            done = sum(complete_shard(self.path, self.plan, shard) is not None for shard in range(count))
            raise UserError(
                f"The bank {self.path} is unfinished ({done} of {count} shards); run its build again, which "
                "goes on from there."
            )
        self.fingerprint: str = record["fingerprint"]
        self.shape, self.views, self.dtype = self.plan.shape, self.plan.views, np.dtype(self.plan.dtype)
        self.shards: list[dict[str, Any]] = record["shards"]
        self.gate: dict[str, Any] | None = record.get("gate")
        self._index = record["index"]
        for shard, entry in enumerate(self.shards):
            refuse_wrong_size(self._file(shard), entry)
        self._refuse_index_of_other_size()
        self._maps = ShardMaps(self.path, self.plan, self.shards)

    @classmethod
    def open(
        cls,
        path: Path | str,
        table_fingerprint: str | None = None,
        generator_fingerprint: str | None = None,
    ) -> "Bank":
        """Opens a finished bank, in time independent of the number of images.

        Raises `UserError` when it is unfinished, a file is missing or truncated, its format is unknown, or it
        was not made from the table and by the generator of the given fingerprints.
        """
        return cls(path, table_fingerprint, generator_fingerprint)

    def __reduce__(self) -> tuple[Any, ...]:
        return Bank, (self.path, *self._expected)

    def __len__(self) -> int:
        return self.plan.rows

    @property
    def shard_count(self) -> int:
        return self.plan.shard_count

    @cached_property
    def index(self) -> pd.DataFrame:
        """One row per (item, slot), item by item: item, slot, row (of the table), do (JSON), available, seed
        (of what the do() makes follow; -1: nothing follows), checksum (16 bytes), then `factual.NAME` and
        `counterfactual.NAME` of every attribute in natural values; of a gated bank also quality, error,
        `change.NAME` and accepted (see `cfssl.bank.gate`)."""
        return self._read_index(None).to_pandas()

    @cached_property
    def rows(self) -> np.ndarray:
        """The table row of each item, (N,) int64."""
        return self._column("row")[:, 0].copy()

    @cached_property
    def made(self) -> np.ndarray:
        """(N, 1+K) bool, the index's `available`. False where the do() would set what is already so, or the
        row lacks a parent of the image or a variable that the do() concerns; such a slot holds the real
        image."""
        return self._column("available")

    @cached_property
    def available(self) -> np.ndarray:
        """(N, 1+K) bool: what may be shown. False where nothing was made (see `made`), and for what the gate
        of the bank rejects."""
        return self.made if self.gate is None else self._column("accepted")

    def subset(self, rows: np.ndarray) -> "Subset":
        """The items whose table rows are among `rows`, in the order of the bank."""
        return Subset(self, np.flatnonzero(np.isin(self.rows, rows)))

    def gather(self, items: np.ndarray, slots: np.ndarray) -> np.ndarray:
        """The stored views of `items` (n,): for `slots` (n,) an array (n, C, H, W), for (n, V) one of (n, V,
        C, H, W).

        A copy in the bank's dtype; any order, any repetition. Raises `IndexError` outside items 0..N-1 and
        slots 0..K, and `UserError` when a shard that is read for the first time does not agree with its
        checksum.
        """
        items, slots = np.asarray(items), np.asarray(slots)
        if items.ndim != 1 or slots.ndim not in (1, 2) or len(slots) != len(items):
            raise IndexError(
                f"items are {items.shape} and slots {slots.shape}, expected (n,) and (n,) or (n, V)."
            )
        _refuse_outside("items", items, len(self))
        _refuse_outside("slots", slots, self.plan.slots)
        first = items.astype(np.int64) * self.plan.slots
        views = (first if slots.ndim == 1 else first[:, None]) + slots
        shard, local = np.divmod(views.ravel(), self.plan.rows_per_shard * self.plan.slots)
        return self._maps.read(shard, local).view(self.dtype).reshape(*slots.shape, *self.shape)

    def _file(self, shard: int) -> Path:
        return shard_file(self.path, shard, "npy")

    @property
    def _index_file(self) -> Path:
        return self.path / "index.parquet"

    def _column(self, name: str) -> np.ndarray:
        return self._read_index([name])[name].to_numpy().reshape(len(self), self.plan.slots)

    def _read_index(self, columns: list[str] | None) -> pa.Table:
        """Reads what it has checked: a file put in its place meanwhile would be another one."""
        self._refuse_index_of_other_size()
        with pa.memory_map(str(self._index_file)) as stream:
            content = stream.read_buffer()
        if xxhash.xxh3_128_hexdigest(content) != self._index["checksum"]:
            raise self._other_index("does not agree with its checksum")
        found = pq.read_table(pa.BufferReader(content), columns=columns)
        expected = len(self) * self.plan.slots
        if len(found) != expected:
            raise UserError(
                f"{self._index_file} has {len(found)} rows, expected {expected}, one per item and slot; "
                "build the bank again."
            )
        return found

    def _refuse_index_of_other_size(self) -> None:
        size, expected = size_of(self._index_file), self._index["bytes"]
        if size is None:
            raise self._other_index("is missing")
        if size != expected:
            raise self._other_index(f"has {size} bytes, expected {expected}, so it was truncated or replaced")

    def _other_index(self, what: str) -> UserError:
        return UserError(
            f"{self._index_file} {what}; if the gate of this bank was being written, open the bank again, "
            "else run its build again, which makes the file anew."
        )

    def _refuse_other(self, what: str, wanted: str | None, found: str | None) -> None:
        if wanted is not None and wanted != found:
            raise UserError(
                f"The bank {self.path} was made with {what} {found or '(none)'}, expected {what} {wanted}; "
                f"build a bank in another folder, or use the {what} this one was made with."
            )


class Subset:
    """Some items of a bank, numbered from 0; reads like a bank."""

    def __init__(self, bank: Bank, items: np.ndarray) -> None:
        self.bank, self.items = bank, items
        self.shape, self.views = bank.shape, bank.views
        self.rows, self.available = bank.rows[items], bank.available[items]

    def __len__(self) -> int:
        return len(self.items)

    def gather(self, items: np.ndarray, slots: np.ndarray) -> np.ndarray:
        """See `Bank.gather`."""
        _refuse_outside("items", np.asarray(items), len(self))
        return self.bank.gather(self.items[items], slots)


def verify(bank: Bank, progress: Callable[[int, int], None] | None = None) -> list[str]:
    """Reads every byte of every file. Names, one sentence each, every file and every view that does not agree
    with its checksum; an empty list says that all is sound. `progress(done, total)` is called after each
    shard."""
    index_is_sound = is_sound(bank._index_file, bank._index)
    found = [] if index_is_sound else [f"{bank._index_file.name} does not agree with its checksum"]
    for shard, entry in enumerate(bank.shards):
        if not is_sound(bank._file(shard), entry):
            found += _damage(bank, shard, index_is_sound)
        part, record = (shard_file(bank.path, shard, kind) for kind in ("parquet", "json"))
        if not is_sound(part, entry["index"]):
            found.append(f"{part.name} does not agree with its checksum or is missing")
        if read_record(record) != sealed({"plan": bank.plan.key, "shard": entry}):
            found.append(f"{record.name} does not agree with bank.json or is missing")
        if progress is not None:
            progress(shard + 1, bank.shard_count)
    return found


def _damage(bank: Bank, shard: int, index_is_sound: bool) -> list[str]:
    file, entry, plan = bank._file(shard), bank.shards[shard], bank.plan
    bytes_found = size_of(file)
    if bytes_found is None:
        return [f"{file.name} is missing"]
    if bytes_found != entry["bytes"]:
        return [f"{file.name} has {bytes_found} bytes, expected {entry['bytes']}"]
    if not index_is_sound:
        return [
            f"{file.name} does not agree with its checksum; which views are damaged, only the index could "
            "tell"
        ]
    items = plan.items(shard)
    header = entry["bytes"] - len(items) * plan.slots * plan.view_bytes
    views = np.fromfile(file, dtype=np.uint8, offset=header).reshape(len(items), plan.slots, plan.view_bytes)
    checksums = bank._column("checksum")[items.start : items.stop]
    found = []
    for (place, slot), expected in np.ndenumerate(checksums):
        if view_checksum(views[place, slot]) != expected:
            item = items[place]
            found.append(
                f"{file.name}: item {item} (table row {bank.rows[item]}), slot {slot} ({_shows(bank, slot)})"
            )
    return found or [f"{file.name}: its header is damaged"]


def _shows(bank: Bank, slot: int) -> str:
    if slot == 0:
        return "the real image"
    return f"do({', '.join(f'{name}={value}' for name, value in bank.views[slot - 1].items())})"


def _refuse_outside(what: str, numbers: np.ndarray, count: int) -> None:
    if numbers.dtype.kind not in "iu":
        raise IndexError(f"{what} are {numbers.dtype}, expected integers.")
    if numbers.size and (numbers.min() < 0 or numbers.max() >= count):
        raise IndexError(f"{what} reach from {numbers.min()} to {numbers.max()}, expected 0 to {count - 1}.")

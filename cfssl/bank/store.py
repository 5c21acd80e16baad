"""The bank as a training loop sees it: a folder of memory-mapped shards, read without decoding anything.

Enters: a folder written by `cfssl.bank.shards`. Leaves: `Bank.gather`, which turns item and slot numbers into
pixels at the speed of memory. Slot 0 is the real image, slot k the k-th do().
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq

from cfssl.bank.maps import ShardMaps
from cfssl.bank.records import refuse_wrong_size, size_of, stream_checksum
from cfssl.bank.shards import Plan, complete_shard, read_bank_record, shard_file
from cfssl.errors import UserError


class Bank:
    """An opened bank. Opening costs one JSON file and one `stat` per shard; a shard is mapped, and its
    checksum compared, when it is first read (see `cfssl.bank.maps`), and the index whenever it is read.
    Sent to another process, a bank travels as its path and is opened again there.

    `shards`: rows, size and checksums of each shard, as bank.json tells them, and `index_entry` those of the
    index. `gate`: what the gate of the
    bank let through (see `cfssl.bank.gate.apply_gate`); None of a bank without one.
    """

    def __init__(
        self,
        path: Path | str,
        table_fingerprint: str | None = None,
        generator_fingerprint: str | None = None,
        is_checked: bool = False,
    ) -> None:
        """Use `open`."""
        self.path = Path(path)
        record = read_bank_record(self.path / "bank.json")
        self.plan = Plan.from_json(record["plan"])
        self.expected = table_fingerprint, generator_fingerprint  # what it was opened for
        self._is_checked = is_checked
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
        self.index_entry: dict[str, Any] = record["index"]
        for shard, entry in enumerate(self.shards):
            refuse_wrong_size(self._file(shard), entry)
        self._refuse_index_of_other_size()
        self._maps = ShardMaps(self.path, self.plan, self.shards, is_checked)

    @classmethod
    def open(
        cls,
        path: Path | str,
        table_fingerprint: str | None = None,
        generator_fingerprint: str | None = None,
        is_checked: bool = False,
    ) -> "Bank":
        """Opens a finished bank, in time independent of the number of images. With `is_checked` the pixels of
        a shard are not compared with its checksum when they are first read, see `cfssl.bank.staging`.

        Raises `UserError` when it is unfinished, a file is missing or truncated, its format is unknown, or it
        was not made from the table and by the generator of the given fingerprints.
        """
        return cls(path, table_fingerprint, generator_fingerprint, is_checked)

    def __reduce__(self) -> tuple[Any, ...]:
        return Bank, (self.path, *self.expected, self._is_checked)

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
        with self._opened_index() as file:
            return file.read().to_pandas()

    @cached_property
    def rows(self) -> np.ndarray:
        """The table row of each item, (N,) int64."""
        return self._read_column("row", every=self.plan.slots)

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
        return self._read_column(name).reshape(len(self), self.plan.slots)

    def _read_column(self, name: str, every: int = 1) -> np.ndarray:
        """A column of the index, or the value in `every` so many rows of it; besides it, no more is in memory
        than one group of rows."""
        count = len(self) * self.plan.slots
        found, place = np.empty(0), 0
        with self._opened_index() as file:
            for group in range(file.num_row_groups):
                values = file.read_row_group(group, [name])[name].to_numpy()
                if group == 0:
                    found = np.empty(count // every, dtype=values.dtype)
                chosen = values[-place % every :: every]
                start = -(-place // every)
                found[start : start + len(chosen)] = chosen
                place += len(values)
        return found

    @contextmanager
    def _opened_index(self) -> Iterator[pq.ParquetFile]:
        """Reads what it has checked: a file put in its place meanwhile would be another one."""
        self._refuse_index_of_other_size()
        with self._index_file.open("rb") as stream:
            if stream_checksum(stream) != self.index_entry["checksum"]:
                raise self._other_index("does not agree with its checksum")
            file = pq.ParquetFile(stream)
            found, expected = file.metadata.num_rows, len(self) * self.plan.slots
            if found != expected:
                raise UserError(
                    f"{self._index_file} has {found} rows, expected {expected}, one per item and slot; build "
                    "the bank again."
                )
            yield file

    def _refuse_index_of_other_size(self) -> None:
        size, expected = size_of(self._index_file), self.index_entry["bytes"]
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


def _refuse_outside(what: str, numbers: np.ndarray, count: int) -> None:
    if numbers.dtype.kind not in "iu":
        raise IndexError(f"{what} are {numbers.dtype}, expected integers.")
    if numbers.size and (numbers.min() < 0 or numbers.max() >= count):
        raise IndexError(f"{what} reach from {numbers.min()} to {numbers.max()}, expected 0 to {count - 1}.")

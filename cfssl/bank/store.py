"""The bank as a training loop sees it: a folder of memory-mapped shards, read without decoding anything.

Enters: a folder written by `cfssl.bank.shards`. Leaves: `Bank.gather`, which turns item and slot numbers into
pixels at the speed of memory, and `verify`, which names every damaged view. Slot 0 is the real image, slot k
the k-th do().
"""

import errno
import math
import mmap
import sys
import threading
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from cfssl.bank.shards import (
    Plan,
    complete_shard,
    is_sound,
    read_bank_record,
    read_record,
    sealed,
    shard_file,
    size_of,
    view_checksum,
)
from cfssl.errors import UserError

MAPS = 4096  # shards mapped at a time: each takes a file descriptor and one of a process's 65,530 regions
OTHER_FILES = 256  # descriptors left for the rest of the process
COPY_ONE_BY_ONE = 32 * 1024  # bytes of a view from which the copying takes the time, not the calls


class Bank:
    """An opened bank. Opening costs one JSON file and one `stat` per shard; a shard is mapped, and its
    checksum compared, when it is first read. Of very many shards, those mapped longest ago are closed again.
    Sent to another process, a bank travels as its path and is opened again there.
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
        self._shards, self._index = record["shards"], record["index"]
        for shard, entry in enumerate(self._shards):
            _refuse_wrong_size(self._file(shard), entry)
        _refuse_wrong_size(self._index_file, self._index)
        self._index_is_checked = False
        self._maps: dict[int, np.ndarray] = {}  # by shard, in the order of mapping
        self._addresses = np.zeros(len(self._shards), dtype=np.int64)  # 0: not mapped
        self._is_checked = np.zeros(len(self._shards), dtype=bool)
        self._most_maps = _allow_open_files(min(len(self._shards), MAPS))
        self._lock = threading.Lock()  # no thread may close a map that another one reads

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
        `counterfactual.NAME` of every attribute in natural values."""
        return self._read_index(None).to_pandas()

    @cached_property
    def rows(self) -> np.ndarray:
        """The table row of each item, (N,) int64."""
        return self._column("row")[:, 0].copy()

    @cached_property
    def available(self) -> np.ndarray:
        """(N, 1+K) bool. False where the do() would set what is already so, or the row lacks a parent of the
        image or a variable that the do() concerns; such a slot shows the real image."""
        return self._column("available")

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
        with self._lock:
            found = self._read(shard, local)
        return found.view(self.dtype).reshape(*slots.shape, *self.shape)

    def _read(self, shard: np.ndarray, local: np.ndarray) -> np.ndarray:
        """The bytes (n, size) of the views numbered `local` within their shards."""
        if self._addresses[shard].all():
            return self._copy(shard, local)
        numbers = np.unique(shard)
        if len(numbers) <= self._most_maps:
            self._map_together(numbers)
            return self._copy(shard, local)
        found = np.empty((len(shard), self.plan.view_bytes), dtype=np.uint8)
        for start in range(0, len(numbers), self._most_maps):
            some = numbers[start : start + self._most_maps]
            chosen = (some[0] <= shard) & (shard <= some[-1])
            self._map_together(some)
            found[chosen] = self._copy(shard[chosen], local[chosen])
        return found

    def _copy(self, shard: np.ndarray, local: np.ndarray) -> np.ndarray:
        """The bytes (n, size) of the views numbered `local` within their shards, all mapped."""
        size = self.plan.view_bytes
        if size < COPY_ONE_BY_ONE and len(shard):
            base, unit, window = self._window
            return window[(self._addresses[shard] - base) // unit + local * (size // unit)]
        found = np.empty((len(shard), size), dtype=np.uint8)
        for target, number, start in zip(found, shard.tolist(), (local * size).tolist(), strict=True):
            target[:] = self._maps[number][start : start + size]
        return found

    @cached_property
    def _window(self) -> tuple[int, int, np.ndarray]:
        """All mapped shards as one array (base, unit, window): row k is the view that starts `k * unit` bytes
        after the lowest mapped address `base`. A batch over many shards is then one gather; a gather per
        shard would copy every view twice, once out of its shard and once into its place.

        The window spans memory between the shards that is not ours, so only numbers of stored views may index
        it: `gather` refuses all others.
        """
        mapped = self._maps.values()
        lowest = min(mapped, key=lambda data: data.ctypes.data)
        base = lowest.ctypes.data
        top = max(data.ctypes.data + data.nbytes for data in mapped)
        size = self.plan.view_bytes
        unit = math.gcd(
            64, size
        )  # maps start on pages and .npy data on multiples of 64, so each view starts on a unit
        shape = ((top - base - size) // unit + 1, size)
        return base, unit, np.lib.stride_tricks.as_strided(lowest, shape, (unit, 1), writeable=False)

    def _map_together(self, shards: np.ndarray) -> None:
        """Maps all of `shards`, at most `_most_maps`, and closes others if these become too many."""
        missing = [int(shard) for shard in shards if not self._addresses[shard]]
        surplus = len(self._maps) + len(missing) - self._most_maps
        if surplus > 0:
            wanted = set(shards.tolist())
            for shard in [shard for shard in self._maps if shard not in wanted][:surplus]:
                self._addresses[shard] = 0
                del self._maps[shard]
        for shard in missing:
            self._map(shard)

    def _map(self, shard: int) -> None:
        file, entry = self._file(shard), self._shards[shard]
        _refuse_wrong_size(file, entry)
        try:
            with file.open("rb") as stream:
                content = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENOMEM):
                raise
            raise UserError(
                f"{file} cannot be mapped ({error.strerror}), beside {len(self._maps)} other shards of this "
                "bank; raise `ulimit -n` or vm.max_map_count, or build the bank with a larger "
                "shard_megabytes."
            ) from None
        found = None if self._is_checked[shard] else xxhash.xxh3_128_hexdigest(content)
        if found not in (None, entry["checksum"]):
            raise UserError(
                f"{file} is damaged: its checksum is {found}, expected {entry['checksum']}; delete the file "
                f"and run the build of this bank again (`cfssl bank verify {self.path}` names the views)."
            )
        self._is_checked[shard] = True
        header = entry["bytes"] - entry["rows"] * self.plan.slots * self.plan.view_bytes
        data = np.frombuffer(content, dtype=np.uint8, offset=header)
        self._maps[shard], self._addresses[shard] = data, data.ctypes.data
        self.__dict__.pop("_window", None)

    def _file(self, shard: int) -> Path:
        return shard_file(self.path, shard, "npy")

    @property
    def _index_file(self) -> Path:
        return self.path / "index.parquet"

    def _column(self, name: str) -> np.ndarray:
        return self._read_index([name])[name].to_numpy().reshape(len(self), self.plan.slots)

    def _read_index(self, columns: list[str] | None) -> pa.Table:
        if not self._index_is_checked and not is_sound(self._index_file, self._index):
            raise UserError(
                f"{self._index_file} does not agree with its checksum; run the build of this bank again, "
                "which makes it anew."
            )
        self._index_is_checked = True
        found, expected = pq.read_table(self._index_file, columns=columns), len(self) * self.plan.slots
        if len(found) != expected:
            raise UserError(
                f"{self._index_file} has {len(found)} rows, expected {expected}, one per item and slot; "
                "build the bank again."
            )
        return found

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
    for shard, entry in enumerate(bank._shards):
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
    file, entry, plan = bank._file(shard), bank._shards[shard], bank.plan
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


def _refuse_wrong_size(file: Path, entry: Mapping[str, Any]) -> None:
    size = size_of(file)
    if size is None:
        raise UserError(f"{file} is missing; run the build of this bank again, which makes it anew.")
    if size != entry["bytes"]:
        raise UserError(
            f"{file} has {size} bytes, expected {entry['bytes']}, so it was truncated or replaced; run the "
            "build of this bank again, which makes it anew."
        )


def _refuse_outside(what: str, numbers: np.ndarray, count: int) -> None:
    if numbers.dtype.kind not in "iu":
        raise IndexError(f"{what} are {numbers.dtype}, expected integers.")
    if numbers.size and (numbers.min() < 0 or numbers.max() >= count):
        raise IndexError(f"{what} reach from {numbers.min()} to {numbers.max()}, expected 0 to {count - 1}.")


def _allow_open_files(maps: int) -> int:
    """How many of `maps` files may be mapped. Each holds a file descriptor, and many systems allow 1,024
    unless a process asks for more; some are left for others."""
    if sys.platform == "win32":
        return maps
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = maps + OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted and soft != hard:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return maps if soft == resource.RLIM_INFINITY else max(1, min(maps, soft - OTHER_FILES))

"""Every byte of a bank against its checksums, by one process or several.

Enters: an opened bank. Leaves: a sentence for every file and every view that is not as it was written.
"""

import multiprocessing
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from cfssl.bank.records import is_sound, read_record, sealed, size_of
from cfssl.bank.shards import Plan, shard_file, view_checksum
from cfssl.bank.store import Bank
from cfssl.errors import UserError


def verify(bank: Bank, progress: Callable[[int, int], None] | None = None, jobs: int = 1) -> list[str]:
    """Names, one sentence each, every file and every view that does not agree with its checksum; an empty
    list says that all is sound. `progress(done, total)` is called after each shard.

    `jobs` processes take one shard at a time each, and what they find is the same, in the same order. Files
    are read in pieces, so that memory does not grow with them. Raises `UserError` when one of the processes
    is killed.
    """
    index_is_sound = is_sound(bank.path / "index.parquet", bank.index_entry)
    found = [] if index_is_sound else ["index.parquet does not agree with its checksum"]
    check = _Check(bank.path, bank.plan, bank.shards, index_is_sound)
    numbers = range(bank.shard_count)
    with ExitStack() as stack:
        findings: Iterable[list[str]] = map(check.findings, numbers)
        if jobs > 1:
            # Spawned, because this process may have threads, of which forking copies the locks alone.
            context, count = multiprocessing.get_context("spawn"), min(jobs, bank.shard_count)
            pool = stack.enter_context(ProcessPoolExecutor(count, context, _share, (check,)))
            findings = pool.map(_findings, numbers)
        try:
            for shard, of_shard in enumerate(findings):
                found += of_shard
                if progress is not None:
                    progress(shard + 1, bank.shard_count)
        except BrokenProcessPool:
            raise UserError(
                f"A process that verified {bank.path} was killed, which happens when memory is short or a "
                f"file is truncated while it is read; verify again, with fewer than {jobs} jobs."
            ) from None
    return found


@dataclass(frozen=True)
class _Check:
    """What a process has to know; unlike a bank, it is not opened anew there."""

    path: Path
    plan: Plan
    shards: list[dict[str, Any]]
    index_is_sound: bool

    def findings(self, shard: int) -> list[str]:
        """Of a shard, its part of the index and its record."""
        entry = self.shards[shard]
        found = [] if is_sound(shard_file(self.path, shard, "npy"), entry) else self._damage(shard)
        part, record = (shard_file(self.path, shard, kind) for kind in ("parquet", "json"))
        if not is_sound(part, entry["index"]):
            found.append(f"{part.name} does not agree with its checksum or is missing")
        if read_record(record) != sealed({"plan": self.plan.key, "shard": entry}):
            found.append(f"{record.name} does not agree with bank.json or is missing")
        return found

    def _damage(self, shard: int) -> list[str]:
        file, entry, plan = shard_file(self.path, shard, "npy"), self.shards[shard], self.plan
        bytes_found = size_of(file)
        if bytes_found is None:
            return [f"{file.name} is missing"]
        if bytes_found != entry["bytes"]:
            return [f"{file.name} has {bytes_found} bytes, expected {entry['bytes']}"]
        if not self.index_is_sound:
            return [
                f"{file.name} does not agree with its checksum; which views are damaged, only the index "
                "could tell"
            ]
        index = pq.ParquetFile(self.path / "index.parquet").read_row_group(shard, ["row", "checksum"])
        rows, checksums = (index[name].to_pylist() for name in ("row", "checksum"))
        items, found = plan.items(shard), []
        header = entry["bytes"] - len(items) * plan.slots * plan.view_bytes
        views = np.memmap(file, np.uint8, "r", header, (len(items) * plan.slots, plan.view_bytes))
        for number, (view, expected) in enumerate(zip(views, checksums, strict=True)):
            if view_checksum(view) != expected:
                place, slot = divmod(number, plan.slots)
                where = f"item {items[place]} (table row {rows[number]}), slot {slot}"
                found.append(f"{file.name}: {where} ({self._shows(slot)})")
        return found or [f"{file.name}: its header is damaged"]

    def _shows(self, slot: int) -> str:
        if slot == 0:
            return "the real image"
        do = self.plan.views[slot - 1]
        return f"do({', '.join(f'{name}={value}' for name, value in do.items())})"


_shared: list[_Check] = []  # in a process of `verify`


def _share(check: _Check) -> None:
    _shared[:] = [check]


def _findings(shard: int) -> list[str]:
    return _shared[0].findings(shard)

"""The shards of a bank in memory: mapped when they are first read, and of very many only some at a time.

Enters: the numbers of shards and of views within them. Leaves: the bytes of these views, at the speed of
memory; a shard's checksum is compared before its first byte is handed out.
"""

import errno
import math
import mmap
import sys
import threading
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from cfssl.bank.records import refuse_wrong_size, stream_checksum
from cfssl.bank.shards import Plan, shard_file
from cfssl.errors import UserError

MAPS = 4096  # shards mapped at a time: each takes a file descriptor and one of a process's 65,530 regions
OTHER_FILES = 256  # descriptors left for the rest of the process
RESIDENT = 2 * 2**30  # bytes of mapped files that may count as memory of the process
LOOK_EVERY = 256  # views after which this is looked at
COPY_ONE_BY_ONE = 32 * 1024  # bytes of a view from which the copying takes the time, not the calls


class ShardMaps:
    """`shards`: size and checksum of every shard of the bank `path`, as bank.json tells them. Threads may
    read at once. Those mapped longest ago are closed again when they become too many. With `is_checked` no
    checksum is compared."""

    def __init__(
        self, path: Path, plan: Plan, shards: Sequence[Mapping[str, Any]], is_checked: bool = False
    ) -> None:
        self.path, self.plan, self._shards = path, plan, shards
        self._maps: dict[int, np.ndarray] = {}  # by shard, in the order of mapping
        self._files: dict[int, mmap.mmap] = {}  # what these are views of
        self._unseen, self._resident_before = 0, resident_files()
        self._addresses = np.zeros(len(shards), dtype=np.int64)  # 0: not mapped
        self._is_checked = np.full(len(shards), is_checked)
        self._most_maps = allow_open_files(min(len(shards), MAPS))
        self._lock = threading.Lock()  # no thread may close a map that another one reads

    def read(self, shard: np.ndarray, local: np.ndarray) -> np.ndarray:
        """The bytes (n, size) of the views numbered `local` (n,) within their `shard` (n,), copied.

        Raises `UserError` for a shard of another size than its entry tells, when it is mapped, or another
        checksum, when it is mapped for the first time. Both numbers have to be of stored views.
        """
        with self._lock:
            self._release_pages(len(shard))
            return self._read(shard, local)

    def _release_pages(self, views: int) -> None:
        """Before `views` more are read. The system may map a megabyte around each of them; what was read
        stays in its cache, and need not count as memory of this process, for which job schedulers kill."""
        self._unseen += views
        if self._unseen < LOOK_EVERY:
            return
        self._unseen = 0
        if resident_files() - self._resident_before > RESIDENT:
            for content in self._files.values():
                content.madvise(mmap.MADV_DONTNEED)

    def _read(self, shard: np.ndarray, local: np.ndarray) -> np.ndarray:
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
        it: `Bank.gather` refuses all others.
        """
        mapped = self._maps.values()
        lowest = min(mapped, key=lambda data: data.ctypes.data)
        base = lowest.ctypes.data
        top = max(data.ctypes.data + data.nbytes for data in mapped)
        size = self.plan.view_bytes
        # Maps start on pages and .npy data on multiples of 64, so each view starts on a unit.
        unit = math.gcd(64, size)
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
                del self._maps[shard], self._files[shard]
        for shard in missing:
            self._map(shard)

    def _map(self, shard: int) -> None:
        file, entry = shard_file(self.path, shard, "npy"), self._shards[shard]
        refuse_wrong_size(file, entry)
        try:
            with file.open("rb", buffering=0) as stream:
                found = None if self._is_checked[shard] else stream_checksum(stream)
                content = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENOMEM):
                raise
            raise UserError(
                f"{file} cannot be mapped ({error.strerror}), beside {len(self._maps)} other shards of this "
                "bank; raise `ulimit -n` or vm.max_map_count, or build the bank with a larger "
                "shard_megabytes."
            ) from None
        if found not in (None, entry["checksum"]):
            raise UserError(
                f"{file} is damaged: its checksum is {found}, expected {entry['checksum']}; delete the file "
                f"and run the build of this bank again (`cfssl bank verify {self.path}` names the views)."
            )
        self._is_checked[shard] = True
        header = entry["bytes"] - entry["rows"] * self.plan.slots * self.plan.view_bytes
        data = np.frombuffer(content, dtype=np.uint8, offset=header)
        self._maps[shard], self._addresses[shard] = data, data.ctypes.data
        self._files[shard] = content
        self.__dict__.pop("_window", None)


def resident_files() -> int:
    """Bytes of mapped files that count as memory of this process; 0 where the system is no Linux."""
    told = Path("/proc/self/statm")
    return int(told.read_text().split()[2]) * mmap.PAGESIZE if told.exists() else 0


def allow_open_files(maps: int) -> int:
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

"""Progress a person can read: a live bar with throughput, data-wait share and time left on a terminal, plain
lines elsewhere."""

import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

PLAIN_INTERVAL = 10.0  # seconds between plain lines


class ProgressBar:
    """Counts steps of one job.

    with ProgressBar("pretrain", total=100) as bar:
        bar.advance(items=256, waited=0.01, note="loss 5.1")
    `items` are images (or rows) done in this step, `waited` the seconds spent waiting for data.
    """

    def __init__(
        self, label: str, total: int, done: int = 0, unit: str = "images", quiet: bool = False
    ) -> None:
        self.label, self.total, self.done, self.unit = label, total, done, unit
        self.items, self.waited, self.note = 0, 0.0, ""
        self.quiet = quiet
        self.live: Progress | None = None

    def __enter__(self) -> Self:
        self.started = self.last_line = time.monotonic()
        self.first = self.done
        console = Console(stderr=True)
        if console.is_terminal and not self.quiet:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.completed}/{task.total}"),
            )
            self.live = Progress(
                *columns, TimeRemainingColumn(), TextColumn("{task.fields[note]}"), console=console
            )
            self.live.start()
            self.task = self.live.add_task(self.label, total=self.total, completed=self.done, note="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.live is not None:
            self.live.stop()
        elif not self.quiet and kind is None:
            self._line()

    def advance(self, steps: int = 1, items: int = 0, waited: float = 0.0, note: str = "") -> None:
        self.done += steps
        self.items += items
        self.waited += waited
        self.note = note
        if self.quiet:
            return
        if self.live is not None:
            self.live.update(self.task, completed=self.done, note=f"{self.rates()}  {note}")
        elif time.monotonic() - self.last_line >= PLAIN_INTERVAL:
            self._line()

    def rates(self) -> str:
        """Throughput and, once anything waited for data, the share of time spent waiting."""
        elapsed = max(time.monotonic() - self.started, 1e-9)
        return f"{self.items / elapsed:,.0f} {self.unit}/s, data wait {self.waited / elapsed:.0%}"

    def _line(self) -> None:
        self.last_line = time.monotonic()
        elapsed = self.last_line - self.started
        fresh = self.done - self.first
        left = f"{elapsed / fresh * (self.total - self.done):.0f} s left" if fresh else "time left unknown"
        note = f", {self.note}" if self.note else ""
        print(
            f"{self.label}: {self.done}/{self.total}, {self.rates()}, {left}{note}",
            file=sys.stderr,
            flush=True,
        )

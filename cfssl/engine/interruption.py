"""Being asked to stop: by a person, by a scheduler that wants its node back or whose time is up.

There is one owner of signals in a process, an `Interruption` that listens. Everything cfssl makes survives
being killed at any moment, so that a signal ends the program where it happens to be, by `Interrupted`; only
where more would be lost than need be, in the steps of a training, it is deferred to the next moment at which
everything is saved. A second Ctrl-C ends that as well.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)  # USR2 is what submitit asks SLURM for


class Interrupted(BaseException):
    """Somebody asked to stop, with the signal `number`; the same command goes on from here. No `Exception`,
    so that nothing which expects errors takes it for one."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class Interruption:
    """`number`: the signal that asked first, None before."""

    def __init__(self) -> None:
        self.number: int | None = None
        self._deferred = 0

    @contextmanager
    def listening(self) -> Iterator["Interruption"]:
        """Takes the signals of this process inside; afterwards whoever had them before has them. Only in the
        main thread."""
        before = {number: signal.signal(number, self._receive) for number in SIGNALS}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Signals are noted inside, and `check` speaks of them."""
        self._deferred += 1
        try:
            yield
        finally:
            self._deferred -= 1

    def check(self) -> None:
        """Raises `Interrupted` once somebody asked."""
        if self.number is not None:
            raise Interrupted(self.number)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        is_impatient = number == signal.SIGINT and self.number is not None
        if self.number is None:
            self.number = number
        if not self._deferred or is_impatient:
            raise Interrupted(number)


def ignore_signals() -> None:
    """In a worker process: a signal to all processes of a job must not take the data away under the step that
    is being finished. Workers end when their parent does."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)

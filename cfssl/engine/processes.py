"""Several processes that train one model together.

They are started by torchrun, by srun, or by the first of them itself, and meet in a key store. The first one
leads: it alone goes through the stages of a recipe, and when it comes to a training it gives the others an
order. Until then, and afterwards, these wait (`follow`). Only while all train are they a process group of
torch (gloo between CPUs, NCCL between GPUs), so that nothing else can wait for a process that is busy
elsewhere.

Whoever fails says so in the store, and the others end too: none waits for a process that is gone.
"""

import gc
import os
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import cache

import torch
from torch import distributed

from cfssl.engine.run import HardwareSettings
from cfssl.engine.world import meeting_place, world
from cfssl.errors import UserError

# The others wait while the first process makes stages, looks at the encoder or writes.
PATIENCE = timedelta(days=30)
START = timedelta(minutes=30)  # within which all of them have to be there
POLL = 0.2  # seconds between two looks into the store
GRACE = 20.0  # seconds that a process has to end on its own when another one has failed
FAREWELL = 3.0  # seconds in which those that are still there can go home
HOME = "home"  # the order to end
FAILED = "failed"  # where a process says why it stopped
STDERR = 2  # the descriptor: what the others print is no result


def rank() -> int:
    """Of this process among those that train together now; 0 when it is alone."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def count() -> int:
    """How many processes train together now."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def largest(number: int) -> int:
    """Of the numbers of the processes that train together: the same in all of them, all of which have to
    ask."""
    if count() == 1:
        return number
    found = torch.tensor(number)
    distributed.all_reduce(found, distributed.ReduceOp.MAX)
    return int(found)


def agreed(flag: bool) -> bool:
    """Whether any of the processes that train together says so; all of them have to ask."""
    return bool(largest(int(flag)))


def first_says(answer: str | None) -> str | None:
    """What the first of the processes that train together has given here, in all of them."""
    answers = [answer]
    if count() > 1:
        distributed.broadcast_object_list(answers, src=0)
    return answers[0]


@contextmanager
def together(hardware: HardwareSettings, order: str) -> Iterator[None]:
    """Inside, the processes that `hardware` asks for are a process group, of which this one is the first; the
    others are given `order`. Those that nobody has started are started on this machine, and end afterwards.
    With one process nothing happens.

    Raises `UserError` when other processes were started than the recipe asks for, or when one of them
    fails."""
    started, size = world().size, hardware.processes
    if started not in (1, size):
        raise UserError(
            f"hardware.devices x hardware.nodes is {hardware.devices} x {hardware.nodes}, but {started} "
            "processes were started; start one per device, or set the two to what was started."
        )
    if size == 1:
        yield
    elif started == size:
        store = meeting()
        with _group(store, _given(store, order), size, []):
            yield
    else:
        _refuse_to_start(hardware)
        server = distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        store = _own(server)
        others = [_started(place, size, server.port) for place in range(1, size)]
        try:
            with _group(store, _given(store, order), size, others):
                yield
            _given(store, HOME)
            for other in others:
                other.wait()
        finally:
            for other in others:
                other.kill()
                other.wait()


def follow(obey: Callable[[str], None]) -> None:
    """Does what the first process orders, as a member of its group, until it sends this one home or is gone.
    Raises `UserError` when another process fails meanwhile."""
    store, number = meeting(), 0
    try:
        while True:
            number += 1
            try:
                while not store.check([f"order {number}"]):
                    time.sleep(POLL)
                order = store.get(f"order {number}").decode()
            except distributed.DistError:  # the first process is gone, and has said why itself
                return
            if order == HOME:
                return
            with _group(store, number, world().size, []):
                obey(order)
    finally:
        _count_off(store, "gone", 0)


def dismiss() -> None:
    """Sends the processes that were started with this one home, and sees them off: this one may keep the
    store."""
    store = meeting()
    _given(store, HOME)
    _count_off(store, "gone", world().size, FAREWELL)


@cache
def meeting() -> distributed.Store:
    """The store of the processes that were started together, all of which have to come; the first one keeps
    it, or torchrun."""
    from torch.distributed.rendezvous import rendezvous

    here = world()
    store, _, _ = next(rendezvous(meeting_place(), here.rank, here.size, timeout=START))
    return _own(store)


def _own(store: distributed.Store) -> distributed.Store:
    """A part of `store` that is this start's alone: torchrun restarts processes that meet where they met
    before."""
    return distributed.PrefixStore(f"cfssl {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


def _given(store: distributed.Store, order: str) -> int:
    """The number of the order, which the others find."""
    number = store.add("orders", 1)
    store.set(f"order {number}", order)
    return number


def _refuse_to_start(hardware: HardwareSettings) -> None:
    """Raises `UserError` where this machine alone cannot hold the processes."""
    if hardware.nodes > 1:
        raise UserError(
            f"hardware.nodes is {hardware.nodes}, but this process was started alone; start one per device "
            "with cfssl submit, srun or torchrun, or set hardware.nodes: 1."
        )
    if hardware.device.type == "cuda" and torch.cuda.device_count() < hardware.devices:
        raise UserError(
            f"hardware.devices is {hardware.devices}, but torch finds {torch.cuda.device_count()} GPUs here; "
            "lower it."
        )


def _started(place: int, size: int, port: int) -> subprocess.Popen[bytes]:
    """The process with rank `place`, which follows whoever keeps a store at `port` of this machine. It is a
    command of its own, so that it does not matter what this process was started with."""
    names = {"RANK": place, "LOCAL_RANK": place, "WORLD_SIZE": size, "MASTER_PORT": port}
    variables = {"MASTER_ADDR": "127.0.0.1"} | {name: str(value) for name, value in names.items()}
    command = [sys.executable, "-m", "cfssl"]
    return subprocess.Popen(command, env=os.environ | variables, stdin=subprocess.DEVNULL, stdout=STDERR)


@contextmanager
def _group(
    store: distributed.Store, number: int, size: int, others: Sequence[subprocess.Popen[bytes]]
) -> Iterator[None]:
    """Inside, `size` processes are the group that obeys the order `number`. A failure inside is told to the
    others, and one of theirs ends this one. `others`: those that this one has started."""
    here, own = world(), distributed.PrefixStore(f"group {number}", store)
    over, has_told = threading.Event(), False
    threading.Thread(target=_watch, args=(own.clone(), others, over), daemon=True).start()
    try:
        distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
            store=own,
            rank=here.rank,
            world_size=size,
            timeout=PATIENCE,
        )
        try:
            yield
        except BaseException as error:
            if isinstance(error, RuntimeError) and _is_lost_connection(error):
                raise UserError(_last_words(own)) from error
            _tell(own, error)
            has_told = True
            # What the model holds of the group keeps its connections open, and the others waiting.
            traceback.clear_frames(error.__traceback__)
            gc.collect()
            raise
        finally:
            distributed.destroy_process_group()
    finally:
        over.set()
        # Where the first process has failed, it stays until the others have read why: it may keep the store.
        _count_off(own, "left", size if has_told and here.rank == 0 else 0)


def _is_lost_connection(error: RuntimeError) -> bool:
    """Whether a collective failed because of another process; gloo's errors have no class of their own."""
    return isinstance(error, distributed.DistError) or any(sign in str(error) for sign in ("gloo", "NCCL"))


def _tell(store: distributed.Store, error: BaseException) -> None:
    """Leaves a sentence for the others, unless one is there."""
    with suppress(distributed.DistError):
        words = str(error) or type(error).__name__
        store.compare_set(FAILED, "", f"Process {rank()} of {count()} stopped: {words}")


def _last_words(store: distributed.Store) -> str:
    """What the process that failed has said."""
    with suppress(distributed.DistError):
        for _ in range(10):  # it may be about to
            if store.check([FAILED]):
                return store.get(FAILED).decode()
            time.sleep(POLL)
    return (
        "Another of the processes that train together is gone without a word, e.g. killed because memory was "
        "short; see what it printed. The same command goes on from the last checkpoint."
    )


def _count_off(store: distributed.Store, name: str, size: int, seconds: float = GRACE) -> None:
    """Notes that this process has come so far, and waits a moment for the others, until there are `size`."""
    with suppress(distributed.DistError):
        found, patience = store.add(name, 1), time.monotonic() + seconds
        while found < size and time.monotonic() < patience:
            time.sleep(POLL)
            found = store.add(name, 0)


def _has_failed(store: distributed.Store) -> bool:
    """Whether a process of the group has said so, or is gone with the store."""
    try:
        return store.check([FAILED])
    except distributed.DistError:
        return True


def _watch(
    store: distributed.Store, others: Sequence[subprocess.Popen[bytes]], over: threading.Event
) -> None:
    """Ends this process when another one has failed and it does not notice: NCCL would wait for ever."""
    while not over.wait(POLL):
        failed = _has_failed(store) or any(other.poll() for other in others)
        if failed and not over.wait(GRACE):
            print(f"cfssl: {_last_words(store)}", file=sys.stderr, flush=True)
            os._exit(2)

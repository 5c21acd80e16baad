"""Whose a temporary file or folder is, and whether its writer is gone.

Temporaries are called `.NAME.MACHINE-PROCESS.anything`. Locks mean little on shared file systems, and
process numbers nothing on another machine. So what this machine left goes when its process is gone (a
number used again keeps it), and what another machine left when nothing was written in it for a week.
"""

import hashlib
import math
import os
import platform
import re
from pathlib import Path

WEEK = 7 * 24 * 3600.0
OWNED = re.compile(r"\.(?P<machine>[0-9a-f]{12})-(?P<process>[0-9]+)\.")


def owner() -> str:
    """Names this process among those of all machines that may share the file system."""
    return f"{machine()}-{os.getpid()}"


def machine() -> str:
    """Names the processes among which a number is one process: this start of this machine, and the container
    in it."""
    try:
        start = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")
        names = f"{start} {os.stat('/proc/self/ns/pid').st_ino}"  # noqa: PTH116  the link's own target
    except OSError:
        names = platform.node()
    return hashlib.blake2b(names.encode(), digest_size=6).hexdigest()


def is_abandoned(part: Path, now: float) -> bool:
    """Whether the writer of `part` is certainly gone; `now` by the clock of the file server."""
    found = OWNED.search(part.name)
    if found is not None and found["machine"] == machine():
        return not _is_alive(int(found["process"]))
    return now - _last_written(part) > WEEK


def _last_written(part: Path) -> float:
    """When the file, or the folder or a file in it, was written last; never, if another process has just
    removed it."""
    try:
        inside = part.iterdir() if part.is_dir() else ()
        return max(found.stat().st_mtime for found in (part, *inside))
    except FileNotFoundError:
        return math.inf


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True

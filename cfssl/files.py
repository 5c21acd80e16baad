"""Files and folders that are either whole or absent: everything is written under a temporary name, flushed to
disk and renamed."""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from cfssl.errors import UserError
from cfssl.writers import is_abandoned, owner


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; when the block ends well it is fsynced and renamed to `path`,
    else removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.{owner()}.", suffix=".part")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb+") as stream:
            os.fsync(stream.fileno())
        temporary.chmod(0o644)  # mkstemp makes private files; results are shared with colleagues
        temporary.replace(path)
        fsync_directory(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yields a temporary folder beside `path`; when the block ends well it is renamed to `path`, replacing
    what is there, else it is removed. Of two writers the later one stays.

    The files in it are the block's to flush. What killed writers of `path` left behind is removed first.
    """
    with made_folders(path.parent):
        prefix = f".{path.name}.{owner()}."
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=prefix, suffix=".part"))
        try:
            _remove_left_behind(path, temporary)
            yield temporary
            temporary.chmod(0o755)  # mkdtemp makes private folders; results are shared with colleagues
            _put_in_place(temporary, path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def made_folders(path: Path) -> Iterator[None]:
    """Makes the folder `path` and its parents; when the block fails, those made here are removed again,
    unless something lies in them."""
    made = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for folder in made:
            with suppress(OSError):
                folder.rmdir()
        raise


def _put_in_place(temporary: Path, path: Path) -> None:
    """Renames, moving what is in the way aside first."""
    fsync_directory(temporary)
    aside = temporary.with_suffix(".old")
    if path.exists():
        path.rename(aside)
    try:
        temporary.rename(path)
    except OSError:
        if aside.exists() and not path.exists():
            aside.rename(path)
        if not path.exists():  # else another process put the same there in between, which is as good
            raise
    fsync_directory(path.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _remove_left_behind(path: Path, fresh: Path) -> None:
    """Removes temporary folders of `path` whose writers are certainly gone."""
    now = fresh.stat().st_mtime  # just made, so this is the clock of the file server
    name = re.compile(re.escape(f".{path.name}.") + r"[0-9a-f]{12}-[0-9]+\.\w+\.(part|old)")
    for part in list(path.parent.iterdir()):
        if name.fullmatch(part.name) and is_abandoned(part, now):
            shutil.rmtree(part, ignore_errors=True)


def fsync_directory(path: Path) -> None:
    """Makes a rename in `path` durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Writes `text` atomically (UTF-8)."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Writes `content` atomically as indented JSON; NaN is refused because JSON has none."""
    write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def copy_file(source: Path, path: Path) -> None:
    """Copies the file `source` to `path` atomically."""
    with atomic_path(path) as temporary:
        shutil.copyfile(source, temporary)


def read_json(path: Path) -> Any:
    """Reads a JSON file. Raises `UserError` when it is missing or broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; check the path or run the stage that writes it.") from None
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path} is not valid JSON ({error}); delete it and run the stage that writes it again."
        ) from None

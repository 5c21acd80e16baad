"""Files and folders are whole or absent, and nothing is left behind."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cfssl.files import atomic_folder, atomic_path, copy_file, made_folders, write_json
from cfssl.writers import WEEK, machine


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def dead_process() -> int:
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def part(folder: Path, owner: str, kind: str = "part") -> Path:
    """What a writer of `folder / "t"` leaves behind when it is killed."""
    left = folder / f".t.{owner}.a1b2c3d4.{kind}"
    left.mkdir()
    (left / "images.npy").write_text("half")
    return left


def test_a_folder_appears_only_when_its_block_has_ended(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "t") as temporary:
        (temporary / "one").write_text("1")
        assert not (tmp_path / "t").exists()
    assert names(tmp_path) == ["t"]
    assert (tmp_path / "t").stat().st_mode & 0o777 == 0o755
    with atomic_folder(tmp_path / "t") as temporary:
        (temporary / "two").write_text("2")
        assert names(tmp_path / "t") == ["one"]
    assert names(tmp_path / "t") == ["two"]
    assert names(tmp_path) == ["t"]


def test_a_failed_block_leaves_what_was_there_and_nothing_else(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "new" / "deep" / "t"):
        raise KeyboardInterrupt
    assert names(tmp_path) == []
    with atomic_folder(tmp_path / "t") as temporary:
        (temporary / "one").write_text("1")
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "t"):
        raise KeyboardInterrupt
    assert names(tmp_path) == ["t"]
    assert names(tmp_path / "t") == ["one"]


def test_made_folders_go_when_the_block_fails_and_others_stay(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()

    def fail(*left: str) -> None:
        for name in left:
            (tmp_path / "old" / "a" / name).write_text("x")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), made_folders(tmp_path / "old" / "a" / "b"):
        fail()
    assert names(tmp_path / "old") == []
    with pytest.raises(KeyboardInterrupt), made_folders(tmp_path / "old" / "a" / "b"):
        fail("precious")
    assert names(tmp_path / "old" / "a") == ["precious"]
    with made_folders(tmp_path / "old" / "a" / "b"):
        pass
    assert names(tmp_path / "old" / "a") == ["b", "precious"]


@pytest.mark.parametrize("kind", ["part", "old"])
def test_what_a_killed_writer_left_is_removed_by_the_next(tmp_path: Path, kind: str) -> None:
    part(tmp_path, f"{machine()}-{dead_process()}", kind)
    with atomic_folder(tmp_path / "t"):
        assert len(names(tmp_path)) == 1
    assert names(tmp_path) == ["t"]


def test_what_a_living_writer_has_stays(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        living = [part(tmp_path, f"{machine()}-{number}") for number in (process.pid, os.getpid(), 1)]
        with atomic_folder(tmp_path / "t"):
            pass
        assert names(tmp_path) == sorted(["t", *(left.name for left in living)])
    finally:
        process.communicate(b"\n")


def test_what_another_machine_has_stays_until_nothing_was_written_for_a_week(tmp_path: Path) -> None:
    owner = f"0123456789ab-{dead_process()}"
    left = part(tmp_path, owner)
    now = time.time()

    def aged(folder_days: float, file_days: float) -> bool:
        os.utime(left / "images.npy", (now - file_days * WEEK / 7,) * 2)
        os.utime(left, (now - folder_days * WEEK / 7,) * 2)
        with atomic_folder(tmp_path / "t"):
            pass
        return left.exists()

    assert aged(0, 0)
    assert aged(30, 6)
    assert aged(6, 30)
    assert not aged(8, 8)


def test_only_the_remains_of_the_same_folder_are_touched(tmp_path: Path) -> None:
    owner = f"{machine()}-{dead_process()}"
    others = [
        f".u.{owner}.a1b2c3d4.part",
        f".t.u.{owner}.a1b2c3d4.part",
        f".t.{owner}.a1b2c3d4.keep",
        ".t.part",
    ]
    for name in others:
        (tmp_path / name).mkdir()
    with atomic_folder(tmp_path / "t"):
        pass
    assert names(tmp_path) == sorted([*others, "t"])


def test_a_file_is_whole_or_absent(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"x": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", {"x": float("nan")})
    with pytest.raises(KeyboardInterrupt), atomic_path(tmp_path / "a.json"):
        raise KeyboardInterrupt
    assert names(tmp_path) == ["a.json"]
    assert (tmp_path / "a.json").read_text() == '{\n "x": 1\n}\n'


def test_a_copy_is_whole_and_replaces_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"new")
    (tmp_path / "b").write_bytes(b"older")
    copy_file(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == b"new"
    assert names(tmp_path) == ["a", "b"]

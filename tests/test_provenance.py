"""Where a result says it comes from: the commit of this package's own checkout, or none."""

import shutil
import subprocess
from pathlib import Path

import pytest

from cfssl.provenance import environment, git_state

NONE = {"commit": None, "dirty": None}


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A package at the top of a repository with one commit."""
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    package = tmp_path / "repository" / "cfssl"
    package.mkdir(parents=True)
    (package / "module.py").write_text("one = 1")
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "."], [*who, "commit", "-q", "-m", "first"]):
        subprocess.run(["git", "-C", str(package.parent), *words], check=True)
    return package


def test_the_commit_and_changes_of_a_checkout_are_known(checkout: Path) -> None:
    clean = git_state(checkout)
    words = ["git", "-C", str(checkout), "log", "--format=%H"]
    assert clean == {
        "commit": subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip(),
        "dirty": False,
    }
    (checkout / "module.py").write_text("one = 2")
    assert git_state(checkout) == {**clean, "dirty": True}


def test_a_package_installed_inside_another_repository_has_no_commit(checkout: Path) -> None:
    installed = checkout.parent / ".venv" / "lib" / "site-packages" / "cfssl"
    installed.mkdir(parents=True)
    assert git_state(installed) == NONE


def test_a_package_outside_every_repository_has_no_commit(tmp_path: Path) -> None:
    (tmp_path / "cfssl").mkdir()
    assert git_state(tmp_path / "cfssl") == NONE


def test_without_git_the_environment_is_still_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert environment()["git"] == NONE

"""Where a result comes from: fingerprints of settings and code, the git commit, the machine."""

import ast
import functools
import hashlib
import json
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parent
LIBRARIES = (
    "torch",
    "timm",
    "lightly",
    "monai",
    "albumentations",
    "lightning-fabric",
    "numpy",
    "scikit-learn",
    "faiss-cpu",
    "zuko",
)


def fingerprint(*parts: Any) -> str:
    """16 hex digits of the JSON form of `parts` (keys sorted). Anything JSON cannot hold raises TypeError."""
    text = json.dumps(parts, sort_keys=True, allow_nan=False)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def differences(found: Any, wanted: Any, path: str = "") -> list[str]:
    """Where two nested JSON values differ, one phrase each: `settings.beta is 5.0, expected 1.0`."""
    if not isinstance(found, dict) or not isinstance(wanted, dict):
        return [] if found == wanted else [f"{path} is {found}, expected {wanted}"]
    return [
        phrase
        for name in {**found, **wanted}
        for phrase in differences(found.get(name), wanted.get(name), f"{path}.{name}" if path else name)
    ]


@functools.cache
def code_version(*rooms: str) -> str:
    """Fingerprint of the code in `rooms` (folders or files under cfssl/). Comments, layout and docstrings do
    not count: two versions with equal syntax trees compute the same thing."""
    trees = []
    for room in rooms:
        path = PACKAGE / room
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            tree = ast.parse(file.read_text(encoding="utf-8"))
            for node in ast.walk(tree):
                if isinstance(
                    node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
                ) and ast.get_docstring(node):
                    node.body = node.body[1:]
            trees.append((file.relative_to(PACKAGE).as_posix(), ast.dump(tree)))
    return fingerprint(trees)


def git_state(package: Path = PACKAGE) -> dict[str, Any]:
    """Commit of the checkout that the package lies in, and whether it differs from it. Both null where there
    is no git or the package is installed: a virtual environment inside another project's repository must not
    report that project's commit."""

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(package), *words], capture_output=True, text=True, check=False
            )
        except OSError:  # git is not installed
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    top = git("rev-parse", "--show-toplevel")
    if top is None or (Path(top) / package.name).resolve() != package.resolve():
        return {"commit": None, "dirty": None}
    status = git("status", "--porcelain", "--untracked-files=no")
    return {"commit": git("rev-parse", "HEAD"), "dirty": None if status is None else bool(status)}


def environment() -> dict[str, Any]:
    """What a run ran on: versions, machine, git state. JSON-serialisable."""
    versions = {name: metadata.version(name) for name in LIBRARIES}
    return {
        "python": sys.version.split()[0],
        "libraries": versions,
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "git": git_state(),
        "command": sys.argv,
    }

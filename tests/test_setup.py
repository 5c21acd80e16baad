"""What the package declares is what it uses, and what is pinned is everything that `make` installs."""

import ast
import configparser
import re
import sys
from importlib import metadata
from pathlib import Path

import cfssl

ROOT = Path(__file__).parents[1]
PACKAGE = Path(cfssl.__file__).parent


def declared(section: str, key: str) -> set[str]:
    """Names of distributions in setup.cfg, normalised."""
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    lines = parser[section][key].split("\n")
    return {normal(re.split(r"[<>=!~\[; ]", line)[0]) for line in lines if line and not line.startswith("#")}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def imported() -> dict[str, set[str]]:
    """Module that the package imports anywhere -> the distributions that it may come from."""
    modules = set()
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                modules |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                modules.add(node.module.split(".")[0])
    owners = metadata.packages_distributions()
    third_party = modules - set(sys.stdlib_module_names) - {"cfssl"}
    return {module: set(map(normal, owners[module])) for module in third_party}


OPTIONAL = ("umap", "nifti", "tensorboard")  # extras of the package itself


def test_the_package_declares_exactly_what_it_imports() -> None:
    known, used = declared("options", "install_requires"), imported()
    known |= set().union(*(declared("options.extras_require", extra) for extra in OPTIONAL))
    assert {module for module, owners in used.items() if not owners & known} == set()
    assert known - set().union(*used.values()) == set()


def test_whoever_develops_has_every_optional_part() -> None:
    for extra in OPTIONAL:
        assert declared("options.extras_require", extra) <= declared("options.extras_require", "dev")


def test_everything_declared_is_pinned() -> None:
    pinned = {
        normal(line.split("==")[0])
        for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    }
    needed = declared("options", "install_requires") | declared("options.extras_require", "dev")
    assert needed | {"pip", "setuptools"} <= pinned


def test_contributing_has_every_room_on_a_floor() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rooms = {
        path.stem
        for path in PACKAGE.iterdir()
        if not path.name.startswith("__") and (path.suffix == ".py" or (path / "__init__.py").is_file())
    }
    assert [room for room in sorted(rooms) if f"`{room}`" not in text] == []

"""The arrows of the architecture: a room imports from the floors under it alone.

Where a floor of the architecture has an order inside, it is spelled out here as floors of its own: `errors`
lies under the rest of the basement, and the roof is a staircase. What is left are the exceptions below, each
with its reason.
"""

import ast
from pathlib import Path

import pytest

import cfssl

PACKAGE = Path(cfssl.__file__).parent
FLOORS = [
    {"errors", "writers"},
    {"files", "seeds", "provenance", "settings"},
    {"stages"},
    {"data", "models", "engine"},
    {"scm", "objectives"},
    {"measure"},
    {"generators", "silver"},
    {"bank"},
    {"evaluate"},
    {"visualise"},
    {"experiment"},
    {"recipe"},
    {"agreement", "production"},
    {"segmentation"},
    {"generation", "evaluation", "labelling"},
    {"pipeline"},
    {"check", "sheets"},
    {"chromaps"},
    {"summary"},
    {"demo", "launch"},
    {"cli"},
    {"__main__"},
]
WITHIN_A_FLOOR = {("data", "engine"): "preparing a table takes minutes and shows the progress bar"}
NEVER = {("generators", "objectives"): "they meet in the bank alone"}


def floor(room: str) -> int:
    return next(number for number, rooms in enumerate(FLOORS) if room in rooms)


def allowed(room: str, target: str) -> bool:
    if room == target or (room, target) in WITHIN_A_FLOOR:
        return True
    return floor(target) < floor(room) and (room, target) not in NEVER


def imports(file: Path) -> set[str]:
    """The rooms of cfssl that a file imports or reaches, anywhere in it. Fails for imports that hide where
    from: relative, renamed, or by a name that is computed."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        match node:
            case ast.ImportFrom(module="cfssl", level=0, names=aliases):
                found |= {alias.name for alias in aliases}
            case ast.ImportFrom(module=str(module), level=0, names=aliases):
                assert "import_module" not in {alias.name for alias in aliases}, f"{file} hides an import"
                found |= rooms_in(module)
            case ast.ImportFrom():
                raise AssertionError(f"{file} imports relatively")
            case ast.Import(names=aliases):
                for alias in aliases:
                    assert alias.name.split(".")[0] != "cfssl" or not alias.asname, f"{file} renames a room"
                    found |= rooms_in(alias.name)
            case ast.Attribute(value=ast.Name(id="cfssl"), attr=room):
                found.add(room)
            case ast.Attribute(attr="import_module") | ast.Name(id="__import__"):
                raise AssertionError(f"{file} hides an import")
    return found


def rooms_in(module: str) -> set[str]:
    return {module.split(".")[1]} if module.startswith("cfssl.") else set()


def rooms() -> dict[str, list[Path]]:
    """The files of every room; the package's own __init__.py is none."""
    found: dict[str, list[Path]] = {}
    for file in PACKAGE.rglob("*.py"):
        room = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if room != "__init__":
            found.setdefault(room, []).append(file)
    return found


def test_every_room_is_on_one_floor() -> None:
    assert set(rooms()) == set().union(*FLOORS)
    assert sum(map(len, FLOORS)) == len(set().union(*FLOORS))


def test_a_room_imports_from_the_floors_under_it_alone() -> None:
    found = {(room, target) for room, files in rooms().items() for file in files for target in imports(file)}
    assert {pair for pair in found if not allowed(*pair)} == set()
    assert set(WITHIN_A_FLOOR) <= found  # no exception outlives its use
    assert imports(PACKAGE / "__init__.py") == set()


@pytest.mark.parametrize(
    ("code", "reached"),
    [
        ("def f():\n    from cfssl.bank.store import Bank", {"bank"}),
        ("import cfssl.cli", {"cli"}),
        ("from cfssl import recipe, scm", {"recipe", "scm"}),
        ("import cfssl\ncfssl.pipeline.Pipeline", {"pipeline"}),
        ("from importlib import metadata\nimport timm", set()),
    ],
)
def test_every_way_of_importing_is_seen(tmp_path: Path, code: str, reached: set[str]) -> None:
    (tmp_path / "x.py").write_text(code)
    assert imports(tmp_path / "x.py") == reached


@pytest.mark.parametrize(
    "code",
    [
        "from . import x",
        "from .. import x",
        "from .bank import store",
        "import cfssl.bank as b",
        "import cfssl as c",
        "import importlib\nimportlib.import_module('cfssl.bank')",
        "from importlib import import_module",
        "__import__('cfssl.bank')",
    ],
)
def test_imports_that_hide_where_from_fail(tmp_path: Path, code: str) -> None:
    (tmp_path / "x.py").write_text(code)
    with pytest.raises(AssertionError, match=r"x\.py"):
        imports(tmp_path / "x.py")


@pytest.mark.parametrize(
    ("room", "target"),
    [
        ("objectives", "bank"),
        ("objectives", "generators"),
        ("generators", "objectives"),
        ("objectives", "scm"),
        ("scm", "objectives"),
        ("engine", "data"),
        ("models", "data"),
        ("objectives", "silver"),
        ("generators", "silver"),
        ("pipeline", "cli"),
        ("visualise", "recipe"),
        ("errors", "files"),
    ],
)
def test_the_forbidden_arrows(room: str, target: str) -> None:
    assert not allowed(room, target)


def test_there_is_no_room_for_everything() -> None:
    assert not list(PACKAGE.rglob("utils*.py"))
    assert not list(PACKAGE.rglob("helpers*.py"))

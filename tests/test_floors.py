"""The arrows of the architecture: a room imports from its own floor or lower ones, and nothing imports the
roof."""

import ast
from pathlib import Path

import cfssl

PACKAGE = Path(cfssl.__file__).parent
BASEMENT = {"errors", "files", "seeds", "provenance", "settings"}
FLOORS = [
    {"data", "models", "engine"},
    {"scm", "objectives"},
    {"generators"},
    {"bank"},
    {"evaluate"},
    {"visualise"},
]
ROOF = {"recipe", "agreement", "pipeline", "check", "summary", "demo", "cli", "__main__", "__init__"}
FORBIDDEN_PAIRS = {
    ("objectives", "generators"),
    ("generators", "objectives"),
    ("objectives", "scm"),
    ("scm", "objectives"),
}
FORBIDDEN_PAIRS |= {("models", "data"), ("models", "engine")}


def floor(room: str) -> int:
    if room in BASEMENT:
        return -1
    return next((number for number, rooms in enumerate(FLOORS) if room in rooms), len(FLOORS))


def imports(file: Path) -> set[str]:
    """The rooms of cfssl that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{file} imports relatively"
            names = (
                [f"{node.module}.{alias.name}" for alias in node.names]
                if node.module == "cfssl"
                else [node.module]
            )
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("cfssl.")}
    return found


def rooms() -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    for file in PACKAGE.rglob("*.py"):
        part = file.relative_to(PACKAGE).parts[0]
        found.setdefault(part.removesuffix(".py"), []).append(file)
    return found


def test_every_room_is_on_a_floor() -> None:
    assert set(rooms()) <= BASEMENT.union(*FLOORS) | ROOF


def test_no_room_imports_from_a_higher_floor() -> None:
    wrong = [
        f"{file.relative_to(PACKAGE)} imports {target}"
        for room, files in rooms().items()
        for file in files
        for target in imports(file)
        if floor(target) > floor(room) or (room, target) in FORBIDDEN_PAIRS
    ]
    assert wrong == []


def test_the_check_finds_a_forbidden_import(tmp_path: Path) -> None:
    file = tmp_path / "x.py"
    file.write_text(
        "def f():\n    from cfssl.bank.store import Bank\n    import cfssl.cli\n    from cfssl import "
        "recipe\n"
    )
    assert imports(file) == {"bank", "cli", "recipe"}
    assert floor("bank") > floor("objectives")
    assert floor("cli") > floor("visualise")


def test_there_is_no_room_for_everything() -> None:
    assert not list(PACKAGE.rglob("utils*.py"))
    assert not list(PACKAGE.rglob("helpers*.py"))

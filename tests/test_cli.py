"""The command line: bad input is one sentence on standard error and exit code 2, and nothing is written."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from cfssl.cli import main

TINY = """
name: tiny
data: {name: phantom_chest, count: 240}
generator: {name: oracle, parents: [scanner]}
bank: {do: {scanner: all}}
views: {counterfactual: {variable: scanner}}
objective: {name: simclr, hidden: 16, output: 8}
backbone: {name: test_resnet}
train: {epochs: 1, batch: 48}
evaluate: [{name: linear_probe, target: disease, by: [scanner], resamples: 50}]
hardware: {accelerator: cpu}
"""


def cfssl(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    return subprocess.run(
        [sys.executable, "-m", "cfssl", *words],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    (tmp_path / "tiny.yaml").write_text(TINY)
    return tmp_path / "tiny.yaml"


def test_help_names_every_verb_and_imports_nothing_heavy(tmp_path: Path) -> None:
    done = cfssl(tmp_path, "--help")
    assert done.returncode == 0
    verbs = "demo run check schema fit bank pretrain evaluate export report"
    assert all(verb in done.stdout for verb in verbs.split())
    heavy = "('torch', 'numpy', 'pandas', 'pydantic')"
    listing = f"import sys, cfssl.cli; print([name for name in {heavy} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", listing], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


@pytest.mark.slow
def test_the_verbs_share_stages_and_end_in_a_report(recipe: Path) -> None:
    folder = recipe.parent
    checked = cfssl(folder, "check", "tiny.yaml")
    assert checked.returncode == 0, checked.stderr
    for text in (
        "240 images of 1 x 64 x 64",
        "scanner = D",
        "categorical",
        "would run",
        "patient, 240 of them",
    ):
        assert text in checked.stdout
    ran = cfssl(folder, "run", "tiny.yaml")
    assert ran.returncode == 0, ran.stderr
    assert "pretrain" not in ran.stdout
    assert "tiny: simclr: 3/3" in ran.stderr  # plain lines when not on a terminal
    assert "data wait" in ran.stderr
    assert "s left" in ran.stderr
    page = (folder / "runs" / "tiny" / "report.html").read_text()
    assert page.count("data:image/png;base64,") >= 3
    assert "would run" not in cfssl(folder, "check", "tiny.yaml").stdout
    evaluated = cfssl(folder, "evaluate", "tiny.yaml")
    assert "linear_probe of disease" in evaluated.stdout
    assert evaluated.stderr == ""
    shown = cfssl(folder, "bank", "show", "tiny.yaml", "--items", "3", "--output", "sheet.png")
    assert shown.returncode == 0, shown.stderr
    assert (folder / "sheet.png").stat().st_size > 10_000
    bank = cfssl(folder, "bank", "build", "tiny.yaml").stdout.strip()
    assert "all checksums agree" in cfssl(folder, "bank", "verify", bank).stdout
    shard = folder / bank / "shard-00000.npy"
    content = bytearray(shard.read_bytes())
    content[-100] ^= 1
    shard.write_bytes(bytes(content))
    verified = cfssl(folder, "bank", "verify", bank)
    assert verified.returncode == 2
    assert "shard-00000.npy" in verified.stderr
    exported = cfssl(folder, "export", "tiny.yaml", "encoder")
    assert exported.returncode == 0, exported.stderr
    assert {"model.safetensors", "config.json"} <= {file.name for file in (folder / "encoder").iterdir()}


def call(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path, *words: str
) -> tuple[int, str]:
    """The entry point in this process: exit code and what it printed, standard error last."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["cfssl", *words])
    with pytest.raises(SystemExit) as caught:
        main()
    printed = capsys.readouterr()
    return int(caught.value.code or 0), printed.out + printed.err


def test_schema_is_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, printed = call(monkeypatch, capsys, tmp_path, "schema")
    assert code == 0
    assert "generator" in json.loads(printed)["properties"]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["train.epochs=none", "trian.lr=1"], "has 2 mistake(s)"),
        (["evaluate.0=x"], "mistake"),
        (["train.batch=100000"], "train.batch = 100000: the training split has only 144 images"),
        (["data.splits={train: 1.0}"], "is empty"),
        (["data.domains={A: 0.5}"], "shares"),
        (["bank.do={scanner: [Z]}"], "bank.do.scanner = 'Z': not among its values A, B, C, D"),
    ],
)
def test_a_bad_recipe_is_one_message_and_leaves_nothing(
    recipe: Path,
    overrides: list[str],
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, printed = call(monkeypatch, capsys, recipe.parent, "run", "tiny.yaml", *overrides)
    assert code == 2
    assert expected in printed
    assert not (recipe.parent / "runs" / "tiny").exists()
    made = {file.parent.name.split("-")[0] for file in recipe.parent.glob("runs/stages/*/done.json")}
    assert made <= {"table"}  # the only stage that can be needed to see the mistake


def table_recipe(folder: Path, **data: object) -> None:
    content = yaml.safe_load(TINY)
    content |= {"generator": None, "bank": {"do": {}}, "views": {}, "evaluate": []}
    content["data"] = {"name": "table", "root": str(folder), **data}
    (folder / "table.yaml").write_text(yaml.safe_dump(content))


def write_images(folder: Path, shapes: list[tuple[int, ...]]) -> None:
    import cv2

    names = []
    for number, shape in enumerate(shapes):
        image = np.random.default_rng(number).integers(0, 256, shape, dtype=np.uint8)
        cv2.imwrite(str(folder / f"{number}.png"), image)
        names.append(f"{number}.png")
    (folder / "t.csv").write_text("image\n" + "\n".join(names) + "\n")


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ("missing table", "does not exist"),
        ("unreadable image", "cannot be read"),
        ("another size", "differ in size"),
        ("another channel count", "differ in channels"),
        ("missing image", "do not exist"),
        ("empty split", "is empty"),
        ("unknown category", "not one of"),
        ("unknown key of a nested section", "unknown key; did you mean 'fractions'?"),
    ],
)
def test_bad_data_is_one_sentence_and_leaves_no_table(
    tmp_path: Path,
    case: str,
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shapes: list[tuple[int, ...]] = [(32, 32)] * 12
    data: dict[str, object] = {"path": "t.csv"}
    if case == "another size":
        shapes[5] = (32, 40)
    if case == "another channel count":
        shapes[5] = (32, 32, 3)
    write_images(tmp_path, shapes)
    if case == "missing table":
        data["path"] = "nowhere.csv"
    if case == "unreadable image":
        (tmp_path / "3.png").write_bytes(b"not a picture")
    if case == "missing image":
        (tmp_path / "3.png").unlink()
    if case == "empty split":
        data["split"] = {"fractions": [0.98, 0.01, 0.01]}
    if case == "unknown category":
        rows = "".join(f"{number}.png,{'b' if number else 'a'}\n" for number in range(12))
        (tmp_path / "t.csv").write_text("image,dx\n" + rows)
        data["attributes"] = {"dx": {"kind": "categorical", "categories": ["a", "c"]}}
    if case == "unknown key of a nested section":
        data["split"] = {"fraction": [0.6, 0.2, 0.2]}
    table_recipe(tmp_path, **data)
    code, printed = call(monkeypatch, capsys, tmp_path, "run", "table.yaml")
    assert code == 2
    assert expected in printed
    assert not list(tmp_path.glob("runs/stages/*/table"))
    assert not list(tmp_path.glob("runs/stages/*/.table*"))

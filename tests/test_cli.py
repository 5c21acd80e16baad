"""The command line: bad input is one sentence on standard error and exit code 2, and nothing is written."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from cfssl.cli import main
from cfssl.engine.checkpoint import load_checkpoint
from cfssl.files import write_text

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
    verbs = "demo run check schema fit silver bank pretrain evaluate chromap export report"
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
        (
            ["generator.parents=[scanner, sex]", "bank.do=[{scanner: all}, {scanner: [Z], sex: all}]"],
            "bank.do.scanner = 'Z': not among its",
        ),
        (["views.photometric.saturation=0.2"], "photometric.saturation changes colours, which needs 3"),
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
        ("unknown key of a nested section", "'fractions'"),
        (
            "nan attribute",
            "hold texts that usually mean a missing value: 'dx' ('nan'); name them in `missing`",
        ),
        ("infinite attribute", "hold numbers that are not finite: 'dx' ('inf')"),
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
    if case in ("nan attribute", "infinite attribute"):
        values = ["nan", "a", "b"] if case == "nan attribute" else ["inf", "1.5", "2.5"]
        rows = "".join(f"{number}.png,{values[number % 3]}\n" for number in range(12))
        (tmp_path / "t.csv").write_text("image,dx\n" + rows)
    if case == "unknown key of a nested section":
        data["split"] = {"fraction": [0.6, 0.2, 0.2]}
    table_recipe(tmp_path, **data)
    code, printed = call(monkeypatch, capsys, tmp_path, "run", "table.yaml")
    assert code == 2
    assert expected in printed
    assert not list(tmp_path.glob("runs/stages/*"))


MISTAKEN = """
name: mistaken
data: {name: phantom_chest, cuont: 240}
objective: {name: simclrr}
backbone: {nme: test_resnet}
train: {epochs: none, batch: 48}
evaluate: [{name: linear_probe, target: disease, resamples: -1}]
"""


def test_a_recipe_with_five_mistakes_names_all_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mistaken.yaml").write_text(MISTAKEN)
    code, printed = call(monkeypatch, capsys, tmp_path, "run", "mistaken.yaml")
    assert code == 2
    assert "has 5 mistake(s)" in printed
    for path in ("data.cuont", "objective.name", "backbone.nme", "train.epochs", "evaluate[0].resamples"):
        assert f"- {path} = " in printed
    assert [file.name for file in tmp_path.iterdir()] == ["mistaken.yaml"]


def test_check_shows_the_table_as_it_was_understood(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    write_images(tmp_path, [(32, 32)] * 12)
    markup = ["[/x]", "[bold]", ":smile:"]
    rows = "".join(f"{number}.png,{markup[number % 3]},id {number}\n" for number in range(12))
    (tmp_path / "t.csv").write_text("image,dx,note\n" + rows)
    table_recipe(tmp_path, path="t.csv")
    code, printed = call(monkeypatch, capsys, tmp_path, "check", "table.yaml", "train.batch=4")
    assert code == 0, printed
    assert ":smile:, [/x], [bold]" in printed
    assert "no attribute: note (text that differs in most rows)" in printed
    assert "no group: rows are split singly" in printed
    assert "table: 12/12" in printed  # progress
    assert "made now" in printed
    assert "reused" not in printed
    code, again = call(monkeypatch, capsys, tmp_path, "check", "table.yaml", "train.batch=4")
    assert "made now" not in again
    assert "reused" in again
    os.utime(tmp_path / "7.png", ns=(5, 5))
    code, changed = call(monkeypatch, capsys, tmp_path, "check", "table.yaml", "train.batch=4")
    assert code == 2
    assert "7.png" in changed


def test_check_compares_every_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("cfssl.data.datasets.COMPARED", 2)
    write_images(tmp_path, [(32, 32)] * 12)
    table_recipe(tmp_path, path="t.csv")
    assert call(monkeypatch, capsys, tmp_path, "check", "table.yaml", "train.batch=4")[0] == 0
    os.utime(tmp_path / "7.png", ns=(5, 5))
    code, printed = call(monkeypatch, capsys, tmp_path, "check", "table.yaml", "train.batch=4")
    assert code == 2
    assert "1 of 13 compared files" in printed


@pytest.mark.parametrize("obstacle", ["file", "permission", "space"])
def test_a_place_that_cannot_be_written_is_one_sentence(
    recipe: Path, obstacle: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = recipe.parent / "place"
    if obstacle == "file":
        runs.write_text("in the way")
    else:
        code = errno.EACCES if obstacle == "permission" else errno.ENOSPC

        def refuse(path: str, mode: int = 0o777) -> None:
            raise OSError(code, os.strerror(code), str(path))

        monkeypatch.setattr(os, "mkdir", refuse)
    code, printed = call(
        monkeypatch, capsys, recipe.parent, "check", "tiny.yaml", "--runs", str(runs), "--quiet"
    )
    assert code == 2
    (line,) = printed.splitlines()
    assert line.startswith(f"cfssl: {runs}")
    assert "--runs" in line


def test_a_folder_in_the_way_of_an_output_is_named(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = recipe.parent / "sheet.png"
    output.mkdir()
    monkeypatch.setattr("cfssl.check.describe", lambda job: write_text(output, "x"))
    code, printed = call(monkeypatch, capsys, recipe.parent, "check", "tiny.yaml")
    assert code == 2
    assert printed.startswith(f"cfssl: {output} cannot be used (Is a directory)")


def test_a_missing_file_of_our_own_keeps_its_traceback(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def mistaken(job: object) -> None:
        (recipe.parent / "nowhere" / "x").write_text("")

    monkeypatch.setattr("cfssl.check.describe", mistaken)
    monkeypatch.setattr(sys, "argv", ["cfssl", "check", str(recipe)])
    with pytest.raises(FileNotFoundError):
        main()


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGUSR2", 140)])
def test_an_interruption_is_one_sentence_and_a_code_that_names_the_signal(
    name: str, code: int, recipe: Path
) -> None:
    program = (
        "import os, signal, sys, time, cfssl.check, cfssl.cli; "
        f"wait = lambda job: (os.kill(os.getpid(), signal.{name}), time.sleep(60)); "
        f"cfssl.check.describe = wait; sys.argv = ['cfssl', 'check', {str(recipe)!r}]; cfssl.cli.main()"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == code
    assert done.stderr == f"cfssl: interrupted ({name}); the same command goes on where it stopped.\n"


@pytest.mark.slow
@pytest.mark.parametrize("starter", [[], ["-m", "torch.distributed.run", "--nproc-per-node=2"]])
def test_processes_that_cfssl_or_torchrun_starts_train_the_encoder_of_one(
    recipe: Path, tmp_path: Path, starter: list[str]
) -> None:
    assert cfssl(tmp_path, "pretrain", str(recipe), "--quiet").returncode == 0
    product = next(tmp_path.glob("runs/stages/encoder-*/objective.safetensors"))
    (alone := tmp_path / "alone.safetensors").write_bytes(product.read_bytes())
    shutil.rmtree(product.parent)
    done = subprocess.run(
        [sys.executable, *starter, "-m", "cfssl", "pretrain", str(recipe), "--quiet", "hardware.devices=2"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(product.parent.relative_to(tmp_path))
    assert {path.name for path in product.parent.iterdir()} == {
        "done.json",
        "metrics.jsonl",
        "objective.safetensors",
        "views.png",
    }
    found, expected = load_checkpoint(product), load_checkpoint(alone)
    for name, value in expected.items():  # Adam makes steps of rounding where there is no gradient
        if value.is_floating_point():
            torch.testing.assert_close(found[name], value, rtol=1e-2, atol=5e-3)

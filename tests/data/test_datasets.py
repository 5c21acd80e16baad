"""The data sets of a recipe: content keys, and tables that stand only for files as they are."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cfssl.data import datasets
from cfssl.data.columns import AttributeSpec
from cfssl.data.datasets import (
    MorphoMNISTSettings,
    PhantomChestSettings,
    PhantomTubeSettings,
    TableSettings,
    check_files,
    data_source,
    open_dataset,
    prepare_dataset,
)
from cfssl.data.phantoms.chest import silver_masks
from cfssl.data.splits import SplitSettings
from cfssl.errors import UserError
from cfssl.provenance import fingerprint

COUNT = 12


@pytest.fixture
def mine(tmp_path: Path) -> TableSettings:
    """A table of twelve images."""
    folder = tmp_path / "source"
    folder.mkdir()
    for number in range(COUNT):
        pixels = np.random.default_rng(number).integers(0, 256, (6, 8), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    lines = [f"{number}.png,{'ab'[number % 2]}" for number in range(COUNT)]
    (folder / "t.csv").write_text("\n".join(["image,site", *lines]))
    return TableSettings("t.csv", root=str(folder))


SPLIT = {"split": SplitSettings(seed=1)}
SETTINGS: list[tuple[Any, dict[str, Any]]] = [
    (
        PhantomChestSettings(),
        {
            "size": 128,
            "count": 9,
            "rho": 0.5,
            "balanced_test": False,
            "women": 0.3,
            "sex_effect": 0.5,
            "seed": 1,
        }
        | {"domains": {"A": 1.0}, "splits": {"train": 1.0}},
    ),
    (
        TableSettings("t.csv"),
        {"images": "site", "masks": "m", "size": 5, "channels": 3, "group": "site", "missing": ("a",)}
        | {"areas": {"m": "thirds"}}
        | {"where": {"site": ("a",)}, "attributes": {"site": AttributeSpec("categorical")}}
        | SPLIT,
    ),
    (
        PhantomTubeSettings(),
        {"size": 32, "count": 9, "seed": 1, "domains": {"soft": 1.0}, "splits": {"train": 1.0}},
    ),
    (MorphoMNISTSettings("."), {"size": 40, "part": "train"} | SPLIT),
]


@pytest.mark.parametrize(("settings", "changes"), SETTINGS)
def test_the_key_follows_every_setting(
    mine: TableSettings, settings: Any, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(mine.root)
    for part in ("t10k", "train"):
        for name in ("images-idx3-ubyte.gz", "labels-idx1-ubyte.gz", "morpho.csv"):
            Path(f"{part}-{name}").touch()
    keys = [fingerprint(data_source(replace(settings, **{name: value}))) for name, value in changes.items()]
    assert len({fingerprint(data_source(settings)), *keys}) == 1 + len(changes)


def test_the_key_is_the_same_under_all_names_of_the_folder(
    mine: TableSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    roots = [mine.root, "source", "./source", "source/../source/"]
    settings = [*(replace(mine, root=root) for root in roots), TableSettings("source/t.csv")]
    assert len({fingerprint(data_source(own)) for own in settings}) == 1
    for name in ("images-idx3-ubyte.gz", "labels-idx1-ubyte.gz", "morpho.csv"):
        (tmp_path / "source" / f"t10k-{name}").touch()
    assert len({fingerprint(data_source(MorphoMNISTSettings(root))) for root in roots}) == 1


def test_a_prepared_table_does_not_stand_for_changed_images(mine: TableSettings, tmp_path: Path) -> None:
    folder = tmp_path / "stage" / "table"
    prepare_dataset(mine, folder, quiet=True)
    assert len(open_dataset(mine, folder)) == COUNT
    before = data_source(mine)
    os.utime(Path(mine.root) / "5.png", ns=(5, 5))
    with pytest.raises(UserError, match=r"1 of 13 compared files .* the first being .*5\.png; put them back"):
        open_dataset(mine, folder)
    os.utime(Path(mine.root) / "t.csv")  # what the message asks for
    assert data_source(mine) != before


def test_of_many_files_some_are_compared_and_this_is_said(
    mine: TableSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "stage" / "table"
    prepare_dataset(mine, folder, quiet=True)
    open_dataset(mine, folder)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(datasets, "COMPARED", 3)
    table = open_dataset(mine, folder)
    assert "table: 3 of its 13 files were compared" in capsys.readouterr().err
    assert check_files(mine, table) == (13, 13)
    os.utime(Path(mine.root) / "1.png", ns=(5, 5))
    open_dataset(mine, folder)  # not among the three, and said so
    with pytest.raises(UserError, match="1 of 13 compared files"):
        check_files(mine, table)


@pytest.mark.parametrize("mistake", ["pixels", "settings", "splits"])
def test_a_refused_table_leaves_no_folder(mine: TableSettings, tmp_path: Path, mistake: str) -> None:
    if mistake == "pixels":
        (Path(mine.root) / "5.png").write_bytes(b"no picture")
    elif mistake == "settings":
        mine = replace(mine, group="patient")
    else:
        mine = replace(mine, split=SplitSettings(fractions=(0.98, 0.01, 0.01)))
    stage = tmp_path / "stages" / "table-key"
    stage.mkdir(parents=True)
    with pytest.raises(UserError):
        prepare_dataset(mine, stage / "table", quiet=True)
    assert not stage.exists()
    stage.mkdir()
    (stage / "other.txt").write_text("precious")
    with pytest.raises(UserError):
        prepare_dataset(mine, stage / "table", quiet=True)
    assert [path.name for path in stage.iterdir()] == ["other.txt"]


def test_silver_masks_stand_behind_the_gold_ones_and_change_nothing_else(tmp_path: Path) -> None:
    settings = PhantomChestSettings(count=60)
    plain, silver = (
        prepare_dataset(of, tmp_path / name / "table", quiet=True)
        for name, of in (("plain", settings), ("silver", replace(settings, silver=True)))
    )
    rows = np.arange(60)
    assert silver.mask_names == (*plain.mask_names, "silver_left_lung", "silver_right_lung")
    assert plain.masks is not None
    assert silver.masks is not None
    gold = plain.masks.read(rows)
    np.testing.assert_array_equal(silver.masks.read(rows), np.hstack([gold, silver_masks(gold)]))
    np.testing.assert_array_equal(silver.images.read(rows), plain.images.read(rows))

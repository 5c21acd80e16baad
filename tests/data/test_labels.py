"""Masks by name: those of a table and silver ones side by side, each with its own confidence."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from label_toys import COUNT, OWN, SIDE, random_masks, save, save_silver

from cfssl.data.labels import ChosenMasks, LabelledTable, refuse_taken_names
from cfssl.data.table import ImageTable
from cfssl.errors import UserError


@pytest.fixture
def table(tmp_path: Path) -> ImageTable:
    return save(tmp_path / "table")


def test_silver_masks_follow_on_the_table_s_own_under_names_of_their_own(
    table: ImageTable, tmp_path: Path
) -> None:
    silver, confidence = save_silver(tmp_path / "silver", table.fingerprint)
    both = LabelledTable(table.folder, silver=tmp_path / "silver")
    assert both.mask_names == ("lung", "heart", "silver_heart", "silver_lung", "silver_rib")
    own, rows = random_masks(1, 2), np.array([7, 0, 7, 3])
    assert both.masks is not None
    np.testing.assert_array_equal(both.masks.read(rows), np.concatenate([own, silver], axis=1)[rows])
    asked = ["silver_rib", "lung", "silver_heart", "silver_rib"]
    chosen = both.masks_of(asked)
    wanted = np.stack([silver[:, 2], own[:, 0], silver[:, 0], silver[:, 2]], axis=1)[rows]
    np.testing.assert_array_equal(chosen.read(rows), wanted)
    assert (len(chosen), chosen.shape, chosen.dtype) == (COUNT, (4, SIDE, SIDE), np.uint8)
    sure = both.confidence(asked, rows)
    assert sure.dtype == np.float32
    np.testing.assert_array_equal(sure[:, [0, 2, 3]], confidence[["rib", "heart", "rib"]].to_numpy()[rows])
    assert (sure[:, 1] == 1).all()
    assert both.confidence([], rows).shape == (4, 0)
    assert both.fingerprint == table.fingerprint
    np.testing.assert_array_equal(both.images.read(rows), table.images.read(rows))


def test_it_travels_to_another_process(table: ImageTable, tmp_path: Path) -> None:
    save_silver(tmp_path / "silver", table.fingerprint)
    both, rows = LabelledTable(table.folder, silver=tmp_path / "silver"), np.arange(COUNT)
    there = pickle.loads(pickle.dumps(both))  # noqa: S301
    assert there.mask_names == both.mask_names
    np.testing.assert_array_equal(
        there.confidence(["silver_rib"], rows), both.confidence(["silver_rib"], rows)
    )
    chosen = pickle.loads(pickle.dumps(both.masks_of(["silver_rib", "lung"])))  # noqa: S301
    assert isinstance(chosen, ChosenMasks)
    np.testing.assert_array_equal(chosen.read(rows), both.masks_of(["silver_rib", "lung"]).read(rows))


def test_without_silver_masks_it_is_the_table(table: ImageTable, tmp_path: Path) -> None:
    plain, rows = LabelledTable(table.folder), np.arange(COUNT)
    assert plain.mask_names == table.mask_names
    assert plain.masks is not None
    np.testing.assert_array_equal(plain.masks.read(rows), random_masks(1, 2))
    maskless = LabelledTable(save(tmp_path / "maskless", ()).folder)
    assert (maskless.mask_names, maskless.masks) == ((), None)


def test_silver_masks_that_a_table_holds_itself_keep_their_confidence(tmp_path: Path) -> None:
    sure = np.linspace(0, 1, COUNT)
    columns = {"confidence_lung": sure, "confidence_heart": 1 - sure}
    table = LabelledTable(save(tmp_path / "table", ("silver_lung", "heart"), **columns).folder)
    found = table.confidence(["heart", "silver_lung"], np.arange(COUNT))
    np.testing.assert_allclose(found, np.stack([np.ones(COUNT), sure], axis=1), atol=1e-7)


def test_a_name_that_is_no_mask_is_refused(table: ImageTable) -> None:
    labelled = LabelledTable(table.folder)
    with pytest.raises(UserError, match="no mask 'hart'; the nearest is 'heart'"):
        labelled.masks_of(["lung", "hart"])
    with pytest.raises(UserError, match="no mask 'silver_lung'"):
        labelled.confidence(["silver_lung"], np.arange(3))
    with pytest.raises(UserError, match="name at least one"):
        labelled.masks_of([])


def test_silver_masks_of_another_table_are_refused(table: ImageTable, tmp_path: Path) -> None:
    save_silver(tmp_path / "silver", "another")
    with pytest.raises(UserError, match="were made for the table another, and toy is"):
        LabelledTable(table.folder, silver=tmp_path / "silver")


@pytest.mark.parametrize(
    ("names", "columns", "taken"),
    [
        (("silver_rib", "lung"), {}, "'silver_rib'"),
        (OWN, {"confidence_rib": np.arange(COUNT) / 3}, "'confidence_rib'"),
        (OWN, {"silver_lung": np.arange(COUNT) / 3}, "'silver_lung'"),
    ],
)
def test_a_name_that_the_table_has_given_is_refused(
    tmp_path: Path, names: tuple[str, ...], columns: dict[str, np.ndarray], taken: str
) -> None:
    table = save(tmp_path / "table", names, **columns)
    save_silver(tmp_path / "silver", table.fingerprint)
    with pytest.raises(
        UserError, match=f"Table 'toy' already has {taken}, which silver masks would be called"
    ):
        LabelledTable(table.folder, silver=tmp_path / "silver")
    refuse_taken_names(table, ("aorta",))


@pytest.mark.parametrize("file", ["masks.npy", "confidence.parquet", "silver.json"])
def test_files_that_do_not_belong_together_are_refused(table: ImageTable, tmp_path: Path, file: str) -> None:
    folder = tmp_path / "silver"
    masks, confidence = save_silver(folder, table.fingerprint)
    if file == "masks.npy":
        np.save(folder / file, masks[:-1])
    elif file == "confidence.parquet":
        confidence[:-1].to_parquet(folder / file)
    else:
        record = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps({**record, "format": 2}))
    with pytest.raises(UserError, match=r"delete the folder and make (them|the silver masks) again"):
        LabelledTable(table.folder, silver=folder).confidence(["silver_rib"], np.arange(COUNT))

"""A table written as one .npz comes back as the same table, silver masks and their confidence included."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from label_toys import COUNT, STRUCTURES, save, save_silver

from cfssl.data import archive
from cfssl.data.archive import refuse_taken_place, write_archive
from cfssl.data.labels import LabelledTable
from cfssl.data.prepare import prepare, save_prepared
from cfssl.data.sources import TableSource
from cfssl.data.table import Attribute
from cfssl.errors import UserError

ROWS = np.arange(COUNT)


@pytest.mark.parametrize("channels", [1, 3])
def test_what_is_written_is_read_again_as_the_same_table(
    tmp_path: Path, channels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Images and masks to the pixel, in chunks of any size; numbers, texts and missing values; the splits."""
    monkeypatch.setattr(archive, "CHUNK_BYTES", 200)
    view = np.array(["PA", "AP", None, "PA", "AP"] * 2, dtype=object)
    age = np.where(ROWS == 4, np.nan, ROWS / 7)
    frame = pd.DataFrame({"view": view, "age": age, "grade": ["1", "2"] * 5, "file": [f"f{n}" for n in ROWS]})
    frame["split"] = ["train", "train", "train", "val", "test"] * 2
    attributes = {
        "view": Attribute("view", "binary", ("AP", "PA")),
        "age": Attribute("age", "continuous"),
        "grade": Attribute("grade", "binary", ("1", "2")),
    }
    images = np.random.default_rng(0).integers(0, 2**16, (COUNT, channels, 8, 8), dtype=np.uint16)
    masks = (images[:, :2] if channels == 3 else np.repeat(images, 2, 1)) % 2
    table = save_prepared(
        tmp_path / "table", "toy", frame, attributes, images, masks.astype(np.uint8), ("lung", "heart")
    )
    silver, confidence = save_silver(tmp_path / "silver", table.fingerprint)
    before = LabelledTable(table.folder, silver=tmp_path / "silver")
    write_archive(tmp_path / "out.npz", before)
    names = {name: name for name in before.mask_names}
    after = LabelledTable(prepare(TableSource(tmp_path / "out.npz", masks=names), tmp_path / "after").folder)
    assert after.mask_names == before.mask_names
    assert before.masks is not None
    assert after.masks is not None
    np.testing.assert_array_equal(after.images.read(ROWS), images)
    np.testing.assert_array_equal(after.masks.read(ROWS), before.masks.read(ROWS))
    asked = [f"silver_{name}" for name in STRUCTURES]
    np.testing.assert_array_equal(after.masks_of(asked).read(ROWS), silver)
    np.testing.assert_array_equal(after.confidence(asked, ROWS), confidence)
    np.testing.assert_array_equal(after.confidence(asked, ROWS), before.confidence(asked, ROWS))
    pd.testing.assert_frame_equal(
        after.frame[frame.columns], before.frame[frame.columns], check_dtype=False, check_column_type=False
    )
    for name, attribute in attributes.items():
        assert (after.attributes[name].kind, after.attributes[name].categories) == (
            attribute.kind,
            attribute.categories,
        )


def test_columns_that_named_the_files_give_way_to_the_arrays(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = save(tmp_path / "table", images=ROWS / 3, lung=ROWS / 3, age=ROWS / 7)
    write_archive(tmp_path / "out.npz", LabelledTable(table.folder))
    assert "left out the columns 'images', 'lung', whose names arrays have now" in capsys.readouterr().err
    with np.load(tmp_path / "out.npz") as written:
        assert set(written) == {"images", "lung", "heart", "age", "split"}
        assert written["lung"].shape == written["images"].shape
    pictures = LabelledTable(save(tmp_path / "pictures", ("images",)).folder)
    with pytest.raises(UserError, match="has a mask 'images', which is what its images are called"):
        write_archive(tmp_path / "other.npz", pictures)


@pytest.mark.parametrize("name", ["out.npz", "out.png", "out.csv"])
def test_nothing_is_overwritten_or_read_along_by_mistake(tmp_path: Path, name: str) -> None:
    refuse_taken_place(tmp_path / "out.npz")
    (tmp_path / name).write_text("there")
    with pytest.raises(UserError, match=f"{name} exists and is not overwritten"):
        refuse_taken_place(tmp_path / "out.npz")


def test_an_archive_is_called_npz(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"give it a name that ends in \.npz"):
        refuse_taken_place(tmp_path / "out.npy")

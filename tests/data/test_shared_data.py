"""Every shared real data set is read by the generic table, without code of its own."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from cfssl.data.columns import AttributeSpec
from cfssl.data.prepare import prepare
from cfssl.data.sources import TableSource
from cfssl.data.splits import SplitSettings
from cfssl.data.table import SPLITS
from cfssl.errors import UserError

pytestmark = pytest.mark.real_data


@pytest.mark.parametrize(
    ("images", "masks", "side"), [("images", "masks", 64), ("images128", "masks128", 128)]
)
def test_chest_radiographs_with_masks_of_known_patients(
    shared_data: Path, tmp_path: Path, images: str, masks: str, side: int
) -> None:
    path = shared_data / "covid_cxr.npz"
    source = TableSource(
        path,
        images=images,
        masks={"lungs": masks},
        group="patientid",
        where={"has_mask": [1]},
        missing=("?", "todo", "Unknown"),
        attributes={
            "view": AttributeSpec("categorical", ("PA", "AP", "AP Supine")),
            "covid": AttributeSpec("binary", positive=("COVID-19", "COVID-19, ARDS"), column="finding"),
        },
        split=SplitSettings(stratify=("view",)),
    )
    table = prepare(source, tmp_path / "t")
    raw = np.load(path)
    keep = raw["has_mask"] == 1
    assert len(table) == keep.sum() == 418
    np.testing.assert_array_equal(table.images.read(np.arange(418))[:, 0], raw[images][keep])
    assert table.masks is not None
    np.testing.assert_array_equal(table.masks.read(np.arange(418))[:, 0], raw[masks][keep])
    assert table.images.shape == (1, side, side)
    assert table.frame.groupby("patientid")["split"].nunique().max() == 1
    assert "license" in table.frame, "the csv beside the arrays adds its columns"
    findings = pd.Series(raw["finding"][keep])
    assert (table.frame["covid"] == "yes").sum() == findings.isin(["COVID-19", "COVID-19, ARDS"]).sum()
    assert table.attributes["age"].kind == "continuous"
    for split, wanted in zip(SPLITS, (0.7, 0.15, 0.15), strict=True):
        assert abs(len(table.rows(split)) / 418 - wanted) < 0.02


def test_views_and_missing_values_of_all_radiographs(shared_data: Path, tmp_path: Path) -> None:
    source = TableSource(shared_data / "covid_cxr.npz", group="patientid", missing=("?", "todo", "Unknown"))
    table = prepare(source, tmp_path / "t")
    assert len(table) == 609
    assert len(table.rows(known=["view"])) == 575
    assert len(table.rows(known=["age"])) == 456
    assert len(table.rows(known=["sex"])) == 558
    known = table.encode(["view", "age", "sex"], table.rows(known=["view", "age", "sex"]))
    assert 10 < known["age"].min() < known["age"].max() < 100
    copies = table.frame["split"][[200, 399]].tolist() + table.frame["split"][[206, 285]].tolist()
    assert copies[0] == copies[1]
    assert copies[2] == copies[3]


def test_radiographs_without_attributes(shared_data: Path, tmp_path: Path) -> None:
    source = TableSource(
        shared_data / "openist_cxr.npz",
        masks="masks",
        size=(32, 32),
        split=SplitSettings(fractions=(0, 0, 1)),
    )
    table = prepare(source, tmp_path / "t")
    assert table.attributes == {}
    assert len(table.rows("test")) == len(table) == 275
    raw = np.load(shared_data / "openist_cxr.npz")["images"].astype(np.float64)
    areas = raw.reshape(275, 32, 2, 32, 2).mean((2, 4))
    assert np.abs(table.images.read(np.arange(275))[:, 0] - areas).max() <= 0.51


def test_skin_lesions_with_a_derived_diagnosis(shared_data: Path, tmp_path: Path) -> None:
    source = TableSource(
        shared_data / "ham10000_gray64.npz",
        missing=("unknown",),
        attributes={"malignant": AttributeSpec("binary", positive=("mel", "bcc", "akiec"), column="dx")},
        split=SplitSettings(stratify=("dataset", "malignant")),
    )
    table = prepare(source, tmp_path / "t")
    frame = table.frame
    assert len(table) == 5984
    assert (frame["malignant"] == "yes").sum() == 491 + 264 + 183
    assert table.attributes["dataset"].categories == (
        "rosendahl",
        "vidir_modern",
        "vidir_molemax",
        "vienna_dias",
    )
    assert "lesion_id" not in table.attributes
    assert "image_id" not in table.attributes
    shares = pd.crosstab(frame["dataset"], frame["split"], normalize="index")
    assert np.abs(shares["test"] - 0.15).max() < 0.01
    malignant = pd.crosstab(frame["malignant"], frame["split"], normalize="index")
    assert np.abs(malignant["test"] - 0.15).max() < 0.01


def test_published_splits_with_copies_are_refused_until_the_copies_are_dropped(
    shared_data: Path, tmp_path: Path
) -> None:
    source = TableSource(
        shared_data / "pneumoniamnist.npz", attributes={"label": AttributeSpec("binary", column="labels")}
    )
    with pytest.raises(UserError, match=r"Identical images .* in 4 rows .* in train is row \d+ in val"):
        prepare(source, tmp_path / "t")
    dropped = TableSource(source.path, attributes=source.attributes, split=SplitSettings(duplicates="drop"))
    table = prepare(dropped, tmp_path / "t")
    assert [len(table.rows(split)) for split in SPLITS] == [2424, 270, 468]
    raw = np.load(source.path)
    np.testing.assert_array_equal(table.images.read(table.rows("test"))[:, 0], raw["test_images"])
    labels = table.encode(["label"], table.rows("val"))["label"]
    np.testing.assert_array_equal(labels, raw["val_labels"][:, 0])

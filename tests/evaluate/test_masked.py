"""Rows with masks, label fractions and folds: whole patients, and no test row among them."""

from pathlib import Path

import numpy as np
import pytest
from segment_toys import STRUCTURES, TEST, TRAIN, VAL, masks_of, settings, table_of_discs

from cfssl.data.table import ImageTable
from cfssl.errors import UserError
from cfssl.evaluate.masked import labelled_rows, patients_of, shares

WITHOUT = (3, 4, 30, 40)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> ImageTable:
    return table_of_discs(tmp_path_factory.mktemp("table") / "t", without=WITHOUT)


@pytest.mark.parametrize("rule", ["masked", {"has_mask": (1,)}])
def test_rows_without_masks_are_left_out(table: ImageTable, rule: object) -> None:
    for split, rows in (("train", TRAIN), ("val", VAL), ("test", TEST)):
        found = labelled_rows(table, settings(labelled=rule), split)
        np.testing.assert_array_equal(found, np.setdiff1d(rows, WITHOUT))


def test_a_table_asked_for_all_takes_empty_masks_for_labels(table: ImageTable) -> None:
    np.testing.assert_array_equal(labelled_rows(table, settings(labelled="all"), "train"), TRAIN)


def test_silver_masks_make_no_row_a_labelled_one_unless_they_are_what_is_segmented(tmp_path: Path) -> None:
    silver = table_of_discs(tmp_path / "t", without=WITHOUT, silver=True)
    found = labelled_rows(silver, settings(), "train")
    np.testing.assert_array_equal(found, np.setdiff1d(TRAIN, WITHOUT))
    found = labelled_rows(silver, settings(structures=("silver_disc",)), "train")
    np.testing.assert_array_equal(found, TRAIN)


def test_a_rule_that_the_table_cannot_answer_is_refused(table: ImageTable) -> None:
    with pytest.raises(UserError, match=r"column 'has_masks', which .* the nearest is 'has_mask'"):
        labelled_rows(table, settings(labelled={"has_masks": (1,)}), "train")
    with pytest.raises(UserError, match="accepts 'yes' of column 'has_mask'"):
        labelled_rows(table, settings(labelled={"has_mask": ("yes",)}), "train")


def test_masks_come_in_the_order_asked_for(table: ImageTable) -> None:
    rows = np.array([5, 0])
    both = masks_of(table, rows)
    np.testing.assert_array_equal(masks_of(table, rows, STRUCTURES[::-1]), both[:, ::-1])
    assert table.masks is not None
    np.testing.assert_array_equal(both, table.masks.read(rows) > 0)


def test_fractions_are_of_patients_stratified_and_nested(table: ImageTable) -> None:
    own = settings(by=["scanner", "sex"], labelled="all")
    before: set[int] = set()
    for fraction, patients in ((2 / 14, 2), (6 / 14, 6), (1.0, 14)):
        rows = shares(own, table, fraction, 3, 0)
        np.testing.assert_array_equal(rows.val, VAL)
        names, counts = np.unique(patients_of(table, rows.train), return_counts=True)
        assert (len(names), set(counts)) == (patients, {2}), "both images of a patient"
        scanners = table.frame["scanner"].iloc[rows.train].value_counts()
        assert scanners["A"] == scanners["B"] == patients
        assert before <= set(rows.train)
        before = set(rows.train)
    other = shares(own, table, 6 / 14, 4, 0).train
    assert set(other) != set(shares(own, table, 6 / 14, 3, 0).train)


def test_folds_share_no_patient_and_hold_each_row_once_and_no_test_row(table: ImageTable) -> None:
    own = settings(folds=3, by=["scanner"])
    rest = np.setdiff1d(np.r_[TRAIN, VAL], WITHOUT)
    held = []
    for fold in range(3):
        rows = shares(own, table, 1.0, 0, fold)
        assert not set(patients_of(table, rows.train)) & set(patients_of(table, rows.val))
        np.testing.assert_array_equal(np.sort(np.r_[rows.train, rows.val]), rest)
        scanners = table.frame["scanner"].iloc[rows.val].value_counts()
        assert abs(scanners["A"] - scanners["B"]) <= 3
        held.append(rows.val)
    np.testing.assert_array_equal(np.sort(np.concatenate(held)), rest)
    again = shares(own, table, 1.0, 7, 2).val
    np.testing.assert_array_equal(again, held[2], "seeds redraw label subsets, not folds")


def test_a_segmentation_without_rows_or_with_more_folds_than_patients_is_refused(
    table: ImageTable, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="divides 18 patients of discs into 19 folds"):
        shares(settings(folds=19, labelled="all"), table, 1.0, 0, 0)
    bare = table_of_discs(tmp_path / "bare", without=tuple(VAL.tolist()))
    with pytest.raises(UserError, match="no validation row of discs with masks"):
        shares(settings(), bare, 1.0, 0, 0)

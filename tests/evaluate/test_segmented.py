"""Figures of segmentations are means over images, structure by structure and group by group."""

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from segment_toys import TEST, masks_of, settings, table_of_discs

from cfssl.data.table import ImageTable
from cfssl.errors import UserError
from cfssl.evaluate.bootstrap import mean_figure
from cfssl.evaluate.contours import MEASURES, measured
from cfssl.evaluate.grouped import Arms, labels_of, mean_of, members_of, name_of
from cfssl.evaluate.segmented import evaluate_segments
from cfssl.seeds import numpy_generator


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> ImageTable:
    return table_of_discs(tmp_path_factory.mktemp("table") / "t", without=(int(TEST[3]),))


def moved(table: ImageTable, rows: np.ndarray, pixels: int) -> np.ndarray:
    """The true masks, some pixels to the right; every second image lacks the second structure."""
    masks = np.roll(masks_of(table, rows), pixels, axis=-1)
    masks[::2, 1] = False
    return masks


def asked(table: ImageTable, **changes: Any) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
    own = settings(by=["scanner", ["scanner", "sex"]], resamples=30, tolerance=1.5, **changes)

    def find(
        fraction: float, seed: int, fold: int, rows: np.ndarray
    ) -> tuple[Iterator[tuple[slice, np.ndarray]], dict[str, Any]]:
        found = moved(table, rows, 1 + seed + 2 * fold)
        parts = [slice(0, 5), slice(5, len(rows))]
        return ((part, found[part]) for part in parts), {"epoch": fold}

    return evaluate_segments(own, table, find, table)


def test_a_result_holds_the_mean_over_images_of_every_measure_and_structure(table: ImageTable) -> None:
    results, arrays = asked(table)
    rows = np.setdiff1d(TEST, TEST[3])
    np.testing.assert_array_equal(arrays["row"], rows)
    figures = measured(moved(table, rows, 1), masks_of(table, rows), 1.5)
    assert [result["target"] for result in results] == ["mean of disc, lower", "disc", "lower"]
    frame = table.frame.iloc[rows]
    for result, columns in zip(results, ([0, 1], [0], [1]), strict=True):
        assert json.loads(json.dumps(result, allow_nan=False)) == result
        for name in MEASURES:
            of_images = figures[name][:, columns].mean(1)
            expected = mean_figure(of_images, frame["patient"].to_numpy(), 30)
            shown = result["overall"][name]
            assert [shown[end] for end in ("value", "low", "high")] == pytest.approx(
                [expected[end] for end in ("value", "low", "high")]
            )
            for grouping, table_of in result["groups"].items():
                columns_of = grouping.split(" x ")
                joined = frame[columns_of].agg(" x ".join, axis=1).to_numpy()
                assert set(table_of["table"]) == set(joined)
                for group, row in table_of["table"].items():
                    assert row[name]["value"] == pytest.approx(of_images[joined == group].mean())
                    assert row["n"] == (joined == group).sum()
        assert list(result["groups"]) == ["scanner", "scanner x sex"]
        assert result["protocol"]["test_rows_without_masks"] == 1
        np.testing.assert_allclose(arrays["dice-1-0"], figures["dice"])


def test_the_worst_group_of_a_distance_is_that_with_the_largest(table: ImageTable) -> None:
    of = asked(table)[0][0]["groups"]["scanner x sex"]
    for name, worst in (("dice", min), ("hd95", max), ("asd", max), ("surface_dice", min)):
        values = {group: row[name]["value"] for group, row in of["table"].items()}
        assert of["worst"][name]["value"] == worst(values.values())
        assert of["gap"][name]["value"] == pytest.approx(max(values.values()) - min(values.values()))


def test_empty_masks_are_counted(table: ImageTable) -> None:
    results, _ = asked(table, labelled="all")
    rows = TEST
    empty = ~moved(table, rows, 1).any((2, 3))
    lacking = rows == TEST[3]
    for result, place in ((results[1], 0), (results[2], 1)):
        shown = result["overall"]
        assert shown["positives"] == len(rows) - 1
        counts = {
            "truth": 1,
            "found": int(empty[:, place].sum()),
            "both": int((empty[:, place] & lacking).sum()),
        }
        assert shown["empty"] == counts
    assert results[2]["overall"]["empty"]["found"] > results[1]["overall"]["empty"]["found"] == 1


def test_figures_are_means_over_the_networks_of_all_folds(table: ImageTable) -> None:
    results, arrays = asked(table, folds=2, seeds=[0, 1])
    rows = arrays["row"]
    true = masks_of(table, rows)
    for seed in (0, 1):
        both = [measured(moved(table, rows, 1 + seed + 2 * fold), true, 1.5)["hd95"] for fold in (0, 1)]
        np.testing.assert_allclose(arrays[f"hd95-1-{seed}"], np.mean(both, axis=0))
    assert [line["epoch"] for line in results[0]["protocol"]["folds"]] == [0, 1]
    assert [result["seeds"]["labels"] for result in results] == [0, 0, 0, 1, 1, 1]


def test_a_segmentation_without_a_test_row_is_refused(table: ImageTable) -> None:
    with pytest.raises(UserError, match="no test row of discs with masks"):
        asked(table, labelled={"patient": ("p00", "p14")})


def test_paired_means_compare_the_same_images_and_know_better_from_worse() -> None:
    """With one patient per image the difference of means is the mean of the differences."""
    rng = numpy_generator("paired")
    a, b = rng.random(40), rng.random(40)
    labels = np.array(list("xyz"))[np.arange(40) % 3]
    arms = Arms([mean_of(a)], [mean_of(b)], 40, lambda _: "", resamples=200)
    assert arms.overall()["value"] == pytest.approx((a - b).mean())
    means = [[of[labels == group].mean() for group in "xyz"] for of in (a, b)]
    assert arms.worst_group(labels)["value"] == pytest.approx(min(means[0]) - min(means[1]))
    less = Arms([mean_of(a)], [mean_of(b)], 40, lambda _: "", less_is_better=True, resamples=20)
    assert less.worst_group(labels)["value"] == pytest.approx(max(means[0]) - max(means[1]))
    assert arms.gap(labels)["value"] == pytest.approx(np.ptp(means[0]) - np.ptp(means[1]))


def test_groups_of_several_attributes_are_their_combinations(table: ImageTable) -> None:
    frame = table.frame.iloc[:6].copy()
    frame.loc[frame.index[0], "sex"] = None
    labels = labels_of(frame, ("scanner", "sex"))
    assert name_of(("scanner", "sex")) == "scanner x sex"
    found = {name: rows.tolist() for name, rows in members_of(labels, 6, "t").items()}
    assert found == {"A x F": [1], "A x M": [4, 5], "B x F": [2, 3], "(missing)": [0]}

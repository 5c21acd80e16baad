"""Splits: nothing known crosses them, they have the wanted sizes, and given ones are checked."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, reject
from hypothesis import strategies as st
from pydantic import ValidationError

from cfssl.data.splits import SplitSettings, assign_splits
from cfssl.data.table import SPLITS, Attribute
from cfssl.errors import UserError

SITE = Attribute("site", "categorical", ("a", "b", "c"))
AGE = Attribute("age", "continuous")
SEX = Attribute("sex", "binary", ("F", "M"))


def unique(frame: pd.DataFrame) -> np.ndarray:
    return np.arange(len(frame))


def share(splits: np.ndarray, name: str) -> float:
    return float((splits == name).mean())


fractions = st.tuples(st.integers(1, 8), st.integers(1, 8), st.integers(1, 8)).map(
    lambda parts: tuple(part / sum(parts) for part in parts)
)


@given(
    st.lists(st.integers(0, 40), min_size=120, max_size=200),
    st.lists(st.integers(0, 150), min_size=200, max_size=200),
    fractions,
    st.integers(0, 5),
)
def test_neither_groups_nor_identical_images_cross_own_splits(
    patients: list[int], pixels: list[int], shares: tuple[float, float, float], seed: int
) -> None:
    frame = pd.DataFrame({"patient": [f"p{number}" for number in patients]})
    content = np.array(pixels[: len(frame)]) + 1000 * (np.arange(len(frame)) % 2)  # some images occur twice
    settings = SplitSettings(fractions=shares, seed=seed)
    try:
        splits, keep = assign_splits(frame, {}, "patient", content, settings)
    except UserError:
        reject()  # copies may tie so many patients together that a split stays empty
    assert keep.all()
    assert pd.Series(splits).groupby(frame["patient"]).nunique().max() == 1
    assert pd.Series(splits).groupby(content).nunique().max() == 1


@given(st.integers(30, 300), fractions, st.integers(0, 5))
def test_single_rows_meet_the_fractions_within_one_row(
    count: int, shares: tuple[float, ...], seed: int
) -> None:
    frame = pd.DataFrame({"x": range(count)})
    splits, _ = assign_splits(frame, {}, None, unique(frame), SplitSettings(fractions=shares, seed=seed))
    for name, wanted in zip(SPLITS, shares, strict=True):
        assert abs((splits == name).sum() - wanted * count) <= 1


@given(st.integers(0, 100), fractions)
def test_small_groups_meet_the_fractions_within_a_group(
    seed: int, shares: tuple[float, float, float]
) -> None:
    sizes = np.random.default_rng(seed).integers(1, 7, 150)
    frame = pd.DataFrame({"patient": np.repeat(np.arange(150), sizes).astype(str)})
    splits, _ = assign_splits(frame, {}, "patient", unique(frame), SplitSettings(fractions=shares))
    for name, wanted in zip(SPLITS, shares, strict=True):
        assert abs((splits == name).sum() - wanted * len(frame)) <= 7


@given(st.integers(0, 100))
def test_every_stratum_is_divided_alike(seed: int) -> None:
    rng = np.random.default_rng(seed)
    frame = pd.DataFrame(
        {
            "site": rng.choice(["a", "b", "c"], 600, p=[0.75, 0.2, 0.05]),
            "sex": rng.choice(["F", "M"], 600),
            "age": rng.normal(50, 15, 600),
        }
    )
    frame.loc[:30, "age"] = np.nan
    attributes = {"site": SITE, "sex": SEX, "age": AGE}
    settings = SplitSettings(fractions=(0.6, 0.2, 0.2), stratify=("site", "sex"))
    splits, _ = assign_splits(frame, attributes, None, unique(frame), settings)
    for column in ("site", "sex"):
        for _, rows in frame.groupby(column).groups.items():
            for name, wanted in zip(SPLITS, (0.6, 0.2, 0.2), strict=True):
                assert abs((splits[rows] == name).sum() - wanted * len(rows)) <= 3
    by_age, _ = assign_splits(
        frame, attributes, None, unique(frame), SplitSettings(fractions=(0.6, 0.2, 0.2), stratify=("age",))
    )
    upper = (frame["age"] > frame["age"].quantile(0.75)).to_numpy()
    assert abs(share(by_age[upper], "test") - 0.2) < 0.02
    missing = frame["age"].isna().to_numpy()
    assert abs(share(by_age[missing], "train") - 0.6) < 0.06


def test_stratified_groups_beat_drawing_groups_at_random() -> None:
    rng = np.random.default_rng(0)
    patients = np.repeat(np.arange(120), rng.integers(1, 6, 120))
    site = np.where(rng.random(120) < 0.2, "b", "a")[patients]
    frame = pd.DataFrame({"patient": patients.astype(str), "site": site})

    def imbalance(splits: np.ndarray) -> float:
        return sum(abs(share(splits[site == value], "test") - 0.15) for value in "ab")

    stratified, _ = assign_splits(
        frame, {"site": SITE}, "patient", unique(frame), SplitSettings(stratify=("site",))
    )
    random = []
    for seed in range(50):
        drawn = np.random.default_rng(seed).choice(SPLITS, 120, p=(0.7, 0.15, 0.15))[patients]
        random.append(imbalance(drawn))
    assert imbalance(stratified) < min(0.04, float(np.quantile(random, 0.1)))


def test_the_seed_alone_decides() -> None:
    frame = pd.DataFrame({"patient": (np.arange(200) // 2).astype(str)})

    def draw(seed: int) -> list[str]:
        return list(assign_splits(frame, {}, "patient", unique(frame), SplitSettings(seed=seed))[0])

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_every_row_is_equally_likely_to_be_tested() -> None:
    frame = pd.DataFrame({"x": range(20)})
    settings = [SplitSettings(fractions=(0.6, 0.2, 0.2), seed=seed) for seed in range(300)]
    tested = np.mean(
        [assign_splits(frame, {}, None, unique(frame), s)[0] == "test" for s in settings], axis=0
    )
    # 300 draws with p = 0.2: standard error 0.023; 20 rows, so 4 of them
    assert np.abs(tested - 0.2).max() < 0.092


def test_a_fraction_of_zero_leaves_the_split_out() -> None:
    frame = pd.DataFrame({"x": range(9)})
    splits, _ = assign_splits(frame, {}, None, unique(frame), SplitSettings(fractions=(0, 0, 1)))
    assert set(splits) == {"test"}


def test_too_few_groups_for_a_split_are_refused() -> None:
    frame = pd.DataFrame({"patient": ["a", "a", "b", "b"]})
    with pytest.raises(UserError, match=r"split 'test' is empty: 4 images in 2 groups leave no image for it"):
        assign_splits(frame, {}, "patient", unique(frame), SplitSettings(fractions=(0.4, 0.4, 0.2)))


GIVEN = pd.DataFrame(
    {"split": ["Train", "training", "valid", "val", "test", "testing"], "patient": list("aabbcc")}
)


def test_given_splits_are_kept_in_their_usual_spellings() -> None:
    splits, keep = assign_splits(GIVEN, {}, "patient", unique(GIVEN), SplitSettings(column="split"))
    assert splits.tolist() == ["train", "train", "val", "val", "test", "test"]
    assert keep.all()
    implied, _ = assign_splits(GIVEN, {}, "patient", unique(GIVEN), SplitSettings())
    assert implied.tolist() == splits.tolist()


def test_fractions_replace_given_splits() -> None:
    frame = pd.DataFrame({"split": ["test"] * 100})
    splits, _ = assign_splits(frame, {}, None, unique(frame), SplitSettings(fractions=(0.5, 0.25, 0.25)))
    assert share(splits, "train") == 0.5


def test_a_group_in_two_given_splits_is_refused() -> None:
    frame = GIVEN.assign(patient=list("aababc"))
    with pytest.raises(UserError, match=r"2 values of the group column 'patient'.*'a', 'b'"):
        assign_splits(frame, {}, "patient", unique(frame), SplitSettings())


def test_identical_images_in_two_given_splits_are_refused_with_their_rows() -> None:
    content = np.array([0, 1, 2, 3, 1, 4])
    frame = GIVEN.set_index(pd.Index([10, 11, 12, 13, 14, 15]))
    with pytest.raises(
        UserError, match=r"Identical images .* in row 11 \(row 11 in train is row 14 in test\)"
    ):
        assign_splits(frame, {}, None, content, SplitSettings())


def test_dropping_duplicates_keeps_the_held_out_copy() -> None:
    frame = pd.DataFrame({"split": ["train", "train", "train", "val", "val", "test"]})
    content = np.array([0, 1, 1, 1, 2, 2])  # rows 1 and 2 equal 3, row 4 equals 5
    frame = pd.concat([frame, pd.DataFrame({"split": ["val", "train"]})], ignore_index=True)
    content = np.append(content, [5, 0])  # rows 0 and 7 are copies within train: no leak, kept
    splits, keep = assign_splits(frame, {}, None, content, SplitSettings(duplicates="drop"))
    assert keep.tolist() == [True, False, False, True, False, True, True, True]
    assert splits[keep].tolist() == ["train", "val", "test", "val", "train"]


def test_an_empty_given_split_is_refused_unless_allowed() -> None:
    frame = pd.DataFrame({"fold": ["train", "test"]})
    with pytest.raises(UserError, match=r"split 'val' is empty: column 'fold' names no image"):
        assign_splits(frame, {}, None, unique(frame), SplitSettings(column="fold"))
    allowed = SplitSettings(column="fold", may_be_empty=("val",))
    assert assign_splits(frame, {}, None, unique(frame), allowed)[0].tolist() == ["train", "test"]


@pytest.mark.parametrize(
    ("frame", "group", "settings", "sentence"),
    [
        (
            {"split": ["train", "fold3"]},
            None,
            SplitSettings(),
            r"holds 'fold3' in row 1; expected train, val",
        ),
        ({"split": ["train", None]}, None, SplitSettings(), "row 1"),
        (
            {"fold": ["train"]},
            None,
            SplitSettings(column="folt"),
            "no split column 'folt'; the nearest is 'fold'",
        ),
        ({"patient": ["a"]}, "patent", SplitSettings(), "no group column 'patent'; the nearest is 'patient'"),
        ({"patient": ["a", None]}, "patient", SplitSettings(), "'patient' is empty in row 1"),
        ({"x": [1]}, None, SplitSettings(stratify=("sxe",)), "'sxe', which is no attribute"),
        ({"split": ["train"]}, None, SplitSettings(stratify=("x",)), "splits are given by column 'split'"),
        ({"split": ["train"]}, None, SplitSettings(seed=3), "`split.seed` is for own splits"),
        ({"fold": ["train"]}, None, SplitSettings(column="fold", seed=3), "are given by column 'fold'"),
        ({"x": [1]}, None, SplitSettings(duplicates="drop"), "for splits given by a column"),
        ({"x": [1]}, None, SplitSettings(may_be_empty=("val",)), "for splits given by a column"),
    ],
)
def test_impossible_splits_are_refused(
    frame: dict, group: str, settings: SplitSettings, sentence: str
) -> None:
    table = pd.DataFrame(frame)
    with pytest.raises(UserError, match=sentence):
        assign_splits(table, {}, group, unique(table), settings)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"fractions": (0.5, 0.2, 0.2)}, "sum to 1"),
        ({"fractions": (1.2, -0.1, -0.1)}, "sum to 1"),
        ({"fractions": (0.5, 0.5)}, "Field required"),
        ({"column": "split", "fractions": (0.5, 0.25, 0.25)}, "not both"),
        ({"duplicates": "keep"}, "'refuse' or 'drop'"),
        ({"column": "fold", "may_be_empty": ("val", "tset")}, "names 'tset', which is no split; the nearest"),
    ],
)
def test_settings_that_contradict_themselves_are_refused(arguments: dict, sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        SplitSettings(**arguments)

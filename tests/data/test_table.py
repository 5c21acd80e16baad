"""A prepared table: opening, rows, encoding, summaries, and what it refuses."""

import pickle
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cfssl.data.prepare import save_prepared
from cfssl.data.table import Attribute, ImageTable, encode_column, texts
from cfssl.errors import UserError

ATTRIBUTES = {
    "scanner": Attribute("scanner", "categorical", ("A", "B", "C"), declared=True),
    "sex": Attribute("sex", "binary", ("F", "M")),
    "age": Attribute("age", "continuous"),
}
FRAME = pd.DataFrame(
    {
        "scanner": ["A", "C", "B", "A", "B", "C"],
        "sex": ["F", "M", None, "M", "F", "M"],
        "age": [30.5, np.nan, 50.0, 61.0, 20.0, 44.0],
        "patient": ["p0", "p1", "p2", "p3", "p4", "p5"],
        "split": ["train", "train", "val", "train", "test", "test"],
    }
)


TEXT = st.text("aZ 0é'\n", min_size=1)


def images(count: int = 6) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 1, 4, 5), dtype=np.uint8)


@pytest.fixture
def table(tmp_path: Path) -> ImageTable:
    masks = (images()[:, [0, 0]] > 100).astype(np.uint8)
    return save_prepared(
        tmp_path / "t", "toy", FRAME, ATTRIBUTES, images(), masks, ("left", "right"), group="patient"
    )


def test_opening_maps_the_arrays_and_reads_no_frame(table: ImageTable) -> None:
    opened = ImageTable.open(table.folder)
    assert isinstance(opened.images._array, np.memmap)
    assert isinstance(opened.masks._array, np.memmap)
    assert "_frame" not in vars(opened)
    assert len(opened) == 6
    assert opened.images.shape == (1, 4, 5)
    assert "_frame" not in vars(opened), "length and shapes must not need the frame"
    opened.rows("train")
    assert "_frame" in vars(opened)


def test_reading_returns_the_stored_pixels_of_the_rows_in_their_order(table: ImageTable) -> None:
    rows = np.array([4, 0, 4])
    read = table.images.read(rows)
    np.testing.assert_array_equal(read, images()[rows])
    read[:] = 0  # a copy: the table stays as it is
    np.testing.assert_array_equal(table.images.read(np.arange(6)), images())
    assert table.masks is not None
    np.testing.assert_array_equal(table.masks.read(rows), images()[rows][:, [0, 0]] > 100)


def test_rows_are_those_of_the_split_in_which_all_attributes_are_known(table: ImageTable) -> None:
    assert table.rows().tolist() == [0, 1, 2, 3, 4, 5]
    assert table.rows("train").tolist() == [0, 1, 3]
    assert table.rows("train", known=["age"]).tolist() == [0, 3]
    assert table.rows(known=["age", "sex"]).tolist() == [0, 3, 4, 5]
    assert table.rows("train").dtype == np.int64


def test_encoding_gives_codes_by_order_of_categories_and_physical_units(table: ImageTable) -> None:
    encoded = table.encode(["scanner", "sex", "age"], np.array([3, 0, 5]))
    assert torch.equal(encoded["scanner"], torch.tensor([0, 0, 2]))
    assert torch.equal(encoded["sex"], torch.tensor([1, 0, 1]))
    assert torch.equal(encoded["age"], torch.tensor([61.0, 30.5, 44.0]))
    assert encoded["sex"].dtype == torch.int64
    assert encoded["age"].dtype == torch.float32


def test_a_missing_value_is_refused_where_it_is_encoded_and_named(table: ImageTable) -> None:
    table.encode(["age"], np.array([0, 2]))
    with pytest.raises(UserError, match=r"'age' is missing in row 1 of table 'toy'"):
        table.encode(["age"], np.array([0, 1]))
    with pytest.raises(UserError, match=r"'sex' is missing in row 2"):
        table.encode(["sex"], np.arange(6))


def test_unknown_names_are_refused_with_the_nearest_one(table: ImageTable) -> None:
    with pytest.raises(UserError, match="no attribute 'scaner'; the nearest is 'scanner'"):
        table.encode(["scaner"], np.arange(2))
    with pytest.raises(UserError, match="no attribute 'agee'"):
        table.rows(known=["agee"])
    with pytest.raises(UserError, match="no split 'training'; choose one of train, val, test"):
        table.rows("training")


def test_a_value_outside_the_declared_categories_is_refused(tmp_path: Path) -> None:
    frame = FRAME.assign(scanner=["A", "Z", "B", "A", "Y", "C"])
    with pytest.raises(UserError, match=r"'scanner'.*one of 'A', 'B', 'C'.*2 rows \(1 \('Z'\), 4 \('Y'\)\)"):
        save_prepared(tmp_path / "t", "toy", frame, ATTRIBUTES, images())
    assert list(tmp_path.iterdir()) == []


def test_the_summary_shows_kind_origin_values_and_missing(table: ImageTable) -> None:
    assert [tuple(line) for line in table.summary()] == [
        ("scanner", "categorical", True, ("A", "B", "C"), 0),
        ("sex", "binary", False, ("F", "M"), 1),
        ("age", "continuous", False, (20.0, 61.0), 1),
    ]


def test_changing_the_frame_one_got_does_not_change_the_table(table: ImageTable) -> None:
    frame = table.frame
    frame["new"] = 1
    frame["scanner"] = "A"
    frame.loc[0, "age"] = -1.0
    assert "new" not in table.frame.columns
    assert table.frame["scanner"].tolist() == FRAME["scanner"].tolist()
    assert table.encode(["age"], np.array([0]))["age"].item() == 30.5


def test_a_table_sent_to_a_worker_travels_as_its_path(table: ImageTable) -> None:
    table.rows("train")
    sent = pickle.dumps(table)
    assert len(sent) < 1000
    received = pickle.loads(sent)  # noqa: S301  what the data loader does with its dataset
    np.testing.assert_array_equal(received.images.read(np.arange(6)), images())
    assert received.fingerprint == table.fingerprint


def test_the_truth_is_the_one_given_when_opening(table: ImageTable) -> None:
    truth = object()
    assert ImageTable.open(table.folder).truth is None
    assert ImageTable.open(table.folder, truth=truth).truth is truth


def test_a_folder_that_is_no_whole_table_is_refused(table: ImageTable, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        ImageTable.open(tmp_path / "nowhere")
    content = (table.folder / "images.npy").read_bytes()
    (table.folder / "images.npy").write_bytes(content[:-7])
    with pytest.raises(UserError, match="cannot be mapped"):
        ImageTable.open(table.folder)
    np.save(table.folder / "images.npy", images()[:3])
    with pytest.raises(UserError, match=r"holds 3 uint8 arrays .* says 6"):
        ImageTable.open(table.folder)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("x", "ordinal"), "kind 'ordinal'; choose one of categorical, binary, continuous"),
        (("x", "binary", ("a", "b", "c")), "binary and has 3 categories"),
        (("x", "categorical", ()), "no value at all"),
        (("x", "categorical", ("a", "a")), "category twice"),
        (("x", "continuous", ("a",)), "continuous and has categories"),
    ],
)
def test_impossible_attributes_are_refused(arguments: tuple, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        Attribute(*arguments)


@given(
    st.builds(
        Attribute,
        TEXT,
        st.just("categorical"),
        st.lists(TEXT, min_size=1, unique=True).map(tuple),
        st.booleans(),
    )
)
def test_an_attribute_survives_json(attribute: Attribute) -> None:
    assert Attribute.from_json(attribute.to_json()) == attribute


@given(st.lists(st.sampled_from(["A", "B", "C", None]), min_size=1))
def test_codes_point_back_to_the_values(values: list[str | None]) -> None:
    codes = encode_column(pd.Series(values, dtype="str"), ATTRIBUTES["scanner"])
    assert [None if code < 0 else "ABC"[code] for code in codes] == values


def test_continuous_values_must_be_finite_numbers() -> None:
    age = ATTRIBUTES["age"]
    with pytest.raises(UserError, match=r"'age' has values that are not finite numbers, in row 1 \('old'\)"):
        encode_column(pd.Series([1.0, "old", None], dtype=object), age)
    with pytest.raises(UserError, match="row 0"):
        encode_column(pd.Series([np.inf, 1.0]), age)


def test_whole_numbers_and_text_name_the_same_category() -> None:
    for values in ([1, 0, 1], [1.0, 0.0, 1.0], ["1", "0", "1"]):
        assert texts(pd.Series(values)).tolist() == ["1", "0", "1"]
    with_missing = texts(pd.Series([1.0, np.nan, 2.5]))
    assert with_missing.isna().tolist() == [False, True, False]
    assert with_missing[2] == "2.5"
    assert texts(pd.Series([np.nan, np.nan])).isna().all()

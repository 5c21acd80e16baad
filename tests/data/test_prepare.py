"""From sources to prepared tables:
what is read, what is inferred, what is refused, and that nothing is left half-written.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from cfssl.data import prepare as prepare_module
from cfssl.data import writer as writer_module
from cfssl.data.columns import AttributeSpec, infer_kind, natural, no_attribute
from cfssl.data.prepare import changed_files, prepare, save_prepared, source_state
from cfssl.data.sources import TableSource
from cfssl.data.splits import SplitSettings
from cfssl.data.table import Attribute, ImageTable
from cfssl.errors import UserError
from cfssl.provenance import fingerprint

COUNT = 40
RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (COUNT, 6, 8), dtype=np.uint8)
MASKS = (PIXELS > 128).astype(np.uint8)
COLUMNS = {
    "site": RNG.choice(["north", "south", "elsewhere"], COUNT).tolist(),
    "age": [str(age) if age % 7 else "" for age in RNG.integers(20, 90, COUNT)],
    "dx": [("nv", "mel", "bcc", "df")[number % 4] for number in range(COUNT)],
    "has_mask": [str(int(number % 4 != 0)) for number in range(COUNT)],
    "patient": [f"{number // 2:04d}" for number in range(COUNT)],
    "note": [f"free text {number}" for number in range(COUNT)],
}


@pytest.fixture
def csv(tmp_path: Path) -> Path:
    """A CSV beside folders of PNG images and masks."""
    folder = tmp_path / "source"
    (folder / "masks").mkdir(parents=True)
    names = [f"{number:03d}.png" for number in range(COUNT)]
    for name, image, mask in zip(names, PIXELS, MASKS, strict=True):
        Image.fromarray(image).save(folder / name)
        Image.fromarray(mask * 255).save(folder / "masks" / name)
    frame = pd.DataFrame({"image": names, "mask": [f"masks/{name}" for name in names], **COLUMNS})
    frame.to_csv(folder / "table.csv", index=False)
    return folder / "table.csv"


def change(csv: Path, **columns: Any) -> None:
    pd.read_csv(csv, dtype=str, keep_default_na=False).assign(**columns).to_csv(csv, index=False)


def left_over(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_csv_of_files_comes_back_as_it_was_written(csv: Path, tmp_path: Path) -> None:
    source = TableSource(csv, masks={"lungs": "mask"}, group="patient", missing=("elsewhere",))
    table = prepare(source, tmp_path / "t")
    np.testing.assert_array_equal(table.images.read(np.arange(COUNT)), PIXELS[:, None])
    assert table.masks is not None
    np.testing.assert_array_equal(table.masks.read(np.arange(COUNT)), MASKS[:, None])
    assert table.mask_names == ("lungs",)
    frame = table.frame
    assert frame["patient"].tolist() == COLUMNS["patient"], "identifiers keep their leading zeros"
    assert frame["age"].isna().tolist() == [age == "" for age in COLUMNS["age"]]
    assert frame["age"].dropna().tolist() == [float(age) for age in COLUMNS["age"] if age]
    assert frame["site"].isna().tolist() == [site == "elsewhere" for site in COLUMNS["site"]]
    assert frame.groupby("patient")["split"].nunique().max() == 1


def test_attributes_are_inferred_and_say_so(csv: Path, tmp_path: Path) -> None:
    source = TableSource(csv, group="patient", attributes={"site": AttributeSpec("categorical")})
    found = {
        line.name: (line.kind, line.declared, line.values)
        for line in prepare(source, tmp_path / "t").summary()
    }
    ages = [float(age) for age in COLUMNS["age"] if age]
    assert found == {
        "site": ("categorical", True, ("elsewhere", "north", "south")),
        "age": ("continuous", False, (min(ages), max(ages))),
        "dx": ("categorical", False, ("bcc", "df", "mel", "nv")),
        "has_mask": ("binary", False, ("0", "1")),
    }


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([float(value) for value in range(100)], None),  # an index
        ([value * 0.37 for value in range(100)], "continuous"),
        ([20.0 + value % 50 for value in range(100)], "continuous"),
        ([float(value % 5) for value in range(100)], "categorical"),
        ([0.5, 1.5] * 50, "binary"),
        ([1.0] * 100, None),
        ([np.nan] * 100, None),
        (["M", "F", None, "F"] * 25, "binary"),
        ([f"site {value % 15}" for value in range(100)], "categorical"),
        ([f"town {value % 30}" for value in range(100)], None),
        ([f"patient {value * 2 // 3}" for value in range(20)], None),
        ([f"file{value}.png" for value in range(100)], None),
    ],
)
def test_kinds_are_inferred_from_values(values: list, kind: str | None) -> None:
    column = natural(pd.Series(values))
    assert (None if no_attribute(column) else infer_kind(column)) == kind


@given(
    st.lists(st.sampled_from(["1", "2.5", "-3e2", "", "unknown", "007", "nan", "NaN", "NA", "x"]), min_size=1)
)
def test_text_becomes_numbers_only_if_all_of_it_is_numbers(cells: list[str]) -> None:
    column = natural(pd.Series(cells, dtype=object), missing=("unknown",))
    present = [cell for cell in cells if cell not in ("", "unknown")]
    numbers = [cell for cell in present if cell.lower() != "nan"]
    if all(cell in ("1", "2.5", "-3e2") for cell in numbers) and numbers:
        present = numbers  # among numbers, NaN is missing
        assert column.dropna().tolist() == [float(cell) for cell in present]
    else:
        assert column.dropna().tolist() == present
    assert column.isna().tolist() == [cell not in present for cell in cells]


def aside(csv: Path, cells: list[str]) -> None:
    change(csv, extra=(cells * COUNT)[:COUNT])


@pytest.mark.parametrize("token", ["nan", "NA", "N/A", "null", "None", "?", "unknown", " Unknown "])
@pytest.mark.parametrize("spec", [None, AttributeSpec(), AttributeSpec("categorical")])
def test_a_text_that_usually_means_missing_is_no_category_unless_declared(
    csv: Path, tmp_path: Path, token: str, spec: AttributeSpec | None
) -> None:
    aside(csv, ["A", "B", token])
    source = TableSource(csv, attributes={} if spec is None else {"extra": spec})
    with pytest.raises(UserError, match="usually mean a missing value: 'extra'") as caught:
        prepare(source, tmp_path / "t")
    assert repr(token) in str(caught.value)
    named = prepare(replace(source, missing=(token,)), tmp_path / "named")
    assert named.attributes["extra"].categories == ("A", "B")
    assert named.frame["extra"].isna().sum() == COUNT // 3
    taken = AttributeSpec("categorical", ("A", "B", token))
    declared = prepare(replace(source, attributes={"extra": taken}), tmp_path / "declared")
    assert declared.frame["extra"].notna().all()


def test_all_columns_in_doubt_are_named_at_once(csv: Path, tmp_path: Path) -> None:
    cells = {
        "sex": ["F", "M", "unknown", "?"],
        "height": ["1.5", "1.6", "NA", "1.8"],
        "view": ["AP", "AP ", "PA", "PA"],
        "note": ["free text", "?", "other text", "more"],
    }
    change(csv, **{name: (values * COUNT)[:COUNT] for name, values in cells.items()})
    change(csv, note=[f"{number}" if number % 9 else "x?" for number in range(COUNT)])
    with pytest.raises(UserError) as caught:
        prepare(TableSource(csv), tmp_path / "t")
    for part in (
        "usually mean a missing value: 'sex' ('unknown', '?'), 'height' ('NA'); name them in `missing`",
        "differ only by spaces around them: 'view' ('AP', 'AP '); correct them",
    ):
        assert part in str(caught.value)
    assert "'note'" not in str(caught.value), "free text is no attribute"


def test_a_column_of_numbers_does_not_vanish_for_one_text(csv: Path, tmp_path: Path) -> None:
    numbers = [f"{number / 3:.3f}" for number in range(COUNT - 1)]
    for text, missing in (("NaN", 1), ("nan", 1), ("", 1)):
        change(csv, dose=[*numbers, text])
        table = prepare(TableSource(csv), tmp_path / f"t{text}")
        assert table.attributes["dose"].kind == "continuous"
        assert table.frame["dose"].isna().sum() == missing
    for text in ("inf", "-Infinity", "1e999"):
        change(csv, dose=[*numbers, text])
        with pytest.raises(UserError, match=r"numbers that are not finite: 'dose' \('-?inf'\); correct"):
            prepare(TableSource(csv), tmp_path / "t")
        with pytest.raises(UserError, match="'dose' has values that are not finite numbers, in row 39"):
            prepare(TableSource(csv, attributes={"dose": AttributeSpec("continuous")}), tmp_path / "t")
    change(csv, dose=[*numbers, "none"])
    with pytest.raises(UserError, match=r"usually mean a missing value: 'dose' \('none'\)"):
        prepare(TableSource(csv), tmp_path / "t")


@pytest.mark.parametrize("kind", ["continuous", "categorical", "binary"])
def test_an_attribute_without_any_value_is_refused(csv: Path, tmp_path: Path, kind: Any) -> None:
    aside(csv, [""])
    categories = () if kind == "continuous" else ("a", "b")
    with pytest.raises(UserError, match="'extra' has no value in any row"):
        prepare(TableSource(csv, attributes={"extra": AttributeSpec(kind, categories)}), tmp_path / "t")


def test_every_value_that_where_names_must_occur(csv: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        prepare(TableSource(csv, where={"dx": ["nv", "mell", "zzz"]}), tmp_path / "t")
    assert "does not hold: 'mell'; the nearest is 'mel'; 'zzz'; known are 'nv'" in str(caught.value)


def test_columns_that_are_no_attributes_are_told_with_the_reason(csv: Path, tmp_path: Path) -> None:
    change(csv, number=[str(number) for number in range(COUNT)], one="x", empty="")
    table = prepare(TableSource(csv, masks="mask", group="patient"), tmp_path / "t")
    assert table.left_out == {
        "note": "text of 40 different values",
        "number": "a whole number that differs in every row, like an identifier",
        "one": "the same in all rows",
        "empty": "empty",
    }
    assert not set(table.left_out) & set(table.attributes)
    assert set(table.left_out) <= set(table.frame.columns)


def test_a_binary_attribute_is_derived_from_another_column(csv: Path, tmp_path: Path) -> None:
    spec = AttributeSpec("binary", positive=("mel", "bcc"), column="dx")
    table = prepare(TableSource(csv, attributes={"malignant": spec}), tmp_path / "t")
    assert table.attributes["malignant"].categories == ("no", "yes")
    assert table.frame["malignant"].tolist() == [
        "yes" if dx in ("mel", "bcc") else "no" for dx in COLUMNS["dx"]
    ]
    codes = table.encode(["malignant"], np.arange(4))["malignant"]
    assert codes.tolist() == [0, 1, 1, 0]


def test_a_filter_keeps_exactly_the_matching_rows(csv: Path, tmp_path: Path) -> None:
    source = TableSource(csv, where={"has_mask": [1], "dx": ["mel", "df"], "age": "present"})
    table = prepare(source, tmp_path / "t")
    keep = [
        mask == "1" and dx in ("mel", "df") and age != ""
        for mask, dx, age in zip(COLUMNS["has_mask"], COLUMNS["dx"], COLUMNS["age"], strict=True)
    ]
    np.testing.assert_array_equal(table.images.read(np.arange(len(table)))[:, 0], PIXELS[keep])
    assert table.frame["note"].tolist() == list(np.array(COLUMNS["note"])[keep])


def test_csv_parquet_and_npz_of_the_same_data_have_the_same_fingerprint(csv: Path, tmp_path: Path) -> None:
    frame = pd.read_csv(csv, dtype=str, keep_default_na=False)
    frame.to_parquet(csv.with_suffix(".parquet"))
    columns = {
        name: frame[name].to_numpy(dtype=str) for name in frame.columns if name not in ("image", "mask")
    }
    np.savez_compressed(tmp_path / "array.npz", images=PIXELS, lungs=MASKS, **columns)
    masks = {"lungs": "mask"}
    one = prepare(TableSource(csv, masks=masks), tmp_path / "csv")
    two = prepare(TableSource(csv.with_suffix(".parquet"), masks=masks), tmp_path / "parquet")
    assert one.fingerprint == two.fingerprint
    three = prepare(TableSource(tmp_path / "array.npz", masks="lungs"), tmp_path / "npz")
    np.testing.assert_array_equal(three.images.read(np.arange(COUNT)), one.images.read(np.arange(COUNT)))
    assert three.attributes == one.attributes
    pd.testing.assert_frame_equal(three.frame, one.frame.drop(columns=["image", "mask"]))


@pytest.mark.parametrize("layout", ["NHW", "NCHW", "NHWC"])
def test_the_layout_of_an_npz_does_not_matter(tmp_path: Path, layout: str) -> None:
    colour = RNG.integers(0, 65536, (COUNT, 3, 6, 8)).astype(np.uint16)
    images = {"NHW": colour[:, 0], "NCHW": colour, "NHWC": colour.transpose(0, 2, 3, 1)}[layout]
    np.savez(tmp_path / "a.npz", pictures=np.ascontiguousarray(images), index=np.arange(COUNT))
    table = prepare(TableSource(tmp_path / "a.npz", images="pictures"), tmp_path / "t")
    assert table.images.dtype == np.uint16
    np.testing.assert_array_equal(
        table.images.read(np.arange(COUNT)), colour[:, :1] if layout == "NHW" else colour
    )


def test_arrays_named_after_splits_give_the_splits(tmp_path: Path) -> None:
    sizes = {"train": 20, "val": 8, "test": 12}
    parts = dict(zip(sizes, np.split(PIXELS, [20, 28]), strict=True))
    arrays = {f"{name}_images": part for name, part in parts.items()}
    arrays |= {f"{name}_labels": np.arange(len(part))[:, None] % 2 for name, part in parts.items()}
    np.savez(tmp_path / "a.npz", **arrays)
    table = prepare(TableSource(tmp_path / "a.npz"), tmp_path / "t")
    assert {name: len(table.rows(name)) for name in sizes} == sizes
    np.testing.assert_array_equal(table.images.read(table.rows("val"))[:, 0], parts["val"])
    assert table.encode(["labels"], table.rows("test"))["labels"].tolist() == [0, 1] * 6


def test_a_csv_beside_an_npz_adds_columns_and_must_agree(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", images=PIXELS, site=np.array(COLUMNS["site"]))
    pd.DataFrame({"site": COLUMNS["site"], "dx": COLUMNS["dx"]}).to_csv(tmp_path / "a.csv", index=False)
    table = prepare(TableSource(tmp_path / "a.npz"), tmp_path / "t")
    assert table.frame["dx"].tolist() == COLUMNS["dx"]
    pd.DataFrame({"site": ["north"] * COUNT}).to_csv(tmp_path / "a.csv", index=False)
    with pytest.raises(UserError, match=r"Column 'site' differs between .*a\.csv and .*a\.npz"):
        prepare(TableSource(tmp_path / "a.npz"), tmp_path / "t2")
    pd.DataFrame({"dx": ["mel"] * 3}).to_csv(tmp_path / "a.csv", index=False)
    with pytest.raises(UserError, match=r"has 3 rows and .* 40 images"):
        prepare(TableSource(tmp_path / "a.npz"), tmp_path / "t3")


def test_folders_are_labels_only_when_declared(csv: Path, tmp_path: Path) -> None:
    root = tmp_path / "folders"
    for number, image in enumerate(PIXELS):
        path = root / ("sick" if number % 3 else "healthy") / f"{number:02d}.tif"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    (root / "readme.txt").write_text("no image")
    undeclared = prepare(TableSource(root), tmp_path / "t")
    assert undeclared.attributes == {}
    assert set(undeclared.left_out) == {"file", "folder", "folder1"}
    assert "part of the path" in undeclared.left_out["folder"]
    declared = {"diagnosis": AttributeSpec("binary", column="folder")}
    table = prepare(TableSource(root, attributes=declared), tmp_path / "t2")
    assert len(table) == COUNT
    for row, (file, diagnosis) in enumerate(zip(table.frame["file"], table.frame["diagnosis"], strict=True)):
        assert file.startswith(f"{diagnosis}/")
        np.testing.assert_array_equal(table.images.read(np.array([row]))[0, 0], PIXELS[int(file[-6:-4])])


def test_identical_images_share_a_split_though_their_patients_differ(tmp_path: Path) -> None:
    images = PIXELS.copy()
    images[[3, 17]] = images[30]
    np.savez(tmp_path / "a.npz", images=images, patient=np.array(COLUMNS["patient"]))
    for seed in range(8):
        source = TableSource(tmp_path / "a.npz", group="patient", split=SplitSettings(seed=seed))
        frame = prepare(source, tmp_path / f"t{seed}").frame
        assert frame["split"][[2, 3, 16, 17, 30, 31]].nunique() == 1


def test_dropped_duplicates_leave_images_masks_and_frame_in_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (prepare_module, writer_module):
        monkeypatch.setattr(module, "CHUNK_BYTES", 200)  # several chunks
    images = PIXELS.copy()
    images[[1, 5]] = images[35]
    split = np.array(["train"] * 20 + ["val"] * 10 + ["test"] * 10)
    np.savez(tmp_path / "a.npz", images=images, lungs=MASKS, split=split, note=np.array(COLUMNS["note"]))
    source = TableSource(tmp_path / "a.npz", masks="lungs")
    with pytest.raises(UserError, match=r"in 2 rows \(1, 5\) \(row 1 in train is row 35 in test"):
        prepare(source, tmp_path / "t")
    table = prepare(replace(source, split=SplitSettings(duplicates="drop")), tmp_path / "t")
    keep = np.delete(np.arange(COUNT), [1, 5])
    np.testing.assert_array_equal(table.images.read(np.arange(COUNT - 2))[:, 0], images[keep])
    assert table.masks is not None
    np.testing.assert_array_equal(table.masks.read(np.arange(COUNT - 2))[:, 0], MASKS[keep])
    assert table.frame["note"].tolist() == list(np.array(COLUMNS["note"])[keep])
    assert left_over(table.folder) == [
        "files.parquet",
        "images.npy",
        "masks.npy",
        "table.json",
        "table.parquet",
    ]


def test_chunks_do_not_change_the_table(csv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = TableSource(csv, masks={"lungs": "mask"})
    whole = prepare(source, tmp_path / "whole").fingerprint
    monkeypatch.setattr(prepare_module, "CHUNK_BYTES", 100)
    seen: list[tuple[int, int]] = []
    chunked = prepare(source, tmp_path / "chunked", progress=lambda done, total: seen.append((done, total)))
    assert chunked.fingerprint == whole
    assert len(seen) > 5
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1] == (COUNT, COUNT)


def test_arrays_in_memory_give_the_same_table_as_files(tmp_path: Path) -> None:
    attributes = {"dx": Attribute("dx", "categorical", ("bcc", "df", "mel", "nv"))}
    np.savez(tmp_path / "a.npz", images=PIXELS, dx=np.array(COLUMNS["dx"]))
    from_file = prepare(TableSource(tmp_path / "a.npz"), tmp_path / "t")
    from_memory = save_prepared(
        tmp_path / "m", "a", pd.DataFrame({"dx": COLUMNS["dx"]}), attributes, PIXELS[:, None]
    )
    assert from_memory.fingerprint == from_file.fingerprint


def test_volumes_are_stored_as_they_are(tmp_path: Path) -> None:
    volumes = RNG.integers(0, 256, (12, 1, 3, 4, 5), dtype=np.uint8)
    frame = pd.DataFrame({"split": ["train", "val", "test"] * 4})
    table = save_prepared(tmp_path / "t", "brains", frame, {}, volumes, volumes % 2, ("brain",))
    assert table.images.shape == (1, 3, 4, 5)
    np.testing.assert_array_equal(table.images.read(np.array([7])), volumes[[7]])


@pytest.mark.parametrize("what", ["pixel", "value", "split", "category", "mask"])
def test_the_fingerprint_follows_every_content(tmp_path: Path, what: str) -> None:
    frame = pd.DataFrame({"dx": COLUMNS["dx"], "split": ["train"] * 20 + ["val"] * 10 + ["test"] * 10})
    categories = ["bcc", "df", "mel", "nv"]
    images, masks = PIXELS[:, None].copy(), MASKS[:, None].copy()

    def save(name: str) -> str:
        attributes = {"dx": Attribute("dx", "categorical", tuple(categories))}
        return save_prepared(tmp_path / name, name, frame, attributes, images, masks, ("m",)).fingerprint

    before = save("before")
    assert save("again") == before
    if what == "pixel":
        images[13, 0, 2, 2] ^= 1
    elif what == "mask":
        masks[13, 0, 2, 2] ^= 1
    elif what == "value":
        frame.loc[5, "dx"] = "bcc" if frame["dx"][5] != "bcc" else "df"
    elif what == "split":
        frame.loc[5, "split"] = "test"
    else:
        categories.append("new")
    assert save("after") != before


def test_an_unchanged_source_is_not_read_again_and_a_changed_one_is(csv: Path, tmp_path: Path) -> None:
    source = TableSource(csv)
    reads: list[int] = []

    def count(done: int, total: int) -> None:
        reads.append(done)

    first = prepare(source, tmp_path / "t", count)
    assert prepare(source, tmp_path / "t", count).fingerprint == first.fingerprint
    assert len(reads) == 1
    Image.fromarray(255 - PIXELS[4]).save(csv.parent / "004.png")
    os.utime(csv.parent / "004.png", ns=(1, 1))
    second = prepare(source, tmp_path / "t", count)
    assert len(reads) == 2
    np.testing.assert_array_equal(second.images.read(np.array([4]))[0, 0], 255 - PIXELS[4])
    np.testing.assert_array_equal(
        first.images.read(np.array([4]))[0, 0], PIXELS[4]
    )  # readers keep their files
    assert left_over(tmp_path) == ["source", "t"]


def test_the_state_of_a_source_follows_settings_and_table_file_and_is_json(csv: Path) -> None:
    source = TableSource(csv, missing=("elsewhere",), attributes={"dx": AttributeSpec("categorical")})
    state = source_state(source)
    assert json.loads(json.dumps(state)) == state
    assert source_state(source) == state
    different = [
        replace(source, size=(3, 4)),
        replace(source, missing=()),
        replace(source, where={"has_mask": [1]}),
        replace(source, split=SplitSettings(seed=1)),
        replace(source, attributes={"dx": AttributeSpec("categorical", ("bcc", "df", "mel", "nv"))}),
    ]
    keys = [fingerprint(source_state(other)) for other in [source, *different]]
    os.utime(csv, ns=(5, 5))
    keys.append(fingerprint(source_state(source)))
    csv.write_bytes(csv.read_bytes() + b"\n")
    os.utime(csv, ns=(5, 5))
    keys.append(fingerprint(source_state(source)))
    assert len(set(keys)) == len(keys)


def test_the_state_of_a_source_is_seen_without_opening_it(
    csv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked_at: list[str] = []
    stat = Path.stat
    monkeypatch.setattr(Path, "stat", lambda path, **keys: looked_at.append(path.name) or stat(path, **keys))
    monkeypatch.setattr(prepare_module, "load_source", None)
    source_state(TableSource(csv))
    source_state(TableSource(csv.parent))
    assert set(looked_at) & {"table.csv", "source"} == {"table.csv", "source"}
    assert not [name for name in looked_at if name.endswith(".png")]


def test_the_state_of_a_source_is_the_same_under_all_names_of_its_folder(
    csv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "link").symlink_to(csv.parent)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "table.csv").symlink_to(csv)  # the same table beside other images
    monkeypatch.chdir(tmp_path)
    names = ["source/table.csv", "./source/../source/table.csv", str(csv), "link/table.csv"]
    states = [source_state(TableSource(Path(name))) for name in names]
    assert all(state == states[0] for state in states)
    assert source_state(TableSource(Path("other/table.csv"))) != states[0]
    assert source_state(TableSource(Path("source"))) == source_state(TableSource(csv.parent))


@pytest.mark.parametrize("change", ["add", "remove", "rename", "replace", "touch"])
def test_the_state_of_a_folder_follows_the_files_in_it(csv: Path, tmp_path: Path, change: str) -> None:
    inside = csv.parent / "masks"
    source = TableSource(csv.parent)
    os.utime(inside, ns=(5, 5))
    before = source_state(source)
    if change == "add":
        (inside / "new.png").write_bytes((inside / "001.png").read_bytes())
    elif change == "remove":
        (inside / "001.png").unlink()
    elif change == "rename":
        (inside / "001.png").rename(inside / "one.png")
    elif change == "replace":
        (tmp_path / "002.png").write_bytes((inside / "003.png").read_bytes())
        (tmp_path / "002.png").rename(inside / "002.png")
    else:  # what the message about changed images asks for
        os.utime(csv.parent, ns=(6, 6))
    assert source_state(source) != before


def test_every_file_that_is_no_longer_as_it_was_is_found(csv: Path, tmp_path: Path) -> None:
    table = prepare(TableSource(csv, masks="mask"), tmp_path / "t")
    total = 1 + 2 * COUNT
    assert changed_files(table) == ([], total, total)
    os.utime(csv.parent / "004.png", ns=(5, 5))  # another time
    stat = (csv.parent / "007.png").stat()
    (csv.parent / "007.png").write_bytes((csv.parent / "007.png").read_bytes() + b" ")  # another size
    os.utime(csv.parent / "007.png", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    (csv.parent / "masks" / "009.png").unlink()
    changed = ["004.png", "007.png", "masks/009.png"]
    assert changed_files(table) == ([csv.parent / name for name in changed], total, total)
    some = changed_files(table, most=11)
    assert (some.compared, some.total) == (11, total)
    assert set(some.changed) <= set(changed_files(table).changed)


def test_few_compared_files_are_spread_over_all(csv: Path, tmp_path: Path) -> None:
    table = prepare(TableSource(csv), tmp_path / "t")
    for number in range(COUNT):
        os.utime(csv.parent / f"{number:03d}.png", ns=(5, 5))
    found = [int(path.stem) for path in changed_files(table, most=6).changed if path.suffix == ".png"]
    assert found == [7, 15, 23, 31, 39]


def test_a_table_made_from_arrays_has_no_files_to_compare(tmp_path: Path) -> None:
    frame = pd.DataFrame({"split": ["train", "val", "test"] * 4})
    table = save_prepared(tmp_path / "t", "t", frame, {}, PIXELS[:12, None])
    assert changed_files(table) == ([], 0, 0)


def test_a_table_that_changes_while_it_is_read_is_refused(csv: Path, tmp_path: Path) -> None:
    def edit(done: int, total: int) -> None:
        os.utime(csv, ns=(5, 5))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare_module, "CHUNK_BYTES", 500)
        with pytest.raises(UserError, match=r"table\.csv was changed while it was read; run again"):
            prepare(TableSource(csv), tmp_path / "t", edit)
    assert left_over(tmp_path) == ["source"]


def test_a_folder_that_is_no_table_is_not_overwritten(csv: Path, tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="is no prepared table; it is not overwritten"):
        prepare(TableSource(csv), tmp_path / "precious")
    assert left_over(tmp_path / "precious") == ["thesis.txt"]


def test_an_interrupted_preparation_leaves_what_was_there(csv: Path, tmp_path: Path) -> None:
    before = prepare(TableSource(csv), tmp_path / "t").fingerprint

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    for folder in ("t", "new"):
        with pytest.raises(KeyboardInterrupt):
            prepare(TableSource(csv, channels=3), tmp_path / folder, interrupt)
    assert left_over(tmp_path) == ["source", "t"]
    assert ImageTable.open(tmp_path / "t").fingerprint == before


def test_a_killed_preparation_leaves_no_folder_and_can_be_repeated(csv: Path, tmp_path: Path) -> None:
    program = (
        "import os, signal; from pathlib import Path; from cfssl.data import prepare as room; "
        "from cfssl.data.sources import TableSource; room.CHUNK_BYTES = 500; "
        "kill = lambda done, total: os.kill(os.getpid(), signal.SIGKILL) if done > total // 2 else None; "
        f"room.prepare(TableSource(Path({str(csv)!r})), Path({str(tmp_path / 't')!r}), kill)"
    )
    done = subprocess.run([sys.executable, "-c", program], check=False)
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "t").exists()
    assert len([name for name in left_over(tmp_path) if name.endswith(".part")]) == 1
    table = prepare(TableSource(csv), tmp_path / "t")
    assert left_over(tmp_path) == ["source", "t"]
    np.testing.assert_array_equal(table.images.read(np.arange(COUNT)), PIXELS[:, None])


def resize_one(csv: Path) -> None:
    for number in (5, 9, 11, 30):
        Image.fromarray(PIXELS[number, :5]).save(csv.parent / f"{number:03d}.png")


def colour_one(csv: Path) -> None:
    Image.fromarray(np.dstack([PIXELS[5]] * 3)).save(csv.parent / "005.png")


def deepen_one(csv: Path) -> None:
    Image.fromarray(PIXELS[5].astype(np.uint16)).save(csv.parent / "005.png")


def break_two(csv: Path) -> None:
    (csv.parent / "005.png").write_bytes(b"oops")
    (csv.parent / "006.png").write_bytes(b"")


def lose_two(csv: Path) -> None:
    (csv.parent / "005.png").unlink()
    (csv.parent / "006.png").unlink()


def name_twice(csv: Path) -> None:
    change(csv, image=["000.png", *[f"{number:03d}.png" for number in range(COUNT - 1)]])


def cut_first_cell(csv: Path) -> None:
    change(csv, image=["", *[f"{number:03d}.png" for number in range(1, COUNT)]])


def name_dicom(csv: Path) -> None:
    (csv.parent / "000.png").rename(csv.parent / "000.dcm")
    change(csv, image=["000.dcm", *[f"{number:03d}.png" for number in range(1, COUNT)]])


def label_map(csv: Path) -> None:
    Image.fromarray(PIXELS[5]).save(csv.parent / "masks" / "005.png")


BAD: list[tuple[Any, Mapping[str, Any], str]] = [
    (
        resize_one,
        {},
        r"4 of 40 images .* differ in size \(row 5 \(005.png\): 5×8, the first image 6×8; .*; \.\.\.\)",
    ),
    (colour_one, {}, r"1 of 40 images .* differ in channels \(row 5 .* set `channels`"),
    (deepen_one, {}, r"1 of 40 images .* differ in depth"),
    (break_two, {}, r"2 of 40 images .* cannot be read \(row 5 \(005.png\): .*; row 6"),
    (label_map, {"masks": "mask"}, r"1 of 40 images .* have a mask that is no mask \(row 5"),
    (lose_two, {}, r"files that do not exist, in 2 rows \(5, 6\), the first being .*005.png"),
    (name_twice, {}, r"names an image more than once, again in row 1, the first being '000.png'"),
    (cut_first_cell, {}, r"image column 'image' .* is empty in row 0"),
    (name_dicom, {}, "is a .dcm file, which this version does not read"),
    (None, {"path": Path("/nowhere/table.csv")}, "/nowhere/table.csv does not exist"),
    (None, {"images": "imag"}, "no image column 'imag'; the nearest is 'image'"),
    (None, {"masks": "maks"}, "no mask column 'maks'; the nearest is 'mask'"),
    (None, {"group": "patent"}, "no group column 'patent'; the nearest is 'patient'"),
    (None, {"where": {"hasmask": [1]}}, "no column for `where` 'hasmask'; the nearest is 'has_mask'"),
    (
        None,
        {"where": {"has_mask": [2]}},
        r"`where.has_mask` accepts what .* does not hold: '2'; known are '0', '1'",
    ),
    (None, {"where": {"has_mask": "yes"}}, "give a list of accepted values"),
    (None, {"attributes": {"mal": AttributeSpec(column="dy")}}, "no column for attribute 'mal' 'dy'"),
    (None, {"attributes": {"age": AttributeSpec(column="dx")}}, "name of another column"),
    (
        None,
        {"attributes": {"note": AttributeSpec()}},
        "'note' is text of 40 different values; declare its `kind`",
    ),
    (
        None,
        {"attributes": {"dx": AttributeSpec("continuous")}},
        r"'dx' .* not finite numbers, in 40 rows \(0 \('nv'\)",
    ),
    (None, {"attributes": {"dx": AttributeSpec("binary")}}, "'dx' is binary and has 4 categories"),
    (
        None,
        {"attributes": {"dx": AttributeSpec("categorical", ("nv", "mel", "bcc"))}},
        r"10 rows \(3 \('df'\)",
    ),
    (
        None,
        {"attributes": {"sick": AttributeSpec("binary", positive=("akiec",), column="dx")}},
        "names 'akiec', which its column never holds; known are 'nv', 'mel', 'bcc', 'df'",
    ),
    (None, {"split": SplitSettings(column="splt")}, "no split column 'splt'"),
    (None, {"split": SplitSettings(fractions=(0.99, 0.009, 0.001))}, "'test' is empty"),
]


@pytest.mark.parametrize(("spoil", "settings", "sentence"), BAD, ids=[case[2][:40] for case in BAD])
def test_bad_input_gives_one_sentence_and_leaves_nothing(
    csv: Path, tmp_path: Path, spoil: Any, settings: Mapping[str, Any], sentence: str
) -> None:
    if spoil is not None:
        spoil(csv)
    with pytest.raises(UserError, match=sentence) as caught:
        prepare(replace(TableSource(csv), **settings), tmp_path / "t")
    assert str(caught.value).endswith(".")
    assert left_over(tmp_path) == ["source"]


def test_size_and_channels_reconcile_unequal_images(csv: Path, tmp_path: Path) -> None:
    resize_one(csv)
    colour_one(csv)
    table = prepare(TableSource(csv, size=(3, 4), channels=1, masks="mask"), tmp_path / "t")
    assert table.images.shape == (1, 3, 4)
    expected = PIXELS.reshape(COUNT, 3, 2, 4, 2).mean((2, 4))
    same = [number for number in range(COUNT) if number not in (5, 9, 11, 30)]
    assert np.abs(table.images.read(np.array(same))[:, 0] - expected[same]).max() <= 0.51


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("", "not a readable table"),
        ("image,age\n", "has no rows"),
        ("image,age,age\na.png,1,2\n", "two columns called 'age'"),
        ("image,age\na.png,1,2\nb.png,1,3\n", "more cells than the header"),
        ('image,age\n"a.png,1\n', "not a readable table"),
    ],
)
def test_broken_tables_are_refused(tmp_path: Path, content: str, sentence: str) -> None:
    (tmp_path / "t.csv").write_text(content)
    with pytest.raises(UserError, match=sentence):
        prepare(TableSource(tmp_path / "t.csv"), tmp_path / "t")


def test_arrays_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    frame = pd.DataFrame({"dx": COLUMNS["dx"]})
    cases: list[tuple[dict[str, Any], str]] = [
        ({"images": PIXELS}, r"expected uint8 or uint16 \(N, C, H, W\)"),
        ({"images": PIXELS[:, None].astype(np.float32)}, "float32"),
        ({"images": PIXELS[:9, None]}, "40 rows and 9 images"),
        ({"masks": MASKS[:, None]}, "a channel per name"),
        ({"mask_names": ("a",)}, "shape None"),
        ({"masks": MASKS[:, None] * 2, "mask_names": ("a",)}, "values up to 2"),
        ({"attributes": {"age": Attribute("age", "continuous")}}, "no column for attribute 'age'"),
    ]
    for changed, sentence in cases:
        arguments: dict[str, Any] = {"frame": frame, "attributes": {}, "images": PIXELS[:, None]} | changed
        with pytest.raises(UserError, match=sentence):
            save_prepared(tmp_path / "t", "t", **arguments)
    assert left_over(tmp_path) == []


@pytest.mark.parametrize(
    ("arrays", "settings", "sentence"),
    [
        ({"image": PIXELS}, {}, "no array 'images' of images; the nearest is 'image'"),
        ({"images": PIXELS}, {"masks": "lungs"}, "no array 'lungs'"),
        ({"images": PIXELS, "lungs": MASKS[:5]}, {"masks": "lungs"}, r"'lungs' .* has shape \(5, 6, 8\)"),
        ({"images": PIXELS[:0]}, {}, r"Array 'images' of .*a\.npz holds no image"),
        ({"images": PIXELS.reshape(COUNT, 2, 3, 8)}, {}, "channels .* cannot be told"),
        ({"images": np.where(PIXELS > 250, np.nan, 0.5)}, {}, r"pixels that cannot be stored \(row \d+: NaN"),
    ],
)
def test_npz_files_that_do_not_fit_are_refused(
    tmp_path: Path, arrays: dict[str, np.ndarray], settings: dict[str, Any], sentence: str
) -> None:
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(UserError, match=sentence):
        prepare(TableSource(tmp_path / "a.npz", **settings), tmp_path / "t")
    assert left_over(tmp_path) == ["a.npz"]

"""Arrays in `.npz` files come back as they were written, or not at all."""

import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from cfssl.data.npz import npz_headers, read_npz, stream_npz
from cfssl.data.readers import BadImage, read_image
from cfssl.data.sources import TableSource, load_source
from cfssl.errors import UserError

RNG = np.random.default_rng(0)


@given(arrays(np.uint16, st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 4))))
def test_an_array_comes_back_as_it_was_written(
    tmp_path_factory: pytest.TempPathFactory, array: np.ndarray
) -> None:
    path = tmp_path_factory.mktemp("npz") / "a.npz"
    np.savez_compressed(path, images=array, age=np.arange(3))
    assert npz_headers(path)["images"] == (array.shape, array.dtype)
    np.testing.assert_array_equal(np.stack(list(stream_npz(path, "images"))), array)
    np.testing.assert_array_equal(read_npz(path, "images"), array)
    assert read_npz(path, "age").tolist() == [0, 1, 2]


def test_files_with_objects_or_damage_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "o.npz", images=np.array([{"a": 1}], dtype=object))
    with pytest.raises(UserError, match=r"^Array 'images' .* holds Python objects"):
        npz_headers(tmp_path / "o.npz")
    np.savez(tmp_path / "f.npz", images=np.asfortranarray(np.zeros((3, 4, 5), np.uint8)))
    with pytest.raises(UserError, match=r"^Array 'images' .* column by column"):
        npz_headers(tmp_path / "f.npz")
    (tmp_path / "bad.npz").write_bytes(b"zip?")
    with pytest.raises(UserError, match=r"is not a readable \.npz file"):
        npz_headers(tmp_path / "bad.npz")


def test_a_header_that_promises_other_than_the_file_holds_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", images=np.zeros((4, 5, 6), np.uint8))
    with zipfile.ZipFile(tmp_path / "a.npz") as archive:
        content = archive.read("images.npy")
    with zipfile.ZipFile(tmp_path / "b.npz", "w") as archive:
        archive.writestr("images.npy", content.replace(b"(4, 5, 6)", b"(9, 5, 6)"))
    with pytest.raises(UserError, match="has 248 bytes, its header says 398"):
        npz_headers(tmp_path / "b.npz")


def test_a_changed_value_is_noticed_though_it_decompresses(tmp_path: Path) -> None:
    written = RNG.integers(0, 2, (2, 20_000)).astype(np.uint8)
    np.savez_compressed(tmp_path / "a.npz", labels=written)
    whole = (tmp_path / "a.npz").read_bytes()
    for place in range(200, len(whole) - 200, 41):
        damaged = bytearray(whole)
        damaged[place] ^= 1
        (tmp_path / "b.npz").write_bytes(damaged)
        with pytest.raises(UserError, match="cannot be read"):
            read_npz(tmp_path / "b.npz", "labels")
        with pytest.raises(UserError, match="cannot be read"):
            list(stream_npz(tmp_path / "b.npz", "labels"))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_table_with_any_flipped_byte_is_the_right_one_or_refused(tmp_path: Path, save: object) -> None:
    images = RNG.integers(0, 256, (12, 5, 6), dtype=np.uint8)
    labels = np.array(["yes", "no", "no"] * 4)
    assert callable(save)
    save(tmp_path / "a.npz", images=images, label=labels)
    whole = (tmp_path / "a.npz").read_bytes()
    source = TableSource(tmp_path / "b.npz")
    refused = 0
    for place in RNG.choice(len(whole), 300):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(RNG.integers(8))
        source.path.write_bytes(damaged)
        try:
            loaded = load_source(source)
            found = [item.image() for item in loaded.items()]
        except UserError:
            refused += 1
        else:
            np.testing.assert_array_equal(found, images)
            assert loaded.frame["label"].tolist() == labels.tolist()
            assert list(loaded.attributes) == ["label"]
    assert 150 < refused < 300


def test_an_image_file_with_any_flipped_byte_is_the_right_one_or_refused(tmp_path: Path) -> None:
    image = RNG.integers(0, 256, (5, 6), dtype=np.uint8)
    np.savez_compressed(tmp_path / "a.npz", image)
    whole = (tmp_path / "a.npz").read_bytes()
    refused = 0
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(RNG.integers(8))
        (tmp_path / "b.npz").write_bytes(damaged)
        try:
            np.testing.assert_array_equal(read_image(tmp_path / "b.npz"), image)
        except BadImage:
            refused += 1
    assert refused > 0

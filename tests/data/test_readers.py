"""Image files in, standard images out; damaged files are refused."""

import io
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from cfssl.data.readers import BadImage, read_image, standardise, standardise_mask
from cfssl.errors import UserError

RNG = np.random.default_rng(0)
GREY8 = RNG.integers(0, 256, (13, 17), dtype=np.uint8)
GREY16 = RNG.integers(0, 65536, (13, 17), dtype=np.uint16)
RGB8 = RNG.integers(0, 256, (13, 17, 3), dtype=np.uint8)
RGB16 = RNG.integers(0, 65536, (13, 17, 3), dtype=np.uint16)


@pytest.mark.parametrize("pixels", [GREY8, GREY16, RGB8, RGB16], ids=["grey8", "grey16", "rgb8", "rgb16"])
@pytest.mark.parametrize("suffix", [".png", ".tif", ".tiff", ".npz"])
def test_lossless_files_return_the_written_pixels(tmp_path: Path, pixels: np.ndarray, suffix: str) -> None:
    path = tmp_path / f"image{suffix}"
    if suffix == ".png":
        cv2.imwrite(str(path), pixels[..., ::-1] if pixels.ndim == 3 else pixels)  # cv2 writes blue first
    elif suffix == ".npz":
        np.savez_compressed(path, pixels)
    else:
        tifffile.imwrite(path, pixels, photometric="rgb" if pixels.ndim == 3 else "minisblack")
    read = read_image(path)
    assert read.dtype == pixels.dtype
    np.testing.assert_array_equal(read, pixels)


@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_adobe_deflate", "packbits"])
def test_compressed_tiff_returns_the_written_pixels(tmp_path: Path, compression: str) -> None:
    for name, pixels in (("grey", GREY8), ("rgb", RGB8)):
        Image.fromarray(pixels).save(tmp_path / f"{name}.tif", compression=compression)
        np.testing.assert_array_equal(read_image(tmp_path / f"{name}.tif"), pixels)


@pytest.mark.parametrize("pixels", [GREY8, GREY16], ids=["8 bits", "16 bits"])
def test_tiff_in_which_zero_is_white_is_inverted(tmp_path: Path, pixels: np.ndarray) -> None:
    tifffile.imwrite(tmp_path / "inverted.tif", pixels, photometric="miniswhite")
    np.testing.assert_array_equal(read_image(tmp_path / "inverted.tif"), np.iinfo(pixels.dtype).max - pixels)


def test_jpeg_comes_back_with_its_colours_in_order(tmp_path: Path) -> None:
    flat = np.full((16, 16, 3), (200, 100, 20), dtype=np.uint8)
    Image.fromarray(flat).save(tmp_path / "rgb.JPG", format="JPEG", quality=98)
    assert np.abs(read_image(tmp_path / "rgb.JPG").astype(int) - flat).max() <= 3
    Image.fromarray(flat[..., 0]).save(tmp_path / "grey.jpeg", quality=98)
    assert read_image(tmp_path / "grey.jpeg").shape == (16, 16)


def test_an_opaque_alpha_channel_is_dropped_and_another_refused(tmp_path: Path) -> None:
    opaque = np.dstack([RGB8, np.full(RGB8.shape[:2], 255, np.uint8)])
    Image.fromarray(opaque).save(tmp_path / "opaque.png")
    np.testing.assert_array_equal(read_image(tmp_path / "opaque.png"), RGB8)
    opaque[0, 0, 3] = 9
    Image.fromarray(opaque).save(tmp_path / "transparent.png")
    with pytest.raises(BadImage, match="4 channels"):
        standardise(read_image(tmp_path / "transparent.png"))


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif", ".npz"])
@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty"])
def test_a_damaged_file_is_refused_and_never_half_read(tmp_path: Path, suffix: str, damage: str) -> None:
    path = tmp_path / f"image{suffix}"
    if suffix == ".npz":
        np.savez(path, GREY8)
    else:
        Image.fromarray(GREY8).save(path)
    whole = path.read_bytes()
    path.write_bytes(
        {"truncated": whole[: len(whole) * 2 // 3], "garbage": b"not an image" * 20, "empty": b""}[damage]
    )
    with pytest.raises(BadImage) as caught:
        read_image(path)
    assert caught.value.kind == "cannot be read"


def test_a_flipped_byte_in_a_png_is_noticed(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.fromarray(GREY8).save(buffer, format="PNG")
    damaged = bytearray(buffer.getvalue())
    damaged[len(damaged) // 2] ^= 0xFF
    (tmp_path / "flipped.png").write_bytes(damaged)
    with pytest.raises(BadImage):
        read_image(tmp_path / "flipped.png")


COMPRESSIONS = ["raw", "tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg"]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_a_tiff_with_any_flipped_byte_is_an_image_or_refused(tmp_path: Path, compression: str) -> None:
    rng = np.random.default_rng(COMPRESSIONS.index(compression))
    Image.fromarray(GREY8).save(tmp_path / "a.tif", compression=compression)
    whole = (tmp_path / "a.tif").read_bytes()
    refused = 0
    for place in rng.choice(len(whole), 120):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(rng.integers(8))
        (tmp_path / "b.tif").write_bytes(damaged)
        try:
            standardise(read_image(tmp_path / "b.tif"))
        except BadImage:
            refused += 1
    assert refused > 5


def test_a_tiff_with_a_checksum_is_right_or_refused(tmp_path: Path) -> None:
    Image.fromarray(GREY8).save(tmp_path / "a.tif", compression="tiff_adobe_deflate")
    whole = (tmp_path / "a.tif").read_bytes()
    with tifffile.TiffFile(tmp_path / "a.tif") as file:
        start, size = file.pages[0].dataoffsets[0], file.pages[0].databytecounts[0]
    refused = 0
    for place in range(start, start + size):
        damaged = bytearray(whole)
        damaged[place] ^= 0x10
        (tmp_path / "b.tif").write_bytes(damaged)
        try:
            np.testing.assert_array_equal(read_image(tmp_path / "b.tif"), GREY8)
        except BadImage:
            refused += 1
    assert refused > 0


def test_a_broken_lzw_strip_does_not_become_half_an_image(tmp_path: Path) -> None:
    Image.fromarray(GREY8).save(tmp_path / "a.tif", compression="tiff_lzw")
    whole = bytearray((tmp_path / "a.tif").read_bytes())
    with tifffile.TiffFile(tmp_path / "a.tif") as file:
        middle = file.pages[0].dataoffsets[0] + file.pages[0].databytecounts[0] // 2
    whole[middle : middle + 3] = b"\xff\xff\xff"  # codes that are not in the table yet
    (tmp_path / "b.tif").write_bytes(whole)
    with pytest.raises(BadImage, match="cannot be read"):
        read_image(tmp_path / "b.tif")


def test_a_header_that_asks_for_all_memory_is_refused(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", GREY8, photometric="minisblack")
    with tifffile.TiffFile(tmp_path / "a.tif", mode="r+b") as file:
        for name in ("ImageWidth", "ImageLength"):
            file.pages[0].tags[name].overwrite(1 << 16)
    with pytest.raises(BadImage, match="more than"):
        read_image(tmp_path / "a.tif")


def test_images_without_pixels_and_floats_with_alpha_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadImage, match="no pixels"):
        standardise(np.zeros((0, 4), np.float32))
    np.savez(tmp_path / "a.npz", np.zeros((2, 2, 4)))
    with pytest.raises(BadImage, match="4 channels"):
        standardise(read_image(tmp_path / "a.npz"))


def test_several_pages_are_no_single_image(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "stack.tif", np.zeros((5, 8, 8), np.uint8), photometric="minisblack")
    with pytest.raises(BadImage, match="5 pages"):
        read_image(tmp_path / "stack.tif")


@pytest.mark.parametrize("name", ["a.dcm", "a.nii", "A.NII.GZ"])
def test_medical_formats_are_told_apart_from_unknown_ones(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=r"is a \.(dcm|nii|nii\.gz) file, which this version does not read"):
        read_image(tmp_path / name)


def test_an_unknown_suffix_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"suffix '.bmp', which is not read; use one of .png, .jpg"):
        read_image(tmp_path / "a.bmp")


def test_standard_images_have_channels_first_in_their_own_depth() -> None:
    for pixels in (GREY8, GREY16):
        np.testing.assert_array_equal(standardise(pixels), pixels[None])
    for pixels in (RGB8, RGB16):
        image = standardise(pixels)
        assert image.flags.c_contiguous
        np.testing.assert_array_equal(image, pixels.transpose(2, 0, 1))


def test_grey_becomes_colour_and_back_without_change() -> None:
    for pixels in (GREY8, GREY16):
        colour = standardise(pixels, channels=3)
        assert colour.shape == (3, 13, 17)
        np.testing.assert_array_equal(standardise(colour.transpose(1, 2, 0), channels=1), pixels[None])


def test_colours_become_their_luminance() -> None:
    expected = RGB8.astype(np.float64) @ [0.299, 0.587, 0.114]
    assert np.abs(standardise(RGB8, channels=1)[0] - expected).max() <= 0.51


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("channels", [1, 3])
def test_shrinking_averages_areas(dtype: type, channels: int) -> None:
    pixels = RNG.integers(0, np.iinfo(dtype).max, (12, 20, channels)).astype(dtype)
    expected = pixels.reshape(4, 3, 5, 4, channels).astype(np.float64).mean((1, 3)).transpose(2, 0, 1)
    assert np.abs(standardise(pixels, size=(4, 5)) - expected).max() <= 0.51


def test_one_side_may_shrink_while_the_other_grows() -> None:
    ramp = np.repeat(np.array([[0, 200]], np.uint8), 40, axis=0)  # 40×2, constant down the columns
    image = standardise(ramp, size=(5, 8))[0]
    assert image.shape == (5, 8)
    assert (image == image[0]).all()
    assert (np.diff(image[0].astype(int)) >= 0).all()
    assert (image[0, 0], image[0, -1]) == (0, 200)


@given(
    st.integers(0, 255),
    st.tuples(st.integers(1, 9), st.integers(1, 9)),
    st.tuples(st.integers(1, 9), st.integers(1, 9)),
)
def test_resizing_keeps_a_flat_image_flat(
    level: int, before: tuple[int, int], after: tuple[int, int]
) -> None:
    assert (standardise(np.full(before, level, np.uint8), size=after) == level).all()


def test_numbers_from_zero_to_one_are_stored_in_16_bits() -> None:
    image = standardise(np.array([[0.0, 0.25], [0.5, 1.0]], np.float32))
    assert image.dtype == np.uint16
    np.testing.assert_array_equal(image[0], [[0, 16384], [32768, 65535]])


@pytest.mark.parametrize(
    ("pixels", "found"),
    [
        (np.array([[0.1, np.nan]]), "NaN or infinite"),
        (np.array([[0.1, np.inf]]), "NaN or infinite"),
        (np.array([[-0.5, 2.0]]), "from -0.5 to 2"),
        (np.array([[1, 2]], np.int16), "type int16"),
        (np.array([[True]]), "type bool"),
        (np.zeros((2, 2, 5), np.uint8), "5 channels"),
        (np.zeros((2, 2, 2, 1), np.uint8), "4 dimensions"),
    ],
)
def test_pixels_that_cannot_be_stored_are_refused(pixels: np.ndarray, found: str) -> None:
    with pytest.raises(BadImage, match=found):
        standardise(pixels)


@pytest.mark.parametrize("inside", [1, 255, True])
def test_a_mask_becomes_zero_and_one(inside: int) -> None:
    mask = (GREY8 > 128) * np.array(inside)
    read = standardise_mask(mask, None, (13, 17))
    assert read.dtype == np.uint8
    np.testing.assert_array_equal(read, GREY8 > 128)
    np.testing.assert_array_equal(standardise_mask(np.dstack([mask] * 3), None, (13, 17)), GREY8 > 128)


def test_a_shrunk_mask_holds_where_half_of_the_area_is_inside() -> None:
    mask = np.zeros((4, 4), np.uint8)
    mask[:2, :2] = 255  # all of the first block
    mask[0, 2:] = 255  # half of the second
    mask[2, 0] = 255  # a quarter of the third
    np.testing.assert_array_equal(standardise_mask(mask, (2, 2), (2, 2)), [[1, 1], [0, 0]])


def test_label_maps_and_wrong_sizes_are_no_masks() -> None:
    with pytest.raises(BadImage, match="3 different values"):
        standardise_mask(np.array([[0, 1, 2]]), None, (1, 3))
    with pytest.raises(BadImage, match="size 1×3"):
        standardise_mask(np.array([[0, 1, 1]]), None, (3, 3))

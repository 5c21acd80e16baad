"""Outlines lie inside their masks, are as wide as stated, and leave every other pixel of the image alone."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cfssl.errors import UserError
from cfssl.visualise.outlines import WIDTH, Side, colour, outline_sheet, outlined

FACTOR = 4  # of images of 32 pixels


def images(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 1, 32, 32), dtype=np.uint8)


def squares(*corners: int) -> np.ndarray:
    """(n, 32, 32): squares of 8 pixels, from these places on down and right."""
    masks = np.zeros((len(corners), 32, 32), np.uint8)
    for mask, corner in zip(masks, corners, strict=True):
        mask[corner : corner + 8, corner : corner + 8] = 1
    return masks


def test_an_outline_covers_the_rim_of_its_mask_alone() -> None:
    (image,), (mask,) = images(1), squares(10)
    plain = np.repeat(np.repeat(image[0], FACTOR, 0), FACTOR, 1)
    drawn = outlined(image, mask[None], [2])
    first, last = 10 * FACTOR, 18 * FACTOR
    rows, columns = np.indices(plain.shape)
    inside = (rows >= first) & (rows < last) & (columns >= first) & (columns < last)
    depth = np.minimum.reduce([rows - first, last - 1 - rows, columns - first, last - 1 - columns])
    rim = inside & (depth < WIDTH)
    assert (drawn[rim] == colour(2)).all()
    np.testing.assert_array_equal(drawn[~rim], np.stack([plain[~rim]] * 3, axis=1))


def test_a_mask_that_leaves_the_image_has_no_outline_there() -> None:
    drawn = outlined(np.zeros((1, 32, 32), np.uint8), np.ones((1, 32, 32), np.uint8), [0])
    assert not drawn.any()


def test_a_sheet_shows_both_sides_with_what_they_are_compared_with(tmp_path: Path) -> None:
    shown, found, own = images(4), squares(2, 4, 6, 8)[:, None], squares(12, 14, 16, 18)[:, None]
    own[3] = 0  # has none
    sides = [
        Side(name, shown[part], found[part], own[part], ["row"] * 2, ["sure"] * 2)
        for name, part in (("most", slice(0, 2)), ("least", slice(2, 4)))
    ]
    outline_sheet(tmp_path / "sheet.png", sides, ["heart"], ["heart"])
    with Image.open(tmp_path / "sheet.png") as picture:
        sheet = np.asarray(picture.convert("RGB"))
    found_at = []
    for image, silver, gold in zip(shown, found, own, strict=True):
        tiles = [
            outlined(image, masks, [0][: len(masks)])
            for masks in (silver[:0], silver, gold)
            if masks.any() or not len(masks)
        ]
        found_at.append([only_place(sheet, tile) for tile in tiles])
    assert [len(places) for places in found_at] == [3, 3, 3, 2]
    tops = [{y for y, _ in places} for places in found_at]
    assert tops[0] == tops[2] != tops[1] == tops[3]  # ranks are lines, sides are columns
    lefts = [[x for _, x in places] for places in found_at]
    assert lefts[0] == lefts[1] == sorted(lefts[0])
    assert lefts[2] == sorted(lefts[2])
    assert max(lefts[0]) < min(lefts[2])
    assert lefts[3] == lefts[2][:2]


def only_place(sheet: np.ndarray, tile: np.ndarray) -> tuple[int, int]:
    """(top, left) of the one exact copy of a tile."""
    height, width = tile.shape[:2]
    starts = np.argwhere((sheet[: 1 - height, : 1 - width] == tile[0, 0]).all(2))
    (place,) = [(y, x) for y, x in starts.tolist() if (sheet[y : y + height, x : x + width] == tile).all()]
    return place


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="give a mask per colour, of its size"):
        outlined(images(1)[0], squares(2, 4), [0])
    side = Side("one", images(1), squares(2)[:, None], None, ["row"], ["sure"])
    other = Side("two", images(2), squares(2, 4)[:, None], None, ["row"] * 2, ["sure"] * 2)
    with pytest.raises(UserError, match=r"have \[1, 2\] images; give as many to each"):
        outline_sheet(tmp_path / "sheet.png", [side, other], ["heart"])

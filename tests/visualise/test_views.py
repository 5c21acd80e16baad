"""Sheets show the pixels they were given, at the place that their headings and labels say."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from matplotlib.font_manager import FontProperties
from PIL import Image

from cfssl.data.views import ViewBatch
from cfssl.errors import UserError
from cfssl.visualise import COLOURS
from cfssl.visualise.layout import GAP, fitted, text_width
from cfssl.visualise.views import (
    HATCH,
    REAL,
    contact_sheet,
    counterfactual_sheet,
    difference_limit,
    view_grid,
)

SIDE, FACTOR = 32, 4  # tiles of 128 pixels


def pixels_of(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))


def enlarged(image: np.ndarray) -> np.ndarray:
    """(C, H, W) uint8 -> (FACTOR H, FACTOR W, 3), by another way than the code's."""
    picture = image.transpose(1, 2, 0) if len(image) == 3 else np.stack([image[0]] * 3, axis=2)
    size = tuple(FACTOR * side for side in image.shape[:0:-1])
    return np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.NEAREST))


def places(sheet: np.ndarray, picture: np.ndarray) -> list[tuple[int, int]]:
    """(top, left) of every exact copy of `picture`, found by looking everywhere."""
    height, width = picture.shape[:2]
    starts = sheet[: len(sheet) - height + 1, : sheet.shape[1] - width + 1] == picture[0, 0]
    ends = sheet[height - 1 :, width - 1 :] == picture[-1, -1]
    corners = np.argwhere(starts.all(axis=2) & ends.all(axis=2))
    return [(y, x) for y, x in corners.tolist() if (sheet[y : y + height, x : x + width] == picture).all()]


def only_place(sheet: np.ndarray, image: np.ndarray) -> tuple[int, int]:
    (place,) = places(sheet, enlarged(image))
    return place


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*shape, SIDE, SIDE), dtype=np.uint8)


@pytest.mark.parametrize("channels", [1, 3])
def test_every_image_stands_exactly_in_its_row_and_column(tmp_path: Path, channels: int) -> None:
    images = noise(2, 3, channels)
    labels = ["$unclosed_{$", "a label much longer than its tile is wide"]
    contact_sheet(tmp_path / "sheet.png", images, ["A", "B", "C"], labels)
    sheet = pixels_of(tmp_path / "sheet.png")
    found = np.array([[only_place(sheet, image) for image in row] for row in images])  # (2, 3, [top, left])
    assert (found[:, 0, 0] == found[:, 2, 0]).all()
    assert (found[0, :, 1] == found[1, :, 1]).all()
    assert (np.diff(found[:, 0, 0]) >= FACTOR * SIDE).all()
    assert (np.diff(found[0, :, 1]) >= FACTOR * SIDE).all()


def test_all_depths_of_one_image_look_the_same(tmp_path: Path) -> None:
    image = noise(1)
    depths = [image, image.astype(np.uint16) * 257, image.astype(np.float32) / 255, image[0]]
    contact_sheet(tmp_path / "sheet.png", [depths], ["8", "16", "float", "flat"])
    assert len(places(pixels_of(tmp_path / "sheet.png"), enlarged(image))) == 4


def test_a_missing_image_leaves_its_place_grey(tmp_path: Path) -> None:
    images = noise(2, 1)
    contact_sheet(tmp_path / "sheet.png", [[images[0], None, images[1]]], ["A", "B", "C"])
    sheet = pixels_of(tmp_path / "sheet.png")
    (top, first), (_, last) = only_place(sheet, images[0]), only_place(sheet, images[1])
    middle = sheet[top : top + FACTOR * SIDE, (first + last) // 2 : (first + last) // 2 + FACTOR * SIDE]
    assert (middle == middle[0, 0]).all()
    assert 200 < middle[0, 0, 0] < 250


def test_difference_maps_are_red_above_blue_below_and_pale_without_change(tmp_path: Path) -> None:
    first = np.full((1, SIDE, SIDE), 128, np.uint8)
    first[0, ::2] = 100
    same, brighter, darker = first.copy(), first + np.uint8(51), first - np.uint8(51)
    path = tmp_path / "sheet.png"
    contact_sheet(path, [[first, same, brighter, darker]], ["a", "b", "c", "d"], differences=True)
    sheet = pixels_of(path)
    top, left = min(places(sheet, enlarged(first)))
    below = top + FACTOR * SIDE + GAP
    maps = []
    for _, x in [
        *sorted(places(sheet, enlarged(same)))[1:],
        only_place(sheet, brighter),
        only_place(sheet, darker),
    ]:
        assert x > left
        maps.append(sheet[below : below + FACTOR * SIDE, x : x + FACTOR * SIDE].astype(int))
    pale, red, blue = maps
    assert all((entry == entry[0, 0]).all() for entry in maps)
    assert pale.min() > 235
    assert red[0, 0, 0] > red[0, 0, 2] + 60
    assert blue[0, 0, 2] > blue[0, 0, 0] + 60


def test_the_colour_scale_ends_where_98_percent_of_the_changes_lie() -> None:
    assert difference_limit([np.full((10, 10), -0.237)]) == 0.24
    assert difference_limit([np.full((10, 10), 0.24)]) == 0.24
    outlier = np.full((20, 20), 0.1)
    outlier[0, 0] = 0.9
    assert difference_limit([outlier]) == 0.1
    assert difference_limit([np.zeros((4, 4))]) == difference_limit([]) == 0.01


def test_each_counterfactual_stands_between_its_original_and_its_truth(tmp_path: Path) -> None:
    originals, counterfactuals, truths = noise(2, 1), noise(2, 2, 1, seed=1), noise(2, 2, 1, seed=2)
    available = np.array([[False, True], [True, True]])
    path = tmp_path / "sheet.png"
    names, factual = ["do(scanner=A)", "do(scanner=B)"], ["p1\nscanner=A", "p2\nscanner=C"]
    counterfactual_sheet(path, originals, counterfactuals, truths, names, factual, available)
    sheet = pixels_of(path)
    for patient in range(2):
        top, left = only_place(sheet, originals[patient])
        for slot in range(2):
            images = counterfactuals[patient, slot], truths[patient, slot]
            if not available[patient, slot]:
                assert not any(places(sheet, enlarged(image)) for image in images)
                continue
            found = [only_place(sheet, image) for image in images]
            assert found[0][0] == found[1][0] == top
            assert left < found[0][1] < found[1][1]
            left = found[1][1]
    counterfactual_sheet(path, originals, counterfactuals, None, names, factual)
    sheet = pixels_of(path)
    assert only_place(sheet, counterfactuals[0, 0])[0] == only_place(sheet, originals[0])[0]


def a_batch(slots: np.ndarray, valid: np.ndarray, images: np.ndarray) -> ViewBatch:
    count, views = slots.shape
    return ViewBatch(
        images=torch.from_numpy(images).float() / 255,
        is_counterfactual=torch.from_numpy(slots > 0),
        slot=torch.from_numpy(slots),
        affine=torch.zeros(count, views, 2, 3),
        valid=torch.from_numpy(valid),
        attributes={},
        row=torch.arange(count) + 70,
        position=tuple(range(count)),
    )


def test_frames_tell_real_from_each_intervention_and_only_invalid_pixels_are_hatched(tmp_path: Path) -> None:
    slots = np.array([[0, 2], [1, 0], [2, 1]])
    images = noise(3, 2, 1)
    valid = np.ones((3, 2, SIDE, SIDE), dtype=bool)
    valid[1, 1, :, : SIDE // 2] = False
    path = tmp_path / "sheet.png"
    view_grid(path, a_batch(slots, valid, images), ["real", "do(scanner=A)", "do(scanner=B)"], items=2)
    sheet = pixels_of(path)
    for item, view in [(0, 0), (0, 1), (1, 0)]:
        top, left = only_place(sheet, images[item, view])
        colour = COLOURS[slots[item, view] - 1] if slots[item, view] else REAL
        assert sheet[top - 1, left - 1].tolist() == np.rint(255 * np.array(to_rgb(colour))).tolist()
    assert not any(places(sheet, enlarged(image)) for image in images[2])  # beyond `items`
    top, left = only_place(sheet, images[1, 0])
    half = FACTOR * SIDE // 2
    (place,) = places(sheet, enlarged(images[1, 1])[:, half:])
    hatched = sheet[place[0] : place[0] + 2 * half, place[1] - half : place[1]]
    stripes = (hatched == HATCH).all(axis=2)
    assert place[0] == top
    assert place[1] > left
    assert 0.1 < stripes.mean() < 0.5
    assert (hatched == enlarged(images[1, 1])[:, :half])[~stripes].all()


def test_local_views_stand_after_the_global_ones_smaller_and_framed_alike(tmp_path: Path) -> None:
    side, factor = 16, 6  # tiles of 96 pixels beside those of 128
    slots = np.array([[0, 2], [1, 0]])
    images = noise(2, 2, 1)
    local_slots = np.array([[0, 0, 2], [1, 0, 1]])
    local_images = np.random.default_rng(5).integers(0, 256, (2, 3, 1, side, side), dtype=np.uint8)
    local = a_batch(local_slots, np.ones((2, 3, side, side), bool), local_images)
    batch = replace(a_batch(slots, np.ones((2, 2, SIDE, SIDE), bool), images), local=local)
    path = tmp_path / "sheet.png"
    names = ["real", "do(scanner=A, sex=F)", "do(scanner=B, sex=F)"]
    view_grid(path, batch, names)
    sheet = pixels_of(path)
    for item in range(2):
        tops, lefts = zip(*(only_place(sheet, image) for image in images[item]), strict=True)
        end = lefts[-1] + FACTOR * SIDE
        for view, slot in enumerate(local_slots[item]):
            flat = np.repeat(local_images[item, view], 3, axis=0).transpose(1, 2, 0)
            ((top, left),) = places(sheet, flat.repeat(factor, axis=0).repeat(factor, axis=1))
            assert top == tops[0] == tops[1]
            assert left > end
            colour = COLOURS[slot - 1] if slot else REAL
            assert sheet[top - 1, left - 1].tolist() == np.rint(255 * np.array(to_rgb(colour))).tolist()
            assert (sheet[top : top + factor * side, left + factor * side + 4] == 255).all()  # no overlap
            end = left + factor * side
    with pytest.raises(UserError, match="slot 2"):
        view_grid(path, replace(batch, slot=batch.slot * 0), names[:2])


def test_long_labels_keep_their_two_ends_and_fit() -> None:
    font = FontProperties(size=8)
    short = fitted("do(manufacturer=Siemens Healthineers)", 110, font)
    assert short.startswith("do(ma")
    assert short.endswith("ers)")
    assert text_width(short, font) <= 110 < text_width("do(manufacturer=Siemens Healthineers)", font)
    assert fitted("do(scanner=B)", 400, font) == "do(scanner=B)"


IMAGE = np.zeros((1, 8, 8), np.uint8)


@pytest.mark.parametrize(
    ("rows", "columns", "options", "message"),
    [
        ([], ["A"], {}, "0 rows"),
        ([[IMAGE]], ["A", "B"], {}, "Row 0 has 1 images for 2 columns"),
        ([[IMAGE]], ["A"], {"row_labels": []}, "0 row labels for 1 rows"),
        ([[IMAGE]], ["A"], {"groups": [("g", 2)]}, "do not add up to 1 columns"),
        ([[IMAGE, IMAGE[:, :4]]], ["A", "B"], {}, "sizes"),
        ([[None]], ["A"], {}, "at least one"),
        ([[np.zeros((2, 8, 8), np.uint8)]], ["A"], {}, r"\(2, 8, 8\)"),
        ([[IMAGE.astype(np.int64)]], ["A"], {}, "int64"),
        ([[IMAGE - 0.5]], ["A"], {}, "from -0.5 to -0.5"),
        ([[IMAGE + np.nan]], ["A"], {}, "nan"),
    ],
)
def test_what_cannot_be_shown_is_named(tmp_path: Path, rows, columns, options, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UserError, match=message):
        contact_sheet(tmp_path / "sheet.png", rows, columns, **options)
    assert not list(tmp_path.iterdir())


def test_counterfactuals_and_slots_without_a_name_are_refused(tmp_path: Path) -> None:
    originals, counterfactuals = noise(2, 1), noise(2, 2, 1)
    with pytest.raises(UserError, match="names"):
        counterfactual_sheet(
            tmp_path / "a.png", originals, counterfactuals, None, ["do(scanner=A)"], ["x", "y"]
        )
    with pytest.raises(UserError, match="truths"):
        counterfactual_sheet(
            tmp_path / "a.png", originals, counterfactuals, originals, ["a", "b"], ["x", "y"]
        )
    batch = a_batch(np.array([[0, 2]]), np.ones((1, 2, SIDE, SIDE), bool), noise(1, 2, 1))
    with pytest.raises(UserError, match="slot 2"):
        view_grid(tmp_path / "a.png", batch, ["real", "do(scanner=A)"])

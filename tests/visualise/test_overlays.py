"""Overlays tint what was found, outline what is true, and show the image elsewhere."""

from pathlib import Path

import numpy as np
from matplotlib.colors import to_rgb
from PIL import Image

from cfssl.seeds import numpy_generator
from cfssl.visualise import COLOURS
from cfssl.visualise.overlays import TINT, Case, overlay_sheet, painted


def case(line: str = "best") -> Case:
    image = numpy_generator("overlay").integers(0, 256, (1, 64, 64), dtype=np.uint8)
    found, true = np.zeros((2, 2, 64, 64), dtype=bool)
    found[0, 10:30, 10:30] = true[0, 12:40, 12:40] = true[1, 50:60, 50:60] = True
    return Case(line, "row 3, 0.700", image, true, found)


def test_pixels_have_the_colours_of_what_is_there() -> None:
    one = case()
    shown = painted(one)
    assert shown.shape == (128, 128, 3)  # enlarged by two
    first, second = (255 * np.array(to_rgb(colour)) for colour in COLOURS[:2])
    grey = one.image[0].repeat(2, 0).repeat(2, 1).astype(float)
    for row, column, expected in (
        (4, 4, grey[4, 4]),  # nothing
        (22, 22, grey[22, 22] + TINT * (first - grey[22, 22])),  # found alone
        (24, 40, first),  # the line of the truth
        (25, 40, first),
        (26, 70, grey[26, 70]),
        (70, 70, grey[70, 70]),  # inside of the truth, not found
        (100, 110, second),
    ):
        np.testing.assert_allclose(shown[row, column], np.broadcast_to(expected, 3), atol=1)


def test_a_sheet_has_a_line_for_each_kind_of_case(tmp_path: Path) -> None:
    cases = [case("best"), case("best"), case("worst")]
    overlay_sheet(tmp_path / "three.png", cases, ("lung", "heart"), "lung")
    overlay_sheet(tmp_path / "two.png", cases[:2], ("lung", "heart"), "lung")
    three, two = (Image.open(tmp_path / name).size for name in ("three.png", "two.png"))
    assert three[0] == two[0]
    assert three[1] - two[1] > 128

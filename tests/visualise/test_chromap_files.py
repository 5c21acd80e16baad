"""The folder of a CHRO-map holds what its arrays say, and turns onto the colours of another one."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chromap_toys import CHANNELS, SIZE, smooth, some_views
from PIL import Image
from scipy.stats import ortho_group

from cfssl.errors import UserError
from cfssl.files import read_json
from cfssl.visualise.chromap import ChromapSettings, colorize, fit, is_foreground, load, overlay, transform
from cfssl.visualise.chromap_consistency import consistency
from cfssl.visualise.chromap_figure import Colours, color_wheel, contoured, draw_figure
from cfssl.visualise.chromap_files import chromaps
from cfssl.visualise.chromap_views import Views

NAMES = ["factual", "do(scanner=B)", "do(scanner=C)"]


def arrays_of(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as content:
        return dict(content)


def test_the_folder_holds_state_arrays_pictures_page_and_numbers(tmp_path: Path) -> None:
    images = [some_views(seed, names=NAMES) for seed in (0, 1)]
    report = chromaps(tmp_path, images, names=["p1", "p2"])
    assert report == read_json(tmp_path / "chromap.json")
    state = load(tmp_path / "state.safetensors")
    assert state.name == report["state"] == fit(images).name
    for index, (name, views) in enumerate(zip(("p1", "p2"), images, strict=True)):
        found = arrays_of(tmp_path / f"image-{index:03d}.npz")
        places, foreground = transform(state, views.embeddings), is_foreground(state, views.embeddings)
        np.testing.assert_allclose(found["coordinates"], places, atol=1e-6)
        expected = np.rint(255 * overlay(state, places, views.images, foreground))
        assert (found["overlay"] == expected).all()
        assert report["images"][name] == consistency(state, views)
        with Image.open(tmp_path / f"image-{index:03d}.png") as picture:
            assert min(picture.size) > 600
    assert "p2" in (tmp_path / "chromap.html").read_text(encoding="utf-8")
    assert report["page"]["error"] < 0.01


def test_the_same_images_give_the_same_files(tmp_path: Path) -> None:
    for name in ("a", "b"):
        chromaps(tmp_path / name, [some_views(names=NAMES)])
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert len(files) == 5
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_another_model_takes_the_colours_of_its_reference(tmp_path: Path) -> None:
    views, settings = some_views(), ChromapSettings(foreground="all")
    turn = ortho_group.rvs(CHANNELS, random_state=5)
    turned = replace(views, embeddings=np.einsum("dc,vchw->vdhw", turn, views.embeddings))
    chromaps(tmp_path / "first", [views], settings)
    chromaps(tmp_path / "second", [turned], settings, reference=tmp_path / "first")
    first, second = (
        arrays_of(tmp_path / name / "image-000.npz")["colours"].astype(int) for name in ("first", "second")
    )
    assert np.abs(first - second).max() <= 2
    with pytest.raises(UserError, match="as many coordinates"):
        chromaps(tmp_path / "x", [views], replace(settings, colours="rgb3"), reference=tmp_path / "first")
    with pytest.raises(UserError, match="does not exist"):
        chromaps(tmp_path / "x", [views, views], settings, reference=tmp_path / "first")


def test_volumes_are_written_as_nifti_voxel_by_voxel(tmp_path: Path) -> None:
    nibabel = pytest.importorskip("nibabel", reason="nibabel is not installed: pip install 'cfssl[nifti]'")
    size = (3, *SIZE)
    volume = Views(np.moveaxis(smooth(2, 3, CHANNELS, *SIZE), 1, 2), np.full((2, *size), 0.5, np.float32))
    world = np.diag([3.0, 1, 1, 1])
    report = chromaps(tmp_path, [volume], world=world)
    assert "page" not in report
    found = arrays_of(tmp_path / "image-000.npz")
    for view in range(2):
        colours = nibabel.load(tmp_path / f"image-000-view-{view}-overlay.nii")
        voxels = np.asanyarray(colours.dataobj)
        shown = np.stack([voxels[channel] for channel in "RGB"], axis=-1)
        assert (shown == found["overlay"][view]).all()
        assert (colours.affine == world).all()
        places = nibabel.load(tmp_path / f"image-000-view-{view}-coordinates.nii")
        np.testing.assert_array_equal(np.asanyarray(places.dataobj), found["coordinates"][view])


def test_the_figure_shows_every_view_with_its_exact_colours(tmp_path: Path) -> None:
    views = some_views(names=NAMES)
    state = fit([views])
    places = transform(state, views.embeddings)
    colours = Colours(colorize(state, places), overlay(state, places, views.images))
    draw_figure(tmp_path / "figure.png", state, views, colours, consistency(state, views))
    with Image.open(tmp_path / "figure.png") as picture:
        sheet = np.asarray(picture.convert("RGB"))
    factor = -(-200 // min(SIZE))
    for pixels in (*colours.flat, *colours.overlay):
        tile = np.rint(255 * pixels).astype(np.uint8).repeat(factor, axis=0).repeat(factor, axis=1)
        height, width = tile.shape[:2]
        corners = (sheet[: 1 - height, : 1 - width] == tile[0, 0]) & (
            sheet[height - 1 :, width - 1 :] == tile[-1, -1]
        )
        assert any(
            (sheet[y : y + height, x : x + width] == tile).all() for y, x in np.argwhere(corners.all(axis=2))
        )


def test_a_contour_is_white_inside_its_class_black_outside_and_leaves_the_rest() -> None:
    mask = np.zeros((30, 30), int)
    mask[10:20, 8:25] = 3
    pixels = np.full((30, 30, 3), 90, np.uint8)
    shown = contoured(pixels, mask, [3])[..., 0]
    edge = np.zeros(mask.shape, bool)
    edge[10:20, 8:25], edge[11:19, 9:24] = True, False
    assert (shown[edge] == 255).all()
    assert set(shown[(mask == 3) & ~edge].tolist()) == {90}
    assert (shown[9, 8:25] == 30).all()
    assert set(np.unique(shown[mask == 0]).tolist()) == {30, 90}


@pytest.mark.parametrize("colours", ["oklch", "hsv"])
def test_the_wheel_shows_the_colours_of_its_places(colours: Any) -> None:
    settings = ChromapSettings(colours=colours, squash=colours == "oklch")
    state = fit([some_views()], settings)
    wheel = color_wheel(state, side=201)
    middle, right, up = wheel[100, 100], wheel[100, 150], wheel[50, 100]
    place = 1.0 if settings.squash else 0.5  # half way to the rim
    expected = colorize(state, np.array([[0.0, 0], [place, 0], [0, place]], np.float32))
    np.testing.assert_allclose(np.stack([middle, right, up]), expected, atol=0.03)
    assert (wheel[0, 0] == 1).all()

"""Everything a CHRO-map leaves behind, in one folder.

Enters: the views of images. Leaves: `state.safetensors`; per image a figure (PNG), its arrays (NPZ) and, of a
volume, overlays and coordinates as NIfTI; `chromap.html`, the interactive page; `chromap.json`, the numbers.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cfssl.errors import UserError
from cfssl.files import atomic_path, write_json
from cfssl.visualise.chromap import (
    PRESETS,
    ChromapSettings,
    State,
    align,
    colorize,
    fit,
    is_foreground,
    overlay,
    save,
    transform,
)
from cfssl.visualise.chromap_consistency import consistency, overall
from cfssl.visualise.chromap_figure import Colours, as_bytes, draw_figure
from cfssl.visualise.chromap_page import Shown, write_page
from cfssl.visualise.chromap_views import Views

RGB = np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")])  # the voxels of a coloured NIfTI


def chromaps(
    folder: Path,
    images: Sequence[Views],
    settings: ChromapSettings = PRESETS["default"],
    state: State | None = None,
    reference: Path | None = None,
    names: Sequence[str] = (),
    class_names: Mapping[int, str] | None = None,
    page_images: int = 3,
    world: np.ndarray | None = None,
) -> dict[str, Any]:
    """Writes all files of `images` into `folder` and returns what chromap.json holds: state, settings,
    variance explained, and view consistency per image and over all.

    `state`: one that was fitted before, used as it is; else one is fitted. `reference`: the folder of another
    CHRO-map of the same images (another epoch, seed or model), onto whose colours this one is turned. `names`
    of the images, `class_names` of the masks' labels. The first `page_images` are on the page (none of
    volumes). `world` (4, 4): voxel indices -> millimetres, of volumes. Raises `UserError` when the reference
    shows other images, or nibabel is missing for volumes.
    """
    folder, names = Path(folder), list(names) or [f"image {index}" for index in range(len(images))]
    if len(names) != len(images):
        raise UserError(f"There are {len(names)} names for {len(images)} images; give one each.")
    if any(len(views.size) == 3 for views in images):
        _nibabel()  # before anything is computed
    state = fit(images, settings) if state is None else state
    places = [transform(state, views.unit) for views in images]
    if reference is not None:
        state = align(state, _joined(places), _joined(_coordinates_of(Path(reference), places)))
        places = [transform(state, views.unit) for views in images]
    save(state, folder / "state.safetensors")
    report: dict[str, Any] = {
        "state": state.name,
        "settings": state.plain_settings(),
        "explained": state.explained.tolist(),
        "images": {},
    }
    shown = []
    for index, (views, spots, name) in enumerate(zip(images, places, names, strict=True)):
        foreground = views.foreground if views.foreground is not None else is_foreground(state, views.unit)
        flat = colorize(state, spots, foreground)
        colours = Colours(flat, overlay(state, spots, views.images, foreground))
        entries = consistency(state, views, class_names)
        report["images"][name] = entries
        shown.append(Shown(name, views, colours.overlay, entries))
        stem = f"image-{index:03d}"
        title = f"CHRO-map of {name}"
        draw_figure(folder / f"{stem}.png", state, views, colours, entries, class_names, title)
        arrays = {
            "coordinates": spots,
            "foreground": np.asarray(foreground, dtype=np.float32),
            "colours": as_bytes(colours.flat),
            "overlay": as_bytes(colours.overlay),
        }
        with atomic_path(folder / f"{stem}.npz") as temporary, temporary.open("wb") as stream:
            np.savez_compressed(stream, allow_pickle=False, **arrays)
        if len(views.size) == 3:
            _write_nifti(folder, stem, arrays, np.eye(4) if world is None else world)
    report["consistency"] = overall([entry for entries in report["images"].values() for entry in entries])
    on_page = [image for image in shown if len(image.views.size) == 2][:page_images]
    if on_page:
        report["page"] = write_page(folder / "chromap.html", state, on_page, class_names)
    write_json(folder / "chromap.json", report)
    return report


def _coordinates_of(reference: Path, places: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Those that another CHRO-map has written for as many images of these sizes."""
    found = []
    for index, expected in enumerate(places):
        path = reference / f"image-{index:03d}.npz"
        if not path.exists():
            raise UserError(f"{path} does not exist; give the folder of a CHRO-map of the same images.")
        with np.load(path, allow_pickle=False) as content:
            found.append(content["coordinates"])
        if found[-1].shape != expected.shape:
            raise UserError(
                f"{path} has coordinates of shape {found[-1].shape}, expected {expected.shape}; give the "
                "folder of a CHRO-map of the same images, with as many coordinates."
            )
    return found


def _joined(places: Sequence[np.ndarray]) -> np.ndarray:
    """(pixels of all images, k)."""
    return np.concatenate([spots.reshape(-1, spots.shape[-1]) for spots in places])


def _nibabel() -> Any:
    """The library; raises `UserError` where it is missing."""
    try:
        import nibabel
    except ImportError:
        raise UserError(
            "CHRO-maps of volumes are written as NIfTI and nibabel is not installed; pip install "
            "'cfssl[nifti]'."
        ) from None
    return nibabel


def _write_nifti(folder: Path, stem: str, arrays: Mapping[str, np.ndarray], world: np.ndarray) -> None:
    """Per view its overlay in colour, and its coordinates; voxel (i, j, k) is array element [i, j, k]."""
    for view, (shown, spots) in enumerate(zip(arrays["overlay"], arrays["coordinates"], strict=True)):
        contents = {"overlay": np.ascontiguousarray(shown).view(RGB)[..., 0], "coordinates": spots}
        for kind, content in contents.items():
            with atomic_path(folder / f"{stem}-view-{view}-{kind}.nii") as temporary:
                temporary.write_bytes(_nibabel().Nifti1Image(content, world).to_bytes())

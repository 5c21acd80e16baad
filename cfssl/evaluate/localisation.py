"""Does a do() on the size of one region change that region, by the right amount, and nothing else?

What enters: areas that an independent segmentor measured (fractions of the image), what they should be, and
the images themselves. What leaves: values per image (N,), and JSON-ready tables with intervals. Variables are
the areas of structures or of their regions; in image n the do() set variable `intervened[n]`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from scipy.ndimage import distance_transform_edt

from cfssl.errors import UserError
from cfssl.evaluate.bootstrap import mean_figures, ratio_figures


def area_errors(
    measured: np.ndarray,
    wanted: np.ndarray,
    intervened: np.ndarray,
    names: Sequence[str],
    pixels: int,
    patients: np.ndarray | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Errors of the areas `measured` (N, V) in the counterfactuals against the `wanted` ones (N, V):

        {"target": of, "others": of, "names": {name: {"target": of, "others": of}}}
        of: {"percent": figure, "pixels": figure, "mape": figure}

    "target" speaks of the variable that was intervened on, "others" of the mean over all remaining ones. The
    mean absolute error comes in percent of the image and in pixels (an image has `pixels` of them);
    mape = |measured - wanted| / max(wanted, one pixel), a fraction. Null where a variable is never intervened
    on, or always.
    """
    measured, wanted = np.asarray(measured, np.float64), np.asarray(wanted, np.float64)
    if measured.shape != wanted.shape or measured.shape != (len(intervened), len(names)):
        raise ValueError(
            f"areas have shapes {measured.shape} and {wanted.shape}, expected {len(intervened), len(names)}"
        )
    if not (np.abs([measured, wanted]) <= 1).all():
        raise UserError(
            "An area is not between 0 and 1, expected fractions of the image; divide pixels by their number."
        )
    error = np.abs(measured - wanted)
    scales = {
        "percent": 100 * error,
        "pixels": pixels * error,
        "mape": error / np.maximum(wanted, 1 / pixels),
    }
    chosen = np.arange(len(names)) == np.asarray(intervened)[:, None]  # (N, V)
    rows: dict[tuple[str, str, str], np.ndarray] = {}
    for scale, values in scales.items():
        for role, among in (("target", chosen), ("others", ~chosen)):
            rows["", role, scale] = _row_mean(values, among)
            for place, name in enumerate(names):
                rows[name, role, scale] = np.where(among[:, place], values[:, place], np.nan)
    found = mean_figures(rows, patients, resamples, seed, "no image has such a variable")
    tables: dict[str, dict[str, Any]] = {name: {"target": {}, "others": {}} for name in ("", *names)}
    for (name, role, scale), entry in found.items():
        tables[name][role][scale] = entry
    return {**tables.pop(""), "names": tables}


def localisation_ratio(
    images: torch.Tensor, reference: torch.Tensor, target: torch.Tensor, reach: float = 2.0
) -> np.ndarray:
    """Share (B,) of the absolute change |images - reference| that lies in the target region or at most
    `reach` pixels away from it (Euclidean).

    images (B, C, *spatial); `reference` is the null intervention's decode of the same exogenous variables, so
    that the reconstruction error is in neither; `target` (B, *spatial) bool. NaN where nothing changes, as
    with a generator that copies its input: there is no change to localise.
    """
    if target.dtype != torch.bool or target.shape != images.shape[:1] + images.shape[2:]:
        raise ValueError(f"target is {target.dtype} {tuple(target.shape)} for images {tuple(images.shape)}")
    change = (images.double() - reference.double()).abs().sum(1).cpu().numpy()  # (B, *spatial)
    near = np.zeros(change.shape, bool)
    for place, mask in enumerate(target.cpu().numpy()):
        if mask.any():
            near[place] = distance_transform_edt(~mask) <= reach
    space = tuple(range(1, change.ndim))
    inside, whole = (change * near).sum(space), change.sum(space)
    return np.where(whole > 0, inside / np.where(whole > 0, whole, 1), np.nan)


def leakage(change: np.ndarray, intervened: np.ndarray, eps: float = 1e-6) -> np.ndarray:
    """How much the areas of the other regions of a structure change, per image (N,), in units of the change
    of the region `intervened` (N,) on: sum over r' != r of |dA_r'| / (|dA_r| + eps).

    `change` (N, R): dA of each region, as fractions of the image. Where the target itself does not change,
    this is huge; `localisation` reports the ratio of the sums over all images besides.
    """
    aside, along = _aside_and_along(change, intervened)
    return aside / (along + eps)


def localisation(
    ratio: np.ndarray,
    change: np.ndarray,
    intervened: np.ndarray,
    patients: np.ndarray | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """Figures {"value", "low", "high"} over all images: "localisation_ratio" (mean of `ratio` (N,); its
    "without" counts the images in which nothing changed) and "leakage" (sum over the images of the change of
    other regions over that of the intervened ones)."""
    aside, along = _aside_and_along(change, intervened)
    none = "nothing changed in any image"
    means = mean_figures({"localisation_ratio": ratio}, patients, resamples, seed, none)
    none = "the areas intervened on changed in no image"
    ratios: Mapping[str, dict[str, Any]] = ratio_figures(
        {"leakage": aside}, {"leakage": along}, patients, resamples, seed, none
    )
    return {**means, **ratios}


def _aside_and_along(change: np.ndarray, intervened: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    size = np.abs(np.asarray(change, np.float64))
    along = size[np.arange(len(size)), intervened]
    return size.sum(1) - along, along


def _row_mean(values: np.ndarray, among: np.ndarray) -> np.ndarray:
    """Mean over the chosen columns (N,), NaN where there is none."""
    counts = among.sum(1)
    return np.where(counts > 0, (values * among).sum(1) / np.maximum(counts, 1), np.nan)

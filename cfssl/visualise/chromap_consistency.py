"""Does a counterfactual view mean the same to the model, pixel by pixel?

Enters: a state and the views of an image. Leaves: for every view the mean cosine, and the mean distance of
colours in OKLab, between the factual view and this one on the pixels that both show; over all pixels and per
class. Embeddings of one image resemble each other anyway, so the same is computed for partners at shuffled
locations: only what lies between the two numbers says something.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cfssl.seeds import numpy_generator
from cfssl.visualise.chromap import State, colorize, coordinates
from cfssl.visualise.chromap_colour import to_oklab
from cfssl.visualise.chromap_views import Views, matched

FEWEST_PIXELS = 16
MEASURES = ("cosine", "cosine_shuffled", "colour", "colour_shuffled")


def consistency(
    state: State, views: Views, class_names: Mapping[int, str] | None = None, seed: int = 0
) -> list[dict[str, Any]]:
    """Per view after the first {"view", "pixels", the four MEASURES, "classes": {name: the same}}; measures
    are null for fewer than 16 pixels. Colours are those of `colorize`, without pale background."""
    found = []
    for view in range(1, len(views)):
        places, partners = matched(views, view)
        own = views.unit[0].reshape(partners.shape[1], -1)[:, places].T
        order = numpy_generator("chromap shuffle", seed, view).permutation(len(places))
        shown, others = (_lab(state, rows) for rows in (own, partners))
        values = {
            "cosine": np.einsum("nc,nc->n", own, partners),
            "cosine_shuffled": np.einsum("nc,nc->n", own, partners[order]),
            "colour": np.linalg.norm(shown - others, axis=1),
            "colour_shuffled": np.linalg.norm(shown - others[order], axis=1),
        }
        entry = {"view": views.name(view), **_means(values, np.ones(len(places), bool)), "classes": {}}
        if views.masks is not None:
            classes = np.asarray(views.masks)[0].ravel()[places]
            for label in np.unique(classes).tolist():
                entry["classes"][class_name(label, class_names)] = _means(values, classes == label)
        found.append(entry)
    return found


def class_name(label: int, names: Mapping[int, str] | None) -> str:
    """What the figures call a class of the masks."""
    return (names or {}).get(label, f"class {label}" if label else "background")


def overall(entries: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """The mean of every measure over views and images, null where no view has one."""
    known = {name: [entry[name] for entry in entries if entry[name] is not None] for name in MEASURES}
    return {name: float(np.mean(values)) if values else None for name, values in known.items()}


def _lab(state: State, rows: np.ndarray) -> np.ndarray:
    return to_oklab(colorize(state, coordinates(state, rows)))


def _means(values: Mapping[str, np.ndarray], chosen: np.ndarray) -> dict[str, Any]:
    count = int(chosen.sum())
    enough = count >= FEWEST_PIXELS
    means = {
        name: float(value[chosen].mean(dtype=np.float64)) if enough else None
        for name, value in values.items()
    }
    return {"pixels": count, **means}

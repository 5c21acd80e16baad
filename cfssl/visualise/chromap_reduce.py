"""From embeddings to the few coordinates that become colours: balanced samples, PCA, LDA and UMAP.

Enters: unit embeddings (n, C). Leaves: linear maps, or for UMAP the fitted pixels with their places.
"""

from dataclasses import dataclass

import numpy as np
import xxhash
from numpy.typing import NDArray

from cfssl.errors import UserError
from cfssl.seeds import numpy_generator
from cfssl.visualise.chromap_views import Views, rows_of

GREY_BINS = 8  # strata of pixels without masks
NEGLIGIBLE = 1e-10  # variance of unit embeddings that is rounding: float32 has 1e-7, squared
NEIGHBOURS = 15  # of UMAP, also for placing new pixels
DEVIATION_FLOOR = 1e-5  # in z-scores, as published


@dataclass(frozen=True)
class Linear:
    """scores = (x - mean) @ components.T, with mean (C,), components (k, C); `explained` (k,): shares of the
    variance (LDA: between classes; UMAP: none)."""

    mean: NDArray[np.float64]
    components: NDArray[np.float64]
    explained: NDArray[np.float64]

    def scores(self, rows: NDArray[np.float64]) -> NDArray[np.float64]:
        return (rows - self.mean) @ self.components.T


def sample_pixels(views: Views, count: int | None, seed: int) -> NDArray[np.int64]:
    """Places (at most `count`,) in the flattened (V, *size) of valid pixels: as many of every class, or of
    every range of grey levels where there are no masks; what a rare one lacks, the others share. None takes
    all.

    The draw depends on the seed and on what the image holds, not on where it stands among others.
    """
    places = np.flatnonzero(views.is_valid)
    if count is None or len(places) <= count:
        return places
    strata = (
        np.minimum((GREY_BINS * views.images.ravel()[places]).astype(np.int64), GREY_BINS - 1)
        if views.masks is None
        else np.asarray(views.masks).ravel()[places]
    )
    content = xxhash.xxh3_64_hexdigest(np.ascontiguousarray(views.embeddings).data)
    rng = numpy_generator("chromap", seed, content)
    kinds, sizes = np.unique(strata, return_counts=True)
    left, chosen = count, []
    for position, kind in enumerate(np.argsort(sizes, kind="stable")):  # the rarest first
        share = min(int(sizes[kind]), left // (len(kinds) - position))
        chosen.append(rng.choice(places[strata == kinds[kind]], share, replace=False))
        left -= share
    return np.sort(np.concatenate(chosen))


def sampled_rows(views: Views, places: NDArray[np.int64]) -> NDArray[np.float64]:
    """(n, C) unit embeddings of places in the flattened (V, *size)."""
    maps = views.unit.reshape(len(views), views.unit.shape[1], -1)
    view, pixel = np.divmod(places, maps.shape[2])
    return maps[view, :, pixel].astype(np.float64)


def border_rows(views: Views) -> NDArray[np.float64]:
    """Unit embeddings (n, C) of the valid pixels at the edge of the views."""
    edge = np.ones(views.size, bool)
    edge[tuple(slice(1, -1) for _ in views.size)] = False
    return rows_of(views.unit)[(edge & views.is_valid).ravel()].astype(np.float64)


def principal(rows: NDArray[np.float64], count: int) -> Linear:
    """Whitened PCA: scores of the rows (n, C) have variance 1, or 0 where there is none.

    Deterministic: the covariance in float64, and in every component the loading of largest magnitude is
    positive."""
    mean = rows.mean(axis=0)
    covariance = np.cov(rows, rowvar=False, bias=True).reshape(len(mean), len(mean))
    variances, vectors = np.linalg.eigh(covariance)
    return _whitened(mean, variances[::-1][:count], vectors.T[::-1][:count], float(variances.sum()), count)


def discriminant(rows: NDArray[np.float64], classes: NDArray[np.int64], count: int) -> Linear:
    """LDA: the directions that part the classes (n,) most, whitened. Raises `UserError` for too few
    classes."""
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    found = len(np.unique(classes))
    if found <= count:
        raise UserError(
            f"LDA has {found} classes for {count} coordinates and needs one class more than coordinates; "
            "give masks with more classes or take reducer: pca."
        )
    fitted = LinearDiscriminantAnalysis(solver="eigen", n_components=count, shrinkage="auto")
    fitted.fit(rows, classes)
    directions = fitted.scalings_[:, :count].T
    projected = (rows - rows.mean(axis=0)) @ directions.T
    linear = _whitened(rows.mean(axis=0), projected.var(axis=0), directions, 1.0, count)
    return Linear(linear.mean, linear.components, fitted.explained_variance_ratio_[:count])


def _whitened(
    mean: np.ndarray, variances: np.ndarray, directions: np.ndarray, total: float, count: int
) -> Linear:
    largest = np.take_along_axis(directions, np.abs(directions).argmax(axis=1)[:, None], axis=1)
    kept = variances > NEGLIGIBLE
    signed = directions * np.where(largest < 0, -1.0, 1.0)
    components = np.where(kept[:, None], signed / np.sqrt(np.where(kept, variances, 1))[:, None], 0.0)
    explained = np.where(kept, variances, 0) / total if total > NEGLIGIBLE else np.zeros(len(variances))
    missing = count - len(components)  # of embeddings with fewer channels than coordinates
    return Linear(mean, np.pad(components, ((0, missing), (0, 0))), np.pad(explained, (0, missing)))


def standardised(rows: NDArray[np.float64]) -> Linear:
    """z-scores of every channel."""
    scale = 1 / (rows.std(axis=0) + DEVIATION_FLOOR)
    return Linear(rows.mean(axis=0), np.diag(scale), np.zeros(0))


def umap_places(rows: np.ndarray, count: int, seed: int) -> NDArray[np.float64]:
    """Places (n, count) of rows (n, C) by UMAP with its defaults. Raises `UserError` without umap-learn."""
    try:
        from umap import UMAP
    except ImportError:
        raise UserError(
            "The CHRO-map asks for UMAP and umap-learn is not installed; pip install 'cfssl[umap]' or take "
            "reducer: pca."
        ) from None
    neighbours = min(NEIGHBOURS, len(rows) - 1)
    mapper = UMAP(n_components=count, n_neighbors=neighbours, random_state=seed, n_jobs=1)
    return np.asarray(mapper.fit_transform(rows.astype(np.float32)), dtype=np.float64)


def neighbour_places(rows: np.ndarray, fitted: np.ndarray, places: np.ndarray) -> NDArray[np.float64]:
    """Places (n, k) of new rows (n, C): the mean over their nearest fitted rows (m, C), by inverse squared
    distance, so that a fitted row keeps its own place.

    UMAP's own `transform` starts from such a mean and optimises it further; its model can only be kept as
    pickled code, and these two arrays are all that this needs.
    """
    import faiss

    index = faiss.IndexFlatL2(fitted.shape[1])
    index.add(np.ascontiguousarray(fitted, dtype=np.float32))
    squared, nearest = index.search(
        np.ascontiguousarray(rows, dtype=np.float32), min(NEIGHBOURS, len(fitted))
    )
    weights = 1 / np.maximum(squared, 1e-6)
    return np.einsum("nm,nmk->nk", weights / weights.sum(axis=1, keepdims=True), places[nearest])

"""Embeddings that tests of CHRO-maps share: smooth, of a known structure, cheap."""

import numpy as np

from cfssl.seeds import numpy_generator
from cfssl.visualise.chromap_views import Views

CHANNELS, VIEWS, SIZE = 12, 3, (20, 24)


def smooth(*shape: int, seed: int = 0) -> np.ndarray:
    """A sum of few waves over the last two axes, (*shape) float32."""
    rng, (height, width) = numpy_generator("smooth", seed), shape[-2:]
    y, x = np.meshgrid(np.linspace(0, 1, height), np.linspace(0, 1, width), indexing="ij")
    total = np.zeros(shape)
    for _ in range(4):
        f, g, phase = (rng.uniform(-6, 6, (*shape[:-2], 1, 1)) for _ in range(3))
        total += rng.standard_normal((*shape[:-2], 1, 1)) * np.sin(f * x + g * y + phase)
    return total.astype(np.float32)


def some_views(seed: int = 0, **more: object) -> Views:
    """Three views whose embeddings differ a little, and their grey images."""
    base = smooth(1, CHANNELS, *SIZE, seed=seed)
    embeddings = base + 0.15 * smooth(VIEWS, CHANNELS, *SIZE, seed=seed + 1000)
    images = smooth(VIEWS, *SIZE, seed=seed + 2000)
    images = (images - images.min()) / (images.max() - images.min())
    return Views(**{"embeddings": embeddings, "images": images, **more})  # type: ignore[arg-type]

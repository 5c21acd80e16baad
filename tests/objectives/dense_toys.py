"""Scenes that dense objectives are tried on: where everything lies is known."""

from dataclasses import replace

import numpy as np
import torch
from view_toys import batch_of

from cfssl.data.geometry import GeometrySettings, sample_affines, valid_mask, warp, warp_labels
from cfssl.data.views import ViewBatch
from cfssl.seeds import numpy_generator

SIZE = (32, 32)
CROPS = GeometrySettings(crop_scale=(0.3, 1.0), rotation=15.0)
STILL = GeometrySettings(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), horizontal_flip=0.0)


def scene(items: int, views: int, geometry: GeometrySettings, seed: int = 0) -> ViewBatch:
    """Discs left and right on ramps, seen through a geometry of its own in every view."""
    rng = numpy_generator("scene", seed)
    y, x = np.mgrid[-1:1:48j, -1:1:48j]
    sources, masks = [], []
    for _ in range(items):
        size = rng.uniform(0.2, 0.4, 2)
        both = [np.hypot(x - side, y) < radius for side, radius in zip((-0.5, 0.5), size, strict=True)]
        sources.append(0.3 + 0.2 * x * rng.uniform(-1, 1) + 0.4 * both[0] - 0.25 * both[1])
        masks.append(np.array(both, dtype=np.uint8))
    affines = sample_affines(rng, items * views, geometry).reshape(items, views, 2, 3)
    images = [
        [warp(source.astype(np.float32), affine, SIZE)[None] for affine in own]
        for source, own in zip(sources, affines, strict=True)
    ]
    labels = [
        [warp_labels(mask, affine, SIZE) for affine in own] for mask, own in zip(masks, affines, strict=True)
    ]
    return replace(
        batch_of(torch.from_numpy(np.array(images))),
        affine=torch.from_numpy(affines.astype(np.float32)),
        valid=torch.from_numpy(
            valid_mask(affines.reshape(-1, 2, 3), SIZE, (48, 48)).reshape(items, views, *SIZE)
        ),
        labels=torch.from_numpy(np.array(labels) > 0),
    )

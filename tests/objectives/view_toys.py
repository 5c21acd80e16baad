"""Batches for the tests of objectives."""

import torch

from cfssl.data.views import ViewBatch


def batch_of(
    images: torch.Tensor,
    attributes: dict[str, torch.Tensor] | None = None,
    local: torch.Tensor | None = None,
) -> ViewBatch:
    """Of `images` (B, V, C, H, W), and `local` ones (B, L, C, h, w)."""
    count, views = images.shape[:2]
    return ViewBatch(
        images=images,
        is_counterfactual=torch.zeros(count, views, dtype=torch.bool),
        slot=torch.zeros(count, views, dtype=torch.long),
        affine=torch.eye(2, 3).expand(count, views, 2, 3),
        valid=torch.ones(count, views, *images.shape[3:], dtype=torch.bool),
        attributes=attributes or {},
        row=torch.arange(count),
        local=None if local is None else batch_of(local),
    )

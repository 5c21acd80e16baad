"""Batches for the tests of objectives."""

import torch

from cfssl.data.views import ViewBatch
from cfssl.seeds import torch_generator


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
        position=tuple(range(count)),
        local=None if local is None else batch_of(local),
    )


class Stripes:
    """Stripes of four directions with a phase of their own in every view."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> list[ViewBatch]:
        generator = torch_generator("stripes", step)
        angle = (torch.arange(16) % 4)[:, None, None, None] * torch.pi / 4

        def draw(views: int, size: int) -> torch.Tensor:
            phase = 2 * torch.pi * torch.rand(16, views, 1, 1, generator=generator)
            place = torch.arange(size) / 2.0
            wave = angle.cos() * place + angle.sin() * place[:, None]
            return (0.5 + 0.5 * (wave + phase).sin())[:, :, None]

        return [batch_of(draw(2, 32), local=draw(2, 16))]

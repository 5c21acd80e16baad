"""The points at which a dense objective compares views.

Enter the affines and valid masks of a ViewBatch. Leave points in the normalised pixel-centre coordinates of
`cfssl.data.geometry`: drawn on the pixel centres of one view and known in the other views and in the source
through their maps, which is exact; nothing is rounded to a grid. The published code takes the corner of a
pixel for its centre and rounds, by which its pairs miss each other by half a pixel to two pixels of a view;
it also fills a short overlap with points outside of it, which stay as negatives, and draws from the corners
that a rotation leaves empty. Here an item whose overlap is short gets some of its points more than once, and
one with next to none gets no weight.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from cfssl.seeds import torch_generator

LEAST = 16  # pixels of an overlap from which points are drawn
WHOLE = 1 - 1e-4  # of the bilinear weight that valid pixels have to bring


class Pair(NamedTuple):
    """`n` points of each of B items, (B, n, 2) as (x, y): in the first view, in the second one, and in the
    source. `is_known` (B,) bool is False where the overlap has less than LEAST pixels; the points of such an
    item mean nothing."""

    first: torch.Tensor
    second: torch.Tensor
    source: torch.Tensor
    is_known: torch.Tensor


def item_generators(positions: Sequence[int], *parts: int | str) -> list[torch.Generator]:
    """One of the CPU for every item, seeded by `parts` and its position in the batch of the whole step: what
    is drawn for an item is the same whichever items a micro-batch or a process holds beside it."""
    return [torch_generator(*parts, position) for position in positions]


def uniform(generators: Sequence[torch.Generator], *shape: int) -> torch.Tensor:
    """Numbers in [0, 1), (B, *shape) on the CPU, from the generator of each of B items."""
    return torch.stack([torch.rand(shape, generator=generator) for generator in generators])


def matched_points(
    affine: torch.Tensor, valid: torch.Tensor, count: int, generators: Sequence[torch.Generator]
) -> Pair:
    """`count` points per item in the overlap of two views with `affine` (B, 2, 2, 3) and `valid`
    (B, 2, H, W): pixel centres of the first view, in the second one wherever they fall between valid pixels.
    No pixel is drawn twice before all are drawn once. `generators`: of the B items."""
    first_to_source, second_to_source = affine.double().unbind(1)
    own_valid, other_valid = valid.unbind(1)
    centres = pixel_centres(own_valid.shape[1:], affine.device)  # (HW, 2)
    source = apply(first_to_source, centres.expand(len(affine), -1, -1))
    second = apply(inverse(second_to_source), source)
    admissible = own_valid.flatten(1) & is_inside(second, other_valid)
    chosen, is_known = draw(admissible[:, None], count, generators)
    chosen, is_known = chosen[:, 0], is_known[:, 0]
    places = chosen[..., None].expand(-1, -1, 2)
    first, second, source = (
        points.expand(len(affine), -1, -1).gather(1, places).float() for points in (centres, second, source)
    )
    return Pair(first, second, source, is_known)


def view_points(
    affine: torch.Tensor, valid: torch.Tensor, count: int, generators: Sequence[torch.Generator]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`count` valid pixel centres of every view, drawn as in `matched_points`: (B, V, n, 2) in the views with
    `affine` (B, V, 2, 3) and `valid` (B, V, H, W), the same in the source, and whether a view has at least
    LEAST of them (B, V)."""
    centres = pixel_centres(valid.shape[2:], affine.device)
    chosen, is_known = draw(valid.flatten(2), count, generators)
    points = centres[chosen]
    source = apply(affine.double(), points)
    return points.float(), source.float(), is_known


def draw(
    admissible: torch.Tensor, count: int, generators: Sequence[torch.Generator]
) -> tuple[torch.Tensor, torch.Tensor]:
    """`count` places (B, V, count) among those where `admissible` (B, V, N) is True, in random order and
    without repetition; where there are fewer, the order is repeated. And whether there are at least LEAST
    (B, V)."""
    keys = uniform(generators, *admissible.shape[1:]).to(admissible.device)
    order = keys.masked_fill(~admissible, 2.0).topk(min(count, keys.shape[2]), dim=2, largest=False).indices
    found = admissible.sum(2, keepdim=True).clamp(min=1, max=order.shape[2])
    places = torch.arange(count, device=admissible.device) % found
    return order.gather(2, places), admissible.sum(2) >= LEAST


def pixel_centres(size: torch.Size | tuple[int, int], device: torch.device) -> torch.Tensor:
    """(H W, 2) float64 as (x, y), row by row, of an image of `size` (height, width)."""
    height, width = size
    y, x = (
        (2 * torch.arange(side, device=device, dtype=torch.float64) + 1) / side - 1
        for side in (height, width)
    )
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1).flatten(0, 1)


def apply(affine: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """Points (..., n, 2) through maps (..., 2, 3)."""
    return points @ affine[..., :2].mT + affine[..., None, :, 2]


def inverse(affine: torch.Tensor) -> torch.Tensor:
    """The maps (..., 2, 3) of the other direction."""
    linear = torch.linalg.inv(affine[..., :2])
    return torch.cat([linear, -linear @ affine[..., 2:]], dim=-1)


def is_inside(points: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Whether each of the points (B, n, 2) lies between valid pixels alone: (B, n) bool; `valid` (B, H, W).
    Outside of the outermost pixel centres nothing does."""
    grid = points[:, :, None].float()
    weight = torch.nn.functional.grid_sample(valid[:, None].float(), grid, align_corners=False)
    return weight[:, 0, :, 0] >= WHOLE

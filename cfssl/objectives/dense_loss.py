"""The losses of dense contrastive learning with counterfactuals (Lafargue-Hauret et al. 2026, arXiv
2603.17110): DVD-CL and S-DVD-CL between two views (`pair_loss`), MVD-CL and S-MVD-CL over any number of them
(`multi_view_loss`).

For unit vectors z of the points and s_ap = z_a . z_p / tau, all are the supervised contrastive loss with the
mean over positives outside of the logarithm (Khosla et al. 2020, equation 2),

    l_a = -1 / |P(a)| sum_{p in P(a)} log( exp(s_ap) / sum_{j in A(a)} exp(s_aj) ),

averaged over the anchors a that have a positive; with a single one it is InfoNCE (van den Oord et al. 2018).

    loss     who is compared, A(a)                        who is alike, P(a)
    DVD      the other view of every image                the same place in the other view
    S-DVD    the other view of every image                the same label
    MVD      all views of every image, a left out         the same image, within the radius in the source
    S-MVD    all views of every image, a left out         the same label

With weights w the mean over anchors is sum_a w_a l_a / sum_a w_a, and that over positives likewise; no weight
touches A(a). Points of images without overlap (`is_known`) are neither anchors nor in any A(a) or P(a). With
no anchor at all the loss is 0, and so is its gradient.

With several processes, each of which brings as many points, A(a) and P(a) hold the points of all and the mean
is over the anchors of all; the mean of the processes' gradients is the gradient of that.

Vectors are normalised here, in float32, or float64 where they come in it; the caller keeps autocast away.
Nothing N x N is ever made (see `contrast`). In the published code the background of S-MVD is left out only
after the mean, so that it stays in; images without overlap give negatives.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from cfssl.objectives.contrast import Near, contrast
from cfssl.objectives.gathered import gathered, mean_of_all

RADIUS = 0.1  # of the side of the source, as published
LEAST_SHARE = 1e-6  # of a class's weight that its other points need to be positives


class Points(NamedTuple):
    """N points of this process, image after image; or M points of all processes, those of images without
    overlap left out."""

    z: torch.Tensor  # (N, C) unit vectors
    image: torch.Tensor  # (N,) long, ascending: number of the image among those of all processes
    is_known: torch.Tensor  # (N,) bool
    weight: torch.Tensor  # (N,), 0 where unknown
    source: torch.Tensor  # (N, 2) normalised coordinates
    label: torch.Tensor  # (N,) long, -1 is unknown


def pair_loss(
    anchors: torch.Tensor,
    others: torch.Tensor,
    temperature: float,
    *,
    is_known: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    labels: tuple[torch.Tensor, torch.Tensor] | None = None,
    background_anchors: bool = False,
    source: torch.Tensor | None = None,
    exclusion_radius: float = 0.0,
) -> torch.Tensor:
    """DVD, or with `labels` S-DVD, of the points `anchors` (B, n, C) in one view against the same points
    `others` (B, n, C) in another; a scalar. The published loss is the sum over both directions, averaged over
    pairs of views.

    `is_known` (B,) bool: images with an overlap. `weight` (B, n), not negative: of every point in both views,
    such as how sure its label is, or how little the counterfactual changed it. `labels`: codes (B, n) in
    either view; -1 is unknown, neither anchor nor positive, and 0 is background, no anchor unless
    `background_anchors`. `exclusion_radius`, in shares of the side as in `multi_view_loss`: A(a) is without
    the points of the same image nearer than that in `source` (B, n, 2) that are no positives; 0 leaves all.
    """
    own, other = labels or (None, None)
    rows = points_of(anchors, is_known, weight, source, own)
    partners = points_of(others, is_known, weight, source, other)
    columns, place = of_all_processes(partners)
    positive, anchor_weight = partners.z, rows.weight
    if labels is not None:
        positive, found = class_means(columns, rows.label)
        anchor_weight = anchor_weight * found * is_anchor(rows.label, background_anchors)
    chosen = anchor_weight.nonzero()[:, 0]
    anchor_weight, rows, place = anchor_weight[chosen], selected(rows, chosen), place[chosen]
    near = None
    if exclusion_radius > 0:
        assert source is not None, "neighbours are those of a place in the source"
        within = neighbours(rows, columns, exclusion_radius)
        numbers = torch.arange(len(columns.z), device=place.device)

        def near(part: slice) -> Near:
            where, is_near = within(part)
            if labels is None:
                is_positive = place[part, None] == numbers[where]
            else:
                is_positive = rows.label[part, None] == columns.label[where]
            return Near(where, left_out=is_near & ~is_positive)

    total, mass = contrast(rows.z, columns.z, anchor_weight, temperature, near=near)
    pulled = attraction(rows.z, positive.index_select(0, chosen), anchor_weight, temperature)
    return mean_of_all(total - pulled, mass)


def multi_view_loss(
    points: torch.Tensor,
    temperature: float,
    *,
    is_known: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    labels: torch.Tensor | None = None,
    background_anchors: bool = False,
    source: torch.Tensor | None = None,
    radius: float = RADIUS,
) -> torch.Tensor:
    """MVD by `source`, or with `labels` S-MVD, of `points` (B, V, n, C) in V views of every image; a scalar.

    `is_known` (B, V) bool: views that show enough of the source. `weight` (B, V, n), `labels` (B, V, n) and
    `background_anchors` as in `pair_loss`. `source` (B, V, n, 2): the places of the points in the source, in
    normalised pixel-centre coordinates (-1 and 1 are its edges). `radius`: places nearer than this share of
    the side are alike; where the source is not square, of either side, so that a circle is an ellipse in
    pixels.
    """
    rows = points_of(points, is_known, weight, source, labels)
    columns, place = of_all_processes(rows)
    anchor_weight = rows.weight
    if labels is not None:
        positive, found = class_means(columns, rows.label, rows)
        anchor_weight = anchor_weight * found * is_anchor(rows.label, background_anchors)
    chosen = anchor_weight.nonzero()[:, 0]
    anchor_weight, rows, place = anchor_weight[chosen], selected(rows, chosen), place[chosen]
    if labels is not None:
        total, mass = contrast(rows.z, columns.z, anchor_weight, temperature, itself=place)
        pulled = attraction(rows.z, positive.index_select(0, chosen), anchor_weight, temperature)
        return mean_of_all(total - pulled, mass)
    assert source is not None, "points are alike by their label or by their place in the source"
    within = neighbours(rows, columns, radius)

    def near(part: slice) -> Near:
        where, is_near = within(part)
        share = is_near * columns.weight[where]
        return Near(where, share=share.scatter_(1, place[part, None] - where.start, 0.0))

    return mean_of_all(*contrast(rows.z, columns.z, anchor_weight, temperature, place, near))


def points_of(
    z: torch.Tensor,
    is_known: torch.Tensor | None,
    weight: torch.Tensor | None,
    source: torch.Tensor | None,
    label: torch.Tensor | None,
) -> Points:
    """The points `z` (B, ..., n, C) of B images in one row; `is_known` (B, ...) and `weight` (B, ..., n) are
    True and 1 where they are not given, places 0 and labels -1."""
    from lightly.utils import dist

    z = nn.functional.normalize(z.to(torch.promote_types(z.dtype, torch.float32)), dim=-1)
    if is_known is None:
        is_known = torch.ones(z.shape[:-2], dtype=torch.bool, device=z.device)
    is_known = is_known[..., None].expand(z.shape[:-1]).flatten()
    weight = torch.ones_like(z[..., 0]) if weight is None else weight.to(z.dtype)
    image = dist.rank() * len(z) + torch.arange(len(z), device=z.device)
    image = image.repeat_interleave(len(is_known) // len(z))
    return Points(
        z.flatten(0, -2),
        image,
        is_known,
        weight.detach().flatten() * is_known,
        z.new_zeros(len(image), 2) if source is None else source.flatten(0, -2),
        torch.full_like(image, -1) if label is None else label.flatten(),
    )


def of_all_processes(points: Points) -> tuple[Points, torch.Tensor]:
    """The known points of all processes, z with its gradient, and where among them each of `points` (N,) is;
    meaningless for unknown ones."""
    from lightly.utils import dist

    count, rank = len(points.z), dist.rank()
    points = Points(*(gathered(part) for part in points))
    place = points.is_known.cumsum(0)[rank * count : (rank + 1) * count] - 1
    return selected(points, points.is_known.nonzero()[:, 0]), place


def selected(points: Points, places: torch.Tensor) -> Points:
    """Those at `places` (n,)."""
    return Points(*(part.index_select(0, places) for part in points))


def class_means(
    columns: Points, label: torch.Tensor, own: Points | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """For every `label` (N,) the weighted mean (N, C) of the columns that have it, without the row itself
    where the rows are among the columns (`own`); and whether there is any, (N,) bool."""
    classes = 1 + max(0, int(torch.cat([label, columns.label]).max()))
    column, row = columns.label.clamp_min(0), label.clamp_min(0)
    weight = columns.weight * (columns.label >= 0)
    sums = columns.z.new_zeros(classes, columns.z.shape[1]).index_add(0, column, weight[:, None] * columns.z)
    # In float64, so that a class of one has nothing left without it.
    mass = weight.new_zeros(classes, dtype=torch.float64).index_add(0, column, weight.double())
    sums, whole = sums.index_select(0, row), mass[row]
    mass = whole
    if own is not None:
        sums, mass = sums - own.weight[:, None] * own.z, whole - own.weight.double()
    found = (label >= 0) & (mass > LEAST_SHARE * whole)
    return sums / torch.where(found, mass, 1).to(sums.dtype)[:, None], found


def is_anchor(label: torch.Tensor, background_anchors: bool) -> torch.Tensor:
    """Whether points with `label` (N,) may be anchors: (N,) bool."""
    return label >= (0 if background_anchors else 1)


def neighbours(rows: Points, columns: Points, radius: float) -> Callable[[slice], tuple[slice, torch.Tensor]]:
    """For a range of rows, the range of columns in their images, and which of these lie in the image of a row
    and nearer to it than `radius` (r, c)."""
    first, after = (
        torch.searchsorted(columns.image, rows.image, right=is_after).tolist() for is_after in (False, True)
    )
    (row_x, row_y), (column_x, column_y) = (part.source.T.contiguous() for part in (rows, columns))
    reach = (2 * radius) ** 2  # the side is 2

    def within(part: slice) -> tuple[slice, torch.Tensor]:
        where = slice(first[part.start], after[part.stop - 1])
        distance = (row_x[part, None] - column_x[where]).square_()
        distance += (row_y[part, None] - column_y[where]).square_()
        return where, (distance < reach) & (rows.image[part, None] == columns.image[where])

    return within


def attraction(
    z: torch.Tensor, positive: torch.Tensor, weight: torch.Tensor, temperature: float
) -> torch.Tensor:
    """sum_a weight_a z_a . positive_a / tau of rows (N, C): the second term of the loss, where the mean of an
    anchor's positives is known."""
    return (z * positive).sum(1) @ weight / temperature

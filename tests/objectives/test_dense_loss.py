"""Dense losses: equal to their equations written with whole matrices in float64, with their gradients, and
what these equations imply."""

import math
from typing import Any

import pytest
import torch

from cfssl.objectives import contrast as blocks
from cfssl.objectives.dense_loss import multi_view_loss, pair_loss
from cfssl.seeds import torch_generator

IMAGES, VIEWS, COUNT, SIZE = 3, 2, 10, 8
TAU = 0.2


def plain(
    anchors: torch.Tensor,
    others: torch.Tensor,
    compared: torch.Tensor,
    alike: torch.Tensor,
    weight: torch.Tensor,
    temperature: float,
) -> torch.Tensor:
    """The equations with the N x M matrix: anchors (N, C), others (M, C), who is compared (N, M) bool, the
    weights of who is alike (N, M), and those of the anchors (N,)."""
    s = unit(anchors) @ unit(others).T / temperature
    log_shares = s - s.masked_fill(~compared, -torch.inf).logsumexp(1, keepdim=True)
    mass = alike.sum(1)
    weight = weight * (mass > 0)
    losses = -(alike * log_shares).sum(1) / torch.where(mass > 0, mass, 1)
    return (weight * torch.where(weight > 0, losses, 0)).sum() / weight.sum()


def unit(z: torch.Tensor) -> torch.Tensor:
    return z / z.square().sum(-1, keepdim=True).sqrt()


def plain_pair(
    anchors: torch.Tensor,
    others: torch.Tensor,
    temperature: float,
    is_known: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    labels: tuple[torch.Tensor, torch.Tensor] | None = None,
    background_anchors: bool = False,
    source: torch.Tensor | None = None,
    exclusion_radius: float = 0.0,
) -> torch.Tensor:
    """The images without overlap are taken out first."""
    known = torch.ones(len(anchors), dtype=torch.bool) if is_known is None else is_known
    anchors, others = anchors[known], others[known]
    weight = torch.ones(anchors.shape[:2]).double() if weight is None else weight[known].double()
    image = torch.arange(len(anchors)).repeat_interleave(anchors.shape[1])
    alike = torch.eye(len(image), dtype=torch.bool)
    of_anchor = weight = weight.flatten()
    if labels is not None:
        own, other = (label[known].flatten() for label in labels)
        alike = (own[:, None] == other) & (own[:, None] >= 0)
        of_anchor = weight * (background_anchors | (own != 0))
    compared = torch.ones_like(alike)
    if exclusion_radius:
        near = torch.cdist(*[source[known].flatten(0, 1).double()] * 2) < 2 * exclusion_radius
        compared = ~(near & (image[:, None] == image) & ~alike)
    return plain(
        anchors.flatten(0, 1), others.flatten(0, 1), compared, alike * weight, of_anchor, temperature
    )


def plain_views(
    points: torch.Tensor,
    temperature: float,
    is_known: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    labels: torch.Tensor | None = None,
    background_anchors: bool = False,
    source: torch.Tensor | None = None,
    radius: float = 0.1,
) -> torch.Tensor:
    """The views that show too little are taken out first."""
    known = torch.ones(points.shape[:2], dtype=torch.bool) if is_known is None else is_known
    image = torch.arange(len(points))[:, None].expand(points.shape[:2])[known]
    image = image.repeat_interleave(points.shape[2])
    weight = torch.ones(points.shape[:3]).double() if weight is None else weight.double()
    of_anchor = weight = weight[known].flatten()
    if labels is not None:
        label = labels[known].flatten()
        alike = (label[:, None] == label) & (label[:, None] >= 0)
        of_anchor = weight * (background_anchors | (label != 0))
    else:
        near = torch.cdist(*[source[known].flatten(0, 1).double()] * 2) < 2 * radius
        alike = near & (image[:, None] == image)
    others = ~torch.eye(len(image), dtype=torch.bool)
    z = points[known].flatten(0, 1)
    return plain(z, z, others, (alike & others) * weight, of_anchor, temperature)


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, SIZE, generator=torch_generator("z", seed), dtype=torch.float64)


def places(*shape: int) -> torch.Tensor:
    return 2 * torch.rand(*shape, 2, generator=torch_generator("places"), dtype=torch.float64) - 1


def classes(*shape: int, least: int = 0, seed: int = 0) -> torch.Tensor:
    return torch.randint(least, 3, shape, generator=torch_generator("classes", seed))


def weights(*shape: int) -> torch.Tensor:
    """A fifth of them 0."""
    found = torch.rand(*shape, generator=torch_generator("weights"), dtype=torch.float64)
    return (found - 0.2).clamp_min(0)


PAIR_SHAPE, VIEWS_SHAPE = (IMAGES, COUNT), (IMAGES, VIEWS, COUNT)
LABELS = classes(*PAIR_SHAPE), classes(*PAIR_SHAPE, seed=1)
UNKNOWN = classes(*PAIR_SHAPE, least=-1), classes(*PAIR_SHAPE, least=-1, seed=1)
PAIR: dict[str, dict[str, Any]] = {
    "place": {},
    "place, weights": {"weight": weights(*PAIR_SHAPE)},
    "place, no overlap": {"is_known": torch.tensor([True, False, True])},
    "place, neighbours": {"source": places(*PAIR_SHAPE), "exclusion_radius": 0.3},
    "place, all": {
        "source": places(*PAIR_SHAPE),
        "exclusion_radius": 0.2,
        "is_known": torch.tensor([False, True, True]),
        "weight": weights(*PAIR_SHAPE),
    },
    "label": {"labels": LABELS},
    "label, background": {"labels": LABELS, "background_anchors": True},
    "label, unknown": {"labels": UNKNOWN, "background_anchors": True},
    "label, weights": {"labels": LABELS, "weight": weights(*PAIR_SHAPE)},
    "label, one without match": {"labels": (classes(*PAIR_SHAPE), torch.ones(PAIR_SHAPE, dtype=torch.long))},
    "label, all": {
        "labels": UNKNOWN,
        "source": places(*PAIR_SHAPE),
        "exclusion_radius": 0.3,
        "is_known": torch.tensor([True, True, False]),
        "weight": weights(*PAIR_SHAPE),
    },
}
VIEW_LABELS = classes(*VIEWS_SHAPE)
SOME_VIEWS = torch.tensor([[True, True], [False, True], [False, False]])
MULTI: dict[str, dict[str, Any]] = {
    "place": {"source": places(*VIEWS_SHAPE)},
    "place, wide": {"source": places(*VIEWS_SHAPE), "radius": 0.4},
    "place, weights": {"source": places(*VIEWS_SHAPE), "radius": 0.2, "weight": weights(*VIEWS_SHAPE)},
    "place, all": {
        "source": places(*VIEWS_SHAPE),
        "radius": 0.2,
        "weight": weights(*VIEWS_SHAPE),
        "is_known": SOME_VIEWS,
    },
    "label": {"labels": VIEW_LABELS},
    "label, background": {"labels": VIEW_LABELS, "background_anchors": True},
    "label, all": {
        "labels": classes(*VIEWS_SHAPE, least=-1),
        "weight": weights(*VIEWS_SHAPE),
        "is_known": SOME_VIEWS,
    },
}


def with_gradients(loss: torch.Tensor, *inputs: torch.Tensor) -> list[torch.Tensor]:
    return [loss.detach(), *torch.autograd.grad(loss, inputs)]


def assert_equal(found: list[torch.Tensor], expected: list[torch.Tensor], tolerance: float) -> None:
    """By the greatest of each tensor."""
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        assert (one - other).abs().max() <= tolerance * other.abs().max()


@pytest.mark.parametrize("temperature", [0.02, 0.7])
@pytest.mark.parametrize("case", PAIR)
def test_the_pair_loss_and_its_gradients_are_those_of_the_whole_matrix(case: str, temperature: float) -> None:
    views = drawn(*PAIR_SHAPE).requires_grad_(), drawn(*PAIR_SHAPE, seed=1).requires_grad_()
    found = with_gradients(pair_loss(*views, temperature, **PAIR[case]), *views)
    assert_equal(found, with_gradients(plain_pair(*views, temperature, **PAIR[case]), *views), 1e-10)


@pytest.mark.parametrize("temperature", [0.02, 0.7])
@pytest.mark.parametrize("case", MULTI)
def test_the_multi_view_loss_and_its_gradient_are_those_of_the_whole_matrix(
    case: str, temperature: float
) -> None:
    points = drawn(*VIEWS_SHAPE).requires_grad_()
    found = with_gradients(multi_view_loss(points, temperature, **MULTI[case]), points)
    assert_equal(found, with_gradients(plain_views(points, temperature, **MULTI[case]), points), 1e-10)


def test_gradients_are_those_of_finite_differences() -> None:
    views = drawn(2, 3).requires_grad_(), drawn(2, 3, seed=1).requires_grad_()
    weight, source, labels = weights(2, 3), places(2, 3), torch.tensor([[1, 1, 2], [2, 1, 0]])
    cases = {"source": source, "exclusion_radius": 0.5}, {"labels": (labels, labels)}
    for case in cases:
        assert torch.autograd.gradcheck(
            lambda *z, case=case: pair_loss(*z, TAU, weight=weight, **case), views
        )
    points, weight = views[0][:, None], weight[:, None]
    for case in ({"source": source[:, None], "radius": 0.5}, {"labels": labels[:, None]}):
        assert torch.autograd.gradcheck(
            lambda z, case=case: multi_view_loss(z, TAU, weight=weight, **case),
            points.detach().requires_grad_(),
        )


def all_losses(dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """Of every case: the loss and its gradients."""
    views = [drawn(*PAIR_SHAPE, seed=seed).to(dtype).requires_grad_() for seed in (0, 1)]
    points = drawn(*VIEWS_SHAPE).to(dtype).requires_grad_()
    found = []
    for case in PAIR.values():
        found += with_gradients(pair_loss(*views, TAU, **case), *views)
    for case in MULTI.values():
        found += with_gradients(multi_view_loss(points, TAU, **case), points)
    return found


@pytest.mark.parametrize("rows", [1, 7, 1000])
def test_the_size_of_a_block_changes_nothing(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = all_losses()
    monkeypatch.setattr(blocks, "BLOCK", 1)
    monkeypatch.setattr(blocks, "ROWS", rows)
    assert [part.stop - part.start for part in blocks.row_blocks(3, 5)] == [rows] * (3 // rows) or rows > 3
    assert_equal(all_losses(), expected, 1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_embeddings_give_the_loss_in_float32(dtype: torch.dtype) -> None:
    views = [drawn(*PAIR_SHAPE, seed=seed).to(dtype) for seed in (0, 1)]
    points = drawn(*VIEWS_SHAPE).to(dtype)
    wide = [view.double() for view in views]
    losses = [(pair_loss(*views, TAU, **case), pair_loss(*wide, TAU, **case)) for case in PAIR.values()]
    for case in MULTI.values():
        losses.append((multi_view_loss(points, TAU, **case), multi_view_loss(points.double(), TAU, **case)))
    for found, expected in losses:
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)


def test_rounding_embeddings_to_half_precision_moves_no_loss_by_a_hundredth() -> None:
    exact, rounded = all_losses(), all_losses(torch.float16)
    losses = [(float(a), float(b)) for a, b in zip(exact, rounded, strict=True) if a.ndim == 0]
    assert len(losses) == len(PAIR) + len(MULTI)
    for a, b in losses:
        assert b == pytest.approx(a, rel=1e-2)


def test_with_labels_of_their_own_places_are_alike_by_place() -> None:
    views = drawn(*PAIR_SHAPE).requires_grad_(), drawn(*PAIR_SHAPE, seed=1).requires_grad_()
    own = 1 + torch.arange(IMAGES * COUNT).reshape(PAIR_SHAPE)
    found = with_gradients(pair_loss(*views, TAU, labels=(own, own)), *views)
    assert_equal(found, with_gradients(pair_loss(*views, TAU), *views), 1e-12)

    points = drawn(*VIEWS_SHAPE).requires_grad_()
    source = places(IMAGES, 1, COUNT).expand(-1, VIEWS, -1, -1)
    labels = own[:, None].expand(VIEWS_SHAPE)
    found = with_gradients(multi_view_loss(points, TAU, labels=labels), points)
    assert_equal(
        found, with_gradients(multi_view_loss(points, TAU, source=source, radius=1e-6), points), 1e-12
    )


@pytest.mark.parametrize("dimension", [0, 1])
@pytest.mark.parametrize("case", PAIR)
def test_the_order_of_images_and_points_is_immaterial_to_the_pair_loss(case: str, dimension: int) -> None:
    order = torch.randperm(PAIR_SHAPE[dimension], generator=torch_generator("order"))

    def reordered(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(reordered, value))
        if isinstance(value, torch.Tensor) and value.ndim > dimension:
            return value.index_select(dimension, order)
        return value

    views = drawn(*PAIR_SHAPE), drawn(*PAIR_SHAPE, seed=1)
    arguments = {name: reordered(value) for name, value in PAIR[case].items()}
    found = pair_loss(*reordered(views), TAU, **arguments)
    torch.testing.assert_close(found, pair_loss(*views, TAU, **PAIR[case]), rtol=1e-12, atol=0)


@pytest.mark.parametrize("dimension", [0, 1, 2])
@pytest.mark.parametrize("case", MULTI)
def test_the_order_of_images_views_and_points_is_immaterial_to_the_multi_view_loss(
    case: str, dimension: int
) -> None:
    order = torch.randperm(VIEWS_SHAPE[dimension], generator=torch_generator("order"))

    def reordered(value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.ndim > dimension:
            return value.index_select(dimension, order)
        return value

    arguments = {name: reordered(value) for name, value in MULTI[case].items()}
    found = multi_view_loss(reordered(drawn(*VIEWS_SHAPE)), TAU, **arguments)
    expected = multi_view_loss(drawn(*VIEWS_SHAPE), TAU, **MULTI[case])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("temperature", [0.07, 0.7])
def test_equal_views_of_orthonormal_points_have_the_closed_form(temperature: float) -> None:
    z = torch.eye(12, dtype=torch.float64).reshape(3, 4, 12)
    expected = -1 / temperature + math.log(math.exp(1 / temperature) + 11)
    assert float(pair_loss(z, z, temperature)) == pytest.approx(expected, rel=1e-12)


def test_points_that_say_nothing_have_the_loss_of_guessing() -> None:
    generator = torch_generator("wide")
    first, second = (torch.randn(4, 25, 20_000, generator=generator) * 1e-3 for _ in "ab")
    assert float(pair_loss(first, second, 0.7)) == pytest.approx(math.log(100), abs=2e-3)
    both, source = torch.stack([first, second], dim=1), places(4, 1, 25).expand(-1, 2, -1, -1)
    # every point is left out of its own sum
    assert float(multi_view_loss(both, 0.7, source=source)) == pytest.approx(math.log(199), abs=2e-3)
    same = torch.ones(4, 2, 25, 3)
    assert float(multi_view_loss(same, 0.7, labels=classes(4, 2, 25))) == pytest.approx(math.log(199))


@pytest.mark.parametrize("by_label", [False, True])
def test_without_any_overlap_the_loss_and_its_gradients_are_zero(by_label: bool) -> None:
    views = drawn(*PAIR_SHAPE).requires_grad_(), drawn(*PAIR_SHAPE, seed=1).requires_grad_()
    case = {"labels": LABELS} if by_label else {"source": places(*PAIR_SHAPE), "exclusion_radius": 0.2}
    unknown = torch.zeros(IMAGES, dtype=torch.bool)
    for found in with_gradients(pair_loss(*views, TAU, is_known=unknown, **case), *views):
        assert not found.any()
    points = drawn(*VIEWS_SHAPE).requires_grad_()
    case = {"labels": VIEW_LABELS} if by_label else {"source": places(*VIEWS_SHAPE)}
    unknown = torch.zeros(IMAGES, VIEWS, dtype=torch.bool)
    for found in with_gradients(multi_view_loss(points, TAU, is_known=unknown, **case), points):
        assert not found.any()


def test_what_an_image_without_overlap_holds_is_immaterial() -> None:
    known = torch.tensor([True, False, True])
    views = drawn(*PAIR_SHAPE), drawn(*PAIR_SHAPE, seed=1)
    expected = pair_loss(*views, TAU, is_known=known)
    views[0][1], views[1][1] = 0.0, 1e3
    assert torch.equal(pair_loss(*views, TAU, is_known=known), expected)


@pytest.mark.parametrize("label", [-1, 0, 1])
def test_a_batch_of_one_class_is_finite_and_one_without_anchors_is_zero(label: int) -> None:
    views = drawn(*PAIR_SHAPE).requires_grad_(), drawn(*PAIR_SHAPE, seed=1).requires_grad_()
    points = drawn(*VIEWS_SHAPE).requires_grad_()
    of_pairs, of_points = (torch.full(shape, label) for shape in (PAIR_SHAPE, VIEWS_SHAPE))
    found = with_gradients(pair_loss(*views, TAU, labels=(of_pairs, of_pairs)), *views)
    found += with_gradients(multi_view_loss(points, TAU, labels=of_points), points)
    for values in found:
        assert values.isfinite().all()
        assert bool(values.any()) == (label == 1)


def test_a_point_on_its_own_is_no_anchor_and_stays_a_negative() -> None:
    points = drawn(1, 1, 3)
    source = torch.tensor([[[[0.0, 0.0], [0.01, 0.0], [0.9, 0.9]]]])
    labels = torch.tensor([[[1, 1, 2]]])
    z = unit(points[0, 0])
    s = (z @ z.T / TAU).fill_diagonal_(-torch.inf)
    expected = -(s.log_softmax(1)[0, 1] + s.log_softmax(1)[1, 0]) / 2
    for case in ({"source": source}, {"labels": labels}):
        torch.testing.assert_close(multi_view_loss(points, TAU, **case), expected)
    alone = multi_view_loss(points[:, :, :1], TAU, source=source[:, :, :1])
    assert float(alone) == 0.0


def test_a_weight_counts_as_that_many_anchors_and_positives() -> None:
    labels = LABELS[0]
    often = 1 + torch.arange(COUNT) % 3
    views = drawn(*PAIR_SHAPE), drawn(*PAIR_SHAPE, seed=1)
    weight = often.expand(PAIR_SHAPE)
    found = pair_loss(*views, TAU, weight=weight, labels=(labels, labels))
    # Repeated points would also be compared more often, so the sum over A(a) is made without repetition.
    anchors, others = (view.flatten(0, 1) for view in views)
    repeated = torch.arange(IMAGES * COUNT).repeat_interleave(weight.flatten())
    s = unit(anchors) @ unit(others).T / TAU
    log_shares = s.log_softmax(1)[repeated][:, repeated]
    label = labels.flatten()[repeated]
    losses = [-row[label == own].mean() for row, own in zip(log_shares, label, strict=True) if own > 0]
    torch.testing.assert_close(found, torch.stack(losses).mean())


def test_the_radius_is_a_share_of_the_side() -> None:
    """Two points a quarter of the side apart are alike within 0.26 of it, and not within 0.24."""
    source = torch.tensor([[[[-0.25, 0.0], [0.25, 0.0]]]])
    points = drawn(1, 1, 2)
    s = unit(points[0, 0, 0]) @ unit(points[0, 0, 1]) / TAU
    assert float(multi_view_loss(points, TAU, source=source, radius=0.24)) == 0.0
    # with the only other point as the positive, nothing is left to be told apart
    assert float(multi_view_loss(points, TAU, source=source, radius=0.26)) == pytest.approx(0.0, abs=1e-12)
    third = torch.cat([points, drawn(1, 1, 1, seed=5)], dim=2)
    far = torch.cat([source, torch.tensor([[[[0.9, 0.9]]]])], dim=2)
    found = multi_view_loss(third, TAU, source=far, radius=0.26)
    away = [unit(third[0, 0, 2]) @ unit(third[0, 0, k]) / TAU for k in (0, 1)]
    expected = sum(torch.logaddexp(s, other) - s for other in away) / 2
    torch.testing.assert_close(found, expected)


def test_the_gradient_does_not_depend_on_who_else_uses_the_loss() -> None:
    views = drawn(*PAIR_SHAPE).requires_grad_(), drawn(*PAIR_SHAPE, seed=1).requires_grad_()
    single = with_gradients(pair_loss(*views, TAU), *views)
    tripled = with_gradients(3 * pair_loss(*views, TAU), *views)
    assert_equal(tripled, [3 * value for value in single], 1e-12)
    with torch.no_grad():
        assert torch.equal(pair_loss(*views, TAU), single[0])

"""The gradient guard: clips to the norm, skips outliers, follows lasting changes, and never skips for
ever."""

import math

import pytest
import torch
from torch import nn

from cfssl.engine.guard import PATIENCE, GradientGuard
from cfssl.errors import UserError


def offer(guard: GradientGuard, norm: float) -> bool:
    """Offers a gradient of the given norm."""
    parameter = nn.Parameter(torch.zeros(4))
    parameter.grad = torch.tensor([norm / 2] * 4)
    return guard.allows([parameter])[0]


def test_gradients_are_clipped_to_the_norm_and_direction_is_kept() -> None:
    parameter = nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([30.0, 40.0])
    taken, norm = GradientGuard(clip=5.0, skip_factor=None).allows([parameter])
    assert taken
    assert norm == pytest.approx(50.0)
    assert torch.allclose(parameter.grad, torch.tensor([3.0, 4.0]), atol=1e-4)


def test_an_outlier_is_skipped_and_normal_steps_go_on() -> None:
    guard = GradientGuard(None, skip_factor=10)
    assert all(offer(guard, 1.0) for _ in range(30))
    assert not offer(guard, 11.0)
    assert not offer(guard, math.nan)
    assert not offer(guard, math.inf)
    assert offer(guard, 9.0)
    assert guard.skipped == 3
    assert guard.consecutive == 0


def test_a_lasting_change_of_scale_ends_the_run_loudly_instead_of_skipping_for_ever() -> None:
    guard = GradientGuard(None, skip_factor=10)
    for _ in range(200):
        offer(guard, 1.0)
    for _ in range(PATIENCE - 1):
        assert not offer(guard, 1000.0)
    with pytest.raises(UserError, match=r"20 steps in a row .* above the running median"):
        offer(guard, 1000.0)


def test_the_median_follows_when_only_some_steps_are_large() -> None:
    guard = GradientGuard(None, skip_factor=10)
    for _ in range(100):
        offer(guard, 1.0)
    taken = [offer(guard, 100.0 if step % 3 else 1.0) for step in range(120)]
    assert not any(taken[1:3])
    assert all(taken[-30:])  # by now the large norms are the median


def test_non_finite_norms_end_the_run_even_before_the_median_settles() -> None:
    guard = GradientGuard(None, skip_factor=None)
    for _ in range(PATIENCE - 1):
        assert not offer(guard, math.nan)
    with pytest.raises(UserError, match="not finite"):
        offer(guard, math.nan)


def test_the_state_continues_where_it_was() -> None:
    first, second = GradientGuard(None, 10), GradientGuard(None, 10)
    for step in range(40):
        offer(first, 1.0 + step % 3)
    second.load_state_dict(first.state_dict())
    for norm in (1.0, 25.0, 500.0, 2.0):
        assert offer(first, norm) == offer(second, norm)
    assert first.state_dict() == second.state_dict()

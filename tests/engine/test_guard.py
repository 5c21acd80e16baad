"""The gradient guard: skips outliers, follows lasting changes, and never skips for ever."""

import math

import pytest

from cfssl.engine.guard import PATIENCE, GradientGuard
from cfssl.errors import UserError


def test_an_outlier_is_skipped_and_normal_steps_go_on() -> None:
    guard = GradientGuard(10)
    assert all(guard.allows(1.0) for _ in range(30))
    assert not guard.allows(11.0)
    assert not guard.allows(math.nan)
    assert not guard.allows(math.inf)
    assert guard.allows(9.0)
    assert guard.skipped == 3
    assert guard.consecutive == 0


def test_a_lasting_change_of_scale_ends_the_run_loudly_instead_of_skipping_for_ever() -> None:
    guard = GradientGuard(10)
    for _ in range(200):
        guard.allows(1.0)
    for _ in range(PATIENCE - 1):
        assert not guard.allows(1000.0)
    with pytest.raises(UserError, match=r"20 steps in a row .* above the running median"):
        guard.allows(1000.0)


def test_the_median_follows_when_only_some_steps_are_large() -> None:
    guard = GradientGuard(10)
    for _ in range(100):
        guard.allows(1.0)
    taken = [guard.allows(100.0 if step % 3 else 1.0) for step in range(120)]
    assert not any(taken[1:3])
    assert all(taken[-30:])  # by now the large norms are the median


def test_non_finite_norms_end_the_run_even_before_the_median_settles() -> None:
    guard = GradientGuard(None)
    for _ in range(PATIENCE - 1):
        assert not guard.allows(math.nan)
    with pytest.raises(UserError, match="not finite"):
        guard.allows(math.nan)


def test_the_state_continues_where_it_was() -> None:
    first, second = GradientGuard(10), GradientGuard(10)
    for step in range(40):
        first.allows(1.0 + step % 3)
    second.load_state_dict(first.state_dict())
    for norm in (1.0, 25.0, 500.0, 2.0):
        assert first.allows(norm) == second.allows(norm)
    assert first.state_dict() == second.state_dict()

"""Schedules against their closed forms."""

import math

import pytest

from cfssl.engine.schedules import cosine, linear, warmup_cosine


def test_warm_up_is_linear_and_the_rest_is_half_a_cosine() -> None:
    values = [warmup_cosine(step, 110, 2.0, 0.5, warmup=10) for step in range(110)]
    assert values[:10] == pytest.approx([2.0 * (step + 1) / 10 for step in range(10)])
    for step in range(10, 110):
        expected = 0.5 + 1.5 * (1 + math.cos(math.pi * (step - 10) / 99)) / 2
        assert values[step] == pytest.approx(expected, abs=1e-12)
    assert values[-1] == pytest.approx(0.5)


def test_a_run_shorter_than_its_warm_up_still_has_a_schedule() -> None:
    assert [warmup_cosine(step, 2, 1.0, warmup=50) for step in range(2)] == pytest.approx([1.0, 0.0])
    assert warmup_cosine(0, 1, 1.0) == 1.0


def test_the_cosine_runs_from_its_start_to_its_end() -> None:
    found = [cosine(step, 9, 0.04, 0.4) for step in range(9)]
    expected = [0.4 - 0.36 * (1 + math.cos(math.pi * step / 8)) / 2 for step in range(9)]
    assert found == pytest.approx(expected, abs=1e-12)
    assert cosine(0, 1, 0.04, 0.4) == 0.4


def test_linear_reaches_its_end_and_stays() -> None:
    assert [linear(step, 4, 0.0, 2.0) for step in range(6)] == [0.0, 0.5, 1.0, 1.5, 2.0, 2.0]
    assert linear(0, 0, 1.0, 3.0) == 3.0

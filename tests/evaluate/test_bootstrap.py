"""Means and ratios with intervals; what groups.py makes of the resamples is tested there."""

import numpy as np
import pytest
from scipy.stats import norm

from cfssl.evaluate.bootstrap import mean_figure, mean_figures, ratio_figures
from cfssl.seeds import numpy_generator


def test_the_interval_of_a_mean_is_that_of_the_central_limit() -> None:
    values = numpy_generator("mean").exponential(size=2000)
    found = mean_figure(values, resamples=2000)
    reach = norm.ppf(0.975) * values.std() / np.sqrt(2000)
    assert found["value"] == pytest.approx(values.mean())
    assert found["high"] - found["low"] == pytest.approx(2 * reach, rel=0.1)


def test_intervals_of_means_cover_the_truth() -> None:
    covered = 0
    for trial in range(300):
        found = mean_figure(numpy_generator("cover", trial).normal(2, 1, size=60), resamples=200)
        covered += found["low"] <= 2 <= found["high"]
    assert 0.90 <= covered / 300 <= 0.98


def test_rows_without_a_value_are_left_out_and_counted() -> None:
    values = np.array([1.0, np.nan, 3.0, np.nan])
    found = mean_figures({"some": values, "none": np.full(4, np.nan)}, resamples=50, undefined="all missing")
    assert (found["some"]["value"], found["some"]["n"], found["some"]["without"]) == (2.0, 2, 2)
    assert found["none"] == {
        "value": None,
        "low": None,
        "high": None,
        "reason": "all missing",
        "n": 0,
        "without": 4,
    }


def test_rows_of_one_patient_are_no_independent_evidence() -> None:
    values = numpy_generator("rows").normal(size=100)
    once = mean_figure(values, resamples=300)
    copies = mean_figure(np.repeat(values, 5), np.repeat(np.arange(100), 5), resamples=300)
    assert {key: copies[key] for key in ("low", "high")} == pytest.approx(
        {key: once[key] for key in ("low", "high")}
    )


def test_a_ratio_is_one_of_sums_and_undefined_over_zero() -> None:
    above, below = np.array([1.0, 2.0, 6.0]), np.array([2.0, 2.0, 0.0])
    found = ratio_figures(
        {"ratio": above, "none": above}, {"ratio": below, "none": np.zeros(3)}, resamples=100
    )
    assert found["ratio"]["value"] == pytest.approx(9 / 4)
    assert found["ratio"]["low"] <= 9 / 4 <= found["ratio"]["high"]
    assert found["none"]["value"] is None
    assert found["none"]["reason"] == "the sum to divide by is 0"
    rare = ratio_figures({"r": np.ones(50)}, {"r": np.eye(50)[0]}, resamples=200)["r"]
    assert rare["value"] == 50  # a resample lacks this row with probability 1/e, which leaves an interval
    assert rare["low"] is not None

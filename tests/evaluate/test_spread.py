"""A summary over seeds is the mean and the standard deviation of what the results say, group by group."""

from typing import Any

import numpy as np
import pytest

from cfssl.evaluate.spread import over_seeds


def result(fraction: float, seed: int, value: float, of_group: float | None) -> dict[str, Any]:
    return {
        "target": "disease",
        "metrics": ["auc"],
        "protocol": {"label_fraction": fraction},
        "seeds": {"labels": seed},
        "overall": {"n": 9, "auc": {"value": value}},
        "groups": {"scanner": {"table": {"A": {"n": 4, "auc": {"value": of_group}}}}},
    }


def test_each_fraction_with_several_seeds_has_its_mean_and_standard_deviation() -> None:
    values, of_group = [0.7, 0.8, 0.6], [0.5, 0.9, 0.4]
    results = [result(0.1, seed, values[seed], of_group[seed]) for seed in range(3)]
    (found,) = over_seeds([result(1.0, 0, 0.9, 0.9), *results])
    assert (found["label_fraction"], found["seeds"]) == (0.1, [0, 1, 2])
    for cell, of in ((found["overall"], values), (found["groups"]["scanner"]["A"], of_group)):
        assert cell["auc"]["mean"] == pytest.approx(np.mean(of))
        assert cell["auc"]["sd"] == pytest.approx(np.sqrt(np.sum(np.square(of - np.mean(of))) / 2))
        assert cell["auc"]["n"] == 3


@pytest.mark.parametrize(("known", "mean", "sd"), [([0.5, None], 0.5, None), ([None, None], None, None)])
def test_a_seed_without_a_value_is_left_out(known: list[float | None], mean: Any, sd: Any) -> None:
    (found,) = over_seeds([result(0.1, seed, 0.5, value) for seed, value in enumerate(known)])
    counted = sum(value is not None for value in known)
    assert found["groups"]["scanner"]["A"]["auc"] == {"mean": mean, "sd": sd, "n": counted}


def test_one_seed_has_no_summary() -> None:
    assert over_seeds([result(0.1, 0, 0.5, 0.5), result(1.0, 0, 0.5, 0.5)]) == []

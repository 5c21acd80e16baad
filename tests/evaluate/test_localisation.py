"""Area errors, localisation ratio and leakage against brute force on small images."""

import json

import numpy as np
import pytest
import torch

from cfssl.errors import UserError
from cfssl.evaluate.localisation import area_errors, leakage, localisation, localisation_ratio
from cfssl.seeds import numpy_generator, torch_generator


def test_a_change_inside_the_region_is_wholly_local_and_one_outside_not_at_all() -> None:
    target = torch.zeros(3, 16, 16, dtype=torch.bool)
    target[:, 6:9, 6:9] = True
    reference = torch.zeros(3, 1, 16, 16)
    images = reference.clone()
    images[0, 0, 7, 7] = 1.0
    images[1, 0, 1, 1] = -1.0
    images[2, 0, 8, 10], images[2, 0, 8, 11] = 0.5, -1.5  # 2 pixels away, and 3
    assert localisation_ratio(images, reference, target) == pytest.approx([1.0, 0.0, 0.25])


@pytest.mark.parametrize("shape", [(4, 2, 12, 14), (3, 1, 6, 7, 8)])
def test_the_ratio_is_a_sum_over_all_pixels_within_reach(shape: tuple[int, ...]) -> None:
    rng = torch_generator("ratio")
    images, reference = torch.rand(shape, generator=rng), torch.rand(shape, generator=rng)
    target = torch.rand((shape[0], *shape[2:]), generator=rng) > 0.97
    target[0] = False
    found = localisation_ratio(images, reference, target, reach=2)
    for place in range(shape[0]):
        change = (images[place].double() - reference[place].double()).abs().sum(0)
        members, inside = target[place].nonzero().double(), 0.0
        for pixel in np.ndindex(*shape[2:]):
            away = (members - torch.tensor(pixel).double()).norm(dim=1)
            inside += float(change[pixel]) if (away <= 2).any() else 0.0
        assert found[place] == pytest.approx(inside / float(change.sum()))


def test_a_generator_that_copies_its_input_has_no_localisation_and_the_summary_says_so() -> None:
    images = torch.rand(4, 1, 8, 8, generator=torch_generator("copy"))
    ratio = localisation_ratio(images, images, torch.ones(4, 8, 8, dtype=torch.bool))
    assert np.isnan(ratio).all()
    summary = localisation(ratio, np.zeros((4, 3)), np.array([0, 1, 2, 0]), resamples=20)
    assert summary["localisation_ratio"]["value"] is None
    assert summary["localisation_ratio"]["reason"] == "nothing changed in any image"
    assert summary["leakage"]["reason"] == "the areas intervened on changed in no image"
    json.dumps(summary, allow_nan=False)


def test_leakage_is_the_change_of_other_regions_in_units_of_the_intervened_one() -> None:
    change = np.array([[0.1, -0.02, 0.03], [0.0, 0.2, 0.0], [0.01, 0.01, 0.0]])
    intervened = np.array([0, 1, 2])
    assert leakage(change, intervened, eps=1e-9) == pytest.approx([0.5, 0.0, 0.02 / 1e-9])
    found = localisation(np.array([0.5, 0.9, np.nan]), change, intervened, resamples=200)
    assert found["leakage"]["value"] == pytest.approx((0.05 + 0.0 + 0.02) / 0.3)
    ratio = found["localisation_ratio"]
    assert (ratio["value"], ratio["n"], ratio["without"]) == (pytest.approx(0.7), 2, 1)


def test_area_errors_keep_the_target_apart_from_all_others() -> None:
    rng = numpy_generator("areas")
    wanted, measured = rng.uniform(0, 0.2, (50, 4)), rng.uniform(0, 0.2, (50, 4))
    wanted[0] = 0
    intervened = rng.integers(0, 3, 50)  # the last is never intervened on
    pixels = 64 * 64
    found = area_errors(measured, wanted, intervened, ("a", "b", "c", "d"), pixels, resamples=30)
    target, others, of_b = [], [], []
    for n in range(50):
        errors = [abs(measured[n, v] - wanted[n, v]) for v in range(4)]
        shares = [errors[v] / max(wanted[n, v], 1 / pixels) for v in range(4)]
        rest = [v for v in range(4) if v != intervened[n]]
        target.append((errors[intervened[n]], shares[intervened[n]]))
        others.append((np.mean([errors[v] for v in rest]), np.mean([shares[v] for v in rest])))
        if intervened[n] == 1:
            of_b.append(errors[1])
    for role, pairs in (("target", target), ("others", others)):
        error, share = np.mean(pairs, axis=0)
        assert found[role]["percent"]["value"] == pytest.approx(100 * error)
        assert found[role]["pixels"]["value"] == pytest.approx(pixels * error)
        assert found[role]["mape"]["value"] == pytest.approx(share)
        assert found[role]["mape"]["low"] < share < found[role]["mape"]["high"]
    assert found["names"]["b"]["target"]["pixels"]["value"] == pytest.approx(pixels * np.mean(of_b))
    assert found["names"]["d"]["target"]["pixels"]["value"] is None
    json.dumps(found, allow_nan=False)


def test_pixels_given_as_fractions_and_soft_masks_are_refused() -> None:
    with pytest.raises(UserError, match="An area is not between 0 and 1"):
        area_errors(np.full((2, 1), 40.0), np.full((2, 1), 41.0), np.zeros(2, int), ("a",), 64)
    with pytest.raises(ValueError, match=r"expected \(2, 2\)"):
        area_errors(np.zeros((2, 1)), np.zeros((2, 1)), np.zeros(2, int), ("a", "b"), 64)
    images = torch.zeros(1, 1, 4, 4)
    with pytest.raises(ValueError, match=r"target is torch\.float32"):
        localisation_ratio(images, images, torch.zeros(1, 4, 4))

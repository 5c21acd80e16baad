"""The counterfactual latent divergence against brute force and torch.distributions."""

import math

import numpy as np
import pytest
import torch
from torch.distributions import Independent, Normal
from torch.distributions import kl_divergence as torch_kl

from cfssl.errors import UserError
from cfssl.evaluate.minimality import (
    Gaussians,
    bin_edges,
    changed_values,
    kl_divergence,
    latent_divergence,
    value_bins,
)
from cfssl.seeds import numpy_generator


def gaussians(count: int, seed: int, width: int = 4) -> Gaussians:
    rng = numpy_generator("gaussians", seed)
    return Gaussians(rng.normal(size=(count, width)), rng.normal(0, 0.5, size=(count, width)))


def test_the_divergence_is_the_kl_of_diagonal_gaussians() -> None:
    q, p = gaussians(50, 0), gaussians(50, 1)

    def law(part: Gaussians) -> Independent:
        return Independent(Normal(torch.from_numpy(part.mean), torch.from_numpy(part.log_sigma).exp()), 1)

    np.testing.assert_allclose(kl_divergence(q, p), torch_kl(law(q), law(p)).numpy(), rtol=1e-10)
    np.testing.assert_allclose(kl_divergence(q, q), 0, atol=1e-12)


def test_the_published_use_of_the_mean_as_log_sigma_would_give_another_distance() -> None:
    q, p = gaussians(50, 0), gaussians(50, 1)
    defect = kl_divergence(Gaussians(q.mean, q.mean), Gaussians(p.mean, p.mean))
    assert np.abs(defect - kl_divergence(q, p)).max() > 1


@pytest.mark.parametrize("chunk", [2_000_000, 100])
def test_the_shares_are_those_of_a_count_by_hand(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr("cfssl.evaluate.minimality.CHUNK", chunk)
    count = 40
    real, made = gaussians(count, 0), gaussians(count, 1)
    rng = numpy_generator("bins")
    bins, bins_cf = rng.integers(0, 3, count), rng.integers(0, 3, count)
    found = latent_divergence(real, made, bins, bins_cf, real, bins, rows=np.arange(count))

    def kl(q: Gaussians, i: int, p: Gaussians, j: int) -> float:
        total = 0.0
        for a, s, b, t in zip(q.mean[i], q.log_sigma[i], p.mean[j], p.log_sigma[j], strict=True):
            total += t - s + (math.exp(2 * s) + (a - b) ** 2) / (2 * math.exp(2 * t)) - 0.5
        return total

    for i in range(count):
        limit = kl(made, i, real, i)
        near = [kl(real, j, real, i) <= limit for j in range(count) if bins[j] == bins_cf[i]]
        far = [kl(real, j, real, i) >= limit for j in range(count) if bins[j] == bins[i] and j != i]
        p1, p2 = np.mean(near), np.mean(far)
        assert (found.p1[i], found.p2[i]) == pytest.approx((p1, p2))
        assert found.cld[i] == pytest.approx(math.log(0.8 * math.exp(p1) + 0.2 * math.exp(p2)))


def test_a_copy_has_the_divergence_that_makes_the_metric_nearly_rangeless() -> None:
    real = gaussians(60, 0)
    bins = np.arange(60) % 3
    found = latent_divergence(real, real, bins, (bins + 1) % 3, real, bins, rows=np.arange(60))
    assert found.p1.tolist() == [0] * 60
    assert found.p2.tolist() == [1] * 60
    assert found.cld == pytest.approx(np.full(60, math.log(0.8 + 0.2 * math.e)))
    assert found.cld[0] == pytest.approx(0.295, abs=1e-3)


def test_the_minimal_edit_has_both_shares_zero_and_a_bin_without_images_has_none() -> None:
    line = np.array([[0.0], [1.0], [2.0], [10.0], [11.0]])
    real = Gaussians(line, np.zeros_like(line))
    bins = np.array([0, 0, 0, 1, 1])
    x, made = Gaussians(line[:1], np.zeros((1, 1))), Gaussians(np.array([[9.0]]), np.zeros((1, 1)))
    found = latent_divergence(x, made, bins[:1], np.array([1]), real, bins, rows=np.array([0]))
    assert (found.p1[0], found.p2[0], found.cld[0]) == pytest.approx((0, 0, 0))
    empty = latent_divergence(x, made, bins[:1], np.array([7]), real, bins)
    assert np.isnan(empty.p1[0])
    assert np.isnan(empty.cld[0])


def test_bins_lie_between_the_means_of_equal_parts() -> None:
    values = np.array([-1.0, -0.9, -0.1, 0.1, 0.95, 1.0])
    edges = bin_edges(values, -1, 1, count=4)
    assert edges == pytest.approx([-0.95, -0.1, 0.1, 0.975])
    assert value_bins(np.array([-1.0, -0.9, 0.0, 0.5, 1.0]), edges).tolist() == [0, 1, 2, 3, 4]
    assert len(bin_edges(np.linspace(-1, 1, 1000), -1, 1)) == 9
    with pytest.raises(UserError, match="No value lies between 5 and 6"):
        bin_edges(values, 5, 6)


def test_changed_values_occur_among_the_images_lie_in_another_bin_and_are_equally_likely() -> None:
    rng = numpy_generator("values")
    values = rng.choice([0.1, 0.2, 0.5, 0.9], 30_000)
    bins = value_bins(values, np.array([0.3, 0.7]))
    drawn = changed_values(values, bins, rng)
    assert set(np.unique(drawn)) == {0.1, 0.2, 0.5, 0.9}
    assert (value_bins(drawn, np.array([0.3, 0.7])) != bins).all()
    of_middle = drawn[values == 0.5]
    for value in (0.1, 0.2, 0.9):
        assert (of_middle == value).mean() == pytest.approx(1 / 3, abs=0.02)
    digits = np.arange(1000) % 10
    assert (changed_values(digits, digits, rng) != digits).all()
    with pytest.raises(UserError, match="All values lie in one bin"):
        changed_values(values, np.zeros(len(values), np.int64), rng)


def test_embeddings_that_do_not_belong_together_are_refused() -> None:
    real = gaussians(5, 0)
    with pytest.raises(ValueError, match="embeddings"):
        latent_divergence(real, gaussians(4, 0), np.zeros(5), np.zeros(5), real, np.zeros(5))

"""The probability of a grey level: exact against SciPy, sums to one, and has a gradient however far out."""

import numpy as np
import pytest
import torch
from scipy.special import log_ndtr

from cfssl.generators.hvae_likelihood import (
    HALF_LEVEL,
    LOG_SIGMA_X,
    GaussianHead,
    Likelihood,
    discretised_nll,
    gaussian_nll,
    log1mexp,
)

LEVELS = torch.arange(256, dtype=torch.float64) / 127.5 - 1


def nll_of_pixels(x: torch.Tensor, mean: torch.Tensor, log_sigma: torch.Tensor) -> torch.Tensor:
    """One image per pixel."""
    return discretised_nll(x[:, None], Likelihood(mean[:, None], log_sigma[:, None]))


def scipy_log_p(x: np.ndarray, mean: np.ndarray, sigma: np.ndarray) -> np.ndarray:
    """log[Phi(b) - Phi(a)] in float64 on the side of the mean where neither is close to one."""
    lower, upper = (x - mean - HALF_LEVEL) / sigma, (x - mean + HALF_LEVEL) / sigma
    lower, upper = np.where(x > mean, -upper, lower), np.where(x > mean, -lower, upper)
    inside = log_ndtr(upper) + np.log(-np.expm1(log_ndtr(lower) - log_ndtr(upper)))
    dark, bright = log_ndtr((x - mean + HALF_LEVEL) / sigma), log_ndtr(-(x - mean - HALF_LEVEL) / sigma)
    return np.where(x < -0.999, dark, np.where(x > 0.999, bright, inside))


@pytest.mark.parametrize("log_sigma", [-6.9, *LOG_SIGMA_X, -2.0])
@pytest.mark.parametrize("mean", [-1.7, -1.0, -0.3, 0.002, 0.9, 4.0])
def test_the_probabilities_of_all_grey_levels_sum_to_one(mean: float, log_sigma: float) -> None:
    constant = torch.ones_like(LEVELS)
    log_p = -nll_of_pixels(LEVELS, mean * constant, log_sigma * constant)
    assert float(log_p.logsumexp(0)) == pytest.approx(0, abs=1e-9)
    single = -nll_of_pixels(LEVELS.float(), (mean * constant).float(), (log_sigma * constant).float())
    assert float(single.logsumexp(0)) == pytest.approx(0, abs=1e-4)


def grid() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    means = torch.tensor([-1.2, -0.97, -0.2, 0.0, 0.4, 1.0, 1.5], dtype=torch.float64)
    scales = torch.tensor([-4.0, -2.5, -1.0, 0.0, 1.0], dtype=torch.float64)
    x, mean, log_sigma = (part.flatten() for part in torch.meshgrid(LEVELS, means, scales, indexing="ij"))
    return x, mean, log_sigma


def test_it_is_scipys_in_float64_and_close_to_it_in_float32() -> None:
    x, mean, log_sigma = grid()
    expected = torch.from_numpy(scipy_log_p(x.numpy(), mean.numpy(), log_sigma.exp().numpy()))
    torch.testing.assert_close(-nll_of_pixels(x, mean, log_sigma), expected, rtol=1e-9, atol=1e-8)
    found = -nll_of_pixels(x.float(), mean.float(), log_sigma.float())
    torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=1e-4)


def test_its_gradient_is_the_closed_form() -> None:
    """d log P / d mu = (phi(a) - phi(b)) / (sigma P), with open tails where the level is the last one."""
    x, mean, log_sigma = grid()
    mean = mean.clone().requires_grad_(True)
    (found,) = torch.autograd.grad(-nll_of_pixels(x, mean, log_sigma).sum(), mean)
    mu, sigma = mean.detach(), log_sigma.exp()
    lower, upper = (x - mu - HALF_LEVEL) / sigma, (x - mu + HALF_LEVEL) / sigma
    log_p = torch.from_numpy(scipy_log_p(x.numpy(), mu.numpy(), sigma.numpy()))
    densities = [torch.exp(-0.5 * edge**2 - log_p) / np.sqrt(2 * np.pi) for edge in (lower, upper)]
    densities[0] = torch.where(x < -0.999, 0.0, densities[0])
    densities[1] = torch.where(x > 0.999, 0.0, densities[1])
    torch.testing.assert_close(found, (densities[0] - densities[1]) / sigma, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("x", [-1.0, -0.2, 1.0])
@pytest.mark.parametrize("log_sigma", [-6.9, -4.0, -1.0])
@pytest.mark.parametrize("side", [-1.0, 1.0])
def test_far_out_the_gradient_pulls_the_mean_back(x: float, log_sigma: float, side: float) -> None:
    """Where the published code, which clamps at 1e-12, has none. d NLL / d mu = (mu - x) / sigma^2 up to the
    width of the level; from float32, as in training."""
    mean = torch.tensor([x + 3 * side], requires_grad=True)
    scale = torch.tensor([log_sigma], requires_grad=True)
    value = nll_of_pixels(torch.tensor([x]), mean, scale).sum()
    value.backward()
    assert torch.isfinite(value)
    assert torch.isfinite(scale.grad).all()  # type: ignore[union-attr]
    in_its_tail = (x == -1 and side < 0) or (x == 1 and side > 0)
    if in_its_tail:  # beyond the end of the scale, the last level is certain
        assert abs(float(mean.grad)) < 1e-2 * np.exp(-log_sigma)  # type: ignore[arg-type]
        return
    expected = side * 3 * np.exp(-2 * log_sigma)
    assert float(mean.grad) == pytest.approx(expected, rel=0.06)  # type: ignore[arg-type]
    assert clamped_gradient(x, x + 3 * side, log_sigma) == 0 or log_sigma == -1.0


def clamped_gradient(x: float, mean: float, log_sigma: float) -> float:
    """Of the published form: Phi by a tanh, arguments of logs clamped at 1e-12."""
    mu = torch.tensor(mean, requires_grad=True)
    edges = [(x - mu + side / 255) * np.exp(-log_sigma) for side in (1, -1)]
    upper, lower = (0.5 * (1 + torch.tanh((2 / np.pi) ** 0.5 * (v + 0.044715 * v**3))) for v in edges)
    p = upper if x < -0.999 else 1 - lower if x > 0.999 else upper - lower
    torch.log(p.clamp(min=1e-12)).backward()
    return float(mu.grad)  # type: ignore[arg-type]


def test_log1mexp_keeps_its_digits_at_both_ends() -> None:
    d = torch.tensor([1e-12, 1e-6, 0.69, 0.7, 5.0, 40.0], dtype=torch.float64)
    expected = torch.from_numpy(np.log(-np.expm1(-d.numpy())))
    torch.testing.assert_close(log1mexp(d)[:-1], expected[:-1], rtol=1e-10, atol=0)
    assert float(log1mexp(torch.tensor(40.0, dtype=torch.float64))) == pytest.approx(
        -np.exp(-40.0), rel=1e-12
    )


def test_a_narrow_level_has_the_density_times_its_width() -> None:
    """So the two likelihoods differ by log(2 half) where sigma is wide."""
    generator = torch.Generator().manual_seed(0)
    x, mean = (torch.rand(3, 1, 4, 4, generator=generator, dtype=torch.float64) * 1.8 - 0.9 for _ in range(2))
    likelihood = Likelihood(mean, torch.zeros_like(mean))
    expected = gaussian_nll(x, likelihood) - np.log(2 * HALF_LEVEL)
    torch.testing.assert_close(discretised_nll(x, likelihood), expected, rtol=1e-4, atol=0)


@torch.no_grad()
@pytest.mark.parametrize("sigma", ["pixel", "shared", "fixed"])
def test_the_head_starts_wide_and_unfolds_to_the_images(sigma: str) -> None:
    head = GaussianHead(8, 3, 1, sigma, 0.25, unshuffle=2)  # type: ignore[arg-type]
    found = head(torch.zeros(2, 8, 4, 4))
    assert found.mean.shape == (2, 3, 8, 8)
    expected = np.log(0.25) if sigma == "fixed" else -1.0
    torch.testing.assert_close(found.log_sigma, torch.full_like(found.log_sigma, expected))
    assert found.log_sigma.shape == ((2, 3, 8, 8) if sigma == "pixel" else ())
    assert any(name == "log_sigma" for name, _ in head.named_parameters()) == (sigma == "shared")

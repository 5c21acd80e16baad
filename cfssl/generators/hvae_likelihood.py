"""p(x | z, pa) of the HVAE: the head that states it, and its negative log-likelihood in nats per pixel.

Enters: features (B, width, r, r). Leaves: a Gaussian over pixels in [-1, 1], read either as a density or, as
in De Sousa Ribeiro et al. 2023, as the probability of each grey level,

    log P(x) = log[Phi((x - mu + half) / sigma) - Phi((x - mu - half) / sigma)],    tails open at |x| > .999.

The published code approximates Phi by a tanh and clamps every argument of a log at 1e-12, so a pixel far from
its mean has no gradient. Here Phi is exact and the difference is taken of logarithms, so both value and
gradient are right however far the pixel lies. Its colour channels predict one another; here they are
independent given z, so that the likelihood is a function of z and pa alone.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F

LOG_SIGMA_X = (-4.0, 1.0)  # a free scale on flat background collapses and makes (x - mu) / sigma enormous
HALF_LEVEL = 1 / 255  # half the distance of two 8-bit grey levels in [-1, 1]
SigmaKind = Literal["pixel", "shared", "fixed"]


@dataclass(frozen=True)
class Gaussian:
    """Independent Gaussians: mean and log standard deviation, of one shape or broadcastable to it."""

    mean: torch.Tensor
    log_sigma: torch.Tensor

    @property
    def sigma(self) -> torch.Tensor:
        return self.log_sigma.exp()


Likelihood = Gaussian  # over pixels: mean (B, C, H, W)


class GaussianHead(nn.Module):
    """Features (B, `width`, r, r) -> Likelihood (B, `channels`, r * `unshuffle`, r * `unshuffle`), by one
    convolution.

    `sigma`: "fixed" (at `fixed_sigma`), "shared" (one learned scale), or "pixel" (one per pixel, so that
    exogenous noise is rescaled under an intervention: grain follows the scanner).
    """

    log_sigma: torch.Tensor

    def __init__(
        self,
        width: int,
        channels: int,
        kernel: int,
        sigma: SigmaKind,
        fixed_sigma: float,
        unshuffle: int = 1,
    ) -> None:
        super().__init__()
        self.sigma, self.unshuffle = sigma, unshuffle
        folded = channels * unshuffle**2
        outputs = 2 * folded if sigma == "pixel" else folded
        self.conv = nn.Conv2d(width, outputs, kernel, padding=kernel // 2)
        assert self.conv.bias is not None
        nn.init.zeros_(self.conv.bias)
        if sigma == "pixel":
            # Start wide: a small first sigma has no gradient where the mean is far off.
            nn.init.constant_(self.conv.bias[folded:], -1.0)
        elif sigma == "shared":
            self.log_sigma = nn.Parameter(torch.tensor(-1.0))
        else:
            self.register_buffer("log_sigma", torch.tensor(fixed_sigma).log())

    def forward(self, h: torch.Tensor) -> Likelihood:
        folded = self.conv(h)
        if self.sigma == "fixed":  # it cannot collapse
            return Likelihood(F.pixel_shuffle(folded, self.unshuffle), self.log_sigma)
        if self.sigma == "shared":
            return Likelihood(F.pixel_shuffle(folded, self.unshuffle), self.log_sigma.clamp(*LOG_SIGMA_X))
        mean, log_sigma = (F.pixel_shuffle(part, self.unshuffle) for part in folded.chunk(2, dim=1))
        return Likelihood(mean, log_sigma.clamp(*LOG_SIGMA_X))


def gaussian_nll(x: torch.Tensor, likelihood: Likelihood) -> torch.Tensor:
    """-log N(x; mean, sigma) in nats, averaged over the pixels of each image: (B,)."""
    standardised = (x - likelihood.mean) * (-likelihood.log_sigma).exp()
    half_log_two_pi = 0.9189385332046727
    return (0.5 * standardised**2 + likelihood.log_sigma + half_log_two_pi).flatten(1).mean(1)


def discretised_nll(x: torch.Tensor, likelihood: Likelihood, half_bin: float = HALF_LEVEL) -> torch.Tensor:
    """-log P(x) of the grey level of width 2 `half_bin` around each pixel, in nats, averaged over the pixels
    of each image: (B,). The darkest and the brightest level hold the tails, so the levels sum to one.

    In float64 inside: at 3000 sigma PyTorch's float32 derivative of log Phi is a tenth off.
    """
    scale = (-likelihood.log_sigma.double()).exp()
    centred = x.double() - likelihood.mean.double()
    lower, upper = (centred - half_bin) * scale, (centred + half_bin) * scale
    # Phi(b) - Phi(a) = Phi(-a) - Phi(-b): on the left of the mean neither is close to one.
    right = centred > 0
    below, above = torch.where(right, -upper, lower), torch.where(right, -lower, upper)
    log_above = torch.special.log_ndtr(above)
    inside = log_above + log1mexp(log_above - torch.special.log_ndtr(below))
    dark = torch.where(right, torch.special.log_ndtr(upper), log_above)
    bright = torch.where(right, log_above, torch.special.log_ndtr(-lower))
    log_p = torch.where(x < -0.999, dark, torch.where(x > 0.999, bright, inside))
    return -log_p.flatten(1).mean(1).to(x.dtype)


def log1mexp(d: torch.Tensor) -> torch.Tensor:
    """log(1 - exp(-d)) for d > 0, by the branch that keeps its digits (Maechler 2012)."""
    small = d < 0.6931471805599453
    near = torch.log(-torch.expm1(-torch.where(small, d, 0.5)))
    far = torch.log1p(-torch.exp(-torch.where(small, 1.0, d)))
    return torch.where(small, near, far)

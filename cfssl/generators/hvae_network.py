"""The conditional hierarchical VAE p(x | z_1:L, pa), as a network; De Sousa Ribeiro et al. 2023 ("High
Fidelity Image Counterfactuals with Probabilistic Causal Models", section 3; structure in their appendix).

One walk from coarse to fine serves every size, small (hvae_small.py) and published (hvae_deep.py):

    prior_i     : z-path [, pa]     -> mu_p, log sigma_p, feature
    posterior_i : [h, pa, enc(x)_i] -> mu_q, log sigma_q
    h      <- Block(h + feature + W_z [z_i, pa], pa)
    z-path <- W_f [z_i, feature]

The prior reads a path of its own, made of z alone; if it read the decoder state h, as in an ordinary ladder
VAE, pa would leak into it through the back door. So with an exogenous prior no parent reaches p(z_1:L). As a
latent mediator, p(z_1:L | pa), each prior is given the parents openly.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from cfssl.generators.hvae_likelihood import Gaussian, Likelihood

LOG_SIGMA_Z = (-7.0, 3.0)  # the KL holds exp(-2 log sigma_p) and explodes when a prior variance collapses


class Level(Protocol):
    """One step of the walk at one resolution. `latent_shape` is (z, r, r), or None for a level whose z is the
    prior's mean. `prior_context` is None for an exogenous prior."""

    latent_shape: tuple[int, int, int] | None

    def enter(self, h: Tensor) -> Tensor:
        """The decoder state, brought to this level's resolution and width."""
        ...

    def enter_path(self, path: Tensor) -> Tensor:
        """The z-path, likewise."""
        ...

    def read_prior(self, path: Tensor, prior_context: Tensor | None) -> tuple[Gaussian, Tensor]:
        """-> p(z_i | z_<i [, pa]), feature."""
        ...

    def read_posterior(self, h: Tensor, encoded: Tensor, context: Tensor) -> Gaussian:
        """-> q(z_i | z_<i, x, pa)."""
        ...

    def advance(self, h: Tensor, feature: Tensor, z: Tensor, context: Tensor) -> Tensor:
        """-> h after this level."""
        ...

    def advance_path(self, feature: Tensor, z: Tensor) -> Tensor:
        """-> z-path after this level."""
        ...


@dataclass(frozen=True)
class Inference:
    """One pass over images: latents, posteriors and KL(q || p) (B, z, r, r) in nats per stochastic level,
    coarse to fine, and p(x | z, pa)."""

    latents: list[Tensor]
    posterior: list[Gaussian]
    divergences: list[Tensor]
    likelihood: Likelihood


class HVAE(nn.Module):
    """Images (B, C, S, S) in [-1, 1]; context (B, width) from a `ParentEncoder`.

    `encoder`: x -> one feature map per stochastic level, coarse to fine. `start`: channels and side of the
    first level. `levels`: see `Level`. `output`: (h, context) -> Likelihood. `mediator`: whether the levels'
    priors are given the parents.
    """

    def __init__(
        self,
        encoder: nn.Module,
        start: tuple[int, int],
        levels: Sequence[nn.Module],
        output: nn.Module,
        mediator: bool,
    ) -> None:
        super().__init__()
        width, side = start
        self.encoder = encoder
        self.start = nn.Parameter(torch.zeros(1, width, side, side))
        self.path_start = nn.Parameter(torch.zeros(1, width, side, side))
        self.levels = nn.ModuleList(levels)
        self.output = output
        self.mediator = mediator
        shapes = [level.latent_shape for level in self._levels]
        self.latent_shapes = tuple(shape for shape in shapes if shape is not None)

    @property
    def _levels(self) -> list[Level]:
        return list(self.levels)  # type: ignore[arg-type]

    @property
    def noise_size(self) -> int:
        """How many standard normal numbers one image's latents take."""
        return sum(math.prod(shape) for shape in self.latent_shapes)

    def split_noise(self, noise: Tensor) -> list[Tensor]:
        """(B, noise_size) -> one (B, z, r, r) per stochastic level."""
        parts = noise.split([math.prod(shape) for shape in self.latent_shapes], 1)
        return [part.unflatten(1, shape) for part, shape in zip(parts, self.latent_shapes, strict=True)]

    def infer(
        self,
        x: Tensor,
        context: Tensor,
        noise: list[Tensor] | None = None,
        prior_context: Tensor | None = None,
        likelihood_context: Tensor | None = None,
    ) -> Inference:
        """z ~ q(z | x, pa) with the given standard normal `noise`, or the posterior means without.

        `prior_context` and `likelihood_context` stand in for `context` on the prior's path (of a mediator)
        and in h, which conditioning dropout needs; the posterior always reads `context`.
        """
        encoded = self.encoder(x)
        latents: list[Tensor] = []
        posterior: list[Gaussian] = []
        divergences: list[Tensor] = []

        def sample(index: int, prior: Gaussian, level: Level, h: Tensor) -> Tensor:
            q = level.read_posterior(h, encoded[index], context)
            z = q.mean if noise is None else q.mean + q.sigma * noise[index]
            latents.append(z)
            posterior.append(q)
            divergences.append(gaussian_kl(q, prior))
            return z

        seen = context if likelihood_context is None else likelihood_context
        h = self._walk(len(x), sample, context if prior_context is None else prior_context, seen)
        return Inference(latents, posterior, divergences, self.output(h, seen))

    def decode(self, latents: Sequence[Tensor], context: Tensor) -> Likelihood:
        """p(x | z, pa). Of a mediator the priors' features, which enter h, see pa as well."""
        if len(latents) != len(self.latent_shapes):
            raise ValueError(f"{len(latents)} latents for {len(self.latent_shapes)} stochastic levels")
        h = self._walk(len(context), lambda index, *_: latents[index], context, context)
        return self.output(h, context)

    def mediate(
        self, posterior: Sequence[Gaussian], noise: Sequence[Tensor], context_cf: Tensor, weight: float
    ) -> list[Tensor]:
        """The counterfactual mediator z~ under the parents `context_cf`, coarse to fine: mu_r + sigma_r U_i
        with the noise U = (z - mu_q) / sigma_q of the factual one and, with a = `weight`,

            mu_r = a mu_q + (1 - a) mu_p~,   sigma_r^2 = a^2 sigma_q^2 + (1 - a)^2 sigma_p~^2.

        p~ is the prior given pa~ and the z~_<i already made here. The published code draws p~ from an
        independent ancestral pass, whose coarser latents are not those of the image.
        """

        def mix(index: int, prior: Gaussian, *_: object) -> Tensor:
            q = posterior[index]
            mean = weight * q.mean + (1 - weight) * prior.mean
            return mean + torch.hypot(weight * q.sigma, (1 - weight) * prior.sigma) * noise[index]

        return self._ancestral(len(context_cf), mix, context_cf)

    def sample_latents(self, noise: Sequence[Tensor], context: Tensor | None = None) -> list[Tensor]:
        """z ~ p(z), which no parent can reach, or z ~ p(z | pa) of a mediator, which needs `context`."""
        if self.mediator and context is None:
            raise ValueError("a latent mediator is sampled given the parents' context")

        def draw(index: int, prior: Gaussian, *_: object) -> Tensor:
            return prior.mean + prior.sigma * noise[index]

        return self._ancestral(len(noise[0]), draw, context)

    def _ancestral(
        self, count: int, choose: Callable[..., Tensor], prior_context: Tensor | None
    ) -> list[Tensor]:
        latents: list[Tensor] = []

        def keep(*arguments: object) -> Tensor:
            latents.append(choose(*arguments))
            return latents[-1]

        self._walk(count, keep, prior_context, None)
        return latents

    def _walk(
        self,
        count: int,
        choose: Callable[[int, Gaussian, Level, Tensor], Tensor],
        prior_context: Tensor | None,
        context: Tensor | None,
    ) -> Tensor:
        """Down all levels, with `choose(place, prior, level, h)` for the z of each stochastic one. -> h.
        Without `context` only the z-path is walked and h stays at its start."""
        if not self.mediator:
            prior_context = None
        h, path = (start.expand(count, -1, -1, -1) for start in (self.start, self.path_start))
        place = 0
        for level in self._levels:
            path = level.enter_path(path)
            if context is not None:
                h = level.enter(h)
            prior, feature = level.read_prior(path, prior_context)
            z = prior.mean
            if level.latent_shape is not None:
                z = choose(place, prior, level, h)
                place += 1
            if level is not self.levels[-1]:
                path = level.advance_path(feature, z)
            if context is not None:
                h = level.advance(h, feature, z, context)
        return h


def gaussian_kl(q: Gaussian, p: Gaussian) -> Tensor:
    """KL(q || p) in nats, elementwise."""
    scaled = ((q.mean - p.mean) ** 2 + (2 * q.log_sigma).exp()) * (-2 * p.log_sigma).exp()
    return p.log_sigma - q.log_sigma + 0.5 * (scaled - 1)


def with_context(h: Tensor, context: Tensor) -> Tensor:
    """[h, pa]: the context (B, width) at every pixel, behind the channels of h."""
    return torch.cat([h, context[:, :, None, None].expand(-1, -1, *h.shape[2:])], dim=1)

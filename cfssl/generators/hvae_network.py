"""The conditional hierarchical VAE p(x | z_1:L, pa), as a network.

Follows the exogenous-prior reading of De Sousa Ribeiro et al. 2023 ("High Fidelity Image Counterfactuals with
Probabilistic Causal Models", section 3; structure in their appendix): the latents are part of the image's
exogenous noise, so their prior p(z_1:L) must not see the parents pa. It therefore reads a path of its own,
made of z alone ("z-path"); if it read the decoder state h, as in an ordinary ladder VAE, pa would leak into
the prior through the back door.

    prior_i     : z-path            -> mu_p, log sigma_p, feature
    posterior_i : [h, pa, enc(x)_i] -> mu_q, log sigma_q
    h      <- Block(h + feature + W_z [z_i, pa], pa)
    z-path <- W_f [z_i, feature]

The sizes are small (S-HVAE): latents at 16x16, 8x8 and 4x4 only, and a pixel-unshuffle stem that brings
larger images to twice the finest latent resolution, which makes a 64 px model cost as much as a 32 px one.
"""

import itertools
from dataclasses import dataclass as plain_dataclass

import torch
from torch import nn
from torch.nn import functional as F

LOG_SIGMA_Z = (-7.0, 3.0)  # the KL holds exp(-2 log sigma_p) and explodes when a prior variance collapses
LOG_SIGMA_X = (-4.0, 1.0)  # a free scale on flat background collapses and makes (x - mu) / sigma enormous
RESOLUTIONS = (32, 16, 8, 4)  # feature maps; latents live at all but the first


class Block(nn.Module):
    """Residual block of two 3x3 convolutions; the parents scale and shift the features between them
    (FiLM)."""

    def __init__(self, width: int, context: int = 0) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(4, width)
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)
        self.film = nn.Linear(context, 2 * width) if context else None
        # Each block starts as the identity, so depth costs nothing at the start.
        nn.init.zeros_(self.second.weight)
        nn.init.zeros_(self.second.bias)  # type: ignore[arg-type]

    def forward(self, h: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        inner = self.first(F.silu(self.norm(h)))
        if self.film is not None:
            scale, shift = self.film(context)[:, :, None, None].chunk(2, dim=1)
            inner = inner * (1 + scale) + shift
        return h + self.second(F.silu(inner))


class Level(nn.Module):
    """One stochastic level at one resolution: prior, posterior and the update of h and of the z-path."""

    def __init__(self, width: int, latent: int, context: int) -> None:
        super().__init__()
        self.latent = latent
        self.prior_block = Block(width)
        self.prior = nn.Conv2d(width, 2 * latent, 1)
        nn.init.zeros_(self.prior.weight)
        nn.init.zeros_(self.prior.bias)  # type: ignore[arg-type]
        self.posterior_in = nn.Conv2d(2 * width, width, 1)
        self.posterior_block = Block(width, context)
        self.posterior = nn.Conv2d(width, 2 * latent, 1)
        self.z_to_h = nn.Conv2d(latent + context, width, 1)
        self.update = Block(width, context)
        self.z_to_path = nn.Conv2d(latent + width, width, 1)

    def read_prior(self, path: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """-> mu_p, log sigma_p, feature."""
        feature = self.prior_block(path)
        mean, log_sigma = self.prior(feature).chunk(2, dim=1)
        return mean, log_sigma.clamp(*LOG_SIGMA_Z), feature

    def read_posterior(
        self, h: torch.Tensor, encoded: torch.Tensor, context: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """-> mu_q, log sigma_q."""
        hidden = self.posterior_block(self.posterior_in(torch.cat([h, encoded], dim=1)), context)
        mean, log_sigma = self.posterior(hidden).chunk(2, dim=1)
        return mean, log_sigma.clamp(*LOG_SIGMA_Z)

    def advance(
        self,
        h: torch.Tensor,
        path: torch.Tensor,
        feature: torch.Tensor,
        z: torch.Tensor,
        context: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """-> h, z-path after this level."""
        spread = context[:, :, None, None].expand(-1, -1, *z.shape[2:])
        h = self.update(h + feature + self.z_to_h(torch.cat([z, spread], dim=1)), context)
        return h, self.z_to_path(torch.cat([z, feature], dim=1))


@plain_dataclass(frozen=True)
class Likelihood:
    """Gaussian over pixels: mean and log standard deviation, each (B, C, H, W) or broadcastable to it."""

    mean: torch.Tensor
    log_sigma: torch.Tensor

    @property
    def sigma(self) -> torch.Tensor:
        return self.log_sigma.exp()


class HVAE(nn.Module):
    """Images (B, C, S, S) in [-1, 1] with S = 32 * `unshuffle`; context (B, width) from a `ParentEncoder`.

    `sigma`: "fixed" (at `fixed_sigma`), "shared" (one learned scale), or "pixel" (one per pixel from z and
    pa, so that exogenous noise is rescaled under an intervention: grain follows the scanner).
    """

    def __init__(
        self,
        channels: int,
        context: int,
        unshuffle: int,
        widths: tuple[int, int, int, int],
        latents: tuple[int, int, int],
        blocks: int,
        sigma: str,
        fixed_sigma: float,
    ) -> None:
        super().__init__()
        self.channels, self.unshuffle, self.sigma_kind = channels, unshuffle, sigma
        folded = channels * unshuffle**2
        self.stem = nn.Conv2d(folded, widths[0], 3, padding=1)
        self.encoder = nn.ModuleList(
            nn.Sequential(*[Block(width) for _ in range(blocks)]) for width in widths
        )
        self.down = nn.ModuleList(nn.Conv2d(a, b, 1) for a, b in itertools.pairwise(widths))
        coarse = widths[-1]
        self.start = nn.Parameter(torch.zeros(1, coarse, RESOLUTIONS[-1], RESOLUTIONS[-1]))
        self.path_start = nn.Parameter(torch.zeros(1, coarse, RESOLUTIONS[-1], RESOLUTIONS[-1]))
        upward = widths[:0:-1]  # coarse to fine, the latent levels
        self.levels = nn.ModuleList(Level(w, z, context) for w, z in zip(upward, latents, strict=True))
        self.up = nn.ModuleList(
            nn.Conv2d(a, b, 1) for a, b in zip(upward, [*upward[1:], widths[0]], strict=True)
        )
        self.path_up = nn.ModuleList(nn.Conv2d(a, b, 1) for a, b in itertools.pairwise(upward))
        self.output_blocks = nn.ModuleList(Block(widths[0], context) for _ in range(blocks))
        outputs = folded * (2 if sigma == "pixel" else 1)
        self.output = nn.Conv2d(widths[0] + context, outputs, 3, padding=1)
        if sigma == "pixel":
            # Start wide: a small first sigma has no gradient where the mean is far off.
            nn.init.constant_(self.output.bias[folded:], -1.0)  # type: ignore[index]
        if sigma == "shared":
            self.log_sigma: torch.Tensor = nn.Parameter(torch.tensor(-1.0))
        elif sigma == "fixed":
            self.register_buffer("log_sigma", torch.tensor(fixed_sigma).log())
        self.latent_shapes = tuple((z, r, r) for z, r in zip(latents, RESOLUTIONS[:0:-1], strict=True))

    @property
    def noise_size(self) -> int:
        """How many standard normal numbers one image's latents take."""
        return sum(z * height * width for z, height, width in self.latent_shapes)

    def split_noise(self, noise: torch.Tensor) -> list[torch.Tensor]:
        """(B, noise_size) -> one (B, z, r, r) per level."""
        sizes = [z * height * width for z, height, width in self.latent_shapes]
        return [
            part.unflatten(1, shape)
            for part, shape in zip(noise.split(sizes, 1), self.latent_shapes, strict=True)
        ]

    def encode(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Features at the latent resolutions, coarse to fine."""
        h = self.stem(F.pixel_unshuffle(x, self.unshuffle))
        features = []
        for index, blocks in enumerate(self.encoder):
            if index:
                h = self.down[index - 1](F.avg_pool2d(h, 2))
            h = blocks(h)
            features.append(h)
        return features[:0:-1]

    def infer(
        self, x: torch.Tensor, context: torch.Tensor, noise: list[torch.Tensor] | None = None
    ) -> tuple[list[torch.Tensor], list[torch.Tensor], Likelihood]:
        """z ~ q(z | x, pa) with the given standard normal `noise`, or the posterior means without.

        -> latents, KL(q || p) per level (B,) in nats, and p(x | z, pa), all from one pass.
        """
        encoded = self.encode(x)
        h, path = self.start.expand(len(x), -1, -1, -1), self.path_start.expand(len(x), -1, -1, -1)
        latents, divergences = [], []
        for index, level in enumerate(self.levels):
            mean_p, log_p, feature = level.read_prior(path)  # type: ignore[operator]
            mean_q, log_q = level.read_posterior(h, encoded[index], context)  # type: ignore[operator]
            z = mean_q if noise is None else mean_q + log_q.exp() * noise[index]
            latents.append(z)
            divergences.append(gaussian_kl(mean_q, log_q, mean_p, log_p).flatten(1).sum(1))
            h, path = self._advance(index, h, path, feature, z, context)
        return latents, divergences, self._output(h, context)

    def decode(self, latents: list[torch.Tensor], context: torch.Tensor) -> Likelihood:
        """p(x | z, pa)."""
        batch = len(context)
        h, path = self.start.expand(batch, -1, -1, -1), self.path_start.expand(batch, -1, -1, -1)
        for index, (level, z) in enumerate(zip(self.levels, latents, strict=True)):
            feature = level.read_prior(path)[2]  # type: ignore[operator]
            h, path = self._advance(index, h, path, feature, z, context)
        return self._output(h, context)

    def sample_latents(self, noise: list[torch.Tensor]) -> list[torch.Tensor]:
        """z ~ p(z), which no parent can reach."""
        path = self.path_start.expand(len(noise[0]), -1, -1, -1)
        latents = []
        for index, level in enumerate(self.levels):
            mean, log_sigma, feature = level.read_prior(path)  # type: ignore[operator]
            z = mean + log_sigma.exp() * noise[index]
            latents.append(z)
            path = level.z_to_path(torch.cat([z, feature], dim=1))  # type: ignore[operator]
            if index < len(self.path_up):
                path = F.interpolate(self.path_up[index](path), scale_factor=2)
        return latents

    def _advance(
        self,
        index: int,
        h: torch.Tensor,
        path: torch.Tensor,
        feature: torch.Tensor,
        z: torch.Tensor,
        context: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        h, path = self.levels[index].advance(h, path, feature, z, context)  # type: ignore[operator]
        h = F.interpolate(self.up[index](h), scale_factor=2)
        if index < len(self.path_up):
            path = F.interpolate(self.path_up[index](path), scale_factor=2)
        return h, path

    def _output(self, h: torch.Tensor, context: torch.Tensor) -> Likelihood:
        for block in self.output_blocks:
            h = block(h, context)
        spread = context[:, :, None, None].expand(-1, -1, *h.shape[2:])
        folded = self.output(torch.cat([h, spread], dim=1))
        if self.sigma_kind != "pixel":
            return Likelihood(F.pixel_shuffle(folded, self.unshuffle), self.log_sigma.clamp(*LOG_SIGMA_X))
        mean, log_sigma = folded.chunk(2, dim=1)
        mean, log_sigma = F.pixel_shuffle(mean, self.unshuffle), F.pixel_shuffle(log_sigma, self.unshuffle)
        return Likelihood(mean, log_sigma.clamp(*LOG_SIGMA_X))


def gaussian_kl(
    mean_q: torch.Tensor, log_q: torch.Tensor, mean_p: torch.Tensor, log_p: torch.Tensor
) -> torch.Tensor:
    """KL(N(mean_q, exp log_q) || N(mean_p, exp log_p)) in nats, elementwise; `log_*` are log standard
    deviations."""
    return log_p - log_q + 0.5 * (((mean_q - mean_p) ** 2 + (2 * log_q).exp()) * (-2 * log_p).exp() - 1)


def gaussian_nll(x: torch.Tensor, likelihood: Likelihood) -> torch.Tensor:
    """-log N(x; mean, sigma) in nats, averaged over the pixels of each image: (B,)."""
    standardised = (x - likelihood.mean) * (-likelihood.log_sigma).exp()
    half_log_two_pi = 0.9189385332046727
    return (0.5 * standardised**2 + likelihood.log_sigma + half_log_two_pi).flatten(1).mean(1)

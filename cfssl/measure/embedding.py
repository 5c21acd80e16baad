"""A frozen embedding of images that knows no attributes: the posterior of a small VAE, for minimality.

Enters: a table. Leaves: q(z | x) of each image, a diagonal Gaussian. Melistas et al. 2024 ("Benchmarking
counterfactual image generation") measure distances between images as KL divergences between such posteriors
of an unconditional VAE with 16 latents. The decoder is trained with it and then only kept in the file.
"""

import math
from itertools import pairwise
from pathlib import Path
from typing import Self

import torch
from pydantic import Field, TypeAdapter
from pydantic.dataclasses import dataclass
from torch import nn

from cfssl.data.batches import ImageBatch, ImageData
from cfssl.data.table import ImageTable
from cfssl.engine.loop import TrainSettings, fit
from cfssl.engine.run import Run
from cfssl.measure.frozen import Record, measured, stem
from cfssl.measure.sampling import GROUPS, Width
from cfssl.models.seeded import seeded
from cfssl.settings import STRICT, Count, Positive

LOG_SIGMA = (-6.0, 2.0)  # of the latents


@dataclass(frozen=True, config=STRICT)
class EmbeddingTrainSettings(TrainSettings):
    """What suits some thousand images."""

    epochs: Count = 10
    batch: Count = 64
    lr: Positive = 2e-3


@dataclass(frozen=True, config=STRICT)
class EmbeddingSettings:
    """`latents`: dimensions of z. `width`: channels of the first of three stages, doubled by each. `sigma`:
    of the pixels, in units of the range [-1, 1]; the smaller, the finer what z has to hold."""

    latents: Count = 16
    width: Width = 16
    sigma: Positive = 0.1
    train: EmbeddingTrainSettings = Field(default_factory=EmbeddingTrainSettings)


class VAE(nn.Module):
    """x (B, C, H, W) -> z (B, latents) -> mean of x, by three strided stages and back."""

    def __init__(self, shape: tuple[int, ...], fold: int, latents: int, width: int) -> None:
        super().__init__()
        channels, height, width_ = shape
        widths = [channels * fold**2, width, 2 * width, 4 * width]
        sides = [height // fold, width_ // fold]
        down: list[nn.Module] = []
        up: list[nn.Module] = []
        for before, after in pairwise(widths):
            down += [nn.Conv2d(before, after, 3, 2, 1), nn.GroupNorm(GROUPS, after), nn.SiLU()]
            up = [nn.ConvTranspose2d(after, before, 4, 2, 1), *up]
            if before != widths[0]:
                up = [up[0], nn.GroupNorm(GROUPS, before), nn.SiLU(), *up[1:]]
        self.grid = (widths[-1], *(math.ceil(side / 8) for side in sides))
        size = math.prod(self.grid)
        self.encode = nn.Sequential(
            nn.PixelUnshuffle(fold), *down, nn.Flatten(), nn.Linear(size, 2 * latents)
        )
        self.enter = nn.Linear(latents, size)
        self.decode = nn.Sequential(*up)
        self.fold, self.sides = fold, sides

    def posterior(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and log sigma of q(z | x), (B, latents) each."""
        mean, log_sigma = self.encode(x).chunk(2, dim=1)
        return mean, log_sigma.clamp(*LOG_SIGMA)

    def image(self, z: torch.Tensor) -> torch.Tensor:
        folded = self.decode(self.enter(z).unflatten(1, self.grid))
        return nn.functional.pixel_shuffle(folded[:, :, : self.sides[0], : self.sides[1]], self.fold)


def divergence(mean: torch.Tensor, log_sigma: torch.Tensor) -> torch.Tensor:
    """KL(q || N(0, 1)) in nats (B,), of (B, latents) each."""
    return (mean.square() + (2 * log_sigma).exp() - 1).div(2).sub(log_sigma).sum(1)


class EmbeddingTask(nn.Module):
    """Minimises the negative ELBO, nats per image over the number of pixels."""

    def __init__(self, network: VAE, sigma: float) -> None:
        super().__init__()
        self.network, self.sigma = network, sigma

    def forward(self, batch: ImageBatch, step: int) -> dict[str, torch.Tensor]:
        mean, log_sigma = self.network.posterior(batch.x)
        reconstruction = self.network.image(mean + log_sigma.exp() * batch.noise)
        error = ((batch.x - reconstruction) / self.sigma).square().mean() / 2
        kl = divergence(mean, log_sigma).mean()
        return {"loss": error + kl / batch.x[0].numel(), "error": error, "kl": kl}

    def after_step(self, step: int) -> None:
        """Nothing is averaged."""


class Embedding(nn.Module):
    """See the module docstring. Created from settings and the table's image shape, then `fit` or `load`."""

    def __init__(self, settings: EmbeddingSettings, shape: tuple[int, ...]) -> None:
        """Raises `UserError` for volumes."""
        super().__init__()
        self.settings, self.shape = settings, tuple(shape)
        self.network = self._network().requires_grad_(False).eval()
        identity = {"settings": TypeAdapter(EmbeddingSettings).dump_python(settings, mode="json")}
        self.record = Record("embedding", {**identity, "shape": list(shape)})
        self.eval()

    @property
    def fingerprint(self) -> str:
        """Of weights, settings and code. Raises `UserError` before `fit` or `load`."""
        return self.record.fingerprint

    def train(self, mode: bool = True) -> Self:
        """Stays in eval mode."""
        return super().train(False)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x (B, C, H, W) float32 in [-1, 1] -> mean and log sigma of q(z | x), (B, latents) each."""
        found: tuple[torch.Tensor, torch.Tensor] = self.network.posterior(x)
        return found

    def fit(self, table: ImageTable, run: Run) -> None:
        """Trains on all training images."""
        s, network = self.settings, self._network()
        data = ImageData(
            table, table.rows("train"), {}, s.train, noise_size=s.latents, section="embedding.train"
        )
        if fit(EmbeddingTask(network, s.sigma), data, s.train, run, "embedding"):
            self.network.load_state_dict(network.state_dict())
            self.record.seal(self.network)

    def save(self, path: Path) -> None:
        """Raises `UserError` before `fit` or `load`."""
        self.record.save(path, self.network)

    def load(self, path: Path) -> None:
        """Raises `UserError` when the file belongs to other settings or images."""
        self.record.load(path, self.network)

    @torch.no_grad()
    def score(self, table: ImageTable, split: str) -> dict[str, dict[str, float]]:
        """Of the images of `split`: mean absolute `error` of reconstructions in grey levels, `kl` in nats."""
        errors, divergences = [], []
        for _, batch in measured(table, table.rows(split), self.network):
            mean, log_sigma = self.network.posterior(batch.x)
            errors.append((self.network.image(mean) - batch.x).abs().flatten(1).mean(1) * 127.5)
            divergences.append(divergence(mean, log_sigma))
        found = {"error": float(torch.cat(errors).mean()), "kl": float(torch.cat(divergences).mean())}
        return {"images": found}

    def _network(self) -> VAE:
        s, fold = self.settings, stem(self.shape, "embedding")
        network = seeded(lambda: VAE(self.shape, fold, s.latents, s.width), s.train.seed, "embedding")
        assert isinstance(network, VAE)
        return network

"""A small VAE that knows no attributes: the space in which minimality is measured (Melistas et al. 2024).

Enters: the digits' table. Leaves: a diagonal Gaussian of 16 dimensions per image.
"""

from pathlib import Path

import torch
from arms import HARDWARE, finished, in_batches, plain
from torch import Tensor, nn
from torch.nn import functional as F

from cfssl.data.batches import ImageBatch, ImageData
from cfssl.data.table import ImageTable
from cfssl.engine.checkpoint import load_checkpoint, save_checkpoint
from cfssl.engine.loop import TrainSettings, fit
from cfssl.engine.run import Run
from cfssl.evaluate.minimality import Gaussians
from cfssl.models.seeded import seeded
from cfssl.stages import TRAINING_CODE, keyed_stage

LATENT, WIDTH, SIGMA = 16, 16, 0.25  # of the pixels
EPOCHS, BATCH = 10, 64


class LatentVAE(nn.Module):
    """Images (B, 1, 32, 32) in [-1, 1]; three convolutions that halve, and three that double."""

    def __init__(self) -> None:
        super().__init__()
        w, flat = WIDTH, 4 * WIDTH * 16
        self.encoder = nn.Sequential(
            *[nn.Conv2d(1, w, 4, 2, 1), nn.SiLU(), nn.Conv2d(w, 2 * w, 4, 2, 1), nn.SiLU()],
            *[nn.Conv2d(2 * w, 4 * w, 4, 2, 1), nn.SiLU(), nn.Flatten(), nn.Linear(flat, 2 * LATENT)],
        )
        self.decoder = nn.Sequential(
            *[nn.Linear(LATENT, flat), nn.SiLU(), nn.Unflatten(1, (4 * w, 4, 4))],
            *[nn.ConvTranspose2d(4 * w, 2 * w, 4, 2, 1), nn.SiLU()],
            *[nn.ConvTranspose2d(2 * w, w, 4, 2, 1), nn.SiLU(), nn.ConvTranspose2d(w, 1, 4, 2, 1)],
        )

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """-> mean, log sigma (B, 16)."""
        mean, log_sigma = self.encoder(x).chunk(2, dim=1)
        return mean, log_sigma.clamp(-7, 3)

    def forward(self, batch: ImageBatch, step: int) -> dict[str, Tensor]:
        """The negative evidence bound in nats per image."""
        mean, log_sigma = self.posterior(batch.x)
        decoded = self.decoder(mean + log_sigma.exp() * batch.noise)
        nll = 0.5 * F.mse_loss(decoded, batch.x, reduction="sum") / SIGMA**2 / len(batch)
        kl = 0.5 * (mean**2 + (2 * log_sigma).exp() - 1 - 2 * log_sigma).sum(1).mean()
        return {"loss": nll + kl, "nll": nll, "kl": kl}

    def after_step(self, step: int) -> None:
        """Nothing is averaged."""

    def gaussians(self, x: Tensor) -> Gaussians:
        """Of images (N, 1, 32, 32)."""
        found = in_batches(len(x), lambda part: self.posterior(x[part]), 500)
        mean, log_sigma = (torch.cat(parts).numpy() for parts in zip(*found, strict=True))
        return Gaussians(mean, log_sigma)


def latent_vae(runs: Path, table: ImageTable, seed: int) -> LatentVAE:
    """Trained on the real training digits, or loaded."""
    train = TrainSettings(epochs=EPOCHS, batch=BATCH, seed=2000 + seed, clip=1000.0)
    network = seeded(LatentVAE, train.seed, "latent vae")
    assert isinstance(network, LatentVAE)
    shape = [LATENT, WIDTH, SIGMA]
    stage = keyed_stage(
        runs, "measure", "latent vae", shape, plain(train), table.fingerprint, code=TRAINING_CODE
    )

    def make(folder: Path) -> None:
        data = ImageData(table, table.rows("train"), {}, train, noise_size=LATENT)
        fit(network, data, train, Run(folder, HARDWARE, quiet=True), "latent vae")
        save_checkpoint(stage.product, {"network": network.state_dict()})

    network.load_state_dict(load_checkpoint(finished(stage, make))["network"])
    network.requires_grad_(False).eval()
    return network

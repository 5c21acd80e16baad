"""The embedding: the loss is the negative ELBO, distances of like images are smaller, it is frozen."""

from pathlib import Path

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from cfssl.data.batches import ImageBatch
from cfssl.data.phantoms import chest
from cfssl.data.pixels import to_signed
from cfssl.data.prepare import save_prepared
from cfssl.data.table import ImageTable
from cfssl.engine.run import HardwareSettings, Run
from cfssl.errors import UserError
from cfssl.measure.embedding import Embedding, EmbeddingSettings, EmbeddingTask, EmbeddingTrainSettings

SETTINGS = EmbeddingSettings(width=4, latents=4, train=EmbeddingTrainSettings(epochs=8, batch=32))


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> ImageTable:
    frame, images, _, truth = chest.build(chest.ChestWorld(), count=200, seed=0)
    folder = tmp_path_factory.mktemp("embedding") / "table"
    save_prepared(folder, "phantom_chest", frame, chest.ATTRIBUTES, images, group="patient")
    return ImageTable.open(folder, truth)


@pytest.fixture(scope="module")
def fitted(table: ImageTable, tmp_path_factory: pytest.TempPathFactory) -> Embedding:
    embedding = Embedding(SETTINGS, table.images.shape)
    run = Run(tmp_path_factory.mktemp("fit"), HardwareSettings(accelerator="cpu", threads=1), quiet=True)
    embedding.fit(table, run)
    return embedding


@pytest.mark.parametrize("shape", [(1, 64, 64), (3, 32, 32), (1, 28, 28)])
def test_images_come_back_in_their_own_shape(shape: tuple[int, ...]) -> None:
    network = Embedding(SETTINGS, shape).network
    mean, log_sigma = network.posterior(torch.zeros(2, *shape))
    assert mean.shape == log_sigma.shape == (2, 4)
    assert network.image(mean).shape == (2, *shape)


def test_the_loss_is_the_negative_elbo_over_the_number_of_pixels_up_to_a_constant() -> None:
    network = Embedding(SETTINGS, (1, 32, 32)).network
    x, noise = torch.rand(5, 1, 32, 32) * 2 - 1, torch.randn(5, 4)
    found = EmbeddingTask(network, sigma=0.1)(ImageBatch(x, {}, torch.zeros(5, 0, 32, 32), noise), 0)
    mean, log_sigma = network.posterior(x)
    q = Normal(mean, log_sigma.exp())
    likelihood = Normal(network.image(mean + log_sigma.exp() * noise), 0.1)
    constant = Normal(0.0, 0.1).log_prob(torch.zeros(())) * x[0].numel()
    elbo = likelihood.log_prob(x).flatten(1).sum(1) - constant - kl_divergence(q, Normal(0.0, 1.0)).sum(1)
    torch.testing.assert_close(found["loss"], -elbo.mean() / x[0].numel(), rtol=1e-4, atol=1e-5)


def test_an_image_is_nearer_to_itself_slightly_changed_than_to_others(
    table: ImageTable, fitted: Embedding
) -> None:
    x = to_signed(table.images.read(table.rows("test")[:32]))
    mean, log_sigma = fitted(x)
    q = Normal(mean[:, None], log_sigma.exp()[:, None])
    changed = Normal(
        *(part[None] if place == 0 else part.exp()[None] for place, part in enumerate(fitted(x * 0.98)))
    )
    distance = kl_divergence(changed, q).sum(2)  # (images, changed images)
    assert (distance.argmin(1) == torch.arange(32)).float().mean() > 0.9
    untrained = Embedding(SETTINGS, table.images.shape)
    errors = [network.score(table, "test")["images"]["error"] for network in (fitted, untrained)]
    assert errors[0] < errors[1]


def test_it_is_frozen_and_known_by_its_weights(table: ImageTable, fitted: Embedding, tmp_path: Path) -> None:
    fitted.train()
    assert not fitted.training
    assert not any(parameter.requires_grad for parameter in fitted.parameters())
    fitted.save(tmp_path / "embedding.safetensors")
    again = Embedding(SETTINGS, table.images.shape)
    with pytest.raises(UserError, match="not been fitted"):
        _ = again.fingerprint
    again.load(tmp_path / "embedding.safetensors")
    assert again.fingerprint == fitted.fingerprint

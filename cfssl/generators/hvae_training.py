"""How the HVAE is trained: the free energy, averaged weights, and which rows are drawn.

    F = mean-pixel NLL + beta sum_i KL_i / (C H W)        in nats per pixel

De Sousa Ribeiro et al. 2023; lower is better (the published code calls it `elbo`). Both terms are averaged
over the same C*H*W. Fine-tuning keeps F below a bound and takes it from `free_energy` too.
"""

import math
from dataclasses import replace
from typing import Literal, Self

import numpy as np
import torch
from torch import Tensor, nn

from cfssl.data.batches import ImageBatch
from cfssl.data.table import Attributes
from cfssl.engine.schedules import linear
from cfssl.generators.hvae_likelihood import Likelihood, discretised_nll, gaussian_nll
from cfssl.generators.hvae_network import HVAE, Inference
from cfssl.generators.hvae_settings import HVAESettings
from cfssl.scm.parents import ParentEncoder
from cfssl.seeds import torch_generator


def free_energy(
    network: HVAE, x: Tensor, inference: Inference, beta: float, settings: HVAESettings
) -> dict[str, Tensor]:
    """{"loss": F, "nll", "kl"}, nats per pixel, of images x (B, C, H, W) and what `network` infers of them.

    With free bits, the KL of a level's channel counts at least that much: max(free_bits, batch mean of the
    spatial sum), and "kl" is what F holds. The mean is that of the micro-batch.
    """
    density = gaussian_nll if settings.likelihood == "gaussian" else discretised_nll
    nll = density(x, inference.likelihood).mean()
    per_channel = torch.cat([kl.sum((2, 3)).mean(0) for kl in inference.divergences])
    assert len(per_channel) == sum(shape[0] for shape in network.latent_shapes)
    kl = per_channel.clamp_min(settings.free_bits).sum() / x[0].numel()
    return {"loss": nll + beta * kl, "nll": nll, "kl": kl}


class HVAETask(nn.Module):
    """Minimises F, and keeps averaged weights."""

    def __init__(
        self, network: HVAE, encoder: ParentEncoder, averaged: HVAE, settings: HVAESettings, steps: int
    ) -> None:
        super().__init__()
        self.network, self.encoder, self.averaged = network, encoder, averaged.requires_grad_(False)
        self.settings, self.steps = settings, steps

    def train(self, mode: bool = True) -> Self:
        """The averaged network is not trained and stays in eval mode."""
        super().train(mode)
        self.averaged.eval()
        return self

    def forward(self, batch: ImageBatch, step: int) -> dict[str, Tensor]:
        context = self.encoder(batch.attributes)
        noise = self.network.split_noise(batch.noise)
        prior_context, likelihood_context = self._contexts(context, step)
        inference = self.network.infer(batch.x, context, noise, prior_context, likelihood_context)
        inference = replace(inference, likelihood=self.likelihood(step, inference.likelihood))
        return free_energy(self.network, batch.x, inference, self.beta(step), self.settings)

    def beta(self, step: int) -> float:
        warmup = round(self.settings.beta_warmup * self.steps)
        return linear(step, warmup, 0.1 * self.settings.beta, self.settings.beta)

    def likelihood(self, step: int, last: Likelihood) -> Likelihood:
        """`last` with the sigma of this step: a fixed one may fall in equal ratios from `first_sigma` in the
        first step to that of `last` in the last one."""
        first = self.settings.first_sigma
        if first is None:
            return last
        start = torch.full_like(last.log_sigma, math.log(first))
        return Likelihood(last.mean, start.lerp(last.log_sigma, linear(step, self.steps - 1, 0.0, 1.0)))

    def after_step(self, step: int) -> None:
        average_weights(self.averaged, self.network, self.settings.ema, step)

    def _contexts(self, context: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """What the prior and the likelihood see of the parents in this step (conditioning dropout)."""
        if not self.settings.conditioning_dropout:
            return context, context
        hidden = hide(context, self.encoder, self.settings.conditioning_dropout)
        seed = self.settings.train.seed
        match dropped_path(seed, step):
            case "prior":
                return hidden, context
            case "likelihood":
                return context, hidden
        return context, context


@torch.no_grad()
def average_weights(averaged: nn.Module, current: nn.Module, ema: float, step: int) -> None:
    """Moves `averaged` towards `current`; the decay ramps up to `ema` so that the start is forgotten
    quickly."""
    decay = min(ema, 1 - 1 / (step + 1))
    torch._foreach_lerp_(list(averaged.parameters()), list(current.parameters()), 1 - decay)


def dropped_path(seed: int, step: int) -> Literal["prior", "likelihood", "none"]:
    """The path from which a step hides parents, each with probability 1/3. In the published code the mask of
    the likelihood's path is drawn and never used; here it acts."""
    drawn = int(torch.randint(3, (), generator=torch_generator(seed, "dropout", step)))
    paths: tuple[Literal["prior"], Literal["likelihood"], Literal["none"]] = ("prior", "likelihood", "none")
    return paths[drawn]


def hide(context: Tensor, encoder: ParentEncoder, names: tuple[str, ...]) -> Tensor:
    """The context with zeros where `names` stand: no category, neither of two, the mean."""
    kept = [
        float(attribute.name not in names)
        for attribute in encoder.attributes
        for _ in range(len(attribute.categories) if attribute.kind == "categorical" else 1)
    ]
    return context * context.new_tensor(kept)


def drawing_weights(settings: HVAESettings, values: Attributes) -> np.ndarray | None:
    """Drawing probabilities (N,) of rows with the attributes `values`, None for the order of epochs."""
    return None if settings.balance is None else half_uniform_weights(values[settings.balance].numpy())


def half_uniform_weights(codes: np.ndarray) -> np.ndarray:
    """Drawing probabilities (N,) under which each value has the mean of its share and 1/D (the published
    sampler's rule)."""
    values, inverse, counts = np.unique(codes, return_inverse=True, return_counts=True)
    share = counts / len(codes)
    target = 0.5 / len(values) + 0.5 * share
    weights = (target / counts)[inverse]
    assert math.isclose(weights.sum(), 1.0, rel_tol=1e-9)
    return weights

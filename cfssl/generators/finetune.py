"""Counterfactual fine-tuning of a fitted HVAE: images under random interventions must look to a frozen guide
like what was asked for, while the image model stays as good as it was.

    min  sum of rules L(x*, pa*)     subject to  F(x, pa) <= c

Source: De Sousa Ribeiro et al. 2023, section 3.3 (hard labels; the constraint by the modified differential
method of multipliers, Platt & Barr 1988); the target rules are in targets.py. Enters: a fitted
`HVAEGenerator`, a table, rules. Leaves: the same generator with fine-tuned weights.

    loss = L + w F,   w = max(lambda - d (c - F), 0),   lambda <- max(lambda + step(F - c), 0)

Deviations from the published code, on purpose:
- w is clamped at 0. Unclamped it turns negative once F < c - lambda / d, and the optimiser worsens F.
- F, x and x* share one encoder pass and one z; the variable intervened on is drawn per image, not per batch.
- c is measured on the base model with the same beta, likelihood and posterior noise, unless given.
- Guides are frozen and in eval mode; their weights receive no gradient.
- A step that is not finite or explodes is skipped relative to a running median, and 20 in a row end the run.
"""

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, Self

import numpy as np
import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from cfssl.data.batches import ImageBatch, ImageData
from cfssl.data.table import Attributes, ImageTable
from cfssl.engine.loop import TrainSettings, fit
from cfssl.engine.run import Run
from cfssl.generators.hvae import HVAEGenerator
from cfssl.generators.hvae_training import average_weights, drawing_weights, free_energy
from cfssl.generators.targets import Counterfactual, RuleSettings, TargetRule
from cfssl.scm.graph import refuse_unknown
from cfssl.seeds import torch_generator
from cfssl.settings import STRICT, AboveOne, BelowOne, Count, NonNegative, Positive, Probability

BOUND_IMAGES = 2048  # on which c is measured
CLIPPED = (0.01, 0.99)  # quantiles of training that interventions on continuous variables stay between


@dataclass(frozen=True, config=STRICT)
class FinetuneTrainSettings(TrainSettings):
    """A tenth of the learning rate of the base training, nearly constant."""

    lr: Positive = 1e-4
    final_lr_share: Probability = 0.1
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.9)
    warmup: Probability = 0.02
    clip: Positive | None = 100.0
    skip_factor: AboveOne | None = 20.0
    epochs: Count = 8
    batch: Count = 32


@dataclass(frozen=True, config=STRICT)
class FinetuneSettings:
    """`rules`: what counterfactuals must look like; their losses are added. `do`: the variables intervened on
    in training, by default all parents of the image. `bound`: c in nats per pixel, null: F of the base model.
    `damping`: d. `multiplier_lr`: how far lambda moves per step. `residual`: t_u, the share of the pixel
    residual in x*. `trained`: "decoder" leaves the encoder's convolutions as they are. `ema`: decay of the
    averaged weights that are kept."""

    rules: tuple[RuleSettings, ...] = Field(min_length=1)
    do: tuple[str, ...] = ()
    bound: float | None = None
    damping: NonNegative = 10.0
    multiplier_lr: Positive = 0.05
    residual: Probability = 1.0
    trained: Literal["all", "decoder"] = "all"
    ema: Probability = 0.99
    train: FinetuneTrainSettings = Field(default_factory=FinetuneTrainSettings)


class FinetuneTask(nn.Module):
    """See the module docstring. `limits`: lowest and highest value an intervention gives each continuous
    variable."""

    bound: Tensor

    def __init__(
        self,
        generator: HVAEGenerator,
        rules: Sequence[TargetRule],
        variables: Sequence[str],
        limits: Mapping[str, tuple[float, float]],
        bound: float,
        settings: FinetuneSettings,
    ) -> None:
        super().__init__()
        self.network = copy.deepcopy(generator.network).requires_grad_(True)
        if settings.trained == "decoder":
            self.network.encoder.requires_grad_(False)
        self.averaged, self.encoder = generator.network, generator.encoder
        self.generator = [generator]  # no submodule: its network is the averaged one
        self.rules, self.variables = list(rules), tuple(variables)
        self.limits, self.settings = dict(limits), settings
        self.register_buffer("bound", torch.tensor(bound))
        # lambda = raw * multiplier_lr / lr, since Adam moves every number by about lr a step.
        self.raw_multiplier = nn.Parameter(torch.zeros(()))

    @property
    def multiplier(self) -> Tensor:
        return self.raw_multiplier * (self.settings.multiplier_lr / self.settings.train.lr)

    def train(self, mode: bool = True) -> Self:
        """The averaged network is not trained and stays in eval mode."""
        super().train(mode)
        self.averaged.eval()
        return self

    def forward(self, batch: ImageBatch, step: int) -> dict[str, Tensor]:
        generator = self.generator[0]
        x, pa = batch.x, batch.attributes
        pa_cf, intervened, affected = self.intervene(pa, step)
        context, context_cf = self.encoder(pa), self.encoder(pa_cf)
        noise = self.network.split_noise(batch.noise)
        inference = self.network.infer(x, context, noise)
        energy = free_energy(self.network, x, inference, generator.settings.beta, generator.settings)["loss"]
        latents = generator.counterfactual_latents(self.network, inference, noise, context_cf)
        factual, likelihood = inference.likelihood, self.network.decode(latents, context_cf)
        u = (x - factual.mean) / factual.sigma
        x_cf = (likelihood.mean + self.settings.residual * likelihood.sigma * u).clamp(-1, 1)
        made = Counterfactual(x, x_cf.float(), pa, pa_cf, intervened, affected)
        target = torch.stack([rule.loss(made).mean() for rule in self.rules]).sum()
        excess = (energy - self.bound).detach()
        weight = (self.multiplier.detach() + self.settings.damping * excess).clamp_min(0)
        loss = target + weight * energy - self.raw_multiplier * excess
        return {"loss": loss, "target": target, "free_energy": energy, "weight": weight}

    @torch.no_grad()
    def intervene(self, pa: Attributes, step: int) -> tuple[Attributes, dict[str, Tensor], dict[str, Tensor]]:
        """One variable per image, uniform over `variables`, takes the value of another image of the batch, so
        that its values are drawn from the marginal. -> pa*, and which images each variable was intervened on
        and affected in (see `Counterfactual`)."""
        scm, graph = self.generator[0].scm, self.generator[0].graph
        rng = torch_generator(self.settings.train.seed, "do", step)
        device = next(iter(pa.values())).device
        factual = {name: value.cpu() for name, value in pa.items()}
        count = len(next(iter(factual.values())))
        chosen = torch.randint(len(self.variables), (count,), generator=rng)
        other = torch.randperm(count, generator=rng)
        changed = {name: value.clone() for name, value in factual.items()}
        intervened = {name: torch.zeros(count, dtype=torch.bool) for name in self.variables}
        affected = {name: torch.zeros(count, dtype=torch.bool) for name in factual}
        for place, variable in enumerate(self.variables):
            rows = torch.nonzero(chosen == place)[:, 0]
            if len(rows) == 0:
                continue
            value = factual[variable][other[rows]]
            if variable in self.limits:
                value = value.clamp(*self.limits[variable])
            some = {name: column[rows] for name, column in factual.items()}
            found = scm.counterfactual(some, {variable: value}, rng)
            for name in graph.affected([variable]):
                changed[name][rows] = found[name]
                affected[name][rows] = True
            intervened[variable][rows] = True
        return (
            {name: changed[name].to(device) if affected[name].any() else pa[name] for name in pa},
            {name: flags.to(device) for name, flags in intervened.items()},
            {name: flags.to(device) for name, flags in affected.items()},
        )

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Averages the weights, and keeps lambda from falling below 0."""
        average_weights(self.averaged, self.network, self.settings.ema, step)
        self.raw_multiplier.clamp_min_(0)


def finetune(
    generator: HVAEGenerator,
    table: ImageTable,
    rules: Sequence[TargetRule],
    settings: FinetuneSettings,
    run: Run,
) -> None:
    """Fine-tunes `generator` in place on the training rows whose variables are all known.

    `rules` hold the guides; `settings.rules` say how they were made and are not looked at here. Raises
    `UserError` for variables that cannot be intervened on, and for a generator that is not fitted.
    """
    _ = generator.fingerprint  # refuses one that is not fitted
    graph = generator.graph
    variables = settings.do or graph.image_parents
    refuse_unknown(variables, graph.variables, "finetune.do")
    rows = table.rows("train", known=graph.variables)
    values = table.encode(graph.variables, rows)
    data = ImageData(
        table,
        rows,
        values,
        settings.train,
        noise_size=generator.network.noise_size,
        weights=drawing_weights(generator.settings, values),
        section="finetune.train",
    )
    bound = settings.bound
    if bound is None:  # on images as training draws them, with the noise it draws
        steps = range(min(len(data), max(1, BOUND_IMAGES // settings.train.batch)))
        bound = mean_free_energy(generator, (batch for step in steps for batch in data[step]))
    task = FinetuneTask(generator, rules, variables, value_limits(values), bound, settings)
    for rule in rules:
        rule.to(run.hardware.device)
    finished = fit(task, data, settings.train, run, "fine-tuning")
    for rule in rules:
        rule.to(torch.device("cpu"))
    generator.to(torch.device("cpu"))
    if finished:
        generator.seal()


def value_limits(values: Attributes) -> dict[str, tuple[float, float]]:
    """Per continuous variable the values that interventions stay between."""
    found = {}
    for name, value in values.items():
        if value.is_floating_point():
            low, high = np.quantile(value.numpy(), CLIPPED)
            found[name] = (float(low), float(high))
    return found


@torch.no_grad()
def mean_free_energy(generator: HVAEGenerator, batches: Iterable[ImageBatch]) -> float:
    """F of the generator, nats per pixel, over images with noise for the posterior."""
    network, settings, total, count = generator.network, generator.settings, 0.0, 0
    for batch in batches:
        noise = network.split_noise(batch.noise)
        inference = network.infer(batch.x, generator.encoder(batch.attributes), noise)
        energy = free_energy(network, batch.x, inference, settings.beta, settings)["loss"]
        total, count = total + float(energy) * len(batch), count + len(batch)
    return total / count

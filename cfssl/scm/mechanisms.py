"""Mechanisms of attributes: how a value arises from its parents and its own noise, a = f(u, pa).

What enters: codes or physical values (N,) with their parents (see `cfssl.data.table.Attributes`). What
leaves: a fitted module that abducts the noise of observed values and predicts values from noise. Discrete
mechanisms follow Pawlowski et al. 2020 (Gumbel-max, abducted exactly as in Maddison et al. 2014, section 3),
continuous ones Durkan et al. 2019 (neural spline flows, through zuko).

Weights are kept in float32 and evaluated in float64: abduction and prediction then invert each other to the
last bit of a float32, whatever the batch they are computed in.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple, Protocol, cast

import numpy as np
import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from zuko.transforms import ComposedTransform, MonotonicAffineTransform, MonotonicRQSTransform

from cfssl.data.table import Attribute, Attributes
from cfssl.errors import UserError
from cfssl.scm.parents import ConditionalNetwork
from cfssl.settings import STRICT, Count, NonNegative, Positive

Randomness = torch.Generator | Sequence[torch.Generator]
"""A stream of random numbers for a batch, or one per row: what a row draws does not depend on its neighbours
then."""

MechanismName = Literal["frequencies", "empirical", "gumbel_max", "affine", "spline"]

# In standard deviations of the residual; beyond it the spline is the identity, so still exactly invertible.
SPLINE_BOUND = 5.0
QUANTILES = 513  # knots of an empirical marginal
# By how much a Gumbel-max winner wins at least: far above float64 rounding, far below effects on the noise.
MARGIN = 1e-9


@dataclass(frozen=True, config=STRICT)
class CausalModelSettings:
    """How the mechanisms of attributes are built and fitted.

    `mechanisms` chooses one per variable; the others get "frequencies" or "empirical" (roots), "gumbel_max"
    or "affine". `hidden` are the widths between parents and parameters, () makes them linear; `bins` belong
    to "spline". Fitting maximises the likelihood by AdamW over `steps` batches of `batch` rows, `lr` falling
    to 0 along a cosine.
    """

    mechanisms: dict[str, MechanismName] = Field(default_factory=dict)
    hidden: tuple[Count, ...] = (32, 32)
    bins: Count = 8
    steps: Count = 1000
    batch: Count = 256
    lr: Positive = 5e-3
    weight_decay: NonNegative = 1e-2


class Mechanism(Protocol):
    """What a causal model needs of a variable; every implementation is an `nn.Module`.

    `values` (B,) are long codes or float32 physical units, `parents` maps each parent to its (B,). Noise `u`
    is (B,) or (B, K).
    """

    def fit(self, values: Tensor, parents: Attributes, rng: torch.Generator) -> None:
        """Learns from training rows; a known mechanism does nothing here."""

    def log_prob(self, values: Tensor, parents: Attributes) -> Tensor:
        """(B,) float64 log-probabilities, or log-densities per physical unit."""

    def noise(self, count: int, rng: torch.Generator) -> Tensor:
        """`count` draws of u from its prior."""

    def abduct(self, values: Tensor, parents: Attributes, rng: Randomness) -> Tensor:
        """Noise that explains the values: the inverse, or a posterior draw where f is many-to-one."""

    def predict(self, u: Tensor, parents: Attributes) -> Tensor:
        """f(u, pa): (B,) in the dtype of `values`."""


class Frequencies(nn.Module):
    """A discrete root: the categories' shares in training. Its noise is the value itself."""

    probabilities: Tensor

    def __init__(
        self, attribute: Attribute, parents: Sequence[Attribute], settings: CausalModelSettings
    ) -> None:
        super().__init__()
        classes = len(attribute.categories)
        self.register_buffer("probabilities", torch.full((classes,), 1 / classes))

    def fit(self, values: Tensor, parents: Attributes, rng: torch.Generator) -> None:
        counts = torch.bincount(values, minlength=len(self.probabilities))
        self.probabilities.copy_(counts / counts.sum())

    def log_prob(self, values: Tensor, parents: Attributes) -> Tensor:
        return self.probabilities.double().log()[values]

    def noise(self, count: int, rng: torch.Generator) -> Tensor:
        shares = self.probabilities.to(rng.device)
        drawn = torch.multinomial(shares, count, replacement=True, generator=rng)
        return drawn.to(self.probabilities.device)

    def abduct(self, values: Tensor, parents: Attributes, rng: Randomness) -> Tensor:
        return values

    def predict(self, u: Tensor, parents: Attributes) -> Tensor:
        return u


class Empirical(nn.Module):
    """A continuous root: the quantiles of training, straight lines between them. Its noise is the value
    itself.
    """

    knots: Tensor

    def __init__(
        self, attribute: Attribute, parents: Sequence[Attribute], settings: CausalModelSettings
    ) -> None:
        super().__init__()
        self.register_buffer("knots", torch.linspace(0, 1, QUANTILES, dtype=torch.float64))

    def fit(self, values: Tensor, parents: Attributes, rng: torch.Generator) -> None:
        knots = torch.from_numpy(np.quantile(values.double().numpy(), np.linspace(0, 1, QUANTILES)))
        span = float(knots[-1] - knots[0]) or 1e-6 * max(1.0, abs(float(knots[0])))
        # Tied values would make intervals of no width and infinite density: every interval gets a little, the
        # whole keeps its span.
        widths = knots.diff() + 1e-6 * span
        steps = torch.cat([torch.zeros(1, dtype=torch.float64), widths.cumsum(0) / widths.sum()])
        self.knots.copy_(knots[0] + span * steps)

    def log_prob(self, values: Tensor, parents: Attributes) -> Tensor:
        v = values.double()
        place = torch.searchsorted(self.knots, v).clamp(1, QUANTILES - 1)
        density = -(self.knots.diff()[place - 1] * (QUANTILES - 1)).log()
        # The edges are widened by the rounding of float32 values, so that the smallest and largest training
        # values are inside.
        slack = 1e-6 * self.knots.abs().max()
        inside = (v >= self.knots[0] - slack) & (v <= self.knots[-1] + slack)
        return torch.where(inside, density, -math.inf)

    def noise(self, count: int, rng: torch.Generator) -> Tensor:
        level = _uniform((count,), rng, self.knots.device) * (QUANTILES - 1)
        left = level.long().clamp_max(QUANTILES - 2)
        return torch.lerp(self.knots[left], self.knots[left + 1], level - left).float()

    def abduct(self, values: Tensor, parents: Attributes, rng: Randomness) -> Tensor:
        return values

    def predict(self, u: Tensor, parents: Attributes) -> Tensor:
        return u


class GumbelMax(nn.Module):
    """A discrete variable given its parents: a = argmax_j (logit_j(pa) + u_j), u_j ~ Gumbel(0, 1)."""

    def __init__(
        self, attribute: Attribute, parents: Sequence[Attribute], settings: CausalModelSettings
    ) -> None:
        super().__init__()
        self.settings = settings
        self.classes = len(attribute.categories)
        self.network = ConditionalNetwork(parents, settings.hidden, self.classes)

    def fit(self, values: Tensor, parents: Attributes, rng: torch.Generator) -> None:
        self.network.fit(parents, rng)
        _maximise_likelihood(self, values, parents, self.settings, rng)

    def log_prob(self, values: Tensor, parents: Attributes) -> Tensor:
        logits = self.network(parents, len(values))
        return logits.log_softmax(1).gather(1, values[:, None]).squeeze(1)

    def noise(self, count: int, rng: torch.Generator) -> Tensor:
        return gumbel((count, self.classes), rng, self.network.device)

    @torch.no_grad()
    def abduct(self, values: Tensor, parents: Attributes, rng: Randomness) -> Tensor:
        return abduct_gumbel(self.network(parents, len(values)), values, rng)

    @torch.no_grad()
    def predict(self, u: Tensor, parents: Attributes) -> Tensor:
        return (self.network(parents, len(u)) + u).argmax(1)


class Flow(nn.Module):
    """A continuous variable given its parents: an invertible z = f(u, pa) of u ~ N(0, 1), z being the
    standardised value.

    `bins` 0: z = shift(pa) + scale(pa) u. `bins` K: u runs through a rational-quadratic spline of K bins
    first.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, parents: Sequence[Attribute], settings: CausalModelSettings, bins: int) -> None:
        super().__init__()
        self.settings = settings
        self.bins = bins
        self.network = ConditionalNetwork(parents, settings.hidden, 2 + (3 * bins - 1 if bins else 0))
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("std", torch.ones(()))

    def fit(self, values: Tensor, parents: Attributes, rng: torch.Generator) -> None:
        self.mean.copy_(values.double().mean())
        self.std.copy_(values.double().std(correction=0).clamp_min(1e-6))
        self.network.fit(parents, rng)
        _maximise_likelihood(self, values, parents, self.settings, rng)

    def log_prob(self, values: Tensor, parents: Attributes) -> Tensor:
        u, log_slope = self._to_noise(parents, len(values)).call_and_ladj(self._standardise(values))
        return log_slope - u.square() / 2 - math.log(math.tau) / 2 - self.std.double().log()

    def noise(self, count: int, rng: torch.Generator) -> Tensor:
        return torch.randn(count, generator=rng, device=rng.device, dtype=torch.float64).to(self.mean.device)

    @torch.no_grad()
    def abduct(self, values: Tensor, parents: Attributes, rng: Randomness) -> Tensor:
        return self._to_noise(parents, len(values))(self._standardise(values))

    @torch.no_grad()
    def predict(self, u: Tensor, parents: Attributes) -> Tensor:
        z = self._to_noise(parents, len(u)).inv(u.double())
        return (self.mean.double() + self.std.double() * z).float()

    def _standardise(self, values: Tensor) -> Tensor:
        return (values.double() - self.mean.double()) / self.std.double()

    def _to_noise(self, parents: Attributes, count: int) -> ComposedTransform:
        parameters = self.network(parents, count)
        residual = MonotonicAffineTransform(parameters[:, 0], parameters[:, 1]).inv
        if not self.bins:
            return ComposedTransform(residual)
        widths, heights, slopes = parameters[:, 2:].split([self.bins, self.bins, self.bins - 1], dim=1)
        return ComposedTransform(residual, MonotonicRQSTransform(widths, heights, slopes, bound=SPLINE_BOUND))


def gumbel(shape: tuple[int, ...], rng: Randomness, device: torch.device) -> Tensor:
    """Gumbel(0, 1) draws, float64."""
    if isinstance(rng, torch.Generator):
        drawn = torch.empty(shape, dtype=torch.float64, device=rng.device).exponential_(generator=rng)
    else:
        drawn = torch.empty(shape, dtype=torch.float64)
        for row, own in zip(drawn, rng, strict=True):
            row.exponential_(generator=own)
    return -drawn.clamp_min(torch.finfo(torch.float64).tiny).log().to(device)


def abduct_gumbel(logits: Tensor, values: Tensor, rng: Randomness) -> Tensor:
    """Noise u (B, K) from its exact posterior given argmax_j (logit_j + u_j) = `values` (B,).

    The winner's total T is Gumbel with location logsumexp(logits), whoever wins; the others' totals are
    Gumbel(logit_j) truncated below T:

        G_k = T,   G_j = -log( exp(-(g_j + logit_j)) + exp(-T) ),   u = G - logits

    (Maddison et al. 2014, section 3).

    So prediction with the same logits returns `values` exactly, and pooled over observed values u is
    Gumbel(0, 1) again.
    """
    logits = logits.double()
    top = gumbel((len(logits), 1), rng, logits.device) + logits.logsumexp(1, keepdim=True)  # (B, 1)
    free = gumbel(tuple(logits.shape), rng, logits.device) + logits  # (B, K)
    # Rounding must not let a loser draw level with the winner.
    total = torch.minimum(-torch.logaddexp(-free, -top), top - MARGIN)
    return total.scatter(1, values[:, None], top) - logits


def _affine(attribute: Attribute, parents: Sequence[Attribute], settings: CausalModelSettings) -> Flow:
    return Flow(parents, settings, bins=0)


def _spline(attribute: Attribute, parents: Sequence[Attribute], settings: CausalModelSettings) -> Flow:
    return Flow(parents, settings, bins=settings.bins)


class Entry(NamedTuple):
    """A mechanism by name: how it is built, for which kind of variable, and whether it may have parents."""

    build: Callable[[Attribute, Sequence[Attribute], CausalModelSettings], nn.Module]
    is_discrete: bool
    takes_parents: bool


MECHANISMS: dict[MechanismName, Entry] = {
    "frequencies": Entry(Frequencies, is_discrete=True, takes_parents=False),
    "empirical": Entry(Empirical, is_discrete=False, takes_parents=False),
    "gumbel_max": Entry(GumbelMax, is_discrete=True, takes_parents=True),
    "affine": Entry(_affine, is_discrete=False, takes_parents=True),
    "spline": Entry(_spline, is_discrete=False, takes_parents=True),
}


def create_mechanism(
    attribute: Attribute, parents: Sequence[Attribute], settings: CausalModelSettings
) -> Mechanism:
    """The mechanism that `settings` choose for `attribute`, or the default for its kind; UserError where the
    choice cannot work.
    """
    is_discrete = attribute.kind != "continuous"
    defaults: Mapping[tuple[bool, bool], MechanismName] = {
        (True, False): "frequencies",
        (False, False): "empirical",
        (True, True): "gumbel_max",
        (False, True): "affine",
    }
    name = settings.mechanisms.get(attribute.name, defaults[is_discrete, bool(parents)])
    entry = MECHANISMS[name]
    if entry.is_discrete != is_discrete or (parents and not entry.takes_parents):
        fitting = [
            n
            for n, e in MECHANISMS.items()
            if e.is_discrete == is_discrete and (e.takes_parents or not parents)
        ]
        given = f"given {', '.join(parent.name for parent in parents)}" if parents else "without parents"
        raise UserError(
            f"mechanisms.{attribute.name} is {name!r}, which does not fit a {attribute.kind} variable "
            f"{given}; "
            f"choose from {', '.join(fitting)}."
        )
    return cast(Mechanism, entry.build(attribute, parents, settings))


def _maximise_likelihood(
    mechanism: GumbelMax | Flow,
    values: Tensor,
    parents: Attributes,
    settings: CausalModelSettings,
    rng: torch.Generator,
) -> None:
    optimiser = torch.optim.AdamW(mechanism.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, settings.steps)
    with torch.enable_grad():
        for _ in range(settings.steps):
            rows = torch.randint(len(values), (min(settings.batch, len(values)),), generator=rng)
            batch = {name: column[rows] for name, column in parents.items()}
            loss = -mechanism.log_prob(values[rows], batch).mean()
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(mechanism.parameters(), 10.0)
            optimiser.step()
            schedule.step()


def _uniform(shape: tuple[int, ...], rng: torch.Generator, device: torch.device) -> Tensor:
    return torch.rand(shape, generator=rng, device=rng.device, dtype=torch.float64).to(device)

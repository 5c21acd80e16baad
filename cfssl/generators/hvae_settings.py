"""What a recipe says about the HVAE: its network, its likelihood, how its latents are read, its training."""

import math
from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator
from pydantic.dataclasses import dataclass

from cfssl.engine.loop import TrainSettings
from cfssl.generators.hvae_deep import PublishedNetworkSettings
from cfssl.generators.hvae_likelihood import LOG_SIGMA_X, SigmaKind
from cfssl.generators.hvae_small import SmallNetworkSettings
from cfssl.generators.settings import GraphSettings
from cfssl.scm.mechanisms import CausalModelSettings
from cfssl.settings import (
    STRICT,
    AboveOne,
    BelowOne,
    Count,
    NonNegative,
    Positive,
    Probability,
    UnitInterval,
)

# A fixed scale cannot collapse, so it may be finer than the clamp of a learned one.
Sigma = Annotated[float, Field(ge=1e-3, le=math.exp(LOG_SIGMA_X[1]))]
NetworkSettings = SmallNetworkSettings | PublishedNetworkSettings
MEDIATOR_WEIGHT = 0.5


@dataclass(frozen=True, config=STRICT)
class HVAETrainSettings(TrainSettings):
    """The defaults of the published image mechanism, with the skip rule relative to the running median."""

    lr: Positive = 1e-3
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.9)
    warmup: Probability = 0.02
    clip: Positive | None = 100.0
    skip_factor: AboveOne | None = 20.0
    epochs: Count = 20
    batch: Count = 32


@dataclass(frozen=True, config=STRICT)
class HVAESettings(GraphSettings):
    """`network`: small or published, see hvae_small.py and hvae_deep.py. `attributes`: how the mechanisms of
    the attributes are built and fitted.

    Image: `likelihood` "gaussian" or "discretised" (8-bit images), with one `sigma` per "pixel", one
    "shared", or one "fixed" at `fixed_sigma`. `first_sigma`: a fixed one falls from here to `fixed_sigma` in
    equal ratios over the training. While it is large no latent is worth its KL and the image has to be drawn
    from the parents; what they leave open goes into z as it falls. With a small sigma from the start z holds
    everything, also what the parents say, and do() of them does little.

    Latents: `prior` "exogenous" (z is noise that no parent reaches) or "mediator" (the parents act through z
    too). Only of a mediator: `mediator_weight` a, the share of the posterior in the counterfactual mediator
    (the published poster's pi is 1 - a), and `conditioning_dropout`, parents that are hidden from the prior
    in a third of the steps and from the likelihood in another third.

    Loss: `beta` weighs the KL (more: less of the parents stays in z; too much: blur), ramped up from a tenth
    over the first `beta_warmup` share of the steps. `free_bits`: nats per level and channel that the KL may
    cost without being lowered. `balance`: a categorical or binary variable of the graph whose rare values are
    drawn more often (half uniform, half empirical). `ema`: decay of the averaged weights that are used for
    inference.
    """

    name: Literal["hvae"] = "hvae"
    attributes: CausalModelSettings = Field(default_factory=CausalModelSettings)
    network: Annotated[NetworkSettings, Field(discriminator="name")] = Field(
        default_factory=SmallNetworkSettings
    )
    likelihood: Literal["gaussian", "discretised"] = "gaussian"
    sigma: SigmaKind = "pixel"
    fixed_sigma: Sigma = 0.1
    first_sigma: Positive | None = None
    prior: Literal["exogenous", "mediator"] = "exogenous"
    mediator_weight: UnitInterval = MEDIATOR_WEIGHT
    conditioning_dropout: tuple[str, ...] = ()
    beta: Positive = 5.0
    beta_warmup: Probability = 0.1
    free_bits: NonNegative = 0.0
    balance: str | None = None
    ema: Probability = 0.99
    train: HVAETrainSettings = Field(default_factory=HVAETrainSettings)

    @field_validator("first_sigma")
    @classmethod
    def _falls(cls, first: float | None, found: ValidationInfo) -> float | None:
        if first is None:
            return None
        if (sigma := found.data.get("sigma", "fixed")) != "fixed":
            raise ValueError(
                f"only a fixed sigma can fall, and sigma is {sigma}; set sigma: fixed or leave it out"
            )
        if first <= (last := found.data.get("fixed_sigma", 0.0)):
            raise ValueError(
                f"sigma falls from it to fixed_sigma, which is {last}; make it larger or leave it out"
            )
        return first

    @field_validator("mediator_weight")
    @classmethod
    def _weighs_a_mediator(cls, weight: float, found: ValidationInfo) -> float:
        if found.data.get("prior") == "exogenous" and weight != MEDIATOR_WEIGHT:
            raise ValueError(
                "it mixes posterior and prior of a mediator, and the prior is exogenous; set prior: mediator "
                "or leave it out"
            )
        return weight

    @field_validator("conditioning_dropout")
    @classmethod
    def _hides_parents(cls, names: tuple[str, ...], found: ValidationInfo) -> tuple[str, ...]:
        if names and found.data.get("prior") == "exogenous":
            raise ValueError(
                "it hides parents from a mediator's prior, and an exogenous prior sees none; set "
                "prior: mediator or leave it out"
            )
        parents = found.data.get("parents", names)
        if unknown := sorted(set(names) - set(parents)):
            raise ValueError(
                f"it names {', '.join(unknown)}, expected some of parents ({', '.join(parents)}); correct it"
            )
        return names

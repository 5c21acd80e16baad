"""The HVAE generator: a deep structural causal model with a small hierarchical VAE as image mechanism
(S-HVAE-32, S-HVAE-64).

Source: De Sousa Ribeiro et al. 2023 (exogenous-prior reading). Enters: a table of images with attributes.
Leaves: a generator that abducts z = E q(z | x, pa) and u = (x - mu(z, pa)) / sigma(z, pa), and predicts

    x* = clip(mu(z, pa*) + sigma(z, pa*) u, -1, 1)        (direct effect only)

With a fixed or shared sigma this is x + mu* - mu: what the network cannot reconstruct is carried over
unchanged. With a sigma per pixel the carried-over residual is rescaled, so noise and grain follow the
scanner.

Deviations from the published code, on purpose: the update is skipped relative to a running median of gradient
norms and the run fails after 20 skips (a fixed threshold can skip for ever); training order is shuffled; beta
weighs a KL averaged over the same C*H*W as the likelihood.
"""

import copy
import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
import torch
from pydantic import Field, TypeAdapter
from pydantic.dataclasses import dataclass
from torch import nn

from cfssl.data.batches import ImageBatch, ImageData
from cfssl.data.table import Attribute, Attributes, ImageTable
from cfssl.engine.checkpoint import load_checkpoint, save_checkpoint
from cfssl.engine.loop import TrainSettings, fit
from cfssl.engine.run import Run
from cfssl.engine.schedules import linear
from cfssl.errors import UserError
from cfssl.generators.base import Exogenous, propagate
from cfssl.generators.hvae_network import HVAE, LOG_SIGMA_X, gaussian_nll
from cfssl.generators.settings import GraphSettings
from cfssl.provenance import code_version, fingerprint
from cfssl.scm.graph import CausalGraph
from cfssl.scm.mechanisms import CausalModelSettings, Randomness
from cfssl.scm.model import StructuralCausalModel
from cfssl.scm.parents import ParentEncoder
from cfssl.seeds import derive_seed, torch_generator
from cfssl.settings import STRICT, AboveOne, BelowOne, Count, Positive, Probability

# Widths at 32, 16, 8 and 4 pixels of the published small models, both of about .4 M parameters: S-HVAE-32 for
# images of 32 pixels, S-HVAE-64 (a pixel-unshuffle in front) for larger ones.
S_HVAE_32 = (12, 24, 32, 48)
S_HVAE_64 = (16, 24, 32, 48)

Width = Annotated[int, Field(ge=4, multiple_of=4)]  # four groups are normalised
# What the network's clamp of log sigma allows; a sigma beyond it would silently be another one.
Sigma = Annotated[float, Field(ge=math.exp(LOG_SIGMA_X[0]), le=math.exp(LOG_SIGMA_X[1]))]


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
    """`beta` weighs the KL (more: less of the parents stays in z; too much: blur), ramped up from a tenth
    over the first `beta_warmup` share of the steps. `balance`: a categorical or binary variable of the graph
    whose rare values are drawn more often (half uniform, half empirical). `ema`: decay of the averaged
    weights that are used for inference. `sigma`: see hvae_network.HVAE. `widths`: see S_HVAE_32, S_HVAE_64.
    `attributes`: how the mechanisms of the attributes are built and fitted.
    """

    name: Literal["hvae"] = "hvae"
    attributes: CausalModelSettings = Field(default_factory=CausalModelSettings)
    widths: tuple[Width, Width, Width, Width] = S_HVAE_64
    latents: tuple[Count, Count, Count] = (16, 8, 4)
    blocks: Count = 2
    sigma: Literal["pixel", "shared", "fixed"] = "pixel"
    fixed_sigma: Sigma = 0.1
    beta: Positive = 5.0
    beta_warmup: Probability = 0.1
    balance: str | None = None
    ema: Probability = 0.99
    train: HVAETrainSettings = Field(default_factory=HVAETrainSettings)


class HVAETask(nn.Module):
    """Minimises F = mean-pixel NLL + beta KL / (C H W) in nats per pixel, and keeps averaged weights."""

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

    def forward(self, batch: ImageBatch, step: int) -> dict[str, torch.Tensor]:
        warmup = round(self.settings.beta_warmup * self.steps)
        beta = linear(step, warmup, 0.1 * self.settings.beta, self.settings.beta)
        context = self.encoder(batch.attributes)
        noise = self.network.split_noise(batch.noise)
        _, divergences, likelihood = self.network.infer(batch.x, context, noise)
        nll = gaussian_nll(batch.x, likelihood).mean()
        kl = torch.stack(divergences).sum(0).mean() / batch.x[0].numel()
        return {"loss": nll + beta * kl, "nll": nll, "kl": kl}

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Averages the weights; the decay ramps up so that the start is forgotten quickly."""
        decay = min(self.settings.ema, 1 - 1 / (step + 1))
        pairs = zip(self.averaged.parameters(), self.network.parameters(), strict=True)
        for averaged, current in pairs:
            averaged.lerp_(current, 1 - decay)


class HVAEGenerator:
    """See the module docstring. Created from settings and the table's attributes and image shape, then `fit`
    or `load`."""

    def __init__(
        self, settings: HVAESettings, attributes: Mapping[str, Attribute], shape: tuple[int, ...]
    ) -> None:
        """Raises `UserError` when the images are not square with a side of 32, 64, 128 ... or a parent is
        unknown."""
        _, height, width = shape
        if height != width or height % 32 or height // 32 not in (1, 2, 4, 8):
            raise UserError(
                "The HVAE generator takes square images of 32, 64, 128 or 256 pixels, and these are "
                f"{height}x{width}; "
                "set data.size to one of them."
            )
        self.settings, self.shape = settings, shape
        self.graph: CausalGraph = settings.causal_graph(attributes)
        self._identity = {
            "settings": TypeAdapter(HVAESettings).dump_python(settings, mode="json"),
            "graph": self.graph.to_json(),
            "attributes": {name: _kind(attributes[name]) for name in self.graph.variables},
            "shape": list(shape),
        }
        if settings.balance is not None:
            _refuse_no_balance(settings.balance, self.graph, attributes)
        with torch.random.fork_rng(devices=[]):
            # The CPU's generator alone; `torch.manual_seed` would seed every GPU as well.
            torch.default_generator.manual_seed(derive_seed(settings.train.seed, "hvae"))
            self.scm = StructuralCausalModel(self.graph, attributes, settings.attributes)
            self.encoder = ParentEncoder(self.graph.image_parents, attributes)
            self.network = self._network()
        self.network.requires_grad_(False).eval()
        self._state_fingerprint: str | None = None

    def _network(self) -> HVAE:
        s = self.settings
        channels, height = self.shape[:2]
        return HVAE(
            channels, self.encoder.width, height // 32, s.widths, s.latents, s.blocks, s.sigma, s.fixed_sigma
        )

    @property
    def fingerprint(self) -> str:
        """Of weights, settings, graph, attributes and code; a bank refuses views made by another one."""
        if self._state_fingerprint is None:
            raise UserError(
                "The HVAE generator has not been fitted; fit or load it before it makes counterfactuals."
            )
        code = code_version("generators", "scm")
        return fingerprint("hvae", self._state_fingerprint, self._identity, code)

    def fit(self, table: ImageTable, run: Run) -> None:
        """Fits the attribute mechanisms and the image mechanism on the training rows whose variables are all
        known."""
        rows = table.rows("train", known=self.graph.variables)
        if len(rows) == 0:
            raise UserError(
                f"No training row of {table.name} has all of {list(self.graph.variables)} present; the "
                "generator needs some."
            )
        values = table.encode(self.graph.variables, rows)
        seed = self.settings.train.seed
        self.scm.fit(values, torch_generator(seed, "scm"))
        self.encoder.fit(values)
        parents = {name: values[name] for name in self.graph.image_parents}
        weights = (
            None
            if self.settings.balance is None
            else half_uniform_weights(values[self.settings.balance].numpy())
        )
        s = self.settings
        network = copy.deepcopy(self.network).requires_grad_(True)
        data = ImageData(
            table,
            rows,
            parents,
            s.train,
            noise_size=network.noise_size,
            weights=weights,
            section="generator.train",
        )
        task = HVAETask(network, self.encoder, self.network, s, len(data))
        finished = fit(task, data, s.train, run, "generator")
        self.to(torch.device("cpu"))
        if finished:
            self.network.requires_grad_(False).eval()
            self._seal()

    @torch.no_grad()
    def abduct(self, x: torch.Tensor, pa: Attributes) -> Exogenous:
        """x (B, C, H, W) float32 in [-1, 1] -> {"z0".. posterior means coarse to fine, "u": standardised
        residual}."""
        latents, _, likelihood = self.network.infer(x, self.encoder(pa))
        residual = (x - likelihood.mean) / likelihood.sigma
        return {**{f"z{level}": z for level, z in enumerate(latents)}, "u": residual}

    def act(
        self, u: Exogenous, pa: Attributes, do: Mapping[str, torch.Tensor], rng: Randomness
    ) -> Attributes:
        """See `Generator.act`; the attributes have noise of their own, which `rng` serves to abduct."""
        return propagate(self.scm, pa, do, rng)

    @torch.no_grad()
    def predict(self, u: Exogenous, pa_cf: Attributes, residual: float = 1.0) -> torch.Tensor:
        """The image of `u` under the parents `pa_cf`. `residual` is t_u, the share of the pixel residual put
        back: 1 makes a null intervention return the image exactly, 0 shows what the network alone
        reconstructs."""
        latents = [u[f"z{level}"] for level in range(len(self.network.levels))]
        likelihood = self.network.decode(latents, self.encoder(pa_cf))
        return (likelihood.mean + residual * likelihood.sigma * u["u"]).clamp(-1, 1)

    @torch.no_grad()
    def sample(self, pa: Attributes, rng: torch.Generator) -> torch.Tensor:
        """New images of the given parents: z ~ p(z), then the mean."""
        count = len(next(iter(pa.values())))
        noise = torch.randn(count, self.network.noise_size, generator=rng, device=rng.device)
        noise = noise.to(self.network.start.device)
        latents = self.network.sample_latents(self.network.split_noise(noise))
        return self.network.decode(latents, self.encoder(pa)).mean.clamp(-1, 1)

    def save(self, path: Path) -> None:
        """One safetensors file with settings, graph, attributes and weights. Raises `UserError` before `fit`
        or `load`."""
        if self._state_fingerprint is None:
            raise UserError(
                f"The HVAE generator has not been fitted; there is nothing to save in {path}: fit it first."
            )
        save_checkpoint(path, {"hvae": self._identity, **self._state()})

    def load(self, path: Path) -> None:
        """Raises `UserError` when the file belongs to other settings, attributes or images."""
        state = load_checkpoint(path)
        found = state.get("hvae") if isinstance(state, dict) else None
        if found is None:
            raise UserError(f"{path} holds no HVAE generator; give a file that one has saved, or fit it.")
        if differing := differences(found, self._identity):
            raise UserError(
                f"{path} was written by another HVAE generator ({'; '.join(differing)}); fit it again, or "
                "load it with the settings and the table it was made with."
            )
        try:
            self.network.load_state_dict(state["network"])
            self.encoder.load_state_dict(state["encoder"])
            self.scm.load_state_dict(state["scm"])
        except (RuntimeError, KeyError) as error:
            raise UserError(
                f"{path} was written by another version of cfssl ({str(error).splitlines()[0]}); fit it "
                "again."
            ) from None
        self._seal()

    def to(self, device: torch.device) -> None:
        """Moves the image side to `device`; the attribute side stays on the CPU."""
        self.network.to(device)
        self.encoder.to(device)

    def _state(self) -> dict[str, Any]:
        parts = {"network": self.network, "encoder": self.encoder, "scm": self.scm}
        return {name: part.state_dict() for name, part in parts.items()}

    def _seal(self) -> None:
        digest = hashlib.blake2b(digest_size=16)
        for part in self._state().values():
            for name, tensor in part.items():
                digest.update(name.encode())
                digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        self._state_fingerprint = digest.hexdigest()


def differences(found: Any, wanted: Any, path: str = "") -> list[str]:
    """Where two nested JSON values differ, one phrase each: `settings.beta is 5.0, expected 1.0`."""
    if not isinstance(found, dict) or not isinstance(wanted, dict):
        return [] if found == wanted else [f"{path} is {found}, expected {wanted}"]
    return [
        phrase
        for name in {**found, **wanted}
        for phrase in differences(found.get(name), wanted.get(name), f"{path}.{name}" if path else name)
    ]


def _kind(attribute: Attribute) -> list[Any]:
    """What decides how an attribute is encoded."""
    return [attribute.kind, *attribute.categories]


def half_uniform_weights(codes: np.ndarray) -> np.ndarray:
    """Drawing probabilities (N,) under which each value has the mean of its share and 1/D (the published
    sampler's rule)."""
    values, inverse, counts = np.unique(codes, return_inverse=True, return_counts=True)
    share = counts / len(codes)
    target = 0.5 / len(values) + 0.5 * share
    weights = (target / counts)[inverse]
    assert math.isclose(weights.sum(), 1.0, rel_tol=1e-9)
    return weights


def _refuse_no_balance(name: str, graph: CausalGraph, attributes: Mapping[str, Attribute]) -> None:
    if name not in graph.variables or attributes[name].kind == "continuous":
        choices = [known for known in graph.variables if attributes[known].kind != "continuous"]
        raise UserError(
            f"generator.balance is {name!r}, expected a categorical or binary variable of the generator's "
            f"graph ({', '.join(choices) or 'it has none'}); correct or remove it."
        )

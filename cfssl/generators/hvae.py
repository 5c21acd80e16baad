"""The HVAE generator: a deep structural causal model with a hierarchical VAE as image mechanism.

Source: De Sousa Ribeiro et al. 2023. Enters: a table of images with attributes. Leaves: a generator that
abducts z = E q(z | x, pa) and u = (x - mu(z, pa)) / sigma(z, pa), and predicts

    x* = clip(mu(z*, pa*) + sigma(z*, pa*) u, -1, 1)

Two readings of the latents. Exogenous prior: z is noise, z* = z, and the parents act on the image directly.
Latent mediator: the parents also act through z, whose own noise U_z = (z - mu_q) / sigma_q (zero at the
posterior mean) gives z* by `HVAE.mediate`; `effects` tells the two ways apart. There, with mediator_weight a
< 1, a null intervention is not the identity: z* moves from the posterior towards the prior.

With a fixed or shared sigma and z* = z this is x + mu* - mu: what the network cannot reconstruct is carried
over unchanged. With a sigma per pixel the carried-over residual is rescaled, so noise and grain follow the
scanner.

Deviations from the published code, on purpose: the update is skipped relative to a running median of gradient
norms and the run fails after 20 skips (a fixed threshold can skip for ever); training order is shuffled; beta
weighs a KL averaged over the same C*H*W as the likelihood. Others stand where they are made: hvae_network.py,
hvae_likelihood.py, hvae_deep.py, hvae_training.py.
"""

import copy
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter

from cfssl.data.batches import ImageData
from cfssl.data.table import Attribute, Attributes, ImageTable
from cfssl.engine.checkpoint import load_checkpoint, save_checkpoint
from cfssl.engine.loop import fit
from cfssl.engine.run import Run
from cfssl.errors import UserError
from cfssl.generators.base import Exogenous, propagate
from cfssl.generators.hvae_likelihood import Gaussian, Likelihood
from cfssl.generators.hvae_network import HVAE, Inference
from cfssl.generators.hvae_settings import HVAESettings
from cfssl.generators.hvae_training import HVAETask, drawing_weights
from cfssl.provenance import code_version, differences, fingerprint
from cfssl.scm.graph import CausalGraph
from cfssl.scm.mechanisms import Randomness
from cfssl.scm.model import StructuralCausalModel
from cfssl.scm.parents import ParentEncoder
from cfssl.seeds import derive_seed, torch_generator
from cfssl.stages import HVAE_CODE


class HVAEGenerator:
    """See the module docstring. Created from settings and the table's attributes and image shape, then `fit`
    or `load`."""

    def __init__(
        self, settings: HVAESettings, attributes: Mapping[str, Attribute], shape: tuple[int, ...]
    ) -> None:
        """Raises `UserError` when the images are not square, are not of a size that the network takes, or a
        parent is unknown."""
        _, height, width = shape
        if height != width:
            raise UserError(
                f"The HVAE generator takes square images, and these are {height}x{width}; set data.size."
            )
        self.settings, self.shape = settings, shape
        self.graph: CausalGraph = settings.causal_graph(attributes)
        self._identity = {
            "settings": TypeAdapter(HVAESettings).dump_python(settings, mode="json"),
            "graph": self.graph.to_json(),
            "attributes": {name: coding(attributes[name]) for name in self.graph.variables},
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
        channels, side = self.shape[:2]
        return s.network.build(
            channels, side, self.encoder.width, s.sigma, s.fixed_sigma, mediator=s.prior == "mediator"
        )

    def context(self, pa: Attributes) -> torch.Tensor:
        """The parents (B,) each as the network reads them, (B, width)."""
        return self.encoder(pa)

    @property
    def fingerprint(self) -> str:
        """Of weights, settings, graph, attributes and code; a bank refuses views made by another one."""
        if self._state_fingerprint is None:
            raise UserError(
                "The HVAE generator has not been fitted; fit or load it before it makes counterfactuals."
            )
        code = code_version(*HVAE_CODE)
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
        if self.settings.likelihood == "discretised" and table.images.dtype != "uint8":
            raise UserError(
                f"generator.likelihood is discretised, which is for 8-bit images, and {table.name} holds "
                f"{table.images.dtype}; set it to gaussian."
            )
        values = table.encode(self.graph.variables, rows)
        seed = self.settings.train.seed
        self.scm.fit(values, torch_generator(seed, "scm"))
        self.encoder.fit(values)
        parents = {name: values[name] for name in self.graph.image_parents}
        s = self.settings
        network = copy.deepcopy(self.network).requires_grad_(True)
        data = ImageData(
            table,
            rows,
            parents,
            s.train,
            noise_size=network.noise_size,
            weights=drawing_weights(s, values),
            section="generator.train",
        )
        task = HVAETask(network, self.encoder, self.network, s, len(data))
        finished = fit(task, data, s.train, run, "generator")
        self.to(torch.device("cpu"))
        if finished:
            self.network.requires_grad_(False).eval()
            self.seal()

    @torch.no_grad()
    def abduct(self, x: torch.Tensor, pa: Attributes, noise: torch.Tensor | None = None) -> Exogenous:
        """x (B, C, H, W) float32 in [-1, 1] -> {"z0".. coarse to fine, "u": standardised residual}.

        z is the posterior mean, or mu_q + sigma_q U_z with `noise` U_z (B, network.noise_size), standard
        normal times a temperature. A mediator adds "mean0".. and "log_sigma0".. of the posterior, and
        "noise0".. U_z.
        """
        return self._exogenous(x, self._infer(x, pa, noise), noise)

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
        context = self.context(pa_cf)
        return self._image(u, self.network.decode(self._latents(u, context), context), residual)

    @torch.no_grad()
    def effects(self, x: torch.Tensor, pa: Attributes, pa_cf: Attributes) -> dict[str, torch.Tensor]:
        """What the change of parents does to the images, (B, C, H, W) each: with g(pa, z) the image of the
        abducted residual,

            direct = g(pa~, z) - g(pa, z),   indirect = g(pa, z~) - g(pa, z),   total = g(pa~, z~) - g(pa, z).

        total = direct + indirect holds where the two ways do not interact in g: exactly with an exogenous
        prior or mediator_weight 1 (z~ = z, so indirect is zero), else only as far as g is additive and
        nothing is clipped.
        """
        u = self.abduct(x, pa)
        context, context_cf = self.context(pa), self.context(pa_cf)
        factual = [u[f"z{level}"] for level in range(len(self.network.latent_shapes))]
        moved = self._latents(u, context_cf)

        def g(parents: torch.Tensor, latents: Sequence[torch.Tensor]) -> torch.Tensor:
            return self._image(u, self.network.decode(latents, parents))

        start = g(context, factual)
        ends = {
            "direct": g(context_cf, factual),
            "indirect": g(context, moved),
            "total": g(context_cf, moved),
        }
        return {name: end - start for name, end in ends.items()}

    def counterfactual_latents(
        self, network: HVAE, inference: Inference, noise: Sequence[torch.Tensor], context_cf: torch.Tensor
    ) -> list[torch.Tensor]:
        """z* of what `network` inferred with `noise` U_z: z itself, or the mediator under `context_cf`."""
        if not network.mediator:
            return inference.latents
        return network.mediate(inference.posterior, noise, context_cf, self.settings.mediator_weight)

    @torch.no_grad()
    def sample(self, pa: Attributes, rng: torch.Generator) -> torch.Tensor:
        """New images of the given parents: z ~ p(z), or p(z | pa) of a mediator, then the mean."""
        count = len(next(iter(pa.values())))
        noise = torch.randn(count, self.network.noise_size, generator=rng, device=rng.device)
        noise = noise.to(self.network.start.device)
        context = self.context(pa)
        latents = self.network.sample_latents(self.network.split_noise(noise), context)
        return self.network.decode(latents, context).mean.clamp(-1, 1)

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
        if differing := differences(saved_identity(path), self._identity):
            raise UserError(
                f"{path} was written by another HVAE generator ({'; '.join(differing)}); fit it again, or "
                "load it with the settings and the table it was made with."
            )
        state = load_checkpoint(path)
        try:
            self.network.load_state_dict(state["network"])
            self.encoder.load_state_dict(state["encoder"])
            self.scm.load_state_dict(state["scm"])
        except (RuntimeError, KeyError) as error:
            raise UserError(
                f"{path} was written by another version of cfssl ({str(error).splitlines()[0]}); fit it "
                "again."
            ) from None
        self.seal()

    def to(self, device: torch.device) -> None:
        """Moves the image side to `device`; the attribute side stays on the CPU."""
        self.network.to(device)
        self.encoder.to(device)

    def _infer(self, x: torch.Tensor, pa: Attributes, noise: torch.Tensor | None) -> Inference:
        split = None if noise is None else self.network.split_noise(noise)
        return self.network.infer(x, self.context(pa), split)

    def _exogenous(self, x: torch.Tensor, found: Inference, noise: torch.Tensor | None) -> Exogenous:
        u = {f"z{level}": z for level, z in enumerate(found.latents)}
        if self.network.mediator:
            absent = torch.zeros(len(x), self.network.noise_size, device=x.device)
            parts = self.network.split_noise(absent if noise is None else noise)
            for level, (q, part) in enumerate(zip(found.posterior, parts, strict=True)):
                u |= {f"mean{level}": q.mean, f"log_sigma{level}": q.log_sigma, f"noise{level}": part}
        return u | {"u": (x - found.likelihood.mean) / found.likelihood.sigma}

    def _latents(self, u: Exogenous, context_cf: torch.Tensor) -> list[torch.Tensor]:
        """z* of what was abducted."""
        levels = range(len(self.network.latent_shapes))
        if not self.network.mediator:
            return [u[f"z{level}"] for level in levels]
        posterior = [Gaussian(u[f"mean{level}"], u[f"log_sigma{level}"]) for level in levels]
        noise = [u[f"noise{level}"] for level in levels]
        return self.network.mediate(posterior, noise, context_cf, self.settings.mediator_weight)

    @staticmethod
    def _image(u: Exogenous, likelihood: Likelihood, residual: float = 1.0) -> torch.Tensor:
        return (likelihood.mean + residual * likelihood.sigma * u["u"]).clamp(-1, 1)

    def _state(self) -> dict[str, Any]:
        parts = {"network": self.network, "encoder": self.encoder, "scm": self.scm}
        return {name: part.state_dict() for name, part in parts.items()}

    def seal(self) -> None:
        """Takes the weights as they are for final; from now on there is a fingerprint."""
        digest = hashlib.blake2b(digest_size=16)
        for part in self._state().values():
            for name, tensor in part.items():
                digest.update(name.encode())
                digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        self._state_fingerprint = digest.hexdigest()


def saved_identity(path: Path) -> dict[str, Any]:
    """Settings, graph, attributes and image shape of the generator in a file; weights are not read. Raises
    `UserError` for a file that holds none."""
    state = load_checkpoint(path, parts=("hvae",))
    if not isinstance(state, dict) or "hvae" not in state:
        raise UserError(f"{path} holds no HVAE generator; give a file that one has saved, or fit it.")
    identity: dict[str, Any] = state["hvae"]
    return identity


def coding(attribute: Attribute) -> list[str]:
    """What decides how an attribute is encoded."""
    return [attribute.kind, *attribute.categories]


def _refuse_no_balance(name: str, graph: CausalGraph, attributes: Mapping[str, Attribute]) -> None:
    if name not in graph.variables or attributes[name].kind == "continuous":
        choices = [known for known in graph.variables if attributes[known].kind != "continuous"]
        raise UserError(
            f"generator.balance is {name!r}, expected a categorical or binary variable of the generator's "
            f"graph ({', '.join(choices) or 'it has none'}); correct or remove it."
        )

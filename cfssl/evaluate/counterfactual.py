"""The axioms of counterfactual images, as functions of any generator.

Composition, reversibility and effectiveness as in Monteiro et al. 2023 ("Measuring axiomatic soundness of
counterfactual image models") and De Sousa Ribeiro et al. 2023. Distances are mean absolute differences in
grey levels of 0..255 per image (float64). With the whole residual put back (t_u = 1) a null intervention
returns the image whatever the generator is, so composition is reported with t_u = 0 as well. Effectiveness is
judged by the phantom's truth where there is one, and by a predictor that no generator ever saw.
"""

import inspect
from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from cfssl.data.table import Attributes
from cfssl.errors import UserError
from cfssl.generators.base import Exogenous, Generator
from cfssl.seeds import torch_generator

Predictor = Callable[[torch.Tensor], torch.Tensor]
"""(B, C, H, W) in [0, 1] -> logits (B, classes), or values (B,) or (B, 1) in the units of a continuous
attribute."""


def grey_levels(first: torch.Tensor, second: torch.Tensor) -> np.ndarray:
    """Mean absolute difference per image, (B,) float64, of images in [-1, 1], in grey levels of 0..255."""
    return ((first.double() - second.double()).abs().flatten(1).mean(1) * 127.5).cpu().numpy()


def composition(
    generator: Generator, x: torch.Tensor, pa: Attributes, cycles: int = 1, residual: float = 1.0
) -> np.ndarray:
    """Distance (B,) of x to itself after `cycles` null interventions.

    `residual` is t_u, the share of the pixel residual that is put back; raises `UserError` when it is not 1
    and the generator has no such residual.
    """
    current = x
    for _ in range(cycles):
        current = _predict(generator, generator.abduct(current, pa), pa, residual)
    return grey_levels(current, x)


def reversibility(
    generator: Generator, x: torch.Tensor, pa: Attributes, do: Attributes, cycles: int = 1, seed: int = 0
) -> np.ndarray:
    """Distance (B,) of x to itself after `cycles` of do(...) and back to the factual values.

    The attributes go back with the noise they were abducted with, so that they end where they began; drawn
    again, the noise of a discrete descendant would count as an error of the image.
    """
    current = x
    for _ in range(cycles):
        u = generator.abduct(current, pa)
        pa_cf = generator.act(u, pa, do, torch_generator(seed, "reversibility"))
        current = generator.predict(generator.abduct(generator.predict(u, pa_cf), pa_cf), pa)
    return grey_levels(current, x)


@torch.no_grad()
def effectiveness(predictor: Predictor, images: torch.Tensor, target: torch.Tensor) -> np.ndarray:
    """What the independent `predictor` sees in counterfactual `images` in [-1, 1] of the `target` (B,).

    Codes of a discrete attribute: whether it sees that class, bool (B,). Values of a continuous one: the
    absolute error in its units, float64 (B,). A module, or one whose method is given, is put into eval mode.
    """
    owner = getattr(predictor, "__self__", predictor)
    if isinstance(owner, nn.Module):
        owner.eval()
    seen = predictor((images + 1) / 2)
    target = target.to(seen.device)
    if target.is_floating_point():
        return (seen.double().reshape(target.shape) - target.double()).abs().cpu().numpy()
    return (seen.argmax(1) == target).cpu().numpy()


def distance_to_truth(
    images: torch.Tensor, truth: torch.Tensor, factual: torch.Tensor
) -> tuple[np.ndarray, np.ndarray]:
    """Distances (B,) to the true counterfactual: of the generated image, and of the image left unchanged."""
    return grey_levels(images, truth), grey_levels(factual, truth)


def _predict(generator: Generator, u: Exogenous, pa: Attributes, residual: float) -> torch.Tensor:
    if residual == 1:
        return generator.predict(u, pa)
    if "residual" not in inspect.signature(generator.predict).parameters:
        raise UserError(
            f"residual is {residual}, but {type(generator).__name__} has no pixel residual that could be "
            "left out; its composition is measured with residual 1 only."
        )
    return generator.predict(u, pa, residual=residual)  # type: ignore[call-arg]

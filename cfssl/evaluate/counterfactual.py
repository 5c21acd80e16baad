"""The axioms of counterfactual images, as functions of any generator.

Composition, reversibility and effectiveness as in Monteiro et al. 2023 ("Measuring axiomatic soundness of
counterfactual image models") and De Sousa Ribeiro et al. 2023. Distances are mean absolute differences in
grey levels of 0..255 per image (float64). With the whole residual put back (t_u = 1) a null intervention
returns the image whatever the generator is, so composition is reported with t_u = 0 as well. Effectiveness is
judged by the phantom's truth where there is one, and by a predictor that no generator ever saw.

Where the true counterfactual is known, `against_truth` splits the change that the generator made into the
part along the true change and the part across it.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from cfssl.data.table import Attributes
from cfssl.errors import UserError
from cfssl.evaluate.bootstrap import mean_figures, ratio_figures
from cfssl.generators.base import Exogenous, Generator
from cfssl.seeds import torch_generator

Predictor = Callable[[torch.Tensor], torch.Tensor]
"""(B, C, H, W) in [0, 1] -> logits (B, classes), or values (B,) or (B, 1) in the units of a continuous
attribute."""


def grey_levels(first: torch.Tensor, second: torch.Tensor) -> np.ndarray:
    """Mean absolute difference per image, (B,) float64, of images in [-1, 1], in grey levels of 0..255."""
    return ((first.double() - second.double()).abs().flatten(1).mean(1) * 127.5).cpu().numpy()


def squared_grey_levels(first: torch.Tensor, second: torch.Tensor) -> np.ndarray:
    """Mean squared difference per image, (B,) float64, of images in [-1, 1], in squared grey levels."""
    return (((first.double() - second.double()) * 127.5) ** 2).flatten(1).mean(1).cpu().numpy()


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
    generator: Generator,
    x: torch.Tensor,
    pa: Attributes,
    do: Attributes,
    cycles: int = 1,
    seed: int = 0,
    residual: float = 1.0,
) -> np.ndarray:
    """Distance (B,) of x to itself after `cycles` of do(...) and back to the factual values; `residual` as in
    `composition`.

    The attributes go back with the noise they were abducted with, so that they end where they began; drawn
    again, the noise of a discrete descendant would count as an error of the image.
    """
    current = x
    for _ in range(cycles):
        u = generator.abduct(current, pa)
        pa_cf = generator.act(u, pa, do, torch_generator(seed, "reversibility"))
        moved = _predict(generator, u, pa_cf, residual)
        current = _predict(generator, generator.abduct(moved, pa_cf), pa, residual)
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


class Split(NamedTuple):
    """Per image (B,) float64, in [-1, 1] scale: `effectiveness` <d, e> / |d|^2 (ideal 1) and `amplification`
    sqrt(|e|^2 - (<d, e> / |d|)^2) (ideal 0), NaN where the truth changes nothing; `uncalled` is |e| there,
    NaN elsewhere."""

    effectiveness: np.ndarray
    amplification: np.ndarray
    uncalled: np.ndarray


def split_change(images: torch.Tensor, truth: torch.Tensor, factual: torch.Tensor) -> Split:
    """The generated change e = images - factual along and across the true one d = truth - factual, over the
    pixels of an image (target effectiveness and amplification, TEA)."""
    d, e = ((batch.double() - factual.double()).flatten(1) for batch in (truth, images))
    size, along = d.norm(dim=1), (d * e).sum(1)
    moved = size > 0
    safe = torch.where(moved, size, 1)
    # as the length of what is left of e: a difference of squares would lose half the digits, or be negative
    across = (e - (along / safe**2)[:, None] * d).norm(dim=1)
    nan = torch.full_like(size, torch.nan)
    effectiveness, amplification = torch.where(moved, along / safe**2, nan), torch.where(moved, across, nan)
    uncalled = torch.where(moved, nan, e.norm(dim=1))
    return Split(*(part.cpu().numpy() for part in (effectiveness, amplification, uncalled)))


def against_truth(
    images: torch.Tensor,
    truth: torch.Tensor,
    factual: torch.Tensor,
    patients: np.ndarray | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """Figures {"value", "low", "high"} over all images (B, C, H, W) in [-1, 1]:

    - "effectiveness", "amplification", "uncalled": means of `split_change`;
    - "l1", "mse": mean distance to the truth in grey levels, and their squares; "l1_unchanged",
      "mse_unchanged": of the images left as they are; "l1_ratio", "mse_ratio": the former mean over the
      latter, below 1 where the generator is worth more than doing nothing.
    """
    l1, l1_unchanged = distance_to_truth(images, truth, factual)
    mse, mse_unchanged = squared_grey_levels(images, truth), squared_grey_levels(factual, truth)
    split = split_change(images, truth, factual)._asdict()
    none = "no image that this figure is about"
    distances = {"l1": l1, "l1_unchanged": l1_unchanged, "mse": mse, "mse_unchanged": mse_unchanged}
    means = mean_figures({**split, **distances}, patients, resamples, seed, none)
    above, below = {"l1_ratio": l1, "mse_ratio": mse}, {"l1_ratio": l1_unchanged, "mse_ratio": mse_unchanged}
    none = "the truth changes no image"
    return {**means, **ratio_figures(above, below, patients, resamples, seed, none)}


def assert_independent(judge: str, guides: Mapping[str, str]) -> None:
    """Raises UserError where the judge's fingerprint is that of a guide (by its name, e.g. "the classifier of
    disease") that a generator was fine-tuned with: judged by its own guide, a generator succeeds by
    adversarial patterns that nobody else sees."""
    for name, fingerprint in guides.items():
        if fingerprint == judge:
            raise UserError(
                f"The judge has the fingerprint {judge}, which is that of {name}, and the generator was "
                "fine-tuned with it; expected a predictor that no generator has seen, so train another one "
                "with another seed."
            )


def has_residual(generator: Generator) -> bool:
    """Whether `predict` takes `residual`, the share of the pixel residual that is put back."""
    return "residual" in inspect.signature(generator.predict).parameters


def _predict(generator: Generator, u: Exogenous, pa: Attributes, residual: float) -> torch.Tensor:
    if residual == 1:
        return generator.predict(u, pa)
    if not has_residual(generator):
        raise UserError(
            f"residual is {residual}, but {type(generator).__name__} has no pixel residual that could be "
            "left out; composition and reversibility are measured with residual 1 only."
        )
    return generator.predict(u, pa, residual=residual)  # type: ignore[call-arg]

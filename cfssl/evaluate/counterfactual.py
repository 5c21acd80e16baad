"""The axioms of counterfactual images, as functions of any generator.

Composition, reversibility and effectiveness as in Monteiro et al. 2023 ("Measuring axiomatic soundness of
counterfactual image models") and De Sousa Ribeiro et al. 2023. Distances are mean absolute differences in
grey levels of 0..255 per image (float64). With the whole residual put back (t_u = 1) a null intervention
returns the image whatever the generator is, so composition is reported with t_u = 0 as well. Effectiveness is
judged by the phantom's truth where there is one, and by a predictor that no generator ever saw.
"""

from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch

from cfssl.data.table import Attributes
from cfssl.generators.base import Exogenous, Generator, counterfactual
from cfssl.seeds import torch_generator

Classifier = Callable[[torch.Tensor], torch.Tensor]  # (B, C, H, W) in [0, 1] -> (B, classes) logits


class ResidualGenerator(Generator, Protocol):
    """A generator whose prediction can leave the pixel residual out (t_u = 0)."""

    def predict(self, u: Exogenous, pa_cf: Attributes, residual: float = 1.0) -> torch.Tensor: ...


def grey_levels(first: torch.Tensor, second: torch.Tensor) -> np.ndarray:
    """Mean absolute difference per image, (B,) float64, of images in [-1, 1], in grey levels of 0..255."""
    return ((first.double() - second.double()).abs().flatten(1).mean(1) * 127.5).numpy()


def composition(
    generator: ResidualGenerator, x: torch.Tensor, pa: Attributes, cycles: int = 1, residual: float = 1.0
) -> np.ndarray:
    """Distance (B,) of x to itself after `cycles` null interventions; `residual` is t_u."""
    current = x
    for _ in range(cycles):
        current = generator.predict(generator.abduct(current, pa), pa, residual=residual)
    return grey_levels(current, x)


def reversibility(
    generator: Generator, x: torch.Tensor, pa: Attributes, do: Attributes, cycles: int = 1, seed: int = 0
) -> np.ndarray:
    """Distance (B,) of x to itself after `cycles` of do(...) and back to the factual values."""
    back = {name: pa[name] for name in do}
    current = x
    for cycle in range(cycles):
        changed, pa_cf = counterfactual(generator, current, pa, do, torch_generator(seed, "there", cycle))
        current, _ = counterfactual(generator, changed, pa_cf, back, torch_generator(seed, "back", cycle))
    return grey_levels(current, x)


def effectiveness(classifier: Classifier, images: torch.Tensor, target: torch.Tensor) -> np.ndarray:
    """Whether the independent `classifier` sees the `target` class (B,) in counterfactual `images` in [-1,
    1]: bool (B,)."""
    with torch.no_grad():
        return (classifier((images + 1) / 2).argmax(1) == target).numpy()


def distance_to_truth(
    images: torch.Tensor, truth: torch.Tensor, factual: torch.Tensor
) -> tuple[np.ndarray, np.ndarray]:
    """Distances (B,) to the true counterfactual: of the generated image, and of the image left unchanged."""
    return grey_levels(images, truth), grey_levels(factual, truth)

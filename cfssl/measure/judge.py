"""A predictor as judge of the quality gate: does a counterfactual show what it was set to?"""

from collections.abc import Iterable

import numpy as np
import torch

from cfssl.data.table import Attributes
from cfssl.errors import UserError
from cfssl.measure.predictor import AttributePredictor


class PredictorJudge:
    """How well images show what they were set to, as a frozen attribute predictor sees them."""

    def __init__(self, predictor: AttributePredictor, names: Iterable[str]) -> None:
        """`names`: the variables that the bank intervenes on. Raises `UserError` for one that is not
        predicted."""
        for name in names:
            predictor.network.head(name)
        self.predictor = predictor

    @torch.no_grad()
    def __call__(self, images: torch.Tensor, target: Attributes) -> tuple[np.ndarray, np.ndarray]:
        """images (n, C, H, W) float32 in [-1, 1] and the values (n,) that were set -> the probability (n,) of
        these, of several discrete ones the least, NaN without one; and the error (n,) of continuous ones in
        standard deviations, of several the largest, NaN without one. On the device of the predictor."""
        if tuple(images.shape[1:]) != self.predictor.shape:
            raise UserError(
                f"The images to judge are {tuple(images.shape[1:])}, and the attribute predictor was made "
                f"for {self.predictor.shape}; train one on images of this size."
            )
        outputs = self.predictor(images)
        agreement, error = [], []
        for name, wanted in target.items():
            head = self.predictor.network.head(name)
            if head.is_continuous:
                error.append((self.predictor.value(outputs, name) - wanted).abs() / head.std)
            else:
                agreement.append(self.predictor.probabilities(outputs, name).gather(1, wanted[:, None])[:, 0])
        unasked = images.new_full((len(images),), torch.nan)
        least = torch.stack(agreement).amin(0) if agreement else unasked
        largest = torch.stack(error).amax(0) if error else unasked
        return least.double().cpu().numpy(), largest.double().cpu().numpy()

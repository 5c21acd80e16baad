"""A predictor as judge of the quality gate: does a counterfactual show what it was set to, and is the rest
as it was?"""

from collections.abc import Iterable, Mapping

import numpy as np
import torch

from cfssl.data.table import Attributes
from cfssl.errors import UserError
from cfssl.measure.predictor import AttributePredictor


class PredictorJudge:
    """What a frozen attribute predictor sees in images, and in what they became."""

    def __init__(self, predictor: AttributePredictor, names: Iterable[str]) -> None:
        """`names`: what it will be asked about. Raises `UserError` for one that is not predicted."""
        for name in names:
            predictor.network.head(name)
        self.predictor = predictor

    @torch.no_grad()
    def see(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """images (n, C, H, W) float32 in [-1, 1], on the device of the predictor -> what it predicts."""
        if tuple(images.shape[1:]) != self.predictor.shape:
            raise UserError(
                f"The images to judge are {tuple(images.shape[1:])}, and the attribute predictor was made "
                f"for {self.predictor.shape}; train one on images of this size."
            )
        outputs: dict[str, torch.Tensor] = self.predictor(images)
        return outputs

    def agreement(
        self, seen: Mapping[str, torch.Tensor], target: Attributes
    ) -> tuple[np.ndarray, np.ndarray]:
        """`target`: the values (n,) that were set -> the probability (n,) of these, of several discrete ones
        the least, NaN without one; and the error (n,) of continuous ones in standard deviations, of several
        the largest, NaN without one."""
        agreement, error = [], []
        for name, wanted in target.items():
            head = self.predictor.network.head(name)
            if head.is_continuous:
                error.append((self.predictor.value(seen, name) - wanted).abs() / head.std)
            else:
                agreement.append(self.predictor.probabilities(seen, name).gather(1, wanted[:, None])[:, 0])
        count, device = len(next(iter(seen.values()))), next(iter(seen.values())).device
        unasked = torch.full((count,), torch.nan, device=device)
        least = torch.stack(agreement).amin(0) if agreement else unasked
        largest = torch.stack(error).amax(0) if error else unasked
        return _array(least), _array(largest)

    def change(
        self, seen: Mapping[str, torch.Tensor], before: Mapping[str, torch.Tensor], name: str
    ) -> np.ndarray:
        """How far (n,) what is predicted of `name` has moved from `before`: the total variation between two
        distributions, or the distance of two values in standard deviations."""
        head = self.predictor.network.head(name)
        if head.is_continuous:
            values = [self.predictor.value(outputs, name) for outputs in (seen, before)]
            return _array((values[0] - values[1]).abs() / head.std)
        p, q = (self.predictor.probabilities(outputs, name).double() for outputs in (seen, before))
        return _array((p - q).abs().sum(1) / 2).clip(max=1.0)  # above by rounding alone


def _array(values: torch.Tensor) -> np.ndarray:
    return values.double().cpu().numpy()

"""A frozen network that says which attributes an image shows: the guide of fine-tuning, or the judge of an
audit.

Enters: a table. Leaves: calibrated logits, with gradients to the image and none to the weights. After Guo et
al. 2017 (temperature scaling, section 4.2), one temperature per head; for a Gaussian the same idea has a
closed form.

Deviations from published code, on purpose: the network never sees batch statistics (group normalisation) and
stays in eval mode; it sees the image alone, since a predictor that is fed another attribute reads the answer
off that; a real-valued head is linear, with no squashing; its errors are of the rows, not of batches.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from pydantic import Field, TypeAdapter
from pydantic.dataclasses import dataclass
from torch import nn

from cfssl.data.batches import ImageBatch, ImageData
from cfssl.data.table import Attribute, ImageTable
from cfssl.engine.loop import TrainSettings, fit
from cfssl.engine.run import Run
from cfssl.errors import UserError, nearest
from cfssl.measure.frozen import Record, measured, stem
from cfssl.measure.sampling import GROUPS, AugmentSettings, Part, Width, augmented, noise_size, rows_of_part
from cfssl.models.seeded import seeded
from cfssl.settings import STRICT, Count, Positive

LOG_SIGMA = (-5.0, 3.0)  # of a real-valued head, in standardised units
TEMPERATURES = (0.5, 10.0)  # below, heads that make no error in validation would become infinitely sure


@dataclass(frozen=True, config=STRICT)
class PredictorTrainSettings(TrainSettings):
    """What suits some thousand images. The likelihood of a real-valued head is steep where its scale is
    small, hence the clip."""

    epochs: Count = 20
    batch: Count = 64
    lr: Positive = 2e-3
    clip: Positive | None = 10.0


@dataclass(frozen=True, config=STRICT)
class PredictorSettings:
    """`attributes`: what is predicted. `width`: channels of the first of four stages, doubled by each.
    `part`: the training rows it learns from; a guide and a judge take different halves."""

    attributes: tuple[str, ...]
    width: Width = 16
    part: Part = "all"
    augment: AugmentSettings = Field(default_factory=AugmentSettings)
    train: PredictorTrainSettings = Field(default_factory=PredictorTrainSettings)


class Stage(nn.Module):
    """x -> x + convolution(act(norm(x))), and before it a convolution that may halve the grid. The sum is not
    normalised, so that the image's own contrast gets through."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.enter = nn.Conv2d(before, width, 3, stride, 1)
        self.norm = nn.GroupNorm(GROUPS, width)
        self.body = nn.Conv2d(width, width, 3, 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.enter(x)
        return x + self.body(nn.functional.silu(self.norm(x)))


class Trunk(nn.Module):
    """x (B, C, H, W) -> features (B, 16 width): mean and maximum of each channel of the last stage."""

    def __init__(self, channels: int, fold: int, width: int) -> None:
        super().__init__()
        widths = [width, 2 * width, 4 * width, 8 * width]
        self.fold = nn.PixelUnshuffle(fold)
        self.stages = nn.Sequential()
        before = channels * fold**2
        for index, after in enumerate(widths):
            self.stages.append(Stage(before, after, 2 if index else 1))
            self.stages.append(nn.SiLU())
            before = after
        self.size = 2 * before

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stages(self.fold(x))
        return torch.cat([x.mean((2, 3)), x.amax((2, 3))], dim=1)


class Head(nn.Module):
    """Features -> logits (B, K) over the temperature, or (B, 2) mean and log sigma in standardised units."""

    temperature: torch.Tensor
    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, attribute: Attribute, features: int) -> None:
        super().__init__()
        self.is_continuous = attribute.kind == "continuous"
        self.linear = nn.Linear(features, 2 if self.is_continuous else len(attribute.categories))
        # Of the logits; of a real-valued head the factor of sigma.
        self.register_buffer("temperature", torch.ones(()))
        if self.is_continuous:
            self.register_buffer("mean", torch.zeros(()))
            self.register_buffer("std", torch.ones(()))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        out = self.linear(features).float()
        if not self.is_continuous:
            return out / self.temperature
        return torch.stack([out[:, 0], softly_clamped(out[:, 1], *LOG_SIGMA) + self.temperature.log()], dim=1)

    def nll(self, out: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """See `AttributePredictor.nll`."""
        if not self.is_continuous:
            return nn.functional.cross_entropy(out, target, reduction="none")
        residual = ((target - self.mean) / self.std - out[:, 0]) / out[:, 1].exp()
        return out[:, 1] + 0.5 * (residual.square() + math.log(2 * math.pi))

    @torch.no_grad()
    def calibrate(self, out: torch.Tensor, target: torch.Tensor) -> None:
        """Sets the temperature that minimises the NLL of `target` (N,) given `out` (N, .) of `forward`."""
        if self.is_continuous:
            residual = ((target - self.mean) / self.std - out[:, 0]) / out[:, 1].exp()
            self.temperature *= residual.square().mean().sqrt().clamp_min(1e-3)
        else:
            self.temperature.fill_(best_temperature(out * self.temperature, target))


def softly_clamped(value: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """Between `low` and `high`, with a gradient everywhere: a hard clamp has none beyond a bound, so that a
    scale which one bad step threw there would stay for ever."""
    above = low + nn.functional.softplus(value - low)
    return high - nn.functional.softplus(high - above)


class PredictorNetwork(nn.Module):
    """x (B, C, H, W) float32 in [-1, 1] -> per attribute what its head says."""

    def __init__(self, attributes: Mapping[str, Attribute], channels: int, fold: int, width: int) -> None:
        super().__init__()
        self.trunk = Trunk(channels, fold, width)
        self.names = tuple(attributes)
        self.heads = nn.ModuleList(
            Head(attribute, self.trunk.size) for attribute in attributes.values()
        )  # a list, since an attribute may have any name

    def head(self, name: str) -> Head:
        """Raises `UserError` for an attribute that is not predicted."""
        if name not in self.names:
            raise UserError(
                f"The attribute predictor does not predict {name!r}{nearest(name, self.names)}; train one "
                "that does."
            )
        head = self.heads[self.names.index(name)]
        assert isinstance(head, Head)
        return head

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        features = self.trunk(x)
        return {name: self.head(name)(features) for name in self.names}


class PredictorTask(nn.Module):
    """Minimises the sum over the attributes of the mean NLL on augmented images."""

    def __init__(self, network: PredictorNetwork, augment: AugmentSettings) -> None:
        super().__init__()
        self.network, self.augment = network, augment

    def forward(self, batch: ImageBatch, step: int) -> dict[str, torch.Tensor]:
        x, _ = augmented(batch.x, batch.masks, batch.noise, self.augment)
        outputs = self.network(x)
        parts = {
            f"nll_{name}": self.network.head(name).nll(out, batch.attributes[name]).mean()
            for name, out in outputs.items()
        }
        return {"loss": torch.stack(list(parts.values())).sum(), **parts}

    def after_step(self, step: int) -> None:
        """Nothing is averaged."""


class AttributePredictor(nn.Module):
    """See the module docstring. Created from settings and the table's attributes and image shape, then `fit`
    or `load`. Frozen and in eval mode from the start: `fit` trains another network and takes its weights
    over."""

    def __init__(
        self, settings: PredictorSettings, attributes: Mapping[str, Attribute], shape: tuple[int, ...]
    ) -> None:
        """Raises `UserError` for an attribute that the table lacks, none at all, or volumes."""
        super().__init__()
        for name in settings.attributes:
            if name not in attributes:
                raise UserError(
                    f"The attribute predictor is to predict {name!r}, which is no attribute of the table"
                    f"{nearest(name, attributes)}."
                )
        if not settings.attributes:
            raise UserError("The attribute predictor has no attribute to predict; name at least one.")
        self.settings, self.shape = settings, tuple(shape)
        self.attributes = {name: attributes[name] for name in settings.attributes}
        self.network = self._network().requires_grad_(False).eval()
        self.record = Record(
            "attribute predictor",
            {
                "settings": TypeAdapter(PredictorSettings).dump_python(settings, mode="json"),
                "attributes": {name: [a.kind, *a.categories] for name, a in self.attributes.items()},
                "shape": list(shape),
            },
        )
        self.eval()

    @property
    def fingerprint(self) -> str:
        """Of weights, settings, attributes and code. Raises `UserError` before `fit` or `load`."""
        return self.record.fingerprint

    def train(self, mode: bool = True) -> Self:
        """Stays in eval mode."""
        return super().train(False)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """x (B, C, H, W) float32 in [-1, 1] -> per attribute calibrated logits (B, K), or for a continuous
        one (B, 2): mean and log sigma in standardised units."""
        outputs: dict[str, torch.Tensor] = self.network(x)
        return outputs

    def nll(self, outputs: Mapping[str, torch.Tensor], name: str, target: torch.Tensor) -> torch.Tensor:
        """-log p(target) (B,) in nats under `outputs` of `forward`. `target`: codes (B,) long or
        probabilities (B, K) float (then the cross-entropy); for a continuous attribute values (B,) in
        physical units, the density being that of standardised units."""
        return self.network.head(name).nll(outputs[name], target)

    def probabilities(self, outputs: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
        """(B, K) of a categorical or binary attribute. Raises `UserError` for a continuous one."""
        if self.network.head(name).is_continuous:
            raise UserError(f"Attribute {name!r} is continuous and has no probabilities; ask for its value.")
        return outputs[name].softmax(1)

    def value(self, outputs: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
        """(B,) of a continuous attribute, in physical units. Raises `UserError` for another one."""
        head = self.network.head(name)
        if not head.is_continuous:
            raise UserError(f"Attribute {name!r} is not continuous; ask for its probabilities.")
        return outputs[name][:, 0] * head.std + head.mean

    def spread(self, name: str) -> float:
        """The standard deviation of a continuous attribute in training, in physical units."""
        return float(self.network.head(name).std)

    def fit(self, table: ImageTable, run: Run, rows: np.ndarray | None = None) -> None:
        """Trains on the training rows (or those of `rows`) of the settings' part in which all attributes are
        known, then calibrates on such rows of the validation split."""
        s = self.settings
        known = rows_of_part(table, table.rows("train", known=s.attributes), s.part)
        known = known if rows is None else known[np.isin(known, rows)]
        held_out = table.rows("val", known=s.attributes)
        for split, found in (("training", known), ("validation", held_out)):
            if len(found) == 0:
                raise UserError(
                    f"No {split} row of {table.name} has all of {list(s.attributes)} present; the attribute "
                    "predictor needs some."
                )
        values = table.encode(s.attributes, known)
        network = self._network()
        for name, attribute in self.attributes.items():
            if attribute.kind == "continuous":
                head, column = network.head(name), values[name].double()
                head.mean.fill_(column.mean())
                head.std.fill_(column.std(correction=0).clamp_min(1e-6))
        data = ImageData(
            table, known, values, s.train, noise_size=noise_size(self.shape), section="predictor.train"
        )
        if not fit(PredictorTask(network, s.augment), data, s.train, run, "predictor"):
            return
        self.network.load_state_dict(network.state_dict())
        outputs = self._outputs(table, held_out)
        targets = table.encode(s.attributes, held_out)
        for name in s.attributes:
            head = self.network.head(name)
            device = head.temperature.device
            head.calibrate(outputs[name].to(device), targets[name].to(device))
        self.record.seal(self.network)

    def save(self, path: Path) -> None:
        """Raises `UserError` before `fit` or `load`."""
        self.record.save(path, self.network)

    def load(self, path: Path) -> None:
        """Raises `UserError` when the file belongs to other settings, attributes or images."""
        self.record.load(path, self.network)

    def score(self, table: ImageTable, split: str) -> dict[str, dict[str, float]]:
        """How well real images are read, so that a bad judge is noticed: per attribute, over the rows of
        `split` that know it, `images`, and `auc` (of more classes the mean of one-versus-rest, absent classes
        left out; NaN for a single class) with `accuracy`, or `mae` in physical units and `r2`."""
        found = {}
        for name in self.settings.attributes:
            rows = table.rows(split, known=[name])
            outputs, target = self._outputs(table, rows), table.encode([name], rows)[name]
            if self.network.head(name).is_continuous:
                error = self.value({name: outputs[name].to(self._device)}, name).cpu() - target
                spread = (target - target.mean()).square().mean()
                scores = {
                    "mae": float(error.abs().mean()),
                    "r2": float(1 - error.square().mean() / spread),
                }
            else:
                p = self.probabilities(outputs, name)
                accuracy = (p.argmax(1) == target).float().mean()
                scores = {"auc": _auc(target.numpy(), p.numpy()), "accuracy": float(accuracy)}
            found[name] = {"images": float(len(rows)), **scores}
        return found

    def _network(self) -> PredictorNetwork:
        """As the seed starts it."""
        s, fold = self.settings, stem(self.shape, "attribute predictor")
        network = seeded(
            lambda: PredictorNetwork(self.attributes, self.shape[0], fold, s.width), s.train.seed, "predictor"
        )
        assert isinstance(network, PredictorNetwork)
        return network

    @property
    def _device(self) -> torch.device:
        return next(self.network.parameters()).device

    @torch.no_grad()
    def _outputs(self, table: ImageTable, rows: np.ndarray) -> dict[str, torch.Tensor]:
        """What `forward` says of `rows`, on the CPU."""
        parts: dict[str, list[torch.Tensor]] = {name: [] for name in self.attributes}
        for _, batch in measured(table, rows, self.network):
            for name, out in self(batch.x).items():
                parts[name].append(out.cpu())
        return {name: torch.cat(found) if found else torch.zeros(0, 2) for name, found in parts.items()}


def best_temperature(logits: torch.Tensor, target: torch.Tensor) -> float:
    """The T in `TEMPERATURES` that minimises the mean NLL of codes `target` (N,) under softmax(logits / T).

    The NLL is convex in b = 1 / T; its slope, mean(E_p[logit] - logit of the target), is bisected in float64.
    """
    logits = logits.double()
    chosen = logits.gather(1, target[:, None])[:, 0]
    low, high = 1 / TEMPERATURES[1], 1 / TEMPERATURES[0]
    for _ in range(60):
        middle = (low + high) / 2
        expected = ((logits * middle).softmax(1) * logits).sum(1)
        low, high = (low, middle) if float((expected - chosen).mean()) > 0 else (middle, high)
    return 2 / (low + high)


def _auc(target: np.ndarray, p: np.ndarray) -> float:
    from sklearn.metrics import roc_auc_score

    codes = [1] if p.shape[1] == 2 else range(p.shape[1])
    areas: list[Any] = [
        roc_auc_score(target == code, p[:, code])
        for code in codes
        if 0 < (target == code).sum() < len(target)
    ]
    return float(np.mean(areas)) if areas else math.nan

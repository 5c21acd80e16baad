"""Fine-tuning as an evaluation: encoder and linear head are trained together on the labelled rows.

What enters: the pre-trained encoder, labelled training rows and validation rows of a table. What leaves: the
network at the moment, among evenly spaced ones, at which its AUC on the validation rows was highest; nothing
else is chosen there. The encoder starts as it was pre-trained and the head at random; both learn in the loop
and from the step data of the pre-training, so that a training can be interrupted.

Batch normalisation uses and updates batch statistics while the encoder learns, keeps those of the
pre-training while only the head does (`head_first`), and is in eval mode whenever something is scored.
"""

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from cfssl.data.table import ImageTable
from cfssl.data.views import ViewBatch, ViewData, ViewSettings
from cfssl.engine.checkpoint import load_checkpoint
from cfssl.engine.loop import TrainSettings, fit
from cfssl.engine.run import Run
from cfssl.errors import UserError
from cfssl.evaluate.best import Best
from cfssl.evaluate.evaluations import Question
from cfssl.evaluate.features import extract
from cfssl.evaluate.metrics import auc, once
from cfssl.evaluate.probe import log_odds
from cfssl.evaluate.settings import FineTuningSettings, SegmentSettings
from cfssl.models.backbone import feature_size
from cfssl.models.heads import linear_head
from cfssl.seeds import derive_seed

Tuned = FineTuningSettings | SegmentSettings


class Labelled:
    """The images of `rows` of a table, as what views are cut from; see `cfssl.data.plan.ViewSource`."""

    views: tuple[dict[str, Any], ...] = ()

    def __init__(self, table: ImageTable, rows: np.ndarray) -> None:
        self.table, self.rows, self.shape = table, rows, table.images.shape
        self.available = np.ones((len(rows), 1), dtype=bool)

    def __len__(self) -> int:
        return len(self.rows)

    def gather(self, items: np.ndarray, slots: np.ndarray) -> np.ndarray:
        return self.table.images.read(self.rows[items])[:, None].repeat(slots.shape[1], axis=1)


class FineTuning(nn.Module):
    """Minimises the cross-entropy, weighted by class. `head_steps`: how many steps only the head learns."""

    class_weights: torch.Tensor

    def __init__(
        self, encoder: nn.Module, class_weights: torch.Tensor, target: str, head_steps: int, seed: int
    ) -> None:
        super().__init__()
        self.network = with_head(encoder, len(class_weights), seed)
        self.register_buffer("class_weights", class_weights)
        self.target, self.head_steps = target, head_steps

    def forward(self, batch: ViewBatch, step: int) -> dict[str, torch.Tensor]:
        encoder, head = self.network
        learns = step >= self.head_steps
        encoder.train(learns)
        images = batch.images.flatten(0, 1).contiguous(memory_format=torch.channels_last)
        with torch.set_grad_enabled(learns):  # without gradients, the optimiser leaves the encoder alone
            features = encoder(images)
        logits, y = head(features), batch.attributes[self.target]
        with torch.autocast(logits.device.type, enabled=False):
            errors = nn.functional.cross_entropy(logits.float(), y, reduction="none")
            loss = (errors * self.class_weights[y]).mean()
        return {"loss": loss, "accuracy": (logits.argmax(1) == y).float().mean()}

    def after_step(self, step: int) -> None:
        """Nothing is averaged."""


def finetune(
    settings: FineTuningSettings,
    encoder: nn.Module,
    table: ImageTable,
    asked: Question,
    size: tuple[int, int],
    border: str,
    run: Run,
    path: Path,
) -> bool:
    """Trains a copy of `encoder` with a new head on the training rows of `asked` and writes it to `path`, as
    it was at the chosen moment. `size` (height, width) and `border`: of the views that the encoder knows.
    Returns whether it got to the end (False when `run.stop_at` came first); called again, it goes on."""
    train = schedule(settings, len(asked.train), asked.seed)
    data = ViewData(
        Labelled(table, asked.train),
        view_settings(settings, size, border, table.images.shape),
        train.batch,
        train.epochs,
        train.seed,
        train.accumulate,
        {settings.target: torch.from_numpy(asked.train_y)},
    )
    weights = class_weights(asked.train_y, asked.classes, settings.balanced)
    head_steps = round(settings.head_first * len(data))
    task = FineTuning(copy.deepcopy(encoder), weights, settings.target, head_steps, train.seed)

    def val_auc() -> float:
        return once(auc, asked.val_y, tuned_scores(task.network, table, asked.val, size, border))

    every = math.ceil(len(data) / settings.checks)
    how = {"epochs": train.epochs, "batch": train.batch, "steps_per_epoch": data.order.steps_per_epoch}
    best = Best(task.network, "val_auc", val_auc, every, run, path, how)
    label = f"{settings.label}, {asked.fraction:.0%} of the labels, seed {asked.seed}"
    return fit(task, data, train, run, label, best)


def schedule(settings: Tuned, rows: int, seed: int) -> TrainSettings:
    """The training on `rows` labelled images. A batch takes no more of them than there are, and small label
    subsets go on for more epochs, until they have made the least number of steps. Raises `UserError` when
    there are too few for the micro-batches."""
    train = settings.train
    batch = min(train.batch, rows)
    batch -= batch % train.accumulate
    if not batch:
        raise UserError(
            f"{settings.label} has {rows} labelled training images for {train.accumulate} micro-batches; "
            "lower train.accumulate of the evaluation or raise its label fraction."
        )
    epochs = max(train.epochs, math.ceil(settings.least_steps / (rows // batch)))
    return replace(train, batch=batch, epochs=epochs, seed=derive_seed(train.seed, settings.name, seed))


def class_weights(y: np.ndarray, classes: int, balanced: bool) -> torch.Tensor:
    """(classes,) float32 whose mean over the rows is 1: all 1, or inverse to the number of rows."""
    if not balanced:
        return torch.ones(classes)
    return torch.from_numpy(len(y) / (classes * np.bincount(y, minlength=classes))).float()


def view_settings(
    settings: Tuned, size: tuple[int, int], border: Any, stored: tuple[int, ...]
) -> ViewSettings:
    """One view of `size` (height, width) per image of the shape `stored`. Raises `UserError` for views that
    are neither square nor of the stored size."""
    height, width = size
    if stored[1:] != size and height != width:
        raise UserError(
            f"{settings.label} cuts views of {height} x {width} pixels from images of {stored[1]} x "
            f"{stored[2]}, and only square views can be of another size than their images; set views.size."
        )
    side = None if stored[1:] == size else height
    return ViewSettings(
        count=1, size=side, geometry=settings.geometry, photometric=settings.photometric, border=border
    )


def with_head(encoder: nn.Module, classes: int, seed: int) -> nn.Sequential:
    """(B, C, H, W) in [0, 1] -> logits (B, classes)."""
    device = next(encoder.parameters()).device
    return nn.Sequential(encoder, linear_head(feature_size(encoder), classes, seed).to(device))


def load_tuned(path: Path, encoder: nn.Module, classes: int) -> tuple[nn.Module, dict[str, Any]]:
    """The network that `finetune` wrote, and how it came about: {"epochs", "batch", "steps_per_epoch"}.
    `encoder`: one of the same kind; it is copied."""
    state = load_checkpoint(path)
    network = with_head(copy.deepcopy(encoder), classes, seed=0)
    network.load_state_dict(state["network"])
    return network.eval(), state["how"]


def tuned_scores(
    network: nn.Module, table: ImageTable, rows: np.ndarray, size: tuple[int, int], border: str
) -> np.ndarray:
    """Log-odds (n, classes) float64 of whole, unaugmented images, in eval mode."""
    return log_odds(extract(network, table, rows, size, border, quiet=True).astype(np.float64))

"""Segmentation as an evaluation: the encoder under a decoder and a pointwise head, trained on images with
masks.

What enters: an encoder, perhaps the decoder that was trained on it, and rows of a table with masks. What
leaves: the network at the moment, among evenly spaced ones, at which its Dice on the validation rows was
highest; nothing else is chosen there. Masks are warped exactly as their views are, and pixels from outside of
the image count in no loss. The loss is MONAI's Dice of every image plus cross-entropy.
"""

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import nn

from cfssl.data.table import ImageTable, MaskReader
from cfssl.data.views import ViewBatch, ViewData
from cfssl.engine.checkpoint import load_checkpoint
from cfssl.engine.loop import fit
from cfssl.engine.run import Run
from cfssl.errors import UserError
from cfssl.evaluate.best import Best
from cfssl.evaluate.contours import dice
from cfssl.evaluate.features import to_unit, whole_view
from cfssl.evaluate.finetune import Labelled, schedule, view_settings
from cfssl.evaluate.masked import Shares
from cfssl.evaluate.settings import SegmentSettings
from cfssl.models.dense import DecoderSettings, DenseNetwork, create_dense
from cfssl.models.seeded import seeded
from cfssl.objectives.segmentation import SURE, mask_loss

BATCH = 64  # images that are segmented at a time


@dataclass(frozen=True)
class Origin:
    """What a segmentation starts from: the timm model `encoder`, and where the objective has trained one, the
    network with its decoder, `dense`, on the same encoder."""

    encoder: nn.Module
    dense: DenseNetwork | None = None


class Segmenter(nn.Module):
    """Images (B, C, H, W) in [0, 1] -> logits (B, S, H, W), or (B, 1 + S, H, W) with the background first
    where structures are `exclusive`."""

    def __init__(self, dense: DenseNetwork, structures: int, exclusive: bool, seed: int) -> None:
        super().__init__()
        self.dense, self.exclusive = dense, exclusive
        self.head = seeded(lambda: nn.Conv2d(dense.width, structures + exclusive, 1), seed, "mask_head")

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return scaled(self.head(self.dense(images)), images.shape[2:])

    def masks(self, logits: torch.Tensor) -> torch.Tensor:
        """(B, S, H, W) bool: probabilities above 1/2, or the likeliest of exclusive structures."""
        if not self.exclusive:
            return logits > 0
        likeliest = logits.argmax(1, keepdim=True)
        return likeliest == torch.arange(1, logits.shape[1], device=logits.device)[:, None, None]


class SegmenterTask(nn.Module):
    """Minimises Dice loss plus cross-entropy on views with their masks. What does not learn keeps its weights
    and its batch statistics."""

    def __init__(self, network: Segmenter, learns: str) -> None:
        super().__init__()
        self.network = network
        resting: dict[str, list[nn.Module]] = {
            "all": [],
            "decoder": [network.dense.encoder],
            "head": [network.dense],
        }
        self.resting = [part.requires_grad_(False) for part in resting[learns]]

    def train(self, mode: bool = True) -> Self:
        """Without the parts that rest."""
        super().train(mode)
        for part in self.resting:
            part.eval()
        return self

    def forward(self, batch: ViewBatch, step: int) -> dict[str, torch.Tensor]:
        assert batch.labels is not None  # the data were made with masks
        images = batch.images.flatten(0, 1).contiguous(memory_format=torch.channels_last)
        logits = self.network(images)
        true, valid = batch.labels.flatten(0, 1), batch.valid.flatten(0, 1)
        with torch.autocast(logits.device.type, enabled=False):
            loss_of = exclusive_loss if self.network.exclusive else mask_loss
            loss = loss_of(logits.float(), true.float(), valid[:, None])
        found = self.network.masks(logits.detach())
        both, sizes = (found & true & valid[:, None]).sum(), ((found.int() + true) * valid[:, None]).sum()
        return {"loss": loss, "dice": 2 * both / sizes.clamp(min=1)}

    def after_step(self, step: int) -> None:
        """Nothing is averaged."""


def exclusive_loss(logits: torch.Tensor, true: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """As `mask_loss`, of logits (B, 1 + S, H, W) of the background and of exclusive structures, whose masks
    `true` (B, S, H, W) do not overlap."""
    from monai.losses import DiceCELoss

    true = torch.cat([1 - true.amax(1, keepdim=True), true], dim=1)
    background = torch.zeros_like(logits)
    background[:, 0] = 1
    logits = torch.where(valid, logits, SURE * (2 * background - 1))
    of_all = DiceCELoss(include_background=False, softmax=True, smooth_nr=1.0, smooth_dr=1.0)
    loss: torch.Tensor = of_all(logits, torch.where(valid, true, background))
    return loss


def segmenter(settings: SegmentSettings, origin: Origin, channels: int, seed: int) -> Segmenter:
    """The network before training, on a copy of `origin`; what is new in it is a function of `seed`, so that
    all arms start alike. `channels` of the images."""
    if origin.dense is not None and settings.decoder is None:
        dense = copy.deepcopy(origin.dense)
    else:
        decoder = settings.decoder or DecoderSettings()
        dense = create_dense(copy.deepcopy(origin.encoder), decoder, channels, seed)
    device = next(origin.encoder.parameters()).device
    return Segmenter(dense.requires_grad_(True), len(settings.structures), settings.exclusive, seed).to(
        device
    )


def train_segmenter(
    settings: SegmentSettings,
    origin: Origin,
    table: ImageTable,
    rows: Shares,
    size: tuple[int, int],
    border: str,
    run: Run,
    path: Path,
) -> bool:
    """Trains a segmenter on `rows.train` and writes it to `path`, as it was at the moment of the best Dice on
    `rows.val`. `size` (height, width) and `border`: of the views that the encoder knows. Returns whether it
    got to the end (False when `run.stop_at` came first); called again, it goes on. Raises `UserError` for
    exclusive structures that overlap."""
    masks = MaskReader(table, settings.structures)
    if settings.exclusive:
        refuse_overlap(settings.structures, table, np.concatenate([rows.train, rows.val]))
    train = schedule(settings, len(rows.train), rows.seed)
    data = ViewData(
        Labelled(table, rows.train),
        view_settings(settings, size, border, table.images.shape),
        train.batch,
        train.epochs,
        train.seed,
        train.accumulate,
        masks=masks,
    )
    task = SegmenterTask(segmenter(settings, origin, table.images.shape[0], train.seed), settings.learns)

    def val_dice() -> float:
        return float(mean_dice(task.network, table, masks, rows.val, size, border))

    every = math.ceil(len(data) / settings.checks)
    how = {"epochs": train.epochs, "batch": train.batch, "steps_per_epoch": data.order.steps_per_epoch}
    best = Best(task.network, "val_dice", val_dice, every, run, path, how)
    fold = f", fold {rows.fold + 1} of {settings.folds}" if settings.folds > 1 else ""
    label = f"{settings.label}, {rows.fraction:.0%} of the labels, seed {rows.seed}{fold}"
    return fit(task, data, train, run, label, best)


def load_segmenter(
    settings: SegmentSettings, path: Path, origin: Origin, channels: int
) -> tuple[Segmenter, dict[str, Any]]:
    """The network that `train_segmenter` wrote, and how it came about: {"epochs", "batch",
    "steps_per_epoch"}. `origin`: of the same kind; it is copied."""
    state = load_checkpoint(path)
    network = segmenter(settings, origin, channels, seed=0)
    network.load_state_dict(state["network"])
    return network.eval(), state["how"]


def refuse_overlap(structures: tuple[str, ...], table: ImageTable, rows: np.ndarray) -> None:
    """Raises `UserError` where a pixel of `rows` belongs to two structures."""
    masks = MaskReader(table, structures)
    bad = [row for row in rows.tolist() if ((masks(np.array([row])) > 0).sum(1) > 1).any()]
    if bad:
        raise UserError(
            f"The structures {', '.join(structures)} are exclusive, but overlap in {len(bad)} of {len(rows)} "
            f"labelled images of {table.name}, the first being row {bad[0]}; set exclusive: false."
        )


@torch.no_grad()
def segmented(
    network: Segmenter, table: ImageTable, rows: np.ndarray, size: tuple[int, int], border: str
) -> Iterator[tuple[slice, np.ndarray]]:
    """Places in `rows` and the masks (n, S, H, W) bool found in these whole images, on the grid of the stored
    ones, in eval mode. An image of another size than `size` is seen as its whole view, and the logits are
    interpolated back."""
    network.eval()
    device = next(network.parameters()).device
    stored = table.images.shape[1:]
    for start in range(0, len(rows), BATCH):
        places = slice(start, min(start + BATCH, len(rows)))
        images = to_unit(table.images.read(rows[places]))
        if stored != size:
            images = np.stack([whole_view(image, size, border) for image in images])
        on_device = torch.from_numpy(images).to(device).contiguous(memory_format=torch.channels_last)
        logits = scaled(network(on_device).float(), stored)
        yield places, network.masks(logits).cpu().numpy()


def mean_dice(
    network: Segmenter,
    table: ImageTable,
    masks: MaskReader,
    rows: np.ndarray,
    size: tuple[int, int],
    border: str,
) -> np.floating[Any]:
    """Over images and structures."""
    found = segmented(network, table, rows, size, border)
    return np.mean(np.concatenate([dice(here, masks(rows[places]) > 0) for places, here in found]))


def scaled(maps: torch.Tensor, size: tuple[int, ...]) -> torch.Tensor:
    """Maps (B, D, h, w) on a grid of `size` (height, width) of the same field of view."""
    if maps.shape[2:] == tuple(size):
        return maps
    return nn.functional.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=False)

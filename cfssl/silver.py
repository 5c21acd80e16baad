"""Silver labels: masks that a segmentor, trained on a table with human masks, makes for the images of
another.

Enters: a frozen segmentor and a table. Leaves: a folder of masks with a confidence per image and structure,
which `cfssl.data.labels` reads.

The confidence is the soft Dice of a mask under the segmentor's own probabilities (Borges, Pacheco and Silva
2024, "Soft Dice Confidence"): the Dice that the mask is expected to have if every pixel belongs to the
structure with the probability that the segmentor says, independently of the others. It speaks in the unit in
which masks are compared, weighs a doubtful pixel by how much it matters to a structure of this size, and has
no setting; a mean of |2p - 1| needs a border to be taken over, and is the same for a large and a small
structure of equal doubts. It knows the doubts of the segmentor and not its errors: one that is wrong for
certain is confident.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from scipy.stats import spearmanr

from cfssl.data.datasets import DataSettings
from cfssl.data.labels import FORMAT, silver_name
from cfssl.data.table import ImageTable
from cfssl.data.writer import ArrayFile
from cfssl.errors import UserError
from cfssl.files import atomic_folder, atomic_path, write_json
from cfssl.measure import Segmentor, SegmentorSettings
from cfssl.measure.frozen import measured
from cfssl.settings import STRICT

FEWEST = 3  # images of which a rank correlation says anything


@dataclass(frozen=True, config=STRICT)
class SilverSettings:
    """`data`: the table with human masks that the segmentor learns from. `segmentor`: its structures are
    masks of that table, and the silver masks are called after them. `threshold`: the probability above which
    a pixel belongs to a structure."""

    data: Annotated[DataSettings, Field(discriminator="name")]
    segmentor: SegmentorSettings
    threshold: Annotated[float, Field(gt=0, lt=1)] = 0.5

    @property
    def names(self) -> tuple[str, ...]:
        """Of the silver masks."""
        return tuple(map(silver_name, self.segmentor.structures))


class Silver(NamedTuple):
    """Of the images at `places` in the rows: masks (n, S, H, W) uint8 of 0 and 1, their confidence (n, S)
    float32, and their Dice (n, S) with the table's own masks, NaN where it has none or an empty one."""

    places: slice
    masks: np.ndarray
    confidence: np.ndarray
    dice: np.ndarray


def silver_of(logits: torch.Tensor, threshold: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Masks m (B, S, H, W) bool and their confidence (B, S) float64 in [0, 1] of logits (B, S, H, W).

    The confidence is 2 sum(p m) / (sum p + sum m), the ratio of the expected terms of Dice. Where nothing is
    found that would be 0 for an absent structure too; there it is the expected Dice itself, which is the
    probability that there is nothing, prod(1 - p)."""
    p = logits.double().sigmoid()
    masks = p > threshold
    size = masks.sum((2, 3))
    soft = 2 * (p * masks).sum((2, 3)) / (p.sum((2, 3)) + size)
    nothing = torch.nn.functional.softplus(logits.double()).sum((2, 3)).neg().exp()
    return masks, torch.where(size > 0, soft, nothing)


@torch.no_grad()
def silver_masks(
    segmentor: Segmentor, table: ImageTable, rows: np.ndarray, threshold: float
) -> Iterator[Silver]:
    """The silver masks of `rows`, a chunk at a time. Raises `UserError` for images of another shape than
    those that the segmentor was trained on."""
    refuse_other_shape(segmentor, table)
    own = tuple(name for name in segmentor.structures if name in table.mask_names)
    channels = [segmentor.structures.index(name) for name in own]
    for places, batch in measured(table, rows, segmentor.network, own):
        masks, confidence = silver_of(segmentor.logits(batch.x).cpu(), threshold)
        dice = np.full(confidence.shape, np.nan)
        gold = batch.masks.cpu().bool()
        sizes = masks[:, channels].sum((2, 3)) + gold.sum((2, 3))
        both = (masks[:, channels] & gold).sum((2, 3))
        dice[:, channels] = torch.where(gold.any(3).any(2), 2 * both / sizes, torch.nan).numpy()
        yield Silver(places, masks.numpy().astype(np.uint8), confidence.numpy().astype(np.float32), dice)


def write_silver(
    folder: Path,
    segmentor: Segmentor,
    table: ImageTable,
    threshold: float,
    progress: Callable[[int], None] | None = None,
) -> dict[str, dict[str, float | None]]:
    """Writes the silver masks of all images of `table` to `folder` (whole or not at all). Returns how they
    agree with the table's own masks of the same names, see `agreement`.

    progress: called with the images done. Raises `UserError` as `silver_masks` does."""
    structures, count = segmentor.structures, len(table)
    confidences, dices = [], []
    with atomic_folder(folder) as temporary:
        with ArrayFile(temporary / "masks.npy", count) as file:
            for silver in silver_masks(segmentor, table, np.arange(count), threshold):
                file.append(silver.masks)
                confidences.append(silver.confidence)
                dices.append(silver.dice)
                if progress is not None:
                    progress(silver.places.stop)
        confidence = np.concatenate(confidences)
        with atomic_path(temporary / "confidence.parquet") as path:
            pd.DataFrame(confidence, columns=list(structures)).to_parquet(path, index=False)
        record = {
            "format": FORMAT,
            "table": table.fingerprint,
            "segmentor": segmentor.fingerprint,
            "structures": list(structures),
            "threshold": threshold,
            "shape": [count, len(structures), *table.images.shape[1:]],
        }
        write_json(temporary / "silver.json", record)
    return agreement(structures, confidence, np.concatenate(dices))


def validated(
    segmentor: Segmentor, table: ImageTable, threshold: float
) -> dict[str, dict[str, float | None]]:
    """How silver masks agree with the human ones on the validation rows of the table that the segmentor was
    trained on, see `agreement`."""
    shape = (len(rows := table.rows("val")), len(segmentor.structures))
    confidence, dice = np.zeros(shape), np.full(shape, np.nan)
    for silver in silver_masks(segmentor, table, rows, threshold):
        confidence[silver.places], dice[silver.places] = silver.confidence, silver.dice
    return agreement(segmentor.structures, confidence, dice)


def agreement(
    structures: tuple[str, ...], confidence: np.ndarray, dice: np.ndarray
) -> dict[str, dict[str, float | None]]:
    """Of each structure whose Dice (n, S) is known somewhere (not NaN): on how many `images`, the mean `dice`
    and `confidence` there, and the rank `correlation` of the two over images (null where it has none)."""
    found: dict[str, dict[str, float | None]] = {}
    for name, sure, true in zip(structures, confidence.T, dice.T, strict=True):
        known = ~np.isnan(true)
        if not known.any():
            continue
        sure, true = sure[known], true[known]
        varies = len(true) >= FEWEST and np.ptp(sure) > 0 and np.ptp(true) > 0
        found[name] = {
            "images": int(known.sum()),
            "dice": float(true.mean()),
            "confidence": float(sure.mean()),
            "correlation": float(spearmanr(sure, true).statistic) if varies else None,
        }
    return found


def agreement_text(what: str, found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """One line per structure of `agreement`, for a person."""
    lines = []
    for name, of in found.items():
        rank = "" if of["correlation"] is None else f", rank correlation {of['correlation']:.2f}"
        lines.append(
            f"{name}: Dice {of['dice']:.3f}, confidence {of['confidence']:.3f}{rank}, on {of['images']} "
            f"{what}"
        )
    return lines


def refuse_other_shape(segmentor: Segmentor, table: ImageTable) -> None:
    """Raises `UserError` where the images of `table` are not of the shape that the segmentor knows."""
    known, found = (" x ".join(map(str, shape)) for shape in (segmentor.shape, table.images.shape))
    if known != found:
        raise UserError(
            f"The segmentor of silver masks was trained on images of {known}, and those of {table.name!r} "
            f"are {found}; prepare both tables with the same `size` and `channels`."
        )

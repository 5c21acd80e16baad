"""CHRO-maps of a recipe: how its network embeds training images and their counterfactuals in the bank.

Enters: a trained objective. A dense one is seen through its decoder's map, any other through the encoder's
coarsest grid with at least eight cells a side. Leaves: the folder that `chromap_files` describes.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from cfssl.data.labels import silver_name
from cfssl.errors import UserError
from cfssl.evaluate.features import to_unit, whole_view
from cfssl.experiment import ChromapsSettings
from cfssl.models.dense import DenseNetwork, Grid
from cfssl.objectives import labelling_masks
from cfssl.pipeline import Pipeline
from cfssl.sheets import spread_over_domains
from cfssl.visualise.chromap import PRESETS
from cfssl.visualise.chromap_files import chromaps
from cfssl.visualise.chromap_views import Views
from cfssl.visualise.views import slot_names

CELLS = 8  # a side


def asked_for(settings: ChromapsSettings | None, images: int | None, preset: str | None) -> ChromapsSettings:
    """The recipe's settings (None: the usual ones) with what the command line says instead. Raises
    `UserError` for an unknown preset."""
    if preset is not None and preset not in PRESETS:
        raise UserError(f"--preset is {preset!r}; choose one of {', '.join(PRESETS)}.")
    base = settings or ChromapsSettings()
    chosen: Any = preset or base.preset  # one of the presets
    return replace(base, images=images or base.images, preset=chosen)


def chromaps_of(
    job: Pipeline, folder: Path, settings: ChromapsSettings, reference: Path | None = None
) -> dict[str, Any]:
    """Writes the CHRO-maps of some images with all their counterfactuals into `folder`, and returns what its
    chromap.json holds. `reference`: the folder of CHRO-maps of the same images, whose colours are taken over.
    Images are spread over the bank's domains; without counterfactuals they are the first ones.
    """
    bank, names = job.generation.bank, slot_names(job.generation.bank)
    if bank.views:
        items = spread_over_domains(bank, job.table, settings.images)
    else:
        items = np.arange(min(settings.images, len(bank)))
    if not len(items):
        raise UserError(f"The bank of {job.recipe.name} has no image to show; check the splits of its table.")
    masks, class_names = mask_codes(job, bank.rows[items])
    images = []
    for index, item in enumerate(items):
        slots = np.flatnonzero(bank.available[item])
        stored = bank.gather(items[[index]], slots[None])[0]  # (V, C, H, W)
        views = to_unit(stored)
        _, size = job.recipe.views.shape(stored.shape[1:])
        seen = views
        if views.shape[2:] != size:
            seen = np.stack([whole_view(view, size, job.recipe.views.border) for view in views])
        images.append(
            Views(
                embeddings=embedded(job.objective, seen),
                images=views.mean(axis=1),
                masks=None if masks is None else np.stack([masks[index]] * len(slots)),
                names=[names[slot] for slot in slots],
            )
        )
    return chromaps(
        folder,
        images,
        PRESETS[settings.preset],
        reference=reference,
        names=[f"row {row}" for row in bank.rows[items]],
        class_names=class_names,
    )


@torch.no_grad()
def embedded(objective: nn.Module, images: np.ndarray) -> np.ndarray:
    """The embeddings (V, D, h, w) float32 of images (V, C, H, W) in [0, 1], in eval mode."""
    network = getattr(objective, "network", None)
    student = objective.student
    assert isinstance(student, nn.Module)
    device = next(student.parameters()).device
    x = torch.from_numpy(images).to(device).contiguous(memory_format=torch.channels_last)
    if isinstance(network, DenseNetwork):
        found: torch.Tensor = network.eval()(x)
    else:
        found = Grid(student, shown_stride(student, min(images.shape[2:]))).map(student.eval(), x)
    return found.float().cpu().numpy()


def shown_stride(encoder: nn.Module, side: int) -> int:
    """The largest stride that leaves CELLS cells on a `side` of pixels, or else the smallest there is."""
    strides = [int(info["reduction"]) for info in encoder.feature_info]  # type: ignore[union-attr]
    enough = [stride for stride in strides if side // stride >= CELLS]
    return max(enough) if enough else min(strides)


def mask_codes(job: Pipeline, rows: np.ndarray) -> tuple[np.ndarray | None, dict[int, str]]:
    """Classes (n, H, W) of the masks that the objective learns from, else of the table's own, the later ones
    on top, without silver ones, which would cover what they are made after; and their names."""
    human = tuple(name for name in job.table.mask_names if not name.startswith(silver_name("")))
    names = labelling_masks(job.recipe.objective) or human
    if not names:
        return None, {}
    masks = job.labelling.table.masks_of(names).read(rows) > 0  # (n, M, H, W)
    codes = np.zeros((len(rows), *masks.shape[2:]), dtype=np.int64)
    for place in range(len(names)):
        codes[masks[:, place]] = place + 1
    return codes, {place + 1: name.replace("_", " ") for place, name in enumerate(names)}

"""The encoder as timm and the Hugging Face hub lay it out: `model.safetensors` with timm's keys, and
`config.json`.

`timm.create_model("local-dir:FOLDER", pretrained=True, num_classes=0)` loads it; nothing of cfssl is needed.
"""

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cfssl.errors import UserError
from cfssl.models.backbone import BackboneSettings, feature_size, has_fixed_image_size


def export_encoder(
    encoder: nn.Module,
    folder: Path,
    backbone: BackboneSettings,
    shape: tuple[int, int, int],
    provenance: dict[str, Any],
) -> None:
    """Writes `encoder`, the timm model that `backbone` describes, for images of `shape` (C, H, W) with pixels
    in [0, 1].

    `provenance` (JSON-serialisable) is kept under "cfssl" in config.json. The folder must not hold another
    model.
    """
    from timm.models import save_for_hf

    refuse_used_folder(folder)
    config = {
        "architecture": backbone.name,
        "num_classes": 0,
        "num_features": feature_size(encoder),
        # Stated, because a loader's default normalisation would silently shift every feature.
        "pretrained_cfg": {
            "input_size": list(shape),
            "mean": [0.0] * shape[0],
            "std": [1.0] * shape[0],
            "num_classes": 0,
            "interpolation": "bilinear",
            "crop_pct": 1.0,
        },
        "model_args": {
            "in_chans": shape[0],
            **backbone.options,
            **({"img_size": list(shape[1:])} if has_fixed_image_size(backbone.name) else {}),
        },
        "cfssl": provenance,
    }
    # safetensors stores plain layouts only; training keeps the channels last
    plain = copy.deepcopy(encoder).to(memory_format=torch.contiguous_format)
    save_for_hf(plain, str(folder), model_config=config, safe_serialization=True)


def refuse_used_folder(folder: Path) -> None:
    """Raises `UserError` when `folder` holds something already; asked before anything is trained."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"The export folder {folder} is not empty; give a new folder.")

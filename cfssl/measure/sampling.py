"""What predictor and segmentor are trained on: which rows, and how their images are varied."""

from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field
from pydantic.dataclasses import dataclass

from cfssl.data.table import ImageTable, texts
from cfssl.seeds import derive_seed
from cfssl.settings import STRICT, NonNegative

GROUPS = 4  # in which channels are normalised
Width = Annotated[int, Field(ge=GROUPS, multiple_of=GROUPS)]
Part = Literal["all", "first", "second"]
DRAWS = 6  # numbers per image before its noise: shift down and right, contrast, brightness, gamma, level


@dataclass(frozen=True, config=STRICT)
class AugmentSettings:
    """Each image is varied by its own draw, uniform between minus and plus: `shift` is a share of the side
    (the border is repeated), `contrast` and `gamma` are exponents of e, `brightness` and the standard
    deviation `noise` (uniform from 0) are in units of the range [-1, 1]. A quantity that is to be measured
    must not be varied: an intensity wants contrast, brightness and gamma 0."""

    shift: Annotated[float, Field(ge=0, le=0.25)] = 0.03
    contrast: NonNegative = 0.1
    brightness: NonNegative = 0.05
    gamma: NonNegative = 0.0
    noise: NonNegative = 0.05


def rows_of_part(table: ImageTable, rows: np.ndarray, part: Part) -> np.ndarray:
    """Those of `rows` that belong to the `part`. The halves are disjoint and do not depend on any setting, so
    that networks of "first" and "second" have no image, and no group of the table, in common."""
    if part == "all":
        return rows
    keys = rows if table.group is None else texts(table.frame[table.group]).to_numpy()[rows]
    half = {key: derive_seed("measure", "half", str(key)) % 2 for key in set(keys.tolist())}
    wanted = 0 if part == "first" else 1
    return rows[np.array([half[key] == wanted for key in keys.tolist()], dtype=bool)]


def noise_size(shape: tuple[int, ...]) -> int:
    """How many standard normal numbers `augmented` needs for an image of `shape` (C, H, W)."""
    return DRAWS + int(np.prod(shape))


def augmented(
    x: torch.Tensor, masks: torch.Tensor, noise: torch.Tensor, settings: AugmentSettings
) -> tuple[torch.Tensor, torch.Tensor]:
    """Images x (B, C, H, W) in [-1, 1] and masks (B, S, H, W), varied by the standard normal numbers `noise`
    (B, noise_size): the masks are shifted with the image, and the image stays in its range."""
    side = torch.tensor(x.shape[2:], device=x.device)
    draws = torch.special.ndtr(noise[:, :DRAWS]) * 2 - 1  # uniform on [-1, 1]
    shift = (draws[:, :2] * settings.shift * side).round().long()
    x, masks = shifted(x, shift), shifted(masks, shift)
    contrast, brightness, gamma, level = (draws[:, place, None, None, None] for place in range(2, DRAWS))
    if settings.gamma:
        x = (x / 2 + 0.5).clamp(0, 1) ** (gamma * settings.gamma).exp() * 2 - 1
    x = x * (contrast * settings.contrast).exp() + brightness * settings.brightness
    x = x + (level + 1) / 2 * settings.noise * noise[:, DRAWS:].view(x.shape)
    return x.clamp(-1, 1), masks


def shifted(x: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """x (B, C, H, W) moved by `shift` (B, 2) pixels down and right; the border is repeated."""
    height, width = x.shape[2:]
    down = (torch.arange(height, device=x.device) - shift[:, :1]).clamp(0, height - 1)  # (B, H)
    right = (torch.arange(width, device=x.device) - shift[:, 1:]).clamp(0, width - 1)
    image = torch.arange(len(x), device=x.device)[:, None, None]
    return x.permute(0, 2, 3, 1)[image, down[:, :, None], right[:, None]].permute(0, 3, 1, 2)

"""The published sizes of the HVAE as architecture strings, and what the strings mean; De Sousa Ribeiro et al.
2023 and their public code.

"32b3d2,16b3d2,...,1b4" is an encoder: at 32 pixels 3 blocks, then one that halves, and so on down to 1 pixel.
"1b4,4b4,...,32b4" is a decoder: 4 levels at 1 pixel, 4 at 4 pixels, and so on.
"""

import itertools
import re
from dataclasses import dataclass
from typing import Literal

BlockKind = Literal["default", "light"]
SizeName = Literal["morphomnist", "ukbb64", "ukbb192", "mimic192", "mimic224", "embed224", "celeba64"]

STAGE = re.compile(r"(\d+)b(\d+)(?:d(\d+))?")


@dataclass(frozen=True)
class Size:
    """`widths` fine to coarse, `latents` (channels of z) coarse to fine, one per resolution."""

    encoder: str
    decoder: str
    widths: tuple[int, ...]
    latents: tuple[int, ...]
    z_max_res: int
    block: BlockKind = "default"


_E192 = "192b1d2,96b3d2,48b7d2,24b11d2,12b7d2,6b3d6,1b2"
_D192 = "1b2,6b4,12b8,24b12,48b8,96b4,192b2"
_E224 = "224b2d2,112b4d2,56b9d2,28b14d2,14b14d2,7b9d7,1b5"
_D224 = "1b5,7b10,14b15,28b15,56b10,112b5,224b3"
_WIDE = (32, 64, 96, 128, 160, 192, 512)
_DOUBLING = (32, 64, 128, 256, 512, 1024)

SIZES: dict[SizeName, Size] = {
    "morphomnist": Size(
        "32b3d2,16b3d2,8b3d2,4b3d4,1b4", "1b4,4b4,8b4,16b4,32b4", (16, 32, 64, 128, 256), (16,) * 5, 192
    ),
    "ukbb64": Size(
        "64b3d2,32b31d2,16b15d2,8b7d2,4b3d4,1b2",
        "1b2,4b4,8b8,16b16,32b32,64b4",
        _DOUBLING,
        (16,) * 6,
        192,
        "light",
    ),
    "ukbb192": Size(_E192, _D192, _WIDE, (16,) * 7, 96, "light"),
    "mimic192": Size(_E192, _D192, _WIDE, (16,) * 7, 96),
    "mimic224": Size(_E224, _D224, _WIDE, (16,) * 7, 96),
    "embed224": Size(_E224, _D224, _WIDE, (48, 30, 24, 18, 12, 6, 1), 96),
    "celeba64": Size(
        "64b3d2,32b3d2,16b3d2,8b3d2,4b3d4,1b4", "1b4,4b4,8b4,16b4,32b4,64b4", _DOUBLING, (16,) * 6, 192
    ),
}


def encoder_stages(text: str) -> list[tuple[int, int, int]]:
    """ "32b3d2,...,1b4" -> (resolution, blocks, downsampling factor or 1) per stage. Raises ValueError for
    what cannot be built."""
    stages = []
    for part in text.split(","):
        match = STAGE.fullmatch(part)
        if match is None:
            raise ValueError(
                f"encoder stage {part!r} of {text!r}, expected e.g. 32b3d2: side, blocks, factor"
            )
        stages.append((int(match[1]), int(match[2]), int(match[3] or 1)))
    if stages[0][1] == 0:
        raise ValueError(
            f"encoder {text!r} has no block before its first downsampling, so that its channels do not fit; "
            f"start with {stages[0][0]}b1"
        )
    for (side, _, factor), (below, *_) in itertools.pairwise(stages):
        if factor < 2 or side != below * factor:
            raise ValueError(f"encoder {text!r} does not get from {side} to {below} pixels by a whole factor")
    if stages[-1][0] != 1 or stages[-1][2] != 1:
        raise ValueError(f"encoder {text!r}, expected to end at one pixel, e.g. with 1b4")
    return stages


def decoder_stages(text: str) -> list[tuple[int, int]]:
    """ "1b4,...,32b4" -> (resolution, levels) per stage, coarse to fine. Raises ValueError for what cannot be
    built."""
    stages = []
    for part in text.split(","):
        match = STAGE.fullmatch(part)
        if match is None or match[3] or int(match[2]) == 0:
            raise ValueError(f"decoder stage {part!r} of {text!r}, expected e.g. 32b4: side, levels")
        stages.append((int(match[1]), int(match[2])))
    return stages

"""Morpho-MNIST (Castro et al. 2019) with the synthetic intensity model of Pawlowski et al. (2020): real
digits, known attribute SCM.

    thickness  t = 0.5 + Gamma(shape 10, rate 5)
    intensity  i = 64 + 191 sigmoid(0.5 eps + 2 t - 5),  eps ~ N(0, 1)
    digit      independent of both

The values in the csv files are those of this model, so eps is recovered exactly and attribute
counterfactuals need no fitting. The folder holds `PART-images-idx3-ubyte.gz`, `PART-labels-idx1-ubyte.gz`
and `PART-morpho.csv`, PART being `t10k` or `train`.
"""

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from cfssl.data.columns import read_columns
from cfssl.data.prepare import Progress, save_prepared
from cfssl.data.splits import SplitSettings
from cfssl.data.table import Attribute, ImageTable
from cfssl.errors import UserError

THICKNESS_OFFSET, THICKNESS_SHAPE, THICKNESS_RATE = 0.5, 10.0, 5.0
INTENSITY_LOW, INTENSITY_SPAN = 64.0, 191.0
ATTRIBUTES = {
    "thickness": Attribute("thickness", "continuous", declared=True),
    "intensity": Attribute("intensity", "continuous", declared=True),
    "digit": Attribute("digit", "categorical", tuple("0123456789"), declared=True),
}
PARENTS = {"intensity": ("thickness",)}  # edges among the attributes; all three are parents of the image


def prepare_morphomnist(
    root: Path | str,
    folder: Path | str,
    size: int = 32,
    part: str = "t10k",
    split: SplitSettings | None = None,
    progress: Progress | None = None,
) -> ImageTable:
    """The digits as a prepared table: uint8 (N, 1, size, size), padded with zeros (background) evenly;
    thickness, intensity, digit.

    split: own splits, by default 70/15/15 stratified by digit. Raises `UserError` where a file is missing or
        broken.
    """
    root = Path(root)
    images = read_idx(root / f"{part}-images-idx3-ubyte.gz")
    frame = read_attributes(root, part)
    if images.ndim != 3 or len(images) != len(frame):
        raise UserError(
            f"{root} holds images of shape {images.shape} and {len(frame)} rows of attributes; the files do "
            "not belong together."
        )
    spare = size - images.shape[1]
    if spare < 0 or images.shape[1] != images.shape[2]:
        raise UserError(
            f"Morpho-MNIST digits of {images.shape[1]}×{images.shape[2]} cannot be padded to {size}; choose "
            "a larger size."
        )
    margin = (spare // 2, spare - spare // 2)
    images = np.pad(images, ((0, 0), margin, margin))[:, None]
    split = split or SplitSettings(stratify=("digit",))
    source = {"kind": "morphomnist", **morphomnist_state(root, part), "size": size}
    return save_prepared(
        folder, "morphomnist", frame, ATTRIBUTES, images, split=split, source=source, progress=progress
    )


def morphomnist_state(root: Path | str, part: str = "t10k") -> dict[str, object]:
    """Size and modification time of the files of one part; its fingerprint changes when they do."""
    files = [
        Path(root) / f"{part}-{rest}"
        for rest in ("images-idx3-ubyte.gz", "labels-idx1-ubyte.gz", "morpho.csv")
    ]
    for path in files:
        if not path.is_file():
            raise UserError(f"{path} does not exist; point to the folder of the Morpho-MNIST files.")
    stats = [path.stat() for path in files]
    return {
        "path": str(Path(root).resolve()),
        "part": part,
        "files": [[stat.st_size, stat.st_mtime_ns] for stat in stats],
    }


def read_attributes(root: Path | str, part: str = "t10k") -> pd.DataFrame:
    """Columns thickness, intensity (float) and digit ("0" to "9") of one part; images are not needed."""
    path = Path(root) / f"{part}-morpho.csv"
    if not path.is_file():
        raise UserError(f"{path} does not exist; point to the folder of the Morpho-MNIST files.")
    frame = read_columns(path)
    labels = read_idx(Path(root) / f"{part}-labels-idx1-ubyte.gz")
    if not {"thickness", "intensity"} <= set(frame.columns) or len(labels) != len(frame):
        raise UserError(
            f"{path} has columns {list(frame.columns)} and {len(frame)} rows; expected thickness, "
            f"intensity, {len(labels)} rows."
        )
    return frame[["thickness", "intensity"]].assign(digit=labels.astype(str))


def read_idx(path: Path) -> np.ndarray:
    """An array of unsigned bytes in the gzipped IDX format of MNIST.

    The format: two zero bytes, type 8, number of dimensions, big-endian sizes, values. Raises `UserError`.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist; point to the folder of the Morpho-MNIST files.")
    try:
        content = gzip.decompress(path.read_bytes())
        kind, dimensions = struct.unpack_from(">HBB", content)[1:]
        shape = struct.unpack_from(f">{dimensions}I", content, 4)
    except (OSError, EOFError, struct.error, zlib.error) as error:
        raise UserError(f"{path} is no readable IDX file ({error}); fetch it again.") from None
    start = 4 + 4 * dimensions
    if kind != 8 or len(content) - start != math.prod(shape):
        raise UserError(
            f"{path} says shape {shape} of type {kind} and holds {len(content) - start} bytes; fetch it "
            "again."
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def intensity_given_thickness(eps: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """The intensity mechanism, in grey levels between 64 and 255, for noise `eps` and thickness `t` (pixels)
    of equal shape.
    """
    return INTENSITY_LOW + INTENSITY_SPAN * torch.sigmoid(0.5 * eps + 2 * t - 5)


def abduct_intensity_noise(i: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """The exact inverse: eps from intensity and thickness.

    Raises `UserError` for intensities the model cannot produce.
    """
    share = (i.double() - INTENSITY_LOW) / INTENSITY_SPAN
    if not bool(((share > 0) & (share < 1)).all()):
        raise UserError(
            f"Intensities from {i.min():.4g} to {i.max():.4g} were given; the Morpho-MNIST model needs 64 < "
            "intensity < 255."
        )
    return (2 * (torch.logit(share) - 2 * t.double() + 5)).to(i.dtype)

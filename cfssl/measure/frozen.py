"""What makes a trained network a measuring instrument: it no longer changes, and it is known by name.

Enters: a network and the JSON identity (settings, shapes) it was built from. Leaves: a file that only the
same identity loads again, and a fingerprint by which an audit can tell the guide from the judge.
"""

import hashlib
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from cfssl.data.batches import ImageBatch, read_batch
from cfssl.data.table import ImageTable
from cfssl.engine.checkpoint import load_checkpoint, save_checkpoint
from cfssl.errors import UserError
from cfssl.provenance import code_version, differences, fingerprint

READ = 256  # images that are measured at a time


class Record:
    """`kind`: what errors call the network, such as "attribute predictor". `identity`: all that it was built
    from, JSON-serialisable. It has a fingerprint once `seal`ed, by a finished fit or by `load`."""

    def __init__(self, kind: str, identity: Mapping[str, Any]) -> None:
        self.kind, self.identity = kind, dict(identity)
        self._weights: str | None = None

    @property
    def fingerprint(self) -> str:
        """Of weights, identity and code. Raises `UserError` before `seal`."""
        if self._weights is None:
            raise UserError(f"The {self.kind} has not been fitted; fit or load it before it measures.")
        return fingerprint(self.kind, self._weights, self.identity, code_version("measure"))

    def seal(self, network: nn.Module) -> None:
        """Freezes `network` and remembers its weights by their digest."""
        network.requires_grad_(False).eval()
        digest = hashlib.blake2b(digest_size=16)
        for name, tensor in network.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        self._weights = digest.hexdigest()

    def save(self, path: Path, network: nn.Module) -> None:
        """One safetensors file with identity and weights. Raises `UserError` before `seal`."""
        if self._weights is None:
            raise UserError(
                f"The {self.kind} has not been fitted; there is nothing to save in {path}: fit it first."
            )
        save_checkpoint(path, {"kind": self.kind, "identity": self.identity, "network": network.state_dict()})

    def load(self, path: Path, network: nn.Module) -> None:
        """Restores `network` in place and seals it. Raises `UserError` when the file holds something else or
        was made with other settings, attributes or images."""
        state = load_checkpoint(path)
        if not isinstance(state, dict) or state.get("kind") != self.kind:
            raise UserError(f"{path} holds no {self.kind}; give a file that one has saved, or fit it.")
        if differing := differences(state["identity"], self.identity):
            raise UserError(
                f"{path} was written by another {self.kind} ({'; '.join(differing)}); fit it again, or load "
                "it with the settings and the table it was made with."
            )
        try:
            network.load_state_dict(state["network"])
        except (RuntimeError, KeyError) as error:
            raise UserError(
                f"{path} was written by another version of cfssl ({str(error).splitlines()[0]}); fit it "
                "again."
            ) from None
        self.seal(network)


def measured(
    table: ImageTable, rows: np.ndarray, network: nn.Module, masks: tuple[str, ...] = ()
) -> Iterator[tuple[slice, ImageBatch]]:
    """The places in `rows` and the images (with `masks`) of one chunk after the other, on the device of
    `network`."""
    device = next(network.parameters()).device
    channels = [table.mask_names.index(name) for name in masks]
    for start in range(0, len(rows), READ):
        chunk = slice(start, min(start + READ, len(rows)))
        yield chunk, read_batch(table, rows[chunk], {}, channels).to(device)


def as_json(scores: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float | None]]:
    """What a network scores on real images, with null for NaN."""
    return {
        name: {what: None if math.isnan(value) else value for what, value in of.items()}
        for name, of in scores.items()
    }


def stem(shape: tuple[int, ...], kind: str) -> int:
    """The factor by which pixels are folded into channels first, nothing being lost: 2 from 64 pixels on,
    else 1. Raises `UserError` for volumes."""
    if len(shape) != 3:
        raise UserError(f"The {kind} takes images (C, H, W), and these are of shape {tuple(shape)}.")
    _, height, width = shape
    return 2 if min(height, width) >= 64 and height % 2 == width % 2 == 0 else 1

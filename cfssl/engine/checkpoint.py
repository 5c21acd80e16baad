"""Checkpoints: one safetensors file with the tensors and, in its header, everything else as JSON. No pickled
code anywhere.

A state is a nested dict (or list) of tensors, numbers, strings, booleans and None, as `state_dict()` returns
it.
"""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from cfssl.errors import UserError
from cfssl.files import atomic_path

TENSOR = "__tensor__"


def save_checkpoint(path: Path, state: Any) -> None:
    """Writes `state` atomically to `path`. Tied tensors are stored once each; integer dict keys stay
    integers."""
    tensors: dict[str, torch.Tensor] = {}
    skeleton = _pack(state, tensors)
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata={"cfssl": json.dumps(skeleton)})


def load_checkpoint(path: Path, parts: Collection[str] | None = None) -> Any:
    """The state written by `save_checkpoint`, on the CPU; of a dict only its `parts`, where these are given.
    Raises `UserError` for a missing, truncated or foreign file."""
    if not path.exists():
        raise UserError(f"The checkpoint {path} does not exist; check the path or train first.")
    if path.is_dir():
        raise UserError(f"The checkpoint {path} is a folder, expected a file; give one that lies in it.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if "cfssl" not in metadata:
                raise UserError(
                    f"{path} is a safetensors file but not a cfssl checkpoint; give a checkpoint that cfssl "
                    "wrote."
                )
            skeleton = json.loads(metadata["cfssl"])
            if parts is not None and isinstance(skeleton, dict) and "pairs" in skeleton:
                skeleton = {"pairs": [pair for pair in skeleton["pairs"] if pair[0] in parts]}
            return _unpack(skeleton, file)
    except SafetensorError as error:
        raise UserError(
            f"The checkpoint {path} cannot be read ({error}); it is damaged: delete it and train again."
        ) from None


def _pack(node: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(node, torch.Tensor):
        name = str(len(tensors))
        tensors[name] = node.detach().cpu().contiguous().clone()
        return {TENSOR: name}
    if isinstance(node, dict):
        # Pairs, not an object: JSON would turn the integer keys of optimiser states into strings.
        return {"pairs": [[key, _pack(value, tensors)] for key, value in node.items()]}
    if isinstance(node, list | tuple):
        return [_pack(value, tensors) for value in node]
    if node is None or isinstance(node, bool | int | float | str):
        return node
    raise TypeError(
        f"A checkpoint holds tensors, numbers, strings, lists and dicts, not {type(node).__name__}."
    )


def _unpack(node: Any, file: Any) -> Any:
    if isinstance(node, list):
        return [_unpack(value, file) for value in node]
    if isinstance(node, dict):
        if TENSOR in node:
            return file.get_tensor(node[TENSOR])
        return {key: _unpack(value, file) for key, value in node["pairs"]}
    return node

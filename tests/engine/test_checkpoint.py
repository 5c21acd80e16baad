"""Checkpoints: what goes in comes out, bit for bit, and nothing in them is code."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from cfssl.engine.checkpoint import load_checkpoint, save_checkpoint
from cfssl.errors import UserError


def equal(first: object, second: object) -> bool:
    if isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor):
        return first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, dict) and isinstance(second, dict):
        return list(first) == list(second) and all(equal(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple) and isinstance(second, list | tuple):
        return len(first) == len(second) and all(map(equal, first, second))
    return first == second and type(first) is type(second)


def test_a_state_comes_back_as_it_was(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99))
    model(torch.rand(2, 1, 8, 8)).sum().backward()
    optimizer.step()
    state = {
        "model": dict(model.state_dict()),
        "optimizer": optimizer.state_dict(),
        "step": 7,
        "rate": 0.1,
        "none": None,
        "flag": True,
        "text": "a",
    }
    save_checkpoint(tmp_path / "c.safetensors", state)
    assert equal(load_checkpoint(tmp_path / "c.safetensors"), state)


def test_tied_and_half_precision_tensors_survive(tmp_path: Path) -> None:
    shared = torch.rand(3)
    state = {"a": shared, "b": shared, "half": torch.rand(2).bfloat16(), "empty": torch.empty(0, 2)}
    save_checkpoint(tmp_path / "c.safetensors", state)
    assert equal(load_checkpoint(tmp_path / "c.safetensors"), state)


def test_anything_but_plain_values_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="not Linear"):
        save_checkpoint(tmp_path / "c.safetensors", {"module": nn.Linear(1, 1)})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("keep", [0, 5, 60, 200])
def test_a_truncated_file_is_named(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "c.safetensors"
    save_checkpoint(path, {"weights": torch.rand(100)})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"c\.safetensors cannot be read"):
        load_checkpoint(path)


def test_missing_and_foreign_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        load_checkpoint(tmp_path / "none.safetensors")
    save_file({"x": torch.rand(1)}, tmp_path / "foreign.safetensors")
    with pytest.raises(UserError, match="not a cfssl checkpoint"):
        load_checkpoint(tmp_path / "foreign.safetensors")

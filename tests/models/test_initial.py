"""Weights to start from: what fits is taken bit for bit and counted, what is adapted is what timm makes of
it, what does not fit is named, and no file runs code."""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from cfssl.data.views import ViewBatch
from cfssl.engine.loop import TrainSettings, fit
from cfssl.engine.run import HardwareSettings, Run
from cfssl.errors import UserError
from cfssl.models.backbone import BackboneSettings, create_backbone
from cfssl.models.export import export_encoder
from cfssl.models.initial import (
    InitSettings,
    check_initial,
    common_prefix,
    described,
    hold_backbone,
    init_key,
    load_initial,
)
from cfssl.objectives.simclr import SimCLR, SimCLRSettings
from cfssl.seeds import torch_generator

NAME = "test_resnet"
CPU = HardwareSettings(accelerator="cpu")


def encoder(seed: int, name: str = NAME, channels: int = 1, size: int = 32) -> nn.Module:
    return create_backbone(BackboneSettings(name), channels, size, seed=seed).eval()


def plain(model: nn.Module, prefix: str = "") -> dict[str, torch.Tensor]:
    """A state dict of contiguous tensors."""
    return {f"{prefix}{key}": value.contiguous() for key, value in model.state_dict().items()}


def load(model: nn.Module, path: Path, channels: int = 1, **options: Any) -> dict[str, Any]:
    return load_initial(model, InitSettings(str(path), **options), channels)


def same(first: nn.Module, second: nn.Module) -> bool:
    found, expected = first.state_dict(), second.state_dict()
    return all(torch.equal(found[key], value) for key, value in expected.items())


def numbers(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


HEAD = {"head.0.weight": torch.zeros(3, 2), "head.0.bias": torch.zeros(3)}


@pytest.mark.parametrize(
    "prefix", ["", "module.", "backbone.", "student.", "teacher.backbone.", "model.module.student.backbone."]
)
def test_weights_under_a_prefix_and_beside_heads_are_taken_bit_for_bit(tmp_path: Path, prefix: str) -> None:
    source, target = encoder(1), encoder(2)
    save_file(plain(source, prefix) | HEAD, tmp_path / "w.safetensors")
    record = load(target, tmp_path / "w.safetensors")
    assert same(target, source)
    assert record["prefix"] == prefix
    assert record["matched"] == 1
    assert record["unexpected"] == sorted(HEAD)
    assert record["missing"] == []
    assert record["mismatched"] == record["adapted"] == {}
    assert record["parameters"] == numbers(source)
    json.dumps(record, allow_nan=False)


def test_nested_checkpoints_are_opened_and_of_student_and_teacher_the_teacher_is_taken(
    tmp_path: Path,
) -> None:
    student, teacher, target = encoder(1), encoder(2), encoder(3)
    nested = {"student": plain(student, "backbone."), "teacher": plain(teacher, "backbone."), "epoch": 7}
    torch.save(nested, tmp_path / "w.pth")
    record = load(target, tmp_path / "w.pth")
    assert same(target, teacher)
    assert record["prefix"] == "teacher.backbone."
    assert len(record["unexpected"]) == len(student.state_dict())


def test_the_prefix_is_that_of_most_keys() -> None:
    assert common_prefix(["a.x", "a.y", "b.x", "x"], ["x", "y"]) == "a."
    assert common_prefix(["a.x", "x"], ["x"]) == ""
    assert common_prefix(["q"], ["x"]) == ""


def test_a_folder_that_export_wrote_is_read(tmp_path: Path) -> None:
    source, target = encoder(1), encoder(2)
    export_encoder(source, tmp_path / "out", BackboneSettings(NAME), (1, 32, 32), {})
    assert load(target, tmp_path / "out")["matched"] == 1
    assert same(target, source)


@pytest.mark.parametrize("name", [NAME, "test_vit"])
@pytest.mark.parametrize(("trained_on", "channels"), [(3, 1), (1, 3), (3, 5)])
def test_grey_images_give_the_features_that_they_gave_with_other_channels(
    tmp_path: Path, name: str, trained_on: int, channels: int
) -> None:
    source, target = (encoder(seed, name, count) for seed, count in ((1, trained_on), (2, channels)))
    save_file(plain(source), tmp_path / "w.safetensors")
    record = load(target, tmp_path / "w.safetensors", channels)
    assert record["matched"] == 1
    (adapted,) = record["adapted"].values()
    assert (adapted[0][1], adapted[1][1]) == (trained_on, channels)
    if (trained_on, channels) == (3, 5):  # repeated channels are not weighed equally
        return
    grey = torch.rand(2, 1, 32, 32)
    with torch.no_grad():
        found, expected = (
            target(grey.expand(-1, channels, -1, -1)),
            source(grey.expand(-1, trained_on, -1, -1)),
        )
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("name", "size"), [("test_vit", 64), (NAME, 32)])
def test_what_is_adapted_is_what_timm_makes_of_the_file(tmp_path: Path, name: str, size: int) -> None:
    """Position embeddings of another image size, and the input convolution."""
    source = encoder(1, name, channels=3, size=32)
    save_file(plain(source), tmp_path / "w.safetensors")
    target = encoder(2, name, channels=1, size=size)
    record = load(target, tmp_path / "w.safetensors")
    options = {"img_size": size} if name == "test_vit" else {}
    overlay = {"file": str(tmp_path / "w.safetensors")}
    expected = timm.create_model(
        name, pretrained=True, pretrained_cfg_overlay=overlay, in_chans=1, num_classes=0, **options
    )
    assert same(target, expected)
    assert record["matched"] == 1
    assert ("pos_embed" in record["adapted"]) == (name == "test_vit")


def test_what_does_not_fit_is_counted_named_and_left_as_it_was(tmp_path: Path) -> None:
    source, target, before = encoder(1), encoder(2), encoder(2)
    stored = plain(source)
    names = [name for name, parameter in source.named_parameters() if parameter.ndim == 4]
    missing, other = names[2], names[3]
    stored.pop(missing)
    stored[other] = torch.zeros(2, 2)
    save_file(stored, tmp_path / "w.safetensors")
    record = load(target, tmp_path / "w.safetensors", min_matched=0.1)
    left = sum(source.get_parameter(name).numel() for name in (missing, other))
    assert record["matched"] == pytest.approx(1 - left / numbers(source))
    assert record["missing"] == [missing]
    assert record["mismatched"] == {other: [[2, 2], list(source.get_parameter(other).shape)]}
    for name, parameter in target.named_parameters():
        kept = before if name in (missing, other) else source
        assert torch.equal(parameter, kept.get_parameter(name))
    sentence = described(record)
    assert missing in sentence
    assert f"{record['matched']:.2%}" in sentence


def test_too_little_that_fits_is_one_sentence_with_what_the_weights_call_themselves(tmp_path: Path) -> None:
    export_encoder(encoder(1, "test_vit"), tmp_path / "out", BackboneSettings("test_vit"), (1, 32, 32), {})
    with pytest.raises(UserError, match=r"fits 0% .* at least 90% .* keys missing .* says 'test_vit'"):
        load(encoder(2), tmp_path / "out")
    check_initial(InitSettings("timm"), encoder(2), NAME, 1)
    with pytest.raises(UserError, match="timm, which has no weights of resnet18_nowhere"):
        check_initial(InitSettings("timm"), encoder(2), "resnet18_nowhere", 1)


class Mark:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_a_file_that_would_run_code_is_refused_without_running_it(tmp_path: Path) -> None:
    for name, extra in {"code": Mark(tmp_path / "ran"), "options": argparse.Namespace(lr=1)}.items():
        torch.save({"model": plain(encoder(1)), "extra": extra}, tmp_path / f"{name}.pth")
        with pytest.raises(UserError, match="would run code from the file; save its state dict"):
            load(encoder(2), tmp_path / f"{name}.pth")
    assert not (tmp_path / "ran").exists()


def test_files_that_are_missing_damaged_or_of_no_known_kind_are_named(tmp_path: Path) -> None:
    save_file(plain(encoder(1)), tmp_path / "w.safetensors")
    (tmp_path / "short.safetensors").write_bytes((tmp_path / "w.safetensors").read_bytes()[:5000])
    (tmp_path / "w.npz").write_bytes(b"x")
    (tmp_path / "empty").mkdir()
    for name, expected in {
        "nowhere.pth": "no such file or folder",
        "empty": r"has no model\.safetensors",
        "short.safetensors": "cannot be read",
        "w.npz": "of no known kind",
    }.items():
        with pytest.raises(UserError, match=expected):
            load(encoder(2), tmp_path / name)


def test_the_key_is_that_of_the_content_wherever_it_lies(tmp_path: Path) -> None:
    save_file(plain(encoder(1)), tmp_path / "a.safetensors")
    save_file(plain(encoder(2)), tmp_path / "b.safetensors")
    shutil.copy(tmp_path / "a.safetensors", tmp_path / "moved.safetensors")
    keys = {
        name: init_key(InitSettings(str(tmp_path / f"{name}.safetensors"))) for name in ("a", "b", "moved")
    }
    assert keys["a"] == keys["moved"] != keys["b"]
    assert init_key(None) is None


class Pairs:
    """Two views of 8 images per step."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, step: int) -> list[ViewBatch]:
        images = torch.rand(8, 2, 1, 32, 32, generator=torch_generator("pairs", step))
        return [
            ViewBatch(
                images=images,
                is_counterfactual=torch.zeros(8, 2, dtype=torch.bool),
                slot=torch.zeros(8, 2, dtype=torch.long),
                affine=torch.eye(2, 3).expand(8, 2, 2, 3),
                valid=torch.ones(8, 2, 32, 32, dtype=torch.bool),
                attributes={},
                row=torch.arange(8),
                position=tuple(range(8)),
            )
        ]


class Frozen(SimCLR):
    """SimCLR whose student is never trained: what the heads alone make of it."""

    def __init__(self, *parts: Any) -> None:
        super().__init__(*parts)
        self.student.requires_grad_(False)

    def train(self, mode: bool = True) -> "Frozen":
        super().train(mode)
        self.student.eval()
        return self


def train(folder: Path, stop_at: int | None = None, held: int = 5, kind: type[SimCLR] = SimCLR) -> SimCLR:
    task = kind(encoder(1), SimCLRSettings(hidden=16, output=8), 0)
    hold_backbone(task, held)
    settings = TrainSettings(lr=1e-2, weight_decay=0.1, clip=1.0, checkpoint_every=1000)
    fit(task, Pairs(), settings, Run(folder, CPU, quiet=True, stop_at=stop_at), "test")
    return task


def test_the_backbone_is_held_with_its_statistics_while_the_heads_are_trained_as_on_a_frozen_one(
    tmp_path: Path,
) -> None:
    held = train(tmp_path / "held", stop_at=5)
    assert same(held.student, encoder(1))
    frozen = train(tmp_path / "frozen", stop_at=5, held=0, kind=Frozen)
    assert same(held.head, frozen.head)
    assert not same(held.head, SimCLR(encoder(1), SimCLRSettings(hidden=16, output=8), 0).head)
    after = train(tmp_path / "after", stop_at=6)
    moved = [name for name, value in after.student.state_dict().items() if "running_mean" in name]
    before = encoder(1).state_dict()
    assert any(not torch.equal(after.student.state_dict()[name], before[name]) for name in moved)
    assert all(
        not torch.equal(parameter, before[name])
        for name, parameter in after.student.named_parameters()
        if parameter.ndim > 1
    )
    assert all(parameter.requires_grad for parameter in after.student.parameters())
    assert after.student.training


def test_stopped_while_the_backbone_is_held_or_after_it_ends_bitwise_equal(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole")
    for stop in (3, 5, 8):
        train(tmp_path / f"{stop}", stop_at=stop)
        assert same(train(tmp_path / f"{stop}"), whole)

"""DINOv2: its loss is that of lightly's parts; teacher, centres and masks are functions of the step, whatever
the micro-batches; what is exported is a plain timm model."""

import copy
import dataclasses
import random
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn
from view_toys import Stripes, batch_of

from cfssl.data.views import ViewBatch, split
from cfssl.engine.loop import TrainSettings, fit
from cfssl.engine.run import HardwareSettings, Run, read_metrics
from cfssl.errors import UserError
from cfssl.models.backbone import BackboneSettings, create_backbone
from cfssl.models.export import export_encoder
from cfssl.objectives.dinov2 import (
    DINOv2,
    DINOv2Settings,
    block_masks,
    default_prototypes,
    encoded,
    masked,
    stacked,
)
from cfssl.seeds import torch_generator

CPU = HardwareSettings(accelerator="cpu")
SMALL = DINOv2Settings(prototypes=24, hidden=16, bottleneck=8, temperature_warmup=0.5, freeze_last_layer=0.2)
STEPS = 6
# The gradient of a key's bias is zero in exact arithmetic, and AdamW takes whole steps along its rounding.
VIT: dict[str, Any] = {"patch_size": 8, "depth": 2, "reg_tokens": 2, "qkv_bias": False}


def encoder(name: str = "test_vit") -> nn.Module:
    options = VIT if name == "test_vit" else {}
    return create_backbone(BackboneSettings(name, options=options), 1, 32, seed=0, any_size=True)


def task_of(settings: DINOv2Settings = SMALL, name: str = "test_vit", seed: int = 0) -> DINOv2:
    return DINOv2(encoder(name), settings, seed, images=400, steps=STEPS)


def batch_at(step: int, local: int = 4, size: int = 32) -> ViewBatch:
    generator = torch_generator("dinov2", step)
    images = torch.rand(8, 2, 1, size, size, generator=generator)
    small = torch.rand(8, local, 1, 16, 16, generator=generator) if local else None
    return batch_of(images, local=small)


class Views:
    """Eight items per step, whole or cut."""

    def __init__(self, parts: int = 1) -> None:
        self.parts = parts

    def __len__(self) -> int:
        return STEPS

    def __getitem__(self, step: int) -> list[ViewBatch]:
        return split(batch_at(step), self.parts)


def train(task: DINOv2, folder: Path, parts: int = 1, stop_at: int | None = None, **options: Any) -> DINOv2:
    settings = TrainSettings(**{"lr": 3e-3, "warmup": 0.0, "log_every": 1, **options})
    fit(task, Views(parts), settings, Run(folder, CPU, quiet=True, stop_at=stop_at), "test")
    return task


def moved(task: DINOv2) -> DINOv2:
    """Student and teacher apart, and centres that are not zero."""
    with torch.no_grad():
        for index, (name, value) in enumerate(task.named_parameters()):
            if not name.startswith("teacher"):
                value += 0.05 * torch.randn(value.shape, generator=torch_generator("moved", index))
        for index, centre in enumerate((task.dino_centre, task.ibot_centre)):
            centre.value += torch.randn(24, generator=torch_generator("centre", index)) / 4
    return task


@pytest.mark.parametrize(("shared_head", "batch_norm"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("step", [0, 2, 5])
def test_the_loss_is_that_of_lightlys_parts(shared_head: bool, batch_norm: bool, step: int) -> None:
    from lightly.loss import DINOLoss, IBOTPatchLoss, KoLeoLoss
    from lightly.models.modules import MaskedVisionTransformerTIMM

    weights = {"dino_weight": 0.7, "ibot_weight": 1.3, "koleo_weight": 0.2}
    settings = dataclasses.replace(SMALL, shared_head=shared_head, batch_norm=batch_norm, **weights)
    task, batch = moved(task_of(settings)), batch_at(step)
    dino, ibot = DINOLoss(24), IBOTPatchLoss(24)
    dino.center += task.dino_centre.value
    ibot.center.center += task.ibot_centre.value
    temperature = {0: 0.04, 2: 0.06, 5: 0.07}[step]  # rises over the first half of six steps

    def vit(model: nn.Module, token: torch.Tensor | None = None) -> nn.Module:
        parts = {"weight_initialization": "skip", "pos_embed_initialization": "skip", "antialias": True}
        token = None if token is None else nn.Parameter(token.detach()[None, None])
        return MaskedVisionTransformerTIMM(model, token, **parts)

    with torch.no_grad():
        masks = task.masks(batch.position, step, batch.images).flatten(1)  # (2B, 16)
        task.drawn = (-1, 0)
        whole = torch.cat([torch.zeros(16, 3, dtype=torch.bool), masks], 1)  # behind class and registers
        images = batch.images.flatten(0, 1)
        assert 0 < masks.sum() < masks.numel()
        student = vit(task.student, task.mask_token).encode(images, mask=whole)
        teacher = vit(task.teacher["encoder"]).encode(images)
        heads, teachers = task.heads, task.teacher
        name = "dino_head" if shared_head else "ibot_head"
        assert any("BatchNorm" in type(part).__name__ for part in heads.modules()) == batch_norm
        local = [task.student(batch.local.images[:, view]) for view in range(4)]
        seen = heads["dino_head"](torch.cat([student[0::2, 0], student[1::2, 0], *local])).chunk(6)
        said = teachers["dino_head"](torch.cat([teacher[0::2, 0], teacher[1::2, 0]])).chunk(2)
        expected = {"dino": dino(list(said), list(seen), teacher_temp=temperature)}
        expected["ibot"] = ibot(
            teachers[name](teacher[:, 3:][masks]),
            heads[name](student[:, 3:][masks]),
            masks.unflatten(1, (4, 4)),
            teacher_temp=temperature,
        )
        expected["koleo"] = sum(KoLeoLoss()(student[view::2, 0]) for view in range(2))
        expected["loss"] = 0.7 * expected["dino"] + 1.3 * expected["ibot"] + 0.2 * expected["koleo"]
        found = task(batch, step)
        for part, value in expected.items():
            torch.testing.assert_close(found[part], value, rtol=1e-4, atol=1e-5)
        task.after_step(step)
        torch.testing.assert_close(task.dino_centre.value, dino.center[0, 0])
        torch.testing.assert_close(task.ibot_centre.value, ibot.center.value[0])


def test_masked_patches_alone_are_replaced_in_images_of_any_shape() -> None:
    model, token = encoder().eval(), torch.full((64,), 0.5)
    seen: list[torch.Tensor] = []
    handle = model.pos_drop.register_forward_hook(lambda *parts: seen.append(parts[2]))
    images = torch.rand(3, 1, 24, 40)
    masks = torch.rand(3, 3, 5) < 0.4
    with torch.no_grad():
        model(images)
        with masked(model, masks, token):
            model(images)
        model(images)
    handle.remove()
    plain, replaced, after = (tokens[:, 3:].unflatten(1, (3, 5)) for tokens in seen)
    assert torch.equal(plain, after)
    assert torch.equal(plain[~masks], replaced[~masks])
    positions = (plain - model.patch_embed(images))[masks]
    torch.testing.assert_close(replaced[masks], token + positions)


@pytest.mark.parametrize("name", ["test_vit", "vit_tiny_patch16_dinov3_qkvb"])
def test_features_are_the_exported_ones_and_patches_are_those_at_their_places(name: str) -> None:
    model = create_backbone(BackboneSettings(name, options={"depth": 2}), 1, 64, 0, any_size=True).eval()
    images, places = torch.rand(3, 1, 48, 64), torch.tensor([1, 12, 35])
    with torch.no_grad():
        pooled, patches = encoded(model, images, places)
        torch.testing.assert_close(pooled, model(images))
        tokens = model.forward_features(images)[:, model.num_prefix_tokens :]
    torch.testing.assert_close(patches, torch.stack([tokens[0, 1], tokens[1, 0], tokens[2, 11]]))


def test_gradients_reach_everything_but_the_teacher() -> None:
    task = moved(task_of())
    task(batch_at(0), 0)["loss"].backward()
    for name, parameter in task.named_parameters():
        is_reached = parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)
        assert is_reached != name.startswith("teacher"), name


@pytest.mark.parametrize("shared_head", [False, True])
def test_four_micro_batches_equal_one_batch(tmp_path: Path, shared_head: bool) -> None:
    """Weights, teacher, centres and losses, for the losses that are means over images."""
    settings = dataclasses.replace(SMALL, koleo_weight=0.0, shared_head=shared_head)
    one, four = (train(task_of(settings), tmp_path / str(parts), parts) for parts in (1, 4))
    assert not torch.equal(one.student.cls_token, encoder().cls_token)
    for name, value in one.state_dict().items():
        torch.testing.assert_close(four.state_dict()[name], value, rtol=1e-3, atol=3e-5, msg=name)
    for name in ("dino", "ibot", "teacher_entropy"):
        lines = [read_metrics(tmp_path / str(parts) / "metrics.jsonl") for parts in (1, 4)]
        assert [line[name] for line in lines[0]] == pytest.approx([line[name] for line in lines[1]], rel=1e-3)


@pytest.mark.parametrize("centring", ["softmax", "sinkhorn"])
def test_stopped_and_continued_it_ends_bitwise_equal(tmp_path: Path, centring: str) -> None:
    settings = dataclasses.replace(SMALL, centring=centring)
    whole = train(task_of(settings), tmp_path / "whole", clip=5.0)
    train(task_of(settings), tmp_path / "parts", stop_at=3, clip=5.0)
    found = train(task_of(settings), tmp_path / "parts", clip=5.0).state_dict()
    assert all(torch.equal(value, found[name]) for name, value in whole.state_dict().items())
    lines = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "parts")]
    assert lines[0] == lines[1]


def test_the_prototypes_stand_still_for_the_first_steps(tmp_path: Path) -> None:
    """A fifth of six steps is one; weight decay leaves them alone too."""
    start = task_of().heads["dino_head"].last_layer.weight_v
    for stop in (1, 2):
        task = train(task_of(), tmp_path, stop_at=stop, weight_decay=0.5)
        assert torch.equal(task.heads["dino_head"].last_layer.weight_v, start) == (stop == 1)
        assert not torch.equal(
            task.heads["dino_head"].layers[0].weight, task_of().heads["dino_head"].layers[0].weight
        )


def test_the_teacher_starts_as_the_student_and_its_momentum_reaches_one() -> None:
    task = task_of(dataclasses.replace(SMALL, momentum=0.9))
    students = {"encoder": task.student, **task.heads}
    for name, student in students.items():
        for key, value in task.teacher[name].state_dict().items():
            assert torch.equal(value, student.state_dict()[key])
    before = copy.deepcopy(task.teacher.state_dict())
    moved(task)
    task.after_step(0)
    for name, student in students.items():
        for key, follows in student.state_dict().items():
            found = task.teacher[name].state_dict()[key]
            torch.testing.assert_close(found, 0.9 * before[f"{name}.{key}"] + 0.1 * follows)
    before = copy.deepcopy(task.teacher.state_dict())
    task.after_step(STEPS - 1)
    assert all(torch.equal(value, before[key]) for key, value in task.teacher.state_dict().items())


@pytest.mark.slow
def test_a_short_training_lowers_the_loss_without_collapse(tmp_path: Path) -> None:
    settings = dataclasses.replace(SMALL, ibot_weight=0.0, centring="sinkhorn", momentum=0.9)
    task = DINOv2(encoder("test_resnet"), settings, 0, images=400, steps=80)
    fit(task, Stripes(80), TrainSettings(lr=5e-3, log_every=10), Run(tmp_path, CPU, quiet=True), "test")
    first, *_, last = read_metrics(tmp_path / "metrics.jsonl")
    assert last["dino"] < 0.6 * first["dino"]
    assert last["teacher_entropy"] < 0.95 < last["marginal_entropy"]  # not the same of every image


def test_masks_are_a_function_of_seed_step_and_position_so_that_parts_have_those_of_the_batch() -> None:
    images = torch.zeros(8, 2, 1, 32, 32)
    task, state = task_of(), random.getstate()
    whole = task.masks(range(8), 3, images)
    parts = torch.cat([task.masks(range(first, first + 2), 3, images) for first in (0, 2, 4, 6)])
    assert torch.equal(parts, whole)
    assert torch.equal(task_of().masks(range(8), 3, images), whole)
    assert not torch.equal(task.masks(range(8), 4, images), whole)
    assert not torch.equal(task_of(seed=1).masks(range(8), 3, images), whole)
    assert random.getstate() == state


def test_masks_have_the_stated_frequency_and_cover_the_stated_share() -> None:
    masks = block_masks(list(range(2000)), (14, 14), 0.4, (0.1, 0.5))
    shares = masks.float().mean((1, 2))
    hit = shares > 0
    assert float(hit.float().mean()) == pytest.approx(0.4, abs=0.035)  # three standard deviations
    assert float(shares.max()) <= 0.5
    assert float(shares[hit].mean()) == pytest.approx(0.3, abs=0.03)  # a little less where blocks do not fit
    assert not block_masks([1, 2], (3, 3), 1.0, (0.01, 0.05)).any()  # less than one patch


def test_without_any_mask_the_patch_loss_is_zero_and_its_centre_stays(tmp_path: Path) -> None:
    task = train(task_of(dataclasses.replace(SMALL, mask_probability=0.0)), tmp_path)
    assert {line["ibot"] for line in read_metrics(tmp_path / "metrics.jsonl")} == {0.0}
    assert torch.equal(task.ibot_centre.value, torch.zeros(24))
    assert task.dino_centre.value.abs().sum() > 0


@pytest.mark.parametrize("centring", ["softmax", "sinkhorn"])
def test_losses_stay_float32_under_bf16_autocast(centring: str) -> None:
    task = task_of(dataclasses.replace(SMALL, centring=centring))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = task(batch_at(0), 0)
    assert {value.dtype for value in found.values()} == {torch.float32}
    exact = task_of(dataclasses.replace(SMALL, centring=centring))(batch_at(0), 0)
    for name, value in exact.items():
        torch.testing.assert_close(found[name], value, rtol=0.05, atol=0.02)


def test_convolutional_encoders_learn_without_patches_and_are_refused_with_them(tmp_path: Path) -> None:
    settings = dataclasses.replace(SMALL, ibot_weight=0.0)
    task = train(task_of(settings, "test_resnet"), tmp_path)
    assert "ibot" not in read_metrics(tmp_path / "metrics.jsonl")[0]
    assert not torch.equal(task.student.conv1[0].weight, encoder("test_resnet").conv1[0].weight)
    with pytest.raises(UserError, match=r"ibot_weight is 1\.0, but ResNet has no patch tokens to mask"):
        task_of(SMALL, "test_resnet")


def test_running_statistics_are_those_of_the_global_views() -> None:
    settings = dataclasses.replace(SMALL, ibot_weight=0.0)
    task, alone = task_of(settings, "test_resnet"), encoder("test_resnet").train()
    start = {name: value.clone() for name, value in alone.named_buffers() if "running" in name}
    batch = batch_at(0, local=4)
    task(batch, 0)
    alone(stacked(batch.images))
    expected = {name: value for name, value in alone.named_buffers() if name in start}
    assert expected
    assert not any(torch.equal(value, start[name]) for name, value in expected.items())
    for network in (task.student, task.teacher["encoder"]):
        found = dict(network.named_buffers())
        assert [name for name, value in expected.items() if not torch.equal(found[name], value)] == []


def test_views_of_one_size_need_no_local_ones() -> None:
    found = task_of()(batch_at(0, local=0), 0)
    assert all(value.isfinite() for value in found.values())


def test_prototypes_follow_the_number_of_images_unless_they_are_set() -> None:
    assert default_prototypes(1_281_167) == 65_536
    assert default_prototypes(64_989) == 4096
    assert default_prototypes(100) == 128
    assert default_prototypes(10**9) == 65_536
    assert task_of(dataclasses.replace(SMALL, prototypes=None)).prototypes == 128
    with pytest.raises(ValueError, match="both 0"):
        DINOv2Settings(dino_weight=0, ibot_weight=0)


def test_a_head_that_masked_patches_pass_through_has_no_batch_statistics() -> None:
    settings = dataclasses.replace(SMALL, batch_norm=True, mask_probability=0.0)
    assert all(value.isfinite() for value in task_of(settings)(batch_at(0), 0).values())
    with pytest.raises(ValueError, match="set shared_head: false"):
        dataclasses.replace(settings, shared_head=True)
    alone = dataclasses.replace(settings, shared_head=True, ibot_weight=0.0)
    assert task_of(alone, "test_resnet")(batch_at(0), 0)["loss"].isfinite()


def test_what_is_exported_is_a_plain_timm_model_with_the_students_features(tmp_path: Path) -> None:
    task = train(task_of(), tmp_path / "run").eval()
    export_encoder(task.student, tmp_path / "out", BackboneSettings("test_vit", options=VIT), (1, 32, 32), {})
    loaded = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True, num_classes=0).eval()
    assert loaded.state_dict().keys() == encoder().state_dict().keys()
    images = torch.rand(2, 1, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(loaded(images), task.student(images))

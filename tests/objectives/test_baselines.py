"""BYOL, MoCo v3, VICReg and Barlow Twins: their losses are the definitions, and training lowers them."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from view_toys import Stripes, batch_of

from cfssl.engine.loop import TrainSettings, fit
from cfssl.engine.run import HardwareSettings, Run, read_metrics
from cfssl.models.backbone import BackboneSettings, create_backbone
from cfssl.objectives.baselines import (
    BarlowTwinsSettings,
    BaselineSettings,
    BYOLSettings,
    Contrast,
    MoCoSettings,
    VICRegSettings,
    create_baseline,
    distance,
)

SMALL = (
    BYOLSettings(hidden=64, output=16, momentum=0.9),
    MoCoSettings(hidden=64, output=16, momentum=0.9),
    VICRegSettings(hidden=64, output=32),
    BarlowTwinsSettings(hidden=64, output=32),
)
BY_NAME = [pytest.param(settings, id=settings.name) for settings in SMALL]
GENERATOR = torch.Generator().manual_seed(0)
FIRST, SECOND = torch.randn(2, 9, 5, generator=GENERATOR, dtype=torch.float64)
IMAGES = torch.rand(8, 2, 1, 32, 32, generator=GENERATOR)


def task_of(settings: BaselineSettings, steps: int = 10) -> Any:
    encoder = create_backbone(BackboneSettings("test_resnet"), 1, 32, seed=0)
    return create_baseline(settings, encoder, 0, steps)


def unit(x: torch.Tensor) -> torch.Tensor:
    return x / x.square().sum(1, keepdim=True).sqrt()


def test_the_distance_of_byol_is_that_of_unit_vectors() -> None:
    expected = (unit(FIRST) - unit(SECOND)).square().sum(1).mean()
    torch.testing.assert_close(distance(FIRST, SECOND), expected)
    assert float(distance(FIRST, 3 * FIRST)) == pytest.approx(0)


def test_the_contrast_of_moco_picks_the_own_projection_among_all() -> None:
    similarity = (unit(FIRST) @ unit(SECOND).T / 0.3).exp()
    picked = torch.stack([similarity[item, item] / similarity[item].sum() for item in range(9)])
    torch.testing.assert_close(Contrast(0.3)(FIRST, SECOND), -0.6 * picked.log().mean())


def test_vicreg_weighs_invariance_variance_and_covariance() -> None:
    loss = task_of(VICRegSettings(hidden=8, output=5, invariance=3.0, variance=5.0, covariance=7.0)).loss
    expected = 3.0 * (FIRST - SECOND).square().mean()
    for z in (FIRST, SECOND):
        covariance = torch.cov(z.T)
        spread = (covariance.diagonal() + 1e-4).sqrt()
        expected = expected + 5.0 / 2 * (1 - spread).clamp_min(0).mean()
        expected = expected + 7.0 * (covariance.square().sum() - covariance.diagonal().square().sum()) / 5
    torch.testing.assert_close(loss(FIRST, SECOND), expected)


def test_barlow_twins_pulls_the_correlations_to_the_identity() -> None:
    loss = task_of(BarlowTwinsSettings(hidden=8, output=5, redundancy=0.02)).loss
    standard = [(z - z.mean(0)) / (z.var(0, correction=0) + 1e-5).sqrt() for z in (FIRST, SECOND)]
    correlation = standard[0].T @ standard[1] / 9
    weights = torch.full((5, 5), 0.02, dtype=torch.float64).fill_diagonal_(1.0)
    expected = (weights * (correlation - torch.eye(5)).square()).sum()
    torch.testing.assert_close(loss(FIRST, SECOND), expected)


@pytest.mark.parametrize("settings", BY_NAME)
def test_the_loss_is_that_of_the_projections_whatever_the_order_of_the_views(
    settings: BaselineSettings,
) -> None:
    task = task_of(settings).eval()
    with torch.no_grad():
        z = [task.projector(task.student(IMAGES[:, view])) for view in range(2)]
        if hasattr(task, "teacher"):
            for parameter in task.projector.parameters():  # else the teacher is the student
                parameter += 0.1
            p = [task.predictor(task.projector(task.student(IMAGES[:, view]))) for view in range(2)]
            expected = task.loss(p[0], z[1]) + task.loss(p[1], z[0])
        else:
            expected = task.loss(*z)
        for images in (IMAGES, IMAGES.flip(1)):
            found = task(batch_of(images), 0)["loss"]
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                assert task(batch_of(images), 0)["loss"].dtype == torch.float32


@pytest.mark.parametrize("settings", BY_NAME[:2])
def test_the_teacher_follows_with_a_momentum_that_reaches_one(settings: BaselineSettings) -> None:
    task = task_of(settings)
    with torch.no_grad():
        for parameter in task.projector.parameters():
            parameter += 1.0
    for step, share in ((0, 0.1), (9, 0.0)):
        before = [value.clone() for value in task.teacher["projector"].parameters()]
        task.after_step(step)
        found = task.teacher["projector"].parameters()
        for old, new, student in zip(before, found, task.projector.parameters(), strict=True):
            torch.testing.assert_close(new, (1 - share) * old + share * student)
    encoders: tuple[nn.Module, nn.Module] = task.student, task.teacher["encoder"]
    torch.testing.assert_close(*(dict(encoder.named_buffers()) for encoder in encoders))


@pytest.mark.slow
@pytest.mark.parametrize("settings", BY_NAME)
def test_a_short_training_lowers_the_loss(settings: BaselineSettings, tmp_path: Path) -> None:
    task = task_of(settings, steps=80)
    run = Run(tmp_path, HardwareSettings(accelerator="cpu"), quiet=True)
    fit(task, Stripes(80), TrainSettings(lr=3e-3, log_every=5), run, "test")
    losses = [line["loss"] for line in read_metrics(tmp_path / "metrics.jsonl")]
    assert all(math.isfinite(loss) for loss in losses)
    assert min(losses) < 0.9 * losses[0]  # BYOL's rises again as its teacher spreads the images out

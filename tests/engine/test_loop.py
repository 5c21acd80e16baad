"""The loop: resume is bitwise, accumulation keeps a mean over images as it is, bad states stop it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from cfssl.data.views import ViewBatch, split
from cfssl.engine.checkpoint import load_checkpoint, save_checkpoint
from cfssl.engine.loop import TrainSettings, fit, weight_decay_groups
from cfssl.engine.run import HardwareSettings, Run, read_metrics
from cfssl.errors import UserError
from cfssl.models.backbone import BackboneSettings, create_backbone
from cfssl.objectives import create_objective
from cfssl.objectives.supervised import SupervisedSettings
from cfssl.seeds import torch_generator

CPU = HardwareSettings(accelerator="cpu")


class Regression(nn.Module):
    """A small network with dropout, a buffer moved once per step, and a loss that is a mean over the
    batch."""

    def __init__(self, dropout: float = 0.2) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(5, 16), nn.GELU(), nn.Dropout(dropout), nn.Linear(16, 1))
        self.register_buffer("steps_seen", torch.zeros(()))

    def forward(self, batch: torch.Tensor, step: int) -> dict[str, torch.Tensor]:
        loss = (self.net(batch).squeeze(1) - batch.sum(1)).square().mean()
        return {"loss": loss}

    def after_step(self, step: int) -> None:
        self.steps_seen += 1


class Numbers:
    def __init__(self, steps: int = 60, batch: int = 16, parts: int = 1, poison: int | None = None) -> None:
        self.steps, self.batch, self.parts, self.poison = steps, batch, parts, poison

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> list[torch.Tensor]:
        batch = torch.randn(self.batch, 5, generator=torch_generator("numbers", step))
        if step == self.poison:
            batch = batch * float("nan")
        return list(batch.chunk(self.parts))


def train(
    folder: Path, stop_at: int | None = None, data: Numbers | None = None, **options: float
) -> Regression:
    settings = TrainSettings(
        lr=1e-2, clip=10.0, skip_factor=50.0, log_every=7, checkpoint_every=1000, **options
    )  # type: ignore[arg-type]
    task = Regression()
    fit(task, data or Numbers(), settings, Run(folder, CPU, quiet=True, stop_at=stop_at), "test")
    return task


def test_stopped_at_any_step_and_continued_it_ends_bitwise_equal(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole")
    assert train(tmp_path / "untouched").state_dict().keys() == whole.state_dict().keys()
    for stop in (1, 10, 33, 59):
        folder = tmp_path / f"stop{stop}"
        train(folder, stop_at=stop)
        train(folder, stop_at=min(stop + 5, 60))
        resumed = train(folder)
        for name, value in whole.state_dict().items():
            assert torch.equal(resumed.state_dict()[name], value), (stop, name)
        assert (folder / "metrics.jsonl").read_text() == (tmp_path / "whole" / "metrics.jsonl").read_text()


def test_training_learns_and_logs_every_stated_step(tmp_path: Path) -> None:
    task = train(tmp_path)
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == [6, 13, 20, 27, 34, 41, 48, 55, 59]
    assert lines[-1]["loss"] < 0.5 * lines[0]["loss"]
    assert task.steps_seen == 60


def test_four_micro_batches_equal_one_batch(tmp_path: Path) -> None:
    def run(parts: int) -> Regression:
        task = Regression(dropout=0.0)
        settings = TrainSettings(lr=1e-2, checkpoint_every=1000)
        fit(task, Numbers(parts=parts), settings, Run(tmp_path / str(parts), CPU, quiet=True), "test")
        return task

    one, four = run(1), run(4)
    for name, value in one.state_dict().items():
        torch.testing.assert_close(four.state_dict()[name], value, rtol=1e-4, atol=1e-5)
    assert four.steps_seen == 60  # once per optimiser step, not per micro-batch


class Views:
    """Two views of 16 images per step, whole or cut; the attribute is the brighter half."""

    def __init__(self, parts: int) -> None:
        self.parts = parts

    def __len__(self) -> int:
        return 6

    def __getitem__(self, step: int) -> list[ViewBatch]:
        images = torch.rand(16, 2, 1, 32, 32, generator=torch_generator("views", step))
        whole = ViewBatch(
            images=images,
            is_counterfactual=torch.zeros(16, 2, dtype=torch.bool),
            slot=torch.zeros(16, 2, dtype=torch.long),
            affine=torch.eye(2, 3).expand(16, 2, 2, 3),
            valid=torch.ones(16, 2, 32, 32, dtype=torch.bool),
            attributes={"bright": (images[:, 0, 0, :, :16].mean((1, 2)) > 0.5).long()},
            row=torch.arange(16),
        )
        return split(whole, self.parts)


def test_a_supervised_network_without_batch_statistics_takes_the_step_of_the_whole_batch(
    tmp_path: Path,
) -> None:
    def run(parts: int) -> tuple[nn.Module, list[dict[str, Any]]]:
        encoder = create_backbone(BackboneSettings("test_vit"), channels=1, image_size=32, seed=0)
        task = create_objective(SupervisedSettings(target="bright"), encoder, 2, 0)
        settings = TrainSettings(lr=1e-3, clip=1e6, log_every=1)
        fit(task, Views(parts), settings, Run(tmp_path / str(parts), CPU, quiet=True), "test")
        return task, read_metrics(tmp_path / str(parts) / "metrics.jsonl")

    (one, whole), (four, cut) = run(1), run(4)
    for name, value in one.state_dict().items():
        torch.testing.assert_close(four.state_dict()[name], value, rtol=1e-3, atol=2e-5)
    for name in ("loss", "accuracy", "gradient_norm"):  # the norm sees a wrong scale, which AdamW does not
        found = [[line[name] for line in lines] for lines in (cut, whole)]
        assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_the_global_generator_is_left_as_it_was_and_does_not_matter(tmp_path: Path) -> None:
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first = train(tmp_path / "a")
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(2)
    second = train(tmp_path / "b")
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_a_checkpoint_is_written_and_read_back_before_the_first_step(tmp_path: Path) -> None:
    train(tmp_path, stop_at=0)
    assert load_checkpoint(tmp_path / "checkpoint.safetensors")["step"] == 0


def test_a_single_poisoned_step_is_skipped_and_a_lasting_one_is_an_error(tmp_path: Path) -> None:
    settings = TrainSettings(lr=1e-2, log_every=1000, skip_factor=10)
    task = Regression()
    with pytest.raises(UserError, match="the loss is nan"):
        fit(task, Numbers(poison=30), settings, Run(tmp_path, CPU, quiet=True), "test")
    # reported when the mean is logged; the weights were protected
    assert all(torch.isfinite(value).all() for value in task.parameters())


def test_another_models_checkpoint_is_refused(tmp_path: Path) -> None:
    state = {"step": 3, "task": {"other": torch.zeros(1)}, "optimizer": {}, "guard": {}, "meter": {}}
    save_checkpoint(tmp_path / "checkpoint.safetensors", state)
    with pytest.raises(UserError, match="belongs to another model"):
        train(tmp_path)


def test_a_metrics_line_cut_short_by_a_kill_is_ignored(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps({"step": 1}) + "\n" + '{"step": 2, "lo')
    assert read_metrics(path) == [{"step": 1}]


def test_weight_decay_spares_vectors_and_every_parameter_is_in_one_group() -> None:
    task = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Linear(2, 2))
    decayed, spared = weight_decay_groups(task, 0.1)
    assert decayed["weight_decay"] == 0.1
    assert spared["weight_decay"] == 0.0
    assert {p.ndim for p in spared["params"]} == {1}
    assert len(decayed["params"]) + len(spared["params"]) == len(list(task.parameters()))

"""The loop: resume is bitwise, accumulation keeps a mean over images as it is, bad states stop it."""

import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from cfssl.data.views import ViewBatch, split
from cfssl.engine.checkpoint import load_checkpoint, save_checkpoint
from cfssl.engine.interruption import Interrupted, Interruption
from cfssl.engine.loop import Observation, TrainSettings, fit, weight_decay_groups
from cfssl.engine.run import HardwareSettings, Run, read_metrics
from cfssl.errors import UserError
from cfssl.models.backbone import BackboneSettings, create_backbone
from cfssl.objectives import create_objective
from cfssl.objectives.supervised import SupervisedSettings
from cfssl.seeds import torch_generator

CPU = HardwareSettings(accelerator="cpu")
SETTINGS = TrainSettings(lr=1e-2, clip=10.0, skip_factor=50.0, log_every=7, checkpoint_every=1000)


class Regression(nn.Module):
    """A small network with dropout, a buffer moved once per step, and a loss that is a mean over the
    batch."""

    def __init__(self, dropout: float = 0.2, norm: bool = False) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.net = nn.Sequential(
                nn.Linear(5, 16),
                nn.BatchNorm1d(16) if norm else nn.Identity(),
                nn.GELU(),
                nn.Dropout(dropout),
                nn.Linear(16, 1),
            )
        self.register_buffer("steps_seen", torch.zeros(()))

    def forward(self, batch: torch.Tensor, step: int) -> dict[str, torch.Tensor]:
        loss = (self.net(batch).squeeze(1) - batch.sum(1)).square().mean()
        return {"loss": loss}

    def after_step(self, step: int) -> None:
        self.steps_seen += 1


class Numbers:
    """Batches (16, 5) of normal numbers. `factors`: by step, what they are multiplied with. `kill_at`: the
    step at which the process dies."""

    def __init__(
        self,
        steps: int = 60,
        parts: int = 1,
        factors: dict[int, float] | None = None,
        kill_at: int | None = None,
    ) -> None:
        self.steps, self.parts, self.factors, self.kill_at = steps, parts, factors or {}, kill_at

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> list[torch.Tensor]:
        if step == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        batch = torch.randn(16, 5, generator=torch_generator("numbers", step)) * self.factors.get(step, 1.0)
        return list(batch.chunk(self.parts))


def train(
    folder: Path,
    stop_at: int | None = None,
    data: Numbers | None = None,
    task: Regression | None = None,
    hardware: HardwareSettings = CPU,
    **options: Any,
) -> Regression:
    """Trains for 60 steps with the guard on."""
    task = task or Regression()
    run = Run(folder, hardware, quiet=True, stop_at=stop_at)
    fit(task, data or Numbers(), replace(SETTINGS, **options), run, "test")
    return task


def same_weights(first: nn.Module, second: nn.Module) -> bool:
    found, expected = first.state_dict(), second.state_dict()
    return all(torch.equal(found[name], value) for name, value in expected.items())


def test_stopped_at_any_step_and_continued_it_ends_bitwise_equal(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole")
    assert train(tmp_path / "untouched").state_dict().keys() == whole.state_dict().keys()
    for stop in (1, 10, 33, 59):
        folder = tmp_path / f"stop{stop}"
        train(folder, stop_at=stop)
        train(folder, stop_at=min(stop + 5, 60))
        assert same_weights(train(folder), whole)
        assert (folder / "metrics.jsonl").read_text() == (tmp_path / "whole" / "metrics.jsonl").read_text()


class Watch:
    """Looks in eval mode, writes the norm of the weights down, and stops at `stop_at`."""

    every = 9

    def __init__(self, task: nn.Module, stop_at: int | None = None) -> None:
        self.task, self.stop_at = task, stop_at

    def __call__(self, step: int) -> Observation:
        assert self.task.training
        self.task.eval()
        norm = sum(float(parameter.detach().square().sum()) for parameter in self.task.parameters())
        return Observation({"norm": norm}, "enough." if step == self.stop_at else None)


def watched(folder: Path, stop_at: int | None = None, watch_until: int | None = None) -> Regression:
    task = Regression(norm=True)
    settings = TrainSettings(lr=1e-2, log_every=7, checkpoint_every=13)
    run = Run(folder, CPU, quiet=True, stop_at=stop_at)
    fit(task, Numbers(), settings, run, "test", Watch(task, watch_until))
    return task


def test_training_is_the_same_with_an_observer_that_changes_modes(tmp_path: Path) -> None:
    alone = Regression(norm=True)
    settings = TrainSettings(lr=1e-2, log_every=7, checkpoint_every=13)
    fit(alone, Numbers(), settings, Run(tmp_path / "alone", CPU, quiet=True), "test")
    assert same_weights(watched(tmp_path / "watched"), alone)
    lines = read_metrics(tmp_path / "watched" / "metrics.jsonl")
    assert [line["step"] for line in lines if "norm" in line] == [8, 17, 26, 35, 44, 53, 59]
    assert [line for line in lines if "norm" not in line] == read_metrics(
        tmp_path / "alone" / "metrics.jsonl"
    )


def test_a_resume_neither_repeats_nor_loses_what_an_observer_saw(tmp_path: Path) -> None:
    whole = watched(tmp_path / "whole")
    for stop in (9, 10, 31, 59):  # at, after and between looks
        watched(tmp_path / f"{stop}", stop_at=stop)
        assert same_weights(watched(tmp_path / f"{stop}"), whole)
        found, expected = ((tmp_path / name / "metrics.jsonl").read_text() for name in (f"{stop}", "whole"))
        assert found == expected


def test_an_observer_that_stops_leaves_its_line_and_a_checkpoint_of_that_step(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"test: enough\. The checkpoint .* holds this step"):
        watched(tmp_path / "stopped", watch_until=26)
    assert load_checkpoint(tmp_path / "stopped" / "checkpoint.safetensors")["step"] == 27
    assert read_metrics(tmp_path / "stopped" / "metrics.jsonl")[-1]["step"] == 26
    assert same_weights(watched(tmp_path / "stopped"), watched(tmp_path / "whole"))
    found, expected = ((tmp_path / name / "metrics.jsonl").read_text() for name in ("stopped", "whole"))
    assert found == expected


class Asked(Numbers):
    """Somebody asks to stop while the batch of the step `at` is made."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at = at

    def __getitem__(self, step: int) -> list[torch.Tensor]:
        if step == self.at:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().__getitem__(step)


@pytest.mark.parametrize("at", [0, 1, 33, 59])
def test_asked_to_stop_it_loses_no_step_and_continued_it_ends_bitwise_equal(at: int, tmp_path: Path) -> None:
    whole, folder = train(tmp_path / "whole"), tmp_path / "asked"
    with Interruption().listening() as interruption:
        run = Run(folder, CPU, quiet=True, interruption=interruption)
        with pytest.raises(Interrupted, match="SIGTERM"):
            fit(Regression(), Asked(at), SETTINGS, run, "test")
    assert load_checkpoint(run.checkpoint_path)["step"] == at
    assert same_weights(train(folder), whole)
    assert (folder / "metrics.jsonl").read_text() == (tmp_path / "whole" / "metrics.jsonl").read_text()


def test_asked_before_the_first_step_it_does_none(tmp_path: Path) -> None:
    with Interruption().listening() as interruption:
        with interruption.deferred():
            os.kill(os.getpid(), signal.SIGUSR2)
        run = Run(tmp_path, CPU, quiet=True, interruption=interruption)
        task = Regression()
        with pytest.raises(Interrupted, match="SIGUSR2"):
            fit(task, Numbers(), SETTINGS, run, "test")
    assert task.steps_seen == 0
    assert load_checkpoint(run.checkpoint_path)["step"] == 0


KILLED = """
import runpy, sys
from pathlib import Path
tests = runpy.run_path(sys.argv[1])
tests["train"](Path(sys.argv[2]), data=tests["Numbers"](kill_at=40), checkpoint_every=15)
"""


def test_killed_between_checkpoints_it_does_the_lost_steps_again_and_logs_each_once(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole")
    folder = tmp_path / "killed"
    done = subprocess.run([sys.executable, "-c", KILLED, __file__, str(folder)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert load_checkpoint(folder / "checkpoint.safetensors")["step"] == 30
    assert read_metrics(folder / "metrics.jsonl")[-1]["step"] == 34  # beyond the checkpoint
    assert same_weights(train(folder, checkpoint_every=15), whole)
    assert (folder / "metrics.jsonl").read_text() == (tmp_path / "whole" / "metrics.jsonl").read_text()


class Kernels(nn.Module):
    """A convolution with the channels last, as the encoders have them."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 1))
        self.net = net.to(memory_format=torch.channels_last)

    def forward(self, batch: torch.Tensor, step: int) -> dict[str, torch.Tensor]:
        images = batch.repeat(1, 6)[:, :27].reshape(-1, 3, 3, 3).contiguous(memory_format=torch.channels_last)
        return {"loss": (self.net(images).squeeze(1) - batch.sum(1)).square().mean()}

    def after_step(self, step: int) -> None:
        pass


def test_moments_are_those_of_the_same_weights_after_a_resume_with_the_channels_last(tmp_path: Path) -> None:
    def run(folder: Path, stop_at: int | None = None) -> nn.Module:
        task, settings = Kernels(), TrainSettings(lr=1e-2, final_lr_share=1.0)
        fit(task, Numbers(), settings, Run(folder, CPU, quiet=True, stop_at=stop_at), "test")
        return task

    whole = run(tmp_path / "whole")
    run(tmp_path / "parts", stop_at=30)
    assert same_weights(run(tmp_path / "parts"), whole)


def test_a_resumed_guard_knows_the_norms_of_before(tmp_path: Path) -> None:
    """The outlier comes 5 steps after the stop, before a guard without memory would judge any norm."""
    data = Numbers(factors={35: 100.0})
    whole = train(tmp_path / "whole", data=data)
    assert read_metrics(tmp_path / "whole" / "metrics.jsonl")[-1]["skipped"] == 1
    train(tmp_path / "parts", data=data, stop_at=30)
    assert same_weights(train(tmp_path / "parts", data=data), whole)
    lines = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "parts")]
    assert lines[0] == lines[1]


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
            position=tuple(range(16)),
        )
        return split(whole, self.parts)


def test_a_supervised_network_without_batch_statistics_takes_the_step_of_the_whole_batch(
    tmp_path: Path,
) -> None:
    def run(parts: int) -> tuple[nn.Module, list[dict[str, Any]]]:
        encoder = create_backbone(BackboneSettings("test_vit"), channels=1, image_size=32, seed=0)
        task = create_objective(
            SupervisedSettings(target="bright"), encoder, 0, images=96, steps=6, classes=2
        )
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


def test_a_checkpoint_is_written_and_read_back_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tmp_path / "whole", stop_at=0)
    assert load_checkpoint(tmp_path / "whole" / "checkpoint.safetensors")["step"] == 0

    def lose_half(path: Path, state: Any) -> None:
        save_checkpoint(path, state)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    class NeverRead(Numbers):
        def __getitem__(self, step: int) -> list[torch.Tensor]:
            raise AssertionError("training has begun")

    monkeypatch.setattr("cfssl.engine.loop.save_checkpoint", lose_half)
    with pytest.raises(UserError, match="cannot be read"):
        train(tmp_path / "disk", data=NeverRead())


@pytest.mark.parametrize("factor", [math.nan, math.inf, 1e6])
def test_a_single_bad_step_is_as_if_it_had_not_been(tmp_path: Path, factor: float) -> None:
    """Weights, moments, batch statistics and the logged means are those of the steps before and after."""

    def run(folder: Path, log_every: int, **options: Any) -> Regression:
        data = Numbers(factors={30: factor})
        return train(folder, data=data, task=Regression(norm=True), log_every=log_every, **options)

    states = []
    for stop in (30, 31):
        run(tmp_path, 1000, stop_at=stop)
        found = load_checkpoint(tmp_path / "checkpoint.safetensors")
        assert (found["step"], found["guard"]["skipped"]) == (stop, stop - 30)
        states.append(tree_leaves([found["task"], found["optimizer"]["state"], found["meter"]]))
    assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(*states, strict=True))
    task = run(tmp_path, 1000)
    assert task.steps_seen == 59
    assert all(torch.isfinite(value).all() for value in task.state_dict().values())
    (line,) = read_metrics(tmp_path / "metrics.jsonl")
    assert all(math.isfinite(value) for value in line.values())
    assert line["skipped"] == 1
    # a line would be about no step at all when the only step since the last was skipped
    run(tmp_path / "each", 1)
    assert [entry["step"] for entry in read_metrics(tmp_path / "each" / "metrics.jsonl")] == [
        step for step in range(60) if step != 30
    ]


def test_gradients_are_clipped_to_the_stated_norm(tmp_path: Path) -> None:
    seen = []

    class Watched(Regression):
        def after_step(self, step: int) -> None:
            gradient = torch.cat([value.grad.flatten() for value in self.parameters()])
            seen.append(float(gradient.norm()))

    train(tmp_path, task=Watched(), clip=0.5, skip_factor=None, log_every=1)
    norms = [line["gradient_norm"] for line in read_metrics(tmp_path / "metrics.jsonl")]
    assert max(norms) > 1  # before clipping
    assert seen == pytest.approx([min(norm, 0.5) for norm in norms], rel=1e-4)


def test_without_the_guard_a_loss_that_is_not_finite_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"the loss is nan at step 34; lower the learning rate"):
        train(tmp_path, data=Numbers(factors={30: math.nan}), clip=None, skip_factor=None)


def test_a_checkpoint_never_holds_what_is_not_finite(tmp_path: Path) -> None:
    """Saved between two lines of the log, it would end every later start."""
    off = {"clip": None, "skip_factor": None, "checkpoint_every": 8}
    with pytest.raises(UserError, match=r"loss or weights are not finite after step 31; .* keeps an earlier"):
        train(tmp_path, data=Numbers(factors={30: math.nan}), log_every=1000, **off)
    assert load_checkpoint(tmp_path / "checkpoint.safetensors")["step"] == 24
    mended = train(tmp_path, log_every=1000, **off)
    assert same_weights(mended, train(tmp_path / "never bad", **off))


def test_weights_that_broke_in_the_very_step_of_a_checkpoint_are_not_kept(tmp_path: Path) -> None:
    class Root(Regression):
        """The loss of step 31 is finite and its gradient is not."""

        def forward(self, batch: torch.Tensor, step: int) -> dict[str, torch.Tensor]:
            parts = super().forward(batch, step)
            root = (0 * self.net[0].weight).sqrt().sum() if step == 31 else 0
            return {"loss": parts["loss"] + root}

    off = {"clip": None, "skip_factor": None, "checkpoint_every": 8}
    with pytest.raises(UserError, match="loss or weights are not finite after step 31"):
        train(tmp_path, task=Root(), log_every=1000, **off)
    assert load_checkpoint(tmp_path / "checkpoint.safetensors")["step"] == 24


def test_another_schedule_is_refused_with_what_differs(tmp_path: Path) -> None:
    train(tmp_path, stop_at=10)
    with pytest.raises(UserError, match=r"was made with lr 0\.01, and this run has lr 0\.02; go on"):
        train(tmp_path, lr=2e-2)
    with pytest.raises(UserError, match=r"was made with steps 60, and this run has steps 61"):
        train(tmp_path, data=Numbers(steps=61))
    train(tmp_path, log_every=5, checkpoint_every=7)  # these do not move the weights


def test_the_thread_count_is_the_stated_one_in_training_and_the_old_one_after(tmp_path: Path) -> None:
    seen = set()

    class Watched(Regression):
        def after_step(self, step: int) -> None:
            seen.add(torch.get_num_threads())

    before = torch.get_num_threads()
    train(tmp_path, task=Watched(), hardware=HardwareSettings(accelerator="cpu", threads=before + 1))
    assert seen == {before + 1}
    assert torch.get_num_threads() == before


def test_a_gpu_that_is_not_there_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"hardware\.accelerator is gpu, and torch finds none"):
        train(tmp_path, hardware=HardwareSettings(accelerator="gpu"))


def test_another_models_checkpoint_is_refused(tmp_path: Path) -> None:
    state = {"step": 3, "task": {"other": torch.zeros(1)}}
    save_checkpoint(tmp_path / "checkpoint.safetensors", state)
    with pytest.raises(UserError, match="belongs to another model"):
        train(tmp_path)


def test_a_metrics_line_cut_short_by_a_kill_is_ignored(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps({"step": 1}) + "\n" + '{"step": 2, "lo')
    assert read_metrics(path) == [{"step": 1}]


def test_metrics_survive_when_forgetting_is_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path)
    for step in range(5):
        run.log({"step": step})

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run.forget_metrics_after(3)
    assert [line["step"] for line in read_metrics(run.metrics_path)] == [0, 1, 2, 3, 4]
    run.forget_metrics_after(3)
    assert [line["step"] for line in read_metrics(run.metrics_path)] == [0, 1, 2]


def test_weight_decay_follows_its_schedule_and_matrices_alone_follow_it(tmp_path: Path) -> None:
    """Without gradients AdamW decays alone: the product of 1 - lr * decay over the steps."""

    class Still(Regression):
        def before_step(self, step: int) -> None:
            for parameter in self.parameters():
                parameter.grad = torch.zeros_like(parameter)

    start = Still().state_dict()
    steps = {"data": Numbers(steps=5), "warmup": 0.0, "final_lr_share": 1.0, "lr": 0.1}
    for final, decays in ((None, [0.5] * 5), (0.1, [0.5, 0.4414214, 0.3, 0.1585786, 0.1])):
        task = train(tmp_path / str(final), task=Still(), weight_decay=0.5, final_weight_decay=final, **steps)
        shrunk = math.prod(1 - 0.1 * decay for decay in decays)
        torch.testing.assert_close(task.net[0].weight, shrunk * start["net.0.weight"])
        assert torch.equal(task.net[0].bias, start["net.0.bias"])


@pytest.mark.parametrize("clip", [None, 1e6])
def test_a_layer_whose_gradient_is_taken_away_stays_as_it_is_while_it_is(
    tmp_path: Path, clip: float | None
) -> None:
    class Frozen(Regression):
        def before_step(self, step: int) -> None:
            assert self.net[4].weight.grad is not None  # those of all micro-batches are there
            if step < 20:
                self.net[4].weight.grad = None

    options = {"clip": clip, "skip_factor": None, "weight_decay": 0.1, "data": Numbers(parts=4)}
    start = Frozen().net[4].weight
    for stop in (20, 21):
        task = train(tmp_path, task=Frozen(), stop_at=stop, **options)
        assert torch.equal(task.net[4].weight, start) == (stop == 20)
        assert not torch.equal(task.net[0].weight, Frozen().net[0].weight)
    assert same_weights(
        train(tmp_path, task=Frozen(), **options), train(tmp_path / "whole", task=Frozen(), **options)
    )


def test_weight_decay_spares_vectors_and_every_parameter_is_in_one_group() -> None:
    task = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Linear(2, 2))
    decayed, spared = weight_decay_groups(task, 0.1)
    assert decayed["weight_decay"] == 0.1
    assert spared["weight_decay"] == 0.0
    assert {p.ndim for p in spared["params"]} == {1}
    assert len(decayed["params"]) + len(spared["params"]) == len(list(task.parameters()))

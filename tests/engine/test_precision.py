"""Mixed precision: batches come through uncast, and the guard sees the gradients without the loss scale."""

import math
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

from cfssl.engine.checkpoint import load_checkpoint
from cfssl.engine.loop import TrainSettings, fit
from cfssl.engine.run import HardwareSettings, Precision, Run, read_metrics
from cfssl.errors import UserError
from cfssl.seeds import torch_generator


@dataclass(frozen=True)
class Batch:
    """Frozen, as ViewBatch is, with coordinates that half precision would round."""

    x: torch.Tensor

    def __len__(self) -> int:
        return len(self.x)

    def to(self, device: torch.device, **keywords: bool) -> "Batch":
        return Batch(self.x.to(device, **keywords))


class Data:
    """`overflow`: the steps in which float16 cannot hold the scaled gradients, though float32 could."""

    def __init__(self, overflow: tuple[int, ...] = ()) -> None:
        self.overflow = overflow

    def __len__(self) -> int:
        return 40

    def __getitem__(self, step: int) -> list[Batch]:
        x = torch.randn(16, 5, generator=torch_generator("precision", step))
        return [Batch(x * 1000 if step in self.overflow else x)]


class Regression(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(5, 1)
        nn.init.constant_(self.net.weight, 0.1)
        nn.init.zeros_(self.net.bias)
        self.types: set[torch.dtype] = set()

    def forward(self, batch: Batch, step: int) -> dict[str, torch.Tensor]:
        y = self.net(batch.x)
        self.types |= {batch.x.dtype, y.dtype}
        return {"loss": (y.squeeze(1).float() - batch.x.sum(1)).square().mean() / 64}

    def after_step(self, step: int) -> None:
        pass


def train(
    folder: Path, precision: Precision, data: Data | None = None, stop_at: int | None = None, **options: float
) -> Regression:
    hardware = HardwareSettings(accelerator="cpu", precision=precision)
    settings = TrainSettings(**({"lr": 1e-2, "log_every": 1} | options))  # type: ignore[arg-type]
    task = Regression()
    fit(task, data or Data(), settings, Run(folder, hardware, quiet=True, stop_at=stop_at), "test")
    return task


@pytest.mark.parametrize(("precision", "half"), [("bf16-mixed", torch.bfloat16), ("16-mixed", torch.float16)])
def test_operations_are_cast_and_batches_are_not(tmp_path: Path, precision: Precision, half: object) -> None:
    mixed, full = train(tmp_path / "mixed", precision), train(tmp_path / "full", "32-true")
    assert mixed.types == {torch.float32, half}
    torch.testing.assert_close(mixed.net.weight, full.net.weight, rtol=0.02, atol=0.01)


def test_the_guard_sees_gradients_without_the_loss_scale(tmp_path: Path) -> None:
    """Scaled by 2^16, every gradient would be clipped, and the logged norm would be of no use."""
    for precision in ("16-mixed", "32-true"):
        train(tmp_path / precision, precision, clip=1.0)  # type: ignore[arg-type]
    mixed, full = (
        [line["gradient_norm"] for line in read_metrics(tmp_path / name / "metrics.jsonl")]
        for name in ("16-mixed", "32-true")
    )
    assert mixed == pytest.approx(full, rel=0.03)


def test_an_overflow_is_skipped_and_lowers_the_scale_and_training_goes_on(tmp_path: Path) -> None:
    data = Data(overflow=(10,))
    train(tmp_path, "16-mixed", data, stop_at=10, clip=100.0)
    before = load_checkpoint(tmp_path / "checkpoint.safetensors")["precision"]["scale"]
    train(tmp_path, "16-mixed", data, stop_at=11, clip=100.0)
    assert load_checkpoint(tmp_path / "checkpoint.safetensors")["precision"]["scale"] == before / 2
    train(tmp_path, "16-mixed", data, clip=100.0)
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert lines[-1]["skipped"] == 1
    assert [line["step"] for line in lines] == [step for step in range(40) if step != 10]
    assert lines[-1]["loss"] < lines[0]["loss"]


def test_a_finite_outlier_is_skipped_under_the_loss_scale_too(tmp_path: Path) -> None:
    """The scaler would refuse the next step, had it not been told that this one is over."""

    class Outlier(Data):
        def __getitem__(self, step: int) -> list[Batch]:
            (batch,) = super().__getitem__(step)
            return [Batch(batch.x * 5)] if step == 30 else [batch]

    train(tmp_path, "16-mixed", Outlier(), skip_factor=4.0)
    assert read_metrics(tmp_path / "metrics.jsonl")[-1]["skipped"] == 1


def test_a_loss_that_is_not_finite_is_no_checkpoint_though_the_scaler_kept_the_weights(
    tmp_path: Path,
) -> None:
    class Poisoned(Data):
        def __getitem__(self, step: int) -> list[Batch]:
            (batch,) = super().__getitem__(step)
            return [Batch(batch.x * math.nan)] if step == 30 else [batch]

    with pytest.raises(UserError, match="loss or weights are not finite after step 31"):
        train(tmp_path, "16-mixed", Poisoned(), log_every=1000, checkpoint_every=8)
    assert load_checkpoint(tmp_path / "checkpoint.safetensors")["step"] == 24


def test_the_loss_scale_is_continued(tmp_path: Path) -> None:
    data = Data(overflow=(5,))
    whole = train(tmp_path / "whole", "16-mixed", data, clip=100.0)
    train(tmp_path / "parts", "16-mixed", data, stop_at=20, clip=100.0)
    resumed = train(tmp_path / "parts", "16-mixed", data, clip=100.0)
    assert torch.equal(resumed.net.weight, whole.net.weight)
    scales = [load_checkpoint(tmp_path / name / "checkpoint.safetensors") for name in ("whole", "parts")]
    assert scales[0]["precision"] == scales[1]["precision"]
    assert scales[0]["precision"]["_growth_tracker"] == 34

"""The training loop, from top to bottom, on Lightning Fabric.

What enters: a task (an nn.Module whose `forward(batch, step)` returns a dict with `loss`, and whose
`after_step(step)` does what must happen once per optimiser step), and step data (`data[step]` gives the
micro-batches of that step, a pure function of the seed and the step). What leaves: the trained task,
metrics.jsonl and checkpoint.safetensors in the run's folder. Stopped at any step and started again, it ends
with the same weights, bit for bit on the CPU.
"""

import math
import time
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import torch
from pydantic.dataclasses import dataclass
from torch import nn
from torch.utils.data import DataLoader

from cfssl.engine.checkpoint import load_checkpoint, save_checkpoint
from cfssl.engine.guard import GradientGuard
from cfssl.engine.progress import ProgressBar
from cfssl.engine.run import Run
from cfssl.engine.schedules import warmup_cosine
from cfssl.errors import UserError
from cfssl.seeds import derive_seed
from cfssl.settings import STRICT, Count, NonNegative, Positive, Probability


class Task(Protocol):
    """What the loop trains; see the module docstring."""

    def __call__(self, batch: Any, step: int) -> dict[str, torch.Tensor]: ...
    def after_step(self, step: int) -> None: ...


class StepData(Protocol):
    """`data[step]` is the list of micro-batches of one optimiser step; `len(data)` the number of steps."""

    def __getitem__(self, step: int) -> list[Any]: ...
    def __len__(self) -> int: ...


@dataclass(frozen=True, config=STRICT)
class TrainSettings:
    """AdamW with linear warm-up and cosine decay. `batch` images per optimiser step, in `accumulate` equal
    micro-batches whose gradients are averaged. `warmup`: share of all steps. Weight decay spares biases and
    norm scales. `clip`: maximal gradient norm. `skip_factor`: skip steps whose norm exceeds this many running
    medians (see guard.py). `seed`: of weights, order, views and noise."""

    epochs: Count = 50
    batch: Count = 256
    accumulate: Count = 1
    seed: int = 0
    lr: Positive = 1e-3
    final_lr_share: Probability = 0.0
    weight_decay: NonNegative = 1e-2
    betas: tuple[Probability, Probability] = (0.9, 0.999)
    warmup: Probability = 0.05
    clip: Positive | None = None
    skip_factor: Positive | None = None
    log_every: Count = 10
    checkpoint_every: Count = 500


def fit(task: nn.Module, data: StepData, settings: TrainSettings, run: Run, label: str) -> bool:
    """Trains `task` in place and returns whether it got to the end (False when `run.stop_at` came first).

    Continues from the run's checkpoint when there is one. Raises `UserError` when the loss stops being
    finite, when the guard gives up, or when the checkpoint belongs to another task.
    """
    from lightning_fabric import Fabric

    hardware = run.hardware
    if hardware.threads is not None:
        torch.set_num_threads(hardware.threads)
    fabric = Fabric(accelerator=hardware.accelerator, devices=1, precision=hardware.precision)
    fabric.launch()
    steps = len(data)
    warmup = round(settings.warmup * steps)
    # The fused kernel reads and writes every parameter once, on CPU and GPU alike.
    optimizer = torch.optim.AdamW(
        weight_decay_groups(task, settings.weight_decay), lr=settings.lr, betas=settings.betas, fused=True
    )
    model, optimizer = fabric.setup(task, optimizer)
    guard = GradientGuard(settings.clip, settings.skip_factor)
    guarded = settings.clip is not None or settings.skip_factor is not None
    meter = Meter()

    def snapshot(step: int) -> dict[str, Any]:
        return {
            "step": step,
            "task": task.state_dict(),
            "optimizer": optimizer.state_dict(),
            "guard": guard.state_dict(),
            "meter": meter.state_dict(),
        }

    step = 0
    if run.checkpoint_path.exists():
        state = load_checkpoint(run.checkpoint_path)
        step = state["step"]
        restore(task, state["task"], run)
        optimizer.load_state_dict(state["optimizer"])
        guard.load_state_dict(state["guard"])
        meter.load_state_dict(state["meter"])
    else:
        # A run that cannot write or read its checkpoints must not find out after hours.
        save_checkpoint(run.checkpoint_path, snapshot(0))
        restore(task, load_checkpoint(run.checkpoint_path)["task"], run)
    run.forget_metrics_after(step)

    last = steps if run.stop_at is None else min(steps, run.stop_at)
    model.train()
    batches = timed(loader(data, range(step, last), hardware.workers))
    with ProgressBar(label, total=steps, done=step, quiet=run.quiet) as bar, torch.random.fork_rng():
        for step, (micro_batches, waited) in zip(range(step, last), batches, strict=True):  # noqa: B020
            lr = warmup_cosine(step, steps, settings.lr, settings.lr * settings.final_lr_share, warmup)
            for group in optimizer.param_groups:
                group["lr"] = lr
            # Layers that draw from the global generator (dropout) get a stream that is a function of seed and
            # step.
            torch.manual_seed(derive_seed(settings.seed, "step", step))
            for index, batch in enumerate(micro_batches):
                with fabric.no_backward_sync(model, enabled=index < len(micro_batches) - 1):
                    parts = model(fabric.to_device(batch), step)
                    fabric.backward(parts["loss"] / len(micro_batches))
                meter.add(parts, 1 / len(micro_batches))
            taken, norm = guard.allows(task.parameters()) if guarded else (True, None)
            if taken:
                optimizer.step()
            optimizer.zero_grad()
            task.after_step(step)  # type: ignore[operator]

            if (step + 1) % settings.log_every == 0 or step + 1 == steps:
                means = meter.means()
                if not math.isfinite(means["loss"]):
                    raise UserError(
                        f"{label}: the loss is {means['loss']} at step {step}; lower the learning rate "
                        f"({lr:.3g})."
                    )
                guard_state = {} if norm is None else {"gradient_norm": norm, "skipped": guard.skipped}
                run.log({"step": step, **means, "lr": lr, **guard_state})
                bar.note = f"loss {means['loss']:.4f}"
            if (step + 1) % settings.checkpoint_every == 0 or step + 1 == last:
                save_checkpoint(run.checkpoint_path, snapshot(step + 1))
            bar.advance(items=sum(len(batch) for batch in micro_batches), waited=waited, note=bar.note)
    return last == steps


def weight_decay_groups(task: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two parameter groups: matrices and kernels with weight decay, vectors (biases, norm scales) and scalars
    without."""
    trained = [parameter for parameter in task.parameters() if parameter.requires_grad]
    decayed = [parameter for parameter in trained if parameter.ndim > 1]
    spared = [parameter for parameter in trained if parameter.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": spared, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def restore(task: nn.Module, state: dict[str, torch.Tensor], run: Run) -> None:
    """Loads `state`; every key must match."""
    missing, unexpected = task.load_state_dict(state, strict=False)
    if missing or unexpected:
        raise UserError(
            f"The checkpoint {run.checkpoint_path} belongs to another model ({len(missing)} keys missing, "
            f"{len(unexpected)} unknown, e.g. {[*missing, *unexpected][0]}); use another run folder or "
            "delete it."
        )


def loader(data: StepData, steps: range, workers: int) -> Iterable[list[Any]]:
    """The micro-batches of each step, in order. The data are a function of the step, so workers change speed
    only."""
    return DataLoader(
        data,  # type: ignore[arg-type]
        batch_size=None,
        sampler=steps,
        num_workers=workers,
        collate_fn=keep,
        worker_init_fn=single_threaded if workers else None,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=False,
    )


def keep(batch: Any) -> Any:
    """Collation is done by the data themselves."""
    return batch


def single_threaded(worker: int) -> None:
    """Workers are parallel already; OpenCV's and torch's own threads would fight them."""
    import cv2

    cv2.setNumThreads(0)
    torch.set_num_threads(1)


def timed(batches: Iterable[Any]) -> Iterator[tuple[Any, float]]:
    """Each batch with the seconds spent waiting for it."""
    iterator = iter(batches)
    while True:
        started = time.monotonic()
        try:
            batch = next(iterator)
        except StopIteration:
            return
        yield batch, time.monotonic() - started


class Meter:
    """Means of loss parts since the last line logged; kept on the device so that only logging
    synchronises."""

    def __init__(self) -> None:
        self.sums: dict[str, torch.Tensor] = {}
        self.weight = 0.0

    def add(self, parts: dict[str, torch.Tensor], weight: float) -> None:
        for name, value in parts.items():
            addend = value.detach().double() * weight
            self.sums[name] = self.sums[name] + addend if name in self.sums else addend
        self.weight += weight

    def means(self) -> dict[str, float]:
        """The means; starts again from nothing."""
        means = {name: float(value) / self.weight for name, value in self.sums.items()}
        self.sums, self.weight = {}, 0.0
        return means

    def state_dict(self) -> dict[str, Any]:
        return {"sums": {name: float(value) for name, value in self.sums.items()}, "weight": self.weight}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sums = {name: torch.tensor(value, dtype=torch.float64) for name, value in state["sums"].items()}
        self.weight = state["weight"]

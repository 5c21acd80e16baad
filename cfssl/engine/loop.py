"""The training loop, from top to bottom, on Lightning Fabric.

What enters: a task (an nn.Module whose `forward(batch, step)` returns a dict with `loss`, and whose
`after_step(step)` does what must happen once per optimiser step), and step data (`data[step]` gives the
micro-batches of that step, a pure function of the seed and the step). What leaves: the trained task,
metrics.jsonl and checkpoint.safetensors in the run's folder. Stopped at any step and started again, it ends
with the same weights, bit for bit on the CPU. Asked to stop, it finishes the step, saves, and raises
`Interrupted`.

Inside of a process group (processes.py) every process has its share of each micro-batch, gradients are
averaged, batch statistics are those of all, and the first process alone writes. The files are the same for
any number of processes, each of which can go on with them.
"""

import math
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, field
from typing import Any, Protocol, runtime_checkable

import torch
from pydantic.dataclasses import dataclass
from torch import nn
from torch.utils.data import DataLoader

from cfssl.engine.checkpoint import load_checkpoint, save_checkpoint
from cfssl.engine.guard import GradientGuard
from cfssl.engine.interruption import Interrupted, ignore_signals
from cfssl.engine.meter import Meter
from cfssl.engine.norms import pool_statistics
from cfssl.engine.processes import agreed, count, first_says, largest, rank
from cfssl.engine.progress import ProgressBar
from cfssl.engine.run import Run, torch_threads
from cfssl.engine.schedules import cosine, warmup_cosine
from cfssl.engine.shards import own_part, part_like, whole
from cfssl.errors import UserError
from cfssl.seeds import derive_seed
from cfssl.settings import STRICT, AboveOne, BelowOne, Count, NonNegative, Positive, Probability


class Task(Protocol):
    """What the loop trains; see the module docstring."""

    def __call__(self, batch: Any, step: int) -> dict[str, torch.Tensor]: ...
    def after_step(self, step: int) -> None: ...


@runtime_checkable
class GradientTask(Task, Protocol):
    """A task that looks at its gradients when those of all micro-batches are there, before they are clipped.
    A parameter whose gradient it sets to None is left alone by the optimiser, weight decay included."""

    def before_step(self, step: int) -> None: ...


class StepData(Protocol):
    """`data[step]` is the list of micro-batches of one optimiser step; `len(data)` the number of steps."""

    def __getitem__(self, step: int) -> list[Any]: ...
    def __len__(self) -> int: ...


class SharedData(StepData, Protocol):
    """Step data for several processes: `share(rank, size)` are those of one of them, an equal part of every
    micro-batch, in the order of the ranks."""

    def share(self, rank: int, size: int) -> StepData: ...


@dataclass(frozen=True)
class Observation:
    """What an observer saw: `content`, numbers for a line of metrics.jsonl, and in `stop` the sentence with
    which training ends, if it must."""

    content: dict[str, Any] = field(default_factory=dict)
    stop: str | None = None


class Observer(Protocol):
    """Looks at the task every `every` steps, and after the last one. It is called with the step just done and
    may put the task into eval mode, but must leave weights, buffers and random numbers as they are."""

    @property
    def every(self) -> int: ...
    def __call__(self, step: int) -> Observation: ...


@dataclass(frozen=True, config=STRICT)
class TrainSettings:
    """AdamW with linear warm-up and cosine decay. `batch` images per optimiser step, in `accumulate` equal
    micro-batches whose gradients are averaged. `warmup`: share of all steps. Weight decay spares biases and
    norm scales; half a cosine takes it to `final_weight_decay` (None: it stays). `clip`: maximal gradient
    norm. `skip_factor`: skip steps whose norm exceeds this many running medians (see guard.py); such a step,
    or one that is not finite while clip or skip_factor is given, leaves everything as it was. `seed`: of
    weights, order, views and noise."""

    epochs: Count = 50
    batch: Count = 256
    accumulate: Count = 1
    seed: int = 0
    lr: Positive = 1e-3
    final_lr_share: Probability = 0.0
    weight_decay: NonNegative = 1e-2
    final_weight_decay: NonNegative | None = None
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.999)
    warmup: Probability = 0.05
    clip: Positive | None = None
    skip_factor: AboveOne | None = None
    log_every: Count = 10
    checkpoint_every: Count = 500


def fit(
    task: nn.Module,
    data: StepData | SharedData,
    settings: TrainSettings,
    run: Run,
    label: str,
    observer: Observer | None = None,
) -> bool:
    """Trains `task` in place and returns whether it got to the end (False when `run.stop_at` came first). The
    weights are the same with an `observer` and without. Several processes call this with the same arguments,
    and with data that can be shared.

    Continues from the run's checkpoint when there is one. Raises `UserError` when loss or weights stop being
    finite, when the guard gives up, when the checkpoint belongs to another task or schedule, or when the
    observer says so, after a checkpoint; and `Interrupted`, after a checkpoint too.
    """
    from cfssl.engine.fabric import create_fabric

    hardware, steps, is_first = run.hardware, len(data), rank() == 0
    if count() > 1:
        data = data.share(rank(), count())  # type: ignore[union-attr]
    fabric = create_fabric(hardware)
    pool_statistics(task, hardware.device)
    scaler = getattr(fabric.strategy.precision, "scaler", None)  # of the loss, under 16-mixed
    warmup = round(settings.warmup * steps)
    model = fabric.setup_module(task)  # before the optimiser, which has to know the parts of sharded weights
    optimizer: Any = torch.optim.AdamW(
        weight_decay_groups(task, settings.weight_decay),
        lr=settings.lr,
        betas=settings.betas,
        # Reads and writes every parameter once, on CPU and GPU alike, but keeps scaled gradients to itself.
        fused=scaler is None,
    )
    optimizer = fabric.setup_optimizers(optimizer)
    guarded = settings.clip is not None or settings.skip_factor is not None
    clip = math.inf if settings.clip is None else settings.clip
    guard, meter = GradientGuard(settings.skip_factor), Meter()

    def snapshot(step: int) -> dict[str, Any]:
        return {
            "step": step,
            "schedule": schedule(settings, steps),
            "task": whole(task.state_dict()),
            "optimizer": whole(optimizer.state_dict()),
            "precision": fabric.strategy.precision.state_dict(),
            "guard": guard.state_dict(),
            "meter": meter.state_dict(),
        }

    def write(step: int) -> None:
        found = snapshot(step)
        if is_first:
            save_checkpoint(run.checkpoint_path, found)

    def save(step: int) -> None:
        """When `step` steps are done."""
        meter.pool()
        if not meter.is_finite or agreed(not all_finite(task)):
            raise UserError(
                f"{label}: loss or weights are not finite after step {step - 1}; {run.checkpoint_path} keeps "
                f"an earlier step. Lower the learning rate ({settings.lr:.3g})."
            )
        write(step)

    if not agreed(is_first and run.checkpoint_path.exists()):
        # A run that cannot write or read its checkpoints must not find out after hours.
        write(0)
    first_says(None)  # when it is there
    state = load_checkpoint(run.checkpoint_path)
    step = state["step"]
    restore(task, state["task"], run)
    refuse_other_schedule(state["schedule"], schedule(settings, steps), run)
    optimizer.load_state_dict(state["optimizer"])
    lay_out_alike(optimizer)
    fabric.strategy.precision.load_state_dict(state["precision"])
    guard.load_state_dict(state["guard"])
    meter.load_state_dict(state["meter"])
    if is_first:
        run.forget_metrics_after(step)

    last = steps if run.stop_at is None else min(steps, run.stop_at)
    model.train()
    batches = timed(loader(data, range(step, last), hardware.workers))
    bar = ProgressBar(label, total=steps, done=step, quiet=run.quiet or not is_first)
    deferred = run.interruption.deferred()
    with bar, deferred, torch.random.fork_rng(), torch_threads(hardware.threads):
        for step, (micro_batches, waited) in zip(range(step, last), batches, strict=True):  # noqa: B020
            if asked := largest(run.interruption.number or 0):  # the signal, of whichever process
                save(step)
                raise Interrupted(asked)
            lr = warmup_cosine(step, steps, settings.lr, settings.lr * settings.final_lr_share, warmup)
            decay = settings.weight_decay
            if settings.final_weight_decay is not None:
                decay = cosine(step, steps, decay, settings.final_weight_decay)
            for group in optimizer.param_groups:
                group["lr"], group["weight_decay"] = lr, decay * group["decayed"]
            # Layers that draw from the global generator (dropout) get a stream that is a function of seed and
            # step, and of the process: it drops out of other images.
            torch.manual_seed(derive_seed(settings.seed, "step", step, *([rank()] if rank() else [])))
            buffers = [buffer.clone() for buffer in task.buffers()] if guarded else []
            found = []
            for index, batch in enumerate(micro_batches):
                with fabric.no_backward_sync(model, enabled=index < len(micro_batches) - 1):
                    parts = model(fabric.to_device(batch), step)
                    fabric.backward(parts["loss"] / len(micro_batches))
                found.append({name: value.detach() for name, value in parts.items()})
            if isinstance(task, GradientTask):
                task.before_step(step)
            taken = True
            if guarded:
                # Clips in place; takes the loss scale out of the gradients first.
                norm = fabric.clip_gradients(model, optimizer, max_norm=clip, error_if_nonfinite=False)
                assert norm is not None
                norm = whole(norm)
                taken = guard.allows(float(norm))
                found = [{**parts, "gradient_norm": norm} for parts in found]
            if taken:
                optimizer.step()
                task.after_step(step)  # type: ignore[operator]
                meter.add(found)
            else:  # as if the step had not been: batch statistics have seen the bad batch
                for buffer, before in zip(task.buffers(), buffers, strict=True):
                    buffer.copy_(before)
                if scaler is not None:
                    scaler.update()  # lowers the scale after an overflow
            optimizer.zero_grad()

            if ((step + 1) % settings.log_every == 0 or step + 1 == steps) and meter.steps:
                meter.pool()
                means = meter.means()
                if not math.isfinite(means["loss"]):
                    raise UserError(
                        f"{label}: the loss is {means['loss']} at step {step}; lower the learning rate "
                        f"({lr:.3g})."
                    )
                skipped = {"skipped": guard.skipped} if guarded else {}
                if is_first:
                    run.log({"step": step, **means, "lr": lr, **skipped})
                bar.note = f"loss {means['loss']:.4f}"
            stop = None
            # Before the checkpoint: a line that it counts as written must not be lost to a kill in between.
            if observer is not None and ((step + 1) % observer.every == 0 or step + 1 == steps):
                if is_first:
                    with same_modes(task):
                        seen = observer(step)
                    run.log({"step": step, **seen.content})
                    stop = seen.stop
                stop = first_says(stop)
            if (step + 1) % settings.checkpoint_every == 0 or step + 1 == last or stop is not None:
                save(step + 1)
            if stop is not None:
                raise UserError(f"{label}: {stop} The checkpoint {run.checkpoint_path} holds this step.")
            images = count() * sum(len(batch) for batch in micro_batches)
            bar.advance(items=images, waited=waited, note=bar.note)
    return last == steps


@contextmanager
def same_modes(task: nn.Module) -> Iterator[None]:
    """Every part of `task` is in train or eval mode afterwards as it was before."""
    modes = [(module, module.training) for module in task.modules()]
    try:
        yield
    finally:
        for module, is_training in modes:
            module.training = is_training


def weight_decay_groups(task: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two parameter groups: matrices and kernels with weight decay, vectors (biases, norm scales) and scalars
    without; `decayed` says which, for the schedule."""
    trained = [parameter for parameter in task.parameters() if parameter.requires_grad]
    decayed = [parameter for parameter in trained if parameter.ndim > 1]
    spared = [parameter for parameter in trained if parameter.ndim <= 1]
    groups = [
        {"params": decayed, "weight_decay": weight_decay, "decayed": True},
        {"params": spared, "weight_decay": 0.0, "decayed": False},
    ]
    return [group for group in groups if group["params"]]


def lay_out_alike(optimizer: Any) -> None:
    """Gives restored moments the memory layout of their parameter, and this process's part of it. Files keep
    the plain layout, and the fused kernel, which goes through the memory of both side by side, would pair the
    moments of a kernel with its channels last with the wrong weights."""
    for parameter, moments in optimizer.state.items():
        for name, value in moments.items():
            if value.shape == parameter.shape:
                part = part_like(value, parameter)
                moments[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(part)


def restore(task: nn.Module, state: dict[str, torch.Tensor], run: Run) -> None:
    """Loads `state`; every key must match."""
    own = task.state_dict()
    parts = {name: part_like(value, own.get(name, value)) for name, value in state.items()}
    missing, unexpected = task.load_state_dict(parts, strict=False)
    if missing or unexpected:
        raise UserError(
            f"The checkpoint {run.checkpoint_path} belongs to another model ({len(missing)} keys missing, "
            f"{len(unexpected)} unknown, e.g. {[*missing, *unexpected][0]}); use another run folder or "
            "delete it."
        )


def schedule(settings: TrainSettings, steps: int) -> dict[str, Any]:
    """What a continued run must have in common with its checkpoint: everything that moves the weights."""
    found = asdict(settings) | {"betas": list(settings.betas), "steps": steps}
    return {name: value for name, value in found.items() if name not in ("log_every", "checkpoint_every")}


def refuse_other_schedule(found: dict[str, Any], expected: dict[str, Any], run: Run) -> None:
    """Raises `UserError` with what differs between the checkpoint's settings and this run's."""
    differing = [name for name in expected if found.get(name) != expected[name]]
    if differing:
        made, wanted = (
            ", ".join(f"{name} {values.get(name)}" for name in differing) for values in (found, expected)
        )
        raise UserError(
            f"The checkpoint {run.checkpoint_path} was made with {made}, and this run has {wanted}; go on "
            "with the same settings, use another run folder or delete it."
        )


def all_finite(task: nn.Module) -> bool:
    """Whether every weight that this process holds is a finite number; one synchronisation."""
    return bool(torch.stack([own_part(parameter).isfinite().all() for parameter in task.parameters()]).all())


def loader(data: StepData, steps: range, workers: int) -> Iterable[list[Any]]:
    """The micro-batches of each step, in order. The data are a function of the step, so workers change speed
    only."""
    return DataLoader(
        data,  # type: ignore[arg-type]
        batch_size=None,
        sampler=steps,
        num_workers=workers,
        collate_fn=keep,
        worker_init_fn=prepare_worker if workers else None,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=False,
    )


def keep(batch: Any) -> Any:
    """Collation is done by the data themselves."""
    return batch


def prepare_worker(worker: int) -> None:
    """Workers are parallel already; OpenCV's and torch's own threads would fight them. Signals are the main
    process's."""
    import cv2

    ignore_signals()
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

"""A run: where it writes and the hardware it uses. Handed to everything that trains."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass as settings

from cfssl.engine.interruption import Interruption
from cfssl.errors import UserError
from cfssl.files import write_text
from cfssl.settings import STRICT, Count

Precision = Literal["32-true", "bf16-mixed", "16-mixed"]


@settings(frozen=True, config=STRICT)
class HardwareSettings:
    """`accelerator`: "auto" takes a GPU where there is one. `devices` of each of `nodes` machines pre-train
    together, with a process each (on a CPU: as many processes). `strategy`: with ddp each of them holds the
    whole model, with fsdp a part of every weight, for models that outgrow a device. `precision` as Lightning
    Fabric names it; `workers`: data loading processes of each, 0 loads in the main one; `threads` of torch,
    None for its own choice. `stage`: a folder on a disk of the node, e.g. $SLURM_TMPDIR, to which the bank is
    copied before the pre-training; environment variables are those of the node. None: the bank is read where
    it is."""

    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    devices: Count = 1
    nodes: Count = 1
    strategy: Literal["ddp", "fsdp"] = "ddp"
    precision: Precision = "32-true"
    workers: Annotated[int, Field(ge=0)] = 0
    threads: Count | None = None
    stage: Path | None = None

    @property
    def processes(self) -> int:
        """How many train together."""
        return self.devices * self.nodes

    @property
    def device(self) -> torch.device:
        """Where models are trained and used. Raises `UserError` when a GPU is asked for and there is none."""
        if self.accelerator == "gpu" and not torch.cuda.is_available():
            raise UserError("hardware.accelerator is gpu, and torch finds none here; set it to auto or cpu.")
        return torch.device("cuda" if self.accelerator != "cpu" and torch.cuda.is_available() else "cpu")


@contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
    """Torch computes with `count` threads inside, and with as many as before afterwards; None changes
    nothing."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Tracker(Protocol):
    """What receives every metrics line besides metrics.jsonl, e.g. a wandb run."""

    def log(self, metrics: dict[str, Any]) -> Any: ...
    def finish(self) -> Any: ...


@dataclass(frozen=True)
class Run:
    """`folder` receives metrics.jsonl and checkpoint.safetensors. `stop_at` ends training early
    at that step with a checkpoint. `interruption`: who is asked at every step whether it is the last one for
    now."""

    folder: Path
    hardware: HardwareSettings = field(default_factory=HardwareSettings)
    quiet: bool = False
    stop_at: int | None = None
    trackers: tuple[Tracker, ...] = ()
    interruption: Interruption = field(default_factory=Interruption)

    @property
    def metrics_path(self) -> Path:
        return self.folder / "metrics.jsonl"

    @property
    def checkpoint_path(self) -> Path:
        return self.folder / "checkpoint.safetensors"

    def log(self, metrics: dict[str, Any]) -> None:
        """Appends one line to metrics.jsonl; numbers keep six digits."""
        line = {
            key: float(f"{value:.6g}") if isinstance(value, float) else value
            for key, value in metrics.items()
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        with self.metrics_path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        for tracker in self.trackers:
            tracker.log(line)

    def close(self) -> None:
        """Ends the trackers' runs."""
        for tracker in self.trackers:
            tracker.finish()

    def forget_metrics_after(self, step: int) -> None:
        """Removes the lines of steps that will be done again after a resume."""
        if self.metrics_path.exists():
            lines = read_metrics(self.metrics_path)
            text = "".join(json.dumps(line) + "\n" for line in lines if line["step"] < step)
            write_text(self.metrics_path, text)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All whole lines of a metrics.jsonl; a last line cut short by a kill is left out."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if text.endswith("\n"):
            lines.append(json.loads(text))
    return lines

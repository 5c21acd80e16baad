"""Trainings for several processes: tasks and data at module level, so that other processes find them, and
`trained`, which runs them by as many as asked for.

The processes are forked from a server that has imported everything once.
"""

import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from view_toys import batch_of

from cfssl.data.views import ViewBatch, split
from cfssl.engine.interruption import Interruption
from cfssl.engine.loop import TrainSettings, fit
from cfssl.engine.processes import dismiss, follow, rank, together
from cfssl.engine.run import HardwareSettings, Run
from cfssl.models.backbone import BackboneSettings, create_backbone
from cfssl.objectives import create_objective
from cfssl.objectives.dinov2 import DINOv2Settings
from cfssl.objectives.teacher import Teacher
from cfssl.seeds import torch_generator

STEPS = 12


class Normed(nn.Module):
    """Convolutions with batch normalisation, a frozen layer, one that nothing depends on, and a buffer that
    moves once per step; a mean over images, in float64."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.net = nn.Sequential(
                nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 8)
            )
            self.head = nn.Sequential(nn.BatchNorm1d(8, affine=False, momentum=None), nn.Linear(8, 1))
            self.unused = nn.Linear(2, 2)
        self.net[0].bias.requires_grad_(False)
        self.register_buffer("steps_seen", torch.zeros(()))
        self.double()

    def forward(self, batch: torch.Tensor, step: int) -> dict[str, torch.Tensor]:
        found = self.head(self.net(batch)).squeeze(1)
        loss = (found - batch.mean((1, 2, 3)) * batch[:, 0, 2, 2]).square().mean()
        return {"loss": loss, "spread": found.detach().std()}

    def after_step(self, step: int) -> None:
        self.steps_seen += 1


@dataclass(frozen=True)
class Images:
    """16 images (1, 6, 6) per step in `parts` micro-batches. The process `fails` raises at step 5 by an
    error, or by SIGKILL where `killed`; the process `signalled` gets SIGUSR2 there."""

    parts: int = 1
    place: tuple[int, int] = (0, 1)
    fails: int | None = None
    killed: bool = False
    signalled: int | None = None

    def __len__(self) -> int:
        return STEPS

    def share(self, rank: int, size: int) -> "Images":
        return Images(self.parts, (rank, size), self.fails, self.killed, self.signalled)

    def __getitem__(self, step: int) -> list[torch.Tensor]:
        place, size = self.place
        if step == 5 and place == self.fails:
            if self.killed:
                os.kill(os.getpid(), signal.SIGKILL)
            raise ValueError("no image 5")
        if step == 5 and place == self.signalled:
            os.kill(os.getpid(), signal.SIGUSR2)
        images = torch.randn(16, 1, 6, 6, generator=torch_generator("images", step), dtype=torch.float64)
        return [part.chunk(size)[place] for part in images.chunk(self.parts)]


class Blocks(nn.Module):
    """A network with blocks as vision transformers have them, and a teacher of it that follows."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.student = Tower()
        self.teacher = Teacher({"tower": Tower()}, {"tower": self.student})

    def forward(self, batch: torch.Tensor, step: int) -> dict[str, torch.Tensor]:
        images = batch.float().flatten(1)
        with torch.no_grad():
            target = self.teacher["tower"](images)
        found = self.student(images.flip(1))
        return {"loss": (found - target - images[:, :1]).square().mean()}

    def after_step(self, step: int) -> None:
        self.teacher.follow({"tower": self.student}, 0.9)


class Tower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(36, 9)  # not a multiple of the processes
        self.blocks = nn.Sequential(*(nn.Sequential(nn.Linear(9, 9), nn.GELU()) for _ in range(3)))
        self.last = nn.Linear(9, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.blocks(self.first(x)))


@dataclass(frozen=True)
class Crops:
    """8 items with two views and two small ones per step."""

    place: tuple[int, int] = (0, 1)
    parts: int = 1

    def __len__(self) -> int:
        return STEPS

    def share(self, rank: int, size: int) -> "Crops":
        return Crops((rank, size))

    def __getitem__(self, step: int) -> list[ViewBatch]:
        generator, (place, size) = torch_generator("crops", step), self.place
        images, local = (torch.rand(8, 2, 1, side, side, generator=generator) for side in (32, 16))
        return [split(batch_of(images, local=local), size)[place]]


def dino() -> nn.Module:
    """All that DINOv2 has, on a vision transformer."""
    encoder = create_backbone(BackboneSettings("test_vit"), 1, 32, seed=0, any_size=True)
    settings = DINOv2Settings(prototypes=16, hidden=16, bottleneck=8)
    return create_objective(settings, encoder, 0, images=64, steps=STEPS)


def train(
    folder: Path,
    hardware: HardwareSettings,
    interruption: Interruption,
    data: Images | Crops,
    task: Callable[[], nn.Module] = Normed,
    **case: Any,
) -> None:
    """One process's part."""
    settings = TrainSettings(lr=1e-2, log_every=5, checkpoint_every=4, accumulate=data.parts, clip=1.0)
    run = Run(folder, hardware, quiet=True, interruption=interruption, **case)
    fit(task(), data, settings, run, "test")


def member(
    place: int, size: int, port: int, folder: Path, data: Images | Crops, strategy: str, case: dict[str, Any]
) -> None:
    """A process with the variables of torchrun, whose exit code says how it ended."""
    names = {"RANK": place, "WORLD_SIZE": size, "LOCAL_RANK": place, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in names.items()} | {"MASTER_ADDR": "127.0.0.1"}
    torch.set_num_threads(1)
    options: dict[str, Any] = {"devices": size, "strategy": strategy, "threads": 1}
    hardware = HardwareSettings(accelerator="cpu", **options)
    words = folder / f"{place}.txt"
    try:
        with Interruption().listening() as interruption:
            if place:
                follow(lambda order: train(folder, hardware, interruption, data, **case))
                return
            try:
                time.sleep(0.3)  # a stage
                with together(hardware, "train"):
                    train(folder, hardware, interruption, data, **case)
                assert rank() == 0
            finally:
                if size > 1:
                    dismiss()
    except BaseException as error:  # noqa: BLE001  how it ends is what is tested
        words.write_text(f"{type(error).__name__}: {error}")
        raise SystemExit(3) from None


def trained(
    folder: Path, size: int, data: Images | Crops = Images(), strategy: str = "ddp", **case: Any
) -> list[int | None]:
    """The exit codes of `size` processes that train together in `folder`."""
    folder.mkdir(exist_ok=True)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["cfssl.engine.fabric", "trainings", "lightly.utils.dist", "timm"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = [
        context.Process(target=member, args=(place, size, port, folder, data, strategy, case))
        for place in range(size)
    ]
    for process in running:
        process.start()
    for process in running:
        process.join(timeout=300)
    return [process.exitcode for process in running]

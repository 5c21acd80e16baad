"""Dense contrast against a memory of keys: VADeR (Pinheiro et al. 2020) and DenseCL (Wang et al. 2021).

Queries of the student in view 0 look for their key of the teacher in view 1, among the keys of earlier
images. What is compared differs: VADeR takes points of a decoder's map that show the same place; DenseCL
takes cells of the encoder's grid, each with the cell whose features are most similar, and contrasts the
pooled features as well. Neither compares images of a batch with each other, so micro-batches do no harm.

lightly's memory bank is not part of a checkpoint, and holds every dense key where DenseCL keeps their mean;
the queue here is saved with the objective, and takes keys once per optimiser step.
"""

import copy
import math
from typing import Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import nn

from cfssl.data.views import ViewBatch
from cfssl.models.backbone import feature_size
from cfssl.models.dense import DecoderSettings, Grid, create_dense, dense_head, gather_points
from cfssl.models.heads import lightly_head
from cfssl.objectives.gathered import gathered_uneven, mean_of_all
from cfssl.objectives.points import item_generators, matched_points
from cfssl.objectives.teacher import Teacher
from cfssl.seeds import torch_generator
from cfssl.settings import STRICT, Count, Positive, Probability

LARGEST = 65_536  # keys, as in both papers


@dataclass(frozen=True, config=STRICT)
class VADeRSettings:
    """`points`: matched per image. `queue`: keys that are remembered; null: those of a quarter of the images,
    at most 65,536. `momentum` of the teacher. `hidden` and `output`: widths of the head on single points."""

    name: Literal["vader"] = "vader"
    temperature: Positive = 0.07
    points: Count = 32
    queue: Count | None = None
    momentum: Probability = 0.999
    hidden: Count = 256
    output: Count = 128
    decoder: DecoderSettings = Field(default_factory=DecoderSettings)


@dataclass(frozen=True, config=STRICT)
class DenseCLSettings:
    """`dense_weight`: lambda, the share of the dense loss. `queue`: of either memory; null: a quarter of the
    images, at most 65,536. `momentum` of the teacher. `stride`: of the grid, in pixels; null: the encoder's
    last. `hidden` and `output`: widths of both heads."""

    name: Literal["densecl"] = "densecl"
    temperature: Positive = 0.2
    dense_weight: Probability = 0.5
    queue: Count | None = None
    momentum: Probability = 0.999
    stride: Count | None = None
    hidden: Count = 2048
    output: Count = 128


class Queue(nn.Module):
    """The last `size` keys (size, D), unit vectors; random ones before any came. `see` notes those of a
    micro-batch, of all processes, `move` takes in what a step has brought."""

    keys: torch.Tensor
    place: torch.Tensor

    def __init__(self, size: int, width: int, seed: int, name: str) -> None:
        super().__init__()
        first = torch.randn(size, width, generator=torch_generator(seed, name))
        self.register_buffer("keys", nn.functional.normalize(first, dim=1))
        self.register_buffer("place", torch.zeros((), dtype=torch.long))
        self._seen: list[torch.Tensor] = []  # empty between steps

    def see(self, keys: torch.Tensor) -> None:
        """Keys (N, D) of this process; N may be another one in each."""
        self._seen.append(gathered_uneven(keys.detach()))

    @torch.no_grad()
    def move(self) -> None:
        """The oldest make room."""
        if not self._seen:
            return
        keys = torch.cat(self._seen)[-len(self.keys) :]
        self._seen.clear()
        places = (self.place + torch.arange(len(keys), device=keys.device)) % len(self.keys)
        self.keys[places] = keys.to(self.keys.dtype)
        self.place.copy_((self.place + len(keys)) % len(self.keys))

    def contrast(self, q: torch.Tensor, positive: torch.Tensor, temperature: float) -> torch.Tensor:
        """InfoNCE (He et al. 2020, equation 1) of unit vectors `q` (N, D) with their `positive` keys (N, D)
        against the queue: (N,)."""
        own = (q * positive).sum(1, keepdim=True)
        logits = torch.cat([own, q @ self.keys.to(q.dtype).T], dim=1) / temperature
        return logits.logsumexp(1) - logits[:, 0]


def queue_size(asked: int | None, images: int, per_image: int) -> int:
    """How many keys a memory holds; see the settings."""
    return asked or min(LARGEST, max(256, math.ceil(images * per_image / 4)))


class VADeR(nn.Module):
    """`forward(batch, step)` takes two views per item and returns {"loss", "overlap"}; `network` holds
    encoder and decoder, `student`, the encoder, is what gets exported."""

    def __init__(
        self, encoder: nn.Module, settings: VADeRSettings, seed: int, images: int, channels: int
    ) -> None:
        """`images`: the number to train on. Raises `UserError` for an encoder that cannot be decoded."""
        super().__init__()
        self.settings, self.seed = settings, seed
        self.network = create_dense(encoder, settings.decoder, channels, seed)
        sizes = self.network.width, settings.hidden, settings.output
        self.head = dense_head(*sizes, seed)
        copies = {"network": copy.deepcopy(self.network), "head": dense_head(*sizes, seed)}
        self.teacher = Teacher(copies, self._students())
        size = queue_size(settings.queue, images, settings.points)
        self.queue = Queue(size, settings.output, seed, "vader queue")

    def _students(self) -> dict[str, nn.Module]:
        return {"network": self.network, "head": self.head}

    @property
    def student(self) -> nn.Module:
        """The encoder."""
        return self.network.encoder

    def forward(self, batch: ViewBatch, step: int) -> dict[str, torch.Tensor]:
        settings = self.settings
        first, second = (
            view.contiguous(memory_format=torch.channels_last) for view in batch.images.unbind(1)
        )
        generators = item_generators(batch.position, self.seed, "points", step)
        pair = matched_points(batch.affine, batch.valid, settings.points, generators)
        q = self.head(gather_points(self.network(first), pair.first))
        with torch.no_grad():
            k = self.teacher["head"](gather_points(self.teacher["network"](second), pair.second))
        with torch.autocast(q.device.type, enabled=False):
            q, k = (nn.functional.normalize(z.float(), dim=2) for z in (q, k))
            known = pair.is_known[:, None].expand(q.shape[:2])
            losses = self.queue.contrast(q.flatten(0, 1), k.flatten(0, 1), settings.temperature)
            weights = known.flatten().float()
            loss = mean_of_all((losses * weights).sum(), weights.sum())
            self.queue.see(k[pair.is_known].flatten(0, 1))
        return {"loss": loss, "overlap": pair.is_known.float().mean()}

    def after_step(self, step: int) -> None:
        """Teacher and queue follow."""
        self.teacher.follow(self._students(), self.settings.momentum)
        self.queue.move()


class DenseCL(nn.Module):
    """`forward(batch, step)` takes two views per item and returns {"loss", "whole", "dense"}; `student` is
    what gets exported."""

    def __init__(self, encoder: nn.Module, settings: DenseCLSettings, seed: int, images: int) -> None:
        """`images`: the number to train on. Raises `UserError` for a stride that the encoder lacks."""
        super().__init__()
        self.student, self.settings = encoder, settings
        self.grid = Grid(encoder, settings.stride)
        widths = {"whole": feature_size(encoder), "dense": self.grid.width}

        def heads() -> nn.ModuleDict:
            return nn.ModuleDict(
                {
                    name: lightly_head(
                        "DenseCLProjectionHead",
                        seed,
                        f"densecl {name}",
                        width,
                        settings.hidden,
                        settings.output,
                    )
                    for name, width in widths.items()
                }
            )

        self.heads = heads()
        self.teacher = Teacher({"encoder": copy.deepcopy(encoder), "heads": heads()}, self._students())
        size = queue_size(settings.queue, images, 1)
        self.queues = nn.ModuleDict(
            {name: Queue(size, settings.output, seed, f"densecl {name} queue") for name in widths}
        )

    def _students(self) -> dict[str, nn.Module]:
        return {"encoder": self.student, "heads": self.heads}

    def forward(self, batch: ViewBatch, step: int) -> dict[str, torch.Tensor]:
        from lightly.models.utils import select_most_similar

        settings = self.settings
        first, second = (
            view.contiguous(memory_format=torch.channels_last) for view in batch.images.unbind(1)
        )
        cells, pooled = self.grid(self.student, first)  # (B, N, C), (B, F)
        q = {"whole": self.heads["whole"](pooled), "dense": self.heads["dense"](cells)}
        with torch.no_grad():
            keys_of, pooled = self.grid(self.teacher["encoder"], second)
            heads = self.teacher["heads"]
            k = {"whole": heads["whole"](pooled), "dense": heads["dense"](keys_of)}  # type: ignore[index]
        with torch.autocast(pooled.device.type, enabled=False):
            q, k = (
                {name: nn.functional.normalize(z.float(), dim=-1) for name, z in part.items()}
                for part in (q, k)
            )
            matched = select_most_similar(cells.detach().float(), keys_of.float(), k["dense"])
            pairs = {
                "whole": (q["whole"], k["whole"], k["whole"]),
                # the memory keeps one key per image, the mean of its cells
                "dense": (
                    q["dense"].flatten(0, 1),
                    matched.flatten(0, 1),
                    nn.functional.normalize(k["dense"].mean(1), dim=1),
                ),
            }
            parts = {}
            for name, (queries, positives, seen) in pairs.items():
                queue = self.queues[name]
                assert isinstance(queue, Queue)
                parts[name] = queue.contrast(queries, positives, settings.temperature).mean()
                queue.see(seen)
            weight = settings.dense_weight
            return {"loss": (1 - weight) * parts["whole"] + weight * parts["dense"], **parts}

    def after_step(self, step: int) -> None:
        """Teacher and queues follow."""
        self.teacher.follow(self._students(), self.settings.momentum)
        for queue in self.queues.values():
            assert isinstance(queue, Queue)
            queue.move()

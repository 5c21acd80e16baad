"""What a loss gives in one process, and as a script what it gives in two.

    python processes.py RANK FOLDER

Two of them, with ranks 0 and 1, meet through a file in FOLDER, take half of the items each, and write what
they find to FOLDER/RANK.npz: losses, gradients averaged over the processes as DDP does, targets and centres;
of every objective also its buffers after the step.
"""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import distributed

from cfssl.data.geometry import GeometrySettings
from cfssl.data.views import ViewBatch, split
from cfssl.engine.norms import pool_statistics
from cfssl.models.backbone import BackboneSettings, create_backbone
from cfssl.models.dense import DecoderSettings
from cfssl.objectives import ObjectiveSettings, create_objective
from cfssl.objectives.baselines import BarlowTwinsSettings, BYOLSettings, MoCoSettings, VICRegSettings
from cfssl.objectives.dense import DVDSettings, MVDSettings, SDVDSettings, SMVDSettings
from cfssl.objectives.dense_loss import multi_view_loss, pair_loss
from cfssl.objectives.dinov2 import DINOv2Settings
from cfssl.objectives.grids import DetConSettings, PixProSettings, VICRegLSettings
from cfssl.objectives.local_regions import LocalRegionsSettings
from cfssl.objectives.queues import DenseCLSettings, VADeRSettings
from cfssl.objectives.segmentation import SegmentationSettings
from cfssl.objectives.simclr import SimCLR, SimCLRSettings
from cfssl.objectives.supervised import SupervisedSettings
from cfssl.objectives.teacher import Centre, sinkhorn_targets

COUNT, WORLD = 12, 2
SMALL = {"hidden": 16, "output": 8}
DECODER = DecoderSettings(widths=(16, 8, 8, 8, 8), stride=2)
DENSE = SMALL | {"points": 30, "decoder": DECODER}
BOTH = ("left", "right")
OBJECTIVES: tuple[ObjectiveSettings, ...] = (
    SimCLRSettings(**SMALL),
    BYOLSettings(**SMALL),
    MoCoSettings(**SMALL),
    VICRegSettings(**SMALL),
    BarlowTwinsSettings(**SMALL),
    DINOv2Settings(prototypes=12, hidden=16, bottleneck=8, mask_probability=0.8),
    DINOv2Settings(prototypes=12, hidden=16, bottleneck=8, batch_norm=True, centring="sinkhorn"),
    DVDSettings(**DENSE, exclusion_radius=0.1),
    SDVDSettings(**DENSE, structures=BOTH),
    MVDSettings(**DENSE),
    SMVDSettings(**DENSE, structures=BOTH),
    VADeRSettings(**DENSE, queue=300),
    DenseCLSettings(**SMALL, queue=64, stride=8),
    PixProSettings(**SMALL, stride=8, distance=0.4),
    VICRegLSettings(**SMALL, stride=8, matches=(10, 4)),
    DetConSettings(**SMALL, structures=BOTH, stride=8),
    LocalRegionsSettings(output=8, decoder=DECODER),
    SegmentationSettings(structures=BOTH, decoder=DECODER),
    SupervisedSettings(target="patient"),
)
CROPS = GeometrySettings(crop_scale=(0.1, 0.4))  # some pairs of views do not overlap
PATIENT = torch.tensor([0, 0, 1, 2, -1, 3, 0, 4, 1, -1, 5, 5])  # shared within and across the processes


class Linear(torch.nn.Module):
    """(B, 1, 4, 4) -> (B, 8), without batch statistics."""

    num_features = 8

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(
            torch.randn(16, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1) @ self.weight


def dense_losses(items: slice) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Of the items' 5 points in 2 views of 6 channels, with the parameter: by place and by label, with images
    without overlap and weights; the last half of the items is all background in one of them."""
    generator = torch.Generator().manual_seed(2)
    points = torch.randn(COUNT, 2, 5, 6, generator=generator, dtype=torch.float64)[items]
    source = 2 * torch.rand(COUNT, 2, 5, 2, generator=generator)[items] - 1
    weight = torch.rand(COUNT, 2, 5, generator=generator, dtype=torch.float64)[items]
    labels = torch.randint(-1, 3, (COUNT, 2, 5), generator=generator)
    uneven = torch.where(torch.arange(COUNT)[:, None, None] < COUNT // 2, labels, 0)[items]
    labels = labels[items]
    known = (torch.arange(2 * COUNT) % 5 > 0).reshape(COUNT, 2)[items]

    def pair(z: torch.Tensor, **case: object) -> torch.Tensor:
        return pair_loss(*z.unbind(1), 0.3, is_known=known[:, 0], weight=weight[:, 0], **case)

    def views(z: torch.Tensor, **case: object) -> torch.Tensor:
        return multi_view_loss(z, 0.3, is_known=known, weight=weight, **case)

    losses = {
        "pair_place": lambda z: pair(z, source=source[:, 0], exclusion_radius=0.3),
        "pair_label": lambda z: pair(z, labels=tuple(labels.unbind(1)), background_anchors=True),
        "pair_uneven": lambda z: pair(z, labels=tuple(uneven.unbind(1))),
        "views_place": lambda z: views(z, source=source, radius=0.3),
        "views_label": lambda z: views(z, labels=labels),
        "views_uneven": lambda z: views(z, labels=uneven),
    }
    projections = torch.randn(6, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    results = {}
    for name, loss in losses.items():
        projection = projections.clone().requires_grad_()
        results[name] = loss(points @ projection), projection
    return results


def one_step(settings: ObjectiveSettings, batch: ViewBatch) -> dict[str, torch.Tensor]:
    """Loss, gradient by all parameters, and buffers after the step; mostly in float64."""
    is_dino = isinstance(settings, DINOv2Settings)
    encoder = create_backbone(
        BackboneSettings("test_vit" if is_dino else "test_resnet"), 1, 32, seed=0, any_size=is_dino
    )
    task = create_objective(settings, encoder, 0, images=64, steps=20, channels=1, classes=6)
    task.double().train()
    pool_statistics(task, torch.device("cpu"))
    loss = task(batch, 3)["loss"]
    loss.backward()
    gradients = [
        torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for parameter in task.parameters()
    ]
    task.after_step(3)
    saved = task.state_dict()  # lightly has other buffers, which it leaves uninitialised
    buffers = [buffer.double().flatten() for name, buffer in task.named_buffers() if name in saved]
    return {
        "loss": loss.detach(),
        "gradients": torch.cat([gradient.flatten() for gradient in gradients]),
        "buffers": torch.cat([*buffers, torch.zeros(0)]),
    }


def batch_for_all(parts: int) -> list[ViewBatch]:
    """A scene, in equal parts."""
    from dense_toys import scene
    from view_toys import batch_of

    batch = scene(COUNT, 2, CROPS)
    generator = torch.Generator().manual_seed(4)
    local = torch.rand(COUNT, 3, 1, 16, 16, generator=generator, dtype=torch.float64)
    attributes = {"patient": PATIENT.clamp_min(0)}
    whole = replace(batch, images=batch.images.double(), local=batch_of(local), attributes=attributes)
    return split(whole, parts)


def found(items: slice) -> dict[str, np.ndarray]:
    """Of the items of one process, or of all."""
    from view_toys import batch_of

    results = {}
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(COUNT, 2, 1, 4, 4, generator=generator, dtype=torch.float64)[items]
    for column in (None, "patient"):
        settings = SimCLRSettings(hidden=8, output=4, batch_norm=False, false_negatives=column)
        task = SimCLR(Linear(), settings, seed=0).double()
        loss = task(batch_of(images, {"patient": PATIENT[items]}), 0)["loss"]
        loss.backward()
        gradients = torch.cat([parameter.grad.flatten() for parameter in task.parameters()])
        results |= {f"loss_{column}": loss.detach(), f"gradients_{column}": gradients}
    for name, (loss, projection) in dense_losses(items).items():
        loss.backward()
        results |= {f"loss_{name}": loss.detach(), f"gradients_{name}": projection.grad}
    logits = torch.randn(COUNT, 5, generator=generator, dtype=torch.float64)[items]
    results["sinkhorn"] = sinkhorn_targets(logits, 0.3)
    centre = Centre(5, momentum=0.9).double()
    centre.see(logits[:2])
    centre.see(logits[2:])
    centre.move()
    results["centre"] = centre.value
    rank, size = (distributed.get_rank(), WORLD) if distributed.is_initialized() else (0, 1)
    for number, settings in enumerate(OBJECTIVES):
        for name, value in one_step(settings, batch_for_all(size)[rank]).items():
            results[f"{name}_{number}_{settings.name}"] = value
    if distributed.is_initialized():
        for name, value in results.items():
            if name.startswith(("loss", "gradients")):
                distributed.all_reduce(value)
                value /= WORLD
    return {name: value.numpy() for name, value in results.items()}


if __name__ == "__main__":
    rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=WORLD
    )
    part = COUNT // WORLD
    np.savez(folder / f"{rank}.npz", **found(slice(rank * part, (rank + 1) * part)))
    distributed.destroy_process_group()

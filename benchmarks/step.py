"""How long is a training step of SimCLR and DINOv2 beside the same step written on lightly's parts?

    python benchmarks/step.py [--repeats 15]

Both train the same timm encoder with the same heads, losses, optimiser and images; ours is the objective as
the loop runs it, theirs the step of lightly's own benchmarks (all global crops in one encoder call, all local
ones in another). One process with one thread, CPU time, the two taking turns; a ratio is taken within a
repeat, and a figure is the median over repeats. Let nothing else run.
"""

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch
from lightly.loss import DINOLoss, IBOTPatchLoss, KoLeoLoss, NTXentLoss
from lightly.models.modules import DINOv2ProjectionHead, MaskedVisionTransformerTIMM, SimCLRProjectionHead
from lightly.models.utils import random_block_mask, update_momentum
from record import markdown_table, over_repeats, write_results
from torch import nn

from cfssl.data.views import ViewBatch
from cfssl.engine.loop import weight_decay_groups
from cfssl.models.backbone import BackboneSettings, create_backbone, feature_size
from cfssl.objectives.dinov2 import DINOv2, DINOv2Settings
from cfssl.objectives.simclr import SimCLR, SimCLRSettings
from cfssl.seeds import torch_generator

SIZE, LOCAL_SIZE, LOCAL = 64, 32, 4
BATCH = {"simclr": 64, "dino": 16}
PROTOTYPES, HIDDEN, BOTTLENECK, OUTPUT = 4096, 512, 256, 128
STEP, STEPS = 500, 1000  # in the middle of a training
BACKBONES = {
    "resnet18": BackboneSettings("resnet18"),
    "vit_tiny": BackboneSettings("vit_tiny_patch16_224", options={"patch_size": 8, "depth": 6}),
}
Step = Callable[[], object]


def encoder_of(network: str) -> nn.Module:
    return create_backbone(BACKBONES[network], 1, SIZE, seed=0, any_size=True)


def batch_of(method: str) -> ViewBatch:
    """Noise; what the images show costs nothing."""
    count, generator = BATCH[method], torch_generator("step")

    def views(number: int, size: int, local: ViewBatch | None) -> ViewBatch:
        return ViewBatch(
            images=torch.rand(count, number, 1, size, size, generator=generator),
            is_counterfactual=torch.zeros(count, number, dtype=torch.bool),
            slot=torch.zeros(count, number, dtype=torch.long),
            affine=torch.zeros(count, number, 2, 3),
            valid=torch.ones(count, number, size, size, dtype=torch.bool),
            attributes={},
            row=torch.arange(count),
            position=tuple(range(count)),
            local=local,
        )

    return views(2, SIZE, views(LOCAL, LOCAL_SIZE, None) if method == "dino" else None)


def optimiser_of(task: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(weight_decay_groups(task, 0.04), lr=1e-6, fused=True)


def ours(method: str, network: str) -> Step:
    """The objective, as the loop runs it."""
    encoder, batch = encoder_of(network), batch_of(method)
    task: nn.Module
    if method == "simclr":
        task = SimCLR(encoder, SimCLRSettings(hidden=HIDDEN, output=OUTPUT), seed=0)
    else:
        weight = 0.0 if network == "resnet18" else 1.0
        settings = DINOv2Settings(
            prototypes=PROTOTYPES, hidden=HIDDEN, bottleneck=BOTTLENECK, ibot_weight=weight
        )
        task = DINOv2(encoder, settings, 0, images=STEPS * 16, steps=STEPS)
    optimiser = optimiser_of(task)

    def step() -> None:
        task(batch, STEP)["loss"].backward()
        if isinstance(task, DINOv2):
            task.before_step(STEP)
        optimiser.step()
        task.after_step(STEP)  # type: ignore[operator]
        optimiser.zero_grad()

    return step


def theirs(method: str, network: str) -> Step:
    """The same from lightly's parts."""
    encoder, batch = encoder_of(network), batch_of(method)
    views = [view.contiguous(memory_format=torch.channels_last) for view in batch.images.unbind(1)]
    features = feature_size(encoder)
    if batch.local is None:  # SimCLR
        projector = SimCLRProjectionHead(features, HIDDEN, OUTPUT)
        contrast, model = NTXentLoss(0.1), nn.ModuleList([encoder, projector])
        optimiser = optimiser_of(model)

        def contrastive() -> None:
            contrast(*projector(encoder(torch.cat(views))).chunk(2)).backward()
            optimiser.step()
            optimiser.zero_grad()

        return contrastive

    small = [view.contiguous(memory_format=torch.channels_last) for view in batch.local.images.unbind(1)]
    masked = network != "resnet18"

    def networks() -> nn.ModuleDict:
        model = encoder_of(network)
        if masked:
            model = MaskedVisionTransformerTIMM(
                model, weight_initialization="skip", pos_embed_initialization="skip"
            )
        heads = {"dino": DINOv2ProjectionHead(features, HIDDEN, BOTTLENECK, PROTOTYPES)}
        heads |= {"ibot": DINOv2ProjectionHead(features, HIDDEN, BOTTLENECK, PROTOTYPES)} if masked else {}
        return nn.ModuleDict({"encoder": model, **heads})

    student, teacher = networks(), networks()
    teacher.load_state_dict(student.state_dict())
    teacher.requires_grad_(False)
    dino, ibot, koleo = DINOLoss(PROTOTYPES), IBOTPatchLoss(PROTOTYPES), KoLeoLoss()
    optimiser, patches = optimiser_of(student), SIZE // 8

    def distillation() -> None:
        images = torch.cat(views)
        mask = random_block_mask((len(images), patches, patches)) if masked else None
        with torch.no_grad():
            if mask is not None:
                tokens = teacher["encoder"].encode(images)
                said, said_patches = tokens[:, 0], teacher["ibot"](tokens[:, 1:][mask.flatten(1)])
            else:
                said = teacher["encoder"](images)
            said = teacher["dino"](said).chunk(2)
        if mask is not None:
            none = torch.zeros(len(images), 1, dtype=torch.bool)
            tokens = student["encoder"].encode(images, mask=torch.cat([none, mask.flatten(1)], 1))
            seen, patch_logits = tokens[:, 0], student["ibot"](tokens[:, 1:][mask.flatten(1)])
        else:
            seen = student["encoder"](images)
        local = student["encoder"](torch.cat(small))
        logits = [*student["dino"](seen).chunk(2), *student["dino"](local).chunk(LOCAL)]
        loss = dino(list(said), logits, teacher_temp=0.07)
        loss = loss + 0.1 * sum(koleo(view) for view in seen.chunk(2))
        if mask is not None and mask.any():
            loss = loss + ibot(said_patches, patch_logits, mask, teacher_temp=0.07)
        loss.backward()
        optimiser.step()
        update_momentum(student, teacher, 0.996)
        optimiser.zero_grad()

    return distillation


def speeds(repeats: int) -> dict[str, np.ndarray]:
    """`WHOSE/METHOD/NETWORK` (repeats,): milliseconds per step.

    The two of a pair go first in turn, and a step that is not timed goes before them: the first one after a
    step of other sizes pays for memory that the next finds ready, an eighth of it on the vision transformer.
    """
    found: dict[str, list[float]] = {}
    for method, network in ((method, network) for method in BATCH for network in BACKBONES):
        steps = {"ours": ours(method, network), "theirs": theirs(method, network)}
        for repeat in range(repeats):
            first, second = list(steps)[:: 1 if repeat % 2 == 0 else -1]
            steps[second]()
            for whose in (first, second):
                begun = time.process_time()
                steps[whose]()
                taken = 1000 * (time.process_time() - begun)
                found.setdefault(f"{whose}/{method}/{network}", []).append(taken)
    return {key: np.array(values) for key, values in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    begun = time.monotonic()
    found = speeds(repeats)
    figures, rows = {}, []
    for method, count in BATCH.items():
        ratios = {n: found[f"ours/{method}/{n}"] / found[f"theirs/{method}/{n}"] for n in BACKBONES}
        name, unit = f"{method}_step_ratio_vs_lightly", "ours / theirs"
        # of both encoders: the geometric mean within a repeat
        figures[name] = over_repeats(np.exp(np.mean(np.log(list(ratios.values())), axis=0)), unit)
        for network, values in ratios.items():
            figures[f"{name}_{network}"] = entry = over_repeats(values, unit)
            times = [np.median(found[f"{whose}/{method}/{network}"]) for whose in ("ours", "theirs")]
            cells = [f"{milliseconds:.0f}" for milliseconds in times]
            rows.append([method, network, str(count), *cells, text(entry)])
    header = ["method", "encoder", "images", "ours, ms", "lightly's parts, ms", "ratio [95 %]"]
    tables = (
        markdown_table(header, rows)
        + "\n"
        + markdown_table(["figure", "value [95 %]"], [[name, text(entry)] for name, entry in figures.items()])
    )
    minutes = (time.monotonic() - begun) / 60
    write_results("step", figures, protocol(repeats), (0,), minutes, tables)


def text(entry: dict[str, float]) -> str:
    return f"{entry['value']:.3f} [{entry['low']:.3f}, {entry['high']:.3f}]"


def protocol(repeats: int) -> dict[str, str]:
    return {
        "step": "forward, backward, AdamW, teacher and centres; the same noise images in memory, CPU time, "
        f"one thread; {repeats} repeats, ours and theirs first in turn, after a step that is not timed; "
        "medians, ratios within a repeat",
        "simclr": f"two views of {SIZE} px, head {HIDDEN}-{OUTPUT} with batch normalisation",
        "dino": f"two views of {SIZE} px and {LOCAL} of {LOCAL_SIZE} px, {PROTOTYPES} prototypes, DINO and "
        "KoLeo, with iBOT on vit_tiny (6 blocks, patches of 8 px)",
    }


if __name__ == "__main__":
    main()

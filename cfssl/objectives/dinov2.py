"""DINOv2 (Oquab et al. 2024): DINO (Caron et al. 2021) between views, iBOT (Zhou et al. 2022) on masked
patches, and KoLeo (Sablayrolles et al. 2019). With counterfactual views CF-DINO (Roschewitz et al. 2025).

    L = w_d L_DINO + w_i L_iBOT + w_k L_KoLeo

The student sees two global views, with some of their patches masked, and L local ones; the teacher, a moving
average of the student, sees the global ones whole. L_DINO: for the class token of every student view, the
cross-entropy with the teacher's targets of the other views. L_iBOT: for every masked patch, the same with the
teacher's targets of that patch; its mean over the masked patches of a view, then over views. L_KoLeo:
-log of the distance of each image's feature to its nearest neighbour, summed over the two global views.

The published CF-DINO starts the heads of teacher and student apart, and blurs where it should not (see
`views`); here the teacher starts as the student's copy, as in DINOv2 itself.
"""

import copy
import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import nn

from cfssl.data.views import ViewBatch
from cfssl.engine.schedules import cosine, linear
from cfssl.errors import UserError
from cfssl.models.backbone import feature_size, has_patch_tokens
from cfssl.models.heads import dino_head
from cfssl.objectives.gathered import gathered
from cfssl.objectives.teacher import (
    Centre,
    Teacher,
    entropies,
    patches_cross_entropy,
    running_statistics_held,
    sinkhorn_targets,
    softmax_targets,
    views_cross_entropy,
)
from cfssl.seeds import derive_seed
from cfssl.settings import STRICT, Count, NonNegative, Positive, Probability, ShareRange

VIEWS = 2  # global ones


@dataclass(frozen=True, config=STRICT)
class DINOv2Settings:
    """`prototypes`: K, None for a number that follows that of the training images; `hidden` and `bottleneck`:
    widths of the heads; `shared_head`: one for both losses; `batch_norm`: in the head of the class tokens,
    for small batches of convolutional encoders. `centring`: how the teacher's logits become targets. The
    teacher's temperature rises linearly to `teacher_temperature` over the share `temperature_warmup` of all
    steps, its `momentum` by half a cosine to 1, and the prototypes stand still for the share
    `freeze_last_layer`. A view is masked with `mask_probability`, on a share of its patches drawn from
    `mask_ratio`."""

    name: Literal["dinov2"] = "dinov2"
    prototypes: Annotated[int, Field(ge=2)] | None = None
    hidden: Count = 2048
    bottleneck: Count = 256
    shared_head: bool = False
    batch_norm: bool = False
    dino_weight: NonNegative = 1.0
    ibot_weight: NonNegative = 1.0
    koleo_weight: NonNegative = 0.1
    centring: Literal["softmax", "sinkhorn"] = "softmax"
    centre_momentum: Probability = 0.9
    student_temperature: Positive = 0.1
    first_teacher_temperature: Positive = 0.04
    teacher_temperature: Positive = 0.07
    temperature_warmup: Probability = 0.3
    momentum: Probability = 0.992
    freeze_last_layer: Probability = 0.01
    mask_probability: Probability = 0.5
    mask_ratio: ShareRange = (0.1, 0.5)

    def __post_init__(self) -> None:
        if not self.dino_weight + self.ibot_weight:
            raise ValueError("dino_weight and ibot_weight are both 0; give one of them a weight above 0")
        # A batch may hold one masked patch or none, which have no statistics.
        if self.batch_norm and self.shared_head and self.ibot_weight:
            raise ValueError("batch_norm is for a head of class tokens alone; set shared_head: false")


def default_prototypes(images: int) -> int:
    """The power of two nearest to a twentieth of the training images, which is the 65,536 of the papers for
    their 1.3 million; at least 128, at most 65,536."""
    return 2 ** min(16, max(7, round(math.log2(images / 20))))


def check_masking(settings: DINOv2Settings, encoder: nn.Module) -> None:
    """Raises `UserError` when iBOT is asked of an encoder without patch tokens."""
    if settings.ibot_weight and not has_patch_tokens(encoder):
        raise UserError(
            f"objective.ibot_weight is {settings.ibot_weight}, but {type(encoder).__name__} has no patch "
            "tokens to mask; set objective.ibot_weight: 0 or choose a vision transformer as backbone.name."
        )


class DINOv2(nn.Module):
    """`forward(batch, step)` takes two global views per item and any number of local ones, and returns
    {"loss", "dino", "ibot", "koleo", "teacher_entropy", "marginal_entropy"}, without the parts of iBOT and
    KoLeo where their weight is 0; `student` is what gets exported."""

    views = VIEWS

    def __init__(
        self, encoder: nn.Module, settings: DINOv2Settings, seed: int, images: int, steps: int
    ) -> None:
        """`images`: the number to train on; `steps`: of the whole training. Raises `UserError` when iBOT is
        asked of an encoder without patch tokens."""
        super().__init__()
        from lightly.loss import KoLeoLoss

        check_masking(settings, encoder)

        self.settings, self.seed, self.steps = settings, seed, steps
        self.prototypes = settings.prototypes or default_prototypes(images)
        self.student = encoder
        features = feature_size(encoder)

        def head(name: str) -> nn.Module:
            batch_norm = settings.batch_norm and name == "dino_head"
            sizes = features, settings.hidden, settings.bottleneck, self.prototypes
            return dino_head(*sizes, batch_norm, seed, name)

        names = ["dino_head"]
        if settings.ibot_weight:
            self.mask_token = nn.Parameter(torch.zeros(features))
            names += [] if settings.shared_head else ["ibot_head"]
        self.heads = nn.ModuleDict({name: head(name) for name in names})
        copies = {name: head(name) for name in names}
        self.teacher = Teacher({"encoder": copy.deepcopy(encoder), **copies}, self._students())
        # The logits of classes and of patches have means of their own, also behind a shared head.
        self.dino_centre = Centre(self.prototypes, settings.centre_momentum)
        self.ibot_centre = Centre(self.prototypes, settings.centre_momentum)
        self.koleo = KoLeoLoss()

    def _students(self) -> dict[str, nn.Module]:
        return {"encoder": self.student, **self.heads}

    def forward(self, batch: ViewBatch, step: int) -> dict[str, torch.Tensor]:
        settings, count = self.settings, len(batch)
        warmup = round(settings.temperature_warmup * self.steps)
        temperature = linear(step, warmup, settings.first_teacher_temperature, settings.teacher_temperature)
        images = stacked(batch.images)
        masks = self.masks(batch.position, step, images) if settings.ibot_weight else None  # (2B, h, w)
        # Places of the masked patches among all; counted before anything moves to the device.
        places = masks.flatten().nonzero().squeeze(1) if masks is not None else None

        with torch.no_grad():
            pooled, patches = encoded(self.teacher["encoder"], images, places)
            teacher_logits = self.teacher["dino_head"](by_view(pooled, count).flatten(0, 1))  # (2B, K)
            teacher_patches = self._patch_logits(self.teacher, patches)
        if masks is not None:
            with masked(self.student, masks.to(images.device), self.mask_token):
                pooled, patches = encoded(self.student, images, places)
        else:
            pooled, patches = encoded(self.student, images, None)
        features = by_view(pooled, count)  # (2, B, F)
        seen = [features]
        if batch.local is not None:
            # Small crops have statistics of their own; the encoder is used on whole images.
            with running_statistics_held(self.student):
                seen.append(by_view(self.student(stacked(batch.local.images)), count))
        logits = self.heads["dino_head"](torch.cat(seen).flatten(0, 1))
        logits = logits.unflatten(0, (-1, count))  # (2 + L, B, K)
        patch_logits = self._patch_logits(self.heads, patches)

        with torch.autocast(images.device.type, enabled=False):
            targets = self.targets(teacher_logits.float(), self.dino_centre, temperature)
            targets = targets.unflatten(0, (VIEWS, count))
            parts = {"dino": views_cross_entropy(targets, logits.float(), settings.student_temperature)}
            loss = settings.dino_weight * parts["dino"]
            if masks is not None:
                weights = (1 / masks.sum((1, 2), keepdim=True) / len(masks)).expand_as(masks)[masks]
                patch_targets = self.targets(teacher_patches.float(), self.ibot_centre, temperature)
                parts["ibot"] = patches_cross_entropy(
                    patch_targets,
                    patch_logits.float(),
                    weights.to(images.device),
                    settings.student_temperature,
                )
                loss = loss + settings.ibot_weight * parts["ibot"]
            if settings.koleo_weight:
                parts["koleo"] = torch.stack([self.koleo(gathered(view)) for view in features.float()]).sum()
                loss = loss + settings.koleo_weight * parts["koleo"]
            return {"loss": loss, **parts, **entropies(targets)}

    def targets(self, logits: torch.Tensor, centre: Centre, temperature: float) -> torch.Tensor:
        """Of the teacher's logits (N, K) float32; the centre has seen them afterwards."""
        if self.settings.centring == "sinkhorn":
            return sinkhorn_targets(logits, temperature)
        targets = softmax_targets(logits, centre.value, temperature)
        centre.see(logits)
        return targets

    def masks(self, positions: Sequence[int], step: int, images: torch.Tensor) -> torch.Tensor:
        """Block masks (2B, h, w) of the items of a step at B `positions`, on the CPU: a function of the seed,
        the step and the position, so that micro-batches have the masks of the whole batch."""
        grid = self.student.patch_embed.dynamic_feat_size(tuple(images.shape[-2:]))  # type: ignore[union-attr, operator]
        settings = self.settings
        seeds = [
            derive_seed(self.seed, "mask", step, position, view)
            for position in positions
            for view in range(VIEWS)
        ]
        return block_masks(seeds, grid, settings.mask_probability, settings.mask_ratio)

    def before_step(self, step: int) -> None:
        """Takes the gradients of the prototypes away while they stand still."""
        if step < round(self.settings.freeze_last_layer * self.steps):
            for head in self.heads.values():
                for parameter in head.last_layer.parameters():  # type: ignore[union-attr]
                    parameter.grad = None

    def after_step(self, step: int) -> None:
        """Teacher and centres follow."""
        self.teacher.follow(self._students(), cosine(step, self.steps, self.settings.momentum, 1.0))
        self.dino_centre.move()
        self.ibot_centre.move()

    def _patch_logits(self, heads: nn.ModuleDict, patches: torch.Tensor) -> torch.Tensor:
        """Of patch tokens (N, F): (N, K). Without iBOT there are none, and nothing that would take them."""
        if not self.settings.ibot_weight:
            return patches
        return heads["ibot_head" if "ibot_head" in heads else "dino_head"](patches)


def stacked(images: torch.Tensor) -> torch.Tensor:
    """(B, V, C, H, W) -> (B V, C, H, W), the views of an item side by side."""
    return images.flatten(0, 1).contiguous(memory_format=torch.channels_last)


def by_view(features: torch.Tensor, count: int) -> torch.Tensor:
    """(B V, F) of `count` = B items -> (V, B, F)."""
    return features.unflatten(0, (count, -1)).transpose(0, 1)


def encoded(
    encoder: nn.Module, images: torch.Tensor, places: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The features (N, F) that the encoder exports, and the patch tokens (P, F) at `places` (P,) among those
    of all images; without places none are taken."""
    if places is None:
        pooled = encoder(images)
        return pooled, pooled[:0]
    tokens = encoder.forward_features(images)  # type: ignore[operator]
    patches = tokens[:, encoder.num_prefix_tokens :].flatten(0, 1)
    pooled = encoder.forward_head(tokens, pre_logits=True)  # type: ignore[operator]
    return pooled, patches[places.to(images.device)]


@contextmanager
def masked(encoder: nn.Module, masks: torch.Tensor, token: torch.Tensor) -> Iterator[None]:
    """Inside, the encoder sees `token` (F,) in place of the patches in `masks` (N, h, w), before positions
    are added. This leaves the timm model as it is, and serves images of any shape."""

    def replace(module: nn.Module, inputs: object, tokens: torch.Tensor) -> torch.Tensor:
        where = masks if tokens.ndim == 4 else masks.flatten(1)  # (N, h, w, F), or (N, h w, F)
        return torch.where(where[..., None], token.to(tokens.dtype), tokens)

    handle = encoder.patch_embed.register_forward_hook(replace)  # type: ignore[union-attr]
    try:
        yield
    finally:
        handle.remove()


def block_masks(
    seeds: list[int], grid: tuple[int, int], probability: float, ratio: tuple[float, float]
) -> torch.Tensor:
    """One mask per seed, (N, h, w) bool: none at all, or with `probability` blocks that cover a share of the
    patches drawn from `ratio`, or a little less where blocks do not fit (DINOv2's masking, from lightly)."""
    from lightly.models.utils import random_block_mask_image

    found = torch.zeros(len(seeds), *grid, dtype=torch.bool)
    before = random.getstate()  # lightly draws from the global stream
    try:
        for mask, seed in zip(found, seeds, strict=True):
            random.seed(seed)
            if random.random() < probability:
                count = int(grid[0] * grid[1] * random.uniform(*ratio))
                mask[:] = random_block_mask_image(grid, count, min_num_masks_per_block=min(4, count))
    finally:
        random.setstate(before)
    return found

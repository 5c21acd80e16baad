"""The published networks, built from architecture strings; De Sousa Ribeiro et al. 2023, appendix, and the
sizes of their public code. The walk over the levels is in hvae_network.py.

"32b3d2,16b3d2,...,1b4" is an encoder: at 32 pixels 3 blocks, then one that halves, and so on down to 1 pixel.
"1b4,4b4,...,32b4" is a decoder: 4 levels at 1 pixel, 4 at 4 pixels, and so on. A level above `z_max_res`
pixels has no latent of its own: its z is the prior's mean.

Kept from the published code: the residual blocks ("default": GELU, 1x1, 3x3, 3x3, 1x1 at a quarter of the
width; "light": ReLU, two 3x3), the last convolution of a block scaled by sqrt(1 / blocks), priors that start
at N(0, 1), a learned bias map per resolution up to 64 pixels, parents broadcast and concatenated.
Done otherwise: log sigmas of z are clamped; what nothing reads is not built (the last z-path, the scales of
levels without a latent); odd resolutions are kept (the published encoder pads 7x7 to 8x8, which leaves its
7x7 levels without a feature map); a first stage without a block, which breaks its channel arithmetic, is
refused.
"""

import dataclasses
import itertools
import math
import re
from typing import Literal, Self

import torch
from pydantic import model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.nn import functional as F

from cfssl.errors import UserError
from cfssl.generators.hvae_likelihood import Gaussian, GaussianHead, Likelihood, SigmaKind
from cfssl.generators.hvae_network import HVAE, LOG_SIGMA_Z, with_context
from cfssl.settings import STRICT, Count

BlockKind = Literal["default", "light"]
SizeName = Literal["morphomnist", "ukbb64", "ukbb192", "mimic192", "mimic224", "embed224", "celeba64"]

BIAS_MAX_SIDE = 64
BOTTLENECK = 4
STAGE = re.compile(r"(\d+)b(\d+)(?:d(\d+))?")


@dataclasses.dataclass(frozen=True)
class Size:
    """`widths` fine to coarse, `latents` (channels of z) coarse to fine, one per resolution."""

    encoder: str
    decoder: str
    widths: tuple[int, ...]
    latents: tuple[int, ...]
    z_max_res: int
    block: BlockKind = "default"


_E192 = "192b1d2,96b3d2,48b7d2,24b11d2,12b7d2,6b3d6,1b2"
_D192 = "1b2,6b4,12b8,24b12,48b8,96b4,192b2"
_E224 = "224b2d2,112b4d2,56b9d2,28b14d2,14b14d2,7b9d7,1b5"
_D224 = "1b5,7b10,14b15,28b15,56b10,112b5,224b3"
_WIDE = (32, 64, 96, 128, 160, 192, 512)
_DOUBLING = (32, 64, 128, 256, 512, 1024)

SIZES: dict[SizeName, Size] = {
    "morphomnist": Size(
        "32b3d2,16b3d2,8b3d2,4b3d4,1b4", "1b4,4b4,8b4,16b4,32b4", (16, 32, 64, 128, 256), (16,) * 5, 192
    ),
    "ukbb64": Size(
        "64b3d2,32b31d2,16b15d2,8b7d2,4b3d4,1b2",
        "1b2,4b4,8b8,16b16,32b32,64b4",
        _DOUBLING,
        (16,) * 6,
        192,
        "light",
    ),
    "ukbb192": Size(_E192, _D192, _WIDE, (16,) * 7, 96, "light"),
    "mimic192": Size(_E192, _D192, _WIDE, (16,) * 7, 96),
    "mimic224": Size(_E224, _D224, _WIDE, (16,) * 7, 96),
    "embed224": Size(_E224, _D224, _WIDE, (48, 30, 24, 18, 12, 6, 1), 96),
    "celeba64": Size(
        "64b3d2,32b3d2,16b3d2,8b3d2,4b3d4,1b4", "1b4,4b4,8b4,16b4,32b4,64b4", _DOUBLING, (16,) * 6, 192
    ),
}


@dataclass(frozen=True, config=STRICT)
class PublishedNetworkSettings:
    """`size` names a published network; what is given beside it stands in for that part of it: `encoder` and
    `decoder` strings, `widths` (fine to coarse) and `latents` (channels of z, coarse to fine) per resolution,
    `z_max_res` (no latents at finer resolutions), `block`."""

    name: Literal["published"] = "published"
    size: SizeName = "morphomnist"
    encoder: str | None = None
    decoder: str | None = None
    widths: tuple[Count, ...] | None = None
    latents: tuple[Count, ...] | None = None
    z_max_res: Count | None = None
    block: BlockKind | None = None

    @model_validator(mode="after")
    def _refuse_what_cannot_be_built(self) -> Self:
        whole = self.whole
        down, up = encoder_stages(whole.encoder), decoder_stages(whole.decoder)
        if [stage[0] for stage in down] != [stage[0] for stage in reversed(up)]:
            raise ValueError(
                f"encoder {whole.encoder} and decoder {whole.decoder} pass different resolutions; give both "
                "the same ones"
            )
        for key, values in (("widths", whole.widths), ("latents", whole.latents)):
            if len(values) != len(down):
                raise ValueError(
                    f"{key} has {len(values)} numbers, expected one for each of the {len(down)} resolutions "
                    f"of {whole.encoder}"
                )
        if narrow := [width for width in whole.widths if width < BOTTLENECK]:
            raise ValueError(f"widths has {narrow[0]}, expected at least {BOTTLENECK}")
        return self

    @property
    def whole(self) -> Size:
        """The named size with what is given beside it."""
        fields = [field.name for field in dataclasses.fields(Size)]
        given = {name: getattr(self, name) for name in fields if getattr(self, name) is not None}
        return dataclasses.replace(SIZES[self.size], **given)

    def build(
        self, channels: int, side: int, context: int, sigma: SigmaKind, fixed_sigma: float, mediator: bool
    ) -> HVAE:
        """For images (`channels`, `side`, `side`). Raises `UserError` when the encoder starts at another
        side."""
        size = self.whole
        stages = decoder_stages(size.decoder)
        if stages[-1][0] != side:
            raise UserError(
                f"The HVAE's encoder {size.encoder} takes images of {stages[-1][0]} pixels, and these are "
                f"{side}x{side}; set data.size, or another generator.network."
            )
        encoder = DeepEncoder(channels, size)
        upward = size.widths[::-1]
        rooms = [
            (side, upward[place], size.latents[place], index == 0 and place > 0)
            for place, (side, levels) in enumerate(stages)
            for index in range(levels)
        ]
        following = [width for _, width, *_ in rooms[1:]] + [upward[-1]]
        levels = [
            DeepLevel(
                width,
                after,
                latent,
                side,
                context,
                mediator,
                stochastic=side <= size.z_max_res,
                enters=enters,
                kind=size.block,
                scale=math.sqrt(1 / len(rooms)),
                last=index == len(rooms) - 1,
            )
            for index, ((side, width, latent, enters), after) in enumerate(zip(rooms, following, strict=True))
        ]
        head = GaussianHead(size.widths[0], channels, 1, sigma, fixed_sigma)
        return HVAE(encoder, (upward[0], 1), levels, DeepOutput(head), mediator)


def encoder_stages(text: str) -> list[tuple[int, int, int]]:
    """ "32b3d2,...,1b4" -> (resolution, blocks, downsampling factor or 1) per stage. Raises ValueError for
    what cannot be built."""
    stages = []
    for part in text.split(","):
        match = STAGE.fullmatch(part)
        if match is None:
            raise ValueError(
                f"encoder stage {part!r} of {text!r}, expected e.g. 32b3d2: side, blocks, factor"
            )
        stages.append((int(match[1]), int(match[2]), int(match[3] or 1)))
    if stages[0][1] == 0:
        raise ValueError(
            f"encoder {text!r} has no block before its first downsampling, so that its channels do not fit; "
            f"start with {stages[0][0]}b1"
        )
    for (side, _, factor), (below, *_) in itertools.pairwise(stages):
        if factor < 2 or side != below * factor:
            raise ValueError(f"encoder {text!r} does not get from {side} to {below} pixels by a whole factor")
    if stages[-1][0] != 1 or stages[-1][2] != 1:
        raise ValueError(f"encoder {text!r}, expected to end at one pixel, e.g. with 1b4")
    return stages


def decoder_stages(text: str) -> list[tuple[int, int]]:
    """ "1b4,...,32b4" -> (resolution, levels) per stage, coarse to fine. Raises ValueError for what cannot be
    built."""
    stages = []
    for part in text.split(","):
        match = STAGE.fullmatch(part)
        if match is None or match[3] or int(match[2]) == 0:
            raise ValueError(f"decoder stage {part!r} of {text!r}, expected e.g. 32b4: side, levels")
        stages.append((int(match[1]), int(match[2])))
    return stages


class DeepBlock(nn.Module):
    """`width` -> `out` channels through `hidden`, pooled by `factor`; `residual`: added to its
    input."""

    def __init__(
        self, width: int, hidden: int, out: int, kernel: int, kind: BlockKind, residual: bool, factor: int = 1
    ) -> None:
        super().__init__()
        act: type[nn.Module] = nn.ReLU if kind == "light" else nn.GELU
        middle = [(width, hidden, 1), (hidden, hidden, kernel), (hidden, hidden, kernel), (hidden, out, 1)]
        convs = [(width, hidden, kernel), (hidden, out, kernel)] if kind == "light" else middle
        self.layers = nn.Sequential(*[layer for conv in convs for layer in (act(), plain_conv(*conv))])
        self.residual, self.factor = residual, factor
        self.project = plain_conv(width, out, 1) if residual and width != out else None

    @property
    def last(self) -> nn.Conv2d:
        return self.layers[-1]  # type: ignore[return-value]

    def forward(self, h: Tensor) -> Tensor:
        found = self.layers(h)
        if self.residual:
            found = found + (h if self.project is None else self.project(h))
        return found if self.factor == 1 else F.avg_pool2d(found, self.factor)


class DeepEncoder(nn.Module):
    """x -> one feature map per stochastic level, coarse to fine: the last at that level's resolution."""

    def __init__(self, channels: int, size: Size) -> None:
        super().__init__()
        self.stem = plain_conv(channels, size.widths[0], 7)
        steps = []  # (width in, width out, factor)
        stages = encoder_stages(size.encoder)
        for place, (_, blocks, factor) in enumerate(stages):
            width = size.widths[place]
            steps += [(width, width, 1)] * blocks
            if factor > 1:
                steps.append((width, size.widths[place + 1], factor))
        self.blocks = nn.ModuleList(
            DeepBlock(width, width // BOTTLENECK, out, 3, size.block, True, factor)
            for width, out, factor in steps
        )
        with torch.no_grad():
            for block in self.blocks:
                block.last.weight *= math.sqrt(1 / len(steps))  # type: ignore[union-attr, operator]
        self.sides = [
            side
            for side, levels in decoder_stages(size.decoder)
            for _ in range(levels)
            if side <= size.z_max_res
        ]

    def forward(self, x: Tensor) -> list[Tensor]:
        h = self.stem(x)
        found = {}
        for block in self.blocks:
            h = block(h)
            found[h.shape[-1]] = h
        return [found[side] for side in self.sides]


class DeepLevel(nn.Module):
    """See hvae_network.Level. `enters`: whether the level is the first at its resolution. No z-path leaves
    the last."""

    def __init__(
        self,
        width: int,
        after: int,
        latent: int,
        side: int,
        context: int,
        mediator: bool,
        *,
        stochastic: bool,
        enters: bool,
        kind: BlockKind,
        scale: float,
        last: bool,
    ) -> None:
        super().__init__()
        self.side, self.latent, self.enters = side, latent, enters
        self.latent_shape = (latent, side, side) if stochastic else None
        self.bias = (
            nn.Parameter(torch.zeros(1, width, side, side)) if enters and side <= BIAS_MAX_SIDE else None
        )
        hidden, kernel = width // BOTTLENECK, 3 if side > 2 else 1
        statistics = 2 * latent if stochastic else latent  # a mean alone where nothing is drawn
        self.prior = DeepBlock(
            width + (context if mediator else 0), hidden, statistics + width, kernel, kind, False
        )
        self.posterior = (
            DeepBlock(2 * width + context, hidden, 2 * latent, kernel, kind, False) if stochastic else None
        )
        self.z_to_h = plain_conv(latent + context, width, 1)
        self.z_to_path = None if last else plain_conv(latent + width, after, 1)
        self.update = DeepBlock(width, hidden, after, kernel, kind, True)
        with torch.no_grad():
            self.prior.last.weight.zero_()
            self.z_to_h.weight *= scale
            self.update.last.weight *= scale

    def enter(self, h: Tensor) -> Tensor:
        if not self.enters:
            return h
        h = F.interpolate(h, size=(self.side, self.side))
        return h if self.bias is None else h + self.bias

    def enter_path(self, path: Tensor) -> Tensor:
        return self.enter(path)

    def read_prior(self, path: Tensor, prior_context: Tensor | None) -> tuple[Gaussian, Tensor]:
        found = self.prior(path if prior_context is None else with_context(path, prior_context))
        if self.latent_shape is None:
            mean, feature = found.split([self.latent, found.shape[1] - self.latent], 1)
            return Gaussian(mean, torch.zeros_like(mean)), feature
        mean, log_sigma, feature = found.split(
            [self.latent, self.latent, found.shape[1] - 2 * self.latent], dim=1
        )
        return Gaussian(mean, log_sigma.clamp(*LOG_SIGMA_Z)), feature

    def read_posterior(self, h: Tensor, encoded: Tensor, context: Tensor) -> Gaussian:
        assert self.posterior is not None  # the walk asks stochastic levels alone
        found = self.posterior(with_context(torch.cat([h, encoded], dim=1), context))
        mean, log_sigma = found.chunk(2, dim=1)
        return Gaussian(mean, log_sigma.clamp(*LOG_SIGMA_Z))

    def advance(self, h: Tensor, feature: Tensor, z: Tensor, context: Tensor) -> Tensor:
        return self.update(h + feature + self.z_to_h(with_context(z, context)))

    def advance_path(self, feature: Tensor, z: Tensor) -> Tensor:
        assert self.z_to_path is not None  # the walk ends at the last level
        return self.z_to_path(torch.cat([z, feature], dim=1))


class DeepOutput(nn.Module):
    """(h, context) -> Likelihood: the head alone, which sees the parents through h."""

    def __init__(self, head: GaussianHead) -> None:
        super().__init__()
        self.head = head

    def forward(self, h: Tensor, context: Tensor) -> Likelihood:
        return self.head(h)


def plain_conv(width: int, out: int, kernel: int) -> nn.Conv2d:
    """A convolution that keeps the resolution and starts without a bias."""
    conv = nn.Conv2d(width, out, kernel, padding=kernel // 2)
    assert conv.bias is not None
    nn.init.zeros_(conv.bias)
    return conv

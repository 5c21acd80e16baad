"""The published networks, built from the architecture strings of hvae_sizes.py; De Sousa Ribeiro et al. 2023,
appendix. The walk over the levels is in hvae_network.py.

A level above `z_max_res` pixels has no latent of its own: its z is the prior's mean.

Kept from the published code: the residual blocks ("default": GELU, 1x1, 3x3, 3x3, 1x1 at a quarter of the
width; "light": ReLU, two 3x3), the last convolution of a block scaled by sqrt(1 / blocks), priors that start
at N(0, 1), a learned bias map per resolution up to 64 pixels, parents broadcast and concatenated.
Done otherwise: log sigmas of z are clamped; what nothing reads is not built (the last z-path, the scales of
levels without a latent); odd resolutions are kept (the published encoder pads 7x7 to 8x8, which leaves its
7x7 levels without a feature map); a first stage without a block, which breaks its channel arithmetic, is
refused.
"""

import dataclasses
import math
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, ValidationInfo, field_validator
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.nn import functional as F

from cfssl.errors import UserError
from cfssl.generators.hvae_likelihood import Gaussian, GaussianHead, Likelihood, SigmaKind
from cfssl.generators.hvae_network import HVAE, LOG_SIGMA_Z, with_context
from cfssl.generators.hvae_sizes import SIZES, BlockKind, Size, SizeName, decoder_stages, encoder_stages
from cfssl.settings import STRICT, Count

BIAS_MAX_SIDE = 64
BOTTLENECK = 4
Width = Annotated[int, Field(ge=BOTTLENECK)]


@dataclass(frozen=True, config=STRICT)
class PublishedNetworkSettings:
    """`size` names a published network; what is given beside it stands in for that part of it: `encoder` and
    `decoder` strings, `widths` (fine to coarse) and `latents` (channels of z, coarse to fine) per resolution,
    `z_max_res` (no latents at finer resolutions), `block`."""

    name: Literal["published"] = "published"
    size: SizeName = "morphomnist"
    encoder: str | None = None
    decoder: str | None = Field(default=None, validate_default=True)
    widths: tuple[Width, ...] | None = Field(default=None, validate_default=True)
    latents: tuple[Count, ...] | None = Field(default=None, validate_default=True)
    z_max_res: Count | None = None
    block: BlockKind | None = None

    @field_validator("encoder")
    @classmethod
    def _encoder_fits(cls, encoder: str | None) -> str | None:
        if encoder is not None:
            encoder_stages(encoder)
        return encoder

    @field_validator("decoder")
    @classmethod
    def _decoder_fits(cls, decoder: str | None, found: ValidationInfo) -> str | None:
        up, down = (cls._known(key, given, found) for key, given in (("decoder", decoder), ("encoder", None)))
        if up is None or down is None:
            return decoder
        if [side for side, _ in decoder_stages(up)] != [side for side, *_ in encoder_stages(down)][::-1]:
            raise ValueError(
                f"decoder {up} and encoder {down} pass different resolutions; give both the same ones"
            )
        return decoder

    @field_validator("widths", "latents")
    @classmethod
    def _one_per_resolution(
        cls, values: tuple[int, ...] | None, found: ValidationInfo
    ) -> tuple[int, ...] | None:
        assert found.field_name is not None
        known, encoder = cls._known(found.field_name, values, found), cls._known("encoder", None, found)
        if known is None or encoder is None:
            return values
        count = len(encoder_stages(encoder))
        if len(known) != count:
            raise ValueError(
                f"{len(known)} numbers, expected one for each of the {count} resolutions of {encoder}; give "
                "them all"
            )
        return values

    @staticmethod
    def _known(key: str, given: Any, found: ValidationInfo) -> Any:
        """The part `key` of the network as far as it is given or named; None where it was refused before."""
        if "size" not in found.data or (key == "encoder" and "encoder" not in found.data):
            return None
        given = found.data.get(key) if given is None else given
        return getattr(SIZES[found.data["size"]], key) if given is None else given

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

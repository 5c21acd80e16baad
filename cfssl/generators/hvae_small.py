"""The small networks (S-HVAE-32, S-HVAE-64) for two CPU cores: latents at 16x16, 8x8 and 4x4 only, and a
pixel-unshuffle stem that brings larger images to twice the finest latent resolution, which makes a 64 px
model cost as much as a 32 px one. The walk over their levels is in hvae_network.py."""

import itertools
from typing import Annotated, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.nn import functional as F

from cfssl.errors import UserError
from cfssl.generators.hvae_likelihood import Gaussian, GaussianHead, Likelihood, SigmaKind
from cfssl.generators.hvae_network import HVAE, LOG_SIGMA_Z
from cfssl.settings import STRICT, Count

# Widths at 32, 16, 8 and 4 pixels of the two sizes, both of about .4 M parameters: S-HVAE-32 for images of 32
# pixels, S-HVAE-64 (a pixel-unshuffle in front) for larger ones.
S_HVAE_32 = (12, 24, 32, 48)
S_HVAE_64 = (16, 24, 32, 48)
RESOLUTIONS = (32, 16, 8, 4)  # feature maps; latents live at all but the first, and where asked for at 1

Width = Annotated[int, Field(ge=4, multiple_of=4)]  # four groups are normalised


@dataclass(frozen=True, config=STRICT)
class SmallNetworkSettings:
    """`widths` at 32, 16, 8 and 4 pixels: see S_HVAE_32, S_HVAE_64. `latents`: channels of z at 4, 8 and 16
    pixels. `whole`: channels of a z before them that has no place, for what concerns the image as a whole
    (the style of a digit); 0: none. `blocks` per resolution of encoder and output."""

    name: Literal["small"] = "small"
    widths: tuple[Width, Width, Width, Width] = S_HVAE_64
    latents: tuple[Count, Count, Count] = (16, 8, 4)
    whole: Annotated[int, Field(ge=0)] = 0
    blocks: Count = 2

    def build(
        self, channels: int, side: int, context: int, sigma: SigmaKind, fixed_sigma: float, mediator: bool
    ) -> HVAE:
        """For images (`channels`, `side`, `side`). Raises `UserError` unless the side is 32, 64, 128 or
        256."""
        unshuffle = side // 32
        if side % 32 or unshuffle not in (1, 2, 4, 8):
            raise UserError(
                "The HVAE's small network takes square images of 32, 64, 128 or 256 pixels, and these are "
                f"{side}x{side}; set data.size to one of them, or generator.network to a published one."
            )
        widths = self.widths
        encoder = SmallEncoder(channels, unshuffle, widths, self.blocks, bool(self.whole))
        places = [(1, widths[-1], self.whole)] if self.whole else []  # coarse to fine
        places += zip(RESOLUTIONS[:0:-1], widths[:0:-1], self.latents, strict=True)
        sides, upward, latents = zip(*places, strict=True)
        above: tuple[tuple[int, int] | None, ...] = (None, *zip(upward, sides, strict=True))
        levels = [
            SmallLevel(width, latent, context, context if mediator else 0, side, before, side == sides[-1])
            for width, latent, side, before in zip(upward, latents, sides, above[:-1], strict=True)
        ]
        head = GaussianHead(widths[0], channels, 3, sigma, fixed_sigma, unshuffle)
        output = SmallOutput(widths, context, self.blocks, head)
        return HVAE(encoder, (widths[-1], sides[0]), levels, output, mediator)


class Block(nn.Module):
    """Residual block of two 3x3 convolutions; the parents scale and shift the features between them
    (FiLM)."""

    def __init__(self, width: int, context: int = 0) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(4, width)
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)
        self.film = nn.Linear(context, 2 * width) if context else None
        # Each block starts as the identity, so depth costs nothing at the start.
        nn.init.zeros_(self.second.weight)
        nn.init.zeros_(self.second.bias)  # type: ignore[arg-type]

    def forward(self, h: Tensor, context: Tensor | None = None) -> Tensor:
        inner = self.first(F.silu(self.norm(h)))
        if self.film is not None:
            scale, shift = self.film(context)[:, :, None, None].chunk(2, dim=1)
            inner = torch.addcmul(shift, inner, 1 + scale)
        return h + self.second(F.silu(inner))


class SmallEncoder(nn.Module):
    """x (B, C, 32 * unshuffle, ...) -> features at 4, 8 and 16 pixels, before them those of the `whole`."""

    def __init__(
        self, channels: int, unshuffle: int, widths: tuple[int, ...], blocks: int, whole: bool
    ) -> None:
        super().__init__()
        self.unshuffle = unshuffle
        self.stem = nn.Conv2d(channels * unshuffle**2, widths[0], 3, padding=1)
        self.stages = nn.ModuleList(nn.Sequential(*[Block(width) for _ in range(blocks)]) for width in widths)
        self.down = nn.ModuleList(nn.Conv2d(a, b, 1) for a, b in itertools.pairwise(widths))
        self.whole = nn.Conv2d(widths[-1], widths[-1], RESOLUTIONS[-1]) if whole else None

    def forward(self, x: Tensor) -> list[Tensor]:
        h = self.stem(channels_last(F.pixel_unshuffle(x, self.unshuffle)))
        features = []
        for index, blocks in enumerate(self.stages):
            if index:
                h = self.down[index - 1](F.avg_pool2d(h, 2))
            h = blocks(h)
            features.append(h)
        found = features[:0:-1]
        return found if self.whole is None else [self.whole(found[0]), *found]


class SmallLevel(nn.Module):
    """See hvae_network.Level. `before`: width and side of the level before, None for the first. No z-path
    leaves the last."""

    def __init__(
        self,
        width: int,
        latent: int,
        context: int,
        prior_context: int,
        side: int,
        before: tuple[int, int] | None,
        last: bool,
    ) -> None:
        super().__init__()
        self.latent_shape = (latent, side, side)
        self.up = None if before is None else upwards(*before, width, side)
        self.path_up = None if before is None else upwards(*before, width, side)
        self.prior_block = Block(width, prior_context)
        self.prior = nn.Conv2d(width, 2 * latent, 1)
        nn.init.zeros_(self.prior.weight)
        nn.init.zeros_(self.prior.bias)  # type: ignore[arg-type]
        self.posterior_in = nn.Conv2d(2 * width, width, 1)
        self.posterior_block = Block(width, context)
        self.posterior = nn.Conv2d(width, 2 * latent, 1)
        self.z_to_h = nn.Conv2d(latent, width, 1)
        self.context_to_h = nn.Linear(context, width, bias=False)
        self.update = Block(width, context)
        self.z_to_path = None if last else nn.Conv2d(latent + width, width, 1)

    def enter(self, h: Tensor) -> Tensor:
        return channels_last(h) if self.up is None else self.up(h)

    def enter_path(self, path: Tensor) -> Tensor:
        return channels_last(path) if self.path_up is None else self.path_up(path)

    def read_prior(self, path: Tensor, prior_context: Tensor | None) -> tuple[Gaussian, Tensor]:
        feature = self.prior_block(path, prior_context)
        mean, log_sigma = self.prior(feature).chunk(2, dim=1)
        return Gaussian(mean, log_sigma.clamp(*LOG_SIGMA_Z)), feature

    def read_posterior(self, h: Tensor, encoded: Tensor, context: Tensor) -> Gaussian:
        hidden = self.posterior_block(self.posterior_in(torch.cat([h, encoded], dim=1)), context)
        mean, log_sigma = self.posterior(hidden).chunk(2, dim=1)
        return Gaussian(mean, log_sigma.clamp(*LOG_SIGMA_Z))

    def advance(self, h: Tensor, feature: Tensor, z: Tensor, context: Tensor) -> Tensor:
        # W_z [z, pa] in two parts: the parents are the same at every pixel.
        known = self.context_to_h(context)[:, :, None, None]
        return self.update(h + feature + self.z_to_h(z) + known, context)

    def advance_path(self, feature: Tensor, z: Tensor) -> Tensor:
        assert self.z_to_path is not None  # the walk ends at the last level
        return self.z_to_path(torch.cat([z, feature], dim=1))


def upwards(before: int, from_side: int, width: int, side: int) -> nn.Module:
    """Features (B, `before`, from_side, from_side) -> (B, `width`, side, side). What has no place yet is laid
    out by a map of its own, what has one is enlarged."""
    if from_side == 1:
        return nn.ConvTranspose2d(before, width, side)
    return nn.Sequential(nn.Conv2d(before, width, 1), nn.Upsample(scale_factor=side // from_side))


class SmallOutput(nn.Module):
    """(h, context) -> Likelihood: blocks at 32 pixels, then the head."""

    def __init__(self, widths: tuple[int, ...], context: int, blocks: int, head: GaussianHead) -> None:
        super().__init__()
        self.up = nn.Conv2d(widths[1], widths[0], 1)
        self.blocks = nn.ModuleList(Block(widths[0], context) for _ in range(blocks))
        self.context = nn.Linear(context, widths[0], bias=False)
        self.head = head

    def forward(self, h: Tensor, context: Tensor) -> Likelihood:
        h = F.interpolate(self.up(h), scale_factor=2)
        for block in self.blocks:
            h = block(h, context)
        return self.head(h + self.context(context)[:, :, None, None])


def channels_last(h: Tensor) -> Tensor:
    """Takes a quarter of the time of a training step off a CPU. Of features alone: weights stay as they are,
    so that a run that goes on from a checkpoint adds up its gradients in the same order."""
    return h.contiguous(memory_format=torch.channels_last)

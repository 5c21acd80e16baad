"""Dense networks: any timm encoder under a U-Net decoder, and what looks at single points of its map.

The encoder stays the plain timm model that `create_backbone` makes, so that it can be exported, initialised
and trained without the decoder as well. Its levels are those of timm's `forward_intermediates`. A
convolutional encoder has one per stride; where the finest ones are missing (ConvNeXt begins at stride 4), the
image itself, pooled to that stride, takes their place. A vision transformer has one grid of tokens: layers
evenly spaced in depth serve as levels, the earlier the finer, interpolated to their strides.
"""

import math
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import nn

from cfssl.errors import UserError
from cfssl.models.backbone import has_patch_tokens
from cfssl.models.seeded import seeded
from cfssl.settings import STRICT, Count

WIDTHS = (128, 64, 48, 32, 32)  # of the blocks that reach the strides 16, 8, 4, 2 and 1


@dataclass(frozen=True, config=STRICT)
class DecoderSettings:
    """`widths`: channels of the decoder's blocks, from the coarsest to the finest, one per level of the
    encoder; null: 128, 64, 48, 32, 32, the last of them for encoders with fewer levels. `stride`: of the map,
    in pixels of the image; at 2 or 4 the decoder stops earlier and costs a part. `norm`: of its
    convolutions."""

    widths: Annotated[tuple[Count, ...], Field(min_length=1)] | None = None
    stride: Literal[1, 2, 4] = 1
    norm: Literal["batch", "instance"] = "batch"


class DenseNetwork(nn.Module):
    """Images (B, C, H, W) float32 in [0, 1] -> a map (B, D, H / stride, W / stride). `encoder` is the timm
    model. Sides that are no multiple of its coarsest stride are continued by their last pixels, and the map
    is cut."""

    def __init__(self, encoder: nn.Module, settings: DecoderSettings, channels: int) -> None:
        """`channels`: C. Raises `UserError` for an encoder without levels, or widths that do not fit them."""
        super().__init__()
        from monai.networks.nets.flexible_unet import UNetDecoder

        self.encoder, self.stride = encoder, settings.stride
        self.layers, self.strides, sizes = levels(encoder, channels)
        blocks = len(self.strides)
        widths = WIDTHS[-blocks:] if settings.widths is None else settings.widths
        if len(widths) != blocks:
            raise UserError(
                f"The decoder has {len(widths)} widths ({', '.join(map(str, widths))}), but the encoder has "
                f"{blocks} levels (strides {', '.join(map(str, self.strides))}); give as many, or null."
            )
        self.decoder = UNetDecoder(
            spatial_dims=2,
            encoder_channels=(channels, *sizes),
            decoder_channels=widths,
            act=("relu", {"inplace": True}),
            norm=settings.norm,
            dropout=0.0,
            bias=False,
            upsample="nontrainable",
            pre_conv="default",
            interp_mode="nearest",
            align_corners=None,
            is_pad=True,
        )
        del self.decoder.blocks[blocks - int(math.log2(settings.stride)) :]
        self.width = widths[len(self.decoder.blocks) - 1]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.decoded(x)[0]

    def decoded(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The map, and the pooled features (B, F) that the encoder exports, of one pass."""
        height, width = x.shape[2:]
        coarsest = self.strides[-1]
        rest = (0, -width % coarsest, 0, -height % coarsest)
        if any(rest):
            x = nn.functional.pad(x, rest, mode="replicate")
        indices = sorted(set(self.layers))
        last, found = self.encoder.forward_intermediates(x, indices=indices)  # type: ignore[operator]
        pooled = self.encoder.forward_head(last, pre_logits=True)  # type: ignore[operator]
        seen = dict(zip(indices, found, strict=True))
        missing = len(self.strides) - len(self.layers)
        sources = [x] * missing + [seen[layer] for layer in self.layers]
        features = [x, *(level_at(of, x, stride) for of, stride in zip(sources, self.strides, strict=True))]
        decoded = self.decoder(features, skip_connect=len(self.strides) - 1)
        cut = math.ceil(height / self.stride), math.ceil(width / self.stride)
        return decoded[:, :, : cut[0], : cut[1]], pooled


def levels(encoder: nn.Module, channels: int) -> tuple[list[int], list[int], list[int]]:
    """The layers of timm's `forward_intermediates` that serve as levels, the strides 2, 4, ... of all levels,
    and their channels; the finest levels that the encoder lacks are the image's own `channels`.

    Raises `UserError` for an encoder without intermediate maps or with other strides.
    """
    name = type(encoder).__name__
    refuse_without_levels(encoder)
    information: Any = encoder.feature_info
    infos = [dict(entry) for entry in information]
    reductions = [int(info["reduction"]) for info in infos]
    coarsest = reductions[-1]
    strides = [2**power for power in range(1, int(math.log2(coarsest)) + 1)]
    if not strides or strides[-1] != coarsest:
        raise UserError(
            f"backbone.name is a {name} of stride {coarsest}, and a U-Net doubles from level to level; take "
            "one whose stride is a power of two, or another patch_size in backbone.options."
        )
    if has_patch_tokens(encoder):
        strides_of_tokens = [stride for stride in strides if stride > 2] or strides
        count = len(strides_of_tokens)
        layers = [math.ceil(len(infos) * (place + 1) / count) - 1 for place in range(count)]
    else:
        strides_of_tokens, layers = reductions, list(range(len(infos)))
    if strides_of_tokens != strides[-len(strides_of_tokens) :]:
        raise UserError(
            f"backbone.name is a {name} with maps of strides {', '.join(map(str, strides_of_tokens))}, and a "
            "U-Net doubles from level to level; choose another backbone."
        )
    sizes = [channels] * (len(strides) - len(layers)) + [int(infos[layer]["num_chs"]) for layer in layers]
    return layers, strides, sizes


def refuse_without_levels(encoder: nn.Module) -> None:
    """Raises `UserError` for an encoder without intermediate maps."""
    if not hasattr(encoder, "forward_intermediates"):
        raise UserError(
            f"backbone.name is a {type(encoder).__name__}, which gives no intermediate maps; choose another, "
            "such as resnet18 or vit_tiny_patch16_224."
        )


def level_at(level: torch.Tensor, x: torch.Tensor, stride: int) -> torch.Tensor:
    """`level` (B, D, h, w) on the grid of a stride of the images `x`."""
    size = x.shape[2] // stride, x.shape[3] // stride
    if level.shape[2:] == size:
        return level
    if level is x:
        return nn.functional.avg_pool2d(x, stride)
    return nn.functional.interpolate(level, size=size, mode="bilinear", align_corners=False)


class Grid(nn.Module):
    """One grid of features of a timm encoder, chosen by its `stride` in pixels; None: the last. It has no
    weights of its own: the encoder is given with the images. `width`: C of the features."""

    def __init__(self, encoder: nn.Module, stride: int | None) -> None:
        """Raises `UserError` for a stride that the encoder does not have."""
        super().__init__()
        refuse_without_levels(encoder)
        infos: list[Any] = [dict(entry) for entry in encoder.feature_info]  # type: ignore[union-attr]
        strides = [int(info["reduction"]) for info in infos]
        if stride is not None and stride not in strides:
            known = ", ".join(map(str, dict.fromkeys(strides)))
            raise UserError(
                f"objective.stride is {stride}, but the grids of {type(encoder).__name__} have the strides "
                f"{known}; choose one of them, or null for the last."
            )
        self.layer = len(strides) - 1 - (0 if stride is None else strides[::-1].index(stride))
        self.width = int(infos[self.layer]["num_chs"])

    def sized(
        self, encoder: nn.Module, x: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, tuple[int, int]]:
        """The cells (B, h w, C) of images (B, C', H, W), the pooled features (B, F) that the encoder exports,
        of the same pass, and (h, w)."""
        last, (found,) = encoder.forward_intermediates(x, indices=[self.layer])  # type: ignore[operator]
        pooled = encoder.forward_head(last, pre_logits=True)  # type: ignore[operator]
        return found.flatten(2).mT, pooled, (found.shape[2], found.shape[3])

    def forward(self, encoder: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cells and pooled features."""
        return self.sized(encoder, x)[:2]

    def map(self, encoder: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """The cells as a map (B, C, h, w)."""
        options = {"indices": [self.layer], "intermediates_only": True}
        found: torch.Tensor = encoder.forward_intermediates(x, **options)[0]  # type: ignore[operator]
        return found


def create_dense(encoder: nn.Module, settings: DecoderSettings, channels: int, seed: int) -> DenseNetwork:
    """`encoder` under a decoder whose initial weights are a function of the seed alone."""
    network = seeded(lambda: DenseNetwork(encoder, settings, channels), seed, "decoder")
    assert isinstance(network, DenseNetwork)
    return network.to(memory_format=torch.channels_last)


def dense_head(features: int, hidden: int, output: int, seed: int, name: str = "dense_head") -> nn.Module:
    """(..., features) -> (..., output): two layers without normalisation, the same at every point. Projecting
    gathered points therefore equals gathering from a projected map, for a part of the work."""
    return seeded(
        lambda: nn.Sequential(nn.Linear(features, hidden), nn.ReLU(inplace=True), nn.Linear(hidden, output)),
        seed,
        name,
    )


def gather_points(maps: torch.Tensor, points: torch.Tensor, mode: str = "bilinear") -> torch.Tensor:
    """The values (B, n, D) of maps (B, D, h, w) at points (B, n, 2), (x, y) in the normalised pixel-centre
    coordinates of `cfssl.data.geometry`, whatever the stride of the map; "nearest" for labels. Outside of the
    outermost pixel centres the outermost pixels go on. Of maps of volumes (B, D, d, h, w) at (x, y, z)."""
    batch, count, axes = points.shape
    grid = points.reshape(batch, count, *[1] * (axes - 1), axes).to(maps.dtype)
    found = nn.functional.grid_sample(maps, grid, mode, padding_mode="border", align_corners=False)
    return found.flatten(2).mT

"""Encoders: any timm model that ends in pooled features."""

from typing import Any

from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import nn

from cfssl.errors import UserError
from cfssl.models.seeded import seeded
from cfssl.settings import STRICT, BelowOne

# Arguments of timm models that follow from other keys of a recipe.
OWN_KEYS = {"in_chans", "num_classes", "img_size", "drop_path_rate", "dynamic_img_size"}


@dataclass(frozen=True, config=STRICT)
class BackboneSettings:
    """`name` as timm knows it; `drop_path`: rate of stochastic depth, for models that have it; `options`:
    further arguments of the timm model, e.g. {patch_size: 8, depth: 6, reg_tokens: 4} of a vision
    transformer."""

    name: str = "resnet18"
    drop_path: BelowOne = 0.0
    options: dict[str, bool | int | float | str] = Field(default_factory=dict)

    def __post_init__(self) -> None:
        if given := sorted(OWN_KEYS & set(self.options)):
            raise ValueError(f"options holds {given}, which follows from other keys of the recipe; remove it")


def check_backbone(name: str) -> None:
    """Raises `UserError` with the nearest names when timm has no model `name`."""
    import difflib

    import timm

    if name.split(".")[0] not in timm.list_models():
        near = difflib.get_close_matches(name, timm.list_models(), 3)
        raise UserError(
            f"backbone.name is {name!r}, which timm does not have; "
            f"{f'did you mean {near}?' if near else 'see timm.list_models().'}"
        )


def create_backbone(
    settings: BackboneSettings,
    channels: int,
    image_size: int | tuple[int, int],
    seed: int,
    any_size: bool = False,
    pretrained: bool = False,
) -> nn.Module:
    """A timm model without classifier: (B, C, H, W) float32 in [0, 1] -> (B, feature_size(model)).
    `image_size`: side, or (height, width); with `any_size` a vision transformer takes images of others too,
    by interpolating its position embeddings. `pretrained`: with timm's own weights, from its cache or a
    network.

    The initialisation is a function of `seed` only, so every arm of a comparison starts from the same
    weights. Raises `UserError` for an unknown name, weights that cannot be had, a `drop_path` that the model
    would ignore, or `options` that it does not have.
    """
    import timm
    import torch

    check_backbone(settings.name)
    options: dict[str, Any] = {"in_chans": channels, "num_classes": 0, **settings.options}
    if settings.drop_path:
        options["drop_path_rate"] = settings.drop_path
    if has_fixed_image_size(settings.name):
        options["img_size"] = image_size
        if any_size:
            options["dynamic_img_size"] = True

    def build() -> nn.Module:
        return timm.create_model(settings.name, pretrained=pretrained, **options)

    without_depth = UserError(
        f"backbone.drop_path is {settings.drop_path}, but {settings.name} has no stochastic depth; set it to "
        "0."
    )
    try:
        model = seeded(build, seed, "backbone")
    except (OSError, RuntimeError) as error:
        if not pretrained:
            raise
        first = str(error).splitlines()[0]
        raise UserError(
            f"The pretrained weights of {settings.name} could not be loaded ({first}); put them into timm's "
            "cache on a machine with a network, or give a file in init.backbone, or set init: null."
        ) from None
    except TypeError as error:
        if "drop_path_rate" in str(error):
            raise without_depth from None
        if "dynamic_img_size" in str(error):
            raise UserError(
                f"backbone.name is {settings.name}, which takes images of one size, and the objective shows "
                "it others; choose another backbone."
            ) from None
        unknown = [name for name in settings.options if f"'{name}'" in str(error)]
        if not unknown:
            raise
        raise UserError(
            f"backbone.options holds {unknown[0]!r}, which {settings.name} does not have; remove it."
        ) from None
    if settings.drop_path and not drops_paths(model):
        raise without_depth
    # Convolutions run faster with the channels last, on CPU and GPU.
    return model.to(memory_format=torch.channels_last)


def drops_paths(model: nn.Module) -> bool:
    """Whether some path of the timm model is left out at random in training."""
    from timm.layers import DropPath

    return any(isinstance(module, DropPath) and module.drop_prob > 0 for module in model.modules())


def feature_size(encoder: nn.Module) -> int:
    """F of the features (B, F). Some timm models (MobileNetV3) put a hidden layer behind the pooling, which
    stays when the classifier goes, so that `num_features` is not what comes out."""
    return int(getattr(encoder, "head_hidden_size", None) or encoder.num_features)  # type: ignore[arg-type]


def has_fixed_image_size(name: str) -> bool:
    """Whether the model's weights depend on the image size (vision transformers' position embeddings)."""
    import timm

    configuration = timm.get_pretrained_cfg(name)
    return configuration is not None and bool(configuration.fixed_input_size)


def has_patch_tokens(encoder: nn.Module) -> bool:
    """Whether the timm model is a vision transformer whose features keep one token per patch, behind
    `num_prefix_tokens` others."""
    return hasattr(encoder, "num_prefix_tokens") and hasattr(
        getattr(encoder, "patch_embed", None), "dynamic_feat_size"
    )


def check_size(encoder: nn.Module, name: str, channels: int, size: tuple[int, int]) -> None:
    """Raises `UserError` when the encoder called `name` cannot take images of `size` (height, width)."""
    import torch

    try:
        with torch.no_grad():
            encoder.eval()(torch.zeros(1, channels, *size))
    except (AssertionError, RuntimeError, ValueError) as error:
        first = str(error).splitlines()[0]
        raise UserError(
            f"backbone.name is {name}, which cannot take views of {size[0]} x {size[1]} pixels ({first}); "
            "choose other sizes of views, or another patch_size in backbone.options."
        ) from None

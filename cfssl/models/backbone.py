"""Encoders: any timm model that ends in pooled features."""

from typing import Any

from pydantic.dataclasses import dataclass
from torch import nn

from cfssl.errors import UserError
from cfssl.models.seeded import seeded
from cfssl.settings import STRICT, BelowOne


@dataclass(frozen=True, config=STRICT)
class BackboneSettings:
    """`name` as timm knows it; `pretrained` loads timm's weights (needs them on disk or a network);
    `drop_path`: rate of stochastic depth, for models that have it."""

    name: str = "resnet18"
    pretrained: bool = False
    drop_path: BelowOne = 0.0


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
    settings: BackboneSettings, channels: int, image_size: int | tuple[int, int], seed: int
) -> nn.Module:
    """A timm model without classifier: (B, C, H, W) float32 in [0, 1] -> (B, feature_size(model)).
    `image_size`: side, or (height, width).

    The initialisation is a function of `seed` only, so every arm of a comparison starts from the same
    weights. Raises `UserError` for an unknown name, weights that cannot be had, or a `drop_path` that the
    model would ignore.
    """
    import timm
    import torch

    check_backbone(settings.name)
    options: dict[str, Any] = {"in_chans": channels, "num_classes": 0}
    if settings.drop_path:
        options["drop_path_rate"] = settings.drop_path
    if has_fixed_image_size(settings.name):
        options["img_size"] = image_size

    def build() -> nn.Module:
        return timm.create_model(settings.name, pretrained=settings.pretrained, **options)

    without_depth = UserError(
        f"backbone.drop_path is {settings.drop_path}, but {settings.name} has no stochastic depth; set it to "
        "0."
    )
    try:
        model = seeded(build, seed, "backbone")
    except (OSError, RuntimeError) as error:
        if not settings.pretrained:
            raise
        first = str(error).splitlines()[0]
        raise UserError(
            f"The pretrained weights of {settings.name} could not be loaded ({first}); put them into timm's "
            "cache on a machine with a network, or set backbone.pretrained: false."
        ) from None
    except TypeError as error:
        if "drop_path_rate" not in str(error):
            raise
        raise without_depth from None
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

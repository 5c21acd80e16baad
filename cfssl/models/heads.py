"""Projection heads, from lightly, with an initialisation that is a function of a seed."""

import warnings

from torch import nn

from cfssl.models.seeded import seeded


def simclr_head(features: int, hidden: int, output: int, batch_norm: bool, seed: int) -> nn.Module:
    """(B, features) -> (B, output): two layers (Chen et al. 2020, section 4.2); `batch_norm` follows both of
    them, as in the code of that paper."""
    from lightly.models.modules import SimCLRProjectionHead

    return seeded(
        lambda: SimCLRProjectionHead(features, hidden, output, batch_norm=batch_norm), seed, "simclr_head"
    )


def lightly_head(kind: str, seed: int, name: str, *sizes: int, **options: bool | int) -> nn.Module:
    """lightly's projection head `kind` of the given `sizes`; its weights are a function of seed and name."""
    from lightly.models.modules import heads

    return seeded(lambda: getattr(heads, kind)(*sizes, **options), seed, name)


def dino_head(
    features: int, hidden: int, bottleneck: int, prototypes: int, batch_norm: bool, seed: int, name: str
) -> nn.Module:
    """(N, features) -> (N, prototypes): three layers, normalised to length 1, and the weight-normalised
    `last_layer` of the prototypes (Caron et al. 2021, appendix C); `batch_norm` follows the first two."""
    from lightly.models.modules import DINOv2ProjectionHead

    sizes = features, hidden, bottleneck, prototypes
    with warnings.catch_warnings():  # its weight normalisation is deprecated in torch
        warnings.filterwarnings("ignore", category=FutureWarning, message=".*weight_norm")
        return seeded(lambda: DINOv2ProjectionHead(*sizes, batch_norm), seed, name)


def linear_head(features: int, classes: int, seed: int) -> nn.Module:
    """(B, features) -> (B, classes) logits."""
    return seeded(lambda: nn.Linear(features, classes), seed, "linear_head")

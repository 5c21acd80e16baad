"""Projection heads, from lightly, with an initialisation that is a function of a seed."""

from torch import nn

from cfssl.models.seeded import seeded


def simclr_head(features: int, hidden: int, output: int, batch_norm: bool, seed: int) -> nn.Module:
    """(B, features) -> (B, output): two layers (Chen et al. 2020, section 4.2); `batch_norm` follows both of
    them, as in the code of that paper."""
    from lightly.models.modules import SimCLRProjectionHead

    return seeded(
        lambda: SimCLRProjectionHead(features, hidden, output, batch_norm=batch_norm), seed, "simclr_head"
    )


def linear_head(features: int, classes: int, seed: int) -> nn.Module:
    """(B, features) -> (B, classes) logits."""
    return seeded(lambda: nn.Linear(features, classes), seed, "linear_head")

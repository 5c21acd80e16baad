"""Objectives by name. Each file reads like its paper; what they share is the ViewBatch and the loop's task
contract."""

from torch import nn

from cfssl.objectives.baselines import (
    BarlowTwinsSettings,
    BYOLSettings,
    MoCoSettings,
    VICRegSettings,
    create_baseline,
)
from cfssl.objectives.dinov2 import DINOv2, DINOv2Settings
from cfssl.objectives.simclr import SimCLR, SimCLRSettings
from cfssl.objectives.supervised import Supervised, SupervisedSettings

ObjectiveSettings = (
    SimCLRSettings
    | DINOv2Settings
    | BYOLSettings
    | MoCoSettings
    | VICRegSettings
    | BarlowTwinsSettings
    | SupervisedSettings
)


def create_objective(
    settings: ObjectiveSettings,
    encoder: nn.Module,
    seed: int,
    *,
    images: int,
    steps: int,
    classes: int | None = None,
) -> nn.Module:
    """The objective with its heads around `encoder`, for a training of `steps` on `images`; `classes` of the
    target where it has one."""
    match settings:
        case SupervisedSettings():
            assert classes is not None, "a supervised objective is created with its number of classes"
            return Supervised(encoder, settings, classes, seed)
        case DINOv2Settings():
            return DINOv2(encoder, settings, seed, images, steps)
        case SimCLRSettings():
            return SimCLR(encoder, settings, seed)
        case _:
            return create_baseline(settings, encoder, seed, steps)


def known_attributes(settings: ObjectiveSettings) -> tuple[str, ...]:
    """The attributes that the objective learns from; images where one is missing are left out."""
    return (settings.target,) if isinstance(settings, SupervisedSettings) else ()


def coded_columns(settings: ObjectiveSettings) -> tuple[str, ...]:
    """The columns (discrete attributes, or the group) of which the objective takes codes, -1 where they are
    missing."""
    if isinstance(settings, SimCLRSettings) and settings.false_negatives is not None:
        return (settings.false_negatives,)
    return ()


def takes_views(settings: ObjectiveSettings) -> int | None:
    """How many views per image; None for any number."""
    return None if isinstance(settings, SupervisedSettings) else 2


def takes_local(settings: ObjectiveSettings) -> bool:
    """Whether it looks at the local views."""
    return isinstance(settings, DINOv2Settings)


def comparison(settings: ObjectiveSettings) -> str | None:
    """What of the objective compares the images of a batch with each other, so that micro-batches would be
    another loss; None where it is a mean over images."""
    match settings:
        case DINOv2Settings(centring="sinkhorn"):
            return "objective dinov2 with centring sinkhorn"
        case DINOv2Settings() if settings.koleo_weight:
            return f"objective dinov2 with koleo_weight {settings.koleo_weight}"
        case SimCLRSettings() | MoCoSettings() | VICRegSettings() | BarlowTwinsSettings():
            return f"objective {settings.name}"
        case _:
            return None

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
from cfssl.objectives.dense import (
    AnyDenseSettings,
    Dense,
    DenseSettings,
    DVDSettings,
    MVDSettings,
    SDVDSettings,
    SMVDSettings,
)
from cfssl.objectives.dinov2 import DINOv2, DINOv2Settings
from cfssl.objectives.grids import (
    DetCon,
    DetConSettings,
    PixPro,
    PixProSettings,
    VICRegL,
    VICRegLSettings,
)
from cfssl.objectives.local_regions import LocalRegions, LocalRegionsSettings
from cfssl.objectives.queues import DenseCL, DenseCLSettings, VADeR, VADeRSettings
from cfssl.objectives.segmentation import Segmentation, SegmentationSettings
from cfssl.objectives.simclr import SimCLR, SimCLRSettings
from cfssl.objectives.supervised import Supervised, SupervisedSettings

ObjectiveSettings = (
    SimCLRSettings
    | DINOv2Settings
    | BYOLSettings
    | MoCoSettings
    | VICRegSettings
    | BarlowTwinsSettings
    | AnyDenseSettings
    | VADeRSettings
    | DenseCLSettings
    | PixProSettings
    | VICRegLSettings
    | DetConSettings
    | LocalRegionsSettings
    | SegmentationSettings
    | SupervisedSettings
)


def create_objective(
    settings: ObjectiveSettings,
    encoder: nn.Module,
    seed: int,
    *,
    images: int,
    steps: int,
    channels: int = 1,
    classes: int | None = None,
) -> nn.Module:
    """The objective with its heads around `encoder`, for a training of `steps` on `images` of `channels`;
    `classes` of the target where it has one."""
    match settings:
        case SupervisedSettings():
            assert classes is not None, "a supervised objective is created with its number of classes"
            return Supervised(encoder, settings, classes, seed)
        case DINOv2Settings():
            return DINOv2(encoder, settings, seed, images, steps)
        case SimCLRSettings():
            return SimCLR(encoder, settings, seed)
        case DVDSettings() | SDVDSettings() | MVDSettings() | SMVDSettings():
            return Dense(encoder, settings, seed, channels)
        case LocalRegionsSettings():
            return LocalRegions(encoder, settings, seed, channels)
        case SegmentationSettings():
            return Segmentation(encoder, settings, seed, channels)
        case VADeRSettings():
            return VADeR(encoder, settings, seed, images, channels)
        case DenseCLSettings():
            return DenseCL(encoder, settings, seed, images)
        case PixProSettings():
            return PixPro(encoder, settings, seed, steps)
        case VICRegLSettings():
            return VICRegL(encoder, settings, seed)
        case DetConSettings():
            return DetCon(encoder, settings, seed)
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


def labelling_masks(settings: ObjectiveSettings) -> tuple[str, ...]:
    """The masks that the objective takes as labels of its views, in order."""
    match settings:
        case SDVDSettings() | SMVDSettings() | DetConSettings() | SegmentationSettings():
            return settings.structures
        case _:
            return ()


def weighs_labels(settings: ObjectiveSettings) -> bool:
    """Whether the objective asks how far its labels can be trusted."""
    return isinstance(settings, SDVDSettings | SMVDSettings) and settings.label_confidence


def weighs_changes(settings: ObjectiveSettings) -> bool:
    """Whether the objective looks at where counterfactuals differ from their images."""
    return isinstance(settings, DenseSettings) and settings.change_scale is not None


def takes_views(settings: ObjectiveSettings) -> tuple[int, int | None]:
    """The least and the largest number of views per image; None for any."""
    match settings:
        case SupervisedSettings() | SegmentationSettings():
            return 1, None
        case DenseSettings():
            return 2, None
        case _:
            return 2, 2


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
        case DenseSettings() | SimCLRSettings() | MoCoSettings() | VICRegSettings() | BarlowTwinsSettings():
            return f"objective {settings.name}"
        case VICRegLSettings() | DetConSettings():
            return f"objective {settings.name}"
        case _:
            return None

"""Objectives by name. Each file reads like its paper; what they share is the ViewBatch and the loop's task
contract."""

from torch import nn

from cfssl.objectives.simclr import SimCLR, SimCLRSettings
from cfssl.objectives.supervised import Supervised, SupervisedSettings

ObjectiveSettings = SimCLRSettings | SupervisedSettings


def create_objective(
    settings: ObjectiveSettings, encoder: nn.Module, classes: int | None, seed: int
) -> nn.Module:
    """The objective with its heads around `encoder`; `classes` of the target where it has one."""
    if isinstance(settings, SupervisedSettings):
        assert classes is not None, "a supervised objective is created with its number of classes"
        return Supervised(encoder, settings, classes, seed)
    return SimCLR(encoder, settings, seed)

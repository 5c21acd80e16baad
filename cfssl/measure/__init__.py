"""Frozen networks that say what an image shows. Each serves as guide of counterfactual fine-tuning or as
judge of an audit, never as both: their fingerprints tell them apart, and `part` trains them on disjoint
halves of the training rows."""

from cfssl.measure.predictor import AttributePredictor, PredictorSettings, PredictorTrainSettings
from cfssl.measure.sampling import AugmentSettings, rows_of_part
from cfssl.measure.segmentor import (
    Segmentor,
    SegmentorAugmentSettings,
    SegmentorSettings,
    SegmentorTrainSettings,
)

__all__ = [
    "AttributePredictor",
    "AugmentSettings",
    "PredictorSettings",
    "PredictorTrainSettings",
    "Segmentor",
    "SegmentorAugmentSettings",
    "SegmentorSettings",
    "SegmentorTrainSettings",
    "rows_of_part",
]

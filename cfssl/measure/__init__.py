"""Frozen networks that say what an image shows. Each serves as guide of counterfactual fine-tuning or as
judge of an audit, never as both: their fingerprints tell them apart, and `part` trains them on disjoint
halves of the training rows."""

from cfssl.data.table import ImageTable
from cfssl.measure.embedding import Embedding, EmbeddingSettings, EmbeddingTrainSettings
from cfssl.measure.predictor import AttributePredictor, PredictorSettings, PredictorTrainSettings
from cfssl.measure.sampling import AugmentSettings, rows_of_part
from cfssl.measure.segmentor import (
    Segmentor,
    SegmentorAugmentSettings,
    SegmentorSettings,
    SegmentorTrainSettings,
)

Measure = AttributePredictor | Segmentor | Embedding
MeasureSettings = PredictorSettings | SegmentorSettings | EmbeddingSettings


def create_measure(settings: MeasureSettings, table: ImageTable) -> Measure:
    """The network of `settings` for the attributes or masks and the image shape of `table`, not yet
    fitted."""
    if isinstance(settings, PredictorSettings):
        return AttributePredictor(settings, table.attributes, table.images.shape)
    if isinstance(settings, EmbeddingSettings):
        return Embedding(settings, table.images.shape)
    return Segmentor(settings, table.mask_names, table.images.shape)


__all__ = [
    "AttributePredictor",
    "AugmentSettings",
    "Embedding",
    "EmbeddingSettings",
    "EmbeddingTrainSettings",
    "Measure",
    "MeasureSettings",
    "PredictorSettings",
    "PredictorTrainSettings",
    "Segmentor",
    "SegmentorAugmentSettings",
    "SegmentorSettings",
    "SegmentorTrainSettings",
    "create_measure",
    "rows_of_part",
]

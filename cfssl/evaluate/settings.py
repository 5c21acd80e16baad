"""What is evaluated, as a recipe says it."""

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from cfssl.data.augment import PhotometricSettings
from cfssl.data.geometry import GeometrySettings
from cfssl.engine.loop import TrainSettings
from cfssl.measure.embedding import EmbeddingSettings
from cfssl.measure.predictor import PredictorSettings
from cfssl.measure.segmentor import SegmentorSettings
from cfssl.settings import STRICT, BelowOne, Count, Positive, Share, ShareRange, UnitInterval


@dataclass(frozen=True, config=STRICT)
class EvaluationSettings:
    """What all evaluations share. `target`: a binary or categorical attribute. `by`: attributes that form the
    groups. `fractions`: shares of the labelled training rows. `seeds` redraw the label subset. `external`:
    the external sets of the recipe that are evaluated besides, each by a classifier of its own and by that of
    the table."""

    name: str
    target: str
    by: tuple[str, ...] = ()
    fractions: tuple[Share, ...] = (1.0,)
    seeds: tuple[int, ...] = (0,)
    resamples: Count = 1000
    external: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """Names the result file."""
        return f"{self.name}-{self.target}"


@dataclass(frozen=True, config=STRICT)
class ProbeSettings(EvaluationSettings):
    """On the features of the frozen encoder. Choices (C of the linear probe, k of kNN) are made on the
    validation rows."""

    name: Literal["linear_probe", "knn"]


@dataclass(frozen=True, config=STRICT)
class FineTuningTrainSettings(TrainSettings):
    """What suits some hundred to some thousand labelled images."""

    epochs: Count = 20
    batch: Count = 64
    lr: Positive = 1e-4


@dataclass(frozen=True, config=STRICT)
class LightGeometrySettings(GeometrySettings):
    """What leaves a finding in the image."""

    crop_scale: ShareRange = (0.8, 1.0)
    rotation: Annotated[float, Field(ge=0, le=180)] = 10.0


@dataclass(frozen=True, config=STRICT)
class LightPhotometricSettings(PhotometricSettings):
    """What leaves a finding in the image."""

    brightness: UnitInterval = 0.1
    contrast: UnitInterval = 0.1


@dataclass(frozen=True, config=STRICT)
class FineTuningSettings(EvaluationSettings):
    """Encoder and linear head, trained together on lightly augmented views. `seeds` redraw label subset,
    head, order and views. `checks`: the number of evenly spaced moments of which the best on the validation
    rows is chosen, and nothing else is. `least_steps`: small label subsets go on for more epochs until they
    have made as many. `balanced`: every class weighs the same, whatever its share; probabilities are then
    those of balanced classes. `head_first`: share of the steps in which only the head learns."""

    name: Literal["finetune"]
    balanced: bool = False
    head_first: BelowOne = 0.0
    checks: Count = 10
    least_steps: Count = 100
    geometry: LightGeometrySettings = Field(default_factory=LightGeometrySettings)
    photometric: LightPhotometricSettings = Field(default_factory=LightPhotometricSettings)
    train: FineTuningTrainSettings = Field(default_factory=FineTuningTrainSettings)


@dataclass(frozen=True, config=STRICT)
class MonitorSettings:
    """Looks at the encoder every `every` epochs of the pre-training, and at its end, on up to `rows` training
    and `rows` validation images; test images are never seen. `target`: a binary or categorical attribute that
    kNN and a linear probe predict; null uses no labels. `stop_on_collapse`: the first warning ends the
    pre-training, and its checkpoint stays."""

    every: Count = 5
    target: str | None = None
    rows: Annotated[int, Field(ge=16)] = 1000
    stop_on_collapse: bool = False


@dataclass(frozen=True, config=STRICT)
class AuditSettings:
    """`judge`: the predictor that says what counterfactuals show; it is trained on real images alone and must
    be no guide of the fine-tuning, so give it another seed, and best the other half of the training images
    (`part: second`). `segmentor`: measures areas, needed where bank.do intervenes on one. `embedding`: the
    space in which minimality is measured, null to leave it out. `rows`: how many images of `split` are
    audited. `cycles`: null interventions and there-and-backs in a row."""

    judge: PredictorSettings
    segmentor: SegmentorSettings | None = None
    embedding: EmbeddingSettings | None = Field(default_factory=EmbeddingSettings)
    split: Literal["val", "test"] = "val"
    rows: Count = 500
    cycles: tuple[Count, ...] = (1, 10)
    resamples: Count = 1000
    seed: int = 0

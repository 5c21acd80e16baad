"""What is evaluated, as a recipe says it."""

from dataclasses import KW_ONLY
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag
from pydantic.dataclasses import dataclass

from cfssl.data.augment import PhotometricSettings
from cfssl.data.geometry import GeometrySettings
from cfssl.engine.loop import TrainSettings
from cfssl.measure.embedding import EmbeddingSettings
from cfssl.measure.predictor import PredictorSettings
from cfssl.measure.segmentor import SegmentorSettings
from cfssl.models.dense import DecoderSettings
from cfssl.settings import STRICT, BelowOne, Count, Positive, Share, ShareRange, UnitInterval


def _kind(value: Any) -> str:
    return "an attribute" if isinstance(value, str) else "several"


Grouping = Annotated[
    Annotated[str, Tag("an attribute")] | Annotated[tuple[str, ...], Field(min_length=2), Tag("several")],
    Discriminator(_kind),
]
"""An attribute whose values are the groups, or several whose combinations are."""

LabelRule = Annotated[
    Annotated[Literal["masked", "all"], Tag("a word")]
    | Annotated[dict[str, tuple[int | float | str, ...]], Field(min_length=1), Tag("values")],
    Discriminator(lambda value: "a word" if isinstance(value, str) else "values"),
]


@dataclass(frozen=True, config=STRICT)
class EvaluationSettings:
    """What all evaluations share. `by`: what forms the groups, attributes or, as a list of them, their
    combinations, e.g. [scanner, [scanner, disease]]. `fractions`: shares of the labelled training rows.
    `seeds` redraw the label subset. `external`: the external sets of the recipe that are evaluated besides,
    each by a network of its own and by that of the table."""

    name: str
    _: KW_ONLY
    by: tuple[Grouping, ...] = ()
    fractions: tuple[Share, ...] = (1.0,)
    seeds: tuple[int, ...] = (0,)
    resamples: Count = 1000
    external: tuple[str, ...] = ()

    @property
    def attributes(self) -> tuple[str, ...]:
        """What of `by` the table must have."""
        return tuple(name for of in self.by for name in ((of,) if isinstance(of, str) else of))


@dataclass(frozen=True, config=STRICT)
class ClassificationSettings(EvaluationSettings):
    """`target`: a binary or categorical attribute."""

    target: str

    @property
    def label(self) -> str:
        """Names the result file."""
        return f"{self.name}-{self.target}"


@dataclass(frozen=True, config=STRICT)
class ProbeSettings(ClassificationSettings):
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
class FineTuningSettings(ClassificationSettings):
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
class SegmentTrainSettings(TrainSettings):
    """What suits some ten to some hundred images with masks."""

    epochs: Count = 40
    batch: Count = 16
    lr: Positive = 1e-3


@dataclass(frozen=True, config=STRICT)
class SegmentGeometrySettings(GeometrySettings):
    """Without flips, because left and right are structures of their own."""

    crop_scale: ShareRange = (0.5, 1.0)
    rotation: Annotated[float, Field(ge=0, le=180)] = 15.0
    horizontal_flip: UnitInterval = 0.0


@dataclass(frozen=True, config=STRICT)
class SegmentSettings(EvaluationSettings):
    """The encoder under a decoder and a pointwise head, trained on augmented views with their masks.

    `structures`: masks of the table. They may overlap, each has a sigmoid of its own; `exclusive`: they do
    not, and one softmax tells them and the background apart. `labelled`: the rows whose masks are labels:
    "masked" are those in which any mask of the table that is not silver has a pixel, "all" takes empty masks
    for labels too, and {column: accepted values} asks the table. `fractions` are shares of the labelled
    training patients.

    `start`: the encoder of the pre-training, with the decoder of an objective that has one, or the "initial"
    one that the pre-training began with. `decoder`: a new one of this kind; null is that of the objective, or
    a new one where it has none. `learns`: all of the network, only what stands on a frozen encoder (decoder
    and head), or the head alone.

    `folds`: 1 keeps the table's own training and validation rows; more divide these rows by patient, each
    part being the validation rows of one network, and figures are means over the networks. The test rows are
    the same for all. `tolerance`: of the surface Dice, in pixels of the stored image. `checks` and
    `least_steps` as of `finetune`."""

    name: Literal["segment"]
    structures: Annotated[tuple[str, ...], Field(min_length=1)]
    exclusive: bool = False
    labelled: LabelRule = "masked"
    start: Literal["pretrained", "initial"] = "pretrained"
    decoder: DecoderSettings | None = None
    learns: Literal["all", "decoder", "head"] = "all"
    folds: Count = 1
    tolerance: Positive = 1.0
    checks: Count = 10
    least_steps: Count = 200
    geometry: SegmentGeometrySettings = Field(default_factory=SegmentGeometrySettings)
    photometric: PhotometricSettings = Field(default_factory=PhotometricSettings)
    train: SegmentTrainSettings = Field(default_factory=SegmentTrainSettings)

    @property
    def label(self) -> str:
        """Names the result file."""
        ways = [way for way in (self.learns, self.start) if way not in ("all", "pretrained")]
        return "-".join([self.name, "+".join(self.structures), *ways])

    @property
    def variant(self) -> str:
        """How it differs from training all of the pre-trained network, in words; empty where it does not."""
        words = {
            "decoder": "frozen encoder",
            "head": "frozen encoder and decoder",
            "initial": "from the initial weights",
        }
        return ", ".join(words[way] for way in (self.learns, self.start) if way in words)


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

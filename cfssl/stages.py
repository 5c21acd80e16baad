"""What a stage is: a name, a key, a folder, and the code that its product depends on.

The key = hash(settings + keys of the input stages + code version of the stage's rooms), so equal keys
mean equal products.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cfssl.provenance import code_version, fingerprint

# The code that each stage's product depends on; what its input stages list counts through their keys.
TRAINING_CODE = (
    "seeds.py",
    "data/order.py",
    "data/batches.py",
    "data/pixels.py",
    "engine/loop.py",
    "engine/fabric.py",
    "engine/guard.py",
    "engine/norms.py",
    "engine/precision.py",
    "engine/schedules.py",
    "engine/shards.py",
)
TABLE_CODE = (
    "seeds.py",
    "data/table.py",
    "data/columns.py",
    "data/npz.py",
    "data/readers.py",
    "data/regions.py",
    "data/sources.py",
    "data/splits.py",
    "data/prepare.py",
    "data/writer.py",
    "data/datasets.py",
    "data/morphomnist.py",
    "data/phantoms",
)
HVAE_CODE = (
    "scm",
    "generators/base.py",
    "generators/settings.py",
    "generators/hvae.py",
    "generators/hvae_deep.py",
    "generators/hvae_likelihood.py",
    "generators/hvae_network.py",
    "generators/hvae_settings.py",
    "generators/hvae_sizes.py",
    "generators/hvae_small.py",
    "generators/hvae_training.py",
)
ORACLE_CODE = (
    "seeds.py",
    "data/phantoms",
    "data/regions.py",
    "generators/base.py",
    "generators/oracle.py",
    "scm",
)
GENERATOR_CODE = (*HVAE_CODE, "generators/fitted.py", *ORACLE_CODE, *TRAINING_CODE)
MEASURE_CODE = ("measure", "models/seeded.py", *TRAINING_CODE)
SILVER_CODE = ("silver.py", "data/labels.py")
FINETUNE_CODE = ("generators/finetune.py", "generators/targets.py", *MEASURE_CODE)
BANK_CODE = (
    "seeds.py",
    "data/pixels.py",
    "bank/build.py",
    "bank/gate.py",
    "bank/maps.py",
    "bank/parts.py",
    "bank/records.py",
    "bank/shards.py",
    "bank/store.py",
    "generators/base.py",
    "scm",
)
ENCODER_CODE = (
    "bank/store.py",
    "bank/maps.py",
    "data/labels.py",
    "data/plan.py",
    "data/views.py",
    "data/geometry.py",
    "data/augment.py",
    "models",
    "objectives",
    *TRAINING_CODE,
)
FEATURE_CODE = ("evaluate/features.py", "data/geometry.py", "models")
EVALUATION_CODE = (
    "seeds.py",
    "evaluate/evaluations.py",
    "evaluate/probe.py",
    "evaluate/knn.py",
    "evaluate/bootstrap.py",
    "evaluate/grouped.py",
    "evaluate/groups.py",
    "evaluate/metrics.py",
    "evaluate/choice.py",
    "evaluate/contours.py",
    "evaluate/masked.py",
    "evaluate/segmented.py",
)
CLASSIFIER_CODE = (
    "evaluate/best.py",
    "evaluate/choice.py",
    "evaluate/evaluations.py",
    "evaluate/features.py",
    "evaluate/finetune.py",
    "evaluate/metrics.py",
    "evaluate/probe.py",
    "data/augment.py",
    "data/geometry.py",
    "data/plan.py",
    "data/views.py",
    "models",
    *TRAINING_CODE,
)
SEGMENTER_CODE = (
    "evaluate/contours.py",
    "evaluate/grouped.py",
    "evaluate/masked.py",
    "evaluate/segment.py",
    "objectives/segmentation.py",
    *CLASSIFIER_CODE,
)
EXTERNAL_CODE = ("evaluate/external.py",)
AUDIT_CODE = (
    "seeds.py",
    "data/pixels.py",
    "data/regions.py",
    "bank/build.py",
    "evaluate",
    "generators",
    "scm",
)

PRODUCTS = {
    "table": "table/table.json",
    "measure": "measure.safetensors",
    "silver": "silver/silver.json",
    "generator": "generator.safetensors",
    "finetune": "generator.safetensors",
    "bank": "bank/bank.json",
    "encoder": "objective.safetensors",
    "features": "features.npy",
    "external": "external.json",
    "classifier": "classifier.safetensors",
    "segmenter": "segmenter.safetensors",
    "evaluation": "result.json",
    "audit": "audit.json",
    "scores": "scores.npz",
}


@dataclass(frozen=True)
class Stage:
    """`folder` holds the stage's files; `done` once it has been finished and while its product is there."""

    name: str
    key: str
    folder: Path

    @property
    def done(self) -> bool:
        return (self.folder / "done.json").is_file() and self.product.is_file()

    @property
    def product(self) -> Path:
        """The file that other stages read first."""
        return self.folder / PRODUCTS[self.name]


def keyed_stage(runs: Path, name: str, *content: Any, code: tuple[str, ...]) -> Stage:
    """The stage `name` under `runs` whose key counts `content` (JSON-serialisable) and `code`."""
    key = fingerprint(name, content, code_version(*code))
    return Stage(name, key, runs / "stages" / f"{name}-{key}")

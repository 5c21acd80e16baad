"""Every key of a recipe acts: it changes the key of a stage, and what that stage does."""

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import BaseModel
from torch import nn
from view_toys import batch_of

from cfssl.data.augment import Photometric, PhotometricSettings
from cfssl.data.geometry import GeometrySettings, sample_affines
from cfssl.data.phantoms.chest import ATTRIBUTES
from cfssl.data.views import ViewBatch
from cfssl.engine import loop
from cfssl.engine.checkpoint import save_checkpoint
from cfssl.engine.loop import TrainSettings, loader
from cfssl.engine.run import HardwareSettings, Run, read_metrics
from cfssl.errors import UserError
from cfssl.evaluate import monitor
from cfssl.evaluate.settings import MonitorSettings
from cfssl.experiment import Recipe
from cfssl.generators import HVAESettings
from cfssl.generators.hvae import HVAEGenerator
from cfssl.models.backbone import BackboneSettings, create_backbone
from cfssl.models.dense import DecoderSettings
from cfssl.objectives import create_objective, takes_views
from cfssl.objectives.baselines import BarlowTwinsSettings, BYOLSettings, MoCoSettings, VICRegSettings
from cfssl.objectives.dense import DVDSettings, MVDSettings, SDVDSettings, SMVDSettings
from cfssl.objectives.dinov2 import DINOv2Settings
from cfssl.objectives.grids import DetConSettings, PixProSettings, VICRegLSettings
from cfssl.objectives.local_regions import LocalRegionsSettings
from cfssl.objectives.queues import DenseCLSettings, VADeRSettings
from cfssl.objectives.segmentation import SegmentationSettings
from cfssl.objectives.simclr import SimCLRSettings
from cfssl.pipeline import Pipeline
from cfssl.recipe import parse_recipe
from cfssl.seeds import numpy_generator, torch_generator

CPU = HardwareSettings(accelerator="cpu")

# Recipes that between them use every section, with every optional part spelled out.
PHANTOM: dict[str, Any] = {
    "name": "phantom",
    "data": {"name": "phantom_chest", "count": 400, "size": 128},
    "generator": {
        "name": "hvae",
        "parents": ["scanner", "disease"],
        "graph": {"disease": ["age"]},
        "balance": "scanner",
    },
    "bank": {"do": {"scanner": "all"}},
    "views": {
        "counterfactual": {"variable": "scanner", "view": [0, 1], "probability": 0.5},
        "intensity": {"probability": 0.5},
        "second_photometric": {},
    },
    "objective": {"name": "simclr"},
    "init": {"backbone": "w.pth"},
    "monitor": {"target": "disease"},
    "chromap": {},
    "evaluate": [{"name": "knn", "target": "disease"}],
}
ORACLE = PHANTOM | {"generator": {"name": "oracle", "parents": ["scanner", "disease"]}}
PUBLISHED = PHANTOM | {
    "generator": {
        "name": "hvae",
        "parents": ["scanner", "disease"],
        "balance": "scanner",
        "network": {
            "name": "published",
            "size": "ukbb64",
            "encoder": "64b1d2,32b2d2,16b1d2,8b1d2,4b1d4,1b1",
            "decoder": "1b1,4b2,8b1,16b1,32b1,64b1",
            "widths": [8, 8, 8, 8, 16, 16],
            "latents": [4, 4, 2, 2, 1, 1],
        },
    }
}
# Fine-tuned by every kind of rule, gated and audited.
TUNED = PHANTOM | {
    "name": "tuned",
    "generator": {
        "name": "hvae",
        "parents": ["scanner", "disease", "age", "left_upper_area"],
        "balance": "scanner",
    },
    "finetune": {
        "do": ["disease", "age", "left_upper_area"],
        "rules": [
            {"name": "soft", "guide": {"attributes": ["disease", "scanner"]}},
            {"name": "reg", "guide": {"attributes": ["age"]}},
            {"name": "pos_seg", "guide": {"structures": ["left_lung"]}},
        ],
    },
    "bank": {"do": {"scanner": "all"}, "gate": {"unchanged": {"sex": 0.3}}},
    "audit": {
        "judge": {"attributes": ["scanner", "sex", "disease"], "part": "second"},
        "segmentor": {"structures": ["left_lung"], "part": "second"},
    },
}
GIVEN = PHANTOM | {"name": "given", "generator": {"name": "fitted", "file": "given.safetensors"}}
# Evaluated elsewhere.
ABROAD = PHANTOM | {
    "name": "abroad",
    "external": {
        "near": {"name": "phantom_chest", "count": 300, "size": 128, "seed": 1},
        "far": {"name": "phantom_tube", "count": 300, "size": 32, "seed": 1},
    },
    "evaluate": [
        {"name": "knn", "target": "disease", "external": ["near"]},
        {"name": "finetune", "target": "scanner", "external": ["far"]},
        {"name": "segment", "structures": ["left_lung"], "decoder": {}},
    ],
}
# Labelled by a segmentor of another table.
SILVER = PHANTOM | {
    "name": "silver",
    "silver": {
        "data": {"name": "phantom_chest", "count": 300, "size": 128, "seed": 1},
        "segmentor": {"structures": ["left_lung"]},
    },
}
TABLE: dict[str, Any] = {
    "name": "table",
    "data": {"name": "table", "path": "t.csv", "attributes": {"dx": {"kind": "binary"}}},
    "objective": {"name": "supervised", "target": "dx"},
}
DINO = PHANTOM | {
    "views": PHANTOM["views"] | {"local": {"size": 32, "count": 4}},
    "objective": {"name": "dinov2"},
}
BASELINES = [
    PHANTOM | {"objective": {"name": name}} for name in ("byol", "moco_v3", "vicreg", "barlow_twins")
]
DENSE = [
    PHANTOM | {"data": PHANTOM["data"] | {"silver": True}, "objective": {"name": name, **more}}
    for name, more in {
        "dvd": {},
        "s_dvd": {"structures": ["silver_left_lung"]},
        "mvd": {},
        "s_mvd": {"structures": ["silver_left_lung"]},
        "vader": {},
        "densecl": {},
        "pixpro": {},
        "vicregl": {},
        "detcon": {"structures": ["silver_left_lung"]},
        "local_regions": {},
        "segmentation": {"structures": ["silver_left_lung"]},
    }.items()
]
TUBE: dict[str, Any] = {"name": "tube", "data": {"name": "phantom_tube", "size": 32}}
DIGITS: dict[str, Any] = {"name": "digits", "data": {"name": "morphomnist", "root": "digits"}}

# Another valid value where it does not follow from the type.
OTHERS: dict[str, Any] = {
    "data.size": 64,
    "data.domains": {"A": 0.5, "B": 0.5},
    "external.far.domains": {"soft": 0.5, "sharp": 0.5},
    "data.splits": {"train": 0.5, "val": 0.25, "test": 0.25},
    "data.path": "u.csv",
    "data.root": "other",
    "data.part": "train",
    "data.images": "image",
    "data.masks": "mask",
    "data.channels": 3,
    "data.group": "patient",
    "data.where": {"dx": "present"},
    "data.missing": ["?"],
    "data.attributes.dx.kind": "categorical",
    "data.attributes.dx.categories": ["no", "yes"],
    "data.attributes.dx.positive": ["yes"],
    "data.attributes.dx.column": "diagnosis",
    "data.areas": {"lung": "whole"},
    "data.split.column": "fold",
    "data.split.fractions": [0.5, 0.25, 0.25],
    "data.split.stratify": ["dx"],
    "data.split.duplicates": "drop",
    "data.split.may_be_empty": ["val"],
    "silver.segmentor.structures": ["left_lung", "heart"],
    "silver.segmentor.part": "second",
    "generator.file": "other.safetensors",
    "generator.parents": ["scanner"],
    "generator.graph": {"disease": ["sex"]},
    "generator.attributes.mechanisms": {"age": "spline"},
    "generator.attributes.hidden": [8],
    "generator.network.size": "celeba64",
    "generator.network.encoder": "64b1d2,32b1d2,16b1d2,8b1d2,4b1d4,1b1",
    "generator.network.decoder": "1b1,4b1,8b1,16b1,32b1,64b1",
    "generator.network.z_max_res": 32,
    "generator.network.block": "default",
    "generator.likelihood": "discretised",
    "generator.prior": "mediator",
    "generator.conditioning_dropout": ["scanner"],
    "generator.sigma": "shared",
    "generator.balance": None,
    "finetune.do": ["disease"],
    "finetune.bound": -1.5,
    "finetune.trained": "decoder",
    "finetune.rules.0.name": "hard",
    "finetune.rules.0.guide.attributes": ["scanner"],
    "finetune.rules.0.guide.part": "second",
    "finetune.rules.1.guide.attributes": ["age", "left_upper_area"],
    "finetune.rules.1.guide.part": "second",
    "finetune.rules.2.name": "seg",
    "finetune.rules.2.guide.structures": ["left_lung", "heart"],
    "finetune.rules.2.guide.part": "first",
    "audit.judge.attributes": ["scanner", "sex"],
    "audit.judge.part": "first",
    "audit.segmentor.structures": ["left_lung", "heart"],
    "audit.segmentor.part": "first",
    "audit.split": "test",
    "bank.do": {"scanner": ["A", "B"]},
    "bank.gate.unchanged": {"disease": 0.3},
    "views.count": 4,
    "views.local.count": 2,
    "views.size": 32,
    "views.border": "reflect",
    "views.counterfactual.variable": "disease",
    "views.counterfactual.view": [1, 0],
    "views.counterfactual.target": {"A": 1.0},
    "views.intensity.view": [1, 0],
    "objective.target": "sex",
    "objective.false_negatives": "sex",
    "objective.centring": "sinkhorn",
    "objective.structures": ["silver_left_lung", "silver_right_lung"],
    "objective.anchors": "all_pairs",
    "objective.queue": 512,
    "objective.stride": 8,
    "objective.matches": [10, 4],
    "objective.decoder.widths": [64, 64, 48, 32, 32],
    "objective.decoder.stride": 2,
    "objective.decoder.norm": "instance",
    "backbone.name": "resnet34",
    "backbone.options": {"stem_width": 32},
    "init.backbone": "v.pth",
    "evaluate": [{"name": "knn", "target": "dx"}],
    "evaluate.0.name": "linear_probe",
    "evaluate.0.target": "sex",
    "evaluate.0.by": ["scanner"],
    "evaluate.0.fractions": [0.5],
    "evaluate.0.seeds": [1],
    "evaluate.0.external": ["near", "far"],
    "evaluate.0.structures": ["right_lung"],
    "evaluate.0.labelled": "all",
    "evaluate.0.start": "initial",
    "evaluate.0.learns": "decoder",
    "evaluate.0.decoder.widths": [8, 8, 8, 8, 8],
    "evaluate.0.decoder.norm": "instance",
    "hardware.precision": "bf16-mixed",
}
ALONG = {  # what has to change with it
    "generator.parents": {"finetune": None},
    "train.accumulate": {"objective": {"name": "supervised", "target": "disease"}, "views.local": None},
    "views.counterfactual.variable": {"bank.do": {"scanner": "all", "disease": "all"}},
    "generator.mediator_weight": {"generator.prior": "mediator"},
    "generator.conditioning_dropout": {"generator.prior": "mediator"},
    "generator.first_sigma": {"generator.sigma": "fixed"},
    "views.count": {"objective": {"name": "supervised", "target": "disease"}, "views.local": None},
    "views.counterfactual.distinct": {"views.counterfactual.shared": False},
    "views.intensity.shared": {"views.intensity.view": "all"},
}
NAMED = "data", "silver.data", "generator", "generator.network", "objective", "external.near", "external.far"
CHOICES = {f"{section}.name" for section in NAMED} | {
    "finetune.rules.1.name",
    "evaluate.1.name",
    "evaluate.2.name",
}  # of the section's class
TOGETHER = {
    "silver",
    "generator",
    "finetune",
    "bank.do",
    "bank.gate",
    "audit",
    "views.counterfactual",
    "views.local",
    "views.intensity",
    "views.second_photometric",
    "external",
    "evaluate.0.external",
    "init",
}  # or none of them
# These move no result; each acts in its own way, see the tests that follow.
HARDWARE = "accelerator", "devices", "nodes", "strategy", "workers", "threads"
WITHOUT_A_KEY = {"name", "track", *(f"hardware.{key}" for key in HARDWARE)} | {
    f"monitor{key}" for key in ("", ".every", ".target", ".rows", ".stop_on_collapse")
}
WITHOUT_A_KEY |= {"hardware.stage"}  # see tests/bank/test_staging.py
WITHOUT_A_KEY |= {"chromap", "chromap.images", "chromap.preset"}


def leaves(node: Any, path: str, met: set[str]) -> Iterator[tuple[str, Any]]:
    """(dotted path, value) of every key below a recipe or a section; notes the classes it meets."""
    met.add(type(node).__name__)
    model = isinstance(node, BaseModel)
    for name in type(node).model_fields if model else [field.name for field in dataclasses.fields(node)]:
        value, key = getattr(node, name), f"{path}.{name}" if path else name
        parts = {"": value}
        if isinstance(value, tuple | dict):
            parts = {
                f".{i}": part for i, part in (value.items() if isinstance(value, dict) else enumerate(value))
            }
        sections = {place: part for place, part in parts.items() if dataclasses.is_dataclass(part)}
        for place, part in sections.items():
            yield from leaves(part, f"{key}{place}", met)
        if not sections and key not in CHOICES:
            yield key, value


def another(key: str, value: Any) -> Any:
    if key not in OTHERS:  # that of the same setting elsewhere
        key = re.sub(r"^(external\.\w+|silver\.data)", "data", re.sub(r"^evaluate\.\d", "evaluate.0", key))
    if key in OTHERS:
        return OTHERS[key]
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value * 2 if any(word in key for word in ("batch", "accumulate", "width")) else value + 1
    if isinstance(value, float):
        return value / 2 + 0.003
    if isinstance(value, tuple) and value and all(isinstance(entry, float) for entry in value):
        return [entry / 2 + 0.003 for entry in value]
    if value and isinstance(value, tuple) and all(isinstance(entry, int) for entry in value):
        return [entry * 2 for entry in value]
    if value is None:
        return 2.0
    raise AssertionError(f"OTHERS has no other value for {key} = {value!r}")


def changed(recipe: Recipe, changes: dict[str, Any]) -> Recipe:
    content = json.loads(recipe.model_dump_json())
    for key, value in changes.items():
        *path, last = [int(part) if part.isdigit() else part for part in key.split(".")]
        node = content
        for part in path:
            node = node[part]
        node[last] = value
    return parse_recipe(content, ", ".join(changes) or "as it is")


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the data sections point to, of which only names, sizes and times are read; and generators."""
    monkeypatch.chdir(tmp_path)
    for weights in ("w.pth", "v.pth"):
        (tmp_path / weights).write_text(weights)
    for folder in (tmp_path, tmp_path / "other"):
        folder.mkdir(exist_ok=True)
        for name in ("t.csv", "u.csv"):
            (folder / name).write_text("image,dx\n")
    for digits in ("digits", "other"):
        (tmp_path / digits).mkdir(exist_ok=True)
        for part in ("t10k", "train"):
            for rest in ("images-idx3-ubyte.gz", "labels-idx1-ubyte.gz", "morpho.csv"):
                (tmp_path / digits / f"{part}-{rest}").touch()
    for name, beta in (("given", 1.0), ("other", 2.0)):
        settings = HVAESettings(parents=("scanner", "disease"), beta=beta)
        generator = HVAEGenerator(settings, ATTRIBUTES, (1, 64, 64))
        generator.seal()
        generator.save(tmp_path / f"{name}.safetensors")


@pytest.mark.usefixtures("files")
def test_every_key_changes_the_key_of_a_stage() -> None:
    met: set[str] = set()
    recipes = (
        PHANTOM,
        DINO,
        *BASELINES,
        *DENSE,
        ORACLE,
        PUBLISHED,
        TUNED,
        GIVEN,
        ABROAD,
        SILVER,
        TABLE,
        TUBE,
        DIGITS,
    )
    for content in recipes:
        recipe = parse_recipe(content, str(content["name"]))
        for key, value in leaves(recipe, "", met):
            if key in WITHOUT_A_KEY or (key in TOGETHER and not value):
                continue
            before = changed(recipe, ALONG.get(key, {}))
            after = changed(before, {key: another(key, value)})
            assert after != before, key
            old, new = ({stage.key for stage in Pipeline(r, Path("runs")).stages()} for r in (before, after))
            assert new - old, key
    assert set(Recipe.model_json_schema()["$defs"]) <= met


def fields(settings: type) -> list[str]:
    return [field.name for field in dataclasses.fields(settings)]


@pytest.mark.parametrize("name", fields(GeometrySettings))
def test_every_geometry_setting_acts(name: str) -> None:
    base = GeometrySettings(rotation=10, vertical_flip=0.2)
    other = dataclasses.replace(base, **{name: another(name, getattr(base, name))})
    first, second = (sample_affines(numpy_generator(0), 50, settings) for settings in (base, other))
    assert not np.allclose(first, second)


@pytest.mark.parametrize("name", fields(PhotometricSettings))
def test_every_photometric_setting_acts(name: str) -> None:
    on = {field: 0.6 for field in fields(PhotometricSettings) if field.endswith("_probability")}
    base = PhotometricSettings(**on, gamma=0.3, blur_sigma=(0.5, 2.0), saturation=0.3, hue=0.1)
    other = dataclasses.replace(base, **{name: another(name, getattr(base, name))})
    view = numpy_generator(0).random((32, 32, 3), dtype=np.float32)
    first, second = (
        np.stack([Photometric(settings)(view, seed) for seed in range(30)]) for settings in (base, other)
    )
    assert not np.allclose(first, second, atol=1e-3)


class Regression(nn.Module):
    """With dropout, whose stream follows the seed."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(5, 8), nn.GELU(), nn.Dropout(0.2), nn.Linear(8, 1))

    def forward(self, batch: torch.Tensor, step: int) -> dict[str, torch.Tensor]:
        return {"loss": (self.net(batch).squeeze(1) - batch.sum(1)).square().mean()}

    def after_step(self, step: int) -> None:
        pass


class Numbers:
    """40 steps, one of them far out."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, step: int) -> list[torch.Tensor]:
        return [torch.randn(16, 5, generator=torch_generator(step)) * (30 if step == 35 else 1)]


IN_THE_DATA = {"epochs", "batch", "accumulate"}  # see tests/data/test_views.py
IN_THE_FOLDER = {"log_every", "checkpoint_every"}


@pytest.mark.parametrize("name", [name for name in fields(TrainSettings) if name not in IN_THE_DATA])
def test_every_training_setting_acts(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = TrainSettings(final_lr_share=0.1, clip=20.0, skip_factor=1000.0, log_every=8, checkpoint_every=16)
    value = {"clip": 0.1, "skip_factor": 10.0}.get(name, another(name, getattr(base, name)))
    saved: list[int] = []

    def save(path: Path, state: dict[str, Any]) -> None:
        saved.append(state["step"])
        save_checkpoint(path, state)

    monkeypatch.setattr(loop, "save_checkpoint", save)

    def train(settings: TrainSettings, folder: Path) -> tuple[torch.Tensor, list[int], list[int]]:
        saved.clear()
        task = Regression()
        loop.fit(task, Numbers(), settings, Run(folder, CPU, quiet=True), "test")
        weights = torch.cat([parameter.flatten() for parameter in task.parameters()])
        return weights, [line["step"] for line in read_metrics(folder / "metrics.jsonl")], list(saved)

    first, lines, checkpoints = train(base, tmp_path / "base")
    other, other_lines, other_checkpoints = train(
        dataclasses.replace(base, **{name: value}), tmp_path / "other"
    )
    assert torch.equal(first, other) == (name in IN_THE_FOLDER)
    assert (lines != other_lines) == (name == "log_every")
    assert (checkpoints != other_checkpoints) == (name == "checkpoint_every")


def objective_after_training(settings: Any, folder: Path) -> dict[str, torch.Tensor]:
    """The state after four steps, and the losses of a batch afterwards."""
    encoder = create_backbone(BackboneSettings("test_vit", options={"depth": 1, "patch_size": 8}), 1, 16, 0)

    class Views:
        def __len__(self) -> int:
            return 4

        def __getitem__(self, step: int) -> list[ViewBatch]:
            views = 2 if takes_views(settings)[1] == 2 else 3
            images = torch.rand(8, views, 1, 16, 16, generator=torch_generator("views", step))
            batch = batch_of(images, {"patient": torch.arange(8) // 2})
            labels = torch.cat([images, 1 - images], dim=2) > 0.7
            confidence = torch.linspace(0.1, 1, 2 * len(images)).unflatten(0, (-1, 2))
            more = {"labels": labels, "confidence": confidence, "change": images[:, :, 0]}
            return [dataclasses.replace(batch, **more)]

    task = create_objective(settings, encoder, 0, images=8000, steps=4)
    run = Run(folder, CPU, quiet=True)
    loop.fit(task, Views(), TrainSettings(warmup=0.0, final_lr_share=1.0), run, "test")
    losses = {name: value.detach() for name, value in task.eval()(Views()[4][0], 4).items()}
    return {**task.state_dict(), **losses}


OBJECTIVES = {
    "simclr": SimCLRSettings(hidden=16, output=8),
    "byol": BYOLSettings(hidden=16, output=8),
    "moco_v3": MoCoSettings(hidden=16, output=8),
    "vicreg": VICRegSettings(hidden=16, output=8),
    "barlow_twins": BarlowTwinsSettings(hidden=16, output=8),
    # with a setting for each of the steps to act on
    "dinov2": DINOv2Settings(
        prototypes=16, hidden=16, bottleneck=8, temperature_warmup=1.0, freeze_last_layer=0.3
    ),
}
OBJECTIVES |= {
    name: settings(points=32, hidden=16, output=8, decoder=DecoderSettings(widths=(8, 8, 8)), **more)
    for name, (settings, more) in {
        "dvd": (DVDSettings, {}),
        "s_dvd": (SDVDSettings, {"structures": ("one", "other")}),
        "mvd": (MVDSettings, {}),
        "s_mvd": (SMVDSettings, {"structures": ("one", "other")}),
        "vader": (VADeRSettings, {"queue": 300}),
    }.items()
}
OBJECTIVES |= {
    name: settings(hidden=16, output=8, **more)
    for name, (settings, more) in {
        "densecl": (DenseCLSettings, {"queue": 300}),
        "pixpro": (PixProSettings, {}),
        "vicregl": (VICRegLSettings, {"matches": (3, 2)}),
        "detcon": (DetConSettings, {"structures": ("one", "other")}),
    }.items()
}
SMALL = DecoderSettings(widths=(8, 8, 8))
OBJECTIVES["local_regions"] = LocalRegionsSettings(output=8, decoder=SMALL)
OBJECTIVES["segmentation"] = SegmentationSettings(structures=("one", "other"), decoder=SMALL)
# What decides which objective there is and what its labels are; a vision transformer has grids of one stride.
FROM_OUTSIDE = {"name", "structures", "stride"}
OTHER_OBJECTIVE = {
    "anchors": "all_pairs",
    "exclusion_radius": 0.2,
    "queue": 100,
    "matches": (2, 1),
    "distance": 1.5,
    "decoder": DecoderSettings(stride=2, widths=(8, 8, 8)),
    "false_negatives": "patient",
    "prototypes": None,
    "centring": "sinkhorn",
    "freeze_last_layer": 0.8,
    "mask_probability": 0.9,
}


@pytest.mark.parametrize(
    ("objective", "name"),
    [
        (key, name)
        for key, value in OBJECTIVES.items()
        for name in fields(type(value))
        if name not in FROM_OUTSIDE
    ],
)
def test_every_setting_of_an_objective_acts(objective: str, name: str, tmp_path: Path) -> None:
    base = OBJECTIVES[objective]
    value = OTHER_OBJECTIVE[name] if name in OTHER_OBJECTIVE else another(name, getattr(base, name))
    other = dataclasses.replace(base, **{name: value})
    first, second = (
        objective_after_training(settings, tmp_path / str(index))
        for index, settings in enumerate((base, other))
    )
    assert first.keys() != second.keys() or any(
        first[key].shape != second[key].shape or not torch.equal(first[key], second[key]) for key in first
    )


def test_the_stated_workers_load_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def load(*parts: Any) -> Any:
        seen.append(loader(*parts))
        return seen[0]

    monkeypatch.setattr(loop, "loader", load)
    run = Run(tmp_path, dataclasses.replace(CPU, workers=2), quiet=True)
    loop.fit(Regression(), Numbers(), TrainSettings(), run, "test")
    assert seen[0].num_workers == 2


WATCHED = {
    "name": "watched",
    "data": {"name": "phantom_chest", "count": 240},
    "backbone": {"name": "test_byobnet"},
    "train": {"epochs": 2, "batch": 48},
    "hardware": {"accelerator": "cpu"},
}


@pytest.mark.parametrize("name", fields(MonitorSettings))
def test_every_setting_of_the_monitor_acts(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On what is seen, and never on the weights; a threshold makes every encoder a collapsed one."""
    monkeypatch.setattr(monitor, "SMALLEST_STD", 10.0)

    def watch(settings: MonitorSettings) -> tuple[list[Any], bool]:
        runs = tmp_path / f"{settings == base}"
        job = Pipeline(
            parse_recipe(WATCHED | {"monitor": dataclasses.asdict(settings)}, "x"), runs, quiet=True
        )
        try:
            job.objective  # noqa: B018
        except UserError:
            assert (job.encoder_stage.folder / "checkpoint.safetensors").is_file()
            return read_metrics(job.metrics_path), True
        return read_metrics(job.metrics_path), False

    base = MonitorSettings(every=1, target="disease", rows=64)
    value = {"target": "sex", "every": 2, "rows": 32, "stop_on_collapse": True}[name]
    found, other = (watch(settings) for settings in (base, dataclasses.replace(base, **{name: value})))
    losses = [[line for line in lines if "loss" in line] for lines, _ in (found, other)]
    seen = [[line for line in lines if "collapse" in line] for lines, _ in (found, other)]
    assert seen[0] != seen[1]
    assert (found[1], other[1]) == (False, name == "stop_on_collapse")
    assert losses[0][: len(losses[1])] == losses[1]

"""The pipeline: stages are reused exactly when nothing they depend on changed, and it ends in the same
weights after a stop."""

import ast
import json
import shutil
import struct
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from safetensors.torch import save_file

import cfssl.production
import cfssl.stages
from cfssl import provenance
from cfssl.check import describe
from cfssl.engine.loop import fit
from cfssl.engine.run import HardwareSettings, Run, read_metrics
from cfssl.errors import UserError
from cfssl.models.initial import content_hash, hold_backbone
from cfssl.pipeline import Pipeline
from cfssl.recipe import load_recipe, parse_recipe
from cfssl.seeds import numpy_generator

TINY: dict[str, Any] = {
    "name": "tiny",
    "data": {"name": "phantom_chest", "count": 240},
    "generator": {
        "name": "hvae",
        "parents": ["scanner", "disease"],
        "graph": {"disease": ["age"]},
        "network": {"name": "small", "widths": [8, 8, 8, 8], "latents": [2, 2, 2], "blocks": 1},
        "train": {"epochs": 1},
    },
    "bank": {"do": {"scanner": "all"}},
    "views": {"counterfactual": {"variable": "scanner", "view": 1}},
    "objective": {"name": "simclr", "hidden": 16, "output": 8},
    "backbone": {"name": "test_resnet"},
    "train": {"epochs": 1, "batch": 48},
    "evaluate": [{"name": "knn", "target": "disease", "by": ["scanner"], "resamples": 50}],
    "hardware": {"accelerator": "cpu"},
}


def job(runs: Path, **changes: Any) -> Pipeline:
    """The tiny recipe with whole sections merged in."""
    content = json.loads(json.dumps(TINY))
    for section, value in changes.items():
        below = content.get(section)
        renamed = isinstance(value, dict) and "name" in value and isinstance(below, dict)
        if (
            isinstance(value, dict)
            and isinstance(below, dict)
            and not (renamed and value["name"] != below["name"])
        ):
            content[section] |= value
        else:
            content[section] = value
    return Pipeline(parse_recipe(content, "tiny"), runs, quiet=True)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    pipeline = job(tmp_path_factory.mktemp("runs"))
    pipeline.run()
    return pipeline


def test_a_run_leaves_what_a_person_looks_for(done: Pipeline) -> None:
    assert load_recipe(done.folder / "recipe.yaml") == done.recipe
    environment = json.loads((done.folder / "environment.json").read_text())
    assert environment["data_fingerprint"] == done.table.fingerprint
    assert environment["libraries"]["torch"] == metadata.version("torch")
    assert {"commit", "dirty"} == set(environment["git"])
    lines = [json.loads(line) for line in done.metrics_path.read_text().splitlines()]
    assert all(np.isfinite(line["loss"]) for line in lines)
    (result,) = json.loads((done.folder / "knn-disease.json").read_text())
    assert set(result["groups"]["scanner"]["table"]) == {"A", "B", "C", "D"}
    assert result["data"]["fingerprint"] == done.table.fingerprint
    assert result["encoder"] == done.encoder_stage.key
    assert result["git"] == environment["git"]


def test_a_second_run_reuses_every_stage(done: Pipeline) -> None:
    again = job(done.runs)
    again.run()
    assert len(again.production.used) == len(done.production.used) == 6
    assert all(record["reused"] for record in again.production.used.values())


@pytest.mark.parametrize(
    ("change", "remade"),
    [
        ({"data": {"seed": 1}}, {"table", "generator", "bank", "encoder", "features", "evaluation"}),
        ({"generator": {"beta": 2.0}}, {"generator", "bank", "encoder", "features", "evaluation"}),
        ({"bank": {"do": {"scanner": ["A", "B"]}}}, {"bank", "encoder", "features", "evaluation"}),
        ({"train": {"epochs": 1, "batch": 48, "lr": 0.1}}, {"encoder", "features", "evaluation"}),
        ({"views": {"geometry": {"rotation": 5}}}, {"encoder", "features", "evaluation"}),
        ({"backbone": {"name": "resnet18"}}, {"encoder", "features", "evaluation"}),
        ({"evaluate": [{"name": "knn", "target": "sex"}]}, {"evaluation"}),
        ({"name": "another"}, set()),
        (
            {"hardware": {"accelerator": "cpu", "precision": "bf16-mixed"}},
            {"generator", "bank", "encoder", "features", "evaluation"},
        ),
        ({"hardware": {"accelerator": "cpu", "workers": 2, "threads": 1}}, set()),
    ],
)
def test_a_change_remakes_its_stage_and_all_that_follow_and_nothing_else(
    done: Pipeline, change: dict[str, Any], remade: set[str]
) -> None:
    changed = job(done.runs, **change)
    assert {stage.name for stage in changed.stages() if not stage.done} == remade


ALL = ["table", "generator", "bank", "encoder", "features", "evaluation"]


@pytest.mark.parametrize(
    ("file", "remade"),
    [
        ("seeds.py", ALL),
        ("data/writer.py", ALL),
        ("engine/precision.py", ALL[1:]),
        ("scm/graph.py", ALL[1:]),
        ("bank/shards.py", ALL[2:]),
        ("measure/predictor.py", []),
        ("generators/targets.py", []),
        ("data/augment.py", ALL[3:]),
        ("data/geometry.py", ALL[3:]),
        ("evaluate/metrics.py", ALL[5:]),
        ("errors.py", []),
        ("engine/progress.py", []),
    ],
)
def test_a_change_of_code_remakes_what_it_computes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, remade: list[str]
) -> None:
    def keys() -> dict[str, str]:
        provenance.code_version.cache_clear()
        return {stage.name: stage.key for stage in job(tmp_path).stages()}

    before = keys()
    shutil.copytree(provenance.PACKAGE, tmp_path / "cfssl", ignore=shutil.ignore_patterns("__pycache__"))
    with (tmp_path / "cfssl" / file).open("a") as code:
        code.write("\nCHANGED = True\n")
    monkeypatch.setattr(provenance, "PACKAGE", tmp_path / "cfssl")
    after = keys()
    provenance.code_version.cache_clear()
    assert [name for name in ALL if after[name] != before[name]] == remade


# Imported by the code of a stage without deciding what its product holds.
PASSIVE = {
    "__init__.py",
    "errors.py",
    "files.py",
    "provenance.py",
    "settings.py",
    "stages.py",
    "writers.py",
    "bank/settings.py",
    "engine/checkpoint.py",
    "engine/interruption.py",
    "engine/meter.py",
    "engine/processes.py",
    "engine/progress.py",
    "engine/run.py",
    "engine/world.py",
    "evaluate/settings.py",
}


def test_the_code_of_a_stage_is_all_that_it_imports() -> None:
    known: set[str] = set()
    stages = (
        *ALL[:2],
        "measure",
        "silver",
        "finetune",
        *ALL[2:],
        "external",
        "classifier",
        "segmenter",
        "audit",
    )
    for stage in stages:
        code = getattr(cfssl.stages, f"{stage.removesuffix('s').upper()}_CODE")
        files = {file for room in code for file in code_files(room)}
        known |= files
        imported = set().union(*(imported_files(file) for file in files))
        assert imported - known - PASSIVE == set(), stage


def code_files(room: str) -> set[str]:
    """The Python files of a room, which is a folder or a file of the package, relative to it."""
    path = provenance.PACKAGE / room
    files = path.rglob("*.py") if path.is_dir() else [path]
    return {file.relative_to(provenance.PACKAGE).as_posix() for file in files}


def imported_files(file: str) -> set[str]:
    """The files of the package that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse((provenance.PACKAGE / file).read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "cfssl":
            module = Path(*node.module.split(".")[1:])
            for path in (module / "__init__.py", module.with_suffix(".py") if module.name else module):
                found |= {path.as_posix()} if (provenance.PACKAGE / path).is_file() else set()
            for alias in node.names:  # a module of a package
                path = (module / alias.name).with_suffix(".py")
                found |= {path.as_posix()} if (provenance.PACKAGE / path).is_file() else set()
    return found


def test_every_stage_computes_with_the_stated_threads_and_leaves_them_as_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, before = [], torch.get_num_threads()

    def prepare(*_: Any) -> None:
        seen.append(torch.get_num_threads())
        raise KeyboardInterrupt

    monkeypatch.setattr("cfssl.production.prepare_dataset", prepare)
    with pytest.raises(KeyboardInterrupt):
        job(tmp_path, hardware={"accelerator": "cpu", "threads": before + 1}).table  # noqa: B018
    assert seen == [before + 1]
    assert torch.get_num_threads() == before


def test_a_monitor_changes_neither_keys_nor_weights(done: Pipeline, tmp_path: Path) -> None:
    shutil.copytree(done.runs, tmp_path / "runs")
    watched = job(tmp_path / "runs", monitor={"every": 1, "target": "disease"})
    assert [stage.key for stage in watched.stages()] == [stage.key for stage in done.stages()]
    shutil.rmtree(watched.encoder_stage.folder)
    state, expected = watched.objective.state_dict(), done.objective.state_dict()
    assert all(torch.equal(state[name], value) for name, value in expected.items())
    (seen,) = [line for line in read_metrics(watched.metrics_path) if "collapse" in line]
    assert seen["collapse"] == []
    assert 0 < seen["knn_auc"] < 1


def test_the_first_batch_is_drawn_before_the_first_step(
    done: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(done.runs, tmp_path / "runs")
    again = job(tmp_path / "runs")
    drawn = again.encoder_stage.folder / "views.png"
    assert drawn.is_file()
    shutil.rmtree(again.encoder_stage.folder)

    def refuse(*_: Any) -> None:
        assert drawn.is_file()
        raise KeyboardInterrupt

    monkeypatch.setattr("cfssl.pipeline.fit", refuse)
    with pytest.raises(KeyboardInterrupt):
        again.objective  # noqa: B018


def test_a_monitor_of_an_unknown_target_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"monitor\.target = 'diseas': no such attribute"):
        job(tmp_path, monitor={"target": "diseas"}).table  # noqa: B018
    with pytest.raises(UserError, match=r"monitor\.target = 'age': is continuous"):
        job(tmp_path, monitor={"target": "age"}).table  # noqa: B018


def test_pre_training_goes_on_from_an_export_and_says_what_it_took(
    done: Pipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(done.runs, tmp_path / "runs")
    done.export(tmp_path / "exported")
    init = {"backbone": str(tmp_path / "exported"), "head_warmup": 1}
    going_on = job(tmp_path / "runs", init=init, train={"epochs": 2, "batch": 48})
    assert {stage.name for stage in going_on.stages() if not stage.done} == {
        "encoder",
        "features",
        "evaluation",
    }
    start = going_on.new_encoder()[0].state_dict()
    assert all(torch.equal(start[name], value) for name, value in done.encoder.state_dict().items())
    describe(going_on)
    assert "init: 100.00% of" in capsys.readouterr().out
    going_on.objective  # noqa: B018  trains
    assert "init: 100.00% of" in capsys.readouterr().err
    record = json.loads((going_on.encoder_stage.folder / "init.json").read_text())
    assert record["matched"] == 1
    assert record["content"] == content_hash(tmp_path / "exported" / "model.safetensors")
    # Held for the first epoch of 3 steps, and trained afterwards.
    stopped = job(tmp_path / "held", init=init, train={"epochs": 2, "batch": 48})
    held, data = stopped.new_objective(), stopped.view_data()
    hold_backbone(held, data.order.steps_per_epoch)
    run = Run(tmp_path / "run", HardwareSettings(accelerator="cpu"), quiet=True, stop_at=3)
    assert not fit(held, data, stopped.recipe.train, run, "x")
    assert all(torch.equal(held.student.state_dict()[name], value) for name, value in start.items())
    assert not all(torch.equal(going_on.encoder.state_dict()[name], value) for name, value in start.items())


def test_weights_that_do_not_fit_are_refused_before_anything_is_trained(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"init\.backbone is .*nowhere.*no such file"):
        job(tmp_path, init={"backbone": str(tmp_path / "nowhere")})
    save_file({"other": torch.zeros(3)}, tmp_path / "w.safetensors")
    unfit = job(tmp_path, init={"backbone": str(tmp_path / "w.safetensors")})
    with pytest.raises(UserError, match=r"does not fit the table .*\n.* fits 0% of the encoder's parameters"):
        unfit.table  # noqa: B018
    assert not unfit.generation.generator_stage.folder.exists()


def test_training_stopped_in_the_middle_goes_on_to_the_same_weights(done: Pipeline, tmp_path: Path) -> None:
    interrupted = job(tmp_path)
    objective = interrupted.new_objective()
    run = Run(interrupted.encoder_stage.folder, HardwareSettings(accelerator="cpu"), quiet=True, stop_at=2)
    assert not fit(objective, interrupted.view_data(), interrupted.recipe.train, run, "x")
    resumed = job(tmp_path)
    state, expected = resumed.objective.state_dict(), done.objective.state_dict()
    assert all(torch.equal(state[name], value) for name, value in expected.items())


def test_the_bank_holds_what_the_generator_makes_and_the_real_image_first(done: Pipeline) -> None:
    bank, table = done.generation.bank, done.table
    np.testing.assert_array_equal(
        bank.gather(np.arange(5), np.zeros(5, int)), table.images.read(bank.rows[:5])
    )
    factual = table.encode(("scanner",), bank.rows)["scanner"].numpy()
    for slot in range(4):
        np.testing.assert_array_equal(bank.available[:, slot + 1], factual != slot)


def test_features_are_those_of_the_encoder_in_eval_mode(done: Pipeline) -> None:
    images = torch.from_numpy(done.table.images.read(np.arange(4)).astype(np.float32) / 255)
    with torch.no_grad():
        torch.testing.assert_close(
            done.encoder.eval()(images).numpy(),
            np.array(done.evaluation.features()[:4]),
            rtol=1e-3,
            atol=1e-4,
        )


def test_the_export_is_the_trained_encoder(done: Pipeline, tmp_path: Path) -> None:
    done.export(tmp_path / "encoder")
    loaded = timm.create_model(f"local-dir:{tmp_path / 'encoder'}", pretrained=True, num_classes=0).eval()
    images = torch.rand(2, 1, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(loaded(images), done.encoder.eval()(images))


def test_results_of_evaluations_that_the_recipe_no_longer_has_are_removed(
    done: Pipeline, tmp_path: Path
) -> None:
    shutil.copytree(done.runs, tmp_path / "runs")
    probe = {"name": "linear_probe", "target": "sex", "resamples": 50}
    changed = job(tmp_path / "runs", evaluate=[probe])
    assert (changed.folder / "knn-disease.json").exists()
    changed.evaluation.results()
    assert {file.name for file in changed.folder.glob("*-*.json")} == {"linear_probe-sex.json"}


def test_a_used_export_folder_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").write_text("mine")
    with pytest.raises(UserError, match="is not empty"):
        job(tmp_path / "runs").export(tmp_path / "used")
    assert not (tmp_path / "runs").exists()


def test_training_killed_before_its_stage_counts_as_finished_is_not_done_again(
    done: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last checkpoint outlives the end of the training until the stage is marked."""
    shutil.copytree(done.runs, tmp_path / "runs")
    again = job(tmp_path / "runs")
    shutil.rmtree(again.encoder_stage.folder)
    with monkeypatch.context() as patched:
        patched.setattr(cfssl.production, "write_json", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            again.objective  # noqa: B018
    before = (again.encoder_stage.folder / "metrics.jsonl").read_bytes()
    weights = job(tmp_path / "runs").objective.state_dict()
    assert (again.encoder_stage.folder / "metrics.jsonl").read_bytes() == before
    assert all(torch.equal(value, weights[name]) for name, value in done.objective.state_dict().items())
    assert not (again.encoder_stage.folder / "checkpoint.safetensors").exists()


def test_a_flipped_byte_is_mended_by_a_build_that_checks(done: Pipeline, tmp_path: Path) -> None:
    shutil.copytree(done.runs, tmp_path / "runs")
    broken = job(tmp_path / "runs")
    shard = broken.generation.bank_stage.folder / "bank" / "shard-00000.npy"
    content = shard.read_bytes()
    shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    broken.generation.build_bank(broken.generation.bank_stage.folder)
    assert shard.read_bytes() != content
    broken.generation.build_bank(broken.generation.bank_stage.folder, check=True)
    assert shard.read_bytes() == content


def test_the_oracle_of_a_recipe_knows_what_follows_from_an_intervention(tmp_path: Path) -> None:
    graph = {"disease": ["age"]}
    oracle = {"name": "oracle", "parents": ["scanner", "disease", "age"], "graph": graph}
    made = job(
        tmp_path / "runs",
        generator=oracle,
        bank={"do": {"age": [85.0]}},
        views={"counterfactual": None},
        evaluate=[],
    )
    bank = made.generation.bank
    stored = bank.gather(np.arange(len(bank)), np.ones((len(bank), 1), int))[:, 0]
    rows = bank.rows
    do = {"age": torch.full((len(rows),), 85.0)}
    truth = made.table.truth
    assert truth is not None
    followed = truth.attributes(rows, do)
    assert (followed["disease"] != made.table.encode(("disease",), rows)["disease"]).any()
    np.testing.assert_array_equal(stored, truth.counterfactual(rows, followed))


def test_every_joint_intervention_of_an_oracles_bank_is_the_worlds_own(tmp_path: Path) -> None:
    made = job(
        tmp_path / "runs",
        generator={"name": "oracle", "parents": ["scanner", "sex"]},
        bank={"do": [{"scanner": "all", "sex": "all"}]},
        views={"counterfactual": None},
        evaluate=[],
    )
    bank, truth, attributes = made.generation.bank, made.table.truth, made.table.attributes
    codes = {name: attributes[name].categories for name in ("scanner", "sex")}
    assert len(bank.views) == 8
    for slot, view in enumerate(bank.views, start=1):
        assert view.keys() == codes.keys()
        items = np.flatnonzero(bank.available[:, slot])
        do = {name: torch.full((len(items),), codes[name].index(view[name])) for name in codes}
        stored = bank.gather(items, np.full((len(items), 1), slot))[:, 0]
        np.testing.assert_array_equal(stored, truth.counterfactual(bank.rows[items], do))
    # Of the eight, only what the patient has already is not made.
    assert bank.available[:, 1:].sum(1).tolist() == [7] * len(bank)


def test_a_bank_that_lost_a_shard_is_named_and_mended(done: Pipeline, tmp_path: Path) -> None:
    shutil.copytree(done.runs, tmp_path / "runs")
    broken = job(tmp_path / "runs")
    shard = broken.generation.bank_stage.folder / "bank" / "shard-00000.npy"
    content = shard.read_bytes()
    shard.unlink()
    with pytest.raises(UserError, match=r"shard-00000\.npy is missing"):
        broken.generation.bank  # noqa: B018
    broken.generation.build_bank(broken.generation.bank_stage.folder)
    assert shard.read_bytes() == content
    assert len(broken.generation.bank) == len(done.generation.bank)


def test_a_stage_whose_product_was_deleted_is_made_again(done: Pipeline, tmp_path: Path) -> None:
    shutil.copytree(done.runs, tmp_path / "runs")
    again = job(tmp_path / "runs")
    again.encoder_stage.product.unlink()
    assert {stage.name for stage in again.stages() if not stage.done} == {"encoder"}
    state, expected = again.objective.state_dict(), done.objective.state_dict()
    assert all(torch.equal(state[name], value) for name, value in expected.items())


def test_a_recipe_that_does_not_fit_the_table_is_refused_before_the_run_folder_exists(tmp_path: Path) -> None:
    wrong = job(
        tmp_path,
        generator={"parents": ["scanner", "weight"]},
        evaluate=[{"name": "knn", "target": "diseas", "by": ["age"]}],
        backbone={"name": "resnet_18"},
    )
    with pytest.raises(UserError, match="does not fit the table") as caught:
        wrong.run()
    message = str(caught.value)
    assert "generator.parents = 'weight': no such attribute" in message
    assert "evaluate[0].target = 'diseas': no such attribute; the nearest is 'disease'" in message
    assert "evaluate[0].by = 'age': is continuous" in message
    assert "resnet18" in message
    assert not wrong.folder.exists()


@pytest.mark.parametrize(
    ("plan", "expected"),
    [
        ({}, r"the bank holds \['A', 'B'\] and its categories are \['A', 'B', 'C', 'D'\]"),
        ({"probability": 1, "target": {"C": 1}}, r"target names \['C'\], but the bank's values"),
    ],
)
def test_a_view_plan_the_bank_will_not_serve_is_refused_before_anything_is_trained(
    tmp_path: Path, plan: dict[str, Any], expected: str
) -> None:
    views = {"counterfactual": {"variable": "scanner", **plan}}
    with pytest.raises(UserError, match=expected):
        job(tmp_path, bank={"do": {"scanner": ["A", "B"]}}, views=views).table  # noqa: B018


def test_stochastic_depth_that_the_backbone_lacks_is_refused_before_anything_is_trained(
    tmp_path: Path,
) -> None:
    with pytest.raises(UserError, match="vgg11 has no stochastic depth"):
        job(tmp_path, backbone={"name": "vgg11", "drop_path": 0.1}).table  # noqa: B018


def test_the_plan_draws_from_the_categories_of_the_table(done: Pipeline) -> None:
    assert done.view_data().plan.probability == 1 - 1 / 4


def test_the_real_only_pipeline_and_the_supervised_one_run(tmp_path: Path) -> None:
    plain = job(tmp_path, generator=None, bank={"do": {}}, views={"counterfactual": None})
    assert plain.generation.generator_stage is None
    assert plain.generation.bank.views == ()
    frame = plain.table.frame
    assert len(plain.generation.bank) == (frame["split"] == "train").sum()
    supervised = job(
        tmp_path,
        generator=None,
        bank={"do": {}},
        views={"counterfactual": None, "count": 1},
        objective={"name": "supervised", "target": "scanner"},
        evaluate=[],
    )
    assert "head.weight" in supervised.objective.state_dict()


def test_a_table_with_missing_targets_trains_on_what_is_known(tmp_path: Path) -> None:
    rng = numpy_generator(0)
    images = (rng.random((120, 64, 64)) * 255).astype(np.uint8)
    label = np.array(["a", "b", ""])[rng.integers(0, 3, 120)]
    np.savez(tmp_path / "t.npz", images=images)
    pd.DataFrame({"label": label, "patient": np.arange(120) // 2}).to_csv(tmp_path / "t.csv", index=False)
    content = {
        "name": "known",
        "data": {
            "name": "table",
            "root": str(tmp_path),
            "path": "t.npz",
            "group": "patient",
            "attributes": {"label": {"kind": "binary"}},
            "split": {"fractions": [0.6, 0.2, 0.2]},
        },
        "views": {"count": 1},
        "objective": {"name": "supervised", "target": "label"},
        "backbone": {"name": "test_resnet"},
        "train": {"epochs": 1, "batch": 16},
        "evaluate": [{"name": "linear_probe", "target": "label", "by": ["label"], "resamples": 20}],
        "hardware": {"accelerator": "cpu"},
    }
    pipeline = Pipeline(parse_recipe(content, "known"), tmp_path / "runs", quiet=True)
    (result,) = pipeline.run()
    known = pipeline.table.rows("test", known=("label",))
    assert result["n"] == len(known) < len(pipeline.table.rows("test"))
    assert result["groups"]["label"]["table"]["a"]["auc"]["value"] is None
    assert len(pipeline.view_data().source) == len(pipeline.table.rows("train", known=("label",)))


TRACKED = {
    "generator": None,
    "bank": {"do": {}},
    "views": {"counterfactual": None},
    "evaluate": [],
    "train": {"epochs": 1, "batch": 48, "log_every": 1},
    "monitor": {"target": "sex"},
}


def test_wandb_receives_the_metrics_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    tracked = job(tmp_path, **TRACKED, track="wandb")
    tracked.objective  # noqa: B018  trains
    (folder,) = tracked.encoder_stage.folder.glob("wandb/offline-run-*")
    assert list(folder.glob("run-*.wandb"))
    assert len(tracked.metrics_path.read_text().splitlines()) == 4  # 3 losses and a look


def test_tensorboard_receives_what_metrics_jsonl_says(tmp_path: Path) -> None:
    from tensorboardX.proto.event_pb2 import Event

    tracked = job(tmp_path, **TRACKED, track="tensorboard")
    tracked.objective  # noqa: B018  trains
    (path,) = tracked.encoder_stage.folder.glob("tensorboard/events.*")
    content, place, found = path.read_bytes(), 0, {}
    while place < len(content):  # records: length, its checksum, the event, its checksum
        (length,) = struct.unpack_from("<Q", content, place)
        event = Event.FromString(content[place + 12 : place + 12 + length])
        found |= {(of.tag, event.step): of.simple_value for of in event.summary.value}
        place += length + 16
    expected = {
        (name, line["step"]): value
        for line in read_metrics(tracked.metrics_path)
        for name, value in line.items()
        if name != "step" and isinstance(value, int | float)
    }
    assert found == pytest.approx(expected, rel=1e-6)
    assert ("loss", 2) in found


def test_tensorboard_without_its_package_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(UserError, match=r"needs the package tensorboardX, .* install cfssl\[tensorboard\]"):
        job(tmp_path, **TRACKED, track="tensorboard").objective  # noqa: B018

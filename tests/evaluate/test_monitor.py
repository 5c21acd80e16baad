"""The monitor: its figures are those of closed forms and of the libraries, its warnings name each collapse
and no healthy encoder, and looking changes nothing."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from cfssl.data.datasets import PhantomChestSettings, open_dataset, prepare_dataset
from cfssl.data.table import ImageTable
from cfssl.engine.run import Run
from cfssl.evaluate import monitor as room
from cfssl.evaluate.features import extract
from cfssl.evaluate.monitor import (
    COMPLETE,
    DIMENSIONAL,
    ONE_HOT,
    UNIFORM,
    C,
    Monitor,
    collapses,
    effective_rank,
    first_warnings,
    monitored_rows,
    separation,
    spread,
    teacher_collapses,
)
from cfssl.evaluate.settings import MonitorSettings
from cfssl.models.backbone import BackboneSettings, create_backbone
from cfssl.objectives.teacher import entropies as logged_entropies

ENTROPIES = ("teacher_entropy", "marginal_entropy")  # as an objective logs them
RNG = np.random.default_rng(0)
GAUSSIAN = RNG.normal(size=(2000, 32))


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> ImageTable:
    settings, folder = PhantomChestSettings(count=240), tmp_path_factory.mktemp("data") / "table"
    prepare_dataset(settings, folder, quiet=True)
    return open_dataset(settings, folder)


def looking(table: ImageTable, folder: Path, encoder: torch.nn.Module, **settings: Any) -> Monitor:
    return Monitor(MonitorSettings(**settings), encoder, table, (64, 64), "constant", 1, Run(folder))


@pytest.mark.parametrize("directions", [1, 3, 20])
def test_equal_singular_values_have_their_number_as_effective_rank(directions: int) -> None:
    basis = np.linalg.qr(RNG.normal(size=(50, 20)))[0][:, :directions]
    other = np.linalg.qr(RNG.normal(size=(30, 20)))[0][:, :directions]
    assert effective_rank(7.0 * basis @ other.T) == pytest.approx(directions)


def test_unequal_singular_values_have_the_exponential_of_their_entropy_as_effective_rank() -> None:
    values = np.array([4.0, 2.0, 1.0, 1.0])  # shares 1/2, 1/4, 1/8, 1/8: an entropy of 1.75 bits
    assert effective_rank(np.diag(values)) == pytest.approx(2**1.75)
    assert effective_rank(np.zeros((4, 3))) == 0


def test_features_that_spread_in_all_directions_have_std_1_and_full_rank() -> None:
    found = spread(GAUSSIAN)
    assert found["feature_std"] == pytest.approx(1, abs=0.02)
    assert found["effective_rank"] == pytest.approx(32, rel=0.02)


def test_neither_a_common_offset_nor_the_length_of_the_features_makes_rank() -> None:
    line = np.outer(RNG.normal(size=500), np.ones(16)) + 100 * np.eye(16)[0]
    length = np.exp(RNG.normal(size=(500, 1)))
    assert spread(length * line)["effective_rank"] == pytest.approx(spread(line)["effective_rank"])
    # On the sphere a line is a short arc: one direction and a little of its bend.
    assert spread(line)["effective_rank"] < 1.5


MADE_UP = {
    COMPLETE: 1 + 1e-6 * GAUSSIAN,
    DIMENSIONAL: GAUSSIAN[:, :2] @ RNG.normal(size=(2, 32)) + 1e-4 * GAUSSIAN,
}


@pytest.mark.parametrize("name", MADE_UP)
def test_each_collapse_of_features_is_named(name: str) -> None:
    features = MADE_UP[name]
    assert list(collapses(spread(features), features.shape)) == [name]


def test_features_that_are_all_equal_are_a_complete_collapse() -> None:
    features = np.ones((50, 8), np.float32)
    assert list(collapses(spread(features), features.shape)) == [COMPLETE]


def entropies(targets: np.ndarray) -> tuple[float, float]:
    """Mean entropy and entropy of the mean of targets (n, K), as shares of log K."""

    def entropy(p: np.ndarray) -> np.ndarray:
        return -np.where(p > 0, p * np.log(np.maximum(p, 1e-300)), 0).sum(-1)

    greatest = math.log(targets.shape[1])
    return float(entropy(targets).mean()) / greatest, float(entropy(targets.mean(0))) / greatest


def test_each_collapse_of_a_teacher_is_named_and_a_sharp_balanced_one_is_none() -> None:
    uniform = np.full((64, 100), 0.01)
    one_hot = np.eye(100)[np.zeros(64, int)]
    balanced = np.eye(100)[np.arange(64)]
    soft = np.exp(RNG.normal(size=(64, 100)))
    soft /= soft.sum(1, keepdims=True)
    assert list(teacher_collapses(*entropies(uniform))) == [UNIFORM]
    assert list(teacher_collapses(*entropies(one_hot))) == [ONE_HOT]
    assert teacher_collapses(*entropies(balanced)) == {}
    assert teacher_collapses(*entropies(soft)) == {}
    assert teacher_collapses(1.0, None) == {}
    logged = logged_entropies(torch.from_numpy(soft))
    assert [float(logged[name]) for name in ENTROPIES] == pytest.approx(entropies(soft))


@pytest.mark.parametrize("name", ["test_byobnet", "test_resnet", "test_vit", "resnet18"])
def test_an_encoder_with_random_weights_is_no_false_alarm(table: ImageTable, name: str) -> None:
    encoder = create_backbone(BackboneSettings(name), 1, 64, seed=0)
    features = extract(encoder, table, table.rows("train")[:100], quiet=True)
    assert collapses(spread(features), features.shape) == {}


def test_a_look_measures_the_target_on_validation_rows_and_stays_away_from_the_test_rows(
    table: ImageTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def spy(encoder: Any, table: ImageTable, rows: np.ndarray, *parts: Any, **options: Any) -> np.ndarray:
        seen.extend(rows.tolist())
        return extract(encoder, table, rows, *parts, **options)

    monkeypatch.setattr(room, "extract", spy)
    encoder = create_backbone(BackboneSettings("test_byobnet"), 1, 64, seed=0)
    content = looking(table, tmp_path, encoder, target="disease", rows=1000)(3).content
    assert set(seen) == {*table.rows("train").tolist(), *table.rows("val").tolist()}
    train, val = (extract(encoder, table, table.rows(split), quiet=True) for split in ("train", "val"))
    y = {
        split: table.encode(("disease",), table.rows(split))["disease"].numpy() for split in ("train", "val")
    }
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=C, max_iter=2000)).fit(
        train.astype(float), y["train"]
    )
    expected = roc_auc_score(y["val"], probe.decision_function(val.astype(float)))
    assert content["probe_auc"] == pytest.approx(expected, abs=1e-3)
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (train, val)]
    similarity = unit[1].astype(float) @ unit[0].T.astype(float)
    nearest = np.argsort(-similarity, axis=1)[:, : room.K]
    weights = np.exp(np.take_along_axis(similarity, nearest, 1) / 0.07)
    votes = (weights * y["train"][nearest]).sum(1) / weights.sum(1)
    assert content["knn_auc"] == pytest.approx(roc_auc_score(y["val"], votes), abs=2e-3)
    json.dumps(content, allow_nan=False)


def test_without_a_target_no_label_is_read(
    table: ImageTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: ImageTable, name: str) -> None:
        raise AssertionError(name)

    monkeypatch.setattr(ImageTable, "_encoded", refuse)
    encoder = create_backbone(BackboneSettings("test_byobnet"), 1, 64, seed=0)
    content = looking(table, tmp_path, encoder)(0).content
    assert set(content) == {"feature_std", "effective_rank", "collapse"}


def test_the_rows_are_few_the_same_every_time_and_of_every_class(table: ImageTable) -> None:
    settings = MonitorSettings(target="disease", rows=16)
    rows, y = monitored_rows(table, "train", settings)
    assert len(rows) == 16
    assert set(y) == {0, 1}
    assert set(rows) <= set(table.rows("train"))
    np.testing.assert_array_equal(rows, monitored_rows(table, "train", settings)[0])
    np.testing.assert_array_equal(table.encode(("disease",), rows)["disease"].numpy(), y)


def test_looking_moves_neither_weights_nor_buffers_nor_random_numbers(
    table: ImageTable, tmp_path: Path
) -> None:
    encoder = create_backbone(BackboneSettings("test_byobnet"), 1, 64, seed=0).train()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    streams = torch.random.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    looking(table, tmp_path, encoder, target="disease")(0)
    assert all(torch.equal(before[name], value) for name, value in encoder.state_dict().items())
    assert all(parameter.grad is None for parameter in encoder.parameters())
    assert torch.equal(torch.random.get_rng_state(), streams[0])
    np.testing.assert_array_equal(np.random.get_state()[1], streams[1])  # noqa: NPY002


class Constant(torch.nn.Module):
    """Every image becomes the same point."""

    def __init__(self) -> None:
        super().__init__()
        self.point = torch.nn.Parameter(torch.ones(8))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.point.expand(len(images), 8)


def test_a_collapse_is_printed_once_and_stops_only_where_it_is_to(
    table: ImageTable, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run(tmp_path)
    watch = looking(table, tmp_path, Constant())
    for step in (9, 19):
        seen = watch(step)
        assert seen.content["collapse"] == [COMPLETE]
        assert seen.stop is None
        run.log({"step": step, **seen.content})
    printed = capsys.readouterr().err
    assert printed.count(COMPLETE) == 1
    assert "step 9: complete collapse: the features of all images are nearly one point" in printed
    assert first_warnings([{"step": 9, "collapse": [COMPLETE]}, {"step": 19, "collapse": [COMPLETE]}]) == {
        COMPLETE: 9
    }
    stopping = looking(table, tmp_path, Constant(), stop_on_collapse=True)(29)
    assert stopping.stop is not None
    assert "complete collapse at step 29" in stopping.stop


def test_the_teacher_is_judged_by_what_the_objective_logged_last(table: ImageTable, tmp_path: Path) -> None:
    run = Run(tmp_path)
    watch = looking(table, tmp_path, create_backbone(BackboneSettings("test_byobnet"), 1, 64, seed=0))
    healthy = {"teacher_entropy": 0.4, "marginal_entropy": 0.8}
    for step, parts in enumerate([healthy, dict.fromkeys(healthy, 1.0)]):
        run.log({"step": step, "loss": 1.0, **parts})
        run.log({"step": step, **watch(step).content})
    lines = [json.loads(line) for line in run.metrics_path.read_text().splitlines()]
    assert [line["collapse"] for line in lines if "collapse" in line] == [[], [UNIFORM]]


def test_separation_of_a_target_that_the_features_hold_is_complete_and_of_noise_is_none() -> None:
    y = np.arange(400) % 2
    x = RNG.normal(size=(400, 6))
    held = x + 8 * y[:, None] * np.eye(6)[0]
    found = separation(held[:200], y[:200], held[200:], y[200:], 2)
    assert min(found.values()) > 0.99
    chance = separation(x[:200], y[:200], x[200:], y[200:], 2)
    assert all(abs(value - 0.5) < 0.15 for value in chance.values())

"""Fine-tuning trains all of the network on the labelled rows alone, chooses a moment and nothing else, and
ends with the same bytes after a stop."""

import copy
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import nn

from cfssl.data.prepare import save_prepared
from cfssl.data.table import Attribute, ImageTable
from cfssl.data.views import ViewBatch
from cfssl.engine.checkpoint import load_checkpoint
from cfssl.engine.run import HardwareSettings, Run
from cfssl.errors import UserError
from cfssl.evaluate.best import checks_of, tuning_protocol
from cfssl.evaluate.evaluations import Question, subsets
from cfssl.evaluate.finetune import (
    FineTuning,
    class_weights,
    finetune,
    load_tuned,
    schedule,
    tuned_scores,
    view_settings,
)
from cfssl.evaluate.settings import FineTuningSettings
from cfssl.seeds import numpy_generator

ROWS = 120
Y = np.arange(ROWS) % 2
TRAIN, VAL, TEST = np.arange(0, 60), np.arange(60, 90), np.arange(90, 120)
SIZE = (8, 8)


class Encoder(nn.Sequential):
    """Convolution, batch normalisation, pooling: 4 features."""

    num_features = 4

    def __init__(self) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            convolution = nn.Conv2d(1, 4, 3, padding=1)
        super().__init__(convolution, nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.eval()


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> ImageTable:
    """Class 1 has a brighter line."""
    images = numpy_generator("stripes").integers(0, 200, (ROWS, 1, 8, 8), dtype=np.uint8)
    images[Y == 1, :, 3] += 55
    frame = pd.DataFrame(
        {"dx": np.array(["no", "yes"])[Y], "split": np.repeat(["train", "val", "test"], [60, 30, 30])}
    )
    folder = tmp_path_factory.mktemp("table") / "t"
    return save_prepared(folder, "stripes", frame, {"dx": Attribute("dx", "binary", ("no", "yes"))}, images)


def question(seed: int = 0, **changes: Any) -> Question:
    asked = Question(TRAIN, Y[TRAIN], VAL, Y[VAL], TEST, 2, 1.0, seed)
    return dataclasses.replace(asked, **changes)


def settings(**changes: Any) -> FineTuningSettings:
    train = {"epochs": 6, "batch": 20, "lr": 0.02, "checkpoint_every": 4} | changes.pop("train", {})
    return FineTuningSettings("finetune", "dx", train=train, **{"checks": 3, "least_steps": 1} | changes)


def tuned(
    table: ImageTable, folder: Path, asked: Question | None = None, stop: int | None = None, **changes: Any
) -> Any:
    """The state that is written (None when stopped) and the run."""
    run = Run(folder, HardwareSettings(accelerator="cpu"), quiet=True, stop_at=stop)
    path = folder / "classifier.safetensors"
    ended = finetune(settings(**changes), Encoder(), table, asked or question(), SIZE, "constant", run, path)
    return (load_checkpoint(path)["network"] if ended else None), run


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, other[name]) for name, value in one.items())


def test_the_network_is_that_of_the_moment_with_the_highest_validation_auc(
    table: ImageTable, tmp_path: Path
) -> None:
    _, run = tuned(table, tmp_path)
    network, how = load_tuned(tmp_path / "classifier.safetensors", Encoder(), 2)
    found = [line["val_auc"] for line in checks_of(run)]
    assert [line["step"] for line in checks_of(run)] == [5, 11, 17]  # 18 steps, three moments
    scores = tuned_scores(network, table, VAL, SIZE, "constant")
    assert roc_auc_score(Y[VAL], scores[:, 1]) == pytest.approx(max(found), abs=1e-5)
    protocol = tuning_protocol(how, run)
    assert protocol["epoch"] == 2 * (1 + found.index(max(found)))
    assert (protocol["epoch_chosen_on"], protocol["epochs"], protocol["batch"]) == ("validation AUC", 6, 20)
    # log-odds of the softmax of the network's own logits, in eval mode
    images = torch.from_numpy(table.images.read(VAL).astype(np.float32) / 255)
    with torch.no_grad():
        probability = network(images).double().softmax(1)
    np.testing.assert_allclose(1 / (1 + np.exp(-scores)), probability, atol=1e-6)


def test_validation_labels_choose_the_moment_and_move_no_weight(table: ImageTable, tmp_path: Path) -> None:
    state, run = tuned(table, tmp_path / "a")
    turned, other = tuned(table, tmp_path / "b", question(val_y=1 - Y[VAL]))
    assert same(*(load_checkpoint(one.checkpoint_path)["task"] for one in (run, other)))
    aucs = [[line["val_auc"] for line in checks_of(one)] for one in (run, other)]
    assert aucs[1] == pytest.approx([1 - found for found in aucs[0]], abs=1e-5)
    assert len(set(aucs[0])) > 1
    assert not same(state, turned)


@pytest.mark.parametrize("stop", [3, 6, 13])
def test_a_training_that_was_stopped_ends_with_the_same_bytes(
    table: ImageTable, tmp_path: Path, stop: int
) -> None:
    tuned(table, tmp_path / "whole")
    assert tuned(table, tmp_path / "stopped", stop=stop)[0] is None
    tuned(table, tmp_path / "stopped")
    for file in ("classifier.safetensors", "metrics.jsonl"):
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "stopped" / file).read_bytes()


def test_all_of_the_network_learns_and_batch_statistics_with_it(table: ImageTable, tmp_path: Path) -> None:
    encoder = Encoder().state_dict()
    state, _ = tuned(table, tmp_path)
    for name in ("0.weight", "1.weight", "1.running_mean"):
        assert not torch.equal(state[f"0.{name}"], encoder[name]), name


def test_while_only_the_head_learns_the_encoder_keeps_weights_and_batch_statistics(
    table: ImageTable, tmp_path: Path
) -> None:
    encoder, asked = Encoder(), question()
    head_first = settings(head_first=0.7, train={"weight_decay": 0.5})
    run = Run(tmp_path, HardwareSettings(accelerator="cpu"), quiet=True, stop_at=13)  # round(0.7 * 18)
    assert not finetune(head_first, encoder, table, asked, SIZE, "constant", run, tmp_path / "c.safetensors")
    task = load_checkpoint(run.checkpoint_path)["task"]
    before = Encoder().state_dict()
    assert all(torch.equal(task[f"network.0.{name}"], value) for name, value in before.items())
    fresh = FineTuning(Encoder(), torch.ones(2), "dx", 13, schedule(head_first, 60, 0).seed).state_dict()
    assert not torch.equal(task["network.1.weight"], fresh["network.1.weight"])
    finetune(
        head_first,
        encoder,
        table,
        asked,
        SIZE,
        "constant",
        dataclasses.replace(run, stop_at=14),
        tmp_path / "c",
    )
    task = load_checkpoint(run.checkpoint_path)["task"]
    assert not torch.equal(task["network.0.0.weight"], before["0.weight"])
    assert not torch.equal(task["network.0.1.running_mean"], before["1.running_mean"])
    assert same(encoder.state_dict(), before)  # the pre-trained one is copied


def test_seeds_redraw_head_and_order_and_the_same_seed_gives_the_same(
    table: ImageTable, tmp_path: Path
) -> None:
    states = [tuned(table, tmp_path / str(place), question(seed))[0] for place, seed in enumerate((0, 0, 1))]
    assert same(states[0], states[1])
    assert not same(states[0], states[2])
    schedules = [
        schedule(settings(train={"seed": of_train}), 60, seed).seed for of_train in (0, 1) for seed in (0, 1)
    ]
    assert len(set(schedules)) == 4
    several = settings(fractions=(0.5, 1.0), seeds=(3, 4))
    assert subsets(several) == [(0.5, 3), (0.5, 4), (1.0, 3), (1.0, 4)]


def test_it_learns_to_see_the_line(table: ImageTable, tmp_path: Path) -> None:
    tuned(table, tmp_path, train={"epochs": 40}, geometry={"crop_scale": [1, 1], "rotation": 0})
    network, _ = load_tuned(tmp_path / "classifier.safetensors", Encoder(), 2)
    scores = tuned_scores(network, table, TEST, SIZE, "constant")
    assert roc_auc_score(Y[TEST], scores[:, 1]) > 0.75


def batch_of(table: ImageTable, rows: np.ndarray) -> ViewBatch:
    images = torch.from_numpy(table.images.read(rows).astype(np.float32) / 255)[:, None]
    nothing = torch.zeros(len(rows), 1)
    attributes = {"dx": torch.from_numpy(Y[rows])}
    return ViewBatch(
        images,
        nothing.bool(),
        nothing.long(),
        nothing,
        nothing,
        attributes,
        nothing[:, 0].long(),
        tuple(range(len(images))),
    )


def test_the_loss_is_the_cross_entropy_weighted_by_class(table: ImageTable) -> None:
    rows, weights = np.array([0, 1, 2, 4, 6, 8]), torch.tensor([0.6, 3.0])
    task = FineTuning(Encoder(), weights, "dx", 0, 0)
    loss = task(batch_of(table, rows), 0)["loss"]
    with torch.no_grad():
        images = torch.from_numpy(table.images.read(rows).astype(np.float32) / 255)
        logits = copy.deepcopy(task.network).train()(images).double()
    y = torch.from_numpy(Y[rows])
    expected = -(logits.log_softmax(1)[torch.arange(6), y] * weights[y]).mean()
    assert float(loss.detach()) == pytest.approx(float(expected), rel=1e-5)


def test_class_weights_give_every_class_the_same_sum_and_rows_a_mean_of_one() -> None:
    y = np.repeat([0, 1, 2], [6, 3, 1])
    weights = class_weights(y, 3, balanced=True).numpy()
    np.testing.assert_allclose(np.bincount(y, weights[y]), [10 / 3] * 3, rtol=1e-6)
    np.testing.assert_array_equal(class_weights(y, 3, balanced=False), np.ones(3))


def test_a_small_label_subset_makes_at_least_so_many_steps_with_a_batch_it_can_fill() -> None:
    train = {"epochs": 2, "batch": 32, "accumulate": 4}
    of_many = schedule(settings(train=train, least_steps=50), 3200, 0)
    assert (of_many.batch, of_many.epochs) == (32, 2)
    of_few = schedule(settings(train=train, least_steps=50), 21, 0)
    assert (of_few.batch, of_few.epochs) == (20, 50)
    with pytest.raises(UserError, match="finetune-dx has 3 labelled training images for 4 micro-batches"):
        schedule(settings(train=train), 3, 0)


def test_views_have_the_size_that_the_encoder_knows_and_the_look_of_the_settings() -> None:
    own = settings(geometry={"rotation": 3}, photometric={"brightness": 0.05})
    for size, stored, side in (((8, 8), (1, 8, 8), None), ((8, 6), (1, 8, 6), None), ((8, 8), (1, 9, 7), 8)):
        views = view_settings(own, size, "reflect", stored)
        assert views.shape(stored)[1] == size
        assert (views.size, views.border, views.count) == (side, "reflect", 1)
        assert (views.geometry, views.photometric) == (own.geometry, own.photometric)
    with pytest.raises(UserError, match="views of 8 x 6 pixels from images of 9 x 7"):
        view_settings(own, (8, 6), "reflect", (1, 9, 7))


@pytest.mark.parametrize(
    "change",
    [
        {"balanced": True},
        {"head_first": 0.5},
        {"checks": 9},
        {"least_steps": 40},
        {"geometry": {"crop_scale": [0.3, 0.5]}},
        {"photometric": {"brightness": 0.5}},
        {"train": {"lr": 0.001}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_every_setting_acts(table: ImageTable, tmp_path: Path, change: dict[str, Any]) -> None:
    unequal = question(train=TRAIN[:45], train_y=np.where(np.arange(45) < 30, 0, Y[:45]))
    runs = []
    for name, changes in (("before", {}), ("after", change)):
        _, run = tuned(table, tmp_path / name, unequal, **changes)
        runs.append(checks_of(run))
    assert runs[0] != runs[1]

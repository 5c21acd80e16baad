"""Segmentation: what learns, what rests, what chooses, what the loss is, and that a stop changes nothing."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from segment_toys import (
    DECODER,
    ROWS,
    SIDE,
    SIZE,
    STRUCTURES,
    TEST,
    TRAIN,
    VAL,
    encoder,
    masks_of,
    origin,
    same,
    settings,
    table_of_discs,
)

from cfssl.data.table import ImageTable, MaskReader
from cfssl.data.views import ViewBatch, ViewData
from cfssl.engine.checkpoint import load_checkpoint
from cfssl.engine.run import HardwareSettings, Run
from cfssl.errors import UserError
from cfssl.evaluate.best import checks_of
from cfssl.evaluate.contours import dice
from cfssl.evaluate.finetune import Labelled, view_settings
from cfssl.evaluate.masked import Shares
from cfssl.evaluate.segment import (
    Origin,
    Segmenter,
    exclusive_loss,
    load_segmenter,
    segmented,
    segmenter,
    train_segmenter,
)
from cfssl.models.dense import DecoderSettings, create_dense
from cfssl.objectives.segmentation import mask_loss
from cfssl.seeds import torch_generator


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> ImageTable:
    return table_of_discs(tmp_path_factory.mktemp("table") / "t")


def trained(
    table: ImageTable, folder: Path, stop: int | None = None, start: Any = None, **changes: Any
) -> Any:
    """The state that is written (None when stopped) and the run."""
    run = Run(folder, HardwareSettings(accelerator="cpu"), quiet=True, stop_at=stop)
    path, rows = folder / "segmenter.safetensors", Shares(TRAIN, VAL, 1.0, changes.pop("seed", 0), 0)
    begin = start or origin()
    ended = train_segmenter(settings(**changes), begin, table, rows, SIZE, "constant", run, path)
    return (load_checkpoint(path)["network"] if ended else None), run


def test_the_network_is_that_of_the_moment_with_the_highest_validation_dice(
    table: ImageTable, tmp_path: Path
) -> None:
    _, run = trained(table, tmp_path)
    network, how = load_segmenter(settings(), tmp_path / "segmenter.safetensors", origin(), 1)
    found = [line["val_dice"] for line in checks_of(run, "val_dice")]
    assert [line["step"] for line in checks_of(run, "val_dice")] == [3, 7, 11]  # 12 steps, three moments
    assert (how["epochs"], how["batch"], how["steps_per_epoch"]) == (3, 7, 4)
    # one image at a time, thresholded by hand
    images = torch.from_numpy(table.images.read(VAL).astype(np.float32) / 255)
    with torch.no_grad():
        masks = torch.cat([network(image[None]).sigmoid() > 0.5 for image in images]).numpy()
    assert max(found) == pytest.approx(dice(masks, masks_of(table, VAL)).mean(), abs=1e-5)


def test_test_rows_choose_nothing_and_validation_masks_move_no_weight(
    table: ImageTable, tmp_path: Path
) -> None:
    other = table_of_discs(tmp_path / "other", other_test=True)
    for rows, is_same in ((np.r_[TRAIN, VAL], True), (TEST, False)):
        assert np.array_equal(table.images.read(rows), other.images.read(rows)) == is_same
        assert np.array_equal(*(masks_of(of, rows) for of in (table, other))) == is_same
    runs = [trained(of, tmp_path / str(place)) for place, of in enumerate((table, other))]
    files = [(tmp_path / str(place) / "segmenter.safetensors").read_bytes() for place in range(2)]
    assert files[0] == files[1]
    unmasked = table_of_discs(tmp_path / "unmasked", without=tuple(VAL.tolist()))
    _, run = trained(unmasked, tmp_path / "v")
    ends = [load_checkpoint(of.checkpoint_path)["task"] for of in (runs[0][1], run)]
    assert same(*ends)
    assert checks_of(run, "val_dice") != checks_of(runs[0][1], "val_dice")


@pytest.mark.parametrize("stop", [2, 4, 9])
def test_a_training_that_was_stopped_ends_with_the_same_bytes(
    table: ImageTable, tmp_path: Path, stop: int
) -> None:
    trained(table, tmp_path / "whole")
    assert trained(table, tmp_path / "stopped", stop)[0] is None
    trained(table, tmp_path / "stopped")
    for file in ("segmenter.safetensors", "metrics.jsonl"):
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "stopped" / file).read_bytes()


@pytest.mark.parametrize(
    ("learns", "rests"), [("all", []), ("decoder", ["encoder"]), ("head", ["encoder", "decoder"])]
)
def test_what_does_not_learn_keeps_its_bits_and_the_rest_learns(
    table: ImageTable, tmp_path: Path, learns: str, rests: list[str]
) -> None:
    state, run = trained(table, tmp_path, learns=learns, train={"weight_decay": 0.5})
    before = segmenter(settings(), origin(), 1, load_seed(run)).state_dict()
    parts = {"encoder": "dense.encoder.", "decoder": "dense.decoder.", "head": "head."}
    for part, prefix in parts.items():
        names = [name for name in before if name.startswith(prefix) and before[name].is_floating_point()]
        equal = [torch.equal(state[name], before[name]) for name in names]
        assert names
        assert all(equal) if part in rests else not any(equal), part


def load_seed(run: Run) -> int:
    """Of the schedule that a run was trained with."""
    seed = load_checkpoint(run.checkpoint_path)["schedule"]["seed"]
    assert isinstance(seed, int)
    return seed


def test_a_new_decoder_and_head_are_the_same_for_every_encoder() -> None:
    one, other = (segmenter(settings(), origin(seed), 1, 5).state_dict() for seed in (0, 1))
    own = [name for name in one if not name.startswith("dense.encoder.")]
    assert own
    assert same({name: one[name] for name in own}, other)
    assert not same(one, other)
    again = segmenter(settings(), origin(0), 1, 6).state_dict()
    assert not torch.equal(one["head.weight"], again["head.weight"])


def test_a_trained_decoder_is_taken_over_unless_another_is_asked_for() -> None:
    dense = create_dense(encoder(3), DecoderSettings(**DECODER), 1, 4)
    begin = Origin(dense.encoder, dense)
    taken = segmenter(settings(decoder=None), begin, 1, 0)
    assert same(dense.state_dict(), taken.dense.state_dict())
    assert taken.dense is not dense
    fresh = segmenter(settings(), begin, 1, 0)
    assert same(dense.encoder.state_dict(), fresh.dense.encoder.state_dict())
    assert same(
        segmenter(settings(), origin(), 1, 0).dense.decoder.state_dict(), fresh.dense.decoder.state_dict()
    )


def batch_of(table: ImageTable, rows: np.ndarray) -> ViewBatch:
    """Augmented views with their masks."""
    own = settings(geometry={"crop_scale": [0.4, 0.9], "rotation": 40})
    views = view_settings(own, SIZE, "reflect", table.images.shape)
    return ViewData(Labelled(table, rows), views, len(rows), 1, 0, masks=MaskReader(table, STRUCTURES))[0][0]


@pytest.mark.parametrize("exclusive", [False, True])
def test_the_loss_is_dice_of_each_image_plus_cross_entropy_inside_of_the_image(
    tmp_path: Path, exclusive: bool
) -> None:
    table = table_of_discs(tmp_path / "t", disjoint=exclusive)
    batch = batch_of(table, TRAIN[:4])
    valid = batch.valid.flatten(0, 1)[:, None]
    assert batch.labels is not None
    assert not valid.all()
    true = batch.labels.flatten(0, 1).double()
    channels = 3 if exclusive else 2
    logits = torch.randn(4, channels, *SIZE, generator=torch_generator("logits"), dtype=torch.float64)
    logits.requires_grad_(True)
    loss = (exclusive_loss if exclusive else mask_loss)(logits, true, valid)
    loss.backward()
    assert logits.grad is not None
    assert (logits.grad[~valid.expand_as(logits)] == 0).all()
    inside, pixels = valid.double(), 4 * SIDE * SIDE
    if exclusive:
        classes = torch.cat([1 - true.sum(1, keepdim=True), true], 1)
        entropy = -(inside * classes * logits.log_softmax(1)).sum() / pixels
        p, y = logits.softmax(1)[:, 1:] * inside, true * inside
    else:
        p, y = logits.sigmoid() * inside, true * inside
        pixel = -(y * logits.sigmoid().log() + (inside - y) * (1 - logits.sigmoid()).log())
        entropy = pixel.sum() / (2 * pixels)
    overlap = (2 * (p * y).sum((2, 3)) + 1) / (p.sum((2, 3)) + y.sum((2, 3)) + 1)
    assert loss.item() == pytest.approx((entropy + (1 - overlap).mean()).item(), rel=1e-6)


def test_exclusive_masks_never_overlap_and_are_the_likeliest_structure() -> None:
    network = segmenter(settings(exclusive=True), origin(), 1, 0)
    logits = torch.randn(2, 3, 4, 4, generator=torch_generator("likeliest"))
    masks = network.masks(logits)
    for place in np.ndindex(2, 4, 4):
        item, row, column = place
        likeliest = int(logits[item, :, row, column].argmax())
        assert masks[item, :, row, column].tolist() == [likeliest == 1, likeliest == 2]


def test_exclusive_structures_that_overlap_are_refused(table: ImageTable, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="disc, lower are exclusive, but overlap in 36 of 36 labelled images"):
        trained(table, tmp_path, exclusive=True)


class Bright(torch.nn.Module):
    """A map whose first channel says whether a pixel is bright."""

    width = 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x - 0.45


def test_masks_are_found_on_the_grid_of_the_stored_images(table: ImageTable) -> None:
    network = Segmenter(Bright(), 1, False, 0)  # type: ignore[arg-type]
    torch.nn.init.ones_(network.head.weight)
    torch.nn.init.zeros_(network.head.bias)
    images = table.images.read(TEST)[:, 0] / 255
    exact = np.concatenate([found for _, found in segmented(network, table, TEST, SIZE, "constant")])
    np.testing.assert_array_equal(exact[:, 0], images > 0.45)
    smaller = np.concatenate([found for _, found in segmented(network, table, TEST, (16, 16), "constant")])
    assert smaller.shape == exact.shape == (len(TEST), 1, *SIZE)
    discs = masks_of(table, TEST, ("disc",))
    # the centres of what is found do not move
    for found, disc in zip(smaller[:, 0], discs[:, 0], strict=True):
        centres = [np.argwhere(mask).mean(0) for mask in (found, disc)]
        np.testing.assert_allclose(*centres, atol=1.0)


def test_it_learns_to_find_the_discs(table: ImageTable, tmp_path: Path) -> None:
    trained(
        table, tmp_path, train={"epochs": 14, "lr": 0.02}, geometry={"crop_scale": [0.8, 1], "rotation": 5}
    )
    network, _ = load_segmenter(settings(), tmp_path / "segmenter.safetensors", origin(), 1)
    found = np.concatenate([found for _, found in segmented(network, table, TEST, SIZE, "constant")])
    assert dice(found, masks_of(table, TEST)).mean(0).min() > 0.6
    assert len(found) == len(TEST) < ROWS


@pytest.mark.parametrize(
    "change",
    [
        {"checks": 6},
        {"least_steps": 20},
        {"decoder": {"widths": [8, 8, 8, 8, 4]}},
        {"geometry": {"crop_scale": [0.3, 0.5]}},
        {"photometric": {"brightness": 0.5}},
        {"train": {"lr": 0.001}},
        {"structures": ("lower", "disc")},
        {"seed": 1},
    ],
    ids=lambda change: next(iter(change)),
)
def test_every_setting_acts(table: ImageTable, tmp_path: Path, change: dict[str, Any]) -> None:
    runs = []
    for name, changes in (("before", {}), ("after", change)):
        _, run = trained(
            table,
            tmp_path / name,
            train={"epochs": 2} | changes.get("train", {}),
            **{key: value for key, value in changes.items() if key != "train"},
        )
        runs.append(checks_of(run, "val_dice"))
    assert runs[0] != runs[1]


def test_the_encoder_that_is_given_is_left_as_it_was(table: ImageTable, tmp_path: Path) -> None:
    begin = origin()
    before = copy.deepcopy(begin.encoder.state_dict())
    trained(table, tmp_path, start=begin, train={"epochs": 1})
    assert same(before, begin.encoder.state_dict())
    assert all(parameter.requires_grad for parameter in begin.encoder.parameters())

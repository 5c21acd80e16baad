"""Silver masks: what their confidence is an expectation of, by enumeration and by frequencies; what is
written is what the segmentor says; the surer masks are the better ones."""

import itertools
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import spearmanr

from cfssl.data.labels import LabelledTable
from cfssl.data.phantoms import chest
from cfssl.data.prepare import save_prepared
from cfssl.data.table import ImageTable
from cfssl.engine.run import HardwareSettings, Run
from cfssl.errors import UserError
from cfssl.measure import Segmentor, SegmentorSettings, SegmentorTrainSettings
from cfssl.seeds import torch_generator
from cfssl.silver import agreement, agreement_text, silver_masks, silver_of, validated, write_silver

CPU = HardwareSettings(accelerator="cpu")


def random_logits(*shape: int, scale: float = 2.0) -> torch.Tensor:
    return scale * torch.randn(*shape, generator=torch_generator("logits", *shape))


def dice_of(mask: np.ndarray, truths: np.ndarray) -> np.ndarray:
    """Dice of a mask (P,) with every one of `truths` (T, P); 1 where both are empty."""
    total = mask.sum() + truths.sum(1)
    return np.where(total > 0, 2 * (truths & mask).sum(1) / np.maximum(total, 1), 1.0)


def test_the_confidence_is_its_formula_and_nearly_the_expected_dice_of_all_possible_truths() -> None:
    """Of 12 pixels all 4,096 truths are enumerated, in float64. The mean over truths of a ratio is not the
    ratio of means: on images of real size it nearly is, see the frequencies below."""
    logits = random_logits(20, 1, 3, 4)
    masks, found = silver_of(logits, 0.5)
    p = logits.double().sigmoid().numpy().reshape(20, 12)
    truths = np.array(list(itertools.product((False, True), repeat=12)))
    for image in range(20):
        mask = masks[image].numpy().reshape(12)
        np.testing.assert_array_equal(mask, p[image] > 0.5)
        weights = np.where(truths, p[image], 1 - p[image]).prod(1)
        assert weights.sum() == pytest.approx(1)
        wanted = (2 * p[image][mask].sum()) / (p[image].sum() + mask.sum())
        assert found[image, 0].item() == pytest.approx(wanted, abs=1e-12)
        assert abs(found[image, 0].item() - weights @ dice_of(mask, truths)) < 0.03


def test_the_confidence_of_no_mask_is_the_chance_that_there_is_nothing() -> None:
    logits = random_logits(6, 1, 3, 4, scale=0.5) - 3
    masks, found = silver_of(logits, 0.5)
    assert not masks.any()
    truths = np.array(list(itertools.product((False, True), repeat=12)))
    for image, p in enumerate(logits.double().sigmoid().numpy().reshape(6, 12)):
        weights = np.where(truths, p, 1 - p).prod(1)
        expected = weights @ dice_of(np.zeros(12, bool), truths)
        assert found[image, 0].item() == pytest.approx(expected, abs=1e-12)


def test_the_confidence_is_the_mean_dice_of_truths_that_are_drawn_from_the_probabilities() -> None:
    """On images of a phantom's size, by frequencies; at another threshold too."""
    structure = torch.zeros(24, 24).index_fill(0, torch.arange(6, 18), 1.0)
    logits = (random_logits(4, 1, 24, 24) + 4 * structure - 2).float()
    for threshold in (0.5, 0.2):
        masks, found = silver_of(logits, threshold)
        p = logits.double().sigmoid()
        np.testing.assert_array_equal(masks, p > threshold)
        for image in range(4):
            drawn = torch.rand(2000, 24 * 24, generator=torch_generator("truths", image)) < p[image].flatten()
            dices = dice_of(masks[image].numpy().reshape(-1), drawn.numpy())
            assert abs(found[image, 0].item() - dices.mean()) < 4 * dices.std() / 2000**0.5 + 1e-3


def test_a_certain_segmentor_is_confident_and_an_undecided_one_is_not() -> None:
    mask = torch.rand(3, 2, 9, 7, generator=torch_generator("mask")) > 0.5
    masks, sure = silver_of(mask.float() * 200 - 100, 0.5)
    assert torch.equal(masks, mask)
    torch.testing.assert_close(sure, torch.ones(3, 2, dtype=torch.float64))
    _, undecided = silver_of(torch.full((1, 1, 9, 7), 1e-6), 0.5)
    assert undecided.item() == pytest.approx(2 / 3, abs=1e-5)  # 2 p n / (p n + n) at p = 1/2


NAMES = ("lung", "heart", "rib")


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> ImageTable:
    """30 images; the masks of the first ones are empty."""
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"split": ["train", "train", "train", "val", "test"] * 6})
    images = rng.integers(0, 256, (30, 1, 16, 16), dtype=np.uint8)
    masks = (rng.random((30, 3, 16, 16)) < 0.3).astype(np.uint8)
    masks[:4] = 0
    return save_prepared(tmp_path_factory.mktemp("silver") / "table", "toy", frame, {}, images, masks, NAMES)


def untrained(structures: tuple[str, ...], shape: tuple[int, ...] = (1, 16, 16)) -> Segmentor:
    """With the weights it starts from, taken for finished."""
    segmentor = Segmentor(SegmentorSettings(structures, widths=(4, 8)), (*structures, *NAMES), shape)
    segmentor.record.seal(segmentor.network)
    return segmentor


def test_what_is_written_is_what_the_segmentor_says(table: ImageTable, tmp_path: Path) -> None:
    segmentor, rows, done = untrained(("rib", "aorta", "lung")), np.arange(30), []
    found = write_silver(tmp_path / "silver", segmentor, table, 0.4, done.append)
    assert done[-1] == 30
    record = json.loads((tmp_path / "silver" / "silver.json").read_text())
    assert (record["segmentor"], record["threshold"]) == (segmentor.fingerprint, 0.4)
    labelled = LabelledTable(table.folder, silver=tmp_path / "silver")
    with torch.no_grad():
        p = segmentor(torch.from_numpy(table.images.read(rows).astype(np.float32) / 127.5 - 1)).double()
    names = ["silver_rib", "silver_aorta", "silver_lung"]
    masks, sure = labelled.masks_of(names).read(rows), labelled.confidence(names, rows)
    np.testing.assert_array_equal(masks, p.numpy() > 0.4)
    _, confidence = silver_of(p.logit(), 0.4)
    np.testing.assert_allclose(sure, confidence, atol=1e-5)
    # Dice with the table's own masks, as sets of pixels; it has no aorta, and empty masks do not count
    assert list(found) == ["rib", "lung"]
    assert table.masks is not None
    for name, channel in (("rib", 0), ("lung", 2)):
        dices = []
        for mine, true in zip(masks[4:, channel], table.masks.read(rows)[4:, NAMES.index(name)], strict=True):
            a, b = (set(np.flatnonzero(mask)) for mask in (mine, true))
            dices.append(2 * len(a & b) / (len(a) + len(b)))
        assert found[name]["images"] == 26
        assert found[name]["dice"] == pytest.approx(np.mean(dices))
        assert found[name]["confidence"] == pytest.approx(sure[4:, channel].mean())
        assert found[name]["correlation"] == pytest.approx(spearmanr(sure[4:, channel], dices).statistic)


def test_only_validation_rows_validate(table: ImageTable) -> None:
    segmentor = untrained(("lung",))
    found = validated(segmentor, table, 0.5)["lung"]
    (silver,) = silver_masks(segmentor, table, table.rows("val"), 0.5)
    assert found["images"] == np.isfinite(silver.dice).sum() == 5  # row 3 has no mask
    assert found["dice"] == pytest.approx(np.nanmean(silver.dice))


def test_what_cannot_be_compared_has_no_correlation_and_no_line() -> None:
    sure, dice = np.full((4, 3), 0.5), np.array([[0.2, 0.2, np.nan]] * 4)
    sure[:, 0] = [0.1, 0.2, 0.3, 0.4]
    dice[:, 0] = [0.2, 0.1, np.nan, 0.6]
    found = agreement(NAMES, sure, dice)
    assert found["lung"]["correlation"] == pytest.approx(0.5)
    assert found["heart"]["correlation"] is None
    assert "rib" not in found
    assert agreement_text("images", found) == [
        "lung: Dice 0.300, confidence 0.233, rank correlation 0.50, on 3 images",
        "heart: Dice 0.200, confidence 0.500, on 4 images",
    ]


def test_images_of_another_shape_are_refused(table: ImageTable, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match="trained on images of 3 x 16 x 16, and those of 'toy' are 1 x 16 x 16"
    ):
        write_silver(tmp_path / "silver", untrained(("lung",), (3, 16, 16)), table, 0.5)
    assert not (tmp_path / "silver").exists()


@pytest.mark.slow
def test_surer_masks_are_better_ones_where_the_segmentor_has_not_been(tmp_path: Path) -> None:
    """Trained on healthy lungs of one scanner, asked about all: the confidence ranks the lungs by their true
    Dice, and those with an effusion get less of it."""
    frame, images, masks, _ = chest.build(chest.ChestWorld(), count=480, seed=0)
    table = save_prepared(
        tmp_path / "table", "phantom_chest", frame, chest.ATTRIBUTES, images, masks, chest.MASKS, "patient"
    )
    healthy = np.flatnonzero((frame["disease"] == "no") & (frame["scanner"] == "A"))
    train = SegmentorTrainSettings(epochs=24, batch=16, lr=1e-2)
    settings = SegmentorSettings(("left_lung", "right_lung"), widths=(8, 16, 16), train=train)
    segmentor = Segmentor(settings, table.mask_names, table.images.shape)
    segmentor.fit(table, Run(tmp_path / "run", CPU, quiet=True), rows=healthy)
    rows = np.setdiff1d(np.arange(len(table)), np.intersect1d(healthy, table.rows("train")))
    found = list(silver_masks(segmentor, table, rows, 0.5))
    sure, dice = (np.concatenate([getattr(part, name) for part in found]) for name in ("confidence", "dice"))
    for name, of in agreement(segmentor.structures, sure, dice).items():
        print(name, of)
        assert of["correlation"] > 0.3  # type: ignore[operator]
    ill = (frame["disease"] == "yes").to_numpy()[rows]
    assert sure[ill].mean() < sure[~ill].mean()
    assert dice[ill].mean() < dice[~ill].mean()

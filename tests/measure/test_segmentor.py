"""The segmentor: its Dice is its formula, it stays frozen, it learns, rows without masks are left out."""

from pathlib import Path

import numpy as np
import pytest
import torch

from cfssl.data.phantoms import chest
from cfssl.data.prepare import save_prepared
from cfssl.data.table import ImageTable
from cfssl.engine.run import HardwareSettings, Run
from cfssl.errors import UserError
from cfssl.measure import Segmentor, SegmentorSettings, SegmentorTrainSettings
from cfssl.measure.segmentor import soft_dice
from cfssl.seeds import torch_generator

STRUCTURES = ("left_lung", "heart")
CPU = HardwareSettings(accelerator="cpu")
WITHOUT = 37  # images whose masks are emptied


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> ImageTable:
    frame, images, masks, _ = chest.build(chest.ChestWorld(), count=240, seed=0)
    masks = np.array(masks)
    empty = np.flatnonzero(frame["split"] == "train")[:WITHOUT]
    masks[empty] = 0
    folder = tmp_path_factory.mktemp("segmentor") / "table"
    save_prepared(
        folder, "phantom_chest", frame, chest.ATTRIBUTES, images, masks, chest.MASKS, group="patient"
    )
    return ImageTable.open(folder)


def create(table: ImageTable, seed: int = 0, epochs: int = 16, **options: object) -> Segmentor:
    train = SegmentorTrainSettings(epochs=epochs, batch=16, lr=1e-2, seed=seed)
    settings = SegmentorSettings(
        **{"structures": STRUCTURES, "widths": (8, 16, 16), "train": train, **options}
    )  # type: ignore[arg-type]
    return Segmentor(settings, table.mask_names, table.images.shape)


@pytest.fixture(scope="module")
def fitted(table: ImageTable, tmp_path_factory: pytest.TempPathFactory) -> Segmentor:
    segmentor = create(table)
    segmentor.fit(table, Run(tmp_path_factory.mktemp("fit"), CPU, quiet=True))
    return segmentor


def images(count: int = 5) -> torch.Tensor:
    return torch.rand(count, 1, 64, 64, generator=torch_generator("images")) * 2 - 1


def test_it_learns_and_its_score_says_so(fitted: Segmentor, table: ImageTable) -> None:
    score, untrained = fitted.score(table, "val"), create(table).score(table, "val")
    for name in STRUCTURES:
        assert score[name]["dice"] > 0.8 > untrained[name]["dice"]
        assert score[name]["images"] == len(table.rows("val"))
        assert 0.2 < score[name]["area_r2"] <= 1


@torch.no_grad()
def test_the_score_is_that_of_a_count_over_pixels(fitted: Segmentor, table: ImageTable) -> None:
    """Oracle: sets of pixels, image by image. The rows without masks do not count."""
    rows = table.rows("train")
    x = torch.from_numpy(table.images.read(rows).astype(np.float32) / 127.5 - 1)
    assert table.masks is not None
    masks = table.masks.read(rows)[:, table.mask_names.index("heart")] > 0
    found = (fitted(x)[:, STRUCTURES.index("heart")] > 0.5).numpy()
    dices, areas = [], []
    for mine, true in zip(found, masks, strict=True):
        a, b = (set(np.flatnonzero(m)) for m in (mine, true))
        if b:
            dices.append(2 * len(a & b) / (len(a) + len(b)))
            areas.append((len(a), len(b)))
    score = fitted.score(table, "train")["heart"]
    assert score["images"] == len(dices) == len(rows) - WITHOUT
    assert score["dice"] == pytest.approx(np.mean(dices))
    assert score["area_r2"] == pytest.approx(np.corrcoef(np.array(areas).T)[0, 1] ** 2)


def test_the_soft_dice_of_masks_is_dice_but_for_one_pixel() -> None:
    a, b = (torch.rand(2, 3, 9, 7, generator=torch_generator(name)) > 0.6 for name in "ab")
    both, total = (a & b).sum((2, 3)), a.sum((2, 3)) + b.sum((2, 3))
    torch.testing.assert_close(soft_dice(a.float(), b.float()), (2 * both + 1) / (total + 1))
    nothing = torch.zeros(1, 1, 4, 4)
    assert soft_dice(nothing, nothing) == 1


def test_rows_without_any_mask_are_left_out_and_counted(
    table: ImageTable, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    segmentor = create(table, train=SegmentorTrainSettings(epochs=1, batch=16))
    segmentor.fit(table, Run(tmp_path / "run", CPU, stop_at=1))
    count = len(table.rows("train"))
    assert f"{WITHOUT} of {count} training images have no mask" in capsys.readouterr().err
    empty = table.rows("train")[:WITHOUT]
    with pytest.raises(
        UserError, match=r"None of the 37 training rows .* has a mask of 'left_lung', 'heart'"
    ):
        segmentor.fit(table, Run(tmp_path / "other", CPU, quiet=True), rows=empty)


def test_it_is_frozen_and_the_gradient_reaches_the_image_alone(fitted: Segmentor) -> None:
    fitted.train()
    assert not any(module.training for module in fitted.modules())
    assert not any(parameter.requires_grad for parameter in fitted.parameters())
    x = images().requires_grad_()
    fitted(x).sum().backward()
    assert x.grad is not None
    assert (x.grad.flatten(1).abs().sum(1) > 0).all()
    assert all(parameter.grad is None for parameter in fitted.parameters())


@torch.no_grad()
def test_probabilities_are_of_the_image_alone(fitted: Segmentor) -> None:
    x = images()
    p = fitted(x)
    assert p.shape == (5, 2, 64, 64)
    torch.testing.assert_close(p, fitted.logits(x).sigmoid())
    torch.testing.assert_close(p[3:4], fitted(x[3:4]))


@torch.no_grad()
@pytest.mark.parametrize("shape", [(1, 64, 64), (3, 32, 32), (1, 28, 36), (1, 67, 70), (1, 128, 96)])
def test_masks_have_the_image_s_own_grid(shape: tuple[int, ...]) -> None:
    settings = SegmentorSettings(structures=("heart",), widths=(4, 4, 4, 4))
    assert Segmentor(settings, ("heart",), shape)(torch.zeros(2, *shape)).shape == (2, 1, *shape[1:])


def test_equal_seeds_give_equal_weights_and_a_file_restores_them(
    fitted: Segmentor, table: ImageTable, tmp_path: Path
) -> None:
    one, same, other = (create(table, seed, epochs=1) for seed in (0, 0, 1))
    for segmentor, name in ((one, "one"), (same, "same"), (other, "other")):
        segmentor.fit(table, Run(tmp_path / name, CPU, quiet=True))
    assert one.fingerprint == same.fingerprint != other.fingerprint
    fitted.save(tmp_path / "segmentor.safetensors")
    loaded = create(table)
    loaded.load(tmp_path / "segmentor.safetensors")
    assert loaded.fingerprint == fitted.fingerprint
    assert torch.equal(loaded(images()), fitted(images()))
    other = create(table, part="first")
    with pytest.raises(UserError, match=r"settings\.part is all, expected first"):
        other.load(tmp_path / "segmentor.safetensors")


def test_what_cannot_be_found_is_refused(table: ImageTable) -> None:
    with pytest.raises(UserError, match="nearest is 'heart'"):
        create(table, structures=("hart",))
    with pytest.raises(UserError, match="no structure to find"):
        create(table, structures=())

"""Halves of the rows are halves; images are varied as the settings say, and masks with them."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from cfssl.data.prepare import save_prepared
from cfssl.data.table import Attribute, ImageTable
from cfssl.measure import AugmentSettings, rows_of_part
from cfssl.measure.sampling import DRAWS, augmented, noise_size, shifted
from cfssl.seeds import torch_generator

STILL = AugmentSettings(shift=0, contrast=0, brightness=0, gamma=0, noise=0)
SHAPE = (1, 16, 12)


def make_table(folder: Path, group: str | None) -> ImageTable:
    count = 600
    patient = np.arange(count) % 200
    split = np.array(["val", "test", *["train"] * 198])[patient]
    frame = pd.DataFrame({"patient": patient, "sex": patient % 2, "split": split})
    images = np.arange(4 * count, dtype=np.uint16).reshape(count, 1, 2, 2)
    sex = {"sex": Attribute("sex", "binary", ("0", "1"))}
    save_prepared(folder, "toy", frame, sex, images, None, (), group=group)
    return ImageTable.open(folder)


@pytest.mark.parametrize("group", ["patient", None])
def test_halves_are_disjoint_cover_all_and_keep_groups_together(tmp_path: Path, group: str | None) -> None:
    table = make_table(tmp_path / "table", group)
    rows = table.rows("train")
    first, second = (set(rows_of_part(table, rows, part)) for part in ("first", "second"))
    assert not first & second
    assert first | second == set(rows_of_part(table, rows, "all")) == set(rows)
    assert (
        abs(len(first) - 297) < 3 * 3 * np.sqrt(198) / 2
    )  # three spreads of the binomial of groups of three
    patients = [set(table.frame["patient"].to_numpy()[sorted(half)]) for half in (first, second)]
    assert bool(patients[0] & patients[1]) == (group is None)


def test_a_row_is_in_the_same_half_whatever_is_asked_beside_it(tmp_path: Path) -> None:
    table = make_table(tmp_path / "table", "patient")
    first = rows_of_part(table, table.rows(), "first")
    assert np.array_equal(rows_of_part(table, first[::3], "first"), first[::3])


def draw(count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rng = torch_generator("sampling")
    x = torch.rand(count, *SHAPE, generator=rng) - 0.5  # away from the limits
    masks = (torch.rand(count, 2, *SHAPE[1:], generator=rng) > 0.5).float()
    return x, masks, torch.randn(count, noise_size(SHAPE), generator=rng)


def test_strength_zero_changes_nothing() -> None:
    x, masks, noise = draw(6)
    varied, moved = augmented(x, masks, noise, STILL)
    torch.testing.assert_close(varied, x)
    assert torch.equal(moved, masks)


@pytest.mark.parametrize("name", ["shift", "contrast", "brightness", "gamma", "noise"])
def test_every_strength_does_what_it_says(name: str) -> None:
    """Each alone, against its formula in float64 from the same draws."""
    strength = 0.2
    x, masks, noise = draw(200)
    settings = AugmentSettings(**{**dict.fromkeys(STILL.__dict__, 0.0), name: strength})  # type: ignore[arg-type]
    varied, moved = augmented(x, masks, noise, settings)
    assert not torch.equal(varied, x)
    assert torch.equal(moved, masks) == (name != "shift")
    u = torch.special.ndtr(noise[:, :DRAWS].double()) * 2 - 1
    place = ["down", "right", "contrast", "brightness", "gamma", "noise"].index(
        "down" if name == "shift" else name
    )
    draws = u[:, place, None, None, None]
    if name == "shift":
        steps = (u[:, :2] * strength * torch.tensor(SHAPE[1:])).round().long()
        assert torch.equal(varied, shifted(x, steps))
        assert steps.abs().max(0).values.tolist() == [3, 2]
        return
    expected = {
        "contrast": x * (draws * strength).exp(),
        "brightness": x + draws * strength,
        "gamma": ((x.double() + 1) / 2) ** (draws * strength).exp() * 2 - 1,
        "noise": x + (draws + 1) / 2 * strength * noise[:, DRAWS:].view(x.shape),
    }[name].clamp(-1, 1)
    torch.testing.assert_close(varied.double(), expected.double(), rtol=1e-4, atol=1e-5)


def test_a_shift_moves_image_and_mask_alike_and_repeats_the_border() -> None:
    """Oracle: pixel by pixel."""
    x = torch.rand(3, 2, 5, 4, generator=torch_generator("shift"))
    shift = torch.tensor([[0, 0], [1, -2], [-3, 1]])
    moved = shifted(x, shift)
    for image, (down, right) in enumerate(shift.tolist()):
        for row in range(5):
            for column in range(4):
                source = min(max(row - down, 0), 4), min(max(column - right, 0), 3)
                assert torch.equal(moved[image, :, row, column], x[image, :, source[0], source[1]])


def test_images_stay_in_their_range() -> None:
    x, masks, noise = draw(50)
    strong = AugmentSettings(contrast=2, brightness=2, gamma=2, noise=2)
    assert augmented(x * 2, masks, noise, strong)[0].abs().max() <= 1

"""Features are those of whole images, resampled exactly as the views of the training are."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from cfssl.data.augment import PhotometricSettings
from cfssl.data.geometry import GeometrySettings
from cfssl.data.prepare import save_prepared
from cfssl.data.table import ImageTable
from cfssl.data.views import ViewData, ViewSettings
from cfssl.evaluate.features import extract

UNTOUCHED = GeometrySettings(crop_scale=(1, 1), crop_ratio=(1, 1), horizontal_flip=0)
PLAIN = PhotometricSettings(jitter_probability=0, noise_probability=0, blur_probability=0)


class Pixels(nn.Module):
    """An encoder whose features are the pixels that it sees; NaN in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1) * (np.nan if self.training else self.scale)


class Source:
    """The images of a table as what views are cut from."""

    views: tuple[dict[str, str], ...] = ()

    def __init__(self, table: ImageTable) -> None:
        self.table, self.rows, self.shape = table, np.arange(len(table)), table.images.shape
        self.available = np.ones((len(table), 1), dtype=bool)

    def __len__(self) -> int:
        return len(self.table)

    def gather(self, items: np.ndarray, slots: np.ndarray) -> np.ndarray:
        return self.table.images.read(items)[:, None].repeat(slots.shape[1], axis=1)


def table_of(folder: Path, shape: tuple[int, int, int], dtype: type = np.uint8) -> ImageTable:
    images = np.random.default_rng(0).integers(
        0, np.iinfo(dtype).max, (5, *shape), dtype=dtype, endpoint=True
    )
    frame = pd.DataFrame({"split": ["train", "train", "train", "val", "test"]})
    return save_prepared(folder, "toy", frame, {}, images)


def features(table: ImageTable, size: int | None, border: str = "constant", batch: int = 2) -> np.ndarray:
    return extract(
        Pixels(), table, np.arange(len(table)), (size, size) if size else None, border, batch, quiet=True
    )


@pytest.mark.parametrize("border", ["constant", "reflect"])
@pytest.mark.parametrize(
    ("shape", "size"),
    [((1, 16, 16), 8), ((1, 12, 12), 20), ((3, 16, 24), 12), ((1, 9, 16), 16)],
    ids=["smaller", "larger", "not square", "as wide"],
)
def test_the_encoder_sees_what_an_untouched_view_shows(
    tmp_path: Path, shape: tuple[int, int, int], size: int, border: str
) -> None:
    table = table_of(tmp_path / "t", shape)
    settings = ViewSettings(count=1, size=size, geometry=UNTOUCHED, photometric=PLAIN, border=border)  # type: ignore[arg-type]
    (batch,) = ViewData(Source(table), settings, batch=5, epochs=1, seed=0)[0]
    shown = np.empty((5, shape[0] * size * size), np.float32)
    shown[batch.row] = batch.images.flatten(1).numpy()
    np.testing.assert_allclose(features(table, size, border), shown, atol=1e-6)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_images_of_the_right_size_are_the_stored_pixels_in_their_range(tmp_path: Path, dtype: type) -> None:
    table = table_of(tmp_path / "t", (1, 6, 6), dtype)
    stored = table.images.read(np.arange(5)).reshape(5, -1) / np.iinfo(dtype).max
    for size in (None, 6):
        np.testing.assert_allclose(features(table, size), stored, atol=1e-6)


def test_rows_come_in_the_order_asked_for_whatever_the_batch(tmp_path: Path) -> None:
    table = table_of(tmp_path / "t", (1, 4, 6))
    rows = np.array([3, 0, 4])
    found = extract(Pixels(), table, rows, batch=2, quiet=True)
    np.testing.assert_array_equal(found, features(table, None, batch=99)[rows])

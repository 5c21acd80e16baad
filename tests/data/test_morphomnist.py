"""Morpho-MNIST: the file format, the padding and the known attribute model."""

import gzip
import struct
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cfssl.data.morphomnist import (
    THICKNESS_OFFSET,
    THICKNESS_RATE,
    THICKNESS_SHAPE,
    abduct_intensity_noise,
    intensity_given_thickness,
    morphomnist_state,
    prepare_morphomnist,
    read_attributes,
    read_idx,
)
from cfssl.data.splits import SplitSettings
from cfssl.errors import UserError

COUNT = 60
DIGITS = np.random.default_rng(0).integers(0, 256, (COUNT, 28, 28), dtype=np.uint8)


def write_idx(path: Path, array: np.ndarray) -> None:
    path.write_bytes(
        gzip.compress(struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes())
    )


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "morphomnist"
    folder.mkdir()
    rng = np.random.default_rng(1)
    t = 0.5 + rng.gamma(10, 1 / 5, COUNT)
    i = 64 + 191 / (1 + np.exp(-(0.5 * rng.normal(size=COUNT) + 2 * t - 5)))
    write_idx(folder / "t10k-images-idx3-ubyte.gz", DIGITS)
    write_idx(folder / "t10k-labels-idx1-ubyte.gz", (np.arange(COUNT) % 10).astype(np.uint8))
    frame = pd.DataFrame({"index": range(COUNT), "thickness": t, "intensity": i})
    frame.to_csv(folder / "t10k-morpho.csv", index=False)
    return folder


@given(st.floats(-3, 3), st.floats(0.9, 6.2))
def test_abduction_inverts_the_intensity_mechanism(eps: float, t: float) -> None:
    noise, thickness = torch.tensor([eps], dtype=torch.float64), torch.tensor([t], dtype=torch.float64)
    intensity = intensity_given_thickness(noise, thickness)
    assert 64 < intensity.item() < 255
    torch.testing.assert_close(abduct_intensity_noise(intensity, thickness), noise, rtol=0, atol=1e-6)


def test_the_mechanism_has_its_published_values() -> None:
    zero = torch.zeros(3)
    got = intensity_given_thickness(zero, torch.tensor([2.5, 1.0, 4.0]))
    torch.testing.assert_close(got, torch.tensor([159.5, 64 + 191 * 0.0474259, 64 + 191 * 0.9525741]))


def test_an_intensity_outside_the_model_is_refused() -> None:
    for value in (64.0, 255.0, 300.0):
        with pytest.raises(UserError, match="needs 64 < intensity < 255"):
            abduct_intensity_noise(torch.tensor([value]), torch.tensor([2.0]))


@pytest.mark.parametrize("size", [28, 31, 32])
def test_digits_stand_in_the_middle_of_an_empty_margin(root: Path, tmp_path: Path, size: int) -> None:
    table = prepare_morphomnist(root, tmp_path / "t", size)
    images = table.images.read(np.arange(COUNT))[:, 0]
    assert images.shape == (COUNT, size, size)
    margin = (size - 28) // 2
    np.testing.assert_array_equal(images[:, margin : margin + 28, margin : margin + 28], DIGITS)
    assert images.sum(dtype=np.int64) == DIGITS.sum(dtype=np.int64)


def test_attributes_and_splits_come_with_the_digits(root: Path, tmp_path: Path) -> None:
    settings = SplitSettings(fractions=(0.6, 0.2, 0.2), stratify=("digit",))
    table = prepare_morphomnist(root, tmp_path / "t", split=settings)
    encoded = table.encode(["thickness", "intensity", "digit"], np.arange(COUNT))
    assert encoded["digit"].tolist() == [number % 10 for number in range(COUNT)]
    csv = pd.read_csv(root / "t10k-morpho.csv")
    np.testing.assert_allclose(encoded["intensity"], csv["intensity"], rtol=1e-6)
    assert [len(table.rows(split)) for split in ("train", "val", "test")] == [36, 12, 12]
    pd.testing.assert_series_equal(read_attributes(root)["thickness"], csv["thickness"])


def test_broken_or_missing_files_are_refused(root: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be padded to 20"):
        prepare_morphomnist(root, tmp_path / "t", size=20)
    with pytest.raises(UserError, match=r"train-images-idx3-ubyte\.gz does not exist"):
        prepare_morphomnist(root, tmp_path / "t", part="train")
    with pytest.raises(UserError, match="does not exist"):
        morphomnist_state(tmp_path)
    path = root / "t10k-images-idx3-ubyte.gz"
    whole = path.read_bytes()
    path.write_bytes(whole[:2000])
    with pytest.raises(UserError, match="is no readable IDX file"):
        read_idx(path)
    path.write_bytes(gzip.compress(gzip.decompress(whole)[:-5]))
    with pytest.raises(UserError, match="fetch it again"):
        read_idx(path)
    write_idx(path, DIGITS[:7])
    with pytest.raises(UserError, match="do not belong together"):
        prepare_morphomnist(root, tmp_path / "t")
    assert not (tmp_path / "t").exists()


def test_the_state_follows_the_files(root: Path) -> None:
    before = morphomnist_state(root)
    write_idx(root / "t10k-labels-idx1-ubyte.gz", np.arange(COUNT, dtype=np.uint8) % 10 // 2)
    assert morphomnist_state(root) != before


@pytest.mark.real_data
@pytest.mark.parametrize("part", ["t10k", "train"])
def test_the_published_values_follow_the_model(shared_data: Path, part: str) -> None:
    frame = read_attributes(shared_data / "morphomnist", part)
    t, i = (torch.tensor(frame[name].to_numpy()) for name in ("thickness", "intensity"))
    eps = abduct_intensity_noise(i, t)
    assert abs(eps.mean()) < 0.04  # four standard errors of 10,000 draws
    assert abs(eps.std() - 1) < 0.03
    assert abs(torch.corrcoef(torch.stack([eps, t]))[0, 1]) < 0.04
    assert abs(t.mean() - (THICKNESS_OFFSET + THICKNESS_SHAPE / THICKNESS_RATE)) < 0.03
    assert abs(t.var() - THICKNESS_SHAPE / THICKNESS_RATE**2) < 0.03
    torch.testing.assert_close(intensity_given_thickness(eps, t), i, rtol=0, atol=1e-6)


@pytest.mark.real_data
def test_the_real_digits_are_prepared(shared_data: Path, tmp_path: Path) -> None:
    table = prepare_morphomnist(shared_data / "morphomnist", tmp_path / "t")
    assert len(table) == 10_000
    assert table.images.shape == (1, 32, 32)
    images = table.images.read(np.arange(500))[:, 0].astype(np.float64)
    # intensity is the median of the bright half of the grey range (specification of the data set)
    bright = [np.median(image[image >= image.min() + 0.5 * np.ptp(image)]) for image in images]
    assert np.abs(np.array(bright) - table.frame["intensity"][:500]).mean() < 1.0

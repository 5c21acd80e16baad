"""A generator from a file is the generator that was saved, for tables that code its attributes alike, and for
no others."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import save_file

from cfssl.data.pixels import to_signed
from cfssl.data.prepare import save_prepared
from cfssl.data.splits import SplitSettings
from cfssl.data.table import Attribute, ImageTable
from cfssl.engine.checkpoint import load_checkpoint, save_checkpoint
from cfssl.engine.run import HardwareSettings, Run
from cfssl.errors import UserError
from cfssl.generators import FittedSettings, create_generator
from cfssl.generators.base import counterfactual
from cfssl.generators.hvae import HVAEGenerator
from cfssl.generators.hvae_settings import HVAESettings, HVAETrainSettings
from cfssl.generators.hvae_small import SmallNetworkSettings
from cfssl.measure.predictor import AttributePredictor, PredictorSettings
from cfssl.seeds import torch_generator

SITES = ("A", "B", "C")
ATTRIBUTES = {
    "site": Attribute("site", "categorical", SITES),
    "sick": Attribute("sick", "binary", ("no", "yes")),
    "age": Attribute("age", "continuous"),
}
SETTINGS = HVAESettings(
    parents=("site", "age"),
    graph={"age": ("sick",)},
    network=SmallNetworkSettings(widths=(8, 8, 8, 8), latents=(2, 2, 2), blocks=1),
    train=HVAETrainSettings(epochs=1, batch=16),
)


def table_of(
    folder: Path,
    attributes: dict[str, Attribute] = ATTRIBUTES,
    ages: tuple[float, float] = (20, 90),
    side: int = 32,
    dtype: Any = np.uint8,
) -> ImageTable:
    """32 noise images; `ages`: the range of an attribute whose mean and spread a generator learns."""
    rng = np.random.default_rng(0)
    columns = {
        "site": rng.choice(SITES, 32),
        "sick": rng.choice(["no", "yes"], 32),
        "age": rng.uniform(*ages, 32),
    }
    frame = pd.DataFrame({name: columns[name] for name in attributes} | {"split": "train"})
    images = rng.integers(0, np.iinfo(dtype).max + 1, (32, 1, side, side), dtype=dtype)
    split = SplitSettings(may_be_empty=("val", "test"))
    return save_prepared(folder, "toy", frame, attributes, images, split=split)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> ImageTable:
    return table_of(tmp_path_factory.mktemp("table") / "t")


@pytest.fixture(scope="module")
def generator(table: ImageTable, tmp_path_factory: pytest.TempPathFactory) -> HVAEGenerator:
    found = HVAEGenerator(SETTINGS, table.attributes, table.images.shape)
    found.fit(
        table, Run(tmp_path_factory.mktemp("fit"), HardwareSettings(accelerator="cpu", threads=1), quiet=True)
    )
    return found


@pytest.fixture
def file(generator: HVAEGenerator, tmp_path: Path) -> Path:
    generator.save(tmp_path / "given.safetensors")
    return tmp_path / "given.safetensors"


def made_by(generator: Any, table: ImageTable) -> torch.Tensor:
    """Counterfactuals of the first images under do(sick), whose effect goes through age."""
    rows = np.arange(8)
    pa = table.encode(("site", "sick", "age"), rows)
    do = {"sick": 1 - pa["sick"]}
    return counterfactual(generator, to_signed(table.images.read(rows)), pa, do, torch_generator(0))[0]


def test_it_is_the_generator_that_was_saved(generator: HVAEGenerator, file: Path, table: ImageTable) -> None:
    found = create_generator(FittedSettings(str(file)), table)
    assert found.fingerprint == generator.fingerprint
    assert torch.equal(made_by(found, table), made_by(generator, table))


def test_what_causes_the_image_is_read_from_the_file(file: Path) -> None:
    found = FittedSettings(str(file))
    assert found.hvae == SETTINGS
    assert found.parents == SETTINGS.parents
    assert found.graph == SETTINGS.graph
    assert found.causal_graph(ATTRIBUTES) == SETTINGS.causal_graph(ATTRIBUTES)


def test_continuous_attributes_keep_the_standardisation_they_were_fitted_with(
    generator: HVAEGenerator, file: Path, tmp_path: Path
) -> None:
    other = table_of(tmp_path / "other", ages=(60, 64))
    found = create_generator(FittedSettings(str(file)), other)
    assert isinstance(found, HVAEGenerator)
    assert found.fingerprint == generator.fingerprint
    place = SETTINGS.parents.index("age")
    assert torch.equal(found.encoder.mean, generator.encoder.mean)
    assert 30 < float(found.encoder.mean[place]) < 80
    assert float(found.encoder.std[place]) > 10


def test_attributes_that_it_does_not_know_are_no_matter(
    generator: HVAEGenerator, file: Path, tmp_path: Path
) -> None:
    reversed_ = {name: ATTRIBUTES[name] for name in reversed(ATTRIBUTES)}
    wider = table_of(tmp_path / "wider", reversed_)
    assert create_generator(FittedSettings(str(file)), wider).fingerprint == generator.fingerprint


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"attributes": ATTRIBUTES | {"site": replace(ATTRIBUTES["site"], categories=("B", "A", "C"))}},
            r"'site' is categorical \(A, B, C\) there and categorical \(B, A, C\) in the table",
        ),
        (
            {"attributes": ATTRIBUTES | {"sick": Attribute("sick", "categorical", ("no", "yes"))}},
            r"'sick' is binary \(no, yes\) there and categorical \(no, yes\) in the table",
        ),
        (
            {"attributes": {name: ATTRIBUTES[name] for name in ("site", "age")}},
            "the table has no 'sick'",
        ),
        ({"side": 64}, "images are 1 x 32 x 32 there and 1 x 64 x 64 in the table"),
    ],
)
def test_a_table_of_another_kind_is_refused_with_what_differs(
    file: Path, tmp_path: Path, change: dict[str, Any], sentence: str
) -> None:
    other = table_of(tmp_path / "other", **change)
    with pytest.raises(UserError, match=f"given.safetensors does not fit the table toy: {sentence}; code"):
        create_generator(FittedSettings(str(file)), other)


def test_a_likelihood_of_8_bit_images_is_refused_for_deeper_ones(table: ImageTable, tmp_path: Path) -> None:
    discretised = replace(SETTINGS, likelihood="discretised")
    found = HVAEGenerator(discretised, table.attributes, table.images.shape)
    found.seal()
    found.save(tmp_path / "given.safetensors")
    given, deep = (
        FittedSettings(str(tmp_path / "given.safetensors")),
        table_of(tmp_path / "d", dtype=np.uint16),
    )
    assert create_generator(given, table).fingerprint == found.fingerprint
    with pytest.raises(UserError, match="its likelihood is of 8-bit images and the table holds uint16"):
        create_generator(given, deep)


def test_all_that_differs_is_said_at_once(file: Path, tmp_path: Path) -> None:
    other = table_of(tmp_path / "other", {"site": ATTRIBUTES["site"]}, side=64)
    with pytest.raises(UserError, match=r"no 'sick'; the table has no 'age'; images are 1 x 32 x 32 there"):
        create_generator(FittedSettings(str(file)), other)


@pytest.mark.parametrize(
    ("what", "sentence"),
    [
        ("nothing", "does not exist"),
        ("folder", "is a folder, expected a file"),
        ("text", "cannot be read"),
        ("weights", "is a safetensors file but not a cfssl checkpoint"),
        ("judge", "holds no HVAE generator"),
        ("oracle", "holds no HVAE generator"),
    ],
)
def test_a_file_that_holds_none_is_refused_where_the_settings_are_made(
    tmp_path: Path, what: str, sentence: str
) -> None:
    path = tmp_path / "given.safetensors"
    if what == "folder":
        path.mkdir()
    elif what == "text":
        path.write_text("weights")
    elif what == "weights":
        save_file({"weights": torch.zeros(3)}, path)
    elif what == "judge":
        judge = AttributePredictor(PredictorSettings(("site",), width=4), ATTRIBUTES, (1, 32, 32))
        judge.record.seal(judge.network)
        judge.save(path)
    elif what == "oracle":
        save_checkpoint(path, {"oracle": {"table": "0"}})
    with pytest.raises(ValidationError) as caught:
        FittedSettings(file=str(path))
    (found,) = caught.value.errors()
    assert found["loc"] == ("file",)
    assert f"{path} {sentence}" in found["msg"]


def test_a_file_whose_settings_are_not_of_this_version_is_refused(file: Path) -> None:
    state = load_checkpoint(file)
    state["hvae"]["settings"]["gamma"] = 2.0
    save_checkpoint(file, state)
    with pytest.raises(ValidationError, match=r"given\.safetensors was written by another version of cfssl"):
        FittedSettings(str(file))


def test_weights_that_do_not_fit_their_settings_are_refused(file: Path, table: ImageTable) -> None:
    state = load_checkpoint(file)
    state["network"].popitem()
    save_checkpoint(file, state)
    with pytest.raises(UserError, match=r"given\.safetensors was written by another version of cfssl"):
        create_generator(FittedSettings(str(file)), table)


def test_its_content_is_that_of_the_bytes_wherever_they_lie(file: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copy(file, tmp_path / "copy.safetensors"))
    first, second = FittedSettings(str(file)), FittedSettings(str(copy))
    assert first != second
    assert first.content == second.content
    copy.write_bytes(copy.read_bytes()[:-1] + bytes([copy.read_bytes()[-1] ^ 1]))
    assert first.content != second.content

"""Own tables measure their masks: areas become attributes, and the table knows how they were measured."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from cfssl.data import writer
from cfssl.data.datasets import PhantomChestSettings, PhantomTubeSettings, open_dataset, prepare_dataset
from cfssl.data.prepare import prepare, save_prepared
from cfssl.data.regions import AreaSpec, areas, region_maps, region_names
from cfssl.data.sources import TableSource
from cfssl.data.splits import SplitSettings
from cfssl.data.table import Attribute, ImageTable
from cfssl.errors import UserError
from cfssl.files import read_json, write_json

COUNT = 12


@pytest.fixture
def csv(tmp_path: Path) -> Path:
    """Two-lung masks of random extent; the last one is empty."""
    folder, rng = tmp_path / "source", np.random.default_rng(0)
    folder.mkdir()
    for number in range(COUNT):
        mask = np.zeros((24, 20), np.uint8)
        if number < COUNT - 1:
            for first in (1, 12):
                top, bottom = rng.integers(0, 6), rng.integers(15, 24)
                mask[top:bottom, first : first + rng.integers(4, 8)] = 255
        Image.fromarray(rng.integers(0, 256, (24, 20), dtype=np.uint8)).save(folder / f"{number}.png")
        Image.fromarray(mask).save(folder / f"m{number}.png")
    names = {"image": [f"{n}.png" for n in range(COUNT)], "mask": [f"m{n}.png" for n in range(COUNT)]}
    pd.DataFrame(names | {"site": list("ab") * (COUNT // 2)}).to_csv(folder / "t.csv", index=False)
    return folder / "t.csv"


def source(csv: Path, **settings) -> TableSource:
    return TableSource(csv, masks={"lung": "mask"}, areas={"lung": "lungs"}, **settings)


def test_areas_are_those_of_the_stored_masks_and_missing_where_a_mask_is_empty(csv, tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "CHUNK_BYTES", 5 * 24 * 20 * 24)  # five masks at a time
    table = prepare(source(csv), tmp_path / "table")
    names = [f"lung_{region}_area" for region in region_names("lungs")]
    assert list(table.areas) == names
    assert table.areas["lung_left_upper_area"] == AreaSpec("lung", "lungs", "left_upper")
    assert all(table.attributes[name].kind == "continuous" for name in names)
    masks = torch.from_numpy(table.masks.read(np.arange(COUNT))[:, 0])
    expected = areas(masks, region_maps(masks, "lungs"))[:-1]
    assert np.array_equal(table.rows(known=names), np.arange(COUNT - 1))
    encoded = table.encode(names, np.arange(COUNT - 1))
    torch.testing.assert_close(torch.stack([encoded[name] for name in names], dim=1), expected)
    assert table.frame[names].iloc[-1].isna().all()


def test_areas_survive_dropped_rows_and_serve_the_key(csv, tmp_path):
    """A training image that is also tested is dropped; areas stay in step with the rest."""
    frame = pd.read_csv(csv)
    frame["split"] = ["test", "val", *["train"] * (COUNT - 2)]
    frame.to_csv(csv, index=False)
    whole = prepare(source(csv), tmp_path / "whole")
    plain = prepare(TableSource(csv, masks={"lung": "mask"}), tmp_path / "plain")
    assert whole.fingerprint != plain.fingerprint
    assert plain.areas == {}
    Image.open(csv.parent / "0.png").save(csv.parent / "3.png")
    dropped = prepare(source(csv, split=SplitSettings(duplicates="drop")), tmp_path / "dropped")
    assert len(dropped) == COUNT - 1
    kept = [row for row in range(COUNT) if row != 3]
    names = list(whole.areas)
    assert (
        dropped.frame[names]
        .reset_index(drop=True)
        .equals(whole.frame[names].iloc[kept].reset_index(drop=True))
    )


def test_a_table_written_before_areas_existed_opens_without_any(csv, tmp_path):
    table = prepare(source(csv), tmp_path / "table")
    record = read_json(table.folder / "table.json")
    del record["areas"]
    write_json(table.folder / "table.json", record)
    assert ImageTable.open(table.folder).areas == {}


def test_names_that_are_taken_or_unknown_are_refused(csv, tmp_path):
    frame = pd.read_csv(csv)
    frame["lung_left_upper_area"] = 1.0
    frame.to_csv(csv, index=False)
    with pytest.raises(UserError, match="has a column 'lung_left_upper_area', and `areas` measures"):
        prepare(source(csv), tmp_path / "table")
    with pytest.raises(UserError, match="names 'lungs', which is no mask; the nearest is 'lung'"):
        prepare(TableSource(csv, masks={"lung": "mask"}, areas={"lungs": "lungs"}), tmp_path / "table")
    with pytest.raises(UserError, match="no region layout 'lung'"):
        prepare(TableSource(csv, masks={"lung": "mask"}, areas={"lung": "lung"}), tmp_path / "table")
    assert not (tmp_path / "table").exists()


def test_arrays_with_areas_that_do_not_fit_are_refused(tmp_path):
    frame, images = pd.DataFrame({"a": [1.0, 2.0]}), np.zeros((2, 1, 4, 4), np.uint8)
    attributes, masks = {"a": Attribute("a", "continuous")}, np.ones((2, 1, 4, 4), np.uint8)

    def save(specs):
        save_prepared(tmp_path / "t", "t", frame, attributes, images, masks, ("m",), areas=specs)

    with pytest.raises(UserError, match="no attribute for the area 'b'"):
        save({"b": AreaSpec("m", "whole", "whole")})
    with pytest.raises(UserError, match="measured on 'n', which is no mask"):
        save({"a": AreaSpec("m", "whole", "whole", map_from="n")})
    volumes, specs = images[:, :, None], {"a": AreaSpec("m", "whole", "whole")}
    with pytest.raises(UserError, match="holds volumes"):
        save_prepared(tmp_path / "t", "t", frame, attributes, volumes, masks[:, :, None], ("m",), areas=specs)


@pytest.mark.parametrize("settings", [PhantomChestSettings(count=12), PhantomTubeSettings(count=12, size=32)])
def test_phantoms_are_prepared_with_areas_masks_and_truth(settings, tmp_path):
    prepare_dataset(settings, tmp_path / "key" / "table", quiet=True)
    table = open_dataset(settings, tmp_path / "key" / "table")
    assert table.name == settings.name
    assert dict(table.areas) == dict(settings.world.areas)
    assert set(table.attributes) > set(table.areas)
    rows = np.arange(12)
    assert np.array_equal(table.truth.counterfactual(rows, {}), table.images.read(rows))
    factual = table.truth.attributes(rows, {})
    encoded = table.encode(table.attributes, rows)
    assert all(torch.equal(factual[name], encoded[name]) for name in table.attributes)

"""The oracle generator gives the phantom's true counterfactuals; the oracle of these tests is the renderer
itself."""

import numpy as np
import pytest
import torch

from cfssl.data.phantoms import chest
from cfssl.data.prepare import save_prepared
from cfssl.data.table import ImageTable
from cfssl.engine.run import Run
from cfssl.errors import UserError
from cfssl.generators.base import counterfactual, intervention, to_signed
from cfssl.generators.oracle import OracleGenerator, OracleSettings
from cfssl.seeds import torch_generator

PARENTS = ("scanner", "sex", "left_upper")
ROWS = np.array([3, 17, 30])


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    frame, images, masks, truth = chest.build(chest.ChestWorld(), count=40, seed=5)
    folder = tmp_path_factory.mktemp("oracle") / "table"
    save_prepared(
        folder, "phantom_chest", frame, chest.ATTRIBUTES, images, masks, chest.MASKS, group="patient"
    )
    return ImageTable.open(folder, truth)


@pytest.fixture
def oracle(table, tmp_path):
    generator = OracleGenerator(OracleSettings(parents=PARENTS), table)
    generator.fit(table, Run(tmp_path))
    return generator


def act(oracle, table, x, pa, do):
    tensors = intervention(do, table.attributes, len(x))
    return counterfactual(oracle, x, pa, tensors, torch_generator(0))


def test_null_intervention_returns_the_image(oracle, table):
    x, pa = to_signed(table.images.read(ROWS)), table.encode(PARENTS, ROWS)
    assert torch.equal(oracle.predict(oracle.abduct(x, pa), pa), x)


def test_do_scanner_equals_the_true_rendering(oracle, table):
    x, pa = to_signed(table.images.read(ROWS)), table.encode(PARENTS, ROWS)
    changed, _ = act(oracle, table, x, pa, {"scanner": "D"})
    truth = table.truth.counterfactual(ROWS, {"scanner": torch.full((3,), chest.SCANNERS.index("D"))})
    assert torch.equal(changed, to_signed(truth))
    assert not torch.equal(changed, x)


def test_a_counterfactual_can_be_taken_back(oracle, table):
    x, pa = to_signed(table.images.read(ROWS)), table.encode(PARENTS, ROWS)
    changed, pa_cf = act(oracle, table, x, pa, {"scanner": "C", "left_upper": 0.9})
    assert torch.equal(oracle.predict(oracle.abduct(changed, pa_cf), pa), x)


def test_images_are_recognised_by_content_in_any_order(oracle, table):
    rows = np.array([39, 0, 21, 0])
    u = oracle.abduct(to_signed(table.images.read(rows)), table.encode(PARENTS, rows))
    assert u["row"].tolist() == rows.tolist()


def test_an_unknown_image_is_refused_with_its_place(oracle, table):
    x = to_signed(table.images.read(ROWS))
    x[1, 0, 30, 30] = -x[1, 0, 30, 30] + 0.3
    with pytest.raises(UserError, match=r"1 of 3 images \(the first at place 1"):
        oracle.abduct(x, table.encode(PARENTS, ROWS))


def test_a_table_without_truth_is_refused(table):
    with pytest.raises(UserError, match="needs a world that can be rendered again"):
        OracleGenerator(OracleSettings(parents=PARENTS), ImageTable.open(table.folder))


def test_fingerprint_depends_on_table_and_graph_alone(oracle, table):
    again = OracleGenerator(OracleSettings(parents=PARENTS), table)
    other = OracleGenerator(OracleSettings(parents=PARENTS[:1]), table)
    assert again.fingerprint == oracle.fingerprint != other.fingerprint


def test_what_was_saved_is_loaded_for_the_same_world_only(oracle, table, tmp_path):
    oracle.save(tmp_path / "oracle.safetensors")
    again = OracleGenerator(OracleSettings(parents=PARENTS), table)
    again.load(tmp_path / "oracle.safetensors")
    assert again.fingerprint == oracle.fingerprint
    frame, images, masks, truth = chest.build(chest.ChestWorld(), count=40, seed=6)
    save_prepared(tmp_path / "other", "phantom_chest", frame, chest.ATTRIBUTES, images, masks, chest.MASKS)
    stranger = OracleGenerator(OracleSettings(parents=PARENTS), ImageTable.open(tmp_path / "other", truth))
    with pytest.raises(UserError, match="was written for the table"):
        stranger.load(tmp_path / "oracle.safetensors")

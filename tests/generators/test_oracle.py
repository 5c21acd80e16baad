"""The oracle generator gives the phantom's true counterfactuals; the oracle of these tests is the renderer
itself."""

import dataclasses

import numpy as np
import pytest
import torch

from cfssl.data.phantoms import chest
from cfssl.data.pixels import to_signed
from cfssl.data.prepare import save_prepared
from cfssl.data.table import ImageTable
from cfssl.engine.run import Run
from cfssl.errors import UserError
from cfssl.generators import oracle as room
from cfssl.generators.base import counterfactual, intervention
from cfssl.generators.oracle import OracleGenerator, OracleSettings
from cfssl.seeds import torch_generator

PARENTS = ("scanner", "sex", "left_upper")
CAUSAL = OracleSettings(parents=("scanner", "disease", "age"), graph={"disease": ("age",)})
ROWS = np.array([3, 17, 30])


def prepared(folder, seed):
    frame, images, masks, truth = chest.build(chest.ChestWorld(), count=40, seed=seed)
    save_prepared(
        folder, "phantom_chest", frame, chest.ATTRIBUTES, images, masks, chest.MASKS, group="patient"
    )
    return ImageTable.open(folder, truth)


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return prepared(tmp_path_factory.mktemp("oracle") / "table", seed=5)


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


@pytest.mark.parametrize("age", [25.0, 88.0])
def test_do_age_brings_the_disease_that_the_world_says_and_no_other(table, age):
    """By the world's own mechanism and each row's stored noise, so nothing of it is random."""
    oracle, rows = OracleGenerator(CAUSAL, table), np.arange(40)
    x, pa = to_signed(table.images.read(rows)), table.encode(oracle.graph.variables, rows)
    changed, pa_cf = act(oracle, table, x, pa, {"age": age})
    ages = torch.full((40,), age)
    disease = chest.disease_mechanism(ages, table.truth.u["disease_noise"])
    assert torch.equal(pa_cf["disease"], disease)
    assert 0 < (disease != pa["disease"]).sum() < 20  # it moves for some
    truth = table.truth.counterfactual(rows, {"age": ages, "disease": disease})
    assert torch.equal(changed, to_signed(truth))
    assert pa_cf["scanner"] is pa["scanner"]
    back, restored = counterfactual(oracle, changed, pa_cf, {"age": pa["age"]}, torch_generator(1))
    assert torch.equal(restored["disease"], pa["disease"])
    assert torch.equal(back, x)


def test_what_is_set_itself_does_not_follow_and_what_was_set_before_stays(table):
    oracle = OracleGenerator(CAUSAL, table)
    x, pa = to_signed(table.images.read(ROWS)), table.encode(oracle.graph.variables, ROWS)
    both, pa_both = act(oracle, table, x, pa, {"age": 90.0, "disease": "no"})
    assert pa_both["disease"].tolist() == [0, 0, 0]
    # An image that is a counterfactual already: the scanner it was given stays.
    moved, pa_moved = act(oracle, table, both, pa_both, {"scanner": "D"})
    older, pa_older = act(oracle, table, moved, pa_moved, {"age": 22.0})
    assert torch.equal(pa_older["scanner"], pa_moved["scanner"])
    picked = {"scanner": pa_older["scanner"], "age": pa_older["age"], "disease": pa_older["disease"]}
    assert torch.equal(older, to_signed(table.truth.counterfactual(ROWS, picked)))


def test_the_world_is_told_all_that_does_not_follow(table):
    """What follows may depend on values that an earlier intervention has set, so the world's own rows are not
    enough to tell."""
    told = []

    class World:
        def counterfactual(self, rows, parents):
            raise AssertionError("acting needs no picture")

        def attributes(self, rows, do):
            told.append((rows.tolist(), do))
            return do | {"disease": torch.ones(len(rows), dtype=torch.long)}

    oracle = OracleGenerator(CAUSAL, ImageTable.open(table.folder, World()))
    pa = table.encode(oracle.graph.variables, ROWS) | {"scanner": torch.tensor([3, 3, 3])}
    oracle.act({"row": torch.from_numpy(ROWS)}, pa, {"age": torch.tensor(50.0)}, torch_generator(0))
    ((rows, do),) = told
    assert rows == ROWS.tolist()
    assert set(do) == {"scanner", "age"}
    assert do["scanner"].tolist() == [3, 3, 3]
    assert do["age"].tolist() == [50.0] * 3


def test_the_recipes_graph_says_what_follows(table):
    """Without the edge, do(age) is the direct effect: the disease keeps its value."""
    oracle = OracleGenerator(dataclasses.replace(CAUSAL, graph={}), table)
    x, pa = to_signed(table.images.read(ROWS)), table.encode(oracle.graph.variables, ROWS)
    changed, pa_cf = act(oracle, table, x, pa, {"age": 88.0})
    assert pa_cf["disease"] is pa["disease"]
    assert torch.equal(changed, to_signed(table.truth.counterfactual(ROWS, {"age": torch.full((3,), 88.0)})))


@pytest.mark.parametrize(
    ("do", "message"),
    [
        ({"scanner": torch.full((3,), 7)}, "no category codes"),
        ({"scanner": torch.full((3,), 1.7)}, "no category codes"),
        ({"left_upper": torch.full((3,), float("nan"))}, "not finite"),
        ({"age": torch.zeros(3)}, "'age'"),
    ],
)
def test_impossible_interventions_are_refused(oracle, table, do, message):
    pa = table.encode(PARENTS, ROWS)
    with pytest.raises(UserError, match=message):
        oracle.act({"row": torch.from_numpy(ROWS)}, pa, do, torch_generator(0))
    with pytest.raises(UserError, match="lack scanner"):
        oracle.act({"row": torch.from_numpy(ROWS)}, {"sex": pa["sex"]}, {"scanner": torch.tensor(1)}, None)


def test_a_counterfactual_can_be_taken_back(oracle, table):
    x, pa = to_signed(table.images.read(ROWS)), table.encode(PARENTS, ROWS)
    changed, pa_cf = act(oracle, table, x, pa, {"scanner": "C", "left_upper": 0.9})
    assert torch.equal(oracle.predict(oracle.abduct(changed, pa_cf), pa), x)


def test_only_the_last_counterfactuals_are_remembered(oracle, table, monkeypatch):
    monkeypatch.setattr(room, "REMEMBERED", 5)
    x, pa = to_signed(table.images.read(ROWS)), table.encode(PARENTS, ROWS)
    made = []
    for width in (0.85, 0.9, 1.1):
        made.append(act(oracle, table, x, pa, {"left_upper": width})[0])
        for _ in range(3):
            oracle.predict(oracle.abduct(x, pa), pa)
            act(oracle, table, x, pa, {"left_upper": width})
        assert len(oracle._rendered) <= 5
        assert len(oracle._rows) == 40
        assert oracle.abduct(made[-1], pa)["row"].tolist() == ROWS.tolist()
    with pytest.raises(UserError, match=r"3 of 3 images .* nor among its last 5 counterfactuals"):
        oracle.abduct(made[0], pa)
    assert oracle.abduct(x, pa)["row"].tolist() == ROWS.tolist()


def test_a_counterfactual_that_is_rendered_again_is_remembered_longer(oracle, table, monkeypatch):
    monkeypatch.setattr(room, "REMEMBERED", 6)
    x, pa = to_signed(table.images.read(ROWS)), table.encode(PARENTS, ROWS)
    first, other, _, _ = (
        act(oracle, table, x, pa, {"left_upper": width})[0] for width in (0.85, 0.9, 0.85, 1.1)
    )
    oracle.abduct(first, pa)
    with pytest.raises(UserError, match="3 of 3 images"):
        oracle.abduct(other, pa)


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


def test_fingerprint_depends_on_the_world_the_graph_and_the_code_it_runs(table, tmp_path, monkeypatch):
    def found(settings=CAUSAL, own=table):
        generator = OracleGenerator(settings, own)
        generator.fit(own, Run(tmp_path))
        return generator.fingerprint

    other = prepared(tmp_path / "other", seed=6)
    fingerprints = [
        found(),
        found(dataclasses.replace(CAUSAL, graph={})),
        found(OracleSettings(parents=PARENTS)),
        found(own=other),
    ]
    assert found() == fingerprints[0]
    asked = []
    monkeypatch.setattr(room, "code_version", lambda *rooms: asked.extend(rooms) or "another version")
    assert len({*fingerprints, found()}) == 5
    assert {"generators/oracle.py", "generators/base.py", "scm", "data/phantoms"} <= set(asked)


def test_before_fit_or_load_it_has_no_fingerprint_and_cannot_be_saved(table, tmp_path):
    oracle = OracleGenerator(CAUSAL, table)
    with pytest.raises(UserError, match="not been fitted; fit or load it before it makes counterfactuals"):
        _ = oracle.fingerprint
    with pytest.raises(UserError, match="has not been fitted"):
        oracle.save(tmp_path / "oracle.safetensors")
    with pytest.raises(UserError, match="knows the world of the table"):
        oracle.fit(prepared(tmp_path / "other", seed=6), Run(tmp_path))


def test_what_was_saved_is_loaded_for_the_same_world_and_graph_only(oracle, table, tmp_path):
    oracle.save(tmp_path / "oracle.safetensors")
    again = OracleGenerator(OracleSettings(parents=PARENTS), table)
    again.load(tmp_path / "oracle.safetensors")
    assert again.fingerprint == oracle.fingerprint
    other = prepared(tmp_path / "other", seed=6)
    for stranger in (OracleGenerator(OracleSettings(parents=PARENTS), other), OracleGenerator(CAUSAL, table)):
        with pytest.raises(UserError, match="was written for the oracle of"):
            stranger.load(tmp_path / "oracle.safetensors")

"""What the gate asks to stay as it is: exactly the views that change something that their do() does not
affect go, whatever was recorded of the image."""

import itertools
import json
import shutil

import numpy as np
import pytest
import torch
from bank_toys import ATTRIBUTES, SCANNERS, ToyJudge, build_toy, snapshot, toy_table

from cfssl.bank.build import build
from cfssl.bank.gate import apply_gate, gate_text
from cfssl.bank.settings import GateSettings
from cfssl.bank.shards import write_gate
from cfssl.bank.store import Bank
from cfssl.bank.verify import verify
from cfssl.data.datasets import PhantomChestSettings, open_dataset, prepare_dataset
from cfssl.data.pixels import to_signed, to_stored
from cfssl.data.table import Attribute
from cfssl.errors import UserError
from cfssl.generators.oracle import OracleGenerator, OracleSettings

VIEWS = [*({"scanner": name} for name in SCANNERS), {"age": 30.0}, {"scanner": "B", "age": 70.0}]
WRONG = {(0, 1), (0, 2), (0, 3), (7, 4), (7, 5), (11, 4), (13, 5), (19, 3)}
KEPT = GateSettings(unchanged={"scanner": 0.1, "disease": 0.21, "age": 0.25})
ASKED = {1: {"disease", "age"}, 2: {"disease", "age"}, 3: {"disease", "age"}, 4: {"scanner"}, 5: set()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A finished bank of four shards, to be copied."""
    folder = tmp_path_factory.mktemp("whole")
    build_toy(folder / "bank", toy_table(folder / "table", missing=[4], ageless=[5]), views=VIEWS)
    return folder / "bank"


@pytest.fixture
def path(tmp_path, whole):
    return shutil.copytree(whole, tmp_path / "bank")


class PixelJudge(ToyJudge):
    """Reads every attribute off the pixels: half the mean of one part of the image for a discrete one, twice
    the spread of the grey levels for age. Notes how many images it saw."""

    def __init__(self, bank, wrong=()):
        super().__init__(bank, wrong)
        self.parts = {"scanner": np.s_[:, :, :3], "disease": np.s_[:, :, 3:], "sex": np.s_[:, :, :, 2:]}
        self.count = 0

    def see(self, images):
        self.count += len(images)
        return super().see(images)

    def read(self, images, name):
        x = images.double().numpy()
        return 2 * x.std((1, 2, 3)) if name == "age" else x[self.parts[name]].mean((1, 2, 3)) / 2

    def change(self, seen, before, name):
        return np.abs(self.read(seen["images"], name) - self.read(before["images"], name))


def keep(path, settings=KEPT, wrong=(), attributes=ATTRIBUTES):
    judge = PixelJudge(Bank.open(path), wrong)
    return apply_gate(path, judge, settings, "pixels", attributes), judge


def true_changes(path, name):
    """(N, 1+K) from every pair of stored images, asked about or not."""
    bank = Bank.open(path)
    judge, (count, slots) = PixelJudge(bank), bank.made.shape
    found = np.empty((count, slots))
    for item, slot in np.ndindex(count, slots):
        pair = to_signed(bank.gather(np.array([item]), np.array([[0, slot]]))[0])
        real, made = judge.read(pair, name)
        found[item, slot] = abs(made - real)
    return found


def test_a_view_is_rejected_that_changes_what_its_do_does_not_affect(path):
    """do(age) affects disease, which descends from it; a joint do() affects what either affects."""
    record, judge = keep(path, wrong=WRONG)
    bank = Bank.open(path)
    truth, rejected = bank.made.copy(), {name: np.zeros(bank.made.shape, bool) for name in ATTRIBUTES}
    truth[tuple(np.transpose(list(WRONG)))] = False
    for name, most in KEPT.unchanged.items():
        change, column = true_changes(path, name), bank.index[f"change.{name}"].to_numpy().reshape(20, 6)
        assert column.dtype == np.float32
        for item, slot in np.ndindex(20, 6):
            if bank.made[item, slot] and slot > 0 and name in ASKED[slot]:
                assert column[item, slot] == pytest.approx(change[item, slot], abs=1e-6)
                rejected[name][item, slot] = change[item, slot] > most
            else:
                assert np.isnan(column[item, slot])
        assert 0 < rejected[name].sum() < np.sum(~np.isnan(column))
        truth &= ~rejected[name]
        asked = sum(bank.made[:, slot].sum() for slot in range(1, 6) if name in ASKED[slot])
        assert record["reasons"][f"unchanged.{name}"] == {
            "judged": asked,
            "rejected": rejected[name].sum(),
            "rejected_share": rejected[name].sum() / asked,
        }
    np.testing.assert_array_equal(bank.available, truth)
    assert record["rejected"] == (bank.made & ~truth).sum()
    assert judge.count == 20 + bank.made[:, 1:].sum()  # every image is seen once


def test_the_reasons_are_counted_each_for_itself(path):
    record, _ = keep(path, wrong=WRONG)
    bank, wrong = Bank.open(path), np.zeros((20, 6), dtype=bool)
    wrong[tuple(np.transpose(list(WRONG)))] = True
    wrong &= bank.made
    for reason, slots in (("probability", [1, 2, 3, 5]), ("error", [4, 5])):
        judged, rejected = bank.made[:, slots].sum(), wrong[:, slots].sum()
        counts = {"judged": judged, "rejected": rejected, "rejected_share": rejected / judged}
        assert record["reasons"][reason] == counts
    assert list(record["reasons"]) == [
        "probability",
        "error",
        *(f"unchanged.{name}" for name in KEPT.unchanged),
    ]
    assert json.loads((path / "bank.json").read_text())["gate"] == record
    assert gate_text(record).startswith(
        f"the gate rejects {record['rejected']} of {record['judged']} ({record['rejected_share']:.1%}) "
        f"counterfactuals: probability {wrong[:, [1, 2, 3, 5]].sum()} of "
    )


@pytest.mark.parametrize("name", ["scanner", "disease", "age"])
def test_what_is_not_named_may_change(path, name):
    keep(path, GateSettings(unchanged={name: 1e-9}))
    bank = Bank.open(path)
    rejected = bank.made & ~bank.available
    for slot in range(1, 6):
        moved = bank.made[:, slot] & (true_changes(path, name)[:, slot] > 1e-9)
        np.testing.assert_array_equal(rejected[:, slot], moved if name in ASKED[slot] else False)
    assert {column for column in bank.index if column.startswith("change.")} == {f"change.{name}"}


def test_an_attribute_that_the_graph_does_not_know_is_never_affected(path):
    sex = {"sex": Attribute("sex", "binary", ("F", "M"))}
    keep(path, GateSettings(unchanged={"sex": 0.1}), attributes=ATTRIBUTES | sex)
    bank = Bank.open(path)
    change = bank.index["change.sex"].to_numpy().reshape(20, 6)
    np.testing.assert_array_equal(np.isnan(change), ~bank.made | (np.arange(6) == 0))


def test_another_choice_of_what_stays_takes_the_place_of_the_first(path, whole, tmp_path):
    keep(path)
    before = snapshot(path)
    assert keep(path)[1].count == 0
    assert snapshot(path) == before
    keep(path, other := GateSettings(unchanged={"disease": 0.2}))
    assert snapshot(path) != before
    keep(direct := shutil.copytree(whole, tmp_path / "direct"), other)
    assert snapshot(path) == snapshot(direct)
    assert verify(Bank.open(path)) == []


def test_a_gate_from_before_it_knew_what_must_stay_is_read(path):
    record, _ = keep(path, GateSettings(), WRONG)
    bank = Bank.open(path)
    shown = bank.available
    old = {name: value for name, value in record.items() if name not in ("unchanged", "reasons")}
    columns = {name: bank._column(name) for name in ("quality", "error", "accepted")}
    write_gate(path, bank.shards, columns, old)
    found = Bank.open(path)
    assert found.gate == old
    np.testing.assert_array_equal(found.available, shown)
    assert list(found.index) == list(bank.index)
    assert gate_text(old) == gate_text(record).split(" counterfactuals")[0] + " counterfactuals"
    keep(path, GateSettings(), WRONG)
    assert Bank.open(path).gate == record


@pytest.mark.parametrize("answer", [np.nan, -0.1, 1.5])
def test_changes_that_are_none_are_refused_before_anything_is_written(path, answer):
    before = snapshot(path)
    judge = PixelJudge(Bank.open(path))
    judge.change = lambda seen, before, name: np.full(len(seen["images"]), answer)
    with pytest.raises(UserError, match=r"how 'disease' changed in .* expected numbers from 0 to 1\.0"):
        apply_gate(path, judge, GateSettings(unchanged={"disease": 0.1}), "pixels", ATTRIBUTES)
    judge.change = lambda seen, before, name: answer
    with pytest.raises(UserError, match=r"how 'age' changed in .* expected numbers from 0 to inf for each"):
        apply_gate(path, judge, GateSettings(unchanged={"age": 0.1}), "pixels", ATTRIBUTES)
    with pytest.raises(UserError, match=r"gate\.unchanged names 'sex', expected one of scanner"):
        apply_gate(path, judge, GateSettings(unchanged={"sex": 0.1}), "pixels", ATTRIBUTES)
    assert snapshot(path) == before


# a generator that leaks -------------------------------------------------------------------------------------


class Leaking:
    """The oracle, which in every third row of the table also takes or gives the disease."""

    fingerprint = "leaking"

    def __init__(self, oracle):
        self.oracle, self.graph = oracle, oracle.graph

    def abduct(self, x, pa):
        return self.oracle.abduct(x, pa)

    def act(self, u, pa, do, rng):
        return self.oracle.act(u, pa, do, rng)

    def predict(self, u, pa_cf):
        leaks = u["row"] % 3 == 0
        disease = torch.where(leaks, 1 - pa_cf["disease"], pa_cf["disease"])
        return self.oracle.predict(u, {**pa_cf, "disease": disease})


class Knowing:
    """Knows every image that the world can render of the rows under any scanner, with and without disease."""

    def __init__(self, table, rows):
        scanners, diseases = (table.attributes[name].categories for name in ("scanner", "disease"))
        self.shows = {}
        for codes in itertools.product(range(len(scanners)), range(len(diseases))):
            set_to = {
                n: torch.full((len(rows),), c) for n, c in zip(("scanner", "disease"), codes, strict=True)
            }
            parents = table.truth.attributes(rows, set_to)
            for image in table.truth.counterfactual(rows, parents):
                self.shows.setdefault(image.tobytes(), set()).add(codes)

    def see(self, images):
        found = [self.shows[image.tobytes()] for image in to_stored(images, np.uint8)]
        assert {len(codes) for codes in found} == {1}
        return {"codes": torch.tensor([next(iter(codes)) for codes in found])}

    def agreement(self, seen, target):
        return (seen["codes"][:, 0] == target["scanner"]).double().numpy(), np.full(
            len(seen["codes"]), np.nan
        )

    def change(self, seen, before, name):
        place = ("scanner", "disease").index(name)
        return (seen["codes"][:, place] != before["codes"][:, place]).double().numpy()


@pytest.mark.parametrize("leaks", [False, True], ids=["the oracle", "a leaking oracle"])
def test_a_leak_into_an_attribute_that_nobody_set_is_caught_and_nothing_else(tmp_path, leaks):
    settings = PhantomChestSettings(count=60)
    prepare_dataset(settings, tmp_path / "table", quiet=True)
    table = open_dataset(settings, tmp_path / "table")
    rows = np.arange(0, 60, 2)
    oracle = OracleGenerator(OracleSettings(parents=("scanner", "disease")), table)
    oracle.fit(table, None)
    views = [{"scanner": name} for name in table.attributes["scanner"].categories]
    build(tmp_path / "bank", table, rows, Leaking(oracle) if leaks else oracle, views)
    judge, path = Knowing(table, rows), tmp_path / "bank"
    plain = apply_gate(path, judge, GateSettings(), "knowing", table.attributes)
    assert plain["rejected"] == 0  # every view shows the scanner it was set to
    record = apply_gate(path, judge, GateSettings(unchanged={"disease": 0.3}), "knowing", table.attributes)
    bank = Bank.open(path)
    leaking = leaks & (rows % 3 == 0)
    np.testing.assert_array_equal(bank.available[:, 1:], bank.made[:, 1:] & ~leaking[:, None])
    assert record["reasons"]["unchanged.disease"]["rejected"] == bank.made[leaking, 1:].sum()
    assert bank.made[:, 1:].sum() == 30 * 3

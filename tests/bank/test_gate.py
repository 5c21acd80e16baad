"""The quality gate: exactly the views that the judge disagrees with go, and whatever happens while it is
written, nobody reads half of it."""

import itertools
import json
import multiprocessing
import shutil
import threading
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from bank_toys import (
    ATTRIBUTES,
    SCANNERS,
    ToyGenerator,
    ToyJudge,
    build_toy,
    gate_and_die,
    snapshot,
    toy_table,
)

from cfssl.bank import shards
from cfssl.bank.gate import apply_gate
from cfssl.bank.settings import BankSettings, GateSettings
from cfssl.bank.shards import FORMAT, GATED_FORMAT, finish
from cfssl.bank.store import Bank
from cfssl.bank.verify import verify
from cfssl.data.plan import CounterfactualPlan, SlotPlan
from cfssl.errors import UserError
from cfssl.measure.judge import PredictorJudge
from cfssl.measure.predictor import AttributePredictor, PredictorSettings

VIEWS = [*({"scanner": name} for name in SCANNERS), {"age": 30.0}, {"scanner": "B", "age": 70.0}]
WRONG = {(0, 1), (0, 2), (0, 3), (4, 2), (7, 4), (7, 5), (11, 4), (13, 5), (19, 3)}
GATE = GateSettings()


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return toy_table(tmp_path_factory.mktemp("table"), missing=[4], ageless=[5])


@pytest.fixture(scope="module")
def whole(tmp_path_factory, table):
    """A finished bank of four shards, to be copied."""
    build_toy(tmp_path_factory.mktemp("whole") / "bank", table, views=VIEWS)
    return next(tmp_path_factory.getbasetemp().glob("whole*")) / "bank"


@pytest.fixture
def path(tmp_path, whole):
    return shutil.copytree(whole, tmp_path / "bank")


def gate(path, wrong=WRONG, settings=GATE, name="judge-1", **options):
    judge = ToyJudge(Bank.open(path), wrong)
    return apply_gate(path, judge, settings, name, ATTRIBUTES, **options), judge


def expected(path, wrong=WRONG):
    """(N, 1+K) bool: accepted."""
    accepted = Bank.open(path).made.copy()
    for item, slot in wrong:
        accepted[item, slot] = False
    return accepted


def stamps(path):
    return {file.name: file.stat().st_mtime_ns for file in path.iterdir()}


# what is rejected -------------------------------------------------------------------------------------------


def test_exactly_the_views_that_the_judge_disagrees_with_are_rejected(path):
    before = snapshot(path)
    gate(path)
    bank = Bank.open(path)
    np.testing.assert_array_equal(bank.available, expected(path))
    np.testing.assert_array_equal(bank.index["accepted"], expected(path).ravel())
    np.testing.assert_array_equal(bank.index["available"], bank.made.ravel())
    assert 0 < (bank.made & ~bank.available).sum() < len(WRONG)  # some of them were never made
    after = snapshot(path)
    assert {name for name in after if after[name] != before.get(name)} == {"index.parquet", "bank.json"}
    assert set(before) == set(after)
    assert verify(bank) == []


def test_the_index_tells_what_the_judge_found_of_every_view_that_was_made(path):
    gate(path)
    bank = Bank.open(path)
    shape = bank.made.shape
    quality, error = (bank.index[name].to_numpy().reshape(shape) for name in ("quality", "error"))
    assert (quality.dtype, error.dtype) == (np.float32, np.float32)
    wrong = np.zeros(shape, dtype=bool)
    wrong[tuple(np.transpose(list(WRONG)))] = True
    truth_quality = np.where(wrong, np.float32(0.2), np.float32(0.9))
    truth_error = np.where(wrong, np.float32(2.5), np.float32(0.5))
    truth_quality[~bank.made], truth_error[~bank.made] = np.nan, np.nan
    truth_quality[:, [0, 4]] = np.nan  # the real image, do(age) alone
    truth_error[:, :4] = np.nan
    np.testing.assert_array_equal(quality, truth_quality)
    np.testing.assert_array_equal(error, truth_error)


def test_every_view_that_was_made_is_judged_once_and_counted(path):
    calls = []
    _, judge = gate(path, progress=lambda done, total: calls.append((done, total)))
    made = Bank.open(path).made
    views = [(int(item), int(slot)) for item, slot in np.argwhere(made) if slot > 0]
    assert sorted(judge.seen) == sorted(views)
    assert calls[-1] == (len(views), len(views))
    assert [done for done, _ in calls] == sorted({done for done, _ in calls})


def test_the_rejected_shares_are_those_of_a_plain_count(path):
    record, _ = gate(path)
    bank = Bank.open(path)
    assert bank.gate == record == json.loads((path / "bank.json").read_text())["gate"]
    assert (record["judge"], record["probability"], record["error"]) == ("judge-1", 0.5, 1.0)
    made, rejected = bank.made[:, 1:], (bank.made & ~expected(path))[:, 1:]
    assert record["judged"] == made.sum()
    assert record["rejected"] == rejected.sum()
    assert record["rejected_share"] == rejected.sum() / made.sum()
    assert list(record["views"]) == [json.dumps(view) for view in VIEWS]
    assert set(record["views"]) == set(bank.index["do"].dropna())
    for slot, found in enumerate(record["views"].values()):
        assert found == {
            "judged": made[:, slot].sum(),
            "rejected": rejected[:, slot].sum(),
            "rejected_share": rejected[:, slot].mean(where=made[:, slot]),
        }


@pytest.mark.parametrize(
    ("settings", "rejects"),
    [
        (GateSettings(probability=0.2), {4, 5}),  # as probable as it has to be
        (GateSettings(probability=0.2, error=2.5), set()),
        (GateSettings(probability=0.21, error=2.5), {1, 2, 3, 5}),
        (GateSettings(probability=1.0, error=0.1), {1, 2, 3, 4, 5}),
    ],
)
def test_both_thresholds_act_each_on_its_variables(path, settings, rejects):
    """Every view is judged wrong by the same numbers."""
    gate(path, np.ndindex(20, 6), settings)
    bank = Bank.open(path)
    for slot in range(1, 6):
        kept = np.zeros(20, dtype=bool) if slot in rejects else bank.made[:, slot]
        np.testing.assert_array_equal(bank.available[:, slot], kept)
    assert bank.available[:, 0].all()


def test_a_bank_without_counterfactuals_has_nothing_to_reject(tmp_path, table):
    build_toy(tmp_path / "bank", table, views=[], generator=None)
    record, judge = gate(tmp_path / "bank")
    assert (record["judged"], record["rejected_share"], record["views"], judge.seen) == (0, 0.0, {}, [])
    assert Bank.open(tmp_path / "bank").available.all()


def test_a_bank_without_a_gate_shows_all_that_was_made(path):
    bank = Bank.open(path)
    assert bank.gate is None
    np.testing.assert_array_equal(bank.available, bank.made)
    assert not {"quality", "error", "accepted"} & set(bank.index)
    assert BankSettings().gate is None


def test_readers_that_know_no_gates_are_kept_from_gated_banks(path):
    def version():
        return json.loads((path / "bank.json").read_text())["format"]

    assert version() == FORMAT
    gate(path)
    assert version() == GATED_FORMAT != FORMAT


# what is shown ----------------------------------------------------------------------------------------------


def test_the_view_plan_never_draws_what_was_rejected(path):
    gate(path)
    bank = Bank.open(path)
    plan = SlotPlan(bank, 2, CounterfactualPlan("scanner", probability=1.0))
    items = np.tile(np.arange(20), 200)
    slots = plan.draw(np.random.default_rng(0), items)
    np.testing.assert_array_equal(slots[:, 0], 0)
    drawn = np.zeros((20, 6), dtype=bool)
    drawn[items, slots[:, 1]] = True
    truth = expected(path)
    truth[:, 4:] = False
    truth[:, 0] = ~truth[:, 1:].any(axis=1)  # the real image where all are rejected
    np.testing.assert_array_equal(drawn, truth)
    assert truth[0, 0]
    assert bank.made[0, 1:4].any()


def test_a_subset_of_a_gated_bank_shows_the_same(path):
    gate(path)
    part = Bank.open(path).subset(np.array([19, 0, 7]))
    np.testing.assert_array_equal(part.available, expected(path)[[0, 7, 19]])


# applied again ----------------------------------------------------------------------------------------------


def test_the_same_gate_applied_again_changes_nothing_and_judges_nothing(path):
    record, _ = gate(path)
    before, times = snapshot(path), stamps(path)
    again, judge = gate(path)
    assert again == record
    assert judge.seen == []
    assert (snapshot(path), stamps(path)) == (before, times)


@pytest.mark.parametrize(
    "other",
    [{"settings": GateSettings(error=3.0)}, {"settings": GateSettings(probability=0.1)}, {"name": "judge-2"}],
)
def test_another_gate_takes_the_place_of_the_first(path, whole, tmp_path, other):
    gate(path)
    gate(path, wrong={(2, 1), (2, 4)}, **other)
    direct = shutil.copytree(whole, tmp_path / "direct")
    gate(direct, wrong={(2, 1), (2, 4)}, **other)
    assert snapshot(path) == snapshot(direct)
    assert len(pq.read_schema(path / "index.parquet").names) == len(set(Bank.open(path).index))


def test_a_build_that_runs_again_leaves_the_gate(path, table):
    gate(path)
    before = snapshot(path)
    for check in (False, True):
        build_toy(path, table, views=VIEWS, check=check)
        assert snapshot(path) == before


# refused ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("agreement", "error", "what"),
    [
        (np.nan, np.nan, "probability"),  # a network that has diverged
        (1.5, np.nan, "probability"),
        (-0.1, np.nan, "probability"),
        (0.9, 0.1, "error"),
    ],
)
def test_answers_that_are_none_are_refused_before_anything_is_written(path, agreement, error, what):
    before = snapshot(path)

    def judge(answer):
        return SimpleNamespace(see=lambda images: {"x": images}, agreement=answer)

    def full(seen, target):
        return np.full(len(seen["x"]), agreement), np.full(len(seen["x"]), error)

    with pytest.raises(UserError, match=f"The judge answers .*scanner.* with {what} "):
        apply_gate(path, judge(full), GATE, "judge-1", ATTRIBUTES)
    with pytest.raises(UserError, match=r"The judge answers .*expected numbers from 0 to 1\.0 for each"):
        apply_gate(path, judge(lambda *_: (0.9, np.nan)), GATE, "judge-1", ATTRIBUTES)
    assert snapshot(path) == before


def test_a_bank_that_changes_while_it_is_judged_is_refused_and_left_alone(path):
    before = snapshot(path)

    class Disturbed(ToyJudge):
        def see(self, images):
            (path / "shard-00001.parquet").unlink(missing_ok=True)
            return super().see(images)

    with pytest.raises(UserError, match="is not what it was when its views were judged"):
        apply_gate(path, Disturbed(Bank.open(path)), GATE, "judge-1", ATTRIBUTES)
    assert before.items() > snapshot(path).items()


def test_an_unfinished_bank_is_refused(tmp_path, table):
    build_toy(tmp_path / "bank", table, views=VIEWS, shards=range(2))
    with pytest.raises(UserError, match="has 2 of 4 shards"):
        apply_gate(tmp_path / "bank", None, GATE, "judge-1", ATTRIBUTES)


# damage -----------------------------------------------------------------------------------------------------


def test_verify_knows_the_index_of_a_gated_bank(path):
    gate(path)
    whole_index = (path / "index.parquet").read_bytes()
    damaged = bytearray(whole_index)
    damaged[len(damaged) // 2] ^= 1
    (path / "index.parquet").write_bytes(damaged)
    assert verify(Bank.open(path)) == ["index.parquet does not agree with its checksum"]
    (path / "index.parquet").write_bytes(whole_index)
    pixels = bytearray((path / "shard-00001.npy").read_bytes())
    pixels[-1] ^= 1
    (path / "shard-00001.npy").write_bytes(pixels)
    assert verify(Bank.open(path)) == [
        "shard-00001.npy: item 11 (table row 11), slot 5 (do(scanner=B, age=70.0))"
    ]


@pytest.mark.parametrize("name", ["index.parquet", "bank.json"])
def test_damage_drops_the_gate_until_it_is_applied_again(path, whole, table, name):
    """Flipped bits, a truncated file, none: a reader reads the gated bank or is told, never another one."""
    gate(path)
    gated, ungated, truth = snapshot(path), snapshot(whole), Bank.open(path).index.to_csv()
    content = gated[name]
    rng = np.random.default_rng(0)
    bits = rng.choice(8 * len(content), 25, replace=False)
    damages = [
        content[: bit // 8] + bytes([content[bit // 8] ^ 1 << bit % 8]) + content[bit // 8 + 1 :]
        for bit in bits
    ]
    damages += [content[: len(content) // 2], b""] + [None] * (name == "index.parquet")
    for damaged in damages:
        (path / name).unlink() if damaged is None else (path / name).write_bytes(damaged)
        try:
            assert Bank.open(path).index.to_csv() == truth  # a blank may be another blank
        except UserError:
            try:
                build_toy(path, table, views=VIEWS, generator=ToyGenerator())
            except UserError:
                assert name == "bank.json"  # says that its format is another one
                (path / name).write_bytes(content)
                continue
            assert Bank.open(path).gate is None
            assert snapshot(path) == ungated
            gate(path)
            assert snapshot(path) == gated
        (path / name).write_bytes(content)


def test_finish_mends_a_lost_index_without_its_gate(path, whole):
    gate(path)
    (path / "index.parquet").unlink()
    finish(path)
    assert snapshot(path) == snapshot(whole)


# killed, and read meanwhile ---------------------------------------------------------------------------------


@pytest.mark.parametrize("had_gate", [False, True], ids=["first gate", "another gate"])
def test_a_gate_killed_at_any_moment_leaves_a_bank_that_opens_or_says_what_to_do(
    tmp_path, whole, table, had_gate
):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["cfssl.bank.gate", "cfssl.data.prepare"])
    before, after = shutil.copytree(whole, tmp_path / "before"), tmp_path / "after"
    if had_gate:
        gate(before, {(1, 1)}, name="judge-0")
    gate(shutil.copytree(before, after))
    old, new = snapshot(before), snapshot(after)
    opened = []
    for renames, late in [(1, False), (1, True), (2, False), (2, True)]:
        path = shutil.copytree(before, tmp_path / f"killed-{renames}-{late}")
        process = context.Process(target=gate_and_die, args=(path, WRONG, GATE, renames, late))
        process.start()
        process.join()
        assert process.exitcode == 9
        left = {name: content for name, content in snapshot(path).items() if not name.endswith(".part")}
        half = {**old, "index.parquet": new["index.parquet"]}
        assert left == (
            old if (renames, late) == (1, False) else new if (renames, late) == (2, True) else half
        )
        if left == half:
            with pytest.raises(UserError, match=r"open the bank again, else run its build again"):
                Bank.open(path)
        else:
            opened.append(Bank.open(path).gate)
        again = shutil.copytree(path, tmp_path / f"again-{renames}-{late}")
        apply_gate(again, ToyJudge(Bank.open(whole), WRONG), GATE, "judge-1", ATTRIBUTES)
        build_toy(path, table, views=VIEWS)
        gate(path)
        assert snapshot(path) == snapshot(again) == new
    assert [None if found is None else found["judge"] for found in opened] == [
        "judge-0" if had_gate else None,
        "judge-1",
    ]


def read(path):
    """What a reader sees of which gate, or what it is told."""
    try:
        bank = Bank.open(path)
        found = bank.rows, bank.available, bank.index["available"].to_numpy()
        return None if bank.gate is None else bank.gate["judge"], *(column.tobytes() for column in found)
    except UserError as error:
        return "told" if "open the bank again" in str(error) else str(error)


def test_readers_see_the_old_or_the_new_gate_or_are_told(path, monkeypatch):
    """Between the two files, and in threads at any time."""
    states, gates = [read(path)], [("judge-1", WRONG), ("judge-2", {(1, 1), (2, 2)})]
    for name, wrong in gates:
        gate(path, wrong, name=name)
        states.append(read(path))
    assert len(set(states)) == 3
    between, write = [], shards.write_record

    def pausing(*arguments):
        between.append(read(path))
        write(*arguments)

    monkeypatch.setattr(shards, "write_record", pausing)
    seen, stop = [], threading.Event()

    def reading():
        while not stop.is_set():
            seen.append(read(path))

    threads = [threading.Thread(target=reading) for _ in range(2)]
    for thread in threads:
        thread.start()
    for name, wrong in gates * 10:
        apply_gate(path, ToyJudge(Bank.open(path), wrong), GATE, name, ATTRIBUTES)
    stop.set()
    for thread in threads:
        thread.join()
    assert between == ["told"] * 20
    assert set(seen) <= {*states[1:], "told"}
    assert len(seen) > 0


def test_an_opened_bank_never_reads_the_index_of_another_gate(path):
    bank = Bank.open(path)
    rows = bank.rows  # the index was read and found sound
    gate(path)
    gated = Bank.open(path)
    with pytest.raises(UserError, match=r"index\.parquet .* open the bank again"):
        _ = bank.available
    gate(path, set(), name="judge-2")
    with pytest.raises(UserError, match=r"index\.parquet .* open the bank again"):
        _ = gated.available
    np.testing.assert_array_equal(bank.rows, rows)
    np.testing.assert_array_equal(
        bank.gather(np.arange(3), np.arange(3)), Bank.open(path).gather(np.arange(3), np.arange(3))
    )


# the predictor as judge -------------------------------------------------------------------------------------


@pytest.fixture
def predictor():
    found = AttributePredictor(PredictorSettings(tuple(ATTRIBUTES), width=4), ATTRIBUTES, (1, 6, 5))
    head = found.network.head("age")
    head.mean.fill_(50.0)
    head.std.fill_(12.5)
    return found


@pytest.mark.parametrize(
    "view",
    [{"scanner": 2}, {"age": 30.0}, {"scanner": 1, "disease": 0}, {"disease": 1, "scanner": 0, "age": 61.0}],
)
def test_the_predictor_judges_by_the_least_probability_and_the_largest_error(predictor, view):
    x = torch.rand(7, 1, 6, 5, generator=torch.Generator().manual_seed(0)) * 2 - 1
    target = {
        name: torch.full((7,), value, dtype=torch.float32 if name == "age" else torch.long)
        for name, value in view.items()
    }
    judge = PredictorJudge(predictor, view)
    agreement, error = judge.agreement(judge.see(x), target)
    assert (agreement.dtype, error.dtype) == (np.float64, np.float64)
    with torch.no_grad():
        logits = {name: out.double().numpy() for name, out in predictor(x).items()}
    for place in range(7):
        probabilities = [
            np.exp(logits[name][place, value]) / np.exp(logits[name][place]).sum()
            for name, value in view.items()
            if name != "age"
        ]
        missed = (
            [abs(logits["age"][place, 0] * 12.5 + 50.0 - view["age"]) / 12.5] if "age" in view else [np.nan]
        )
        np.testing.assert_allclose(agreement[place], min(probabilities or [np.nan]), rtol=1e-5)
        np.testing.assert_allclose(error[place], missed[0], rtol=1e-5)


def test_the_predictor_gates_a_bank_by_its_own_answers(path, predictor):
    settings = GateSettings(probability=0.4, error=1.6)
    apply_gate(path, PredictorJudge(predictor, {"scanner", "age"}), settings, "p", predictor.attributes)
    bank = Bank.open(path)
    quality, error = (bank.index[name].to_numpy().reshape(20, 6) for name in ("quality", "error"))
    np.testing.assert_array_equal(bank.available, bank.made & ~(quality < 0.4) & ~(error > 1.6))
    np.testing.assert_array_equal(np.isnan(quality) & np.isnan(error), ~bank.made | (np.arange(6) == 0))


def test_a_variable_that_is_not_predicted_is_refused(predictor):
    part = AttributePredictor(PredictorSettings(("age",), width=4), ATTRIBUTES, (1, 6, 5))
    PredictorJudge(part, ["age"])
    with pytest.raises(UserError, match="does not predict 'scanner'"):
        PredictorJudge(part, ["age", "scanner"])


def test_images_of_another_size_are_refused(predictor):
    with pytest.raises(UserError, match=r"\(1, 6, 6\).* \(1, 6, 5\); train one on images of this size"):
        PredictorJudge(predictor, []).see(torch.zeros(2, 1, 6, 6))


def test_the_predictor_tells_how_far_its_own_opinion_moved(predictor):
    x = torch.rand(2, 7, 1, 6, 5, generator=torch.Generator().manual_seed(0)) * 2 - 1
    judge = PredictorJudge(predictor, ATTRIBUTES)
    before, seen = judge.see(x[0]), judge.see(x[1])
    with torch.no_grad():
        logits = [{name: out.double().numpy() for name, out in predictor(part).items()} for part in x]
    for name in ATTRIBUTES:
        found = judge.change(seen, before, name)
        assert (found.dtype, found.shape) == (np.float64, (7,))
        np.testing.assert_array_equal(judge.change(before, seen, name), found)
        np.testing.assert_array_equal(judge.change(seen, seen, name), 0)
        for place in range(7):
            first, second = (part[name][place] for part in logits)
            if name == "age":
                expected = abs((first[0] * 12.5 + 50.0) - (second[0] * 12.5 + 50.0)) / 12.5
            else:  # the largest difference that any event has
                p, q = (np.exp(out) / np.exp(out).sum() for out in (first, second))
                events = itertools.product([False, True], repeat=len(p))
                expected = max(p[list(event)].sum() - q[list(event)].sum() for event in events)
            np.testing.assert_allclose(found[place], expected, rtol=1e-4, atol=1e-7)


def test_opinions_that_cannot_differ_more_have_moved_by_one(predictor):
    judge = PredictorJudge(predictor, ["scanner"])
    sure = torch.tensor([[50.0, 0, 0], [0.3, 0.1, 0.2]])
    other = torch.tensor([[0, 50.0, 0], [0.1, 0.3, 0.2]])
    found = judge.change({"scanner": sure}, {"scanner": other}, "scanner")
    assert found[0] == 1
    assert 0 < found[1] < 0.1

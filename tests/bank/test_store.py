"""Reading a bank: every gather against a plain loop, every damage against the byte that was changed."""

import json
import mmap
import os
import pickle
import re
import resource
import threading
from pathlib import Path

import bank_toys as toys
import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cfssl.bank import maps as shard_maps
from cfssl.bank import records
from cfssl.bank import verify as verification
from cfssl.bank.build import build
from cfssl.bank.maps import COPY_ONE_BY_ONE, OTHER_FILES, allow_open_files
from cfssl.bank.records import size_and_checksum, write_record
from cfssl.bank.shards import GATED_FORMAT
from cfssl.bank.store import Bank
from cfssl.bank.verify import verify
from cfssl.errors import UserError

VIEWS = [{"scanner": name} for name in toys.SCANNERS]


def make_bank(folder, count=20, rows_per_shard=3, **table):
    source = toys.toy_table(folder / "table", count, **table)
    build(folder / "bank", source, source.rows(), toys.ToyGenerator(), VIEWS, rows_per_shard=rows_per_shard)
    return folder / "bank"


def stored(path):
    """All views (N, 1+K, C, H, W) by plain numpy: the format is public."""
    return np.concatenate([np.load(file) for file in sorted(path.glob("shard-*.npy"))])


def flip(file, offset, mask=1):
    content = bytearray(file.read_bytes())
    content[offset] ^= mask
    file.write_bytes(content)


@pytest.fixture
def path(tmp_path):
    return make_bank(tmp_path)


@pytest.fixture(scope="module")
def banks(tmp_path_factory):
    """Small views and odd sizes take one way to memory, large views the other."""
    kinds = {
        "one shard": {"rows_per_shard": 50},
        "shards": {},
        "odd uint16": {"shape": (3, 5, 7), "dtype": np.uint16},
        "one byte": {"shape": (1, 1, 1), "rows_per_shard": 1},
        "large views": {"shape": (1, 192, 192), "count": 7},
    }
    paths = [make_bank(tmp_path_factory.mktemp("bank"), **kind) for kind in kinds.values()]
    assert Bank.open(paths[-1]).plan.view_bytes >= COPY_ONE_BY_ONE
    return [(path, stored(path)) for path in paths]


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_gather_equals_a_plain_loop_for_any_order_and_repetition(banks, data):
    path, expected = data.draw(st.sampled_from(banks))
    bank = Bank.open(path)
    for _ in range(2):  # the second call meets shards that are mapped already
        items = data.draw(st.lists(st.integers(0, len(bank) - 1), max_size=12))
        width = data.draw(st.sampled_from([None, 1, 2, 3]))
        shape = (len(items),) if width is None else (len(items), width)
        count = int(np.prod(shape))
        slots = data.draw(st.lists(st.integers(0, len(VIEWS)), min_size=count, max_size=count))
        slots = np.array(slots, dtype=int).reshape(shape)
        found = bank.gather(np.array(items, dtype=int), slots)
        assert found.shape == (*shape, *bank.shape)
        assert found.dtype == expected.dtype
        for place, slot in np.ndenumerate(slots):
            np.testing.assert_array_equal(found[place], expected[items[place[0]], slot])


def test_what_gather_returns_is_a_copy(path):
    bank = Bank.open(path)
    items, slots = np.arange(5), np.zeros(5, dtype=int)
    first = bank.gather(items, slots)
    kept = first.copy()
    first[:] = 7
    np.testing.assert_array_equal(bank.gather(items, slots), kept)


@pytest.mark.parametrize(
    ("items", "slots"),
    [([20], [0]), ([-1], [0]), ([0], [4]), ([0], [-1]), ([0.0], [0]), ([0, 1], [0]), ([0], 0)],
)
def test_numbers_of_no_stored_view_are_refused(path, items, slots):
    with pytest.raises(IndexError, match="expected"):
        Bank.open(path).gather(np.array(items), np.array(slots))


def test_opening_reads_neither_pixels_nor_index(path, monkeypatch):
    def refuse(*arguments, **keywords):
        raise AssertionError("opening a bank read more than bank.json")

    monkeypatch.setattr(pq, "ParquetFile", refuse)
    monkeypatch.setattr(records, "stream_checksum", refuse)
    monkeypatch.setattr(mmap, "mmap", refuse)
    bank = Bank.open(path)
    assert (len(bank), bank.shape, bank.views) == (20, (1, 6, 5), tuple(VIEWS))


def test_rows_availability_and_index_agree(tmp_path):
    path = make_bank(tmp_path, missing=[4, 5])
    bank = Bank.open(path)
    np.testing.assert_array_equal(bank.rows, np.arange(20))
    assert bank.available.shape == (20, 4)
    np.testing.assert_array_equal(bank.available, bank.index["available"].to_numpy().reshape(20, 4))
    assert bank.available[:, 0].all()
    assert not bank.available[4:6, 1:].any()


def test_a_pickled_bank_is_opened_again_and_reads_the_same(path):
    bank = Bank.open(path, table_fingerprint=Bank.open(path).plan.table)
    items, slots = np.arange(20), np.arange(20) % 4
    expected = bank.gather(items, slots)
    sent = pickle.dumps(bank)
    assert len(sent) < 1000
    np.testing.assert_array_equal(pickle.loads(sent).gather(items, slots), expected)  # noqa: S301


def test_a_subset_reads_the_items_of_its_rows(path):
    bank = Bank.open(path)
    part = bank.subset(np.array([17, 3, 8]))
    np.testing.assert_array_equal(part.rows, [3, 8, 17])
    np.testing.assert_array_equal(part.available, bank.available[[3, 8, 17]])
    slots = np.array([[0, 1], [2, 3], [3, 0]])
    np.testing.assert_array_equal(part.gather(np.arange(3), slots), bank.gather(np.array([3, 8, 17]), slots))
    with pytest.raises(IndexError):
        part.gather(np.array([3]), np.array([0]))


def test_more_shards_than_the_process_may_open_files_can_be_read(tmp_path):
    path = make_bank(tmp_path, count=150, rows_per_shard=1, shape=(1, 2, 2))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (100, limits[1]))
    try:
        found = Bank.open(path).gather(np.arange(150), np.zeros(150, dtype=int))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    np.testing.assert_array_equal(found, stored(path)[:, 0])


def edit_record(path, seal=False, **changes):
    content = {**json.loads((path / "bank.json").read_text()), **changes}
    if seal:
        write_record(path / "bank.json", content)
    else:
        (path / "bank.json").write_text(json.dumps(content))


def unfinish(path):
    edit_record(path, seal=True, index=None, shards=None)
    (path / "shard-00002.json").unlink()


def truncate(file):
    file.write_bytes(file.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: (path / "shard-00003.npy").unlink(), r"shard-00003\.npy is missing; run"),
        (lambda path: truncate(path / "shard-00003.npy"), r"shard-00003\.npy has 487 bytes, expected 488"),
        (lambda path: (path / "index.parquet").unlink(), r"index\.parquet is missing"),
        (lambda path: truncate(path / "index.parquet"), r"index\.parquet has .* truncated"),
        (lambda path: (path / "bank.json").unlink(), "is no bank"),
        (lambda path: truncate(path / "bank.json") or truncate(path / "bank.json"), r"bank\.json is damaged"),
        (
            lambda path: edit_record(path, format=GATED_FORMAT + 1),
            rf"format {GATED_FORMAT + 1}, this version .* reads format",
        ),
        (lambda path: edit_record(path, plan={}), "damaged or was edited"),
        (lambda path: edit_record(path, index={}), "damaged or was edited"),
        (lambda path: edit_record(path, shards=[]), "damaged or was edited"),
        (lambda path: edit_record(path, note="by hand"), "damaged or was edited"),
        (unfinish, r"unfinished \(6 of 7 shards\); run its build again"),
    ],
)
def test_a_bank_that_is_not_whole_is_refused_by_name(path, damage, message):
    damage(path)
    with pytest.raises(UserError, match=message):
        Bank.open(path)


def test_another_table_or_generator_is_refused_with_both_fingerprints(path):
    plan = Bank.open(path).plan
    Bank.open(path, plan.table, plan.generator)
    with pytest.raises(UserError, match=f"table {plan.table}, expected table 1234"):
        Bank.open(path, table_fingerprint="1234")
    with pytest.raises(UserError, match="generator toy-1, expected generator toy-2"):
        Bank.open(path, generator_fingerprint="toy-2")


def test_a_flipped_byte_anywhere_in_a_shard_is_found_at_its_first_read_and_by_verify(path):
    rng = np.random.default_rng(1)
    file = path / "shard-00001.npy"
    whole = file.read_bytes()
    for offset in rng.choice(len(whole), 60, replace=False):
        flip(file, offset, mask=1 << int(rng.integers(8)))
        bank = Bank.open(path)
        bank.gather(np.array([0, 19]), np.array([1, 1]))  # other shards still read
        with pytest.raises(UserError, match=r"shard-00001\.npy is damaged: its checksum is .* expected"):
            bank.gather(np.array([0, 3]), np.array([1, 1]))
        found = verify(Bank.open(path))
        header = len(whole) - 3 * 4 * 30
        if offset < header:
            assert found == ["shard-00001.npy: its header is damaged"]
        else:
            item, slot = divmod((offset - header) // 30, 4)
            assert len(found) == 1
            assert found[0].startswith(
                f"shard-00001.npy: item {3 + item} (table row {3 + item}), slot {slot} ("
            )
        file.write_bytes(whole)


def test_verify_names_every_damaged_view_and_file(path):
    calls = []
    assert verify(Bank.open(path), lambda done, total: calls.append((done, total))) == []
    assert calls == [(shard, 7) for shard in range(1, 8)]
    bank = Bank.open(path)
    flip(path / "shard-00000.npy", -1)
    flip(path / "shard-00002.npy", -1)
    flip(path / "shard-00002.npy", -61)
    truncate(path / "shard-00003.npy")
    (path / "shard-00004.npy").unlink()
    found = verify(bank)
    assert found == [
        "shard-00000.npy: item 2 (table row 2), slot 3 (do(scanner=C))",
        "shard-00002.npy: item 8 (table row 8), slot 1 (do(scanner=A))",
        "shard-00002.npy: item 8 (table row 8), slot 3 (do(scanner=C))",
        "shard-00003.npy has 487 bytes, expected 488",
        "shard-00004.npy is missing",
    ]
    calls.clear()
    assert verify(bank, lambda done, total: calls.append((done, total)), jobs=2) == found
    assert calls == [(shard, 7) for shard in range(1, 8)]


def test_a_killed_process_of_verify_is_told(path, monkeypatch):
    monkeypatch.setattr(verification, "_findings", os._exit)
    with pytest.raises(UserError, match=r"A process that verified .* was killed.* with fewer than 2 jobs"):
        verify(Bank.open(path), jobs=2)


def test_a_damaged_index_is_found_at_its_first_read_and_by_verify(path):
    flip(path / "index.parquet", 50)
    bank = Bank.open(path)
    with pytest.raises(UserError, match=r"index\.parquet does not agree with its checksum"):
        _ = bank.rows
    flip(path / "shard-00002.npy", -1)
    found = verify(Bank.open(path))
    assert found[0] == "index.parquet does not agree with its checksum"
    assert found[1].startswith("shard-00002.npy does not agree")


def test_verify_reads_the_parts_of_the_index_and_the_records_of_the_shards(path):
    flip(path / "shard-00001.parquet", 50)
    flip(path / "shard-00002.json", 20)
    (path / "shard-00003.parquet").unlink()
    (path / "shard-00004.json").unlink()
    assert verify(Bank.open(path)) == [
        "shard-00001.parquet does not agree with its checksum or is missing",
        "shard-00002.json does not agree with bank.json or is missing",
        "shard-00003.parquet does not agree with its checksum or is missing",
        "shard-00004.json does not agree with bank.json or is missing",
    ]


def test_an_index_with_too_few_rows_is_refused(path):
    index = path / "index.parquet"
    pq.write_table(pq.read_table(index).slice(1), index)
    edit_record(path, seal=True, index=size_and_checksum(index))
    with pytest.raises(UserError, match=r"index\.parquet has 79 rows, expected 80, one per item and slot"):
        _ = Bank.open(path).available


def test_checksums_of_views_take_sixteen_bytes(path):
    assert str(pq.read_schema(path / "index.parquet").field("checksum").type) == "fixed_size_binary[16]"


# more shards than maps --------------------------------------------------------------------------------------


def open_maps(path):
    """How many files of a bank this process has mapped."""
    return Path("/proc/self/maps").read_text().count(str(path))


@pytest.mark.parametrize("side", [3, 192])  # two ways to memory
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="asks Linux what is mapped")
def test_of_many_shards_few_are_mapped_at_a_time(tmp_path, monkeypatch, side):
    path = make_bank(tmp_path, count=11, rows_per_shard=1, shape=(1, side, side))
    expected = stored(path)
    monkeypatch.setattr(shard_maps, "MAPS", 3)
    bank = Bank.open(path)
    rng = np.random.default_rng(0)
    for count in [1, 2, 3, 4, 11, 40, 2, 2, 2, 2]:  # fewer and more shards in a batch than may be mapped
        items, slots = rng.integers(0, 11, count), rng.integers(0, 4, (count, 2))
        np.testing.assert_array_equal(bank.gather(items, slots), expected[items[:, None], slots])
        assert 1 <= open_maps(path) <= 3
    sequential = bank.gather(np.arange(11), np.zeros(11, dtype=int))
    np.testing.assert_array_equal(sequential, expected[:, 0])


def resident(path):
    """Bytes of the mapped files of a bank that count as memory of this process."""
    found, ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            ours = str(path) in line
        elif ours and line.startswith("Rss:"):
            found += int(line.split()[1]) * 1024
    return found


@pytest.mark.parametrize(("side", "count"), [(64, 400), (192, 80)])  # two ways to memory
def test_what_was_read_does_not_stay_memory_of_the_process(tmp_path, monkeypatch, side, count):
    path = make_bank(tmp_path, count, rows_per_shard=count // 2, shape=(1, side, side))
    monkeypatch.setattr(shard_maps, "LOOK_EVERY", 1)
    truth, bank, rng = stored(path), Bank.open(path), np.random.default_rng(0)

    def read(times):
        for _ in range(times):
            item, slot = rng.integers(0, count, 1), rng.integers(0, 4, 1)
            np.testing.assert_array_equal(bank.gather(item, slot), truth[item, slot])
            yield resident(path)

    all_of_it = list(read(count))[-1]
    monkeypatch.setattr(shard_maps, "RESIDENT", 0)
    assert 0 < max(read(20)) < all_of_it / 2


def test_threads_may_read_a_bank_whose_maps_come_and_go(tmp_path, monkeypatch):
    path = make_bank(tmp_path, count=12, rows_per_shard=1)
    expected, wrong = stored(path), []
    monkeypatch.setattr(shard_maps, "MAPS", 2)
    bank = Bank.open(path)

    def read(seed):
        rng = np.random.default_rng(seed)
        for _ in range(200):
            items, slots = rng.integers(0, 12, 2), rng.integers(0, 4, 2)
            if not np.array_equal(bank.gather(items, slots), expected[items, slots]):
                wrong.append(seed)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize(
    ("limits", "maps", "raised"),
    [
        ((1024, 1_000_000), 4096, 4096 + OTHER_FILES),
        ((1024, 2048), 2048 - OTHER_FILES, 2048),
        ((1024, resource.RLIM_INFINITY), 4096, 4096 + OTHER_FILES),
        ((50_000, 50_000), 4096, None),
        ((100, 100), 1, None),
    ],
)
def test_as_many_shards_are_mapped_as_the_system_lets_a_process_open_files(monkeypatch, limits, maps, raised):
    asked = []
    monkeypatch.setattr(resource, "getrlimit", lambda what: limits)
    monkeypatch.setattr(resource, "setrlimit", lambda what, wanted: asked.append(wanted[0]))
    assert allow_open_files(4096) == maps
    assert asked == ([] if raised is None else [raised])

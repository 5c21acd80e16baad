"""Single flipped bits anywhere in a bank: whatever happens next, nobody reads another pixel or another value
than was stored without being told."""

import contextlib

import numpy as np
import pytest
from bank_toys import ToyGenerator, build_toy, snapshot, toy_table

from cfssl.bank.store import Bank
from cfssl.bank.verify import verify
from cfssl.errors import UserError

VIEWS = [{"scanner": "A"}, {"age": 30.0}]
FLIPS = 12  # per file and state, drawn anew in each


def make(folder, table, finished=True, **settings):
    """A bank of two shards of three small images."""
    shards = {} if finished else {"shards": range(2)}
    return build_toy(folder, table, views=VIEWS, rows_per_shard=3, **shards, **settings)


def read(path):
    """All that a bank says: plan, views and index. Raises UserError like any reader."""
    bank = Bank.open(path)
    pixels = bank.gather(np.arange(len(bank)), np.tile(np.arange(3), (len(bank), 1)))
    return bank.plan, pixels.tobytes(), bank.index.to_csv(), bank.rows.tolist(), bank.available.tolist()


def outcome(path, truth):
    """What a reader and `verify` make of a folder: "refused", "named" (by verify), or "healthy"."""
    try:
        findings = verify(Bank.open(path))
        if not findings:
            assert read(path) == truth
            return "healthy"
        with contextlib.suppress(UserError):  # unless the damage is in what a reader does not need
            assert read(path) == truth
        return "named"
    except UserError:
        return "refused"


@pytest.mark.parametrize("finished", [True, False], ids=["finished", "unfinished"])
def test_no_flipped_bit_anywhere_is_read_in_silence(tmp_path, finished):
    table = toy_table(tmp_path / "table", count=6, shape=(1, 2, 2))
    make(tmp_path / "truth", table)
    truth, whole = read(tmp_path / "truth"), snapshot(tmp_path / "truth")
    path = tmp_path / "bank"
    make(path, table, finished)
    before, rng = snapshot(path), np.random.default_rng(int(finished))
    assert len(before) == (8 if finished else 7)
    seen = {"refused": 0, "named": 0, "healthy": 0}
    for name, content in before.items():
        for bit in rng.choice(8 * len(content), FLIPS, replace=False):
            damaged = bytearray(content)
            damaged[bit // 8] ^= 1 << bit % 8
            (path / name).write_bytes(damaged)
            if finished:
                first = outcome(path, truth)
                assert first != "healthy" or name.endswith(".json")  # a blank may be another blank
            for check in (False, True):
                try:
                    make(path, table, generator=ToyGenerator(), check=check)
                except UserError:
                    assert name == "bank.json"  # says that its format or its plan is another one
                    seen["refused"] += 1
                    break
                last = outcome(path, truth)
                assert last == "healthy" if check else last in ("healthy", "named")
                seen[last] += 1
            else:
                assert {n: c for n, c in snapshot(path).items() if not n.endswith("json")} == {
                    n: c for n, c in whole.items() if not n.endswith("json")
                }
            for file in path.iterdir():
                if file.name not in before:
                    file.unlink()
            for file, bytes_before in before.items():
                (path / file).write_bytes(bytes_before)
    assert seen["healthy"] > 10 * seen["refused"]
    assert seen["named"] > 0

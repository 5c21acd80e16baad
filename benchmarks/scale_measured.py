"""The measurements of scale.py, each made by a process of its own: `python benchmarks/scale_measured.py WHAT
WORDS...` prints one line of JSON. Imports count as memory, so each measurement imports what it needs."""

import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from cfssl.bank.shards import View
from cfssl.bank.store import Bank

SHAPE = (1, 64, 64)
SCANNERS = "ABC"
VIEWS: tuple[View, ...] = tuple({"scanner": name} for name in SCANNERS)
BATCH, BATCHES, FIRST = 256, 300, 3  # images with two views each; batches that are timed, and with checksums
BUILT = 1_000  # images of the phantom


def sample(folder: str, checks: str) -> dict[str, Any]:
    """Seconds of opening, of reading what the view plan needs, of the plan, and of each batch; `checks`:
    "compare" shards with their checksums at their first read, or "trust" them, as a staged copy is."""
    from cfssl.data.order import EpochOrder
    from cfssl.data.plan import CounterfactualPlan, SlotPlan

    imports, times = peak_megabytes(), [time.perf_counter()]
    bank = Bank.open(folder, is_checked=checks == "trust")
    times.append(time.perf_counter())
    available = bank.available
    assert available.shape == (len(bank.rows), bank.plan.slots) == (len(bank), 1 + len(VIEWS))
    times.append(time.perf_counter())
    settings = CounterfactualPlan(variable="scanner", view=(1,))
    plan = SlotPlan(bank, 2, settings, {(name,): 1 for name in SCANNERS})
    order = EpochOrder(len(bank), BATCH, 1, seed=0)
    order.items(0)
    times.append(time.perf_counter())
    rng, batches = np.random.default_rng(0), []
    for step in range(FIRST if checks == "compare" else BATCHES):
        begun = time.perf_counter()
        items = order.items(step % len(order))
        slots = plan.draw(rng, items)
        views = bank.gather(items, slots)
        batches.append(time.perf_counter() - begun)
        assert views.shape == (BATCH, 2, *SHAPE)
        assert not views.any()
        assert available[items[:, None], slots].all()
    opened, index, planned = np.diff(times).tolist()
    return {"open": opened, "index": index, "plan": planned, "batches": batches, "imports": imports}


def verified(folder: str, jobs: str) -> dict[str, Any]:
    """Seconds of verifying a bank that is sound."""
    from cfssl.bank.verify import verify

    bank, begun = Bank.open(folder), time.perf_counter()
    assert verify(bank, jobs=int(jobs)) == []
    return {"seconds": time.perf_counter() - begun}


def copied(folder: str, place: str) -> dict[str, Any]:
    """Seconds of staging, and how much."""
    from cfssl.bank.staging import staged

    bank, begun = Bank.open(folder), time.perf_counter()
    copy = staged(bank, place)
    seconds = time.perf_counter() - begun
    return {"seconds": seconds, "gigabytes": sum(entry["bytes"] for entry in copy.shards) / 1e9}


def built(table_folder: str, folder: str, index: str, count: str) -> dict[str, Any]:
    """When this process begins and ends to build its part of a bank of the phantom: counterfactuals of the
    small HVAE, whose weights are random because their values cost nothing."""
    from cfssl.bank.build import build, plan_bank, plan_views
    from cfssl.bank.parts import Part
    from cfssl.data.datasets import PhantomChestSettings, open_dataset
    from cfssl.generators.hvae import HVAEGenerator
    from cfssl.generators.hvae_settings import HVAESettings

    table = open_dataset(PhantomChestSettings(count=BUILT), Path(table_folder))
    generator = HVAEGenerator(HVAESettings(parents=("scanner", "sex")), table.attributes, table.images.shape)
    generator.seal()
    content = (
        table,
        table.rows(),
        generator,
        plan_views({"scanner": "all"}, generator.graph, table.attributes),
    )
    shards = Part(int(index), int(count)).of(plan_bank(*content, megabytes=1).shard_count)
    begun = time.time()
    build(folder, *content, megabytes=1, shards=shards)
    return {"begun": begun, "ended": time.time()}


MEASUREMENTS: dict[str, Callable[..., dict[str, Any]]] = {
    "sample": sample,
    "verify": verified,
    "stage": copied,
    "build": built,
}


def peak_megabytes() -> float:
    """Of this process, files that are mapped included, or of the largest of its children. Its own is not that
    of getrusage, which counts what the process was forked from."""
    status = Path("/proc/self/status").read_text().splitlines()
    (own,) = (int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    return max(own, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss) * 1024 / 1e6


if __name__ == "__main__":
    print(json.dumps(MEASUREMENTS[sys.argv[1]](*sys.argv[2:]) | {"peak": peak_megabytes()}))

"""How fast a bank hands out random views, against PNG files and against copying memory.

    python benchmarks/bank_read.py

A batch is 256 random pairs, each a real image and one of its counterfactuals: 512 views. All files are warm.
In every repeat each way of reading gets random pairs of its own, so that none finds its bytes in the
processor's caches because another one has just been there, and the ways take turns in who goes first. A ratio
is taken within a repeat; a figure is the median over repeats with a bootstrap interval. It runs for about
three minutes and is not resumed: a ratio of speeds belongs to one run. Writes
benchmarks/results/bank_read.json and .md.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from record import figure, markdown_table, write_results

from cfssl.bank.shards import Plan, View, begin, finish, view_checksum, write_shard
from cfssl.bank.store import Bank

SIZES = {64: 16_000, 224: 1_200}  # pixels: items
COUNTERFACTUALS = 3
PAIRS = 256
SEEDS = (0, 1, 2)
REPEATS = {64: 60, 224: 20}  # per seed
ARMS = ("bank", "png", "memcpy", "copy")


def main() -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--folder", type=Path, help="where to put the temporary bank and PNG files")
    folder = parser.parse_args().folder
    torch.set_num_threads(1)
    started = time.monotonic()
    seconds = {}
    for size, items in SIZES.items():
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            bank = write_views(Path(scratch), size, items)
            seconds[size] = measure(bank, Path(scratch) / "png", REPEATS[size])
            shards = bank.shard_count
        print(f"{size} px, {items} items in {shards} shards", file=sys.stderr)
    minutes = (time.monotonic() - started) / 60
    publish(seconds, minutes)


def write_views(folder: Path, size: int, items: int) -> Bank:
    """A bank of smooth grey images with a little grain, as radiographs are, and one PNG file per view."""
    rng = np.random.default_rng(size)
    slots = 1 + COUNTERFACTUALS
    rows_per_shard = 64 * 2**20 // (slots * size * size)
    views: tuple[View, ...] = tuple({"scanner": name} for name in "ABC")
    made_by = "benchmark"
    plan = Plan("uint8", (1, size, size), items, "", rows_per_shard, 64, views, made_by, made_by, None, 0)
    begin(folder / "bank", plan)
    (folder / "png").mkdir()
    for shard in range(plan.shard_count):
        numbers = plan.items(shard)
        count = len(numbers) * slots
        coarse = torch.from_numpy(rng.uniform(0, 255, (count, 1, 6, 6)).astype(np.float32))
        smooth = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bilinear").numpy()
        grain = rng.normal(0, 3, smooth.shape).astype(np.float32)
        images = (smooth + grain).clip(0, 255).astype(np.uint8).reshape(len(numbers), slots, 1, size, size)
        index = {"row": np.repeat(np.array(numbers), slots), "available": np.ones(count, dtype=bool)}
        index["checksum"] = np.array([view_checksum(view) for item in images for view in item])
        write_shard(folder / "bank", plan, shard, images, pa.table(index))
        for item, of_item in zip(numbers, images, strict=True):
            for slot, view in enumerate(of_item):
                Image.fromarray(view[0]).save(folder / "png" / f"{item}-{slot}.png")
    finish(folder / "bank")
    return Bank.open(folder / "bank")


def measure(bank: Bank, png: Path, repeats: int) -> dict[str, np.ndarray]:
    """Seconds per batch, (seeds, repeats) for each way of reading."""
    everything = np.indices((len(bank), bank.plan.slots)).reshape(2, -1)
    memory = bank.gather(*everything).reshape(len(bank) * bank.plan.slots, -1)  # also warms the bank
    views = 2 * PAIRS

    def read_bank(items: np.ndarray, slots: np.ndarray) -> np.ndarray:
        return bank.gather(items, slots)

    def read_png(items: np.ndarray, slots: np.ndarray) -> np.ndarray:
        batch = np.empty((*slots.shape, *bank.shape), dtype=np.uint8)
        for place, slot in np.ndenumerate(slots):
            with Image.open(png / f"{items[place[0]]}-{slot}.png") as image:
                batch[place][0] = np.asarray(image)
        return batch

    def copy_from_memory(items: np.ndarray, slots: np.ndarray) -> np.ndarray:
        numbers = (items[:, None] * bank.plan.slots + slots).ravel()
        batch = np.empty((views, memory.shape[1]), dtype=np.uint8)
        return np.take(memory, numbers, axis=0, out=batch, mode="clip")  # the fastest of numpy's ways

    def copy_in_one_piece(items: np.ndarray, slots: np.ndarray) -> np.ndarray:
        start = min(int(items[0]) * bank.plan.slots, len(memory) - views)
        return memory[start : start + views].copy()

    ways: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]]
    ways = dict(zip(ARMS, (read_bank, read_png, copy_from_memory, copy_in_one_piece), strict=True))
    seconds = {name: np.zeros((len(SEEDS), repeats)) for name in ways}
    for row, seed in enumerate(SEEDS):
        rng = np.random.default_rng(seed)
        check = draw_pairs(rng, bank)
        batches = [ways[name](*check).reshape(views, -1) for name in ARMS[:3]]  # warm, and all read the same
        assert all(np.array_equal(batch, batches[0]) for batch in batches)
        for repeat in range(repeats):
            for name in np.roll(ARMS, repeat):
                pairs = draw_pairs(rng, bank)
                start = time.perf_counter()
                batch = ways[str(name)](*pairs)
                seconds[str(name)][row, repeat] = time.perf_counter() - start
                del batch
    return seconds


def draw_pairs(rng: np.random.Generator, bank: Bank) -> tuple[np.ndarray, np.ndarray]:
    """Items (256,), and slots (256, 2): the real image and one counterfactual."""
    slots = np.zeros((PAIRS, 2), dtype=np.int64)
    slots[:, 1] = rng.integers(1, bank.plan.slots, PAIRS)
    return rng.integers(0, len(bank), PAIRS), slots


def median(values: np.ndarray, unit: str) -> dict[str, Any]:
    """Median of (seeds, repeats) with a 95 % bootstrap interval over repeats, and the median of each seed."""
    rng = np.random.default_rng(0)
    flat = values.ravel()
    medians = np.median(rng.choice(flat, (2000, flat.size)), axis=1)
    numbers = [float(np.median(flat)), *np.quantile(medians, [0.025, 0.975])]
    value, low, high = (float(f"{number:.4g}") for number in numbers)
    return figure(value, low, high, unit, [float(f"{number:.4g}") for number in np.median(values, axis=1)])


def publish(seconds: dict[int, dict[str, np.ndarray]], minutes: float) -> None:
    """Writes the figures and the table of `seconds` per size and way of reading, (seeds, repeats) each."""
    figures = {}
    for size, by_arm in seconds.items():
        for arm in ARMS:
            figures[f"{arm}_images_per_second_{size}"] = median(2 * PAIRS / by_arm[arm], "images/s")
        for arm in ARMS[1:]:
            figures[f"ratio_vs_{arm}_{size}"] = median(by_arm[arm] / by_arm["bank"], "times as fast")
    protocol = {
        "batch": f"{PAIRS} random pairs (real, one counterfactual), {2 * PAIRS} uint8 views, one process",
        "items": ", ".join(f"{count} at {size} px" for size, count in SIZES.items()),
        "repeats per seed": ", ".join(f"{count} at {size} px" for size, count in REPEATS.items()),
        "bank": f"1 + {COUNTERFACTUALS} views per item, shards of 64 MB, all files warm",
        "png": "one grey PNG file per view, read with PIL",
        "memcpy": "views by random indices out of one array in memory (np.take into a fresh array); near 1 "
        "means that the bank costs nothing over holding all views in memory",
        "copy": "np.copy of as many bytes lying together in memory",
        "interval": "95 %, bootstrap of the median over repeats; ratios are taken within a repeat",
    }
    header = [
        "way of reading",
        *(f"{size} px: {what}" for size in SIZES for what in ("images/s", "bank is ... times as fast")),
    ]
    rows = []
    for arm in ARMS:
        cells = [arm]
        for size in SIZES:
            cells.append(f"{figures[f'{arm}_images_per_second_{size}']['value']:,.0f}")
            ratio = figures.get(f"ratio_vs_{arm}_{size}")
            cells.append(f"{ratio['value']:.3g} [{ratio['low']:.3g}, {ratio['high']:.3g}]" if ratio else "")
        rows.append(cells)
    write_results("bank_read", figures, protocol, SEEDS, minutes, markdown_table(header, rows))


if __name__ == "__main__":
    main()

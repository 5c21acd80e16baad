"""How a bank of 10^7 images is opened, sampled and verified, in how much memory, and what a second process
is worth.

    python benchmarks/scale.py [--rows 10000000] [--folder PATH]

The simulated bank has the plan, index, records and checksums of a real one, and is finished by the same
code; its shards are sparse files, whose pixels are all 0 and take no space on the disk (index and records
take about a gigabyte in `--folder`). Each measurement is made by a process of its own, whose peak of memory
is that of the measurement, imports included. Reading a hole costs memory bandwidth and no disk: rates of
checksums are those of warm files.

Then a bank of the phantom is built by one process and by two, each of which builds a part: counterfactuals
of the small HVAE, whose weights are random because their values cost nothing. At last an encoder is
pre-trained by one process and by two (`hardware.devices`); its images per second are those of the epochs
after the first, so that starting the processes does not count. About twenty minutes on two idle cores; not
resumed, because a ratio of speeds belongs to one run.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from record import figure, markdown_table, over_repeats, write_results
from scale_measured import BATCH, BATCHES, BUILT, SCANNERS, SHAPE, VIEWS

from cfssl.bank.build import shard_megabytes
from cfssl.bank.records import size_and_checksum, write_record
from cfssl.bank.shards import Plan, begin, finish, shard_file, view_checksum
from cfssl.data.datasets import PhantomChestSettings, prepare_dataset
from cfssl.files import atomic_path, read_json
from cfssl.pipeline import Pipeline
from cfssl.recipe import load_recipe

MEASURED = Path(__file__).parent / "scale_measured.py"
ROWS = 10_000_000
STAGED_ROWS = 131_072  # 2 GB
REPEATS = 3
RECIPE = Path(__file__).parent.parent / "recipes" / "phantom_simclr.yaml"
OVERRIDES = (
    "monitor=null",
    "evaluate=[]",
    "train.batch=128",
    "hardware.accelerator=cpu",
    "hardware.threads=1",
)
EPOCHS = (1, 6)


def main() -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--folder", type=Path, help="where to put the temporary banks")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as scratch:
        found = simulated(Path(scratch), arguments.rows) | building(Path(scratch))
        found |= pretraining(Path(scratch))
    publish(found, arguments.rows, (time.monotonic() - started) / 60)


# the simulated bank -----------------------------------------------------------------------------------------


def simulated(scratch: Path, rows: int) -> dict[str, Any]:
    """All figures of a bank of so many rows."""
    folder = scratch / "simulated"
    begun = time.monotonic()
    plan = simulate(folder, rows)
    written = time.monotonic()
    finish(folder)
    finished = time.monotonic()
    simulate(scratch / "small", STAGED_ROWS)
    finish(scratch / "small")
    size = (folder / "index.parquet").stat().st_size
    found: dict[str, Any] = {
        "bank_rows": figure(rows, unit="images"),
        "shards": figure(plan.shard_count, unit="files"),
        "finish_seconds": figure(finished - written, unit="s"),
        "index_bytes_per_view": figure(size / (rows * plan.slots), unit="bytes"),
    }
    print(f"simulated in {written - begun:.0f} s, finished in {finished - written:.0f} s", file=sys.stderr)
    read, trusted = measured("sample", folder, "compare"), measured("sample", folder, "trust")
    found["open_seconds"] = figure(read["open"], unit="s")
    found["index_seconds"] = figure(read["index"], unit="s")
    found["plan_seconds"] = figure(read["plan"], unit="s")
    found["first_batch_seconds"] = figure(read["batches"][0], unit="s")
    found["first_batch_seconds_staged"] = figure(trusted["batches"][0], unit="s")
    found["batch_milliseconds"] = over_repeats(1000 * np.array(trusted["batches"][1:]), "ms")
    found["peak_rss_mb"] = figure(max(read["peak"], trusted["peak"]), unit="MB")
    found["imports_rss_mb"] = figure(read["imports"], unit="MB")
    checked = {jobs: measured("verify", folder, jobs) for jobs in (1, 2)}
    total = plan.rows * plan.slots * plan.view_bytes / 1e9
    for jobs, of in checked.items():
        found[f"verify_gb_per_second_{jobs}"] = figure(total / of["seconds"], unit="GB/s")
        found[f"verify_peak_rss_mb_{jobs}"] = figure(of["peak"], unit="MB")
    ratio = checked[1]["seconds"] / checked[2]["seconds"]
    found["verify_speedup_2_processes"] = figure(ratio, unit="times as fast")
    staging = measured("stage", scratch / "small", scratch / "node")
    found["stage_gb_per_second"] = figure(staging["gigabytes"] / staging["seconds"], unit="GB/s")
    return found


def simulate(folder: Path, rows: int) -> Plan:
    """All of a bank but its joined index: real images of three scanners in turn, and each on the others."""
    item = (1 + len(VIEWS)) * int(np.prod(SHAPE))
    per_shard = int(shard_megabytes(rows * item) * 2**20) // item
    plan = Plan("uint8", SHAPE, rows, "", per_shard, 64, VIEWS, "simulated", "simulated", None, 0, "cpu")
    begin(folder, plan)
    entries: dict[int, dict[str, Any]] = {}  # by number of items: files of equal zeros are equal
    nothing = view_checksum(np.zeros(SHAPE, dtype=np.uint8))
    for shard in range(plan.shard_count):
        items = plan.items(shard)
        data, part = (shard_file(folder, shard, kind) for kind in ("npy", "parquet"))
        shape = (len(items), plan.slots, *SHAPE)
        with atomic_path(data) as temporary, temporary.open("wb") as stream:
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(stream, header)
            stream.truncate(stream.tell() + int(np.prod(shape)))
        if len(items) not in entries:
            entries[len(items)] = size_and_checksum(data)
        index = index_of(items, plan.slots, nothing)
        with atomic_path(part) as temporary:
            pq.write_table(index, temporary, row_group_size=len(index))
        entry = {"rows": len(items), **entries[len(items)], "index": size_and_checksum(part)}
        write_record(shard_file(folder, shard, "json"), {"plan": plan.key, "shard": entry})
    return plan


def index_of(items: range, slots: int, checksum: bytes) -> pa.Table:
    """The columns that a bank with one attribute has."""
    item = np.repeat(np.asarray(items, dtype=np.int64), slots)
    slot = np.tile(np.arange(slots, dtype=np.int16), len(items))
    own = item % len(SCANNERS)
    names = pa.array(list(SCANNERS))
    shown = np.where(slot == 0, own, slot - 1)
    do = pa.array([None, *map(json.dumps, VIEWS)], pa.string())
    return pa.table(
        {
            "item": item,
            "slot": slot,
            "row": item,
            "do": do.take(pa.array(slot)),
            "available": (slot == 0) | (slot - 1 != own),
            "seed": np.full(len(item), -1, dtype=np.int64),
            "checksum": pa.array([checksum] * len(item), pa.binary(16)),
            "factual.scanner": names.take(pa.array(own)),
            "counterfactual.scanner": names.take(pa.array(shown)),
        }
    )


# building with one process and two --------------------------------------------------------------------------


def building(scratch: Path) -> dict[str, Any]:
    """The figures of building a bank of the phantom."""
    prepare_dataset(PhantomChestSettings(count=BUILT), scratch / "table", quiet=True)
    rates: dict[int, list[float]] = {1: [], 2: []}
    for repeat in range(REPEATS):
        for count in (1, 2) if repeat % 2 == 0 else (2, 1):
            folder = scratch / f"built-{repeat}-{count}"
            words = [("build", scratch / "table", folder, part, count) for part in range(count)]
            rates[count].append(BUILT / together(words))
            finish(folder)
    one, two = (np.array(rates[count]) for count in (1, 2))
    return {
        "build_images_per_second": over_repeats(one, "images/s, 4 do()s each"),
        "build_speedup_2_processes": over_repeats(two / one, "times as fast"),
    }


# pre-training with one process and two ---------------------------------------------------------------------


def pretraining(scratch: Path) -> dict[str, Any]:
    """Images per second of a pre-training, and what a second process is worth."""
    recipe = load_recipe(RECIPE, OVERRIDES)
    images = len(Pipeline(recipe, scratch / "table", quiet=True).table.rows("train"))
    images = images // recipe.train.batch * recipe.train.batch  # of an epoch
    rates: dict[int, list[float]] = {1: [], 2: []}
    for repeat in range(REPEATS):
        for count in (1, 2) if repeat % 2 == 0 else (2, 1):
            few, many = (pretrained(scratch, repeat, count, epochs) for epochs in EPOCHS)
            rates[count].append((EPOCHS[1] - EPOCHS[0]) * images / (many - few))
    one, two = (np.array(rates[count]) for count in (1, 2))
    return {
        "pretraining_images_per_second_1": over_repeats(one, "images/s"),
        "pretraining_images_per_second_2": over_repeats(two, "images/s"),
        "speedup_2_processes": over_repeats(two / one, "times as fast"),
    }


def pretrained(scratch: Path, seed: int, count: int, epochs: int) -> float:
    """Seconds of the encoder's stage, made by `count` processes."""
    runs = scratch / f"pretrained-{seed}-{count}-{epochs}"
    own = [f"train.seed={seed}", f"train.epochs={epochs}", f"hardware.devices={count}"]
    command = [sys.executable, "-m", "cfssl", "pretrain", str(RECIPE), *OVERRIDES, *own]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, "--runs", str(runs), "--quiet"], check=True, env=environment)
    (done,) = (runs / "stages").glob("encoder-*/done.json")
    seconds: float = read_json(done)["seconds"]
    print({"processes": count, "epochs": epochs, "seconds": seconds}, file=sys.stderr)
    return seconds


# measuring --------------------------------------------------------------------------------------------------


def begun(*words: object) -> subprocess.Popen[str]:
    command = [sys.executable, str(MEASURED), *map(str, words)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )


def ended(process: subprocess.Popen[str]) -> dict[str, Any]:
    output, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"{process.args} ended with {process.returncode}")
    found: dict[str, Any] = json.loads(output.splitlines()[-1])
    print(found if len(str(found)) < 300 else str(found)[:300], file=sys.stderr)
    return found


def measured(*words: object) -> dict[str, Any]:
    """In a process of its own."""
    return ended(begun(*words))


def together(commands: list[tuple[object, ...]]) -> float:
    """Seconds from the first beginning to the last end of processes that run at once; what they do before,
    such as importing, does not count."""
    running = [begun(*words) for words in commands]
    found = [ended(process) for process in running]
    return max(of["ended"] for of in found) - min(of["begun"] for of in found)


def publish(figures: dict[str, Any], rows: int, minutes: float) -> None:
    protocol = {
        "bank": f"{rows:,} images of {SHAPE[1]} x {SHAPE[2]}, uint8, with {len(VIEWS)} do()s; sparse shards",
        "batch": f"{BATCH} images in the order of an epoch, two views each, drawn by a view plan; the median "
        f"of {BATCHES - 1} after the first, of shards that need no checksum; every page is new",
        "first batch": "with the checksums of all shards that it touches; staged: without",
        "peak_rss_mb": "the largest resident set of a process that opens the bank, reads index and plan, and "
        "samples, mapped files included; imports_rss_mb of it are the imports",
        "verify": "every byte of the bank, by one process and by two; peak of the largest process",
        "build": f"{BUILT:,} images of the phantom of 64 px, small HVAE, one thread per process, {REPEATS} "
        "repeats; each of two processes builds a part",
        "pre-training": f"{RECIPE.name}, batch 128, one thread per process, {REPEATS} repeats; seconds of "
        f"{EPOCHS[1]} epochs less those of {EPOCHS[0]}",
        "stage": f"{STAGED_ROWS:,} images (sparse) to the disk of --folder, with fsync",
    }
    table = [[name, f"{of['value']:,.4g}", of["unit"]] for name, of in figures.items()]
    tables = markdown_table(["figure", "value", "unit"], table)
    write_results("scale", figures, protocol, (0,), minutes, tables)


if __name__ == "__main__":
    main()

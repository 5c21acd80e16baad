"""How long `cfssl demo` takes after set-up, and how much memory.    python benchmarks/demo.py [--repeats 1]

A fresh runs folder each time; the process and its children are watched from outside.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
from record import figure, markdown_table, write_results


def measure(runs: Path) -> tuple[float, float]:
    """Minutes and peak resident memory (MB, all processes) of one demo."""
    started = time.monotonic()
    process = psutil.Popen(
        [sys.executable, "-m", "cfssl", "demo", "--runs", str(runs)], stdout=subprocess.DEVNULL
    )
    peak = 0
    while process.poll() is None:
        family = [process, *process.children(recursive=True)]
        peak = max(peak, sum(member.memory_info().rss for member in family if member.is_running()))
        time.sleep(0.5)
    if process.returncode:
        raise RuntimeError(f"the demo ended with exit code {process.returncode}")
    return (time.monotonic() - started) / 60, peak / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--keep", type=Path, help="copy the last report there")
    options = parser.parse_args()
    found = []
    started = time.monotonic()
    for _ in range(options.repeats):
        with tempfile.TemporaryDirectory() as folder:
            found.append(measure(Path(folder)))
            if options.keep is not None:
                shutil.copytree(Path(folder) / "demo", options.keep, dirs_exist_ok=True)
    minutes, memory = (list(values) for values in zip(*found, strict=True))
    figures = {
        "minutes_after_setup": figure(float(np.median(minutes)), unit="minutes", seeds=minutes),
        "peak_rss_mb": figure(float(np.median(memory)), unit="MB", seeds=memory),
    }
    rows = [[name, f"{entry['value']:.1f}", entry["unit"]] for name, entry in figures.items()]
    protocol = {"what": "cfssl demo in an empty runs folder", "repeats": options.repeats}
    table = markdown_table(["figure", "median", "unit"], rows)
    write_results("demo", figures, protocol, [0], (time.monotonic() - started) / 60, table)


if __name__ == "__main__":
    main()

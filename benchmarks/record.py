"""How a benchmark's results are written: NAME.json for programs and NAME.md for people, both under
benchmarks/results/."""

import os
import platform
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from scipy.special import stdtrit

from cfssl.files import write_json, write_text
from cfssl.provenance import git_state
from cfssl.seeds import numpy_generator

RESULTS = Path(__file__).parent / "results"


def figure(
    value: float,
    low: float | None = None,
    high: float | None = None,
    unit: str = "",
    seeds: Sequence[float] | None = None,
) -> dict[str, Any]:
    """One figure in the results format; `low` and `high` are the 95 % interval, null where it makes no
    sense."""
    return {
        "value": value,
        "low": low,
        "high": high,
        "unit": unit,
        "seeds": None if seeds is None else list(seeds),
    }


def over_seeds(values: Sequence[float], unit: str = "") -> dict[str, Any]:
    """The mean over training seeds with its 95 % t interval."""
    mean, spread = float(np.mean(values)), float(np.std(values, ddof=1)) / len(values) ** 0.5
    reach = float(stdtrit(len(values) - 1, 0.975)) * spread
    return figure(mean, mean - reach, mean + reach, unit, values)


def over_repeats(values: np.ndarray, unit: str) -> dict[str, Any]:
    """The median of repeated measurements (R,) with its 95 % bootstrap interval."""
    drawn = np.median(numpy_generator("repeats").choice(values, (2000, len(values))), axis=1)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return figure(float(np.median(values)), float(low), float(high), unit)


def machine() -> str:
    """Cores, processor, memory and torch version of this machine."""
    processor = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.exists():
        lines = [line for line in information.read_text().splitlines() if line.startswith("model name")]
        processor = lines[0].split(":", 1)[1].strip() if lines else processor
    memory = round(psutil.virtual_memory().total / 2**30)
    return f"{os.cpu_count()} cores, {processor}, {memory} GiB, torch {torch.__version__}"


def write_results(
    name: str,
    figures: Mapping[str, dict[str, Any]],
    protocol: Mapping[str, Any],
    seeds: Sequence[int],
    minutes: float,
    tables: str,
) -> None:
    """Writes both files. `tables` is the Markdown that a person reads; how to reproduce it is put above
    it."""
    # The folder of somebody's data is not part of how to reproduce a result.
    words = ["PATH" if "/" in word else word for word in sys.argv[1:]]
    command = " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *words])
    state = git_state()
    record = {
        "benchmark": name,
        "commit": state["commit"],
        "dirty": state["dirty"],
        "machine": machine(),
        "date": datetime.now(UTC).date().isoformat(),
        "command": command,
        "minutes": round(minutes, 1),
        "seeds": list(seeds),
        "protocol": dict(protocol),
        "figures": dict(figures),
    }
    write_json(RESULTS / f"{name}.json", record)
    about = "".join(f"- {key}: {value}\n" for key, value in protocol.items())
    text = (
        f"# {name}\n\n`{command}`, {record['minutes']} minutes on {record['machine']}, {record['date']}, "
        "commit "
        f"{str(state['commit'])[:10]}{' with local changes' if state['dirty'] else ''}.\n\n{about}\n{tables}"
    )
    write_text(RESULTS / f"{name}.md", text)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def with_interval(entry: Mapping[str, Any], digits: int = 1, scale: float = 1.0) -> str:
    """ "1.2 [0.3, 2.1]", or the bare value without an interval."""
    value = f"{entry['value'] * scale:+.{digits}f}"
    if entry["low"] is None:
        return value
    return f"{value} [{entry['low'] * scale:+.{digits}f}, {entry['high'] * scale:+.{digits}f}]"

"""The report: one HTML page that holds everything it shows.

Enters: pictures, the evaluation results of every arm, paired differences, and where all of it comes from.
Leaves: a file without scripts and without anything to load, that can be mailed, archived and printed.
"""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from cfssl.errors import UserError
from cfssl.files import write_text
from cfssl.visualise.cells import DASH, Cell, Table, number, words
from cfssl.visualise.evaluation_tables import Arm, evaluations

SIGNATURES = {b"\x89PNG": "image/png", b"\xff\xd8\xff": "image/jpeg"}


@dataclass(frozen=True)
class Picture:
    """A PNG or JPEG file with its words."""

    title: str
    caption: str
    path: Path


@dataclass(frozen=True)
class Report:
    """`comparisons`: paired differences between arms, as {"name", "of": what is compared, "value", "low",
    "high", "unit", "seeds": that of each training seed}, with "reason" where the value is null. `provenance`:
    what was run, by what, when; nested as it comes. `recipe_text`: the resolved recipe. `tables`: further
    ones, such as those of an audit, with a sentence about them."""

    title: str
    subtitle: str
    pictures: Sequence[Picture] = ()
    arms: Sequence[Arm] = ()
    comparisons: Sequence[Mapping[str, Any]] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)
    recipe_text: str = ""
    tables: Sequence[Table] = ()
    about_tables: str = ""


def write_report(report: Report, path: Path) -> None:
    """Writes the page. Raises `UserError` when a picture is missing or neither PNG nor JPEG, or when arms
    were evaluated on different data and thus cannot stand in one table."""
    found = evaluations(report.arms)
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(
        (resources.files(__package__) / "report.html").read_text(encoding="utf-8")
    )
    page = template.render(
        report=report,
        pictures=[(picture, data_uri(picture.path)) for picture in report.pictures],
        evaluations=found,
        comparisons=compared(report.comparisons),
        paired=paired_sentence(report.comparisons),
        provenance=[(key, words(value)) for key, value in report.provenance.items()],
        dash=DASH,
    )
    write_text(Path(path), page)


def data_uri(path: Path) -> str:
    """The picture itself as an address."""
    try:
        content = Path(path).read_bytes()
    except FileNotFoundError:
        raise UserError(
            f"The picture {path} does not exist; write it before the report or leave it out."
        ) from None
    kinds = [kind for signature, kind in SIGNATURES.items() if content.startswith(signature)]
    if not kinds:
        raise UserError(f"The picture {path} is neither PNG nor JPEG; convert it to one of them.")
    return f"data:{kinds[0]};base64,{base64.b64encode(content).decode()}"


@dataclass(frozen=True)
class Compared:
    """A paired difference in words, and its place (0 to 100) on a scale that all differences of its unit
    share."""

    name: str
    of: str
    unit: str
    cell: Cell
    verdict: str
    places: tuple[float, float, float] | None = None  # low, value, high; 50 is no difference


def compared(comparisons: Sequence[Mapping[str, Any]]) -> list[Compared]:
    """Every difference, in order. Its interval lies above 0, below 0 or contains 0."""
    ends: dict[str, float] = {}
    for entry in comparisons:
        known = [abs(entry[key]) for key in ("value", "low", "high") if entry[key] is not None]
        ends[entry["unit"]] = max([ends.get(entry["unit"], 0.0), *known])
    found = []
    for entry in comparisons:
        value, low, high = (entry[key] for key in ("value", "low", "high"))
        what = entry["name"], entry["of"], entry["unit"]
        if value is None:
            found.append(Compared(*what, Cell(DASH, note=entry.get("reason", "no value")), "no value"))
            continue
        if low is None or high is None:
            note = entry.get("reason", "no interval")
            found.append(Compared(*what, Cell(number(value, signed=True), note=note), "no interval"))
            continue
        interval = f"[{number(low, signed=True)}, {number(high, signed=True)}]"
        verdict = "above 0" if low > 0 else "below 0" if high < 0 else "contains 0"
        end = ends[entry["unit"]] or 1.0
        places = (50 + 47 * low / end, 50 + 47 * value / end, 50 + 47 * high / end)
        found.append(Compared(*what, Cell(number(value, signed=True), interval), verdict, places))
    return found


def paired_sentence(comparisons: Sequence[Mapping[str, Any]]) -> str:
    """How the intervals of differences were made. "seeds_of" of a comparison says what its seeds redraw, if
    that is not the training."""
    seeds = max((len(entry["seeds"]) for entry in comparisons), default=0)
    kinds = dict.fromkeys(
        entry.get("seeds_of", "training") for entry in comparisons if len(entry["seeds"]) > 1
    )
    made = (
        "The first-named arm minus the second, on the same test rows. Intervals: 95 %, from resamples of the "
        "test rows (whole groups, where the table has them) that are the same for both arms"
    )
    if kinds:
        made += f", and from the spread of the {seeds} {' or '.join(kinds)} seeds"
    made += "."
    if "training" not in kinds:
        made += " There is one training seed, so they exclude the variance between training runs."
    return f"{made} Nothing is corrected for the number of comparisons."

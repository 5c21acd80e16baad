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
from cfssl.evaluate.spread import over_seeds
from cfssl.files import write_text

SIGNATURES = {b"\x89PNG": "image/png", b"\xff\xd8\xff": "image/jpeg"}
TITLES = {
    "linear_probe": "Linear probe",
    "knn": "k nearest neighbours",
    "finetune": "Fine-tuning",
    "auc": "AUC",
    "average_precision": "average precision",
    "balanced_accuracy": "balanced accuracy",
    "macro_f1": "macro F1",
    "brier": "Brier score",
    "calibration_error": "expected calibration error",
}
DASH, MINUS = "—", "−"


@dataclass(frozen=True)
class Picture:
    """A PNG or JPEG file with its words."""

    title: str
    caption: str
    path: Path


@dataclass(frozen=True)
class Arm:
    """One method: a row of every table. `results`: its evaluation results, as the evaluations write them."""

    name: str
    description: str
    results: Sequence[Mapping[str, Any]]


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
    tables: Sequence["Table"] = ()
    about_tables: str = ""


@dataclass(frozen=True)
class Cell:
    """A value, its interval in smaller type, and a footnote."""

    text: str
    interval: str = ""
    note: str = ""


@dataclass(frozen=True)
class Table:
    """Rows (name, cells), without cells for an arm that was not evaluated; `columns` are (heading, lines
    below), `corner` the heading of the names."""

    title: str
    columns: Sequence[tuple[str, Sequence[str]]]
    rows: Sequence[tuple[str, Sequence[Cell]]]
    corner: str = "arm"

    @property
    def notes(self) -> list[str]:
        """The footnotes, in order of appearance."""
        return list(dict.fromkeys(cell.note for _, cells in self.rows for cell in cells if cell.note))


@dataclass(frozen=True)
class Evaluation:
    """The tables of one evaluation: `main` in sight, `more` (other metrics, label fractions, label subsets)
    folded away. `intervals`: how they were made; `more_intervals`: those of label subsets, if any.
    `protocol`: settings, with their value for each arm where arms differ."""

    title: str
    intervals: str
    more_intervals: str
    main: Sequence[Table]
    more: Sequence[Table]
    protocol: Mapping[str, str]


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


# From here to `merged_protocol` is all that this room knows of the shape of evaluation results.


def evaluations(arms: Sequence[Arm]) -> list[Evaluation]:
    """Sorts the results of all arms into tables, an evaluation of one target after the other."""
    sections: dict[str, dict[tuple[float, int], dict[str, Mapping[str, Any]]]] = {}
    for arm in arms:
        for result in arm.results:
            section = sections.setdefault(section_title(result), {})
            subset = (result["protocol"].get("label_fraction", 1.0), result["seeds"].get("labels", 0))
            of_arms = section.setdefault(subset, {})
            if arm.name in of_arms:
                raise UserError(
                    f"{arm.name!r} has two results of {result['evaluation']} for {result['target']!r} on "
                    f"{subset[0]:.0%} of the labels, seed {subset[1]}; name arms differently."
                )
            of_arms[arm.name] = result
    return [evaluation(title, section, [arm.name for arm in arms]) for title, section in sections.items()]


def section_title(result: Mapping[str, Any]) -> str:
    """What was asked, and of an external set where the classifier comes from."""
    title = f"{titled(result['evaluation'])} of {result['target']}"
    if "external" not in result:
        return title
    ways = {"own": "fitted there", "transferred": f"fitted on {result['protocol']['fitted_on']['table']}"}
    return f"{title} on the external set {result['external']}, {ways[result['way']]} ({result['way']})"


def evaluation(
    title: str, section: Mapping[tuple[float, int], Mapping[str, Mapping[str, Any]]], arms: Sequence[str]
) -> Evaluation:
    """The tables of `section`: (label fraction, seed of the label subset) -> arm -> result."""
    main: list[Table] = []
    more: list[Table] = []
    order = sorted(section, key=lambda subset: (-subset[0], subset[1]))
    for fraction, seed in order:
        results = section[fraction, seed]
        reference = check_same_data(title, results)
        labels = "" if fraction == 1 else f", {100 * fraction:g} % of the labels"
        if fraction < 1 or sum(other == fraction for other, _ in order) > 1:
            labels += f" (seed {seed})"
        for metric in reference["metrics"]:
            for grouping in reference["groups"] or [None]:
                table = group_table(metric, grouping, labels, results, arms)
                is_main = (fraction, seed) == order[0] and metric == reference["metrics"][0]
                (main if is_main else more).append(table)
    of_arms = {arm: [section[subset][arm] for subset in order if arm in section[subset]] for arm in arms}
    summaries = {arm: over_seeds(results) for arm, results in of_arms.items()}
    if len({fraction for fraction, _ in order}) > 1:
        main.insert(0, fraction_table(of_arms, summaries))
    for place, metric in enumerate(next(iter(section[order[0]].values()))["metrics"]):
        (more if place else main).extend(seed_tables(metric, summaries))
    first, last = (
        next(iter(section[subset].values()))["protocol"]["intervals"] for subset in (order[0], order[-1])
    )
    return Evaluation(
        title, first, last if last != first else "", main, more, merged_protocol(section[order[0]])
    )


def check_same_data(title: str, results: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Any]:
    """The first arm's result. Raises `UserError` unless every arm was evaluated on the same rows of the same
    table."""
    (name, reference), *others = results.items()
    for other, result in others:
        for key in ("table", "fingerprint"):
            here, there = reference["data"][key], result["data"][key]
            if here != there:
                raise UserError(
                    f"{title}: {name!r} was evaluated on the {key} {here} but {other!r} on {there}; a report "
                    "compares arms on the same data, so evaluate them on one table."
                )
        if counts(reference) != counts(result):
            raise UserError(
                f"{title}: {name!r} and {other!r} have different test rows or groups; evaluate them alike."
            )
    return reference


def counts(result: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Test rows and positives, overall and in every group."""
    rows = [("all", result["overall"])]
    for grouping, content in result["groups"].items():
        rows += [(f"{grouping} {group}", row) for group, row in content["table"].items()]
    return [(name, row["n"], row["positives"]) for name, row in rows]


def group_table(
    metric: str,
    grouping: str | None,
    labels: str,
    results: Mapping[str, Mapping[str, Any]],
    arms: Sequence[str],
) -> Table:
    """`metric` of every arm: overall, in every group of `grouping` (None: no groups), the worst group and the
    gap."""
    reference = next(iter(results.values()))
    columns: list[tuple[str, Sequence[str]]] = [("all", size(reference["overall"]))]
    if grouping is not None:
        table = reference["groups"][grouping]["table"]
        columns += [(group, size(row)) for group, row in table.items()]
        columns += [(f"worst {grouping}", ()), ("gap", ("highest minus", "lowest"))]
    rows: list[tuple[str, Sequence[Cell]]] = []
    for arm in arms:
        if arm not in results:
            rows.append((arm, []))
            continue
        result = results[arm]
        cells = [figure(result["overall"][metric])]
        if grouping is not None:
            content = result["groups"][grouping]
            cells += [figure(row[metric]) for row in content["table"].values()]
            worst, gap = content["worst"][metric], content["gap"][metric]
            none = Cell(DASH, note="fewer than two groups have a value")
            cells.append(Cell(f"{worst['group']} {number(worst['value'])}") if worst else none)
            cells.append(figure(gap) if gap else none)
        rows.append((arm, cells))
    by = f" by {grouping}" if grouping is not None else ""
    title = titled(metric)
    return Table(f"{title[0].upper()}{title[1:]}{by}{labels}", columns, rows)


def fraction_table(
    results: Mapping[str, Sequence[Mapping[str, Any]]], summaries: Mapping[str, Sequence[Mapping[str, Any]]]
) -> Table:
    """The first metric on all test rows, by label fraction: of several seeds their mean and standard
    deviation, of one the interval."""
    known = [result for of_arm in results.values() for result in of_arm]
    metric = known[0]["metrics"][0]
    fractions = sorted({result["protocol"]["label_fraction"] for result in known})
    rows: list[tuple[str, Sequence[Cell]]] = []
    for arm, of_arm in results.items():
        cells = {result["protocol"]["label_fraction"]: figure(result["overall"][metric]) for result in of_arm}
        cells |= {found["label_fraction"]: spread(found["overall"][metric]) for found in summaries[arm]}
        missing = Cell(DASH, note="not evaluated")
        rows.append((arm, [cells.get(fraction, missing) for fraction in fractions] if cells else []))
    columns = [(f"{100 * fraction:g} %", ()) for fraction in fractions]
    title = titled(metric)
    return Table(f"{title[0].upper()}{title[1:]} by share of the labels", columns, rows)


def seed_tables(metric: str, summaries: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Table]:
    """Mean and standard deviation of `metric` over seeds: a table per label fraction and grouping."""
    shapes: dict[tuple[float, str | None], Mapping[str, Any]] = {}
    for found in (one for of_arm in summaries.values() for one in of_arm):
        for grouping in found["groups"] or [None]:
            shapes.setdefault((found["label_fraction"], grouping), found)
    tables = []
    for (fraction, grouping), shape in shapes.items():
        groups = list(shape["groups"][grouping]) if grouping is not None else []
        rows: list[tuple[str, Sequence[Cell]]] = []
        for arm, of_arm in summaries.items():
            own = next((one for one in of_arm if one["label_fraction"] == fraction), None)
            cells = [] if own is None else [own["overall"]]
            cells += [own["groups"][grouping][group] for group in groups] if own else []
            rows.append((arm, [spread(cell[metric]) for cell in cells]))
        seeds = ", ".join(map(str, shape["seeds"]))
        by = f" by {grouping}" if grouping is not None else ""
        labels = "" if fraction == 1 else f", {100 * fraction:g} % of the labels"
        title = f"{titled(metric)}{by}{labels}, mean and standard deviation over seeds {seeds}"
        columns = [(heading, ()) for heading in ("all", *groups)]
        tables.append(Table(f"{title[0].upper()}{title[1:]}", columns, rows))
    return tables


def spread(entry: Mapping[str, Any]) -> Cell:
    """{"mean", "sd", "n"} as a cell."""
    if entry["mean"] is None:
        return Cell(DASH, note="no value")
    if entry["sd"] is None:
        return Cell(number(entry["mean"]), note="one seed has a value")
    return Cell(number(entry["mean"]), f"± {number(entry['sd'])}")


def merged_protocol(results: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Protocol, data, seeds and classes in words: once where all arms agree, else for each arm."""
    settings = {
        arm: {
            **result["protocol"],
            **{key: result[key] for key in ("data", "seeds", "classes") if key in result},
        }
        for arm, result in results.items()
    }
    merged = {}
    for key in dict.fromkeys(key for of_arm in settings.values() for key in of_arm):
        values = {arm: words(of_arm.get(key)) for arm, of_arm in settings.items()}
        shared = next(iter(values.values()))
        alike = all(value == shared for value in values.values())
        merged[key] = shared if alike else "; ".join(f"{arm}: {value}" for arm, value in values.items())
    return merged


def figure(entry: Mapping[str, Any], signed: bool = False, decimals: int = 3) -> Cell:
    """{"value", "low", "high", "reason"} as a cell; a missing value or interval is footnoted with its
    reason."""
    if entry["value"] is None:
        return Cell(DASH, note=entry.get("reason", "no value"))
    text = number(entry["value"], signed, decimals)
    if entry["low"] is None or entry["high"] is None:
        return Cell(text, note=f"no interval: {entry.get('reason', 'not computed')}")
    low, high = (number(entry[end], signed, decimals) for end in ("low", "high"))
    return Cell(text, f"[{low}, {high}]")


def number(value: float, signed: bool = False, decimals: int = 3) -> str:
    """With a true minus sign."""
    return f"{value:{'+' if signed else ''}.{decimals}f}".replace("-", MINUS)


def size(row: Mapping[str, Any]) -> tuple[str, str]:
    """The test rows of a column, and how many are positive (or of each class)."""
    positives = row["positives"]
    if isinstance(positives, int):
        return f"n = {row['n']}", f"{positives} positive"
    return f"n = {row['n']}", f"by class {', '.join(map(str, positives))}"


def titled(name: str) -> str:
    """The field's name of an evaluation or metric."""
    return TITLES.get(name, name.replace("_", " "))


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


def words(content: Any) -> str:
    """Nested content in one line."""
    if content is None:
        return DASH
    if isinstance(content, bool):
        return "yes" if content else "no"
    if isinstance(content, Mapping):
        return ", ".join(f"{key} {words(value)}" for key, value in content.items())
    if isinstance(content, list | tuple):
        mark = "; " if any(isinstance(entry, Mapping | list | tuple) for entry in content) else ", "
        return mark.join(map(words, content))
    return str(content)

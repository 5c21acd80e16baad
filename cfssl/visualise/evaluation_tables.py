"""Evaluation results of several arms as tables; all that this room knows of the shape of such
results."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cfssl.errors import UserError
from cfssl.evaluate.spread import over_seeds
from cfssl.visualise.cells import DASH, Cell, Table, figure, number, size, spread, titled, words


@dataclass(frozen=True)
class Arm:
    """One method: a row of every table. `results`: its evaluation results, as the evaluations write them."""

    name: str
    description: str
    results: Sequence[Mapping[str, Any]]


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
    variant = f" ({result['variant']})" if result.get("variant") else ""
    title = f"{titled(result['evaluation'])} of {result['target']}{variant}"
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

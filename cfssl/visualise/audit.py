"""The page of an audit of a generator.

Enters: the record of `cfssl.evaluate.audit.audit`: {"axioms": {name: figure}, "amplification": see
`cfssl.evaluate.amplification`, and "areas" and "truth" {do: ...} where there are any}. Leaves: an HTML page
with its pictures, and a Markdown file with the same tables.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cfssl.files import write_text
from cfssl.visualise.audit_figures import (
    DISTANCE,
    RELATIONS,
    Bar,
    Panel,
    amplification_map,
    draw_bars,
    sharpness_plot,
    unrelated_discrete,
)
from cfssl.visualise.cells import DASH, Cell, Table, figure, number
from cfssl.visualise.report import Picture, Report, write_report


def write_audit(
    record: Mapping[str, Any],
    folder: Path,
    title: str = "Audit of a generator",
    provenance: Mapping[str, Any] | None = None,
    sheets: Sequence[Picture] = (),
) -> Path:
    """Writes `audit.html`, `audit.md` and their pictures into `folder`; returns the page. `sheets` are shown
    after the matrix."""
    folder = Path(folder)
    amplified = record["amplification"]
    pictures = [
        Picture(
            "Amplification",
            "Change under each do() (row) of what the judge sees of each attribute (column). Framed: the "
            "attribute that was set. Dashed: what descends from it and may change. Everything else should "
            "be 0.",
            folder / "amplification.png",
        ),
        *sheets,
    ]
    amplification_map(pictures[0].path, amplified)
    for name, heading, caption, panels in (
        (
            "axioms",
            "Axioms",
            "Composition and reversibility, and what the judge sees of each attribute under each do(). The "
            "mark is what it sees in real images.",
            axiom_panels(record),
        ),
        (
            "truth",
            "Against the truth",
            "The generated image beside the true counterfactual; the mark is the image left unchanged.",
            truth_panels(record),
        ),
        (
            "minimality",
            "Minimality",
            "Distances are KL divergences between posteriors of a VAE that knows no attributes.",
            minimality_panels(record),
        ),
        (
            "areas",
            "Areas",
            "As an independent segmentor measures them.",
            area_panels(record),
        ),
    ):
        if panels:
            pictures.append(Picture(heading, caption, folder / f"{name}.png"))
            draw_bars(pictures[-1].path, panels)
    if unrelated_discrete(amplified):
        caption = (
            "The probability that the judge gives to the recorded class of attributes that a do() should "
            "leave alone. Mass that moves towards 1 is amplification of single images, also where the AUC "
            "stays."
        )
        pictures.append(Picture("Sharpness", caption, folder / "sharpness.png"))
        sharpness_plot(pictures[-1].path, amplified)
    tables = audit_tables(record)
    about = (
        f"Small figures are intervals of {amplified['level']:.0%} over {amplified['n']} images"
        + (f" of {amplified['patients']} patients, drawn as a whole" if amplified["patients"] else "")
        + f" ({amplified['resamples']} bootstrap resamples). They know nothing of other training runs."
    )
    page = Report(
        title, summary(amplified), pictures, provenance=provenance or {}, tables=tables, about_tables=about
    )
    write_report(page, folder / "audit.html")
    write_text(
        folder / "audit.md",
        "\n".join([f"# {title}", "", summary(amplified), "", *map(markdown, tables), about, ""]),
    )
    return folder / "audit.html"


def summary(amplified: Mapping[str, Any]) -> str:
    """Amp in one sentence."""
    entry = amplified["amplification"]
    if entry["value"] is None:
        return "No unrelated attribute whose amplification could be measured."
    cell = figure(entry, decimals=1)
    return (
        f"Unrelated attributes change by {cell.text} {entry['unit']} {cell.interval} on average over "
        f"{entry['cells']} pairs; sampling alone would make it {number(entry['by_chance'], decimals=1)}."
    )


def axiom_panels(record: Mapping[str, Any]) -> list[Panel]:
    """Composition and reversibility, and of each attribute what the judge sees under each do()."""
    panels = []
    if record.get("axioms"):
        bars = [Bar(name, entry, None, DISTANCE) for name, entry in record["axioms"].items()]
        panels.append(Panel("Composition and reversibility", "distance, grey levels of 0 to 255", bars))
    amplified = record["amplification"]
    for name, of in amplified["attributes"].items():
        kind = "accuracy" if of["kind"] == "discrete" else "error"
        bars = [
            Bar(f"do({do})", row[name][kind], of[kind]["value"], RELATIONS[row[name]["relation"]])
            for do, row in amplified["matrix"].items()
        ]
        unit = "share recognised" if kind == "accuracy" else f"mean absolute error, {of['unit']}"
        end = 1.0 if kind == "accuracy" else 0.0
        panels.append(Panel(f"{name}, as the judge sees it", unit, bars, None, end, "real images"))
    return panels


def truth_panels(record: Mapping[str, Any]) -> list[Panel]:
    """What `cfssl.evaluate.counterfactual.against_truth` says, per do()."""
    truth = record.get("truth") or {}
    if not truth:
        return []

    def bars(key: str, reference: str | None = None) -> list[Bar]:
        return [
            Bar(f"do({do})", row[key], row[reference]["value"] if reference else None)
            for do, row in truth.items()
        ]

    near, along, across = bars("l1", "l1_unchanged"), bars("effectiveness"), bars("amplification")
    return [
        Panel("Distance to the true counterfactual", "grey levels of 0 to 255", near, mark="left unchanged"),
        Panel("Effect along the true change", "share of it (1 is exact)", along, 1.0, 1.0),
        Panel("Change across the true one", "Euclidean norm, images in [-1, 1]", across),
    ]


def minimality_panels(record: Mapping[str, Any]) -> list[Panel]:
    """What `cfssl.evaluate.minimality` says, per do()."""
    found = record.get("minimality") or {}
    kinds = {
        "p1": ("Real images of the new value that are nearer", "share; the fewer, the smaller the edit"),
        "p2": (
            "Real images of the old value that are farther",
            "share; the fewer, the farther it left",
        ),
        "cld": ("Counterfactual latent divergence", "log of both shares"),
    }
    return [
        Panel(title, unit, [Bar(f"do({do})", row[kind]) for do, row in found.items()])
        for kind, (title, unit) in (kinds.items() if found else ())
    ]


def area_panels(record: Mapping[str, Any]) -> list[Panel]:
    """What `cfssl.evaluate.localisation` says, per do()."""
    areas = record.get("areas") or {}
    if not areas:
        return []
    errors = [
        Bar(f"do({do}), {words_}", row[role]["percent"], None, colour)
        for do, row in areas.items()
        for role, words_, colour in (
            ("target", "the area set", RELATIONS["intervened"]),
            ("others", "all others", RELATIONS["unrelated"]),
        )
    ]
    ratio = [Bar(f"do({do})", row["localisation_ratio"]) for do, row in areas.items()]
    leaks = [Bar(f"do({do})", row["leakage"]) for do, row in areas.items()]
    return [
        Panel("Error of the areas", "mean absolute error, % of the image", errors),
        Panel("Localisation", "share of the change that lies in the region set", ratio, 1.0, 1.0),
        Panel("Leakage", "change of the other regions / of the region set", leaks),
    ]


def audit_tables(record: Mapping[str, Any]) -> list[Table]:
    """The matrix, what single images show, the axioms, the truth and the areas."""
    amplified = record["amplification"]
    attributes = amplified["attributes"]
    notes = {
        "intervened": "set by the do(): effectiveness",
        "descendant": "descends from what was set, may change",
        "unrelated": "",
    }

    def change(cell: Mapping[str, Any]) -> Cell:
        shown = figure(cell["change"], signed=True, decimals=1 if "accuracy" in cell else 2)
        return Cell(shown.text, shown.interval, shown.note or notes[cell["relation"]])

    tables = [
        Table(
            "Change of what the judge sees",
            [(name, (of["unit"],)) for name, of in attributes.items()],
            [
                (f"do({do})", [change(row[name]) for name in attributes])
                for do, row in amplified["matrix"].items()
            ],
            "intervention",
        )
    ]
    kinds = {
        "shift": "mean shift",
        "sharpness": "sharpness",
        "towards_target": "log odds of the recorded class",
        "mismatch": "turned to the recorded class",
        "ceiling_excess": "above the ceiling, points",
    }
    pairs = [
        (do, name, cell)
        for do, row in amplified["matrix"].items()
        for name, cell in row.items()
        if cell["relation"] == "unrelated" and "accuracy" in cell
    ]
    shown = [kind for kind in kinds if any(kind in cell for *_, cell in pairs)]
    if pairs:
        tables.append(
            Table(
                "Unrelated attributes, image by image",
                [(kinds[kind], ()) for kind in shown],
                [
                    (
                        f"{name} under do({do})",
                        [
                            figure(cell[kind], kind != "shift") if kind in cell else Cell(DASH)
                            for kind in shown
                        ],
                    )
                    for do, name, cell in pairs
                ],
                "attribute",
            )
        )
    for title, panels in (
        ("Axioms", axiom_panels(record)),
        ("Against the truth", truth_panels(record)),
        ("Minimality", minimality_panels(record)),
        ("Areas", area_panels(record)),
    ):
        rows = [
            (f"{panel.title}: {bar.name}", [figure(bar.entry), Cell(panel.unit)])
            for panel in panels
            for bar in panel.bars
        ]
        if rows:
            tables.append(Table(title, [("value", ()), ("unit", ())], rows, "figure"))
    return tables


def markdown(table: Table) -> str:
    """A GitHub table under its title; footnotes follow it as a list."""

    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"

    heads = [" ".join([heading, *(f"({below})" for below in lines)]) for heading, lines in table.columns]
    marks = {note: f" [{place}]" for place, note in enumerate(table.notes, 1)}
    rows = [
        line([name, *(f"{cell.text} {cell.interval}".strip() + marks.get(cell.note, "") for cell in cells)])
        for name, cells in table.rows
    ]
    notes = [f"{place}. {note}" for place, note in enumerate(table.notes, 1)]
    return "\n".join(
        [
            f"## {table.title}",
            "",
            line([table.corner, *heads]),
            line(["---"] * (len(heads) + 1)),
            *rows,
            "",
            *notes,
            *([""] if notes else []),
        ]
    )

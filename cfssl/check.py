"""What `cfssl check` prints: how a recipe and its data were understood, and what would run."""

import pandas as pd
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cfssl.data.datasets import TableSettings, check_files
from cfssl.data.table import SPLITS, ImageTable
from cfssl.evaluate.settings import SegmentSettings
from cfssl.experiment import AnyEvaluation
from cfssl.files import read_json
from cfssl.models.initial import described
from cfssl.pipeline import Pipeline

SHOWN_VALUES = 6


def describe(job: Pipeline) -> None:
    """Prints rows, attributes, groups, splits and stages of `job`. Prepares the table (which reads the data
    once and is reused); trains nothing. Raises `UserError` when recipe and table do not fit, or when a file
    that the table was made from has changed since."""
    console = Console(markup=False, emoji=False)  # names from data are shown as they are
    table = job.table
    if isinstance(job.recipe.data, TableSettings):
        check_files(job.recipe.data, table)
    channels, height, width = table.images.shape
    console.print(
        Text.assemble((job.recipe.name, "bold"), f": table {table.name}, fingerprint {table.fingerprint}")
    )
    console.print(f"{len(table)} images of {channels} x {height} x {width}, {table.images.dtype}")
    if table.mask_names:
        console.print(f"masks: {', '.join(table.mask_names)}")
    console.print(attributes_of(table))
    for name, reason in table.left_out.items():
        console.print(f"no attribute: {name} ({reason})")
    if table.group is None:
        console.print("no group: rows are split singly")
    else:
        console.print(
            f"group: {table.group}, {table.frame[table.group].nunique()} of them, none in two splits"
        )
    console.print(splits_of(table, grouped_by(job)))
    if job.recipe.silver is not None:
        source = job.labelling.source
        if isinstance(job.recipe.silver.data, TableSettings):
            check_files(job.recipe.silver.data, source)
        names = ", ".join(job.recipe.silver.names)
        images = f"{len(source.rows('train'))} training images of {source.name}"
        console.print(f"silver masks: {names}, by a segmentor of {images}")
    for name, external in job.evaluation.externals.items():
        settings = job.recipe.external[name]
        if isinstance(settings, TableSettings):
            check_files(settings, external)
        console.print(external_of(job, name, external))
    if job.recipe.init is not None:
        record = job.new_encoder()[1] or read_json(job.encoder_stage.folder / "init.json")
        console.print(described(record))
    console.print(stages_of(job))


def external_of(job: Pipeline, name: str, table: ImageTable) -> Table:
    """Images per split of an external set, as its evaluations see them."""
    asked = [evaluation for evaluation in job.recipe.evaluate if name in evaluation.external]
    names = dict.fromkeys(name for evaluation in asked for name in asked_for(evaluation))
    shown = splits_of(table, list(names))
    size = " x ".join(map(str, table.images.shape))
    shown.title = f"External set {name}: {table.name}, {len(table)} images of {size}"
    ids = read_json(job.evaluation.external_stage(name).product)["ids"]
    common = f"; {ids['in_both']} values of {ids['column']} in both, of different sources" if ids else ""
    shown.caption = f"no image in common with the train and val splits of {job.table.name}{common}"
    return shown


def attributes_of(table: ImageTable) -> Table:
    """One line per attribute: kind, whether declared, values, missing."""
    shown = Table("attribute", "kind", "", "values", "missing", title="Attributes", title_justify="left")
    for line in table.summary():
        if line.kind == "continuous":
            values = f"{line.values[0]:.4g} to {line.values[1]:.4g}"
        else:
            rest = len(line.values) - SHOWN_VALUES
            values = ", ".join(map(str, line.values[:SHOWN_VALUES])) + (
                f" and {rest} more" if rest > 0 else ""
            )
        shown.add_row(
            line.name, line.kind, "declared" if line.declared else "inferred", values, str(line.missing)
        )
    return shown


def grouped_by(job: Pipeline) -> list[str]:
    """The discrete attributes that the recipe evaluates by, targets or intervenes on."""
    names = [name for evaluation in job.recipe.evaluate for name in asked_for(evaluation)]
    names += [name for name in job.recipe.bank.variables if job.table.attributes[name].categories]
    return list(dict.fromkeys(names))


def asked_for(evaluation: AnyEvaluation) -> tuple[str, ...]:
    """The discrete attributes of an evaluation."""
    target = () if isinstance(evaluation, SegmentSettings) else (evaluation.target,)
    return *target, *evaluation.attributes


def splits_of(table: ImageTable, names: list[str]) -> Table:
    """Images per split, and per value of the attributes `names`."""
    shown = Table("", *SPLITS, "all", title="Splits", title_justify="left")
    frame = table.frame
    counts = frame["split"].value_counts()
    shown.add_row("images", *[str(counts.get(split, 0)) for split in SPLITS], str(len(frame)))
    if table.group is not None:
        groups = frame.groupby("split")[table.group].nunique()
        shown.add_row(
            table.group, *[str(groups.get(split, 0)) for split in SPLITS], str(frame[table.group].nunique())
        )
    for name in names:
        shown.add_section()
        crossed = pd.crosstab(frame[name].fillna("(missing)").astype(str), frame["split"])
        for value, row in crossed.iterrows():
            shown.add_row(f"{name} = {value}", *[str(row.get(split, 0)) for split in SPLITS], str(row.sum()))
    return shown


def stages_of(job: Pipeline) -> Table:
    """What was made for this check, what would run and what would be reused."""
    shown = Table("stage", "key", "", "folder", title="Stages", title_justify="left")
    for stage in job.stages():
        used = job.production.used.get(stage.folder.name)
        if used is not None and not used["reused"]:
            state = "made now"
        elif stage.done:
            state = "reused"
        else:
            state = "would go on" if stage.folder.is_dir() else "would run"
        shown.add_row(stage.name, stage.key, state, str(stage.folder))
    return shown

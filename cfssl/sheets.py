"""Contact sheets of a recipe: originals beside their counterfactuals, and beside the truth where there is
one; the most and the least confident silver masks."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cfssl.bank.build import plan_views
from cfssl.bank.store import Bank
from cfssl.data.pixels import to_signed, to_stored
from cfssl.data.table import ImageTable
from cfssl.errors import UserError
from cfssl.generators.base import counterfactual, intervention
from cfssl.pipeline import Pipeline
from cfssl.seeds import torch_generator
from cfssl.visualise.outlines import Side, outline_sheet
from cfssl.visualise.views import counterfactual_sheet, slot_names


def bank_sheet(job: Pipeline, path: Path, items: int = 8) -> None:
    """Originals beside their counterfactuals, and the truth where the table has one. Items are spread over
    the bank's domains."""
    bank, table = job.generation.bank, job.table
    if not bank.views:
        raise UserError(
            f"The bank of {job.recipe.name} holds real images only; add a generator and bank.do to the "
            "recipe."
        )
    chosen = spread_over_domains(bank, table, items)
    slots = np.arange(1 + len(bank.views))
    stored = bank.gather(chosen, np.tile(slots, (len(chosen), 1)))  # (n, 1 + K, C, H, W)
    truths = None
    if table.truth is not None:
        rows = bank.rows[chosen]
        rendered = [
            table.truth.counterfactual(rows, table.truth.attributes(rows, do))
            for do in (intervention(view, table.attributes, len(chosen)) for view in bank.views)
        ]
        truths = np.stack(rendered, axis=1)
    factual = factual_labels(bank.views, table, bank.rows[chosen])
    available = bank.available[chosen][:, 1:]
    counterfactual_sheet(
        path, stored[:, 0], stored[:, 1:], truths, slot_names(bank)[1:], factual, available=available
    )


def audited_sheet(job: Pipeline, path: Path, items: int) -> None:
    """Images of the audited split beside their counterfactuals, and the truth where the table has one."""
    table, generator, settings = job.table, job.generation.generator, job.recipe.audit
    assert generator is not None and settings is not None  # noqa: PT018
    rows = table.rows(settings.split, known=generator.graph.variables)[:items]
    device = job.recipe.hardware.device
    x = to_signed(table.images.read(rows)).to(device)
    pa = {name: value.to(device) for name, value in table.encode(generator.graph.variables, rows).items()}
    views = plan_views(job.recipe.bank.do, generator.graph, table.attributes)
    made, truths = [], []
    for view in views:
        do = intervention(view, table.attributes, len(rows))
        images, _ = counterfactual(generator, x, pa, do, torch_generator(settings.seed, "sheet"))
        made.append(to_stored(images, table.images.dtype))
        if table.truth is not None:
            truths.append(table.truth.counterfactual(rows, table.truth.attributes(rows, do)))
    factual = factual_labels(views, table, rows)
    counterfactual_sheet(
        path,
        table.images.read(rows),
        np.stack(made, axis=1),
        np.stack(truths, axis=1) if truths else None,
        [f"do({', '.join(f'{n}={_shown(v)}' for n, v in view.items())})" for view in views],
        factual,
    )


def silver_sheet(job: Pipeline, path: Path, items: int = 6) -> None:
    """Images whose silver masks are the most and the least confident ones, in the mean over the structures,
    beside masks of the table's own where it has any of the same names."""
    table = job.labelling.table
    assert table.silver is not None  # the labelling's own check
    structures, names = table.silver.structures, table.silver.names
    confidence = table.silver.confidence.to_numpy().mean(1)
    order = np.argsort(-confidence, kind="stable")
    items = min(items, len(order) // 2)
    own = [name for name in structures if name in table.mask_names]
    sides = [
        Side(
            heading,
            table.images.read(rows),
            table.masks_of(names).read(rows),
            table.masks_of(own).read(rows) if own else None,
            [f"row {row}" for row in rows],
            [f"confidence {confidence[row]:.3f}" for row in rows],
        )
        for heading, rows in (
            ("most confident", order[:items]),
            ("least confident", order[len(order) - items :][::-1]),
        )
    ]
    outline_sheet(path, sides, structures, own)


def factual_labels(views: Sequence[Mapping[str, Any]], table: ImageTable, rows: np.ndarray) -> list[str]:
    """What the rows have of everything that the do()s set, a line each."""
    variables = dict.fromkeys(name for view in views for name in view)
    frame = table.frame[list(variables)].iloc[rows]
    return ["\n".join(f"{name} {_shown(row[name])}" for name in variables) for _, row in frame.iterrows()]


def spread_over_domains(bank: Bank, table: ImageTable, count: int) -> np.ndarray:
    """Items (count,) whose values of the first intervened variable take turns, in the order of the bank.
    Items whose value is missing have no counterfactual to show."""
    values = table.frame[next(iter(bank.views[0]))].iloc[bank.rows]
    known, texts = values.notna().to_numpy(), [str(value) for value in values]
    domains = sorted({text for text, is_known in zip(texts, known, strict=True) if is_known})
    queues = [np.flatnonzero(known & (np.array(texts) == domain)).tolist() for domain in domains]
    chosen: list[int] = []
    while len(chosen) < min(count, known.sum()):
        for queue in queues:
            if queue and len(chosen) < count:
                chosen.append(queue.pop(0))
    return np.array(sorted(chosen, key=lambda item: (texts[item], item)), dtype=np.int64)


def _shown(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)

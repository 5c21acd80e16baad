"""The audit of a generator: every axiom, for every do() of its bank, on images that it was not trained on.

Enters: a fitted generator, a table, the do()s, an independent judge (and a segmentor where areas are set).
Leaves: one JSON-ready record, from which `cfssl.visualise.audit` makes the page.

    composition      distance to the image after m null interventions, with and without the pixel residual
    reversibility    distance after m times do() and back
    effectiveness    what the judge sees of the attribute that was set, and amplification: of all others
    areas            errors of regional areas, localisation, leakage
    truth            where the world is known: the change along and across the true one, L1 to the truth

The judge must not have guided the fine-tuning: a generator that is judged by its own guide succeeds by
patterns that nobody else sees. It is refused by its fingerprint.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from cfssl.bank.build import Values, plan_views
from cfssl.data.pixels import to_signed
from cfssl.data.regions import factual_maps, measure_areas, region_index
from cfssl.data.table import Attributes, ImageTable
from cfssl.errors import UserError
from cfssl.evaluate.amplification import Judged, Verdicts, amplification
from cfssl.evaluate.bootstrap import mean_figures
from cfssl.evaluate.counterfactual import (
    against_truth,
    assert_independent,
    composition,
    has_residual,
    reversibility,
)
from cfssl.evaluate.localisation import area_errors, localisation, localisation_ratio
from cfssl.evaluate.settings import AuditSettings
from cfssl.generators.base import Generator, intervention
from cfssl.measure.predictor import AttributePredictor
from cfssl.measure.segmentor import Segmentor
from cfssl.seeds import numpy_generator, torch_generator

BATCH = 100


@dataclass(frozen=True)
class Audited:
    """What is audited: images (N, C, H, W) in [-1, 1], their attributes, and the views by name."""

    generator: Generator
    table: ImageTable
    rows: np.ndarray
    x: torch.Tensor
    pa: Attributes
    views: Mapping[str, Mapping[str, str | float]]
    settings: AuditSettings

    @property
    def patients(self) -> np.ndarray | None:
        """Groups that are resampled together."""
        group = self.table.group
        return None if group is None else self.table.frame[group].to_numpy()[self.rows]

    def batches(self) -> Iterator[slice]:
        for start in range(0, len(self.rows), BATCH):
            yield slice(start, min(start + BATCH, len(self.rows)))


def audit(
    generator: Generator,
    table: ImageTable,
    do: Mapping[str, Values],
    judge: AttributePredictor,
    segmentor: Segmentor | None,
    settings: AuditSettings,
    guides: Sequence[str] = (),
) -> dict[str, Any]:
    """See the module docstring. `guides`: fingerprints of the fine-tuning's guides. Raises `UserError` when a
    guide is the judge, or when no image of the split has what the generator needs."""
    names = {f"guide {number + 1} of the fine-tuning": guide for number, guide in enumerate(guides)}
    assert_independent(judge.fingerprint, names)
    if segmentor is not None:
        assert_independent(segmentor.fingerprint, names)
    needed = dict.fromkeys((*generator.graph.variables, *judge.settings.attributes))
    rows = table.rows(settings.split, known=needed)
    if len(rows) == 0:
        raise UserError(
            f"No {settings.split} row of {table.name} has all of {list(needed)} present; the audit needs "
            "some."
        )
    chosen = numpy_generator(settings.seed, "audit").permutation(rows)[: settings.rows]
    rows = np.sort(chosen)
    views = {named(view): view for view in plan_views(do, generator.graph, table.attributes)}
    x, pa = to_signed(table.images.read(rows)), table.encode(needed, rows)
    audited = Audited(generator, table, rows, x, pa, views, settings)
    images = {name: counterfactuals(audited, view) for name, view in views.items()}
    record: dict[str, Any] = {
        "generator": generator.fingerprint,
        "judge": {"fingerprint": judge.fingerprint, "real": judge.score(table, settings.split)},
        "split": settings.split,
        "n": len(rows),
        "views": {name: dict(view) for name, view in views.items()},
        "axioms": axioms(audited),
        "amplification": amplified(audited, images, judge),
    }
    if areas := area_tables(audited, images, segmentor):
        record["areas"] = areas
    if table.truth is not None:
        record["truth"] = {name: truth_table(audited, view, images[name][0]) for name, view in views.items()}
    return record


def named(view: Mapping[str, str | float]) -> str:
    """`scanner=B`"""
    return ", ".join(f"{name}={value}" for name, value in view.items())


def counterfactuals(audited: Audited, view: Mapping[str, str | float]) -> tuple[torch.Tensor, Attributes]:
    """All images and attributes under the do()."""
    generator, made, attributes = audited.generator, [], []
    for part in audited.batches():
        own = {name: value[part] for name, value in audited.pa.items()}
        u = generator.abduct(audited.x[part], own)
        do = intervention(view, audited.table.attributes, len(audited.x[part]))
        pa_cf = generator.act(u, own, do, torch_generator(audited.settings.seed, named(view), part.start))
        made.append(generator.predict(u, pa_cf))
        attributes.append(pa_cf)
    return torch.cat(made), {n: torch.cat([pa[n] for pa in attributes]) for n in attributes[0]}


def axioms(audited: Audited) -> dict[str, Any]:
    """Composition and, per do(), reversibility, in grey levels."""
    generator, s = audited.generator, audited.settings
    residuals = (1.0, 0.0) if has_residual(generator) else (1.0,)
    values: dict[str, list[np.ndarray]] = {}
    for part in audited.batches():
        x, pa = audited.x[part], {name: value[part] for name, value in audited.pa.items()}
        for cycles in s.cycles:
            for residual in residuals:
                key = f"composition {cycles}" + ("" if residual else ", without the residual")
                values.setdefault(key, []).append(composition(generator, x, pa, cycles, residual))
            for name, view in audited.views.items():
                do = intervention(view, audited.table.attributes, len(x))
                found = reversibility(generator, x, pa, do, cycles, s.seed)
                values.setdefault(f"reversibility {cycles}, do({name})", []).append(found)
    joined = {name: np.concatenate(parts) for name, parts in values.items()}
    return mean_figures(joined, audited.patients, s.resamples, s.seed)


def amplified(
    audited: Audited, images: Mapping[str, tuple[torch.Tensor, Attributes]], judge: AttributePredictor
) -> dict[str, Any]:
    """See `cfssl.evaluate.amplification`; every image takes part in every do()."""
    names, s = judge.settings.attributes, audited.settings
    real = Judged(seen_by(judge, audited.x), {name: audited.pa[name].numpy() for name in names})
    made = {
        name: Judged(
            seen_by(judge, x),
            {attribute: pa[attribute].numpy() for attribute in names},
            tuple(audited.views[name]),
        )
        for name, (x, pa) in images.items()
    }
    return amplification(
        audited.generator.graph,
        Verdicts(real, made),
        patients=audited.patients,
        resamples=s.resamples,
        seed=s.seed,
    )


@torch.no_grad()
def seen_by(judge: AttributePredictor, images: torch.Tensor) -> dict[str, np.ndarray]:
    """Probabilities (N, classes) or values (N,) of every attribute."""
    found: dict[str, list[np.ndarray]] = {}
    device = next(judge.parameters()).device
    for start in range(0, len(images), BATCH):
        outputs = judge(images[start : start + BATCH].to(device))
        for name in judge.settings.attributes:
            is_continuous = judge.attributes[name].kind == "continuous"
            read = judge.value if is_continuous else judge.probabilities
            found.setdefault(name, []).append(read(outputs, name).cpu().numpy())
    return {name: np.concatenate(parts) for name, parts in found.items()}


@torch.no_grad()
def area_tables(
    audited: Audited, images: Mapping[str, tuple[torch.Tensor, Attributes]], segmentor: Segmentor | None
) -> dict[str, Any]:
    """Per do() on areas: errors against pa~ of the target and against what they were of all other areas that
    the generator knows, localisation and leakage, as the segmentor measures them in region maps of the
    factual image. Raises `UserError` where an area is set and there is no segmentor."""
    table, s = audited.table, audited.settings
    known = {name: table.areas[name] for name in audited.generator.graph.variables if name in table.areas}
    set_ones = {view: name for view, do in audited.views.items() for name in do if name in known}
    if not set_ones:
        return {}
    if segmentor is None:
        raise UserError(
            f"The audit sets {', '.join(sorted(set(set_ones.values())))}, which are areas, and has nothing "
            "to measure them with; add audit.segmentor."
        )
    names, pixels = list(known), int(np.prod(table.images.shape[1:]))

    def measure(pictures: torch.Tensor, masks: torch.Tensor) -> np.ndarray:
        """(N, V) fractions of the image, in the maps of `masks`."""
        maps = factual_maps(masks, segmentor.structures, known)
        found = measure_areas(segmented(segmentor, pictures), segmentor.structures, known, maps)
        return np.stack([found[name].numpy() for name in names], axis=1) / 100

    masks = segmented(segmentor, audited.x)
    real = measure(audited.x, masks)
    tables = {}
    for view, name in set_ones.items():
        made, pa_cf = images[view]
        measured, place = measure(made, masks), names.index(name)
        wanted = real.copy()
        wanted[:, place] = pa_cf[name].numpy() / 100
        intervened = np.full(len(made), place)
        structure = masks[:, segmentor.structures.index(known[name].structure)] >= 0.5
        region = factual_maps(masks, segmentor.structures, {name: known[name]})
        own = next(iter(region.values()))[:, region_index(known[name])] >= 0.5
        ratio = localisation_ratio(made, null_images(audited), structure & own)
        options: dict[str, Any] = {"patients": audited.patients, "resamples": s.resamples, "seed": s.seed}
        tables[view] = {
            **area_errors(measured, wanted, intervened, names, pixels, **options),
            **localisation(ratio, measured - real, intervened, **options),
        }
    return tables


def segmented(segmentor: Segmentor, images: torch.Tensor) -> torch.Tensor:
    """Hard masks (N, S, H, W) float32 of 0 and 1."""
    device = next(segmentor.parameters()).device
    parts = [
        segmentor(images[start : start + BATCH].to(device)).cpu() >= 0.5
        for start in range(0, len(images), BATCH)
    ]
    return torch.cat(parts).float()


def null_images(audited: Audited) -> torch.Tensor:
    """What the generator makes of every image under its own attributes."""
    made = []
    for part in audited.batches():
        own = {name: value[part] for name, value in audited.pa.items()}
        made.append(audited.generator.predict(audited.generator.abduct(audited.x[part], own), own))
    return torch.cat(made)


def truth_table(audited: Audited, view: Mapping[str, str | float], images: torch.Tensor) -> dict[str, Any]:
    """See `cfssl.evaluate.counterfactual.against_truth`."""
    truth, s = audited.table.truth, audited.settings
    assert truth is not None
    do = intervention(view, audited.table.attributes, len(audited.rows))
    rendered = to_signed(truth.counterfactual(audited.rows, truth.attributes(audited.rows, do)))
    return against_truth(images, rendered, audited.x, audited.patients, s.resamples, s.seed)

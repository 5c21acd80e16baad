"""The audit of a generator: every axiom, for every do() of its bank, on images that it was not trained on.

Enters: a fitted generator, a table, the do()s, an independent judge (and a segmentor where areas are set).
Leaves: one JSON-ready record, from which `cfssl.visualise.audit` makes the page.

    composition      distance to the image after m null interventions, with and without the pixel residual
    reversibility    distance after m times do() and back
    effectiveness    what the judge sees of the attribute that was set, and amplification: of all others
    areas            errors of regional areas, localisation, leakage
    truth            where the world is known: the change along and across the true one, L1 to the truth

Besides the do()s of the bank, every discrete variable they set is also given the values of other audited
images, as do(scanner): under do(scanner=B) all targets are one class, which has no AUC.

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
from cfssl.generators.base import Generator, counterfactual, intervention
from cfssl.measure.frozen import as_json
from cfssl.measure.predictor import AttributePredictor
from cfssl.measure.segmentor import Segmentor
from cfssl.seeds import numpy_generator, torch_generator

BATCH = 100


@dataclass(frozen=True)
class Audited:
    """What is audited: images (N, C, H, W) in [-1, 1], their attributes (N,) each, and by the name of the
    do() what every image is set to, (N,) each; on the CPU, the generator on `device`."""

    generator: Generator
    table: ImageTable
    rows: np.ndarray
    x: torch.Tensor
    pa: Attributes
    do: Mapping[str, Attributes]
    settings: AuditSettings
    device: torch.device

    @property
    def patients(self) -> np.ndarray | None:
        """Groups that are resampled together."""
        group = self.table.group
        return None if group is None else self.table.frame[group].to_numpy()[self.rows]

    def batches(self) -> Iterator[tuple[slice, torch.Tensor, Attributes]]:
        """Places, images and their own attributes, on the device."""
        for start in range(0, len(self.rows), BATCH):
            part = slice(start, min(start + BATCH, len(self.rows)))
            yield part, self.x[part].to(self.device), self.part_of(self.pa, part)

    def part_of(self, values: Attributes, part: slice) -> Attributes:
        return {name: value[part].to(self.device) for name, value in values.items()}


def audit(
    generator: Generator,
    table: ImageTable,
    do: Mapping[str, Values],
    judge: AttributePredictor,
    segmentor: Segmentor | None,
    settings: AuditSettings,
    guides: Sequence[str] = (),
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """See the module docstring. `guides`: fingerprints of the fine-tuning's guides. `device`: where the
    generator is. Raises `UserError` when a guide is the judge, or when no image of the split has what the
    generator and the judge need."""
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
    views = plan_views(do, generator.graph, table.attributes)
    x, pa = to_signed(table.images.read(rows)), table.encode(needed, rows)
    values = {named(view): intervention(view, table.attributes, len(rows)) for view in views}
    values |= drawn_values(views, pa, settings.seed)
    audited = Audited(generator, table, rows, x, pa, values, settings, torch.device(device))
    images = {name: counterfactuals(audited, name) for name in values}
    record: dict[str, Any] = {
        "generator": generator.fingerprint,
        "judge": {"fingerprint": judge.fingerprint, "real": as_json(judge.score(table, settings.split))},
        "split": settings.split,
        "n": len(rows),
        "do": list(values),
        "axioms": axioms(audited),
        "amplification": amplified(audited, images, judge),
    }
    if areas := area_tables(audited, images, segmentor):
        record["areas"] = areas
    if table.truth is not None:
        record["truth"] = {name: truth_table(audited, name, made) for name, (made, _) in images.items()}
    return record


def named(view: Mapping[str, str | float]) -> str:
    """`scanner=B`"""
    return ", ".join(f"{name}={value}" for name, value in view.items())


def drawn_values(
    views: Sequence[Mapping[str, str | float]], pa: Attributes, seed: int
) -> dict[str, Attributes]:
    """By the name of each discrete variable that the views set, the do() that gives every image the value of
    another one."""
    found = {}
    for name in dict.fromkeys(name for view in views for name in view):
        if not pa[name].is_floating_point():
            order = torch.randperm(len(pa[name]), generator=torch_generator(seed, "drawn", name))
            found[name] = {name: pa[name][order]}
    return found


def counterfactuals(audited: Audited, name: str) -> tuple[torch.Tensor, Attributes]:
    """All images and attributes under the do() `name`."""
    generator, images, attributes = audited.generator, [], []
    for part, x, pa in audited.batches():
        do, rng = (
            audited.part_of(audited.do[name], part),
            torch_generator(audited.settings.seed, name, part.start),
        )
        made, pa_cf = counterfactual(generator, x, pa, do, rng)
        images.append(made.cpu())
        attributes.append({name: value.cpu() for name, value in pa_cf.items()})
    return torch.cat(images), {n: torch.cat([pa[n] for pa in attributes]) for n in attributes[0]}


def axioms(audited: Audited) -> dict[str, Any]:
    """Composition and, per do(), reversibility, in grey levels."""
    generator, s = audited.generator, audited.settings
    residuals = (1.0, 0.0) if has_residual(generator) else (1.0,)
    values: dict[str, list[np.ndarray]] = {}
    for part, x, pa in audited.batches():
        for cycles in s.cycles:
            for residual in residuals:
                key = f"composition {cycles}" + ("" if residual else ", without the residual")
                values.setdefault(key, []).append(composition(generator, x, pa, cycles, residual))
            for name, do in audited.do.items():
                found = reversibility(generator, x, pa, audited.part_of(do, part), cycles, s.seed)
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
            tuple(audited.do[name]),
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
    set_ones = {view: name for view, do in audited.do.items() for name in do if name in known}
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

    masks, unchanged = segmented(segmentor, audited.x), null_images(audited)
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
        ratio = localisation_ratio(made, unchanged, structure & own)
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
    for _, x, pa in audited.batches():
        made.append(audited.generator.predict(audited.generator.abduct(x, pa), pa).cpu())
    return torch.cat(made)


def truth_table(audited: Audited, name: str, images: torch.Tensor) -> dict[str, Any]:
    """See `cfssl.evaluate.counterfactual.against_truth`."""
    truth, s = audited.table.truth, audited.settings
    assert truth is not None
    attributes = truth.attributes(audited.rows, audited.do[name])
    rendered = to_signed(truth.counterfactual(audited.rows, attributes))
    return against_truth(images, rendered, audited.x, audited.patients, s.resamples, s.seed)

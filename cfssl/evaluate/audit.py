"""The audit of a generator: every axiom, for every do() of its bank, on images that it was not trained on.

Enters: a fitted generator, a table, the do()s, an independent judge (and a segmentor where areas are set).
Leaves: one JSON-ready record, from which `cfssl.visualise.audit` makes the page.

    composition      distance to the image after m null interventions, with and without the pixel residual
    reversibility    distance after m times do() and back
    effectiveness    what the judge sees of the attribute that was set, and amplification: of all others
    minimality       shares of real images that are nearer, or farther, than the counterfactual
    areas            errors of regional areas, localisation, leakage
    truth            where the world is known: the change along and across the true one, L1 to the truth

Besides the do()s of the bank, every discrete variable they set is also given the values of other audited
images, as do(scanner): under do(scanner=B) all targets are one class, which has no AUC.

The judge must not have guided the fine-tuning: a generator that is judged by its own guide succeeds by
patterns that nobody else sees. It is refused by its fingerprint.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from cfssl.bank.build import Interventions, plan_views
from cfssl.data.pixels import to_signed
from cfssl.data.regions import factual_maps, measure_areas, region_index
from cfssl.data.table import Attributes, ImageTable
from cfssl.errors import UserError
from cfssl.evaluate.amplification import Judged, Verdicts, amplification
from cfssl.evaluate.audited import Audited, counterfactuals, embedded, null_images, seen_by, segmented
from cfssl.evaluate.bootstrap import mean_figures
from cfssl.evaluate.counterfactual import (
    against_truth,
    assert_independent,
    composition,
    has_residual,
    reversibility,
)
from cfssl.evaluate.localisation import area_errors, localisation, localisation_ratio
from cfssl.evaluate.minimality import bin_edges, latent_divergence, value_bins
from cfssl.evaluate.settings import AuditSettings
from cfssl.generators.base import Generator, intervention
from cfssl.measure.embedding import Embedding
from cfssl.measure.frozen import as_json
from cfssl.measure.predictor import AttributePredictor
from cfssl.measure.segmentor import Segmentor
from cfssl.seeds import numpy_generator, torch_generator

REFERENCES = 2000  # training images that minimality compares with


def audit(
    generator: Generator,
    table: ImageTable,
    do: Interventions,
    judge: AttributePredictor,
    segmentor: Segmentor | None,
    embedding: Embedding | None,
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
    if embedding is not None:
        record["minimality"] = minimality_tables(audited, images, embedding)
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
def minimality_tables(
    audited: Audited, images: Mapping[str, tuple[torch.Tensor, Attributes]], embedding: Embedding
) -> dict[str, dict[str, Any]]:
    """Per do() on one variable: figures "cld", "p1" and "p2" of `cfssl.evaluate.minimality` against training
    images, over the images that the do() moves to another bin (codes, or nine bins of a continuous
    variable)."""
    table, s = audited.table, audited.settings
    single = {name: next(iter(do)) for name, do in audited.do.items() if len(do) == 1}
    known = table.rows("train", known=set(single.values()))
    rows = np.sort(numpy_generator(s.seed, "minimality").permutation(known)[:REFERENCES])
    real = embedded(embedding, to_signed(table.images.read(rows)))
    factual, found = embedded(embedding, audited.x), {}
    for name, variable in single.items():
        values = table.encode([variable], rows)[variable].numpy()
        edges = None
        if table.attributes[variable].kind == "continuous":
            edges = bin_edges(values, float(values.min()), float(values.max()))

        def bins(of: np.ndarray, edges: np.ndarray | None = edges) -> np.ndarray:
            return of if edges is None else value_bins(of, edges)

        own, set_to = (bins(pa[variable].numpy()) for pa in (audited.pa, images[name][1]))
        made = embedded(embedding, images[name][0])
        divergence = latent_divergence(factual, made, own, set_to, real, bins(values))
        moved = {kind: np.where(own != set_to, value, np.nan) for kind, value in divergence._asdict().items()}
        found[name] = mean_figures(moved, audited.patients, s.resamples, s.seed, "no image changes its bin")
    return found


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


def truth_table(audited: Audited, name: str, images: torch.Tensor) -> dict[str, Any]:
    """See `cfssl.evaluate.counterfactual.against_truth`."""
    truth, s = audited.table.truth, audited.settings
    assert truth is not None
    attributes = truth.attributes(audited.rows, audited.do[name])
    rendered = to_signed(truth.counterfactual(audited.rows, attributes))
    return against_truth(images, rendered, audited.x, audited.patients, s.resamples, s.seed)

"""Attribute amplification: does an intervention on one attribute change how strongly others are expressed?

What enters: what a judge (a predictor that no generator was trained with) says of N real images and of their
counterfactuals under each do(), with what it should say, and the causal graph. What leaves: JSON-ready
tables. After Xia et al. 2024 ("Mitigating attribute amplification in counterfactual image generation"): for
do_k and attribute j

    Delta_kj = 100 (AUC_j(x~; targets pa~_j) - AUC_j(x; recorded labels))        in points of AUC
    Amp      = mean of |Delta_kj| over k and the discrete j that do_k leaves invariant

Delta_kk is effectiveness; what descends from k may change and is not counted. AUC is macro one-versus-rest
for more than two classes. Continuous attributes have the change of the mean absolute error, in their own
units, and no part in Amp. The AUC only ranks; what single images show is in `sharpness`, `shift` and
`towards_target`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from cfssl.errors import UserError
from cfssl.evaluate.bootstrap import LEVEL, figure, mean_figures, paired, resampled
from cfssl.evaluate.groups import checked
from cfssl.evaluate.metrics import auc
from cfssl.scm.graph import CausalGraph

Relation = Literal["intervened", "descendant", "unrelated"]
POINTS = "AUC points"
BINS = 20
SURE = 1e-6  # probabilities are kept this far from 0 and 1 where their log odds are taken


@dataclass(frozen=True)
class Judged:
    """N images before a judge. `seen`: attribute -> probabilities (N, classes), or values (N,) of a
    continuous attribute; `target`: attribute -> codes (N,), or values (N,): the recorded ones of real images,
    pa~ of counterfactuals. `do`: the attributes that were intervened on."""

    seen: Mapping[str, np.ndarray]
    target: Mapping[str, np.ndarray]
    do: tuple[str, ...] = ()


@dataclass(frozen=True)
class Verdicts:
    """The same N images, real and under each do() (by a name of your choice, e.g. the variable's)."""

    real: Judged
    counterfactual: Mapping[str, Judged]

    def __post_init__(self) -> None:
        """Raises UserError where do() or attributes are missing, ValueError where shapes do not fit."""
        if not self.counterfactual or not self.real.seen:
            raise UserError("There is nothing to compare; give a judge's verdicts of at least one do().")
        for name, judged in {"the real images": self.real, **self.counterfactual}.items():
            for attribute in self.real.seen:
                if attribute not in judged.seen or attribute not in judged.target:
                    raise UserError(
                        f"The verdicts of {name} lack {attribute!r}, which the real images have; judge every "
                        "do() for the same attributes."
                    )
                seen, target = judged.seen[attribute], judged.target[attribute]
                if is_discrete(seen):
                    checked(target, seen)
                elif seen.shape != target.shape or not np.isfinite([seen, target]).all():
                    raise ValueError(f"{attribute} of {name}: values {seen.shape}, targets {target.shape}")
                if seen.shape != self.real.seen[attribute].shape:
                    raise ValueError(f"{attribute} of {name} and of the real images differ in shape")

    @property
    def count(self) -> int:
        return len(next(iter(self.real.seen.values())))

    def cells(self, graph: CausalGraph) -> Iterator[tuple[str, str, Relation]]:
        """Every do() with every attribute, and how they are related."""
        for name, judged in self.counterfactual.items():
            affected = graph.affected(judged.do)
            for attribute in self.real.seen:
                chosen = attribute in judged.do
                yield (
                    name,
                    attribute,
                    "intervened" if chosen else "descendant" if attribute in affected else "unrelated",
                )

    def counted(self, graph: CausalGraph) -> list[tuple[str, str]]:
        """The (do, attribute) of which Amp is the mean."""
        return [
            (name, attribute)
            for name, attribute, relation in self.cells(graph)
            if relation == "unrelated" and is_discrete(self.real.seen[attribute])
        ]


def is_discrete(seen: np.ndarray) -> bool:
    return seen.ndim == 2


def amplification(
    graph: CausalGraph,
    verdicts: Verdicts,
    patients: np.ndarray | None = None,
    ceilings: Mapping[str, float] | None = None,
    true_classes: Mapping[str, np.ndarray] | None = None,
    units: Mapping[str, str] | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """The matrix, Amp and the figures of single images:

        {"n", "patients", "resamples", "level", "seed",
         "attributes": {j: {"kind", "unit", "accuracy" or "error": figure of the real images}},
         "matrix": {do: {j: cell}}, "amplification": figure, "ceiling_excess": figure}
        cell: {"relation", "unit", "change": figure, "real", "counterfactual", "error" or "accuracy": figure,
               "shift", "sharpness", "towards_target", "mismatch", "ceiling_excess": figures where they apply,
               "recorded_class": {"real", "counterfactual"}}
        figure: {"value", "low", "high"}, null with a "reason" where there is none

    `change` is Delta, or the change of the mean absolute error; `real` and `counterfactual` are the two it is
    made of; `accuracy` (or `error`, the mean absolute one) speaks of the counterfactuals. See
    `single_images` for the next three. `mismatch`, where `true_classes` has the class a* (N,) that the image
    was made with: among images recorded as a != a*, the share in which the judge sees a* in the real image
    and a in the counterfactual. `ceilings`: the best AUC (0 to 1) that is possible against recorded labels;
    `ceiling_excess` is AUC(x~) minus it, in points. `recorded_class`, of unrelated discrete attributes: the
    share of images whose recorded class has a probability in each of 20 equal bins.

    Sampling alone makes |Delta| positive, so Amp does not reach 0 by chance and its percentile interval lies
    high: `by_chance` beside it is what it would be on average if no AUC had changed (the mean of the
    bootstrap's |Delta* - Delta|). `amplification_difference` compares two arms, in which this part is alike.
    Raises UserError for unknown names.
    """
    attributes = list(verdicts.real.seen)
    ceilings, true_classes, units = ceilings or {}, true_classes or {}, units or {}
    for given in (ceilings, true_classes, units):
        _refuse_unjudged(given, attributes)
    cells = list(verdicts.cells(graph))

    def statistic(weights: np.ndarray) -> np.ndarray:
        """(real and counterfactual, cells, R)"""
        real = {name: _score(verdicts.real, name, weights) for name in attributes}
        made = [_score(verdicts.counterfactual[do], name, weights) for do, name, _ in cells]
        return np.array([[real[name] for _, name, _ in cells], made])

    values, draws = resampled(statistic, verdicts.count, patients, resamples, seed)
    matrix: dict[str, dict[str, Any]] = {do: {} for do in verdicts.counterfactual}
    rows: dict[tuple[str | None, str, str], np.ndarray] = {}
    for name in attributes:
        seen = verdicts.real.seen[name]
        kind = "accuracy" if is_discrete(seen) else "error"
        rows[None, name, kind] = single_images(seen, seen, verdicts.real.target[name])[kind]
    for index, (do, name, relation) in enumerate(cells):
        discrete = is_discrete(verdicts.real.seen[name])
        unit = POINTS if discrete else units.get(name, f"units of {name}")
        absent = _absent(verdicts, do, name)
        cell: dict[str, Any] = {
            "relation": relation,
            "unit": unit,
            "change": figure(
                float(values[1, index] - values[0, index]), draws[1, index] - draws[0, index], absent
            ),
            "real": figure(float(values[0, index]), draws[0, index], absent),
            "counterfactual": figure(float(values[1, index]), draws[1, index], absent),
        }
        judged, real = verdicts.counterfactual[do], verdicts.real
        of_images = single_images(real.seen[name], judged.seen[name], judged.target[name])
        rows |= {(do, name, kind): row for kind, row in of_images.items()}
        if relation == "unrelated" and discrete:
            pair = {"real": real, "counterfactual": judged}
            cell["recorded_class"] = {
                what: _histogram(source.seen[name], real.target[name]) for what, source in pair.items()
            }
        if name in true_classes and relation == "unrelated" and discrete:
            turned = mismatch(real.seen[name], judged.seen[name], real.target[name], true_classes[name])
            rows[do, name, "mismatch"] = turned
        if name in ceilings and discrete:
            excess = values[1, index] - 100 * ceilings[name], draws[1, index] - 100 * ceilings[name]
            cell["ceiling_excess"] = figure(float(excess[0]), excess[1], absent)
        matrix[do][name] = cell

    none = "no image is recorded as another class than its true one"
    means = mean_figures(rows, patients, resamples, seed, none)
    for (of, name, kind), found in means.items():
        if of is not None:
            matrix[of][name][kind] = found

    places = [index for index, cell in enumerate(cells) if cell[:2] in set(verdicts.counted(graph))]
    change, drawn = values[1] - values[0], draws[1] - draws[0]
    result: dict[str, Any] = {
        "n": verdicts.count,
        "patients": None if patients is None else len(set(np.asarray(patients).tolist())),
        "resamples": resamples,
        "level": LEVEL,
        "seed": seed,
        "attributes": {
            name: {
                "kind": "discrete" if is_discrete(verdicts.real.seen[name]) else "continuous",
                "unit": next(iter(matrix.values()))[name]["unit"],
                **{kind: found for (do_, of, kind), found in means.items() if (do_, of) == (None, name)},
            }
            for name in attributes
        },
        "matrix": matrix,
    }
    result["amplification"] = _mean_of_cells(np.abs(change[places]), np.abs(drawn[places]))
    if result["amplification"]["value"] is not None:
        spread = np.abs(drawn[places] - change[places, None])
        result["amplification"]["by_chance"] = float(np.nanmean(spread))
    capped = [index for index in places if cells[index][1] in ceilings]
    if capped:
        limit = np.array([100 * ceilings[cells[index][1]] for index in capped])
        result["ceiling_excess"] = _mean_of_cells(
            values[1, capped] - limit, draws[1, capped] - limit[:, None]
        )
    return result


def amplification_difference(
    graph: CausalGraph,
    a: Sequence[Verdicts],
    b: Sequence[Verdicts],
    ceilings: Mapping[str, float] | None = None,
    patients: np.ndarray | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Arm a minus arm b, a list of training seeds each, a[s] and b[s] belonging together and all over the
    same N rows: {"amplification", "intervened", "ceiling_excess"} of paired figures in AUC points (see
    `cfssl.evaluate.bootstrap.paired`). `intervened` is the mean AUC of the discrete attributes that were
    intervened on; `ceiling_excess` needs `ceilings`. Raises UserError when the arms differ in seeds or rows,
    or judge different things."""
    if len(a) != len(b) or not a:
        raise UserError(
            f"The arms have {len(a)} and {len(b)} seeds, expected the same number; train the missing ones."
        )
    arms: tuple[Sequence[Verdicts], Sequence[Verdicts]] = (a, b)
    first = a[0]
    what = list(first.cells(graph))
    for verdicts in (*a, *b):
        if verdicts.count != first.count or list(verdicts.cells(graph)) != what:
            raise UserError(
                f"One arm or seed has verdicts of {verdicts.count} images, another of {first.count}, or they "
                "differ in their do() or attributes; judge all of them alike."
            )
    counted = first.counted(graph)
    chosen = [
        (do, name)
        for do, name, relation in what
        if relation == "intervened" and is_discrete(first.real.seen[name])
    ]

    def amp(verdicts: Verdicts, weights: np.ndarray) -> np.ndarray:
        real = {name: _score(verdicts.real, name, weights) for name in {name for _, name in counted}}
        made = [_score(verdicts.counterfactual[do], name, weights) - real[name] for do, name in counted]
        return np.abs(made).mean(0)

    def mean_score(cells: Sequence[tuple[str, str]], verdicts: Verdicts, weights: np.ndarray) -> np.ndarray:
        return np.mean([_score(verdicts.counterfactual[do], name, weights) for do, name in cells], axis=0)

    capped = [cell for cell in counted if ceilings and cell[1] in ceilings]
    wanted = {
        "amplification": (counted, amp),
        "intervened": (chosen, lambda verdicts, weights: mean_score(chosen, verdicts, weights)),
        "ceiling_excess": (capped, lambda verdicts, weights: mean_score(capped, verdicts, weights)),
    }

    def compared(statistic: Any) -> dict[str, Any]:
        def differences(weights: np.ndarray) -> np.ndarray:
            ours, theirs = ([statistic(verdicts, weights) for verdicts in arm] for arm in arms)
            return np.array(ours) - np.array(theirs)

        why = "an attribute lacks a class"
        return {**paired(differences, first.count, patients, resamples, seed, why), "unit": POINTS}

    return {name: compared(statistic) for name, (cells, statistic) in wanted.items() if cells}


def single_images(real: np.ndarray, made: np.ndarray, target: np.ndarray) -> dict[str, np.ndarray]:
    """Figures (N,) of every image, of which the means are reported.

    Discrete, probabilities (N, classes):
    - `shift`: total variation between the two, which is |p(x~) - p(x)| of class 1 where there are two;
    - `sharpness`: the change of the highest probability, which is that of |p - .5| where there are two
      classes (for more, this is the analogue);
    - `towards_target`: the change of the log odds of the target's class (the recorded one, where the do()
      leaves the attribute alone); probabilities are kept 1e-6 away from 0 and 1;
    - `accuracy`: whether the target's class is the likeliest in x~.
    Continuous, values (N,): `shift` |v(x~) - v(x)| and `error` |v(x~) - target|.
    """
    real, made = np.asarray(real, np.float64), np.asarray(made, np.float64)
    if not is_discrete(real):
        return {"shift": np.abs(made - real), "error": np.abs(made - target)}
    place = np.arange(len(target)), target
    return {
        "shift": np.abs(made - real).sum(1) / 2,
        "sharpness": made.max(1) - real.max(1),
        "towards_target": _log_odds(made[place]) - _log_odds(real[place]),
        "accuracy": (made.argmax(1) == target).astype(np.float64),
    }


def mismatch(real: np.ndarray, made: np.ndarray, recorded: np.ndarray, true: np.ndarray) -> np.ndarray:
    """Per image recorded as another class than its true one, whether the judge turns from the true class to
    the recorded one; NaN for the others. (N, classes) twice, (N,) twice."""
    turned = (real.argmax(1) == true) & (made.argmax(1) == recorded)
    return np.where(recorded != true, turned.astype(np.float64), np.nan)


def _histogram(seen: np.ndarray, recorded: np.ndarray) -> list[float]:
    probability = np.asarray(seen, np.float64)[np.arange(len(recorded)), recorded]
    return (np.histogram(probability, BINS, (0, 1))[0] / len(recorded)).tolist()


def _log_odds(probability: np.ndarray) -> np.ndarray:
    kept = probability.clip(SURE, 1 - SURE)
    return np.log(kept) - np.log1p(-kept)


def _score(judged: Judged, name: str, weights: np.ndarray) -> np.ndarray:
    """100 AUC, or the mean absolute error, per resample (R,)."""
    seen, target = np.asarray(judged.seen[name], np.float64), judged.target[name]
    if is_discrete(seen):
        return 100 * auc(target, seen, weights)
    return weights @ np.abs(seen - target) / weights.sum(1)


def _mean_of_cells(values: np.ndarray, draws: np.ndarray) -> dict[str, Any]:
    """Of those cells (cells[, R]) that have a value; `cells` says how many."""
    known = ~np.isnan(values)
    of = {"unit": POINTS, "cells": int(known.sum())}
    if not known.any():
        return {"value": None, "low": None, "high": None, "reason": "no cell has a value", **of}
    return {**figure(float(values[known].mean()), draws[known].mean(0), "no value"), **of}


def _absent(verdicts: Verdicts, do: str, name: str) -> str:
    """Why an AUC has no value."""
    for what, judged in (("recorded labels", verdicts.real), ("targets", verdicts.counterfactual[do])):
        seen, target = judged.seen[name], judged.target[name]
        if is_discrete(seen) and (lacking := sorted(set(range(seen.shape[1])) - set(target.tolist()))):
            return f"the {what} of {name} lack class {', '.join(map(str, lacking))}"
    return "no value"


def _refuse_unjudged(names: Mapping[str, Any], known: Sequence[str]) -> None:
    for name in names:
        if name not in known:
            raise UserError(
                f"{name!r} was given, but the judge sees {', '.join(known)}; correct the name or leave it "
                "out."
            )

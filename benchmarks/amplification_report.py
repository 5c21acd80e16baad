"""The figures and tables of benchmarks/amplification.py, from the judge's verdicts that it keeps."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from record import figure, markdown_table, over_seeds, with_interval
from scipy.special import logit
from sklearn.metrics import roc_auc_score

from cfssl.data.table import ImageTable
from cfssl.evaluate.amplification import Judged, Verdicts, amplification, amplification_difference
from cfssl.scm.graph import CausalGraph

Arrays = Mapping[str, np.ndarray]
POINTS = "AUC points"
RESAMPLES = 2000


class World:
    """The verdicts of all arms and seeds on one world's test images. `scores`: (arm, seed) -> arrays."""

    def __init__(
        self,
        name: str,
        table: ImageTable,
        graph: CausalGraph,
        attributes: tuple[str, ...],
        scores: Mapping[tuple[str, int], Arrays],
        seeds: tuple[int, ...],
    ) -> None:
        self.name, self.graph, self.attributes = name, graph, attributes
        self.scores, self.seeds = scores, seeds
        self._audits: dict[str, list[dict[str, Any]]] = {}
        test = table.frame.iloc[table.rows("test")]
        self.recorded = {a: table.encode([a], table.rows("test"))[a].numpy() for a in attributes}
        true = {a: test[f"true_{a}"].to_numpy() for a in attributes}
        # Of these very labels; in the population it is 1 - rho, or Phi(d / sqrt 2) of the graded attribute.
        self.ceilings = {a: float(roc_auc_score(self.recorded[a], true[a])) for a in attributes}
        is_class = {a: set(np.unique(values)) <= {0.0, 1.0} for a, values in true.items()}
        self.true = {a: true[a].astype(np.int64) for a in attributes if is_class[a]}

    def verdicts(self, arm: str, seed: int) -> Verdicts:
        arrays = self.scores[arm, seed]

        def judged(prefix: str, target: Mapping[str, np.ndarray], do: tuple[str, ...] = ()) -> Judged:
            seen = {a: np.stack([1 - arrays[f"{prefix}/{a}"], arrays[f"{prefix}/{a}"]], 1) for a in target}
            return Judged(seen, target, do)

        made = {
            name: judged(f"do_{name}", self.recorded | {name: arrays[f"target/{name}"]}, (name,))
            for name in self.attributes
        }
        return Verdicts(judged("real", self.recorded), made)

    def of(self, arm: str) -> list[Verdicts]:
        return [self.verdicts(arm, seed) for seed in self.seeds]

    def audits(self, arm: str) -> list[dict[str, Any]]:
        """One record of `amplification` per seed."""
        if arm not in self._audits:
            options = {"ceilings": self.ceilings, "true_classes": self.true}
            self._audits[arm] = [
                amplification(self.graph, verdicts, resamples=200, **options) for verdicts in self.of(arm)
            ]
        return self._audits[arm]

    def difference(self, first: str, second: str, what: str) -> dict[str, Any]:
        """AUC points, with the variance of test images and of training seeds."""
        found = amplification_difference(
            self.graph, self.of(first), self.of(second), self.ceilings, resamples=RESAMPLES
        )[what]
        return figure(found["value"], found["low"], found["high"], POINTS, found["seeds"])

    def mean_of(self, arm: str, key: str) -> list[float]:
        """Of one quantity of `scores` or of the unrelated cells of the audits, per seed."""
        return [float(self.scores[arm, seed][key].mean()) for seed in self.seeds]

    def cells(self, arm: str, kind: str, relation: str = "unrelated") -> list[float]:
        """Mean over cells of one figure of the matrix, per seed."""
        return [
            float(
                np.mean(
                    [
                        cell[kind]["value"]
                        for row in record["matrix"].values()
                        for cell in row.values()
                        if cell["relation"] == relation and kind in cell and cell[kind]["value"] is not None
                    ]
                )
            )
            for record in self.audits(arm)
        ]


def figures_of(world: World, arms: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """Named as in the issue, then the controls."""
    found, w = {}, world.name
    audits = {arm: world.audits(arm) for arm in arms}
    for arm in arms:
        amp = [record["amplification"]["value"] for record in audits[arm]]
        excess = [record["ceiling_excess"]["value"] for record in audits[arm]]
        found[f"{w}_amp_{arm}"] = over_seeds(amp, POINTS)
        found[f"{w}_ceiling_excess_{arm}"] = over_seeds(excess, POINTS)
        found[f"{w}_intervened_auc_{arm}"] = over_seeds(
            world.cells(arm, "counterfactual", "intervened"), POINTS
        )
        found[f"{w}_sharpness_{arm}"] = over_seeds(world.cells(arm, "sharpness"), "probability")
        found[f"{w}_towards_label_{arm}"] = over_seeds(world.cells(arm, "towards_target"), "log odds")
        found[f"{w}_turned_to_wrong_label_{arm}"] = over_seeds(world.cells(arm, "mismatch"), "fraction")
        found[f"{w}_free_energy_{arm}"] = over_seeds(world.mean_of(arm, "free_energy"), "nats per pixel")
        found[f"{w}_composition_{arm}"] = over_seeds(world.mean_of(arm, "composition"), "grey levels")
    found[f"{w}_amp_hard_minus_soft"] = world.difference("hard", "soft", "amplification")
    found[f"{w}_intervened_auc_hard_minus_soft"] = world.difference("hard", "soft", "intervened")
    found[f"{w}_intervened_auc_soft_minus_none"] = world.difference("soft", "none", "intervened")
    ratio = [
        soft["amplification"]["value"] / hard["amplification"]["value"]
        for soft, hard in zip(audits["soft"], audits["hard"], strict=True)
    ]
    found[f"{w}_amp_soft_over_hard"] = over_seeds(ratio, "ratio")
    slopes = [np.mean([calibration(world, seed, a) for a in world.attributes]) for seed in world.seeds]
    found[f"{w}_guide_calibration_slope"] = over_seeds([float(s) for s in slopes], "slope")
    return found


def calibration(world: World, seed: int, attribute: str) -> float:
    """Slope of the recorded label on the guide's log odds: 1 is calibrated, below 1 overconfident."""
    from sklearn.linear_model import LogisticRegression

    odds = logit(world.scores["none", seed][f"guide/{attribute}"].clip(1e-6, 1 - 1e-6))[:, None]
    return float(LogisticRegression(C=1e6).fit(odds, world.recorded[attribute]).coef_[0, 0])


def table_of(world: World, arms: tuple[str, ...], figures: Mapping[str, dict[str, Any]]) -> str:
    """The matrix of every arm (mean over seeds), and the arms side by side."""
    w = world.name
    text = f"## {w}\n\nCeilings: " + ", ".join(f"{a} {c:.3f}" for a, c in world.ceilings.items())
    real = {
        a: np.mean(
            [
                100 * roc_auc_score(world.recorded[a], world.scores["none", s][f"real/{a}"])
                for s in world.seeds
            ]
        )
        for a in world.attributes
    }
    text += (
        "; the judge on real images: " + ", ".join(f"{a} {v / 100:.3f}" for a, v in real.items()) + ".\n\n"
    )
    rows = []
    for arm in arms:
        audits = world.audits(arm)
        for name in world.attributes:
            cells = []
            for attribute in world.attributes:
                change = np.mean([record["matrix"][name][attribute]["change"]["value"] for record in audits])
                cells.append(f"**{change:+.1f}**" if attribute == name else f"{change:+.1f}")
            rows.append([arm, f"do({name})", *cells])
    text += "Change of the AUC in points (bold: the attribute that was set).\n\n"
    text += markdown_table(["arm", "", *world.attributes], rows) + "\n"
    shown = {
        "amp": ("Amp", 1),
        "ceiling_excess": ("unrelated AUC minus ceiling", 1),
        "intervened_auc": ("AUC of what was set", 1),
        "sharpness": ("sharpness", 3),
        "towards_label": ("log odds of the recorded label", 2),
        "turned_to_wrong_label": ("turned from the true to the wrong recorded class", 3),
        "free_energy": ("F", 4),
        "composition": ("composition, t_u = 0", 2),
    }
    signed = ("ceiling_excess", "sharpness", "towards_label")

    def cell(arm: str, key: str) -> str:
        text = with_interval(figures[f"{w}_{key}_{arm}"], shown[key][1])
        return text if key in signed else text.replace("+", "")

    rows = [[arm, *[cell(arm, key) for key in shown]] for arm in arms]
    return text + markdown_table(["arm", *[title for title, _ in shown.values()]], rows) + "\n"

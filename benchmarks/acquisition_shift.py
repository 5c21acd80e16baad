"""Do counterfactual views help on the scanners that are rarely seen?

    python benchmarks/acquisition_shift.py --data-root PATH [--jobs 2]

Objectives: SimCLR and DINO. Worlds: phantom_chest with the oracle's bank, phantom_chest with the HVAE's bank,
ham10000 with an HVAE's bank (needs --data-root). Arms of each: plain, plus ("+": the same counterfactuals,
never paired with their original) and cf, three pre-training seeds each (the HVAE is trained anew for every
seed and sees no label of the probe's target); the arms of an objective share table, split, initial weights,
order of images, geometry and look of views, epochs, batch and labelled subset, and differ in nothing but
which stored image a view shows. A linear probe (C chosen on validation AUC) on 1, 10 and 100 % of the labels
scores the test rows once. Differences are paired; their intervals hold the variance of test rows and of
training seeds (`cfssl.evaluate.groups.paired_difference`). Resumable: everything lives in content-addressed
stages.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pretraining import (
    DRAWN,
    INTERVAL,
    ONE_THREAD,
    RECIPES,
    Arm,
    Task,
    Trials,
    figures_section,
    make_all,
    minutes,
    probe,
)
from record import figure, over_seeds, write_results

from cfssl.data.pixels import to_signed
from cfssl.evaluate.counterfactual import composition, distance_to_truth, effectiveness, reversibility
from cfssl.generators.base import counterfactual, intervention
from cfssl.recipe import read_layers
from cfssl.seeds import torch_generator

SEEDS = (0, 1, 2)
FRACTIONS = (0.01, 0.1, 1.0)
OBJECTIVES = {"simclr": "SimCLR", "dino": "DINO"}
BANKS = {"oracle": "true counterfactuals", "hvae": "HVAE"}
RARE, MAJOR = ("C", "D"), ("A",)
SOURCES = ("vidir_molemax", "vidir_modern", "rosendahl", "vienna_dias")
JUDGE_SEED = 100  # the independent predictor: other weights, order and looks than anything it judges
HAM_EPOCHS = 24
# The DINO of the phantom's recipe, not chosen anew: an objective of its own over the recipes of SimCLR.
DINO = read_layers(RECIPES / "phantom_dino.yaml")
HAM_DINO = (
    f"objective={DINO['objective']}",
    *(f"train.{key}={DINO['train'][key]}" for key in ("warmup", "clip")),
)
PLUS = ("views.counterfactual.view=all", "views.counterfactual.shared=true")
SUPERVISED = (
    "name=phantom-supervised",
    "objective={name: supervised, target: disease}",
    "views.count=1",
    "views.geometry={crop_scale: [0.8, 1.0], rotation: 10}",
    "views.photometric={brightness: 0.05, contrast: 0.05}",
    "train.weight_decay=0.05",
    "train.epochs=30",
)
JUDGE = Task(
    "phantom_simclr.yaml",
    (
        *DRAWN,
        "name=phantom-judge",
        "objective={name: supervised, target: scanner}",
        "views.count=1",
        "views.size=null",  # it judges images of the stored size
        "views.geometry={crop_scale: [0.8, 1.0], rotation: 5}",
        "views.photometric={brightness: 0.05, contrast: 0.05}",
        "train.epochs=10",
        f"train.seed={JUDGE_SEED}",
        "evaluate=[]",
    ),
)


def evaluations(target: str, by: str, seed: int) -> str:
    return f"evaluate=[{probe(target, by, FRACTIONS, seed)}, {{name: knn, target: {target}, by: [{by}]}}]"


def arms(data_root: str | None) -> dict[tuple[str, str, int], Task]:
    """(world, arm, seed) -> task; arms are simclr, simclr_plus, simclr_cf, dino ..."""
    found: dict[tuple[str, str, int], Task] = {}
    for seed in SEEDS:
        own, made = f"train.seed={seed}", f"generator.train.seed={seed}"
        phantom = (*DRAWN, own, evaluations("disease", "scanner", seed))
        found["phantom", "supervised", seed] = Task("phantom_simclr.yaml", (*phantom, *SUPERVISED))
        for objective in OBJECTIVES:
            found["phantom", objective, seed] = Task(f"phantom_{objective}.yaml", phantom)
            for bank, generator in (("oracle", ()), ("hvae", (made,))):
                suffix = "_oracle" if bank == "oracle" else ""
                recipe, overrides = f"phantom_cf_{objective}{suffix}.yaml", (*phantom, *generator)
                found[bank, f"{objective}_cf", seed] = Task(recipe, overrides)
                found[bank, f"{objective}_plus", seed] = Task(recipe, (*overrides, *PLUS))
            if data_root is not None:
                settings = HAM_DINO if objective == "dino" else ()
                real = (f"data.root={data_root}", own, *ONE_THREAD, f"train.epochs={HAM_EPOCHS}", *settings)
                real = (*real, evaluations("malignant", "dataset", seed))
                ham = (*real, made, "generator.train.epochs=6")
                found["ham", objective, seed] = Task("ham10000_simclr.yaml", real)
                found["ham", f"{objective}_cf", seed] = Task("ham10000_cf_simclr.yaml", ham)
                found["ham", f"{objective}_plus", seed] = Task("ham10000_simclr_plus.yaml", ham)
    return found


def judge_generators(trials: Trials, rows: int = 1000) -> dict[str, dict[str, Any]]:
    """The HVAE of every seed on test images: effectiveness for do(scanner) by the independent predictor,
    distance to the true counterfactual relative to the unchanged image, composition and reversibility. Only
    interventions that change something."""
    classifier = JUDGE.pipeline(trials.runs).objective
    per_seed: dict[str, list[float]] = {}
    for seed in SEEDS:
        job = trials.jobs["hvae", "simclr_cf", seed]
        generator, table = job.generation.generator, job.table
        assert generator is not None
        chosen = table.rows("test")[:rows]
        x, pa = to_signed(table.images.read(chosen)), table.encode(generator.graph.variables, chosen)
        seen, truly, generated, unchanged, undone = [], [], [], [], []
        for scanner in table.attributes["scanner"].categories:
            do = intervention({"scanner": scanner}, table.attributes, len(chosen))
            moved = (pa["scanner"] != do["scanner"]).numpy()
            cf, _ = counterfactual(generator, x, pa, do, torch_generator(0))
            assert table.truth is not None
            truth = to_signed(table.truth.counterfactual(chosen, do))
            seen.append(effectiveness(classifier.logits, cf, do["scanner"])[moved].mean())  # type: ignore[operator]
            truly.append(effectiveness(classifier.logits, truth, do["scanner"])[moved].mean())  # type: ignore[operator]
            to_truth, left = distance_to_truth(cf, truth, x)
            generated.append(to_truth[moved].mean())
            unchanged.append(left[moved].mean())
            undone.append(reversibility(generator, x, pa, do)[moved].mean())
        null = [composition(generator, x, pa, residual=share).mean() for share in (1.0, 0.0)]  # type: ignore[arg-type]
        with torch.no_grad():
            real = classifier.logits((x + 1) / 2).argmax(1).eq(pa["scanner"]).float().mean()  # type: ignore[operator]
        measured = {
            "hvae_scanner_effectiveness": np.mean(seen),
            "hvae_scanner_effectiveness_worst": np.min(seen),
            "judge_accuracy_real": float(real),
            "judge_accuracy_truth": np.mean(truly),
            "hvae_l1_ratio": np.mean(np.array(generated) / np.array(unchanged)),
            "hvae_composition_residual": null[0],
            "hvae_composition_network": null[1],
            "hvae_reversibility": np.mean(undone),
        }
        for name, value in measured.items():
            per_seed.setdefault(name, []).append(float(value))
    units = {"effectiveness": "accuracy", "accuracy": "accuracy", "ratio": "ratio"}
    return {
        name: over_seeds(
            values, unit=next((unit for word, unit in units.items() if word in name), "grey levels of 255")
        )
        for name, values in per_seed.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data-root", help="folder with ham10000_gray64.npz; without it ham10000 is left out"
    )
    parser.add_argument("--runs", type=Path, default=Path("runs/acquisition_shift"))
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time, one thread each")
    options = parser.parse_args()
    torch.set_num_threads(options.jobs)
    trials = Trials(arms(options.data_root), SEEDS, options.runs)
    make_all([*trials.tasks.values(), JUDGE], options.runs, options.jobs)
    figures = gains(trials) | judge_generators(trials)
    for arm in ("supervised", *OBJECTIVES):
        for scanner, values in trials.auc(("phantom", arm), "scanner").items():
            figures[f"phantom_{arm}_auc_{scanner}"] = over_seeds(values, unit="AUC")
    sections = [phantom_section(trials)]
    if options.data_root is not None:
        figures |= ham_gains(trials)
        sections.append(ham_section(trials))
    reference = trials.auc(("phantom", "simclr"), "scanner")
    protocol = {
        "phantom": f"{', '.join(DRAWN)}; recipes/phantom_*.yaml; 2,400 train, 600 val, 3,000 test "
        "(scanners balanced); test rows the same for all seeds and arms",
        "ham10000": f"{HAM_EPOCHS} epochs, generator 6; recipes/ham10000_*.yaml; one image per lesion, "
        "60/10/30 split stratified by source and class",
        "encoder": "test_byobnet of timm for both objectives; DINO therefore without iBOT, and, as small "
        "crops did not help it, without local views; HAM10000 has the phantom's settings of DINO",
        "budget": "equal epochs, batch, views, initial weights and order for the arms of an objective",
        "choice of the budget": "on another draw of the phantom, before this one was scored: "
        "benchmarks/pilots.md, which also tells what was scored before",
        "selection": "C of the probe on validation AUC; last checkpoint",
        "labels": "1, 10 and 100 % of the training labels; figures without a percentage are at 10 %",
        "time": f"sum of the stages over {options.jobs} single-threaded processes side by side",
        "interval": INTERVAL,
        "worst": "each arm's own worst source, found anew in every seed and resample",
        "rare": f"mean of scanners {' and '.join(RARE)}; major: {MAJOR[0]}",
        "instrument": "parameters of the phantom fixed from SimCLR and supervised runs alone; "
        f"SimCLR on A {np.mean(reference['A']):.3f}, on D {np.mean(reference['D']):.3f}",
    }
    sections.append(figures_section(figures))
    spent = minutes([*trials.jobs.values(), JUDGE.pipeline(options.runs)], options.jobs)
    write_results("acquisition_shift", figures, protocol, SEEDS, spent, "\n".join(sections))


def percent(fraction: float) -> str:
    """What is put behind the name of a figure; nothing at 10 % of the labels."""
    return "" if fraction == 0.1 else f"_{100 * fraction:g}_percent"


def gains(trials: Trials) -> dict[str, dict[str, Any]]:
    """`OBJECTIVE_BANK_gain_rare`, `..._gain_major`, `..._over_plus_rare` and so on, on the phantom."""
    figures = {}
    for objective in OBJECTIVES:
        for bank in BANKS:
            cf = (bank, f"{objective}_cf")
            against = {"gain": ("phantom", objective), "over_plus": (bank, f"{objective}_plus")}
            for kind, other in against.items():
                for groups, where in ((RARE, "rare"), (MAJOR, "major")):
                    for fraction in FRACTIONS:
                        name = f"{objective}_{bank}_{kind}_{where}{percent(fraction)}"
                        figures[name] = trials.difference(cf, other, "scanner", groups, fraction)
            for fraction in FRACTIONS:
                name = f"{objective}_{bank}_gap_change{percent(fraction)}"
                figures[name] = trials.difference(cf, against["gain"], "scanner", fraction=fraction, gap=True)
        oracle, hvae = (figures[f"{objective}_{bank}_gain_rare_100_percent"] for bank in BANKS)
        # A share of a gain that may be nought says nothing.
        if oracle["low"] > 0:
            kept = hvae["value"] / oracle["value"]
            figures[f"{objective}_hvae_share_of_oracle_gain"] = figure(kept, unit="ratio")
    return figures


def ham_gains(trials: Trials) -> dict[str, dict[str, Any]]:
    """`OBJECTIVE_ham_gain_worst` and the same of every source and of their mean."""
    figures = {}
    places: dict[str, tuple[str, ...] | None] = {"worst": None, "all_sources": SOURCES}
    places |= {source: (source,) for source in SOURCES}
    for objective in OBJECTIVES:
        cf = ("ham", f"{objective}_cf")
        for kind, other in (("gain", objective), ("over_plus", f"{objective}_plus")):
            for where, groups in places.items():
                for fraction in (0.1, 1.0):  # 1 % are a handful of malignant images
                    name = f"{objective}_ham_{kind}_{where}{percent(fraction)}"
                    figures[name] = trials.difference(cf, ("ham", other), "dataset", groups, fraction)
    return figures


def tables(trials: Trials, shown: Mapping[str, Arm], by: str) -> str:
    """The probe at every label fraction, and kNN."""
    text = ""
    for fraction in reversed(FRACTIONS):
        labels = "" if fraction == 1 else f", {100 * fraction:g} % of the labels"
        text += f"Linear probe{labels}\n\n{trials.auc_table(shown, by, fraction)}\n"
    return text + f"kNN\n\n{trials.auc_table(shown, by, evaluation=1)}\n"


def phantom_section(trials: Trials) -> str:
    text = "## phantom_chest: disease AUC per scanner, mean over seeds (standard deviation)\n\n"
    shown: dict[str, Arm] = {}
    for objective, words in OBJECTIVES.items():
        shown[words] = ("phantom", objective)
        for bank, made in BANKS.items():
            shown[f"{words}+ ({made})"] = (bank, f"{objective}_plus")
            shown[f"CF-{words} ({made})"] = (bank, f"{objective}_cf")
    text += tables(trials, shown, "scanner")
    text += "Supervised reference (probe on its features)\n\n"
    return text + trials.auc_table({"supervised": ("phantom", "supervised")}, "scanner") + "\n"


def ham_section(trials: Trials) -> str:
    job, arrays = trials.jobs["ham", "simclr", 0], trials.scores["ham", "simclr", 0]
    sources = job.table.frame["dataset"].to_numpy()[arrays["row"]]
    sizes = ", ".join(
        f"{source} {(sources == source).sum()} ({arrays['y'][sources == source].sum()} malignant)"
        for source in SOURCES
    )
    text = "## ham10000: malignant AUC per source, mean over seeds (standard deviation)\n\n"
    text += f"Test images: {sizes}.\n\n"
    shown: dict[str, Arm] = {}
    for objective, words in OBJECTIVES.items():
        shown |= {words: ("ham", objective), f"{words}+": ("ham", f"{objective}_plus")}
        shown[f"CF-{words}"] = ("ham", f"{objective}_cf")
    return text + tables(trials, shown, "dataset")


if __name__ == "__main__":
    main()

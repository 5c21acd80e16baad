"""Do counterfactuals of sex bring the two sexes nearer to each other?

    python benchmarks/subgroup.py --data-root PATH [--jobs 2]

Worlds: phantom_chest with few women, in whom the same effusion is fainter (women, sex_effect), with true
counterfactuals of sex and with an HVAE's; ham10000 as it is (needs --data-root). Arms: SimCLR; "plus", the
same counterfactuals never paired with their original; "cf", the other sex in view 1, always. Three
pre-training seeds; the arms share table, split, initial weights, order of images, geometry and look of views,
epochs, batch and labelled subset. A linear probe scores the test rows once (half of them women, on the
phantom). Disparity is |AUC of women - AUC of men|; its change is cf minus SimCLR, below 0 where the sexes
come nearer. Resumable: everything lives in content-addressed stages.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from pretraining import (
    DRAWN,
    INTERVAL,
    ONE_THREAD,
    Arm,
    Task,
    Trials,
    figures_section,
    make_all,
    minutes,
    probe,
)
from record import over_seeds, write_results

SEEDS = (0, 1, 2)
FRACTIONS = (0.1, 1.0)
HAM = (*ONE_THREAD, "train.epochs=24")
PLUS = ("views.counterfactual={view: all, shared: true, probability: 0.5}",)
SHOWN = {
    "phantom": {
        "SimCLR": ("phantom", "simclr"),
        "SimCLR+ (true counterfactuals of sex)": ("oracle", "plus"),
        "SexCF-SimCLR (true counterfactuals)": ("oracle", "cf"),
        "SimCLR+ (HVAE)": ("hvae", "plus"),
        "SexCF-SimCLR (HVAE)": ("hvae", "cf"),
    },
    "ham10000": {
        "SimCLR": ("ham", "simclr"),
        "SimCLR+ (HVAE)": ("ham", "plus"),
        "SexCF-SimCLR (HVAE)": ("ham", "cf"),
    },
}
PLAIN: dict[str, Arm] = {
    "oracle": ("phantom", "simclr"),
    "hvae": ("phantom", "simclr"),
    "ham": ("ham", "simclr"),
}


def evaluations(target: str, seed: int) -> str:
    return f"evaluate=[{probe(target, 'sex', FRACTIONS, seed)}]"


def arms(data_root: str | None) -> dict[tuple[str, str, int], Task]:
    """(world, arm, seed) -> task."""
    found: dict[tuple[str, str, int], Task] = {}
    for seed in SEEDS:
        own, made = f"train.seed={seed}", f"generator.train.seed={seed}"
        phantom = (*DRAWN, own, evaluations("disease", seed))
        found["phantom", "simclr", seed] = Task("phantom_sex_simclr.yaml", phantom)
        for name, views in (("cf", ()), ("plus", PLUS)):
            oracle = (*phantom, *views)
            found["oracle", name, seed] = Task("phantom_sex_cf_simclr_oracle.yaml", oracle)
            found["hvae", name, seed] = Task("phantom_sex_cf_simclr.yaml", (*oracle, made))
        if data_root is not None:
            ham = (f"data.root={data_root}", *HAM, own, evaluations("malignant", seed))
            found["ham", "simclr", seed] = Task("ham10000_simclr.yaml", ham)
            made_ham = (*ham, made, "generator.train.epochs=6")
            for name, views in (("cf", ()), ("plus", PLUS)):
                found["ham", name, seed] = Task("ham10000_sex_cf_simclr.yaml", (*made_ham, *views))
    return found


def changes(trials: Trials, bank: str, name: str) -> dict[str, dict[str, Any]]:
    """`NAME_disparity_change`, `NAME_accuracy_change` (the mean over the sexes), `NAME_gain_SEX`, against
    SimCLR, and `NAME_over_plus_...` against "+"; with `_10_percent` of the labels too."""
    figures = {}
    sexes = sorted(trials.auc(PLAIN[bank], "sex"))
    for fraction in FRACTIONS:
        suffix = "" if fraction == 1 else f"_{100 * fraction:g}_percent"
        for kind, other in (("", PLAIN[bank]), ("over_plus_", (bank, "plus"))):
            pair = (bank, "cf"), other, "sex"
            for where, groups in (("accuracy_change", sexes), *((f"gain_{sex}", [sex]) for sex in sexes)):
                figures[f"{name}_{kind}{where}{suffix}"] = trials.difference(*pair, groups, fraction)
            key = f"{name}_{kind}disparity_change{suffix}"
            figures[key] = trials.difference(*pair, fraction=fraction, gap=True)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data-root", help="folder with ham10000_gray64.npz; without it ham10000 is left out"
    )
    parser.add_argument("--runs", type=Path, default=Path("runs/subgroup"))
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time, one thread each")
    options = parser.parse_args()
    torch.set_num_threads(options.jobs)
    trials = Trials(arms(options.data_root), SEEDS, options.runs)
    make_all(trials.tasks.values(), options.runs, options.jobs)
    figures: dict[str, dict[str, Any]] = {}
    figures |= changes(trials, "hvae", "phantom") | changes(trials, "oracle", "phantom_oracle")
    worlds = {"phantom": "disease"}
    if options.data_root is not None:
        figures |= changes(trials, "ham", "ham")
        worlds["ham10000"] = "malignant"
    sections = []
    for world, target in worlds.items():
        text = f"## {world}: {target} AUC per sex, mean over seeds (standard deviation)\n\n"
        for fraction in reversed(FRACTIONS):
            text += (
                f"{100 * fraction:g} % of the labels\n\n{trials.auc_table(SHOWN[world], 'sex', fraction)}\n"
            )
        sections.append(text)
        for sex, values in trials.auc(SHOWN[world]["SimCLR"], "sex").items():
            figures[f"{world}_simclr_auc_{sex}"] = over_seeds(values, unit="AUC")
    sections.append(figures_section(figures))
    protocol = {
        "phantom": f"recipes/phantom_sex_*.yaml, {', '.join(DRAWN)}; 2,400 train, 600 val, 3,000 "
        "test (scanners and sexes balanced)",
        "ham10000": f"recipes/ham10000_simclr.yaml, ham10000_sex_cf_simclr.yaml, {', '.join(HAM)}, "
        "generator 6 epochs; sex as recorded",
        "views": f"cf: the recipe's; plus: {PLUS[0]}",
        "budget": "equal epochs, batch, views, initial weights and order for all arms of a seed",
        "selection": "C of the probe on validation AUC; last checkpoint",
        "disparity": "AUC of the better sex minus that of the other, found anew in every seed and resample; "
        "the change is that of cf minus that of SimCLR",
        "interval": INTERVAL,
        "time": f"sum of the stages over {options.jobs} single-threaded processes side by side",
    }
    spent = minutes(trials.jobs.values(), options.jobs)
    write_results("subgroup", figures, protocol, SEEDS, spent, "\n".join(sections))


if __name__ == "__main__":
    main()

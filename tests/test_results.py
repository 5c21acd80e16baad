"""Published figures: README equals the result files, and every result file is complete."""

from pathlib import Path

import pytest
import readme

from cfssl.files import read_json

ROOT = Path(__file__).parent.parent


def test_the_readme_shows_what_the_result_files_say() -> None:
    text = (ROOT / "README.md").read_text()
    assert readme.rewritten(text) == text, "run python benchmarks/readme.py"


@pytest.mark.parametrize(
    "path", sorted((ROOT / "benchmarks" / "results").glob("*.json")), ids=lambda path: path.stem
)
def test_every_result_names_its_script_machine_protocol_and_seeds(path: Path) -> None:
    record = read_json(path)
    assert (ROOT / "benchmarks" / f"{record['benchmark']}.py").exists()
    assert path.with_suffix(".md").exists()
    for key in ("commit", "machine", "date", "command", "minutes", "seeds", "protocol", "figures"):
        assert record[key] not in (None, "", {}), key
    for name, figure in record["figures"].items():
        assert set(figure) >= {"value", "low", "high", "unit", "seeds"}, name
        if figure["low"] is not None:
            assert figure["low"] <= figure["value"] <= figure["high"], name


OBJECTIVES, BANKS = ("simclr", "dino"), ("oracle", "hvae")
QUALITIES = ("oracle", "good", "poor", "wrong_domain", "hidden_change")
QUALITY = {
    "acquisition_shift": [
        *(
            f"{objective}_{bank}_{figure}{labels}"
            for objective in OBJECTIVES
            for bank in BANKS
            for figure in ("gain_rare", "gain_major", "over_plus_rare", "over_plus_major", "gap_change")
            for labels in ("_1_percent", "", "_100_percent")
        ),
        *(f"phantom_{arm}_auc_{scanner}" for arm in (*OBJECTIVES, "supervised") for scanner in "ABCD"),
        *(f"{objective}_ham_gain_{where}" for objective in OBJECTIVES for where in ("worst", "all_sources")),
        "hvae_scanner_effectiveness",
        "hvae_l1_ratio",
    ],
    "bank_quality": [
        *(f"gain_{bank}{gated}" for bank in QUALITIES for gated in ("", "_gated")),
        *(f"rejected_{bank}" for bank in QUALITIES),
    ],
    "subgroup": [
        f"{world}_{figure}{labels}"
        for world, sexes in {"phantom": "FM", "phantom_oracle": "FM", "ham": ("female", "male")}.items()
        for figure in ("disparity_change", "accuracy_change", *(f"gain_{sex}" for sex in sexes))
        for labels in ("", "_10_percent")
    ],
    "morphomnist_axioms": [
        "composition_1",
        "composition_10",
        "reversibility_1",
        *(
            f"{measure}_do_{variable}"
            for measure in ("thickness_mae", "intensity_mae", "digit_accuracy")
            for variable in ("thickness", "intensity", "digit")
        ),
    ],
    "generation_speed": [
        f"{network}_{name}"
        for network in ("small", "published")
        for name in ("composition_1", "thickness_mae_do_thickness", "intensity_mae_do_intensity")
    ],
    "amplification": [
        f"{world}_{name}"
        for world in ("digits", "chest")
        for name in (
            *(f"amp_{arm}" for arm in ("hard", "soft", "hard_minus_soft")),
            *(f"ceiling_excess_{arm}" for arm in ("hard", "soft")),
            "intervened_auc_hard_minus_soft",
        )
    ],
    "positional_seg": [
        f"{world}_{name}"
        for world in ("lungs", "tube")
        for name in (
            "target_error_ratio",
            "offtarget_error_ratio",
            "localisation_gain",
            "l1_to_truth_ratio",
        )
    ],
}


@pytest.mark.parametrize(
    ("name", "figure"), [(name, f) for name, figures in QUALITY.items() for f in figures]
)
def test_every_figure_of_quality_has_three_training_seeds_and_an_interval(name: str, figure: str) -> None:
    found = read_json(ROOT / "benchmarks" / "results" / f"{name}.json")["figures"][figure]
    assert len(found["seeds"]) >= 3
    assert found["value"] == pytest.approx(sum(found["seeds"]) / len(found["seeds"]))
    assert found["low"] <= found["value"] <= found["high"]


def test_committed_recipes_and_docs_name_no_machine() -> None:
    for file in [
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/*.md"),
        *ROOT.glob("recipes/*.yaml"),
        *ROOT.glob("benchmarks/**/*.md"),
    ]:
        text = file.read_text()
        assert "/home/" not in text, file
        assert "/root/" not in text, file

"""The report page of one recipe and of several holds what the result files say, also with little to show."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from cfssl.demo import run_demo
from cfssl.errors import UserError
from cfssl.evaluate import monitor
from cfssl.evaluate.groups import (
    paired_difference,
    paired_gap,
    paired_mean_of_groups,
    paired_worst_group,
)
from cfssl.evaluate.settings import ProbeSettings
from cfssl.pipeline import Pipeline
from cfssl.recipe import parse_recipe
from cfssl.sheets import bank_sheet, spread_over_domains
from cfssl.summary import (
    compare,
    curves_caption,
    differences,
    differences_of,
    print_result,
    report_of,
)
from cfssl.visualise.views import slot_names

PLAIN: dict[str, Any] = {
    "name": "plain",
    "data": {"name": "phantom_chest", "count": 240},
    "backbone": {"name": "test_resnet"},
    "train": {"epochs": 1, "batch": 48},
    "hardware": {"accelerator": "cpu"},
}
WITH_BANK: dict[str, Any] = {
    **PLAIN,
    "name": "oracle",
    "generator": {"name": "oracle", "parents": ["scanner"]},
    "bank": {"do": {"scanner": "all"}},
    "views": {"counterfactual": {"variable": "scanner"}},
    "evaluate": [{"name": "knn", "target": "disease", "by": ["scanner"], "resamples": 20}],
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


def job(runs: Path, content: dict[str, Any], **changes: Any) -> Pipeline:
    return Pipeline(parse_recipe({**content, **changes}, "test"), runs, quiet=True)


def test_a_supervised_run_without_bank_or_evaluation_has_a_page(runs: Path) -> None:
    supervised = {"name": "supervised", "target": "disease"}
    page = report_of(job(runs, PLAIN, objective=supervised, views={"count": 1}))
    text = page.read_text()
    assert "plain" in text
    assert text.count("data:image/png;base64,") == 2  # the first batch and the loss


def two_arms(runs: Path) -> dict[str, Pipeline]:
    views = {"counterfactual": {"variable": "scanner", "view": [0, 1], "shared": True}}
    return {"CF": job(runs, WITH_BANK), "plus": job(runs, WITH_BANK, name="plus", views=views)}


def test_arms_side_by_side_show_every_value_of_their_results(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arms = two_arms(runs)
    text = compare(arms, runs / "both", "Two arms").read_text()
    for arm in arms.values():
        (result,) = arm.evaluation.results()
        print_result(result)
        printed = capsys.readouterr().out
        for row in result["groups"]["scanner"]["table"].values():
            assert f"{row['auc']['value']:.3f}" in text
            assert f"{row['auc']['value']:.3f}" in printed
    assert "http://" not in text.replace("http://www.w3.org", "")


def test_every_other_arm_is_compared_with_the_first_on_the_same_test_rows(runs: Path) -> None:
    arms = two_arms(runs)
    found = differences(arms)
    first, other = (arm.evaluation.scores("knn-disease") for arm in arms.values())
    table = arms["CF"].table
    test = table.frame.iloc[first["row"]]
    scanner, patients = test["scanner"].to_numpy(), test["patient"].to_numpy()
    scores = first["y"], other["scores-1-0"], first["scores-1-0"]
    options: dict[str, Any] = {"patients": patients, "resamples": 20}
    expected = {
        "all": paired_difference(*scores, **options),
        "mean over scanner A, B, C, D": paired_mean_of_groups(*scores, scanner, list("ABCD"), **options),
        "each arm's worst scanner": paired_worst_group(*scores, scanner, **options),
        "gap between each arm's best and worst scanner": paired_gap(*scores, scanner, **options),
    }
    assert [entry["of"].split("disease, ")[1] for entry in found] == list(expected)
    for entry, difference in zip(found, expected.values(), strict=True):
        assert entry["name"] == "plus − CF"
        assert difference.items() <= entry.items()
    assert len({entry["value"] for entry in found}) == 4
    text = compare(arms, runs / "paired", "Two arms").read_text()
    for entry in found:
        shown = [f"{entry[key]:+.3f}".replace("-", "−") for key in ("value", "low", "high")]
        assert all(figure in text for figure in shown)
    assert "one training seed, so they exclude the variance between training runs" in text
    assert differences({"CF": arms["CF"]}) == []


def test_images_of_a_patient_count_as_one_in_every_difference() -> None:
    rng = np.random.default_rng(0)
    patient = np.arange(400) // 4  # four copies of each image
    y, noise = patient % 2, rng.normal(size=(2, 100))[:, patient]
    one, two = (np.stack([-score, score], axis=1) for score in noise + y)
    frame = pd.DataFrame({"patient": patient, "scanner": np.array(["A", "B"])[patient // 2 % 2]})
    settings = ProbeSettings("knn", "disease", by=("scanner",), resamples=400)
    widths = []
    for group in (None, "patient"):
        table: Any = SimpleNamespace(group=group, frame=frame)
        arrays = [{"row": np.arange(400), "y": y, "scores-1-0": scores} for scores in (one, two)]
        widths.append([entry["high"] - entry["low"] for entry in differences_of(settings, table, *arrays)])
    np.testing.assert_allclose(np.divide(*widths[::-1]), [2, 2, 2, 2], rtol=0.25)


def test_an_evaluation_that_only_one_arm_has_is_not_compared(runs: Path) -> None:
    evaluation = {**WITH_BANK["evaluate"][0], "target": "sex", "by": []}
    arms = {"CF": job(runs, WITH_BANK), "other": job(runs, WITH_BANK, name="other", evaluate=[evaluation])}
    assert differences(arms) == []


def test_a_subset_of_the_labels_is_named_where_arms_are_compared(runs: Path) -> None:
    evaluation = {**WITH_BANK["evaluate"][0], "by": [], "fractions": [0.5, 0.25], "seeds": [7, 8]}
    arms = {name: job(runs, WITH_BANK, name=name, evaluate=[evaluation]) for name in ("one", "two")}
    (found,) = differences(arms)
    assert found["of"] == "k nearest neighbours of disease, 50 % of the labels (seeds 7, 8), all"


def test_losses_of_different_tasks_are_said_to_be_no_comparison(runs: Path) -> None:
    arms = list(two_arms(runs).values())
    assert "a lower curve does not mean a better encoder" in curves_caption(arms)
    again = job(runs, WITH_BANK, name="again", train={**WITH_BANK["train"], "seed": 1})
    assert curves_caption([arms[0], again]) == "Loss of the pre-training."


def test_the_report_says_what_a_monitor_warned_of(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitor, "SMALLEST_STD", 10.0)
    watched = job(runs, PLAIN, name="watched", monitor={}, train={"epochs": 1, "batch": 48, "seed": 5})
    text = report_of(watched).read_text()
    assert "Warning: complete collapse of watched, from step 2 on." in text
    assert "what the monitor saw" in text


def test_a_value_without_interval_is_printed_with_the_reason(capsys: pytest.CaptureFixture[str]) -> None:
    reason = "a class is absent from 15 of 20 resamples"
    row = {"n": 4, "auc": {"value": 0.75, "low": None, "high": None, "reason": reason}}
    empty = {"n": 1, "auc": {"value": None, "low": None, "high": None, "reason": "no row of class 1"}}
    result = {
        "evaluation": "knn",
        "target": "disease",
        "metrics": ["auc"],
        "protocol": {"label_fraction": 1.0},
        "overall": row,
        "groups": {"g": {"table": {"few": row, "one": empty}, "worst": {"auc": None}, "gap": {"auc": None}}},
    }
    print_result(result)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split(maxsplit=1) == ["all", f"0.750  ({reason})  n 4"]
    assert lines[2].split(maxsplit=2) == ["g", "few", f"0.750  ({reason})  n 4"]
    assert lines[3].split(maxsplit=2) == ["g", "one", "-      (no row of class 1)  n 1"]


def test_the_sheet_takes_patients_from_every_scanner_in_turn(runs: Path, tmp_path: Path) -> None:
    shown = job(runs, WITH_BANK)
    items = spread_over_domains(shown.generation.bank, shown.table, 8)
    scanners = shown.table.frame["scanner"].to_numpy()[shown.generation.bank.rows[items]]
    assert sorted(set(scanners)) == ["A", "B", "C", "D"]
    assert len(np.unique(items)) == 8
    bank_sheet(shown, tmp_path / "sheet.png", items=4)
    assert (tmp_path / "sheet.png").stat().st_size > 10_000
    assert slot_names(shown.generation.bank) == ["real", *(f"do(scanner={name})" for name in "ABCD")]
    with pytest.raises(UserError, match="holds real images only"):
        bank_sheet(job(runs, PLAIN), tmp_path / "none.png")


@pytest.mark.slow
def test_the_demo_compares_three_arms_that_differ_in_their_views_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["data.count=400", "generator.train.epochs=1", "train.epochs=1", "hardware.accelerator=cpu"]
    page = run_demo(tmp_path, small, quiet=True)
    text, printed = page.read_text(), capsys.readouterr().out
    for arm in ("SimCLR", "SimCLR+", "CF-SimCLR"):
        assert f"\n{arm}: " in printed
    assert printed.count("linear_probe of disease") == 3
    assert "scanner D" in printed
    assert text.count("data:image/png;base64,") == 5  # counterfactuals, three first batches, losses
    stages = [path.name.split("-")[0] for path in (tmp_path / "stages").iterdir()]
    shared = {stage: stages.count(stage) for stage in ("table", "generator", "bank", "encoder")}
    assert shared == {"table": 1, "generator": 1, "bank": 1, "encoder": 3}

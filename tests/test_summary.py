"""The report page of one recipe and of several holds what the result files say, also with little to show."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cfssl.demo import run_demo
from cfssl.errors import UserError
from cfssl.pipeline import Pipeline
from cfssl.recipe import parse_recipe
from cfssl.summary import bank_sheet, compare, print_result, report_of, slot_names, spread_over_domains

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


def test_arms_side_by_side_show_every_value_of_their_results(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arms = {
        "CF": job(runs, WITH_BANK),
        "plus": job(
            runs,
            WITH_BANK,
            name="plus",
            views={"counterfactual": {"variable": "scanner", "view": [0, 1], "shared": True}},
        ),
    }
    text = compare(arms, runs / "both", "Two arms").read_text()
    for arm in arms.values():
        (result,) = arm.evaluations()
        print_result(result)
        printed = capsys.readouterr().out
        for row in result["groups"]["scanner"]["table"].values():
            assert f"{row['auc']['value']:.3f}" in text
            assert f"{row['auc']['value']:.3f}" in printed
    assert "http://" not in text.replace("http://www.w3.org", "")


def test_the_sheet_takes_patients_from_every_scanner_in_turn(runs: Path, tmp_path: Path) -> None:
    shown = job(runs, WITH_BANK)
    items = spread_over_domains(shown.bank, shown.table, 8)
    scanners = shown.table.frame["scanner"].to_numpy()[shown.bank.rows[items]]
    assert sorted(set(scanners)) == ["A", "B", "C", "D"]
    assert len(np.unique(items)) == 8
    bank_sheet(shown, tmp_path / "sheet.png", items=4)
    assert (tmp_path / "sheet.png").stat().st_size > 10_000
    assert slot_names(shown.bank) == ["real", *(f"do(scanner={name})" for name in "ABCD")]
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

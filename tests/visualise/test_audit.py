"""The audit's page holds every figure; its pictures show signs, marks and reasons, and no mathematics."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

from cfssl.evaluate.amplification import Judged, Verdicts, amplification
from cfssl.evaluate.bootstrap import mean_figure, mean_figures
from cfssl.scm.graph import CausalGraph
from cfssl.seeds import numpy_generator
from cfssl.visualise import COLOURS
from cfssl.visualise.audit import audit_tables, axiom_panels, markdown, write_audit
from cfssl.visualise.audit_figures import (
    LEAST_SCALE,
    MARK,
    Bar,
    Panel,
    amplification_map,
    coloured,
    draw_bars,
    sharpness_plot,
    unrelated_discrete,
)
from cfssl.visualise.cells import Cell, Table

GRAPH = CausalGraph({"finding": ["age"]}, ("age", "sex$_{", "finding"), ("sex$_{", "finding"))
NAMES = ("sex$_{", "finding")


def two(logits: np.ndarray) -> np.ndarray:
    probability = 1 / (1 + np.exp(-logits))
    return np.stack([1 - probability, probability], axis=1)


def amplified(push: float) -> dict[str, Any]:
    """do(age) with its descendant; do(sex=F) gives every image one class, and pushes the finding."""
    rng, count = numpy_generator("audit"), 200
    target: dict[str, np.ndarray] = {name: rng.integers(0, 2, count) for name in NAMES}
    target["age"] = rng.uniform(20, 80, count)
    logits = {name: rng.normal(size=count) + (2 * target[name] - 1) for name in NAMES}
    seen = {"age": target["age"] + 3, **{name: two(logits[name]) for name in NAMES}}
    pushed = two(logits["finding"] + push * (2 * target["finding"] - 1))
    female = {**target, "sex$_{": np.ones(count, dtype=np.int64)}
    verdicts = Verdicts(
        Judged(seen, target),
        {
            "sex$_{=F": Judged({**seen, "finding": pushed}, female, ("sex$_{",)),
            "age": Judged(seen, {**target, "age": target["age"] + 1}, ("age",)),
        },
    )
    return amplification(GRAPH, verdicts, units={"age": "years"}, ceilings={"finding": 0.8}, resamples=40)


def record(push: float = 1.5) -> dict[str, Any]:
    rng = numpy_generator("record")
    some = {key: rng.uniform(0.1, 0.9, 50) for key in "abcdef"}
    truth = mean_figures(
        {
            "l1": some["a"],
            "l1_unchanged": 3 + some["a"],
            "effectiveness": some["b"],
            "amplification": some["c"],
        },
        resamples=40,
    )
    areas = {
        "target": {"percent": mean_figure(some["d"], resamples=40)},
        "others": {"percent": mean_figure(some["e"], resamples=40)},
        "localisation_ratio": mean_figure(np.full(50, np.nan), undefined="nothing changed in any image"),
        "leakage": mean_figure(some["f"], resamples=40),
    }
    return {
        "axioms": mean_figures({"composition 1": some["a"], "reversibility 1, do(age)": some["b"]}),
        "amplification": amplified(push),
        "truth": {"age": truth},
        "areas": {"sex$_{=F": areas},
    }


def shown(value: float, decimals: int) -> str:
    return f"{value:.{decimals}f}".replace("-", "−")


def test_the_page_and_the_markdown_hold_every_figure_and_every_picture(tmp_path: Path) -> None:
    found = json.loads(json.dumps(record(), allow_nan=False))
    page = write_audit(found, tmp_path, provenance={"generator": "hvae"})
    html, text = page.read_text(encoding="utf-8"), (tmp_path / "audit.md").read_text(encoding="utf-8")
    assert html.count("<img src=") == 5
    assert {path.name for path in tmp_path.iterdir()} == {
        "audit.html",
        "audit.md",
        "amplification.png",
        "axioms.png",
        "truth.png",
        "areas.png",
        "sharpness.png",
    }
    for do, row in found["amplification"]["matrix"].items():
        assert f"do({do})" in html
        for name, cell in row.items():
            if (value := cell["change"]["value"]) is not None:
                assert shown(value, 2 if name == "age" else 1) in html
                assert shown(value, 2 if name == "age" else 1) in text
    entries = [*found["axioms"].values(), found["truth"]["age"]["effectiveness"]]
    entries += [found["areas"]["sex$_{=F"][key] for key in ("leakage",)]
    for entry in entries:
        for key in ("value", "low", "high"):
            assert shown(entry[key], 3) in html
            assert shown(entry[key], 3) in text
    for reason in ("nothing changed in any image", "the targets of sex$_{ lack class 0"):
        assert reason in html
        assert reason in text
    assert "They know nothing of other training runs." in html


def test_a_record_without_truth_and_areas_has_no_pictures_of_them(tmp_path: Path) -> None:
    whole = record()
    write_audit({key: whole[key] for key in ("axioms", "amplification")}, tmp_path)
    assert not (tmp_path / "truth.png").exists()
    assert not (tmp_path / "areas.png").exists()
    assert "Against the truth" not in (tmp_path / "audit.html").read_text(encoding="utf-8")


def test_the_map_is_as_red_for_a_rise_as_it_is_blue_for_a_fall_and_pale_where_nothing_changes(
    tmp_path: Path,
) -> None:
    def cell(change: float) -> tuple[int, int, int]:
        entry = {"value": change, "low": change, "high": change}
        one = {"relation": "unrelated", "unit": "AUC points", "change": entry, "accuracy": entry}
        table = {
            "attributes": {"a": {"kind": "discrete", "unit": "AUC points"}},
            "matrix": {"do": {"a": one}},
        }
        amplification_map(tmp_path / "map.png", table)
        pixels = np.array(Image.open(tmp_path / "map.png").convert("RGB"))
        # the cell's corner: to the right of its left edge, far from the words
        row = pixels[int(pixels.shape[0] * 0.3)]
        inside = [tuple(map(int, colour)) for colour in row if tuple(colour) != (255, 255, 255)]
        red, green, blue = max(set(inside), key=inside.count)
        return red, green, blue

    rise, fall, none = cell(20.0), cell(-20.0), cell(0.0)
    assert rise[0] > rise[2] + 50
    assert fall[2] > fall[0] + 50
    assert max(none) - min(none) < 12
    assert min(none) > 220


def test_colours_end_at_the_largest_change_that_was_not_asked_for() -> None:
    def cell(relation: str, change: float | None) -> dict[str, Any]:
        return {"relation": relation, "change": {"value": change}}

    attributes = {"a": {"kind": "discrete"}, "b": {"kind": "discrete"}, "age": {"kind": "continuous"}}
    row = {"a": cell("intervened", -40.0), "b": cell("unrelated", -8.0), "age": cell("unrelated", 90.0)}
    values, end = coloured({"attributes": attributes, "matrix": {"a": row}})
    assert values[0].tolist() == pytest.approx([-40.0, -8.0, np.nan], nan_ok=True)
    assert end == 8
    quiet = {"a": cell("intervened", None), "b": cell("unrelated", 0.3), "age": cell("unrelated", None)}
    values, end = coloured({"attributes": attributes, "matrix": {"a": quiet}})
    assert np.isnan(values[0, 0])
    assert end == LEAST_SCALE


def test_what_the_judge_sees_is_read_beside_what_it_sees_in_real_images() -> None:
    panels = axiom_panels({"amplification": amplified(0.0)})
    assert [panel.title.split(",")[0] for panel in panels] == ["age", *NAMES]
    assert [bar.reference for bar in panels[0].bars] == pytest.approx([3.0, 3.0])
    assert panels[0].unit == "mean absolute error, years"


def test_bars_show_their_value_their_mark_and_the_reason_of_a_missing_one(tmp_path: Path) -> None:
    known = {"value": 2.0, "low": 1.5, "high": 2.5}
    missing = {"value": None, "low": None, "high": None, "reason": "nothing changed"}
    colour = COLOURS[0]
    sizes = {}
    for name, entry in (("known", known), ("missing", missing)):
        path = tmp_path / f"{name}.png"
        draw_bars(path, [Panel("title $x_{", "unit", [Bar("_a", entry, 3.0, colour)], mark="real")])
        pixels = np.array(Image.open(path).convert("RGB"), np.float64) / 255
        blended = 0.85 * np.array(to_rgb(colour)) + 0.15
        sizes[name] = [
            int((np.abs(pixels - np.array(shade)).max(2) < 0.03).sum()) for shade in (blended, to_rgb(MARK))
        ]
    assert sizes["known"][0] > 500
    assert sizes["known"][1] > 20
    assert sizes["missing"][0] == 0


def test_sharpness_has_a_panel_for_every_attribute_that_a_do_should_leave_alone(tmp_path: Path) -> None:
    result = amplified(1.5)
    assert unrelated_discrete(result) == list(NAMES)
    sharpness_plot(tmp_path / "sharpness.png", result)
    assert Image.open(tmp_path / "sharpness.png").size[0] > 500


def test_markdown_escapes_bars_and_numbers_its_footnotes() -> None:
    table = Table("T", [("a|b", ("n = 3",))], [("x|y", [Cell("1.0", "[0, 2]", "why")])], "corner")
    lines = markdown(table).split("\n")
    assert lines[2] == r"| corner | a\|b (n = 3) |"
    assert lines[4] == r"| x\|y | 1.0 [0, 2] [1] |"
    assert "1. why" in lines


def test_every_table_has_a_cell_for_every_column() -> None:
    tables = audit_tables(record())
    assert [table.title for table in tables] == [
        "Change of what the judge sees",
        "Unrelated attributes, image by image",
        "Axioms",
        "Against the truth",
        "Areas",
    ]
    for table in tables:
        assert {len(cells) for _, cells in table.rows} == {len(table.columns)}
        rows = re.findall(r"^\|.*\|$", markdown(table), flags=re.M)
        assert len(rows) == len(table.rows) + 2

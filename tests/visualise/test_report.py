"""The page holds every figure of the results, loads nothing, and keeps users' words from becoming HTML."""

import base64
import copy
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cfssl.errors import UserError
from cfssl.evaluate.groups import paired_difference, report
from cfssl.visualise.evaluation_tables import Arm
from cfssl.visualise.report import Picture, Report, write_report

VOID = {"meta", "img", "line", "rect", "br", "link", "input", "hr"}
METRICS = ("auc", "macro_f1")


class Page(HTMLParser):
    """The tree as these tests need it: tags closed in order, attributes, text, and table rows as lists."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.rows: list[list[str]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.texts.append(data.strip())
        if self.open and ("td" in self.open or "th" in self.open):
            self.rows[-1][-1] = f"{self.rows[-1][-1]} {data.strip()}".strip()

    @property
    def text(self) -> str:
        return " ".join(filter(None, self.texts))


Y = np.arange(120) % 2
SCANNER = np.array(list("AABB"))[np.arange(120) % 4]


def scores(lift: float, seed: int) -> np.ndarray:
    positive = 1 / (1 + np.exp(-(np.random.default_rng(seed).normal(size=120) + lift * Y)))
    return np.stack([1 - positive, positive], axis=1)


def result(
    lift: float, seed: int, name: str = "linear_probe", fraction: float = 1.0, by: bool = True
) -> dict[str, Any]:
    found = report(Y, scores(lift, seed), {"scanner": SCANNER} if by else {}, METRICS, resamples=50)
    return {
        "evaluation": name,
        "target": "disease",
        "metrics": list(METRICS),
        "protocol": {
            "C": 0.1 * seed,
            "label_fraction": fraction,
            "intervals": "95 %, bootstrap, 50 resamples",
        },
        "data": {"table": "phantom", "fingerprint": "0123abcd"},
        "seeds": {"labels": 0, "bootstrap": 0},
        "n": found["n"],
        "overall": found["overall"],
        "groups": found["groups"],
    }


def page_of(tmp_path: Path, **parts: Any) -> Page:
    write_report(Report("Title", "Subtitle", **parts), tmp_path / "report.html")
    return Page((tmp_path / "report.html").read_text(encoding="utf-8"))


def shown(value: float) -> str:
    return f"{value:.3f}".replace("-", "−")


def figures(node: Any) -> list[float]:
    """Every value, low and high of nested results."""
    if isinstance(node, dict):
        own = [node[key] for key in ("value", "low", "high") if isinstance(node.get(key), float)]
        return own + [figure for value in node.values() for figure in figures(value)]
    return []


def test_every_figure_of_every_result_is_on_the_page(tmp_path: Path) -> None:
    results = [
        [result(lift, lift), result(lift, lift, fraction=0.1), result(lift, lift, "knn")] for lift in (1, 2)
    ]
    page = page_of(tmp_path, arms=[Arm("SimCLR", "plain", results[0]), Arm("CF-SimCLR", "ours", results[1])])
    expected = [figure for of_arm in results for entry in of_arm for figure in figures(entry)]
    assert len(expected) > 100
    assert [figure for figure in expected if shown(figure) not in page.text] == []
    assert "95 %, bootstrap, 50 resamples" in page.text
    assert "SimCLR: 0.1; CF-SimCLR: 0.2" in page.text  # the setting in which the arms' protocols differ


def test_only_the_first_metric_on_all_labels_is_in_sight(tmp_path: Path) -> None:
    results = [result(1, 1, fraction=0.1), result(1, 1)]
    page_of(tmp_path, arms=[Arm("SimCLR", "", results)])
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    in_sight = re.sub(r"<details>.*?</details>", "", text, flags=re.DOTALL)
    assert re.findall("<caption>(.*)</caption>", in_sight) == ["AUC by share of the labels", "AUC by scanner"]
    assert len(re.findall("<caption>", text)) == 5  # 2 metrics, 2 label fractions, and over the fractions


def test_several_seeds_are_shown_as_their_mean_and_standard_deviation(tmp_path: Path) -> None:
    results = [result(lift, lift, fraction=0.1) | {"seeds": {"labels": lift}} for lift in (1, 2, 3)]
    arms = [Arm("SimCLR", "", [result(2, 4), *results]), Arm("other", "", [result(1, 5)])]
    page = page_of(tmp_path, arms=arms)
    _, row, other = page.rows[:3]  # by share of the labels: 10 %, 100 %
    values = [one["overall"]["auc"]["value"] for one in results]
    cell = f"{shown(np.mean(values))} ± {shown(np.std(values, ddof=1))}"
    whole = {key: shown(value) for key, value in result(2, 4)["overall"]["auc"].items()}
    assert row == ["SimCLR", cell, "{value} [{low}, {high}]".format(**whole)]
    assert other[1].startswith("—")
    in_b = [one["groups"]["scanner"]["table"]["B"]["macro_f1"]["value"] for one in results]
    assert f"{shown(np.mean(in_b))} ± {shown(np.std(in_b, ddof=1))}" in page.text
    assert "AUC by scanner, 10 % of the labels, mean and standard deviation over seeds 1, 2, 3" in page.text


def test_seeds_that_are_not_those_of_the_training_are_called_what_they_are(tmp_path: Path) -> None:
    arms = [[scores(lift, seed) for seed in range(3)] for lift in (2, 1)]
    difference = paired_difference(Y, *arms, resamples=50)
    comparison = {"name": "a − b", "of": "all", "unit": "AUC", "seeds_of": "downstream", **difference}
    page = page_of(tmp_path, comparisons=[comparison])
    assert "and from the spread of the 3 downstream seeds. There is one training seed" in page.text


def test_cells_stand_below_their_group_and_beside_their_arm(tmp_path: Path) -> None:
    entry = result(1, 1)
    page = page_of(tmp_path, arms=[Arm("SimCLR", "", [entry])])
    heading, row = page.rows[:2]
    content = entry["groups"]["scanner"]
    assert heading[:2] == ["arm", "all n = 120 60 positive"]
    assert heading[2:] == [
        "A n = 60 30 positive",
        "B n = 60 30 positive",
        "worst scanner",
        "gap highest minus lowest",
    ]
    cells = [entry["overall"], *content["table"].values()]
    expected = [
        "{value} [{low}, {high}]".format(**{k: shown(v) for k, v in cell["auc"].items()}) for cell in cells
    ]
    gap = content["gap"]["auc"]
    worst = f"{content['worst']['auc']['group']} {shown(content['worst']['auc']['value'])}"
    expected += [worst, f"{shown(gap['value'])} [{shown(gap['low'])}, {shown(gap['high'])}]"]
    assert row == ["SimCLR", *expected]


def test_the_page_loads_nothing_and_runs_nothing(tmp_path: Path) -> None:
    Image.new("RGB", (3, 2), (10, 20, 30)).save(tmp_path / "picture.png")
    picture = Picture("A picture", "Its caption", tmp_path / "picture.png")
    page = page_of(tmp_path, pictures=[picture], arms=[Arm("a", "", [result(1, 1)])])
    addresses = [
        value for _, given in page.tags for name, value in given.items() if name in ("src", "href", "srcset")
    ]
    (address,) = addresses
    assert address is not None
    kind, content = address.split(",")
    assert kind == "data:image/png;base64"
    assert base64.b64decode(content) == (tmp_path / "picture.png").read_bytes()
    text = (tmp_path / "report.html").read_text(encoding="utf-8").replace(address, "")
    assert not re.search(r"https?://|url\(|@import|<script|<link|\son\w+=", text)


def test_words_of_users_are_never_html(tmp_path: Path) -> None:
    evil = "<script>alert('x')</script>\"><img src=x>"
    Image.new("L", (2, 2)).save(tmp_path / "picture.png")
    entry = result(1, 1)
    entry["target"] = evil
    entry["groups"] = {evil: entry["groups"]["scanner"]}
    table = entry["groups"][evil]["table"]
    table[evil] = table.pop("A")
    table["B"]["auc"] = {"value": None, "low": None, "high": None, "reason": evil}
    page = page_of(
        tmp_path,
        arms=[Arm(evil, evil, [entry])],
        pictures=[Picture(evil, evil, tmp_path / "picture.png")],
        comparisons=[
            {"name": evil, "of": evil, "unit": evil, "value": 0.1, "low": 0.0, "high": 0.2, "seeds": [0.1]}
        ],
        provenance={evil: {evil: [evil]}},
        recipe_text=evil,
    )
    assert "script" not in [tag for tag, _ in page.tags]
    assert len([tag for tag, _ in page.tags if tag == "img"]) == 1
    assert page.text.count(evil) > 10


def test_a_missing_value_is_a_dash_with_its_reason_below(tmp_path: Path) -> None:
    entry = result(1, 1)
    content = entry["groups"]["scanner"]
    reason = "no row of class 1 among 60 rows"
    content["table"]["B"]["auc"] = {"value": None, "low": None, "high": None, "reason": reason}
    content["worst"]["auc"], content["gap"]["auc"] = {"group": "A", "value": 0.75}, None
    page = page_of(tmp_path, arms=[Arm("SimCLR", "", [entry])])
    assert page.rows[1][3:] == ["— 1", "A 0.750", "— 2"]
    assert reason in page.text
    assert ("td", {"title": reason}) in page.tags


def test_an_arm_without_an_evaluation_says_so(tmp_path: Path) -> None:
    arms = [Arm("one", "", [result(1, 1), result(1, 1, "knn", by=False)]), Arm("two", "", [result(2, 2)])]
    assert ["two", "not evaluated"] in page_of(tmp_path, arms=arms).rows


def test_only_differences_whose_interval_excludes_0_are_bold(tmp_path: Path) -> None:
    unit = {"unit": "AUC", "of": "all", "seeds": [0.02]}
    comparisons = [
        {"name": "up", "value": 0.02, "low": 0.01, "high": 0.03, **unit},
        {"name": "down", "value": -0.02, "low": -0.03, "high": -0.01, **unit},
        {"name": "unclear", "value": 0.02, "low": -0.01, "high": 0.05, **unit},
        {"name": "touching", "value": 0.02, "low": 0.0, "high": 0.05, **unit},
        {"name": "unknown", "value": None, "low": None, "high": None, "reason": "a class is absent", **unit},
        {"name": "bare", "value": 0.5, "low": None, "high": None, **unit},
    ]
    page = page_of(tmp_path, comparisons=comparisons)
    assert [row[:3] + row[4:5] for row in page.rows[1:]] == [
        ["up all", "+0.020", "[+0.010, +0.030]", "above 0"],
        ["down all", "−0.020", "[−0.030, −0.010]", "below 0"],
        ["unclear all", "+0.020", "[−0.010, +0.050]", "contains 0"],
        ["touching all", "+0.020", "[+0.000, +0.050]", "contains 0"],
        ["unknown all", "— 1", "—", "no value"],
        ["bare all", "+0.500 2", "—", "no interval"],
    ]
    bold = [given for tag, given in page.tags if tag == "td" and given.get("class") == "apart"]
    assert len(bold) == 2


def test_paired_differences_as_the_evaluation_makes_them_are_taken(tmp_path: Path) -> None:
    arms = [[scores(lift, seed) for seed in (1, 2, 3)] for lift in (2, 1)]
    difference = paired_difference(Y, *arms, resamples=50)
    page = page_of(tmp_path, comparisons=[{"name": "a − b", "of": "all", "unit": "AUC", **difference}])
    assert f"+{difference['value']:.3f}" in page.rows[1][1]
    assert "spread of the 3 training seeds" in page.text
    assert "one training seed" not in page.text


def test_what_intervals_leave_out_is_said(tmp_path: Path) -> None:
    whole, subset = result(1, 1), result(1, 1, fraction=0.1)
    subset["protocol"]["intervals"] += "; the variance between label subsets is not in them"
    one = paired_difference(Y, scores(2, 1), scores(1, 1), resamples=50)
    comparisons = [{"name": "a − b", "of": "all", "unit": "AUC", **one}]
    page = page_of(tmp_path, arms=[Arm("SimCLR", "", [whole, subset])], comparisons=comparisons)
    assert "one training seed, so they exclude the variance between training runs" in page.text
    assert "Each arm is one training run: the variance between training runs is not in them" in page.text
    assert (
        "Intervals of label subsets: 95 %, bootstrap, 50 resamples; the variance between label" in page.text
    )
    alone = page_of(tmp_path, arms=[Arm("SimCLR", "", [whole])])
    assert "label subsets" not in alone.text.replace("Other metrics and label subsets", "")


def test_provenance_and_recipe_are_shown_whole(tmp_path: Path) -> None:
    provenance = {
        "seeds": [0, 1],
        "git": {"commit": "abc", "dirty": False},
        "minutes": 1.5,
        "grid": [{"C": 1}],
        "gpu": None,
    }
    page = page_of(tmp_path, provenance=provenance, recipe_text="name: x\ntrain: {epochs: 5}\n")
    for words in ("0, 1", "commit abc, dirty no", "1.5", "C 1", "—", "name: x\ntrain: {epochs: 5}"):
        assert words in page.texts


def test_results_on_different_data_are_not_put_into_one_table(tmp_path: Path) -> None:
    other = copy.deepcopy(result(2, 2))
    other["data"]["fingerprint"] = "ffff0000"
    with pytest.raises(UserError, match="ffff0000"):
        page_of(tmp_path, arms=[Arm("one", "", [result(1, 1)]), Arm("two", "", [other])])
    other = copy.deepcopy(result(2, 2))
    other["groups"]["scanner"]["table"]["A"]["n"] += 1
    with pytest.raises(UserError, match="different test rows"):
        page_of(tmp_path, arms=[Arm("one", "", [result(1, 1)]), Arm("two", "", [other])])
    with pytest.raises(UserError, match="two results"):
        page_of(tmp_path, arms=[Arm("one", "", [result(1, 1)]), Arm("one", "", [result(1, 1)])])


def test_a_missing_or_foreign_picture_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere.png does not exist"):
        page_of(tmp_path, pictures=[Picture("", "", tmp_path / "nowhere.png")])
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(UserError, match="neither PNG nor JPEG"):
        page_of(tmp_path, pictures=[Picture("", "", tmp_path / "text.png")])
    assert not (tmp_path / "report.html").exists()

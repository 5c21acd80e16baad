"""What a recipe asks of a table is refused in one sentence each before anything is trained."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from cfssl.agreement import check_against_table
from cfssl.data.prepare import save_prepared
from cfssl.data.regions import AreaSpec
from cfssl.data.table import Attribute, ImageTable
from cfssl.errors import UserError
from cfssl.experiment import Recipe
from cfssl.recipe import parse_recipe

GRADES = ("none", "mild", "severe")
SPLIT = np.repeat(["train", "val", "test"], 30)


def recipe(*targets: str) -> Recipe:
    content: dict[str, Any] = {
        "name": "toy",
        "data": {"name": "table", "root": ".", "path": "toy.csv"},
        "backbone": {"name": "test_resnet"},
        "train": {"batch": 8},
        "evaluate": [{"name": "linear_probe", "target": target} for target in targets],
    }
    return parse_recipe(content, "toy")


def table_of(folder: Path, grade: np.ndarray) -> ImageTable:
    frame = pd.DataFrame({"grade": grade, "split": SPLIT, "age": np.linspace(20, 80, 90)})
    attributes = {
        "grade": Attribute("grade", "categorical", GRADES),
        "age": Attribute("age", "continuous"),
    }
    images = np.arange(90 * 16, dtype=np.uint16).reshape(90, 1, 4, 4)  # no two alike
    return save_prepared(folder, "toy", frame, attributes, images)


def grades() -> np.ndarray:
    return np.array(GRADES, dtype=object)[np.arange(90) % 3]


def test_a_target_with_every_category_in_every_split_is_taken(tmp_path: Path) -> None:
    grade = grades()
    grade[:20] = None  # missing targets are no obstacle where others are known
    check_against_table(recipe("grade"), table_of(tmp_path / "t", grade))


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_a_category_that_a_split_lacks_is_named_with_the_split(tmp_path: Path, split: str) -> None:
    grade = grades()
    grade[(split == SPLIT) & (grade == "severe")] = None
    with pytest.raises(UserError) as caught:
        check_against_table(recipe("grade"), table_of(tmp_path / "t", grade))
    expected = f"evaluate[0].target = 'grade': no {split} image is 'severe'; every category is needed"
    assert expected in str(caught.value)
    assert str(caught.value).count("\n  - ") == 1


def test_a_split_without_any_known_target_is_named(tmp_path: Path) -> None:
    grade = grades()
    grade[SPLIT == "test"] = None
    with pytest.raises(UserError, match="no test image has a known 'grade'"):
        check_against_table(recipe("grade"), table_of(tmp_path / "t", grade))


def test_unknown_and_continuous_targets_are_refused_by_their_own_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        check_against_table(recipe("grad", "age"), table_of(tmp_path / "t", grades()))
    message = str(caught.value)
    assert "evaluate[0].target = 'grad': no such attribute; the nearest is 'grade'" in message
    assert "evaluate[1].target = 'age': is continuous, expected binary or categorical" in message


@pytest.mark.parametrize(
    ("generator", "do", "sentence"),
    [
        ({"balance": "agee"}, {"grade": "all"}, "balance"),
        ({"balance": "age"}, {"grade": "all"}, "balance"),
        ({"graph": {"grade": ["age"], "age": ["grade"]}}, {"grade": "all"}, "cycle"),
        ({"train": {"batch": 31}}, {"grade": "all"}, "generator.train.batch = 31: only 30 training images"),
        ({"graph": {"age": ["grade"]}, "parents": ["grade"]}, {"age": [50.0]}, "do"),
    ],
)
def test_a_generator_that_cannot_work_is_refused(
    tmp_path: Path, generator: dict[str, Any], do: dict[str, Any], sentence: str
) -> None:
    frame = pd.DataFrame({"grade": grades(), "split": SPLIT, "age": np.linspace(20, 80, 90)})
    attributes = {
        "grade": Attribute("grade", "categorical", GRADES),
        "age": Attribute("age", "continuous"),
    }
    images = np.random.default_rng(0).integers(0, 256, (90, 1, 32, 32), dtype=np.uint8)
    table = save_prepared(tmp_path / "t", "toy", frame, attributes, images)

    def asked(own: dict[str, Any], do: dict[str, Any]) -> Recipe:
        content = recipe().model_dump(mode="json")
        network = {"name": "small", "widths": [4, 4, 4, 4], "latents": [1, 1, 1]}
        hvae = {"name": "hvae", "parents": ["grade"], "network": network, **own}
        return parse_recipe(content | {"generator": hvae, "bank": {"do": do}}, "toy")

    check_against_table(asked({"train": {"batch": 30}}, {"grade": "all"}), table)
    with pytest.raises(UserError, match=sentence):
        check_against_table(asked(generator, do), table)


GUIDED: dict[str, Any] = {
    "generator": {
        "name": "hvae",
        "parents": ["grade", "lung_area"],
        "network": {"name": "small", "widths": [4, 4, 4, 4], "latents": [1, 1, 1]},
        "train": {"batch": 30},
    },
    "finetune": {
        "rules": [
            {"name": "soft", "guide": {"attributes": ["grade"], "train": {"batch": 30}}},
            {"name": "pos_seg", "guide": {"structures": ["lung"], "train": {"batch": 30}}},
        ],
        "train": {"batch": 30},
    },
    "bank": {"do": {"lung_area": [20.0]}},
    "audit": {
        "judge": {"attributes": ["age"], "train": {"batch": 30}},
        "segmentor": {"structures": ["lung"], "train": {"batch": 30, "seed": 1}},
    },
}


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> ImageTable:
    """With a mask whose area is an attribute, under two names."""
    rng = np.random.default_rng(0)
    masks = (rng.random((90, 1, 32, 32)) < 0.3).astype(np.uint8)
    area = 100 * masks.mean((1, 2, 3))
    ages = np.linspace(20, 80, 90)
    frame = pd.DataFrame({"grade": grades(), "split": SPLIT, "age": ages, "lung_area": area})
    frame["again_area"] = area
    attributes = {
        "grade": Attribute("grade", "categorical", GRADES),
        "age": Attribute("age", "continuous"),
        "lung_area": Attribute("lung_area", "continuous"),
        "again_area": Attribute("again_area", "continuous"),
    }
    images = rng.integers(0, 256, (90, 1, 32, 32), dtype=np.uint8)
    areas = dict.fromkeys(("lung_area", "again_area"), AreaSpec("lung", "whole", "whole"))
    folder = tmp_path_factory.mktemp("measured") / "t"
    return save_prepared(folder, "toy", frame, attributes, images, masks, ("lung",), areas=areas)


def guided(**changes: Any) -> Recipe:
    """The recipe with values replaced at dotted paths (`__` between keys)."""
    content = recipe().model_dump(mode="json") | json.loads(json.dumps(GUIDED))
    for path, value in changes.items():
        *above, last = [int(part) if part.isdigit() else part for part in path.split("__")]
        node = content
        for part in above:
            node = node[part]
        node[last] = value
    return parse_recipe(content, "toy")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"audit__judge__attributes": ["agee"]}, "audit.judge.attributes = 'agee': no such attribute"),
        (
            {"audit__segmentor__structures": ["lungs"]},
            "audit.segmentor.structures = 'lungs': no such mask; the nearest is 'lung'",
        ),
        (
            {"finetune__rules__0__name": "reg"},
            "finetune.rules[0].guide.attributes = 'grade': is categorical, expected continuous",
        ),
        (
            {"finetune__rules__0__guide__train__batch": 31},
            "finetune.rules[0].guide.train.batch = 31: only 30 training images have all of grade",
        ),
        ({"finetune__train__batch": 31}, "finetune.train.batch = 31: only 30 training images"),
        (
            {"audit__judge__part": "first"},
            "training images of the first half have all of age",
        ),
        ({"finetune__do": ["grade"]}, "finetune.rules[1]: finetune rule pos_seg measures areas, and none of"),
        ({"audit__segmentor": None}, "audit.segmentor.structures lacks lung"),
        (
            {
                "generator__parents": ["grade", "lung_area", "again_area"],
                "bank__do": [
                    {"grade": ["mild"], "lung_area": [20.0]},
                    {"lung_area": [20.0], "again_area": [20.0]},
                ],
            },
            "bank.do sets lung_area and again_area together, and an audit follows one area at a time",
        ),
    ],
)
def test_guides_and_judges_that_cannot_work_are_refused(
    measured: ImageTable, changes: dict[str, Any], sentence: str
) -> None:
    check_against_table(guided(), measured)
    with pytest.raises(UserError) as caught:
        check_against_table(guided(**changes), measured)
    assert sentence in str(caught.value)
    assert str(caught.value).count("\n  - ") == 1


@pytest.mark.parametrize(
    ("unchanged", "sentence"),
    [
        ({"grade": 0.999, "age": 3.0}, None),
        ({"grade": 1.0}, "bank.gate.unchanged.grade = 1.0: of a discrete attribute it is a total variation"),
        ({"lung_area": 1.0}, "bank.gate.unchanged.lung_area = 1.0: every do() of bank.do affects lung_area"),
    ],
)
def test_what_a_gate_could_never_find_changed_is_refused(
    measured: ImageTable, unchanged: dict[str, float], sentence: str | None
) -> None:
    attributes, gate = ["grade", "age", "lung_area"], {"unchanged": unchanged}
    gated = guided(audit__judge__attributes=attributes, bank__gate=gate)
    if sentence is None:
        check_against_table(gated, measured)
        return
    with pytest.raises(UserError) as caught:
        check_against_table(gated, measured)
    assert sentence in str(caught.value)
    assert str(caught.value).count("\n  - ") == 1


def test_what_descends_from_one_do_alone_may_be_asked_to_stay_under_another(measured: ImageTable) -> None:
    changes: dict[str, Any] = {
        "generator__graph": {"lung_area": ["grade"]},
        "audit__judge__attributes": ["grade", "lung_area"],
        "bank__gate": {"unchanged": {"grade": 0.3}},
    }
    both, one = {"lung_area": [20.0], "grade": "all"}, {"grade": "all"}
    check_against_table(guided(**changes, bank__do=both), measured)
    with pytest.raises(UserError, match=r"every do\(\) of bank\.do affects grade"):
        check_against_table(guided(**changes, bank__do=one), measured)
    changes["bank__gate"] = {"unchanged": {"lung_area": 1.0}}
    with pytest.raises(UserError, match=r"every do\(\) of bank\.do affects lung_area"):
        check_against_table(guided(**changes, bank__do=both), measured)


def test_mistakes_in_guides_and_judges_are_reported_together(measured: ImageTable) -> None:
    with pytest.raises(UserError) as caught:
        check_against_table(guided(finetune__train__batch=31, audit__segmentor=None), measured)
    assert str(caught.value).count("\n  - ") == 2

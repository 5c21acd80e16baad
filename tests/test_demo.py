"""The arms of the demo stay what their names say, whatever is overridden."""

from pathlib import Path

import pytest

from cfssl.data.views import CounterfactualPlan
from cfssl.demo import ARMS, arms
from cfssl.errors import UserError


def plans(tmp_path: Path, *overrides: str) -> dict[str, CounterfactualPlan | None]:
    return {name: job.recipe.views.counterfactual for name, job in arms(tmp_path, overrides).items()}


@pytest.mark.parametrize("overrides", [[], ["views.counterfactual.probability=0.5"], ["train.epochs=3"]])
def test_the_arms_differ_only_in_their_counterfactual_views(tmp_path: Path, overrides: list[str]) -> None:
    jobs = arms(tmp_path, overrides)
    assert plans(tmp_path, *overrides)["SimCLR"] is None
    assert len({job.folder for job in jobs.values()}) == len(ARMS)
    contents = []
    for job in jobs.values():
        content = job.recipe.model_dump(mode="json")
        content["views"].pop("counterfactual")
        content.pop("name")
        contents.append(content)
    assert contents[0] == contents[1] == contents[2]


def test_an_override_reaches_every_arm_that_has_the_setting(tmp_path: Path) -> None:
    found = plans(tmp_path, "views.counterfactual.probability=0.5")
    plus, cf = found["SimCLR+"], found["CF-SimCLR"]
    assert plus is not None
    assert cf is not None
    assert (plus.probability, cf.probability) == (0.5, 0.5)
    assert (plus.shared, cf.shared) == (True, False)
    assert {job.recipe.train.epochs for job in arms(tmp_path, ["train.epochs=3"]).values()} == {3}


@pytest.mark.parametrize(
    "override", ["name=x", "views.counterfactual=null", "views.counterfactual.view=0", "name="]
)
def test_an_override_of_what_makes_an_arm_is_refused(tmp_path: Path, override: str) -> None:
    with pytest.raises(UserError, match="is void in the demo, whose arms differ in name"):
        arms(tmp_path, [override])

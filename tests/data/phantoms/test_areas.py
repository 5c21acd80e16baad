"""do(area) in rendered worlds: the area asked for is reached, others stay, and areas follow all else."""

import numpy as np
import pytest
import torch

from cfssl.data.phantoms.chest import ChestWorld
from cfssl.data.phantoms.world import WorldTruth, build_world
from cfssl.data.regions import factual_maps, measure_areas
from cfssl.errors import UserError

COUNT = 40
ROWS = np.arange(COUNT)


@pytest.fixture(scope="module")
def chest_table():
    return build_world(ChestWorld(), COUNT, seed=11)


def remeasured(
    truth: WorldTruth, masks: np.ndarray, parents: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Areas of the rendered images' own gold masks, under the maps of the table's."""
    world = truth.world
    maps = factual_maps(torch.from_numpy(masks), world.mask_names, world.areas)
    rendered = truth.rendered(ROWS, parents)
    return measure_areas(torch.from_numpy(rendered.masks), world.mask_names, world.areas, maps)


def test_the_table_holds_the_areas_of_its_own_masks_in_percent(chest_table):
    frame, _, masks, truth = chest_table
    for side, channel in (("left", 0), ("right", 1)):
        thirds = [f"{side}_{third}_area" for third in ("upper", "middle", "lower")]
        whole = 100 * masks[:, channel].mean(axis=(1, 2))
        np.testing.assert_allclose(frame[thirds].sum(axis=1), whole, atol=1e-3)
    assert all(truth.world.attributes[name].kind == "continuous" for name in truth.world.areas)


def test_measured_areas_follow_the_worlds_own_anatomical_thirds(chest_table):
    """Two definitions of the same thirds, by the mask's extent and by the lung that was drawn."""
    frame, _, _, truth = chest_table
    drawn = 100 * truth.world.render(truth.parents, truth.u).areas
    measured = frame[list(truth.world.areas)].to_numpy()
    correlation = [np.corrcoef(a, b)[0, 1] for a, b in zip(drawn.T, measured.T, strict=True)]
    assert min(correlation) > 0.6
    assert np.abs(drawn - measured).max() < 1.2  # of about 4: the mask may end two rows before the lung


@pytest.mark.parametrize("change", [-0.12, 0.12])
@pytest.mark.parametrize("area", list(ChestWorld().areas))
def test_do_area_is_reached_and_the_other_regions_stay_within_a_pixel_or_so(area, change, chest_table):
    _, _, masks, truth = chest_table
    pixel = 100 / masks[0, 0].size
    wanted = truth.areas[area] * (1 + change)
    measured = remeasured(truth, masks, {area: wanted})
    assert ((measured[area] - wanted).abs() / pixel).quantile(0.9) < 1.5
    for other in set(truth.world.areas) - {area}:
        moved = (measured[other] - truth.areas[other]).abs() / pixel
        assert moved.mean() < 0.2, other
        assert moved.max() < 4, other


def test_an_area_that_holds_already_changes_nothing(chest_table):
    _, images, _, truth = chest_table
    assert np.array_equal(truth.counterfactual(ROWS, truth.areas), images)
    attributes = truth.attributes(ROWS, {})
    assert all(torch.equal(attributes[n], v) for n, v in (truth.parents | truth.areas).items())


def test_attributes_under_do_area_name_the_factor_and_render_the_same_image(chest_table):
    _, images, _, truth = chest_table
    do = {"left_upper_area": truth.areas["left_upper_area"] * 0.9}
    attributes = truth.attributes(ROWS, do)
    assert (attributes["left_upper"] < truth.parents["left_upper"]).all()
    assert torch.equal(attributes["right_lower"], truth.parents["right_lower"])
    rendered = truth.counterfactual(ROWS, do)
    assert not np.array_equal(rendered, images)
    assert np.array_equal(truth.counterfactual(ROWS, attributes), rendered)


def test_several_areas_are_set_at_once(chest_table):
    _, _, masks, truth = chest_table
    do = {"left_upper_area": truth.areas["left_upper_area"] * 0.9}
    do |= {"left_lower_area": truth.areas["left_lower_area"] * 1.08}
    measured = remeasured(truth, masks, do)
    for name, value in do.items():
        assert ((measured[name] - value).abs() * 64**2 / 100).quantile(0.9) < 1.5


def test_areas_follow_what_moves_them(chest_table):
    """A wider thorax has larger lungs; a scanner moves nothing."""
    truth = chest_table[3]
    male = truth.attributes(ROWS, {"sex": torch.ones(COUNT, dtype=torch.int64)})
    female = truth.parents["sex"] == 0
    assert (male["left_middle_area"] > truth.areas["left_middle_area"])[female].all()
    other = truth.attributes(ROWS, {"scanner": (truth.parents["scanner"] + 1) % 4})
    assert all(torch.equal(other[name], value) for name, value in truth.areas.items())


def test_an_area_out_of_reach_is_brought_as_near_as_the_factor_goes(chest_table):
    truth = chest_table[3]
    attributes = truth.attributes(ROWS, {"right_upper_area": torch.zeros(COUNT)})
    assert (attributes["right_upper"] - 0.6).abs().max() < 1e-5
    assert (attributes["right_upper_area"] > 0).all()


def test_an_answer_does_not_depend_on_the_rows_asked_beside_it(chest_table):
    truth = chest_table[3]
    wanted = truth.areas["left_middle_area"] * 1.1
    together = truth.counterfactual(ROWS, {"left_middle_area": wanted})
    for row in (0, 31, 39):
        alone = truth.counterfactual(np.array([row]), {"left_middle_area": wanted[row : row + 1]})
        assert np.array_equal(alone[0], together[row])


def test_an_unknown_area_is_refused(chest_table):
    with pytest.raises(UserError, match="nearest is 'left_upper_area'"):
        chest_table[3].counterfactual(ROWS, {"left_uper_area": torch.zeros(COUNT)})

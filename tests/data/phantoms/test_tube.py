"""Properties every phantom must have, for straightened vessels: same bytes, null intervention, invariances,
marginals; and do(area) of lumen and plaque."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from scipy import stats

from cfssl.data.phantoms import tube
from cfssl.data.phantoms import world as world_room
from cfssl.data.phantoms.tube import AREAS, CALIBRES, MASKS, PLAQUES, SEGMENTS, TubeWorld, build
from cfssl.errors import UserError
from cfssl.seeds import torch_generator

COUNT, MANY = 60, 40_000
ROWS = np.arange(COUNT)
SIZES = (32, 64)


@pytest.fixture(scope="module", params=SIZES)
def table(request):
    return build(TubeWorld(size=request.param), COUNT, seed=2)


def pixels(truth, area):
    """The area in pixels of the truth's image size."""
    return area * truth.world.size**2 / 100


def test_same_seed_same_bytes_and_other_seed_other_bytes():
    frame, images, masks, _ = build(TubeWorld(), 30, seed=3)
    again = build(TubeWorld(), 30, seed=3)
    assert frame.equals(again[0])
    assert np.array_equal(images, again[1])
    assert np.array_equal(masks, again[2])
    assert not np.array_equal(images, build(TubeWorld(), 30, seed=4)[1])


@pytest.mark.parametrize("size", SIZES)
def test_a_row_renders_to_the_same_bytes_alone_and_in_a_batch(size, monkeypatch):
    world = TubeWorld(size=size)
    parents, u = world.sample(COUNT, torch_generator("test", 1))
    whole = world.render(parents, u)
    monkeypatch.setattr(world_room, "PIXELS_PER_CHUNK", 7 * size**2)
    assert np.array_equal(world.render(parents, u).images, whole.images)
    for row in (0, 59):
        alone = world.render(*({n: v[[row]] for n, v in values.items()} for values in (parents, u)))
        assert np.array_equal(alone.images[0], whole.images[row])
        assert np.array_equal(alone.masks[0], whole.masks[row])
    assert np.array_equal(world.masks(parents, u), whole.masks)


def test_null_intervention_renders_the_same_image(table):
    frame, images, _, truth = table
    assert np.array_equal(truth.counterfactual(ROWS, {}), images)
    own = {"age": torch.tensor(frame["age"].to_numpy(), dtype=torch.float32)} | truth.areas
    assert np.array_equal(truth.counterfactual(ROWS, own), images)


def test_do_kernel_changes_every_image_and_no_mask(table):
    _, images, masks, truth = table
    other = truth.rendered(ROWS, {"kernel": 1 - truth.parents["kernel"]})
    assert np.array_equal(other.masks, masks)
    assert (other.images != images).mean(axis=(1, 2, 3)).min() > 0.5
    attributes = truth.attributes(ROWS, {"kernel": 1 - truth.parents["kernel"]})
    assert all(torch.equal(attributes[name], value) for name, value in truth.areas.items())


def test_the_vessel_is_lumen_and_plaque_which_do_not_overlap(table):
    masks = table[2]
    lumen, plaque, vessel = (masks[:, MASKS.index(name)] for name in ("lumen", "plaque", "vessel"))
    assert np.array_equal(lumen + plaque, vessel)
    assert vessel.any(axis=2).all()  # it runs along all rows


@pytest.mark.parametrize("segment", SEGMENTS)
def test_more_plaque_in_a_segment_narrows_the_lumen_there_and_moves_nothing_elsewhere(segment, table):
    truth = table[3]
    none, full = (
        truth.attributes(ROWS, {f"plaque_{segment}": torch.full((COUNT,), amount)}) for amount in (0.0, 1.0)
    )
    assert (none[f"plaque_{segment}_area"] == 0).all()
    assert (full[f"plaque_{segment}_area"] > 0.8).all()  # percent of the image
    assert (full[f"lumen_{segment}_area"] < none[f"lumen_{segment}_area"]).all()
    for name in AREAS:
        if segment not in name:
            assert pixels(truth, (full[name] - none[name]).abs()).max() <= 1, name


@pytest.mark.parametrize("segment", SEGMENTS)
def test_calibre_widens_the_lumen_of_its_segment_and_leaves_its_plaque(segment, table):
    truth = table[3]
    narrow, wide = (
        truth.attributes(ROWS, {f"calibre_{segment}": torch.full((COUNT,), value)}) for value in (0.9, 1.1)
    )
    assert (wide[f"lumen_{segment}_area"] > narrow[f"lumen_{segment}_area"]).all()
    plaque = pixels(truth, wide[f"plaque_{segment}_area"] - narrow[f"plaque_{segment}_area"])
    assert plaque.mean().abs() < 1.5  # single pixels either way
    for name in AREAS:
        if segment not in name:
            assert pixels(truth, (wide[name] - narrow[name]).abs()).max() <= 2, name


@pytest.mark.parametrize("change", [0.7, 1.3])
@pytest.mark.parametrize("segment", SEGMENTS)
def test_do_plaque_area_is_reached_in_its_segment_alone(segment, change, table):
    truth = table[3]
    name = f"plaque_{segment}_area"
    wanted = truth.areas[name] * change
    after = truth.attributes(ROWS, {name: wanted})
    assert pixels(truth, (after[name] - wanted).abs()).quantile(0.8) <= 2
    for other in AREAS:
        if segment not in other:
            assert pixels(truth, (after[other] - truth.areas[other]).abs()).max() <= 1, other
    assert torch.equal(after["plaque_middle"], truth.parents["plaque_middle"]) == (segment != "middle")
    zero = truth.attributes(ROWS, {name: torch.zeros(COUNT)})
    assert (zero[name] == 0).all()


def test_do_lumen_area_is_reached_while_all_other_areas_are_held(table):
    truth = table[3]
    do = truth.areas | {"lumen_middle_area": truth.areas["lumen_middle_area"] * 0.9}
    after = truth.attributes(ROWS, do)
    assert (after["calibre_middle"] <= truth.parents["calibre_middle"]).all()
    for name, value in do.items():
        off = pixels(truth, (after[name] - value).abs())
        assert off.mean() < 1.2, name
        assert off.quantile(0.9) < 4, name
    assert np.array_equal(truth.counterfactual(ROWS, after), truth.counterfactual(ROWS, do))


def test_calcified_plaques_are_brighter_and_soft_ones_darker_than_the_lumen():
    truth = build(TubeWorld(), 200, seed=5)[3]
    rendered = truth.rendered(
        np.arange(200),
        {name: torch.full((200,), 0.8) for name in PLAQUES} | {"kernel": torch.zeros(200).long()},
    )
    image, (lumen, plaque, _) = rendered.images[:, 0].astype(float), rendered.masks.transpose(1, 0, 2, 3)
    third = np.repeat(np.arange(3), [21, 22, 21])[None, :, None]
    for number, segment in enumerate(SEGMENTS):
        here = third == number
        means = [
            np.ma.masked_array(image, ~((mask == 1) & here)).mean(axis=(1, 2)) for mask in (plaque, lumen)
        ]
        brighter = np.asarray(means[0] > means[1])
        assert np.array_equal(brighter, (truth.u[f"kind_{segment}"] < 0.5).numpy())


def test_marginals_and_independence_hold_as_frequencies():
    parents, u = TubeWorld().sample(MANY, torch_generator("tube"))
    assert abs(parents["kernel"].float().mean() - 0.3) < 0.0075
    assert abs(parents["sex"].float().mean() - 0.5) < 0.0075

    def cut_normal(mean, spread, limits):
        return stats.truncnorm(*((limit - mean) / spread for limit in limits), loc=mean, scale=spread)

    expected = {"age": cut_normal(tube.AGE_MEAN, tube.AGE_SPREAD, tube.AGE_RANGE)}
    expected |= dict.fromkeys(PLAQUES, cut_normal(tube.PLAQUE_MEAN, tube.PLAQUE_SPREAD, tube.PLAQUE_RANGE))
    expected |= dict.fromkeys(CALIBRES, cut_normal(1.0, tube.CALIBRE_SPREAD, tube.CALIBRE_RANGE))
    expected |= dict.fromkeys(tube.NORMALS, stats.norm())
    expected |= dict.fromkeys(tube.UNIFORMS, stats.uniform())
    for name, distribution in expected.items():
        values = (parents | u)[name].double().numpy()
        assert stats.kstest(values, distribution.cdf).pvalue > 1e-3 / len(expected), name
    values = {n: stats.rankdata(v.double().numpy()) for n, v in (parents | u).items()}
    pairs = list(itertools.combinations(values, 2))
    for first, second in pairs:  # all are roots: 5 standard errors
        assert abs(np.corrcoef(values[first], values[second])[0, 1]) < 5 / MANY**0.5, (first, second)


def test_impossible_worlds_are_refused():
    with pytest.raises(UserError, match="size is 128"):
        dataclasses.replace(TubeWorld(), size=128)
    with pytest.raises(UserError, match=r"name \['bone'\]"):
        TubeWorld(domains={"bone": 1.0})
    with pytest.raises(UserError, match="phantom_tube splits name"):
        build(TubeWorld(), 10, seed=0, splits={"train": 0.5, "tst": 0.5})
    truth = build(TubeWorld(), 5, seed=0)[3]
    with pytest.raises(UserError, match="phantom_tube has no attribute 'kernle'"):
        truth.counterfactual(np.array([0]), {"kernle": torch.tensor([0])})

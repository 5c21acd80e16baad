"""Properties every phantom must have (same bytes, null intervention, invariances, marginals) and the levels
of the instrument."""

import dataclasses
import importlib.util
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from cfssl.data.phantoms import chest, chest_anatomy
from cfssl.data.phantoms import world as world_room
from cfssl.data.phantoms.chest import MASKS, REGIONS, SCANNERS, ChestWorld, build, render, sample
from cfssl.data.phantoms.fields import blur_matrix
from cfssl.errors import UserError
from cfssl.seeds import torch_generator

ROOT = Path(__file__).parents[3]
WORLD = ChestWorld()
DISCRETE = {name for name, attribute in chest.ATTRIBUTES.items() if attribute.categories}
MANY = 40_000  # draws for frequencies: three standard errors of a share are below 0.0075


@pytest.fixture(scope="module")
def drawn():
    return sample(WORLD, 60, torch_generator("test", 1))


@pytest.fixture(scope="module")
def rendered(drawn):
    return render(WORLD, *drawn)


def pick(values, rows):
    return {name: value[rows] for name, value in values.items()}


def test_same_seed_same_bytes_and_other_seed_other_bytes():
    frame, images, masks, _ = build(WORLD, 30, seed=3)
    again = build(WORLD, 30, seed=3)
    assert frame.equals(again[0])
    assert np.array_equal(images, again[1])
    assert np.array_equal(masks, again[2])
    assert not np.array_equal(images, build(WORLD, 30, seed=4)[1])


@pytest.mark.parametrize("size", [64, 128])
def test_a_row_renders_to_the_same_bytes_alone_in_a_batch_and_with_any_number_of_threads(
    size, drawn, monkeypatch
):
    world, (parents, u) = ChestWorld(size=size), drawn
    whole = render(world, parents, u)
    monkeypatch.setattr(world_room, "PIXELS_PER_CHUNK", 7 * size**2)
    chunked = render(world, parents, u)
    for name in ("images", "masks", "areas"):
        assert np.array_equal(getattr(whole, name), getattr(chunked, name))
    for row in (0, 11, 59):
        alone = render(world, pick(parents, [row]), pick(u, [row]))
        assert np.array_equal(alone.images[0], whole.images[row])
        assert np.array_equal(alone.areas[0], whole.areas[row])


def test_null_intervention_renders_the_same_image_from_the_tables_own_values():
    frame, images, _, truth = build(WORLD, 20, seed=0)
    rows = np.array([2, 19, 7])
    assert np.array_equal(truth.counterfactual(rows, {}), images[rows])
    ages = torch.tensor(frame["age"].to_numpy()[rows], dtype=torch.float32)
    codes = torch.tensor([SCANNERS.index(name) for name in frame["scanner"].iloc[rows]])
    assert np.array_equal(truth.counterfactual(rows, {"age": ages, "scanner": codes}), images[rows])


def test_do_scanner_changes_every_image_and_no_mask(drawn, rendered):
    parents, u = drawn
    other = render(WORLD, parents | {"scanner": (parents["scanner"] + 1) % len(SCANNERS)}, u)
    assert np.array_equal(other.masks, rendered.masks)
    assert np.array_equal(other.areas, rendered.areas)
    assert (other.images != rendered.images).mean(axis=(1, 2, 3)).min() > 0.5


@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("change", [-0.1, 0.1])
@pytest.mark.parametrize("region", REGIONS)
def test_do_region_changes_only_that_regions_area_and_in_its_direction(region, change, size, drawn):
    parents, u = (pick(values, range(20)) for values in drawn)
    world = ChestWorld(size=size)
    before = render(world, parents, u).areas
    after = render(world, parents | {region: parents[region] + change}, u).areas
    own = REGIONS.index(region)
    assert ((after / before - 1)[:, own] * np.sign(change)).min() > 0.01
    assert np.array_equal(np.delete(after, own, axis=1), np.delete(before, own, axis=1))


def attenuation(parents, u):
    """The patients without a machine: (n, H, W), and a grid of x and y in [-1, 1]."""
    numpy = [{name: value.numpy() for name, value in values.items()} for values in (parents, u)]
    grid = (np.arange(64) + 0.5) / 32 - 1
    return chest_anatomy.draw(64, *numpy).attenuation, *np.meshgrid(grid, grid)


def test_age_brings_a_larger_aortic_knob_a_wider_mediastinum_and_fainter_ribs(drawn):
    parents, u = drawn[0] | {"disease": torch.zeros(60, dtype=torch.int64)}, drawn[1]
    (young, x, y), (old, _, _) = (
        attenuation(parents | {"age": torch.full((60,), age)}, u) for age in (25.0, 85.0)
    )
    knob = (np.hypot(x - 0.16, y + 0.29) < 0.06) & (x > 0)
    assert (old - young)[:, knob].mean(axis=1).min() > 0.03
    # Ribs are what alternates from row to row at the side of the lung.
    columns = (np.abs(x) > 0.5) & (np.abs(x) < 0.6)
    side = (columns & (np.abs(y) < 0.3))[:-1]
    stripes = [np.diff(field, axis=1)[:, side].std(axis=1) for field in (young, old)]
    assert (stripes[1] < stripes[0]).mean() > 0.95
    heart = MASKS.index("heart")
    hearts = [
        render(WORLD, parents | {"age": torch.full((60,), age)}, u).masks[:, heart].sum(axis=(1, 2))
        for age in (25.0, 85.0)
    ]
    assert (hearts[1] > hearts[0]).all()


def test_sex_brings_breasts_or_a_wider_thorax(drawn):
    parents, u = drawn
    (female, x, y), (male, _, _) = (
        attenuation(parents | {"sex": torch.full((60,), code)}, u) for code in (0, 1)
    )
    breast = (np.abs(np.abs(x) - 0.43) < 0.12) & (np.abs(y - 0.2) < 0.12)
    assert (female - male)[:, breast].mean(axis=1).min() > 0.02
    lungs = [
        render(WORLD, parents | {"sex": torch.full((60,), code)}, u).areas.sum(axis=1) for code in (0, 1)
    ]
    assert (lungs[1] > lungs[0]).all()


def test_areas_are_the_lung_masks_up_to_the_width_of_a_pixel(rendered):
    pixels = rendered.masks[:, :2].mean(axis=(2, 3))
    areas = rendered.areas.reshape(-1, 2, 3).sum(axis=2)  # left, right
    np.testing.assert_allclose(areas, pixels, atol=0.004)


def test_do_disease_adds_fluid_inside_one_lung_and_widens_the_heart(drawn):
    parents, u = drawn
    healthy = render(WORLD, parents | {"disease": torch.zeros(60, dtype=torch.int64)}, u).masks.astype(bool)
    sick = render(WORLD, parents | {"disease": torch.ones(60, dtype=torch.int64)}, u).masks.astype(bool)
    heart, fluid = MASKS.index("heart"), MASKS.index("effusion")
    assert not healthy[:, fluid].any()
    in_left, in_right = ((sick[:, fluid] & sick[:, lung]).any(axis=(1, 2)) for lung in (0, 1))
    assert np.array_equal(in_left, (u["effusion_side"] < 0.5).numpy())
    assert np.array_equal(in_right, ~in_left)
    assert (sick[:, heart].sum(axis=(1, 2)) > healthy[:, heart].sum(axis=(1, 2))).all()


def test_masks_are_disjoint_except_for_the_fluid_inside_the_lungs(rendered):
    assert rendered.masks[:, :3].sum(axis=1).max() == 1
    assert (rendered.masks[:, 3] <= rendered.masks[:, :2].sum(axis=1)).all()


def test_silver_masks_lose_lung_exactly_around_effusions(drawn):
    parents, u = drawn
    gold = render(WORLD, parents, u).masks
    silver = chest.silver_masks(gold)
    sick = gold[:, 3].any(axis=(1, 2))
    assert np.array_equal(silver[~sick], gold[~sick, :2])
    assert not (silver & gold[:, 3:]).any()
    lost = gold[:, :2].sum(axis=(1, 2, 3)).astype(int) - silver[:, :2].sum(axis=(1, 2, 3))
    assert (lost[sick] > gold[sick, 3].sum(axis=(1, 2))).all()


def test_marginals_and_mechanism_hold_as_frequencies():
    parents, _ = sample(WORLD, MANY, torch_generator("marginals"))
    shares = np.bincount(parents["scanner"], minlength=4) / MANY
    np.testing.assert_allclose(shares, [0.6, 0.25, 0.1, 0.05], atol=0.0075)
    assert abs(parents["sex"].float().mean() - 0.5) < 0.0075
    assert abs(parents["disease"].float().mean() - chest.prevalence()) < 0.0075
    assert parents["age"].min() >= 20
    assert parents["age"].max() <= 90
    for low in (20, 40, 60, 80):
        band = (parents["age"] >= low) & (parents["age"] < low + 10)
        expected = chest.disease_probability(parents["age"][band]).mean()
        assert abs(parents["disease"][band].double().mean() - expected) < 0.04


def cut_normal(mean, spread, limits):
    return stats.truncnorm(*((limit - mean) / spread for limit in limits), loc=mean, scale=spread)


def test_age_regions_and_noise_have_their_distributions():
    parents, u = sample(WORLD, MANY, torch_generator("distributions"))
    expected = {"age": cut_normal(chest.AGE_MEAN, chest.AGE_SPREAD, chest.AGE_RANGE)}
    expected |= dict.fromkeys(REGIONS, cut_normal(1.0, chest.REGION_SPREAD, chest.REGION_RANGE))
    expected |= dict.fromkeys(chest_anatomy.NORMALS, stats.norm())
    expected |= dict.fromkeys((*chest_anatomy.UNIFORMS, "disease_noise"), stats.uniform())
    for name, distribution in expected.items():
        values = (parents | u)[name].double().numpy()
        # Of 38 tests one fails by chance once in a thousand worlds; float32 ties change nothing at this size.
        assert stats.kstest(values, distribution.cdf).pvalue > 1e-3 / len(expected), name


def test_what_the_graph_does_not_connect_is_independent():
    """By chi-squared over quartiles, pair by pair: a relation need not be a line to be seen."""
    parents, u = sample(WORLD, MANY, torch_generator("independence"))
    cut = {}
    for name, values in (parents | u).items():
        if name in DISCRETE:
            cut[name] = values.numpy()
        else:
            cut[name] = (stats.rankdata(values.numpy(), method="ordinal") * 4 / (MANY + 1)).astype(int)
    assert len(cut) == 4 + 6 + 33

    def dependence(first, second):
        counts = np.bincount(cut[first] * 4 + cut[second], minlength=16).reshape(4, 4)
        return stats.chi2_contingency(counts[counts.any(axis=1)][:, counts.any(axis=0)]).pvalue

    pairs = list(itertools.combinations(cut, 2))
    connected = {("age", "disease"), ("disease", "disease_noise")}
    for pair in pairs:
        if pair in connected:
            assert dependence(*pair) < 1e-12
        else:
            assert dependence(*pair) > 1e-3 / len(pairs), pair
    cut["bent"] = np.abs(cut["zoom"] * 2 - 3) // 2  # uncorrelated with zoom, and a function of it
    assert abs(np.corrcoef(cut["bent"], cut["zoom"])[0, 1]) < 0.02
    assert dependence("bent", "zoom") < 1e-12


@pytest.mark.parametrize("rho", [0.5, 1.0])
def test_rho_ties_the_scanner_to_the_disease_in_the_training_split_only_and_keeps_its_shares(rho):
    world = ChestWorld(rho=rho)
    parents, _ = sample(world, MANY, torch_generator("rho"), "train")
    shares = np.bincount(parents["scanner"], minlength=4) / MANY
    np.testing.assert_allclose(shares, [0.6, 0.25, 0.1, 0.05], atol=0.0075)
    rare = parents["scanner"] >= 2
    # tied patients on C and D are all diseased
    expected = rho + (1 - rho) * chest.prevalence()
    assert abs(parents["disease"][rare].float().mean() - expected) < 0.03
    for split in ("val", "test"):
        free, _ = sample(world, MANY, torch_generator("rho"), split)
        both = torch.stack([free["scanner"].double(), free["disease"].double()])
        assert abs(torch.corrcoef(both)[0, 1]) < 0.025


def test_the_test_split_is_balanced_over_scanners_unless_asked_otherwise():
    balanced, _ = sample(WORLD, MANY, torch_generator("balance"), "test")
    same, _ = sample(ChestWorld(balanced_test=False), MANY, torch_generator("balance"), "test")
    np.testing.assert_allclose(np.bincount(balanced["scanner"]) / MANY, [0.25] * 4, atol=0.0075)
    np.testing.assert_allclose(np.bincount(same["scanner"]) / MANY, [0.6, 0.25, 0.1, 0.05], atol=0.0075)


@pytest.mark.parametrize("women", [0.0, 0.2, 0.9])
def test_women_have_their_share_in_training_and_half_of_a_balanced_test_split(women):
    world = ChestWorld(women=women)
    found = {split: sample(world, MANY, torch_generator("women"), split)[0] for split in ("train", "test")}
    assert abs((found["train"]["sex"] == 0).double().mean() - women) < 0.0075
    assert abs((found["test"]["sex"] == 0).double().mean() - 0.5) < 0.0075
    apart = ChestWorld(women=women, balanced_test=False)
    test = sample(apart, MANY, torch_generator("women"), "test")[0]
    assert abs((test["sex"] == 0).double().mean() - women) < 0.0075


def test_the_effect_of_sex_makes_a_womans_effusion_fainter_and_nothing_else(drawn):
    parents, u = drawn
    given = {name: value.numpy() for name, value in (parents | u).items()}
    for sex in (0, 1):
        for disease in (0, 1):
            own = given | {"sex": np.full(60, sex), "disease": np.full(60, disease)}
            plain, changed = (chest_anatomy.draw(64, own, given, effect) for effect in (0.0, 0.5))
            np.testing.assert_array_equal(plain.masks, changed.masks)
            fluid = chest_anatomy.outline(64, own, given).fluid
            contrast = chest_anatomy.between(chest_anatomy.EFFUSION_CONTRAST, given["effusion_contrast"])
            loss = 0.5 * chest_anatomy.FAINTER_IN_WOMEN * (1 - sex) * contrast[:, None, None] * fluid
            np.testing.assert_allclose(plain.attenuation - changed.attenuation, loss, atol=1e-6)
            assert (loss.max() > 0) == (sex == 0 and disease == 1)


def test_a_split_does_not_depend_on_the_size_of_the_others():
    small = build(WORLD, 20, seed=1, splits={"train": 10, "val": 5, "test": 5})
    large = build(WORLD, 30, seed=1, splits={"train": 20, "val": 5, "test": 5})
    assert np.array_equal(small[1][10:], large[1][20:])
    assert list(large[0]["split"]) == ["train"] * 20 + ["val"] * 5 + ["test"] * 5
    assert large[0]["patient"].is_unique


def test_blur_keeps_a_flat_image_flat_and_has_the_stated_width():
    weights = blur_matrix(64, 1.5)
    np.testing.assert_allclose(weights.sum(axis=1), 1, rtol=1e-5)
    spread = np.sqrt((weights[32] * (np.arange(64) - 32) ** 2).sum())
    assert abs(spread - 1.5) < 0.01


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 96}, "size is 96"),
        ({"domains": {"A": 0.5, "E": 0.5}}, r"name \['E'\]"),
        ({"domains": {"A": 0.5}}, "add up to 1"),
        ({"rho": 1.5}, "rho is 1.5"),
        ({"women": -0.1}, "women is -0.1"),
        ({"sex_effect": 2.0}, "sex_effect is 2.0"),
    ],
)
def test_impossible_worlds_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(WORLD, **settings)


def test_impossible_requests_are_refused():
    with pytest.raises(UserError, match="add up to"):
        build(WORLD, 10, seed=0, splits={"train": 0.5, "test": 0.2})
    with pytest.raises(UserError, match="splits name"):
        build(WORLD, 10, seed=0, splits={"train": 0.5, "tst": 0.5})
    truth = build(WORLD, 5, seed=0)[3]
    with pytest.raises(UserError, match="no attribute 'scaner'"):
        truth.counterfactual(np.array([0]), {"scaner": torch.tensor([0])})


def test_attributes_under_an_intervention_follow_the_worlds_own_mechanism():
    truth = build(WORLD, 400, seed=0)[3]
    rows = np.arange(400)[::-1].copy()
    factual = {n: v[torch.from_numpy(rows)] for n, v in (truth.parents | truth.areas).items()}
    nothing = truth.attributes(rows, {})
    assert all(torch.equal(nothing[name], factual[name]) for name in chest.ATTRIBUTES)
    same = truth.attributes(rows, {"age": factual["age"]})
    assert torch.equal(same["disease"], factual["disease"])
    old = truth.attributes(rows, {"age": torch.full((400,), 90.0)})
    expected = truth.u["disease_noise"][torch.from_numpy(rows)] < chest.disease_probability(old["age"])
    assert torch.equal(old["disease"], expected.long())
    assert (old["disease"] >= factual["disease"]).all()  # nobody is healed by growing old
    assert (old["disease"] > factual["disease"]).sum() > 40
    assert torch.equal(old["scanner"], factual["scanner"])
    healthy = torch.zeros(400, dtype=torch.int64)
    both = truth.attributes(rows, {"age": old["age"], "disease": healthy})
    assert torch.equal(both["disease"], healthy)
    with pytest.raises(UserError, match="no attribute 'scaner'"):
        truth.attributes(rows, {"scaner": healthy})


def test_the_contact_sheet_of_the_documentation_is_drawn(tmp_path):
    spec = importlib.util.spec_from_file_location("sheet", ROOT / "docs" / "make_phantom_sheet.py")
    sheet = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sheet)
    sheet.PATIENTS, sheet.__file__ = 2, str(tmp_path / "make_phantom_sheet.py")
    sheet.main()
    for name in ("phantom_chest", "phantom_tube"):
        picture = np.asarray(Image.open(tmp_path / "images" / f"{name}.png").convert("RGB"))
        assert picture.shape[1] > picture.shape[0] > 100  # six columns, two rows
        assert picture.std() > 20
        assert (np.ptp(picture.astype(int), axis=2) > 20).any()  # the masks are in colour


@pytest.mark.slow
def test_scanner_is_readable_and_a_disease_probe_trained_on_scanner_a_fails_on_d():
    """The cheapest probes: 300 principal components and a logistic regression."""
    frame, images, _, truth = build(WORLD, 3000, seed=0, splits={"train": 2000, "val": 0, "test": 1000})
    flat = images.reshape(len(images), -1).astype(np.float32) / 255
    scanner, disease = frame["scanner"].to_numpy(), (frame["disease"] == "yes").to_numpy()
    train, test = (np.flatnonzero(frame["split"] == split) for split in ("train", "test"))

    def probe(rows, target, C):
        steps = (PCA(300, random_state=0), StandardScaler(), LogisticRegression(C=C, max_iter=1000))
        return make_pipeline(*steps).fit(flat[rows], target[rows])

    assert probe(train, scanner, C=1.0).score(flat[test], scanner[test]) >= 0.95
    on_a = probe(train[scanner[train] == "A"], disease, C=0.001)
    auc = {}
    for name in ("A", "D"):
        codes = torch.full((len(test),), SCANNERS.index(name))
        same_patients = truth.counterfactual(test, {"scanner": codes}).reshape(len(test), -1)
        auc[name] = roc_auc_score(
            disease[test], on_a.decision_function(same_patients.astype(np.float32) / 255)
        )
    assert auc["A"] > 0.85
    assert auc["A"] - auc["D"] >= 0.10

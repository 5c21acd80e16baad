"""View plans give exactly the pairs of the papers; batches are a pure function of seed and step."""

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import pytest
import torch
from torch.utils.data import DataLoader

from cfssl.data.augment import PhotometricSettings
from cfssl.data.geometry import GeometrySettings, grid, to_source, to_view
from cfssl.data.plan import CounterfactualPlan, IntensityPlan, SlotPlan, domain_counts
from cfssl.data.prepare import save_prepared
from cfssl.data.splits import SplitSettings
from cfssl.data.table import Attribute
from cfssl.data.views import (
    LocalGeometrySettings,
    LocalViewSettings,
    ViewBatch,
    ViewData,
    ViewSettings,
    is_constant,
)
from cfssl.engine.loop import loader
from cfssl.errors import UserError
from cfssl.seeds import numpy_generator

DOMAINS = ("A", "B", "C", "D", "E")
COUNTS = {(domain,): 80 for domain in DOMAINS}  # of the rows of a source


class MemorySource:
    """Items of five domains; the stored image of slot s of item i is the constant 10 s + 50 (domain), so
    views can be told apart."""

    def __init__(self, count: int = 400, side: int = 16) -> None:
        self.rows = np.arange(count) + 1000
        self.shape = (1, side, side)
        self.views = tuple({"scanner": domain} for domain in DOMAINS)
        self.domain = np.arange(count) % 5
        self.available = np.ones((count, 6), dtype=bool)
        self.available[np.arange(count), self.domain + 1] = False  # a row's own value is not made again

    def __len__(self) -> int:
        return len(self.rows)

    def gather(self, items: np.ndarray, slots: np.ndarray) -> np.ndarray:
        value = (10 * slots + 2 * self.domain[items].reshape(-1, *[1] * (slots.ndim - 1))).astype(np.uint8)
        return np.broadcast_to(value[..., None, None, None], (*slots.shape, *self.shape)).copy()


def draws(plan: CounterfactualPlan | None, local: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Slots (50,000, 2 + local) and the factual domain of each draw."""
    source = MemorySource()
    items = np.arange(50_000) % 400
    return SlotPlan(source, 2, plan, COUNTS, local).draw(numpy_generator(0), items), source.domain[items]


def test_cf_simclr_keeps_view_0_real_and_draws_the_other_domains_uniformly() -> None:
    slots, domain = draws(CounterfactualPlan(variable="scanner", view=(1,), probability=0.8))
    assert (slots[:, 0] == 0).all()
    assert (slots[:, 1] > 0).mean() == pytest.approx(0.8, abs=0.01)
    assert (slots[:, 1] != domain + 1).all()
    for own in range(5):
        shown = slots[domain == own, 1]
        for other in range(5):
            if other != own:
                assert (shown == other + 1).mean() == pytest.approx(0.2, abs=0.012)


def test_balanced_probability_makes_the_marginal_domain_uniform_given_each_factual_one() -> None:
    slots, domain = draws(CounterfactualPlan(variable="scanner", view=(1,), probability="balanced"))
    shown = np.where(slots[:, 1] == 0, domain, slots[:, 1] - 1)
    for own in range(5):
        counts = np.bincount(shown[domain == own], minlength=5) / (domain == own).sum()
        np.testing.assert_allclose(counts, 0.2, atol=0.012)


def test_simclr_plus_shows_the_same_image_in_both_views() -> None:
    slots, _ = draws(CounterfactualPlan(variable="scanner", view=(0, 1), probability=0.5, shared=True))
    np.testing.assert_array_equal(slots[:, 0], slots[:, 1])
    assert (slots[:, 0] > 0).mean() == pytest.approx(0.5, abs=0.01)


def test_unshared_views_draw_their_targets_independently() -> None:
    slots, _ = draws(CounterfactualPlan(variable="scanner", view=(0, 1), probability=0.5))
    both = ((slots[:, 0] > 0) & (slots[:, 1] > 0)).mean()
    assert both == pytest.approx(0.25, abs=0.01)


def test_distinct_views_show_every_counterfactual_once_when_there_are_as_many() -> None:
    source = MemorySource()
    items = np.arange(50_000) % 400
    plan = CounterfactualPlan(variable="scanner", view=(1, 2, 3, 4), probability=1.0, distinct=True)
    slots = SlotPlan(source, 5, plan, COUNTS).draw(numpy_generator(0), items)
    domain = source.domain[items]
    assert (slots[:, 0] == 0).all()
    for own in range(5):
        others = [other + 1 for other in range(5) if other != own]
        shown = slots[domain == own, 1:]
        np.testing.assert_array_equal(np.sort(shown, axis=1), np.broadcast_to(others, shown.shape))
        for view in range(4):  # in any order
            np.testing.assert_allclose(np.bincount(shown[:, view])[others] / len(shown), 0.25, atol=0.02)


def test_distinct_views_are_weighted_draws_without_replacement() -> None:
    weights = {"A": 1.0, "B": 2.0, "C": 3.0}
    plan = CounterfactualPlan("scanner", view=(0, 1), probability=1.0, target=weights, distinct=True)
    slots, domain = draws(plan)
    first, second = slots[domain == 3].T - 1  # an image of D can become any of the three
    shares = np.array([1, 2, 3]) / 6
    np.testing.assert_allclose(np.bincount(first, minlength=3) / len(first), shares, atol=0.02)
    for one in range(3):
        rest = np.where(np.arange(3) == one, 0, shares) / (1 - shares[one])
        found = np.bincount(second[first == one], minlength=3) / (first == one).sum()
        np.testing.assert_allclose(found, rest, atol=0.025)


def test_distinct_views_are_real_where_counterfactuals_run_out_and_as_often_as_stated() -> None:
    plan = CounterfactualPlan("scanner", view=(0, 1), probability=1.0, target={"B": 1.0}, distinct=True)
    slots, domain = draws(plan)
    assert (slots[domain != 1] == (2, 0)).all()
    assert (slots[domain == 1] == 0).all()
    half, _ = draws(CounterfactualPlan("scanner", view=(0, 1), probability=0.5, distinct=True))
    np.testing.assert_allclose((half > 0).mean(axis=0), 0.5, atol=0.01)


def test_a_plan_without_a_variable_shows_every_do_of_the_bank_alike() -> None:
    source, items = JointSource(), np.arange(100_000) % 400
    plan = CounterfactualPlan(None, view=(1,), probability=1.0)
    slots = SlotPlan(source, 2, plan).draw(numpy_generator(0), items)[:, 1]
    own = items[source.available[items].sum(1) == source.available.sum(1).max()][0]
    allowed = np.flatnonzero(source.available[own])[1:]
    shown = np.bincount(slots[items == own], minlength=source.available.shape[1])
    assert set(np.flatnonzero(shown)) == set(allowed)
    np.testing.assert_allclose(shown[allowed] / shown.sum(), 1 / len(allowed), atol=0.08)
    assert len({len(source.views[slot - 1]) for slot in slots}) > 1  # of one variable and of two


def test_a_plan_without_a_variable_needs_a_bank_with_counterfactuals() -> None:
    class Bare(MemorySource):
        views = ()

    source = Bare.__new__(Bare)
    source.available = np.ones((4, 1), dtype=bool)
    with pytest.raises(UserError, match=r"holds real images only; name what to intervene on in bank\.do"):
        SlotPlan(source, 2, CounterfactualPlan(None, probability=1.0))


@pytest.mark.parametrize(
    ("plan", "expected"),
    [
        ({"variable": "scanner", "shared": True, "distinct": True}, "choose one"),
        ({"variable": None}, "leave target uniform and give probability a number"),
        ({"variable": None, "probability": 1.0, "target": "rare"}, "leave target uniform"),
    ],
)
def test_plans_that_contradict_themselves_are_refused(plan: dict, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        CounterfactualPlan(**plan)


def test_simclr_is_all_real() -> None:
    assert (draws(None)[0] == 0).all()


def test_cf_dino_gives_half_of_each_kind_of_view_the_one_counterfactual() -> None:
    """Global crop 1 and four local ones from A, the others from B."""
    slots, domain = draws(CounterfactualPlan(variable="scanner", shared=True), local=8)
    image_a, image_b = [0, 2, 3, 4, 5], [1, 6, 7, 8, 9]
    assert (slots[:, image_a] == 0).all()
    assert (slots[:, image_b] == slots[:, 1:2]).all()
    assert (slots[:, 1] > 0).mean() == pytest.approx(0.8, abs=0.01)
    for own in range(5):
        shown = np.bincount(slots[domain == own, 1], minlength=6) / (domain == own).sum()
        expected = np.where(np.arange(6) == own + 1, 0, 0.2)  # slot 0 is the own domain
        np.testing.assert_allclose(shown, expected, atol=0.012)
    numbered = CounterfactualPlan(variable="scanner", view=(1, 6, 7, 8, 9), shared=True)
    np.testing.assert_array_equal(draws(numbered, local=8)[0], slots)


def test_dino_plus_shows_one_image_in_all_views() -> None:
    slots, _ = draws(CounterfactualPlan(variable="scanner", view="all", shared=True), local=8)
    assert (slots == slots[:, :1]).all()
    assert (slots[:, 0] > 0).mean() == pytest.approx(0.8, abs=0.01)


def test_half_of_two_views_is_cf_simclr_and_all_of_them_simclr_plus() -> None:
    half, second = (CounterfactualPlan(variable="scanner", view=view) for view in ("second_half", (1,)))
    np.testing.assert_array_equal(draws(half)[0], draws(second)[0])
    every, both = (CounterfactualPlan(variable="scanner", view=view, shared=True) for view in ("all", (0, 1)))
    np.testing.assert_array_equal(draws(every)[0], draws(both)[0])


def test_padchest_shows_a_counterfactual_always() -> None:
    slots, _ = draws(CounterfactualPlan(variable="scanner", probability=1))
    assert (slots[:, 1] > 0).all()


def test_unshared_local_views_draw_for_themselves_and_leave_the_global_ones_as_they_are() -> None:
    plan = CounterfactualPlan(variable="scanner", view="all", probability=0.5)
    slots, _ = draws(plan, local=4)
    np.testing.assert_array_equal(slots[:, :2], draws(plan)[0])
    together = (slots > 0).T.astype(float) @ (slots > 0) / len(slots)
    np.testing.assert_allclose(together, np.where(np.eye(6), 0.5, 0.25), atol=0.01)


@pytest.mark.parametrize(
    ("views", "plan", "expected"),
    [
        ({"count": 3}, {}, "counterfactual.view is second_half, but there are 3 views; make them even"),
        ({"local": {"size": 8, "count": 3}}, {}, "there are 2 views and 3 local ones"),
        ({"local": {"size": 8, "count": 2}}, {"view": 4}, "names view 4, but the views are 0..3"),
        ({}, {"view": "second_half", "shared": True}, "view names 1 alone"),
    ],
)
def test_views_that_a_plan_cannot_name_are_refused(views: dict, plan: dict, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        ViewSettings(**views, counterfactual=CounterfactualPlan(variable="scanner", **plan))


def test_target_weights_are_followed_and_the_own_value_is_excluded() -> None:
    slots, domain = draws(
        CounterfactualPlan(variable="scanner", probability=1.0, target={"D": 3.0, "E": 1.0})
    )
    shown = slots[:, 1]
    assert (shown[domain == 0] == 4).mean() == pytest.approx(0.75, abs=0.012)
    assert (shown[domain == 3] == 5).all()


def test_an_item_without_available_targets_stays_real() -> None:
    source = MemorySource()
    source.available[7, 1:] = False
    plan = SlotPlan(source, 2, CounterfactualPlan(variable="scanner", probability=1.0))
    slots = plan.draw(numpy_generator(0), np.array([7, 8] * 100))
    assert (slots[::2] == 0).all()
    assert (slots[1::2, 1] > 0).all()


def test_a_plan_the_bank_cannot_serve_is_refused_with_what_it_holds() -> None:
    with pytest.raises(UserError, match=r"intervenes on 'sex', but the bank holds"):
        SlotPlan(MemorySource(), 2, CounterfactualPlan(variable="sex"))
    with pytest.raises(UserError, match=r"target names \['Z'\]"):
        SlotPlan(
            MemorySource(), 2, CounterfactualPlan(variable="scanner", probability=1.0, target={"Z": 1.0})
        )
    with pytest.raises(ValueError, match="names view 2"):
        ViewSettings(counterfactual=CounterfactualPlan(variable="scanner", view=(2,)))


@pytest.mark.parametrize(
    ("domains", "expected"),
    [
        ({**COUNTS, ("F",): 1}, r"the bank holds \['A', 'B', 'C', 'D', 'E'\] and its categories are .*'F'\]"),
        ({}, "it has no categories"),
    ],
)
def test_balanced_needs_every_category_in_the_bank(domains: dict, expected: str) -> None:
    """With the values of the bank alone, one intervention would silently mean p = 0."""
    with pytest.raises(UserError, match=rf"needs every category of scanner.*{expected}"):
        SlotPlan(MemorySource(), 2, CounterfactualPlan(variable="scanner"), domains)
    with_number = CounterfactualPlan(variable="scanner", probability=0.3)
    assert SlotPlan(MemorySource(), 2, with_number, domains).probability == 0.3


def test_rare_targets_are_drawn_by_one_over_their_number_of_rows() -> None:
    """Of a training set as skewed as that of the paper; the own value is excluded and the rest
    renormalised."""
    counts = dict(zip(DOMAINS, (890, 45, 35, 28, 2), strict=True))
    source, items = MemorySource(), np.arange(200_000) % 400
    plan = CounterfactualPlan(variable="scanner", probability=0.9, target="rare")
    chosen = SlotPlan(source, 2, plan, {(name,): count for name, count in counts.items()})
    slots = chosen.draw(numpy_generator(0), items)[:, 1]
    assert (slots > 0).mean() == pytest.approx(0.9, abs=0.005)
    weight = np.array([1 / counts[name] for name in DOMAINS])
    for own in range(5):
        expected = np.where(np.arange(5) == own, 0, weight)
        shown = slots[(source.domain[items] == own) & (slots > 0)]
        frequency = np.bincount(shown - 1, minlength=5) / len(shown)
        np.testing.assert_allclose(frequency, expected / expected.sum(), atol=0.011)  # four standard errors


def test_a_domain_without_rows_is_as_rare_as_one_with_one_row() -> None:
    plan = CounterfactualPlan(variable="scanner", probability=1, target="rare")
    weights = plan.target_weights([("A",), ("B",), ("C",)], {("A",): 4, ("B",): 1, ("C",): 0})
    np.testing.assert_array_equal(weights, [0.25, 1, 1])
    with pytest.raises(
        UserError, match=r"target is rare, which counts the rows of each category, and scanner"
    ):
        plan.target_weights([("30.0",)], {})


SEXES = ("F", "M")
BOTH = [(domain, sex) for domain in DOMAINS for sex in SEXES]


class JointSource(MemorySource):
    """Slots 1..10 set scanner and sex together, 11..15 the scanner alone."""

    def __init__(self) -> None:
        super().__init__()
        self.views = (
            *({"sex": sex, "scanner": domain} for domain, sex in BOTH),
            *({"scanner": domain} for domain in DOMAINS),
        )
        self.sex = np.arange(400) // 5 % 2
        self.own = 2 * self.domain + self.sex  # place in BOTH
        self.available = np.ones((400, 16), dtype=bool)
        self.available[np.arange(400), 1 + self.own] = False
        self.available[np.arange(400), 11 + self.domain] = False


def joint_draws(**plan: Any) -> tuple[np.ndarray, np.ndarray]:
    """Slots of view 1 and the own combination, 0..9, of 100,000 draws."""
    source, items = JointSource(), np.arange(100_000) % 400
    settings = CounterfactualPlan(variable=("scanner", "sex"), **plan)
    drawn = SlotPlan(source, 2, settings, dict.fromkeys(BOTH, 40)).draw(numpy_generator(0), items)
    assert (drawn[:, 0] == 0).all()
    return drawn[:, 1], source.own[items]


def test_joint_views_make_every_combination_as_frequent() -> None:
    """Balanced is 1 - 1/10: an image with its scanner or its sex alone changed is a combination like
    others."""
    slots, own = joint_draws()
    assert (slots > 0).mean() == pytest.approx(0.9, abs=0.005)
    assert slots.max() <= 10
    for factual in range(10):
        shown = np.where(slots == 0, own, slots - 1)[own == factual]
        np.testing.assert_allclose(np.bincount(shown, minlength=10) / len(shown), 0.1, atol=0.014)


def test_weights_of_joint_views_are_multiplied() -> None:
    weights = {"scanner": {"B": 3.0, "D": 1.0}, "sex": {"M": 0.8, "F": 0.2}}
    slots, own = joint_draws(probability=1.0, target=weights)
    shown = slots[own == BOTH.index(("A", "F"))] - 1
    for domain, sex in BOTH:
        expected = weights["scanner"].get(domain, 0) / 4 * weights["sex"][sex]
        assert (shown == BOTH.index((domain, sex))).mean() == pytest.approx(expected, abs=0.02)
    only = joint_draws(probability=1.0, target={"sex": {"M": 1.0}})[0]
    assert set(only) == {slot for slot, (_, sex) in enumerate(BOTH, 1) if sex == "M"}


def test_a_plan_of_one_variable_leaves_joint_views_alone() -> None:
    source, items = JointSource(), np.arange(4000) % 400
    slots = SlotPlan(source, 2, CounterfactualPlan(variable="scanner"), COUNTS).draw(
        numpy_generator(0), items
    )
    assert set(slots[:, 1]) == {0, *range(11, 16)}
    with pytest.raises(UserError, match=r"intervenes on 'scanner', 'sex' together, but the bank holds"):
        SlotPlan(MemorySource(), 2, CounterfactualPlan(variable=("scanner", "sex"), probability=1.0))
    with pytest.raises(UserError, match=r"Set bank.do: \[\{scanner: all, sex: all\}\]"):
        SlotPlan(
            source,
            2,
            CounterfactualPlan(variable=("scanner", "sex")),
            {**dict.fromkeys(BOTH, 1), ("F", "F"): 0},
        )


@pytest.mark.parametrize(
    ("variable", "target", "expected"),
    [
        ("scanner", {"scanner": {"A": 1.0}}, r"write weights as \{A: 1.0\}"),
        (("scanner", "sex"), {"A": 1.0}, r"write weights as \{scanner: \{A: 1.0\}\}"),
        (("scanner", "sex"), {"age": {"A": 1.0}}, r"target weighs \['age'\], but variable is"),
        (("scanner", "sex"), {"sex": {"F": 0.0}}, "at least one value a weight above 0"),
        (("scanner", "scanner"), "uniform", "name each once"),
    ],
)
def test_weights_of_another_form_than_the_variables_are_refused(
    variable: Any, target: Any, expected: str
) -> None:
    with pytest.raises(ValueError, match=expected):
        CounterfactualPlan(variable=variable, probability=0.5, target=target)


def test_weights_that_leave_nothing_of_the_bank_are_refused() -> None:
    plan = CounterfactualPlan(
        variable=("scanner", "sex"), probability=1, target={"scanner": {"A": 1}, "sex": {"M": 1}}
    )
    with pytest.raises(UserError, match=r"gives none of the bank's \['A, F', 'B, M'\] a weight"):
        plan.target_weights([("A", "F"), ("B", "M")], {})


def test_domains_are_counted_among_the_rows_with_those_that_none_has(tmp_path: Path) -> None:
    frame = pd.DataFrame(
        {
            "scanner": ["A", "A", "B", "A", "B", None],
            "sex": ["F", "M", "F", "F", None, "M"],
            "age": [30.0] * 6,
            "split": "train",
        }
    )
    attributes = {
        "scanner": Attribute("scanner", "categorical", ("A", "B", "C")),
        "sex": Attribute("sex", "binary", SEXES),
        "age": Attribute("age", "continuous"),
    }
    split = SplitSettings(may_be_empty=("val", "test"))
    images = np.zeros((6, 1, 4, 4), np.uint8)
    table = save_prepared(tmp_path / "table", "toy", frame, attributes, images, split=split)
    rows = np.array([0, 1, 2, 4, 5])
    assert domain_counts(table, ["scanner"], rows) == {("A",): 2, ("B",): 2, ("C",): 0}
    assert domain_counts(table, ["scanner", "sex"], rows) == {
        ("A", "F"): 1,
        ("A", "M"): 1,
        ("B", "F"): 1,
        ("B", "M"): 0,
        ("C", "F"): 0,
        ("C", "M"): 0,
    }
    assert domain_counts(table, ["scanner", "age"], rows) == {}


SETTINGS = ViewSettings(
    counterfactual=CounterfactualPlan(variable="scanner", probability=0.8),
    geometry=GeometrySettings(rotation=20),
    photometric=PhotometricSettings(noise=0.1, noise_probability=1.0),
)


def batches(workers: int, seed: int = 0, start: int = 0, stop: int = 8) -> list:
    data = ViewData(MemorySource(), SETTINGS, batch=100, epochs=2, seed=seed)
    return [micro[0] for micro in loader(data, range(start, stop), workers)]


def test_two_workers_give_what_the_main_process_gives() -> None:
    alone, parallel = batches(0), batches(2)
    assert len(alone) == 8
    for first, second in zip(alone, parallel, strict=True):
        assert torch.equal(first.images, second.images)
        assert torch.equal(first.affine, second.affine)
    affines = torch.cat([batch.affine.flatten(1) for batch in parallel])
    assert len(affines.unique(dim=0)) == len(affines) == 800


class GreySource(MemorySource):
    def gather(self, items: np.ndarray, slots: np.ndarray) -> np.ndarray:
        return np.full((*slots.shape, *self.shape), 128, dtype=np.uint8)


def test_no_two_views_of_two_epochs_in_two_workers_have_the_same_noise() -> None:
    """The trap: albumentations left to itself repeats its noise in every worker and epoch."""
    noisy = PhotometricSettings(brightness=0, contrast=0, noise=0.1, noise_probability=1.0)
    whole = GeometrySettings(crop_scale=(1, 1))
    settings = ViewSettings(geometry=whole, photometric=noisy)
    data = ViewData(GreySource(), settings, batch=100, epochs=2, seed=0)
    images = torch.cat([micro[0].images for micro in loader(data, range(8), 2)])
    noise = images.flatten(0, 1).flatten(1).double()  # (1600, 256)
    noise -= noise.mean(1, keepdim=True)
    noise /= noise.norm(dim=1, keepdim=True)
    same = (noise @ noise.T).fill_diagonal_(0) > 0.5  # eight standard errors; a repetition has 1
    # albumentations draws noise from 2^16 patterns: 1600^2 / 2 / 2^16 = 20 pairs agree by chance
    assert same.sum() / 2 < 20 + 5 * 20**0.5


def test_a_resumed_run_sees_the_same_batches_and_another_seed_others() -> None:
    whole, rest, other = batches(0), batches(0, start=5), batches(0, seed=1)
    for first, second in zip(whole[5:], rest, strict=True):
        assert torch.equal(first.images, second.images)
        assert torch.equal(first.row, second.row)
    assert not torch.equal(whole[0].images, other[0].images)


def test_every_epoch_shows_every_item_once_in_another_order() -> None:
    rows = torch.stack([batch.row for batch in batches(0)]).reshape(2, -1)
    for epoch in rows:
        assert sorted(epoch.tolist()) == list(range(1000, 1400))
    assert not torch.equal(rows[0], rows[1])


class NoiseSource(MemorySource):
    """Every stored image has a noise of its own."""

    def gather(self, items: np.ndarray, slots: np.ndarray) -> np.ndarray:
        images = np.empty((*slots.shape, *self.shape), dtype=np.uint8)
        for place in np.ndindex(slots.shape):
            rng = numpy_generator(int(items[place[0]]), int(slots[place]))
            images[place] = rng.integers(0, 256, self.shape)
        return images


LOCAL = LocalViewSettings(size=8, count=4, photometric=SETTINGS.photometric)


def tensors(batch: ViewBatch) -> list[torch.Tensor]:
    return [batch.images, batch.is_counterfactual, batch.slot, batch.affine, batch.valid, batch.row]


def same(first: ViewBatch, second: ViewBatch) -> bool:
    return all(map(torch.equal, tensors(first), tensors(second)))


def test_local_views_leave_the_global_ones_bitwise_as_they_are() -> None:
    with_local = ViewData(NoiseSource(), replace(SETTINGS, local=LOCAL), batch=40, epochs=1, seed=0)
    without = ViewData(NoiseSource(), SETTINGS, batch=40, epochs=1, seed=0)
    for step in range(2):
        (batch,), (expected,) = with_local[step], without[step]
        assert same(batch, expected)
        assert expected.local is None


def test_local_views_are_a_pure_function_of_seed_and_step() -> None:
    """The same from two workers, in micro-batches and when resumed; no two of them the same."""

    def locals_of(workers: int, start: int, accumulate: int = 1) -> list[ViewBatch]:
        settings = replace(SETTINGS, local=LOCAL)
        data = ViewData(NoiseSource(), settings, batch=40, epochs=2, seed=0, accumulate=accumulate)
        return [micro.local for step in loader(data, range(start, 12), workers) for micro in step]

    alone = locals_of(0, 8)
    assert all(map(same, alone, locals_of(2, 8)))
    assert all(map(same, alone[3:], locals_of(0, 11)))
    micro = locals_of(0, 8, accumulate=4)
    assert [len(part) for part in micro] == [10] * 16
    for place, whole in enumerate(alone):
        joined = [torch.cat(parts) for parts in zip(*map(tensors, micro[4 * place :][:4]), strict=True)]
        assert all(map(torch.equal, joined, tensors(whole)))
    affines = torch.cat([batch.affine.flatten(0, 1).flatten(1) for batch in alone])
    assert len(affines.unique(dim=0)) == len(affines) == 4 * 40 * 4


def test_local_views_have_a_size_scale_and_look_of_their_own() -> None:
    settings = ViewSettings(
        size=24,
        local=LocalViewSettings(
            size=10,
            count=6,
            geometry=LocalGeometrySettings(crop_scale=(0.05, 0.1)),
            photometric=PhotometricSettings(brightness=0, contrast=0),
        ),
        photometric=PhotometricSettings(brightness=0, contrast=0, noise=0.1, noise_probability=1),
    )
    (batch,) = ViewData(CoordinateSource(40, 32), settings, batch=50, epochs=1, seed=0)[0]
    local = batch.local
    assert local.images.shape == (50, 6, 2, 10, 10)
    assert local.valid.shape == (50, 6, 10, 10)
    assert torch.equal(local.row, batch.row)
    area = torch.linalg.det(local.affine[..., :2]).abs()
    assert area.min() >= 0.05 - 1e-6
    assert area.max() <= 0.1 + 1e-6
    assert torch.linalg.det(batch.affine[..., :2]).abs().min() > 0.29
    # without a look every pixel shows the point that the batch says
    points = np.stack(np.meshgrid(*grid((10, 10))), axis=2).reshape(-1, 2)
    places = to_source(local.affine.double().numpy(), points)
    seen = (2 * local.images.numpy() - 1).reshape(50, 6, 2, -1).swapaxes(2, 3)
    inside = local.valid.numpy().reshape(50, 6, -1)
    assert np.abs(seen - places).max(-1)[inside].max() / 2 < 1e-3


def test_local_views_show_the_slot_they_name() -> None:
    plain, inner = PhotometricSettings(brightness=0, contrast=0), LocalGeometrySettings(crop_scale=(0.8, 0.8))
    settings = ViewSettings(
        border="reflect",
        counterfactual=CounterfactualPlan(variable="scanner", probability=0.8, shared=True),
        geometry=GeometrySettings(crop_scale=(1, 1), crop_ratio=(1, 1)),
        local=LocalViewSettings(size=8, count=4, geometry=inner, photometric=plain),
        photometric=plain,
    )
    (batch,) = ViewData(MemorySource(), settings, batch=100, epochs=1, seed=0)[0]
    for views in (batch, batch.local):
        domain = (views.row - 1000) % 5
        expected = (10 * views.slot + 2 * domain[:, None]) / 255
        assert torch.allclose(views.images.mean((2, 3, 4)), expected.float(), atol=1e-6)
        assert torch.equal(views.is_counterfactual, views.slot > 0)
    assert torch.equal(batch.local.slot[:, 2:], batch.slot[:, 1:].repeat(1, 2))
    assert batch.slot[:, 1].any()
    assert not batch.local.slot[:, :2].any()


class BrightSource(MemorySource):
    """No stored pixel is black; counterfactuals differ from the real image everywhere."""

    def gather(self, items: np.ndarray, slots: np.ndarray) -> np.ndarray:
        images = numpy_generator(0).integers(50, 100, self.shape).astype(np.uint8)
        return (images + 100 * (slots > 0)[..., None, None, None]).astype(np.uint8)


def test_counterfactual_views_are_black_outside_of_the_same_region_as_real_ones() -> None:
    """No border tells them apart: the published cache has black rows that real images lack."""
    settings = ViewSettings(
        geometry=GeometrySettings(crop_scale=(0.8, 1.0), rotation=45),
        photometric=PhotometricSettings(brightness=0, contrast=0),
    )
    plan = CounterfactualPlan(variable="scanner", view="all", probability=0.5)
    source = BrightSource(side=24)
    (batch,) = ViewData(source, replace(settings, counterfactual=plan), batch=200, epochs=1, seed=0)[0]
    (real,) = ViewData(source, settings, batch=200, epochs=1, seed=0)[0]
    assert torch.equal(batch.valid, real.valid)
    assert torch.equal(batch.images == 0, real.images == 0)
    shown = batch.images[:, :, 0][batch.valid]
    assert shown.min() >= 50 / 255 - 1e-6
    is_counterfactual = batch.is_counterfactual[..., None, None].expand_as(batch.valid)[batch.valid]
    assert torch.equal(shown > 125 / 255, is_counterfactual)
    assert (batch.images == 0).float().mean() > 0.05


class AirSource(MemorySource):
    """Noise in the left half of the image, one grey level elsewhere."""

    def gather(self, items: np.ndarray, slots: np.ndarray) -> np.ndarray:
        images = np.full((*slots.shape, *self.shape), 77, dtype=np.uint8)
        half = self.shape[-1] // 2
        images[..., :half] = numpy_generator(0).integers(0, 256, (*self.shape[:-1], half))
        return images


def test_a_constant_local_crop_is_drawn_again() -> None:
    settings = ViewSettings(
        border="reflect",
        geometry=GeometrySettings(crop_scale=(0.05, 0.2)),
        local=LocalViewSettings(size=8, photometric=PhotometricSettings(brightness=0, contrast=0)),
        photometric=PhotometricSettings(brightness=0, contrast=0),
    )
    source = AirSource(side=32)
    (batch,) = ViewData(source, settings, batch=100, epochs=1, seed=0)[0]

    def constant(images: torch.Tensor) -> float:
        return (images.flatten(2).amax(2) - images.flatten(2).amin(2) < 1e-4).float().mean().item()

    often = constant(batch.images)  # a draw shows air alone
    assert 0.15 < often < 0.4
    assert constant(batch.local.images) == 0  # 0.4 to the power of 11, 800 times: 0.03 expected
    # what was not drawn again is what it would have been without air
    (other,) = ViewData(CoordinateSource(32, 32), settings, batch=100, epochs=1, seed=0)[0]
    kept = (batch.local.affine == other.local.affine).all(-1).all(-1).float().mean()
    assert kept == pytest.approx(1 - often, abs=0.12)  # four standard errors of 200 draws
    # an image that is constant ends the search
    (flat,) = ViewData(GreySource(), settings, batch=10, epochs=1, seed=0)[0]
    assert torch.equal(flat.local.images.unique(), flat.images.unique())


def test_what_lies_outside_of_the_image_makes_no_crop_interesting() -> None:
    view = np.full((8, 8), 0.5, np.float32)
    whole = np.array([[0.5, 0, 0], [0, 0.5, 0]])
    shifted = np.array([[0.5, 0, 1.0], [0, 0.5, 0]])
    outside = np.array([[0.5, 0, 2.0], [0, 0.5, 0]])
    assert is_constant(view, whole, (8, 8))
    view[:, 5:] = 0
    assert not is_constant(view, whole, (8, 8))
    view[:, 3:5] = 0
    assert is_constant(view[..., None], shifted, (8, 8))
    assert is_constant(view, outside, (8, 8))


BLURRED = PhotometricSettings(brightness=0, contrast=0, blur_sigma=(1, 1), blur_probability=1)
SHARP = PhotometricSettings(brightness=0, contrast=0)


def roughness(images: torch.Tensor) -> torch.Tensor:
    """(B, V): mean absolute difference of neighbouring pixels."""
    return images.diff(dim=-1).abs().mean((2, 3, 4))


def test_a_fair_coin_per_item_says_which_view_has_the_second_look() -> None:
    """And it does not know which of them is counterfactual."""
    whole = GeometrySettings(crop_scale=(1, 1), crop_ratio=(1, 1))
    plan = CounterfactualPlan(variable="scanner", probability=0.5)
    settings = ViewSettings(
        counterfactual=plan, geometry=whole, photometric=SHARP, second_photometric=BLURRED
    )
    data = ViewData(NoiseSource(), settings, batch=400, epochs=5, seed=0)
    batches = [data[step][0] for step in range(5)]
    blurred = torch.cat([roughness(batch.images) < 0.2 for batch in batches])  # noise has 1/3
    assert (blurred.sum(1) == 1).all()
    assert blurred[:, 0].float().mean().item() == pytest.approx(0.5, abs=0.045)  # four standard errors
    is_counterfactual = torch.cat([batch.is_counterfactual[:, 1] for batch in batches])
    for kind in (False, True):
        share = blurred[is_counterfactual == kind, 1].float().mean().item()
        assert share == pytest.approx(0.5, abs=0.065)
    # the second look takes the place of the first, and changes nothing else
    (one,) = ViewData(NoiseSource(), replace(settings, photometric=BLURRED), 400, 1, seed=0)[0]
    (other,) = ViewData(
        NoiseSource(), replace(settings, photometric=BLURRED, second_photometric=None), 400, 1, seed=0
    )[0]
    assert same(one, other)


@pytest.mark.parametrize(("count", "expected"), [(3, 1), (4, 2)])
def test_half_of_more_views_have_the_second_look_each_as_often(count: int, expected: int) -> None:
    settings = ViewSettings(
        count=count,
        geometry=GeometrySettings(crop_scale=(1, 1), crop_ratio=(1, 1)),
        photometric=SHARP,
        second_photometric=BLURRED,
    )
    (batch,) = ViewData(NoiseSource(), settings, batch=400, epochs=1, seed=0)[0]
    blurred = roughness(batch.images) < 0.2
    assert (blurred.sum(1) == expected).all()
    np.testing.assert_allclose(blurred.float().mean(0), expected / count, atol=0.1)


def intensity_settings(**plan: Any) -> ViewSettings:
    """Whole views of the stored size, unchanged but for the tone curve."""
    whole = GeometrySettings(crop_scale=(1, 1), crop_ratio=(1, 1), horizontal_flip=0)
    local = LocalViewSettings(
        size=16,
        count=4,
        geometry=LocalGeometrySettings(crop_scale=(1, 1), crop_ratio=(1, 1), horizontal_flip=0),
        photometric=SHARP,
    )
    return ViewSettings(
        geometry=whole, photometric=SHARP, local=local, border="reflect", intensity=IntensityPlan(**plan)
    )


def test_random_intensity_changes_grey_levels_of_view_b_alone_and_as_often_as_stated() -> None:
    """The control of CF-SimCLR: everything is real, and no two curves agree."""
    source = NoiseSource()
    data = ViewData(source, intensity_settings(probability=0.8), batch=400, epochs=2, seed=0)
    (batch,) = data[0]
    stored = torch.from_numpy(source.gather((batch.row - 1000).numpy(), np.zeros((400, 1), int))) / 255
    changed = torch.cat(
        [(views.images - stored).abs().amax((2, 3, 4)) > 1e-3 for views in (batch, batch.local)], dim=1
    )  # (B, 2 + 4)
    image_b = [1, 4, 5]
    assert not batch.is_counterfactual.any()
    assert not changed[:, [0, 2, 3]].any()
    share = changed[:, image_b].float().mean(0)
    np.testing.assert_allclose(share, 0.8, atol=0.08)  # four standard errors
    together = (changed[:, 1] & changed[:, 4]).float().mean().item()
    assert together == pytest.approx(0.64, abs=0.1)  # each draws for itself
    for item in range(20):  # one increasing curve per view
        before, after = stored[item].flatten(), batch.images[item, 1].flatten()
        assert (after[before.argsort()].diff() > -1e-5).all()
    curves = batch.images[changed[:, 1], 1].flatten(1)
    assert len(curves.unique(dim=0)) == len(curves)
    assert same(data[0][0].local, batch.local)
    assert not torch.equal(data[1][0].images, batch.images)


def test_shared_random_intensity_is_one_curve_for_all_views_of_b() -> None:
    settings = intensity_settings(probability=0.8, shared=True)
    (batch,) = ViewData(NoiseSource(), settings, batch=100, epochs=1, seed=0)[0]
    np.testing.assert_allclose(batch.local.images[:, 2], batch.images[:, 1], atol=1e-6)
    np.testing.assert_allclose(batch.local.images[:, 3], batch.images[:, 1], atol=1e-6)
    assert (batch.images[:, 0] - batch.images[:, 1]).abs().amax((1, 2, 3)).gt(1e-3).float().mean() > 0.6


def test_random_intensity_is_stronger_as_stated_and_leaves_everything_else() -> None:
    changes = []
    for strength in (0.05, 0.4):
        settings = intensity_settings(probability=1, strength=strength)
        (batch,) = ViewData(NoiseSource(), settings, batch=100, epochs=1, seed=0)[0]
        (plain,) = ViewData(NoiseSource(), replace(settings, intensity=None), batch=100, epochs=1, seed=0)[0]
        assert torch.equal(batch.images[:, 0], plain.images[:, 0])
        assert all(map(torch.equal, tensors(batch)[1:], tensors(plain)[1:]))
        changes.append((batch.images - plain.images)[:, 1].abs().mean().item())
    assert changes[1] > 3 * changes[0]


def test_colours_are_for_images_that_have_them() -> None:
    for name in ("photometric", "second_photometric"):
        settings = ViewSettings(**{name: PhotometricSettings(saturation=0.2)})
        with pytest.raises(UserError, match=f"views.{name}.saturation changes colours.*have 1"):
            ViewData(MemorySource(), settings, batch=10, epochs=1, seed=0)
    local = LocalViewSettings(size=8, photometric=PhotometricSettings(grey_probability=0.2))
    with pytest.raises(UserError, match=r"views.local.photometric.grey_probability"):
        ViewData(MemorySource(), ViewSettings(local=local), batch=10, epochs=1, seed=0)
    with pytest.raises(ValueError, match="there is 1"):
        ViewSettings(count=1, second_photometric=PhotometricSettings())


def test_micro_batches_are_the_same_views_cut_in_four() -> None:
    whole = ViewData(MemorySource(), SETTINGS, batch=100, epochs=1, seed=0)[2][0]
    parts = ViewData(MemorySource(), SETTINGS, batch=100, epochs=1, seed=0, accumulate=4)[2]
    assert [len(part) for part in parts] == [25] * 4
    assert torch.equal(torch.cat([part.images for part in parts]), whole.images)
    assert torch.equal(torch.cat([part.slot for part in parts]), whole.slot)


def test_processes_share_the_same_views_in_equal_parts_of_every_micro_batch() -> None:
    settings = replace(
        SETTINGS,
        local=LOCAL,
        intensity=IntensityPlan(probability=0.5),
        second_photometric=PhotometricSettings(noise=0.3, noise_probability=1.0),
    )
    data = ViewData(NoiseSource(), settings, batch=24, epochs=1, seed=0, accumulate=2)
    for place, whole in enumerate(data[3]):
        shares = [data.share(rank, 3)[3][place] for rank in range(3)]
        assert [share.position for share in shares] == [
            tuple(range(12 * place + 4 * rank, 12 * place + 4 * rank + 4)) for rank in range(3)
        ]
        for found, expected in ((shares, whole), ([share.local for share in shares], whole.local)):
            joined = [torch.cat(parts) for parts in zip(*map(tensors, found), strict=True)]
            assert all(map(torch.equal, joined, tensors(expected)))
    with pytest.raises(UserError, match=r"train.batch \(24\) must be a multiple of .* \(10\)"):
        data.share(0, 5)


@pytest.mark.parametrize(("size", "expected"), [(24, (24, 24)), (None, (48, 32))])
def test_views_of_a_tall_image_are_square_at_a_stated_size_and_else_as_stored(
    size: int | None, expected: tuple[int, int]
) -> None:
    source = MemorySource()
    source.shape = (1, 48, 32)
    batch = ViewData(source, ViewSettings(size=size), batch=10, epochs=1, seed=0)[0][0]
    assert batch.images.shape == (10, 2, 1, *expected)
    assert batch.valid.shape == (10, 2, *expected)


class CoordinateSource(MemorySource):
    """Two channels: x and y of every pixel centre, from 0 at the left and upper edge to 1."""

    def __init__(self, height: int, width: int) -> None:
        super().__init__()
        self.shape = (2, height, width)
        x, y = grid((height, width))
        unit = (np.stack(np.meshgrid(x, y)) + 1) / 2
        self.image = np.rint(unit * 65535).astype(np.uint16)

    def gather(self, items: np.ndarray, slots: np.ndarray) -> np.ndarray:
        return np.broadcast_to(self.image, (*slots.shape, *self.shape)).copy()


@pytest.mark.parametrize("border", ["constant", "reflect"])
@pytest.mark.parametrize("size", [24, 64, None])
@pytest.mark.parametrize(("height", "width"), [(40, 40), (48, 32)])
def test_every_pixel_shows_the_point_that_the_batch_says(
    height: int, width: int, size: int | None, border: Literal["constant", "reflect"]
) -> None:
    """Through one view, and from view to view at matched points; to a thousandth of the side."""
    settings = ViewSettings(
        size=size,
        border=border,
        geometry=GeometrySettings(crop_scale=(0.3, 1.0), rotation=30, vertical_flip=0.5),
        photometric=PhotometricSettings(brightness=0, contrast=0),
    )
    batch = ViewData(CoordinateSource(height, width), settings, batch=20, epochs=1, seed=0)[0][0]
    shown = batch.images.numpy() * 2 - 1  # (B, V, 2, H, W)
    affine, valid = batch.affine.double().numpy(), batch.valid.numpy()
    points = np.stack(np.meshgrid(*grid(shown.shape[3:])), axis=2).reshape(-1, 2)
    places = to_source(affine, points)  # (B, V, HW, 2)
    seen = shown.reshape(*shown.shape[:3], -1).swapaxes(2, 3)
    wrong = np.abs(seen - places).max(-1) / 2  # the side is 2
    inside = valid.reshape(*valid.shape[:2], -1)
    assert wrong[inside].max() < 1e-3
    assert 0.5 < inside.mean() < 1
    # outside: black, or the image mirrored at the centres of its outermost pixels
    edge = 1 - 1 / np.array([width, height])
    if border == "reflect":
        mirrored = np.sign(places) * (edge - np.abs(np.abs(places) - edge))
        assert (np.abs(seen - mirrored).max(-1)[~inside] / 2).max() < 1e-3
    else:
        outside = (np.abs(places) > edge + 2 / np.array([width, height])).any(-1)
        assert outside.sum() > 100
        assert (seen[outside] == -1).all()
    for item in range(len(batch)):
        matched = to_view(affine[item, 1], places[item, 0]).astype(np.float32)
        sampled = grid_sample(torch.from_numpy(shown[item, 1]), torch.from_numpy(matched))
        known = grid_sample(batch.valid[item, 1:2].float(), torch.from_numpy(matched))[:, 0] > 0.9999
        both = known.numpy() & inside[item, 0]
        assert both.sum() > 20
        assert np.abs(sampled.numpy() - seen[item, 0])[both].max() / 2 < 1e-3


def test_a_tall_image_is_rotated_rigidly() -> None:
    whole = GeometrySettings(crop_scale=(1, 1), rotation=45)
    batch = ViewData(CoordinateSource(48, 32), ViewSettings(geometry=whole), batch=10, epochs=1, seed=0)[0][0]
    to_pixels = np.diag([32 / 48, 1.0])
    turned = to_pixels @ batch.affine[..., :2].double().numpy() @ np.linalg.inv(to_pixels)
    identity = np.broadcast_to(np.eye(2), turned.shape)
    np.testing.assert_allclose(turned @ turned.swapaxes(-1, -2), identity, atol=1e-6)


def grid_sample(image: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """Values (n, C) of an image (C, H, W) at normalised points (n, 2), 0 outside."""
    return torch.nn.functional.grid_sample(image[None], points[None, None], align_corners=False)[0, :, 0].T


def test_views_show_the_slot_they_name() -> None:
    plain = ViewSettings(
        counterfactual=CounterfactualPlan(variable="scanner", probability=0.8),
        geometry=GeometrySettings(crop_scale=(1, 1), crop_ratio=(1, 1)),
        photometric=PhotometricSettings(brightness=0, contrast=0),
    )
    batch = ViewData(MemorySource(), plain, batch=100, epochs=1, seed=0)[0][0]
    domain = (batch.row - 1000) % 5
    expected = (10 * batch.slot + 2 * domain[:, None]) / 255
    assert torch.allclose(batch.images.mean((2, 3, 4)), expected.float(), atol=1e-6)
    assert torch.equal(batch.is_counterfactual, batch.slot > 0)
    assert batch.valid.all()


def test_too_few_images_for_a_batch_is_one_sentence() -> None:
    with pytest.raises(UserError, match=r"train.batch is 500, but only 400 images"):
        ViewData(MemorySource(), SETTINGS, batch=500, epochs=1, seed=0)


def test_the_loader_needs_no_collation() -> None:
    data = ViewData(MemorySource(), SETTINGS, batch=100, epochs=1, seed=0)
    assert isinstance(loader(data, range(1), 0), DataLoader)
    assert len(next(iter(loader(data, range(1), 0)))[0]) == 100


class BlockSource(MemorySource):
    """Every item is a bright block on black, the same in all its slots."""

    def gather(self, items: np.ndarray, slots: np.ndarray) -> np.ndarray:
        shown = np.stack([block_masks(self.rows[items])[:, :1] * np.uint8(200)] * slots.shape[1], axis=1)
        return shown


def block_masks(rows: np.ndarray) -> np.ndarray:
    """(n, 2, 16, 16): a block whose place and size tell the row, and its complement."""
    masks = np.zeros((len(rows), 2, 16, 16), dtype=np.uint8)
    for mask, row in zip(masks, rows, strict=True):
        top, left = row % 5, row % 7
        mask[0, top : top + 8, left : left + 6] = 1
        mask[1] = 1 - mask[0]
    return masks


def test_labels_move_with_their_views_real_or_counterfactual() -> None:
    settings = ViewSettings(
        count=3,
        counterfactual=CounterfactualPlan("scanner", view=(1, 2), probability=1.0),
        geometry=GeometrySettings(crop_scale=(0.4, 1.0), rotation=30.0),
        photometric=SHARP,
    )
    batch = ViewData(BlockSource(), settings, 8, 1, seed=0, domains=COUNTS, masks=block_masks)[0][0]
    assert batch.labels is not None
    assert batch.labels.shape == (8, 3, 2, 16, 16)
    inside, outside = batch.labels.unbind(2)
    assert not (inside & outside).any()
    assert ((inside | outside) | ~batch.valid).all()
    # Away from edges, where interpolation mixes both sides, the block is bright and the rest is black.
    shown = batch.images[:, :, 0]
    assert (shown[inside & (shown > 0.78)]).numel() > 0.6 * inside.sum()
    assert shown[inside].min() > 0.2
    assert shown[outside & batch.valid].max() < 200 / 255 * 0.8


def test_without_masks_there_are_no_labels_and_with_them_nothing_else_changes() -> None:
    settings = ViewSettings(local=LocalViewSettings(size=8, count=2))
    plain, labelled = (
        ViewData(BlockSource(), settings, 8, 1, seed=0, accumulate=2, masks=masks)[0]
        for masks in (None, block_masks)
    )
    for before, after in zip(plain, labelled, strict=True):
        assert before.labels is None
        assert after.labels is not None
        assert len(after.labels) == 4
        assert torch.equal(before.images, after.images)
        assert after.local is not None
        assert after.local.labels is None


def test_how_far_masks_can_be_trusted_comes_with_the_items_that_have_them() -> None:
    def confidence(rows: np.ndarray) -> np.ndarray:
        return np.stack([rows / 1000, 1 - rows / 1000], axis=1).astype(np.float32)

    settings = ViewSettings(local=LocalViewSettings(size=8, count=2))
    parts = ViewData(
        BlockSource(), settings, 8, 1, seed=0, accumulate=2, masks=block_masks, confidence=confidence
    )[0]
    for part in parts:
        assert part.confidence is not None
        np.testing.assert_array_equal(part.confidence.numpy(), confidence(part.row.numpy()))
        assert part.local is not None
        assert part.local.confidence is None
    assert ViewData(BlockSource(), settings, 8, 1, seed=0, masks=block_masks)[0][0].confidence is None


def test_change_is_where_and_how_much_a_view_differs_from_its_real_image() -> None:
    class Spots(MemorySource):
        """Slot s adds 10 s grey levels to the upper half of the image."""

        def gather(self, items: np.ndarray, slots: np.ndarray) -> np.ndarray:
            stored = np.full((*slots.shape, *self.shape), 100, dtype=np.uint8)
            stored[..., :8, :] += (10 * slots[..., None, None, None]).astype(np.uint8)
            return stored

    settings = ViewSettings(
        count=3,
        counterfactual=CounterfactualPlan("scanner", view=(1, 2), probability=1.0),
        geometry=GeometrySettings(crop_scale=(0.5, 1.0), rotation=20.0, vertical_flip=0.5),
    )
    batch = ViewData(Spots(), settings, 8, 1, seed=0, domains=COUNTS, changes=True)[0][0]
    assert batch.change is not None
    assert batch.change.shape == (8, 3, 16, 16)
    assert (batch.change[:, 0] == 0).all()
    x, y = grid((16, 16))
    points = np.stack(np.broadcast_arrays(x, y[:, None]), axis=-1).reshape(-1, 2)
    for item in range(8):
        for view in (1, 2):
            source = to_source(batch.affine[item, view].double().numpy(), points)[:, 1].reshape(16, 16)
            expected = 10 * batch.slot[item, view].item() / 255
            valid = batch.valid[item, view].numpy()
            found = batch.change[item, view].numpy()
            np.testing.assert_allclose(found[valid & (source < -1 / 8)], expected, atol=1e-4)
            np.testing.assert_allclose(found[valid & (source > 1 / 8)], 0, atol=1e-4)
    assert ViewData(Spots(), settings, 8, 1, seed=0, domains=COUNTS)[0][0].change is None

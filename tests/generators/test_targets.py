"""Target rules: their stationary points, their targets, and what they are blind to."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from cfssl.data.regions import AreaSpec
from cfssl.errors import UserError
from cfssl.generators.targets import (
    AreaRule,
    AreaRuleSettings,
    AttributeRule,
    Counterfactual,
    RegressionRule,
    area_specs,
)
from cfssl.measure.segmentor import SegmentorSettings


class Guide:
    """A predictor of `finding` (3 classes), `sex` and the continuous `age` that reads them off pixels."""

    fingerprint = "guide"

    def __call__(self, x: Tensor) -> dict[str, Tensor]:
        flat = x.flatten(1)
        return {"finding": flat[:, :3], "sex": flat[:, 3:5], "age": flat[:, 5:7]}

    def nll(self, outputs: dict[str, Tensor], name: str, target: Tensor) -> Tensor:
        if name == "age":
            mean, log_sigma = outputs[name].unbind(1)
            return 0.5 * ((target - mean) / log_sigma.exp()) ** 2 + log_sigma
        return F.cross_entropy(outputs[name], target, reduction="none")

    def probabilities(self, outputs: dict[str, Tensor], name: str) -> Tensor:
        return outputs[name].softmax(1)

    def value(self, outputs: dict[str, Tensor], name: str) -> Tensor:
        return 10 * outputs[name][:, 0] + 50

    def spread(self, name: str) -> float:
        return 10.0


def made(x: Tensor, x_cf: Tensor, **flags: Tensor) -> Counterfactual:
    pa = {
        "finding": torch.tensor([0, 1, 2, 0]),
        "sex": torch.tensor([0, 1, 0, 1]),
        "age": torch.tensor([-1.0, 0.0, 1.0, 2.0]),
    }
    pa_cf = {"finding": torch.tensor([1, 2, 0, 0]), "sex": pa["sex"], "age": pa["age"] + 1}
    return Counterfactual(x, x_cf, pa, pa_cf, flags, flags)


def images(seed: int = 0) -> Tensor:
    return torch.randn(4, 1, 4, 4, generator=torch.Generator().manual_seed(seed))


def test_the_unchanged_image_is_a_stationary_point_of_soft_and_none_of_hard() -> None:
    x = images()
    for is_soft in (True, False):
        x_cf = x.clone().requires_grad_(True)
        AttributeRule(Guide(), is_soft).loss(made(x, x_cf)).sum().backward()  # type: ignore[arg-type]
        assert x_cf.grad is not None
        pull = x_cf.grad.flatten(1)[:, :5].abs().max()
        assert (pull < 1e-6) == is_soft


def test_soft_takes_the_hard_target_of_what_do_affects_and_the_seen_one_of_the_rest() -> None:
    """Brute force over images and attributes, in float64."""
    x, x_cf = images().double(), images(1).double()
    affected = torch.tensor([True, False, True, False])
    found = AttributeRule(Guide(), is_soft=True).loss(made(x, x_cf, finding=affected))  # type: ignore[arg-type]
    batch = made(x, x_cf)
    guide = Guide()
    before, after = guide(x), guide(x_cf)
    for row in range(4):
        expected = guide.nll(after, "age", batch.pa_cf["age"])[row]
        for name in ("finding", "sex"):
            log_q = after[name][row].log_softmax(0)
            if name == "finding" and affected[row]:
                expected = expected - log_q[batch.pa_cf[name][row]]
            else:
                expected = expected - (before[name][row].softmax(0) * log_q).sum()
        assert float(found[row]) == pytest.approx(float(expected), rel=1e-5)


def test_soft_and_hard_agree_where_do_affects_everything() -> None:
    x, x_cf, yes = images(), images(1), torch.ones(4, dtype=torch.bool)
    batch = made(x, x_cf, finding=yes, sex=yes, age=yes)
    soft, hard = (AttributeRule(Guide(), is_soft).loss(batch) for is_soft in (True, False))  # type: ignore[arg-type]
    torch.testing.assert_close(soft, hard)


def test_no_gradient_reaches_the_factual_image() -> None:
    x, x_cf = images().requires_grad_(True), images(1).requires_grad_(True)
    for rule in (AttributeRule(Guide(), is_soft=True), RegressionRule(AgeGuide())):  # type: ignore[arg-type]
        rule.loss(made(x, x_cf)).sum().backward()
    assert x.grad is None
    assert x_cf.grad is not None


class AgeGuide(Guide):
    def __call__(self, x: Tensor) -> dict[str, Tensor]:
        return {"age": super().__call__(x)["age"]}


def test_regression_asks_for_the_new_value_or_for_what_the_guide_saw() -> None:
    x, x_cf, flags = images(), images(1), torch.tensor([True, False, False, True])
    batch = made(x, x_cf, age=flags)
    found = RegressionRule(AgeGuide()).loss(batch)  # type: ignore[arg-type]
    guide = AgeGuide()
    seen, before = (guide.value(guide(part), "age") for part in (x_cf, x))
    expected = ((seen - torch.where(flags, batch.pa_cf["age"], before)) / 10) ** 2
    torch.testing.assert_close(found, expected)


SPECS = {f"lung_{third}_area": AreaSpec("lung", "thirds", third) for third in ("upper", "middle", "lower")}


def segmentor() -> SimpleNamespace:
    """Sees a lung where the image is bright."""

    class Bright(SimpleNamespace):
        structures = ("lung",)
        fingerprint = "bright"

        def __call__(self, x: Tensor) -> Tensor:
            return (x + 1) / 2

    return Bright()


def slabs(widths: list[int]) -> Tensor:
    """One image of 12 x 12 pixels whose thirds in rows are `widths` pixels wide."""
    x = torch.full((1, 1, 12, 12), -1.0)
    for third, width in enumerate(widths):
        x[0, 0, 4 * third : 4 * third + 4, :width] = 1
    return x


def area_loss(before: list[int], after: list[int], target: float, is_positional: bool) -> float:
    pa = {name: torch.tensor([0.0]) for name in SPECS}
    pa_cf = pa | {"lung_upper_area": torch.tensor([target])}
    flags = {"lung_upper_area": torch.tensor([True])}
    batch = Counterfactual(slabs(before), slabs(after), pa, pa_cf, flags, flags)
    rule = AreaRule(segmentor(), SPECS, dict.fromkeys(SPECS, 2.0), is_positional)  # type: ignore[arg-type]
    return float(rule.loss(batch))


def percent(pixels: int) -> float:
    return 100 * pixels / 144


def test_seg_is_blind_to_where_a_structure_grows_and_pos_seg_is_not() -> None:
    """A third wants two pixels of width more (8 pixels). Grown in the right place nothing is to pay; grown in
    the wrong one, the sum is right and two regions are not."""
    target = percent(4 * 6) - 0.0
    right, wrong = [6, 4, 4], [4, 4, 6]
    blend = percent(2)  # regions fade into each other over 1.5 pixels, so areas differ a little
    assert area_loss([4, 4, 4], right, target, is_positional=True) == pytest.approx(0, abs=blend)
    assert area_loss([4, 4, 4], right, target, is_positional=False) == pytest.approx(0, abs=blend)
    assert area_loss([4, 4, 4], wrong, target, is_positional=False) == pytest.approx(0, abs=blend)
    off = percent(8)
    assert area_loss([4, 4, 4], wrong, target, is_positional=True) == pytest.approx(2 * off / 2.0, abs=blend)


def test_regions_stay_where_the_factual_image_has_them() -> None:
    """The lower third vanishes. Maps of the shrunken lung would put a third of what is left there."""
    found = area_loss([4, 4, 4], [4, 4, 0], percent(16), is_positional=True)
    assert found == pytest.approx(percent(16) / 2.0, abs=percent(2))


def test_areas_that_cannot_be_measured_are_refused() -> None:
    settings = AreaRuleSettings(SegmentorSettings(structures=("lung",)))
    table = SimpleNamespace(areas=SPECS)
    assert set(area_specs(settings, table, ["sex", *SPECS])) == set(SPECS)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="none of sex, age is one"):
        area_specs(settings, table, ["sex", "age"])  # type: ignore[arg-type]
    heart = SimpleNamespace(areas={"heart_area": AreaSpec("heart", "whole", "whole")})
    with pytest.raises(UserError, match="heart"):
        area_specs(settings, heart, ["heart_area"])  # type: ignore[arg-type]

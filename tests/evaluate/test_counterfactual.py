"""The axioms against worlds where everything is known: additive toys with closed forms, and the phantom's
oracle, whose counterfactuals are the renderer's."""

import numpy as np
import pytest
import torch
from torch import nn

from cfssl.data.phantoms import chest
from cfssl.data.pixels import to_signed
from cfssl.data.prepare import save_prepared
from cfssl.data.table import Attribute, Attributes, ImageTable
from cfssl.engine.run import Run
from cfssl.errors import UserError
from cfssl.evaluate.counterfactual import (
    against_truth,
    assert_independent,
    composition,
    distance_to_truth,
    effectiveness,
    grey_levels,
    reversibility,
    split_change,
    squared_grey_levels,
)
from cfssl.generators.base import Exogenous, counterfactual, intervention, propagate
from cfssl.generators.oracle import OracleGenerator, OracleSettings
from cfssl.scm.graph import CausalGraph
from cfssl.scm.mechanisms import CausalModelSettings
from cfssl.scm.model import StructuralCausalModel
from cfssl.seeds import torch_generator

ATTRIBUTES = {
    "scanner": Attribute("scanner", "categorical", ("A", "B", "C")),
    "age": Attribute("age", "continuous"),
    "disease": Attribute("disease", "binary", ("no", "yes")),
}
GRAPH = CausalGraph({"disease": ["age"]}, tuple(ATTRIBUTES), ("scanner", "disease"))


class Shift:
    """x = u + 0.1 scanner + 0.2 disease; `forgets` is what abduction loses of u. It has no residual."""

    graph = GRAPH
    fingerprint = "shift"

    def __init__(self, forgets: float = 0.0) -> None:
        self.forgets = forgets
        self.scm = StructuralCausalModel(GRAPH, ATTRIBUTES, CausalModelSettings(steps=100, hidden=()))

    def fit(self, table: object, run: object) -> None: ...

    def _shift(self, pa: Attributes) -> torch.Tensor:
        return (0.1 * pa["scanner"] + 0.2 * pa["disease"]).view(-1, 1, 1, 1)

    def abduct(self, x: torch.Tensor, pa: Attributes) -> Exogenous:
        shifted = x - self._shift(pa)
        return {"mean": shifted * (1 - self.forgets), "rest": shifted * self.forgets}

    def act(self, u: Exogenous, pa: Attributes, do: Attributes, rng: torch.Generator) -> Attributes:
        return propagate(self.scm, pa, do, rng)

    def predict(self, u: Exogenous, pa_cf: Attributes) -> torch.Tensor:
        return u["mean"] + u["rest"] + self._shift(pa_cf)


class WithResidual(Shift):
    def predict(self, u: Exogenous, pa_cf: Attributes, residual: float = 1.0) -> torch.Tensor:
        return u["mean"] + residual * u["rest"] + self._shift(pa_cf)


X = torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 0.5
PA = {
    "scanner": torch.tensor([0, 1, 2, 0, 1]),
    "age": torch.tensor([30.0, 50.0, 45.0, 70.0, 60.0]),
    "disease": torch.tensor([0, 1, 0, 0, 1]),
}
DO = {"scanner": torch.tensor([2, 2, 0, 1, 0])}


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> ImageTable:
    frame, images, masks, truth = chest.build(chest.ChestWorld(), count=60, seed=5)
    folder = tmp_path_factory.mktemp("axioms") / "table"
    save_prepared(
        folder, "phantom_chest", frame, chest.ATTRIBUTES, images, masks, chest.MASKS, group="patient"
    )
    return ImageTable.open(folder, truth)


@pytest.fixture(scope="module")
def oracle(table: ImageTable, tmp_path_factory: pytest.TempPathFactory) -> OracleGenerator:
    settings = OracleSettings(parents=("scanner", "age", "disease"), graph={"disease": ("age",)})
    generator = OracleGenerator(settings, table)
    generator.fit(table, Run(tmp_path_factory.mktemp("oracle")))
    return generator


def test_grey_levels_are_the_mean_absolute_difference_in_255ths() -> None:
    first, second = torch.zeros(2, 1, 4, 4), torch.zeros(2, 1, 4, 4)
    second[1] = 2 / 255 * 10
    np.testing.assert_allclose(grey_levels(first, second), [0, 10], rtol=1e-6)


def test_composition_is_zero_with_the_residual_and_shows_what_the_network_forgets_without() -> None:
    assert composition(WithResidual(forgets=0.5), X, PA, cycles=3).max() < 1e-4
    lost = composition(WithResidual(forgets=0.5), X, PA, residual=0.0)
    expected = 0.5 * grey_levels(X - Shift()._shift(PA), torch.zeros_like(X))
    np.testing.assert_allclose(lost, expected, rtol=1e-4)
    first = {name: value[:1] for name, value in PA.items()}
    twice = composition(WithResidual(forgets=0.5), X[:1], first, cycles=2, residual=0.0)
    np.testing.assert_allclose(twice, 1.5 * lost[:1], rtol=1e-4)


def test_composition_of_a_generator_without_a_residual_is_measured_and_leaving_it_out_is_refused() -> None:
    assert composition(Shift(), X, PA, residual=1.0).max() < 1e-4
    with pytest.raises(UserError, match=r"residual is 0\.0, but Shift has no pixel residual"):
        composition(Shift(), X, PA, residual=0.0)


def test_an_invertible_generator_is_reversible_and_a_forgetful_cycle_is_not() -> None:
    assert reversibility(Shift(), X, PA, DO, cycles=5).max() < 1e-4

    class Clipped(Shift):
        def predict(self, u: Exogenous, pa_cf: Attributes) -> torch.Tensor:
            return super().predict(u, pa_cf).clamp(0.1, 0.3)

    assert reversibility(Clipped(), X, PA, DO).mean() > 1


def test_the_noise_of_a_discrete_descendant_is_no_error_of_the_image() -> None:
    """An invertible generator is reversible under an intervention whose descendant is abducted at random:
    drawn again on the way back, many of the diseases would come out differently."""
    generator, count = Shift(), 300
    age = torch.linspace(20, 90, count)
    disease = (age + 25 * torch.randn(count, generator=torch_generator("noise")) > 55).long()
    pa = {"scanner": torch.zeros(count, dtype=torch.long), "age": age, "disease": disease}
    generator.scm.fit(pa, torch_generator("fit"))
    x, do = torch.zeros(count, 1, 2, 2), {"age": torch.tensor(55.0)}
    _, pa_cf = counterfactual(generator, x, pa, do, torch_generator(0, "reversibility"))
    assert (pa_cf["disease"] != disease).float().mean() > 0.1  # the do() reaches the disease
    assert reversibility(generator, x, pa, do, cycles=2).max() < 1e-3


def test_effectiveness_counts_the_classes_that_the_predictor_sees() -> None:
    def classifier(images: torch.Tensor) -> torch.Tensor:
        seen = (images.mean((1, 2, 3)) * 10).round().long().clamp(0, 2)
        return torch.nn.functional.one_hot(seen, 3).float()

    images = torch.tensor([0.0, 0.1, 0.2, 0.2]).view(-1, 1, 1, 1).expand(-1, 1, 4, 4) * 2 - 1
    found = effectiveness(classifier, images, torch.tensor([0, 1, 2, 0]))
    assert found.tolist() == [True, True, True, False]


@pytest.mark.parametrize("keep_dimension", [False, True])
def test_effectiveness_of_a_continuous_attribute_is_the_absolute_error(keep_dimension: bool) -> None:
    def regressor(images: torch.Tensor) -> torch.Tensor:
        return 100 * images.mean((1, 2, 3), keepdim=keep_dimension).flatten(1 if keep_dimension else 0)

    images = torch.tensor([0.2, 0.5, 0.9]).view(-1, 1, 1, 1).expand(-1, 1, 4, 4) * 2 - 1
    found = effectiveness(regressor, images, torch.tensor([20.0, 60.0, 60.0]))
    assert found.shape == (3,)
    np.testing.assert_allclose(found, [0, 10, 30], atol=1e-4)


def test_the_predictor_judges_in_eval_mode_also_when_one_of_its_methods_is_given() -> None:
    class Judge(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 3), nn.Dropout(0.9))

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.layers(images)

        def logits(self, images: torch.Tensor) -> torch.Tensor:
            return self(images)

    judge = Judge()
    target = judge.eval()((X + 1) / 2).argmax(1)
    for predictor in (judge, judge.logits):
        judge.train()
        assert effectiveness(predictor, X, target).all()
        assert not judge.layers[2].training


def test_distance_to_truth_is_zero_for_the_truth_and_the_shift_for_the_unchanged_image() -> None:
    truth = X + 0.1
    generated, unchanged = distance_to_truth(truth, truth, X)
    np.testing.assert_allclose(generated, 0)
    assert unchanged == pytest.approx(np.full(5, 12.75), rel=1e-4)


def test_cycles_are_null_interventions_one_after_the_other_fed_with_what_came_out() -> None:
    """Composition is d(x, f^m(x)), not m times d(x, f(x)): each cycle of this generator halves what is left
    of the rest of the image."""

    class Halves(Shift):
        def predict(self, u: Exogenous, pa_cf: Attributes) -> torch.Tensor:
            return u["mean"] + self._shift(pa_cf)

    rest = X - Shift()._shift(PA)
    for cycles in (1, 10):
        expected = grey_levels((1 - 0.5**cycles) * rest, torch.zeros_like(rest))
        np.testing.assert_allclose(composition(Halves(0.5), X, PA, cycles), expected, rtol=1e-4)


def test_reversibility_leaves_the_residual_out_where_asked() -> None:
    """Two abductions a cycle each lose half of the rest."""
    rest = X - Shift()._shift(PA)
    expected = grey_levels(0.75 * rest, torch.zeros_like(rest))
    found = reversibility(WithResidual(forgets=0.5), X, PA, DO, residual=0.0)
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    with pytest.raises(UserError, match="Shift has no pixel residual"):
        reversibility(Shift(), X, PA, DO, residual=0.5)


def test_the_true_change_is_all_effect_and_a_change_across_it_is_all_amplification() -> None:
    factual = X[:4]
    d, across = torch.zeros(4, 1, 8, 8), torch.zeros(4, 1, 8, 8)
    d[:, :, :4], across[:, :, 4:] = 0.3, 0.2
    d[3] = 0
    e = torch.stack([d[0], across[1], 0.5 * d[2] + across[2], across[3]])
    found = split_change(factual + e, factual + d, factual)
    length = 0.2 * 32**0.5
    np.testing.assert_allclose(found.effectiveness, [1, 0, 0.5, np.nan], atol=1e-6)
    np.testing.assert_allclose(found.amplification, [0, length, length, np.nan], atol=1e-6)
    np.testing.assert_allclose(found.uncalled, [np.nan, np.nan, np.nan, length], atol=1e-6)


def test_the_split_of_a_change_is_that_of_the_published_formula() -> None:
    rng = torch_generator("split")
    factual, truth, images = (torch.rand(6, 2, 8, 8, generator=rng) * 2 - 1 for _ in range(3))
    found = split_change(images, truth, factual)
    for place in range(6):
        d, e = ((batch[place] - factual[place]).double().flatten() for batch in (truth, images))
        along = float(d @ e / d.norm())
        assert found.effectiveness[place] == pytest.approx(float(d @ e / d.norm() ** 2), abs=1e-6)
        assert found.amplification[place] == pytest.approx(
            max(0.0, float(e.norm() ** 2) - along**2) ** 0.5, abs=1e-6
        )


def test_against_the_truth_unchanged_images_have_ratio_one_and_the_truth_has_none() -> None:
    rng = torch_generator("ratio")
    truth = X + 0.1 * torch.rand(X.shape, generator=rng)
    copied, perfect = against_truth(X, truth, X, resamples=50), against_truth(truth, truth, X, resamples=50)
    assert {copied["l1_ratio"][key] for key in ("value", "low", "high")} == {1.0}
    assert copied["effectiveness"]["value"] == 0
    assert perfect["l1_ratio"]["value"] == perfect["mse_ratio"]["value"] == 0
    assert perfect["effectiveness"]["value"] == pytest.approx(1)
    assert perfect["amplification"]["value"] == pytest.approx(0, abs=1e-9)
    assert perfect["uncalled"]["value"] is None
    expected = (((truth - X).double() * 127.5) ** 2).mean()
    assert copied["mse"]["value"] == pytest.approx(float(expected))
    assert squared_grey_levels(X, X).max() == 0
    still = against_truth(X, X, X, resamples=20)
    assert still["l1_ratio"]["reason"] == "the truth changes no image"
    assert (still["uncalled"]["value"], still["effectiveness"]["value"]) == (0, None)


def test_a_judge_that_was_the_guide_is_refused() -> None:
    guides = {"the classifier of disease": "aa11", "the segmentor": "bb22"}
    assert_independent("cc33", guides)
    with pytest.raises(UserError, match="fingerprint bb22, which is that of the segmentor"):
        assert_independent("bb22", guides)


@pytest.mark.parametrize("view", [{"scanner": "D"}, {"age": 85.0}])
def test_the_oracle_fulfils_every_axiom(
    oracle: OracleGenerator, table: ImageTable, view: dict[str, str | float]
) -> None:
    """Also where the disease follows from the intervention."""
    rows = table.rows()
    x, pa = to_signed(table.images.read(rows)), table.encode(oracle.graph.variables, rows)
    do = intervention(view, table.attributes, len(rows))
    assert composition(oracle, x, pa, cycles=2).max() == 0
    assert reversibility(oracle, x, pa, do, cycles=2).max() == 0
    changed, pa_cf = counterfactual(oracle, x, pa, do, torch_generator(0))
    truth = table.truth
    assert truth is not None
    expected = truth.attributes(rows, do)
    assert torch.equal(pa_cf["disease"], expected["disease"])
    assert (pa_cf["disease"] != pa["disease"]).any() == ("age" in view)
    to_truth, unchanged = distance_to_truth(changed, to_signed(truth.counterfactual(rows, expected)), x)
    moved = (pa[next(iter(view))] != do[next(iter(view))]).numpy()
    assert to_truth.max() == 0
    assert unchanged[moved].min() > 0.05
    with pytest.raises(UserError, match="OracleGenerator has no pixel residual"):
        composition(oracle, x, pa, residual=0.0)


class OnDevice(torch.Tensor):
    """Like a tensor on a GPU, it must be copied before numpy or a CPU model may see it."""

    def numpy(self, *arguments: object, **keywords: object) -> np.ndarray:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    def cpu(self, *arguments: object, **keywords: object) -> torch.Tensor:
        return self.as_subclass(torch.Tensor)


def away(values: Attributes) -> Attributes:
    return {name: value.as_subclass(OnDevice) for name, value in values.items()}


def test_tensors_on_a_device_are_brought_to_the_cpu_for_numpy_and_for_the_causal_model() -> None:
    class OnCPU(StructuralCausalModel):
        def counterfactual(self, values: Attributes, do: Attributes, rng: torch.Generator) -> Attributes:
            assert not any(isinstance(value, OnDevice) for value in [*values.values(), *do.values()])
            return super().counterfactual(values, do, rng)

    generator, x = Shift(), X.as_subclass(OnDevice)
    generator.scm = OnCPU(GRAPH, ATTRIBUTES)
    assert composition(generator, x, away(PA)).max() < 1e-4
    assert reversibility(generator, x, away(PA), away(DO)).max() < 1e-4
    assert distance_to_truth(x, x, x + 0.1)[1] == pytest.approx(np.full(5, 12.75), rel=1e-4)
    seen = effectiveness(lambda images: images.flatten(1)[:, :3], x, torch.tensor([0, 1, 2, 0, 1]))
    assert seen.shape == (5,)
    assert effectiveness(lambda images: images.flatten(1)[:, 0], x, torch.ones(5)).shape == (5,)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_axioms_hold_for_images_and_attributes_on_a_gpu() -> None:
    generator, x = Shift(), X.cuda()
    pa, do = ({name: value.cuda() for name, value in values.items()} for values in (PA, DO))
    assert composition(generator, x, pa).max() < 1e-4
    assert reversibility(generator, x, pa, do).max() < 1e-4
    assert reversibility(generator, x, pa, DO).max() < 1e-4
    seen = effectiveness(lambda images: images.flatten(1)[:, :3], x, PA["scanner"])
    assert seen.dtype == bool

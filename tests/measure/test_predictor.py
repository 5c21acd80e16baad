"""The predictor of attributes: its likelihoods are their formulas, it stays frozen, it is calibrated, it
learns."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributions import Normal

from cfssl.data.phantoms import chest
from cfssl.data.prepare import save_prepared
from cfssl.data.table import ImageTable
from cfssl.engine.checkpoint import save_checkpoint
from cfssl.engine.run import HardwareSettings, Run
from cfssl.errors import UserError
from cfssl.measure import AttributePredictor, PredictorSettings, PredictorTrainSettings
from cfssl.measure.predictor import LOG_SIGMA, TEMPERATURES, best_temperature, softly_clamped
from cfssl.seeds import torch_generator

NAMES = ("sex", "scanner", "age")
CPU = HardwareSettings(accelerator="cpu")


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> ImageTable:
    world = chest.ChestWorld(domains={"A": 0.5, "D": 0.5})
    frame, images, masks, _ = chest.build(world, count=400, seed=0)
    folder = tmp_path_factory.mktemp("predictor") / "table"
    save_prepared(
        folder, "phantom_chest", frame, chest.ATTRIBUTES, images, masks, chest.MASKS, group="patient"
    )
    return ImageTable.open(folder)


def create(table: ImageTable, seed: int = 0, **options: object) -> AttributePredictor:
    train = PredictorTrainSettings(epochs=4, batch=32, seed=seed)
    settings = PredictorSettings(**{"attributes": NAMES, "width": 8, "train": train, **options})  # type: ignore[arg-type]
    return AttributePredictor(settings, table.attributes, table.images.shape)


@pytest.fixture(scope="module")
def fitted(table: ImageTable, tmp_path_factory: pytest.TempPathFactory) -> AttributePredictor:
    predictor = create(table)
    predictor.fit(table, Run(tmp_path_factory.mktemp("fit"), CPU, quiet=True))
    return predictor


def images(count: int = 5) -> torch.Tensor:
    return torch.rand(count, 1, 64, 64, generator=torch_generator("images")) * 2 - 1


def test_a_scale_beyond_its_bounds_finds_back() -> None:
    low, high = LOG_SIGMA
    value = torch.linspace(low - 8, high + 8, 501, requires_grad=True)
    bounded = softly_clamped(value, low, high)
    (slope,) = torch.autograd.grad(bounded.sum(), value)
    assert low <= bounded.min()
    assert bounded.max() <= high
    assert (slope > 1e-4).all()
    inside = (value > low + 3) & (value < high - 3)
    torch.testing.assert_close(bounded[inside], value[inside], atol=0.1, rtol=0)
    log_sigma = torch.tensor([high + 5.0], requires_grad=True)  # thrown there by one bad step
    optimizer = torch.optim.Adam([log_sigma], lr=0.1)
    for _ in range(200):
        scale = softly_clamped(log_sigma, low, high)
        (scale + 0.5 * (0.1 / scale.exp()) ** 2).sum().backward()  # -log N of a residual of 0.1
        optimizer.step()
        optimizer.zero_grad()
    assert abs(softly_clamped(log_sigma, low, high).item() - np.log(0.1)) < 0.1


@torch.no_grad()
def test_probabilities_as_targets_equal_codes_at_one_hot(fitted: AttributePredictor) -> None:
    outputs = fitted(images())
    codes = torch.tensor([0, 1, 2, 3, 1])
    one_hot = torch.nn.functional.one_hot(codes, 4).float()
    by_code = fitted.nll(outputs, "scanner", codes)
    torch.testing.assert_close(by_code, fitted.nll(outputs, "scanner", one_hot))
    p = fitted.probabilities(outputs, "scanner")
    torch.testing.assert_close(by_code, -p.gather(1, codes[:, None])[:, 0].log())


@torch.no_grad()
def test_soft_targets_cost_their_own_entropy_at_least(fitted: AttributePredictor) -> None:
    outputs = fitted(images())
    p = fitted.probabilities(outputs, "sex")
    torch.testing.assert_close(fitted.nll(outputs, "sex", p), -(p * p.log()).sum(1))
    other = p.roll(1, 0)
    entropy = -(other * other.log()).sum(1)
    assert (fitted.nll(outputs, "sex", other) >= entropy - 1e-6).all()


@torch.no_grad()
def test_the_gaussian_nll_is_its_closed_form(fitted: AttributePredictor, table: ImageTable) -> None:
    ages = table.encode(["age"], table.rows("train"))["age"].double()
    outputs, age = fitted(images()), torch.tensor([20.0, 40.0, 55.0, 70.0, 90.0])
    mean, std = ages.mean(), ages.std(correction=0)
    out = outputs["age"].double()
    expected = -Normal(out[:, 0], out[:, 1].exp()).log_prob((age.double() - mean) / std)
    torch.testing.assert_close(fitted.nll(outputs, "age", age).double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(fitted.value(outputs, "age").double(), out[:, 0] * std + mean)


def test_it_is_frozen_and_in_eval_mode_whatever_is_called(fitted: AttributePredictor) -> None:
    for predictor in (fitted, torch.nn.Sequential(fitted).train()[0]):
        predictor.train()
        assert not any(module.training for module in predictor.modules())
        assert not any(parameter.requires_grad for parameter in predictor.parameters())


def test_the_gradient_reaches_the_image_and_no_weight(fitted: AttributePredictor) -> None:
    x = images().requires_grad_()
    outputs = fitted(x)
    for name, target in (("sex", torch.ones(5).long()), ("age", torch.full((5,), 60.0))):
        (gradient,) = torch.autograd.grad(fitted.nll(outputs, name, target).sum(), x, retain_graph=True)
        assert (gradient.flatten(1).abs().sum(1) > 0).all()
    assert all(parameter.grad is None for parameter in fitted.parameters())


@torch.no_grad()
def test_an_image_is_read_the_same_in_any_company(fitted: AttributePredictor) -> None:
    """No statistics of the batch."""
    x = images()
    alone = torch.cat([fitted(x[place : place + 1])["sex"] for place in range(5)])
    torch.testing.assert_close(fitted(x)["sex"], alone)


def test_a_file_restores_outputs_and_fingerprint(
    fitted: AttributePredictor, table: ImageTable, tmp_path: Path
) -> None:
    fitted.save(tmp_path / "predictor.safetensors")
    other = create(table)
    other.load(tmp_path / "predictor.safetensors")
    assert other.fingerprint == fitted.fingerprint
    for name, out in fitted(images()).items():
        assert torch.equal(out, other(images())[name])
    assert not any(parameter.requires_grad for parameter in other.parameters())
    with pytest.raises(UserError, match=r"settings\.train\.seed is 0, expected 1"):
        create(table, seed=1).load(tmp_path / "predictor.safetensors")
    with pytest.raises(UserError, match=r"settings\.part is all, expected first"):
        create(table, part="first").load(tmp_path / "predictor.safetensors")


def test_equal_seeds_give_equal_weights_and_others_another_fingerprint(
    fitted: AttributePredictor, table: ImageTable, tmp_path: Path
) -> None:
    """The second run is interrupted and goes on."""
    same, other = create(table), create(table, seed=1)
    same.fit(table, Run(tmp_path / "same", CPU, quiet=True, stop_at=3))
    with pytest.raises(UserError, match="has not been fitted"):
        _ = same.fingerprint
    same.fit(table, Run(tmp_path / "same", CPU, quiet=True))
    assert same.fingerprint == fitted.fingerprint
    same.fit(table, Run(tmp_path / "again", CPU, quiet=True))  # from the start, not from where it is
    assert same.fingerprint == fitted.fingerprint
    other.fit(table, Run(tmp_path / "other", CPU, quiet=True))
    assert other.fingerprint != fitted.fingerprint


def test_it_learns_and_its_score_says_so(fitted: AttributePredictor, table: ImageTable) -> None:
    score, untrained = fitted.score(table, "val"), create(table).score(table, "val")
    assert score["scanner"]["images"] == len(table.rows("val"))
    assert score["scanner"]["accuracy"] > 0.9 > untrained["scanner"]["accuracy"]
    assert score["scanner"]["auc"] > 0.97
    assert 0 < score["age"]["mae"] < 25


def test_the_temperature_is_the_best_of_a_grid() -> None:
    """Oracle: brute force in float64, for logits that are too sure by a factor of 3."""
    logits = torch.randn(500, 4, generator=torch_generator("logits"), dtype=torch.float64) * 1.5
    target = torch.multinomial(logits.softmax(1), 1, generator=torch_generator("targets"))[:, 0]
    found = best_temperature((logits * 3).float(), target)

    def nll(temperature: float) -> float:
        return float(torch.nn.functional.cross_entropy(logits * 3 / temperature, target))

    grid = np.geomspace(*TEMPERATURES, 2001)
    best = grid[np.argmin([nll(temperature) for temperature in grid])]
    assert found == pytest.approx(best, rel=2e-3)
    assert found == pytest.approx(3, rel=0.15)
    assert nll(found) < nll(1.0)


def test_a_faultless_head_keeps_a_finite_temperature() -> None:
    logits = torch.eye(3) * 5
    assert best_temperature(logits, torch.arange(3)) == pytest.approx(TEMPERATURES[0])


@torch.no_grad()
def test_calibration_lowers_the_validation_nll(fitted: AttributePredictor, table: ImageTable) -> None:
    """Against every other temperature in the neighbourhood, the uncalibrated 1 included."""
    rows = table.rows("val")
    outputs, targets = fitted._outputs(table, rows), table.encode(NAMES, rows)
    for name in NAMES:
        head = fitted.network.head(name)
        found, raw = float(head.temperature), outputs[name].double()
        calibrated = float(fitted.nll(outputs, name, targets[name]).mean())
        for temperature in [1.0, *(found * np.geomspace(0.5, 2, 9))]:
            if not head.is_continuous and not TEMPERATURES[0] <= temperature <= TEMPERATURES[1]:
                continue
            if head.is_continuous:
                changed = torch.stack([raw[:, 0], raw[:, 1] + np.log(temperature / found)], dim=1)
            else:
                changed = raw * found / temperature
            nll = float(fitted.nll({name: changed}, name, targets[name]).mean())
            assert calibrated <= nll + 1e-5


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"attributes": ("sexx",)}, "nearest is 'sex'"),
        ({"attributes": ()}, "no attribute to predict"),
    ],
)
def test_what_cannot_be_predicted_is_refused(
    table: ImageTable, options: dict[str, object], sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        create(table, **options)


def test_questions_of_the_wrong_kind_are_refused(
    fitted: AttributePredictor, table: ImageTable, tmp_path: Path
) -> None:
    outputs = fitted(images(1))
    with pytest.raises(UserError, match="has no probabilities"):
        fitted.probabilities(outputs, "age")
    with pytest.raises(UserError, match="is not continuous"):
        fitted.value(outputs, "sex")
    with pytest.raises(UserError, match="does not predict 'disease'"):
        fitted.nll(outputs, "disease", torch.zeros(1).long())
    with pytest.raises(UserError, match="nothing to save"):
        create(table).save(tmp_path / "none.safetensors")
    save_checkpoint(tmp_path / "other.safetensors", {"hvae": {}})
    with pytest.raises(UserError, match="holds no attribute predictor"):
        create(table).load(tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="takes images"):
        AttributePredictor(PredictorSettings(("sex",)), table.attributes, (1, 16, 64, 64))

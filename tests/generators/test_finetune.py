"""Counterfactual fine-tuning: interventions as they should be drawn, a weight that never turns negative,
guides that do not change, runs that resume, and images that show more of what was asked for."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cfssl.data.batches import ImageData, read_batch
from cfssl.data.phantoms import chest
from cfssl.data.pixels import to_signed
from cfssl.data.prepare import save_prepared
from cfssl.data.table import ImageTable
from cfssl.engine.run import HardwareSettings, Run, read_metrics
from cfssl.errors import UserError
from cfssl.evaluate.counterfactual import composition
from cfssl.generators.finetune import (
    FinetuneSettings,
    FinetuneTask,
    FinetuneTrainSettings,
    finetune,
    value_limits,
)
from cfssl.generators.hvae import HVAEGenerator
from cfssl.generators.hvae_settings import HVAESettings, HVAETrainSettings
from cfssl.generators.hvae_small import SmallNetworkSettings
from cfssl.generators.hvae_training import free_energy
from cfssl.generators.targets import AttributeRule, AttributeRuleSettings, Counterfactual
from cfssl.measure.predictor import AttributePredictor, PredictorSettings, PredictorTrainSettings
from cfssl.seeds import torch_generator

PARENTS = ("scanner", "age", "disease")
GRAPH = {"disease": ("age",)}
CPU = HardwareSettings(accelerator="cpu", threads=1)
TINY = SmallNetworkSettings(widths=(8, 8, 8, 8), latents=(2, 2, 2), blocks=1)
GUIDE = PredictorSettings(
    attributes=("scanner", "disease"), width=4, train=PredictorTrainSettings(epochs=6, batch=32)
)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> ImageTable:
    world = chest.ChestWorld(domains={"A": 0.5, "D": 0.5})
    frame, images, masks, truth = chest.build(world, count=200, seed=0)
    folder = tmp_path_factory.mktemp("finetune") / "table"
    save_prepared(
        folder, "phantom_chest", frame, chest.ATTRIBUTES, images, masks, chest.MASKS, group="patient"
    )
    return ImageTable.open(folder, truth)


def settings(**options: object) -> HVAESettings:
    train = HVAETrainSettings(epochs=6, batch=20, lr=3e-3)
    return HVAESettings(
        **{"parents": PARENTS, "graph": GRAPH, "train": train, "network": TINY, "sigma": "shared", **options}  # type: ignore[arg-type]
    )


def tuning(epochs: int = 1, **options: object) -> FinetuneSettings:
    train = FinetuneTrainSettings(epochs=epochs, batch=20, lr=1e-3)
    return FinetuneSettings(rules=(AttributeRuleSettings(GUIDE),), **{"train": train, **options})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def base(table: ImageTable, tmp_path_factory: pytest.TempPathFactory) -> HVAEGenerator:
    generator = HVAEGenerator(settings(), table.attributes, table.images.shape)
    generator.fit(table, Run(tmp_path_factory.mktemp("base"), CPU, quiet=True))
    return generator


@pytest.fixture(scope="module")
def guide(table: ImageTable, tmp_path_factory: pytest.TempPathFactory) -> AttributePredictor:
    predictor = AttributePredictor(GUIDE, table.attributes, table.images.shape)
    predictor.fit(table, Run(tmp_path_factory.mktemp("guide"), CPU, quiet=True))
    return predictor


class Nothing:
    """A rule without any wish."""

    fingerprint = "nothing"

    def loss(self, made: Counterfactual) -> Tensor:
        return made.x_cf.flatten(1).sum(1) * 0

    def to(self, device: torch.device) -> None: ...


def task_of(base: HVAEGenerator, table: ImageTable, bound: float = 0.0, **options: object) -> FinetuneTask:
    rows = table.rows("train", known=base.graph.variables)
    limits = value_limits(table.encode(base.graph.variables, rows))
    return FinetuneTask(copy.deepcopy(base), [Nothing()], PARENTS, limits, bound, tuning(**options))


def batch_of(base: HVAEGenerator, table: ImageTable, count: int = 40):  # type: ignore[no-untyped-def]
    rows = table.rows("train", known=base.graph.variables)[:count]
    batch = read_batch(table, rows, table.encode(base.graph.variables, rows), [])
    batch.noise = torch.randn(len(rows), base.network.noise_size, generator=torch_generator("noise"))
    return batch


def test_each_image_has_one_variable_set_to_the_value_of_another_image(
    base: HVAEGenerator, table: ImageTable
) -> None:
    task, pa = task_of(base, table), batch_of(base, table).attributes
    chosen = dict.fromkeys(PARENTS, 0)
    for step in range(60):
        pa_cf, intervened, affected = task.intervene(pa, step)
        assert torch.stack(list(intervened.values())).sum(0).eq(1).all()
        for name in PARENTS:
            chosen[name] += int(intervened[name].sum())
            assert torch.equal(pa_cf[name][~affected[name]], pa[name][~affected[name]])
            low, high = task.limits.get(name, (0, 99))
            assert all(low <= value <= high for value in pa_cf[name][intervened[name]].tolist())
        assert torch.equal(affected["disease"], intervened["disease"] | intervened["age"])
        assert torch.equal(affected["scanner"], intervened["scanner"])
    shares = torch.tensor(list(chosen.values())) / (60 * 40)
    assert (shares - 1 / 3).abs().max() < 0.04  # four standard deviations
    again = task.intervene(pa, 7)[0]
    assert all(torch.equal(again[name], task.intervene(pa, 7)[0][name]) for name in pa)


def test_set_values_are_drawn_from_the_marginal(base: HVAEGenerator, table: ImageTable) -> None:
    task, pa = task_of(base, table), batch_of(base, table).attributes
    values = []
    for step in range(300):
        pa_cf, intervened, _ = task.intervene(pa, step)
        values.append(pa_cf["scanner"][intervened["scanner"]])
    drawn = torch.cat(values)
    share = float((drawn == 3).float().mean())
    assert share == pytest.approx(float((pa["scanner"] == 3).float().mean()), abs=4 * 0.5 / len(drawn) ** 0.5)


def test_the_weight_of_the_free_energy_is_never_negative(base: HVAEGenerator, table: ImageTable) -> None:
    """The published formula, lambda - d (c - F), turns negative when F is far below c; then the loss here
    holds no F at all, and lambda falls."""
    batch = batch_of(base, table)
    far_above, far_below = task_of(base, table, bound=50.0), task_of(base, table, bound=-50.0)
    loose, tight = far_above(batch, 0), far_below(batch, 0)
    assert float(loose["weight"]) == 0
    assert float(tight["weight"]) == pytest.approx(10 * (float(tight["free_energy"].detach()) + 50), rel=1e-5)
    loose["loss"].backward()
    tight["loss"].backward()
    weights = [p.grad for p in far_above.network.parameters() if p.grad is not None]
    assert all(grad.abs().max() == 0 for grad in weights)
    assert far_above.raw_multiplier.grad > 0 > far_below.raw_multiplier.grad  # type: ignore[operator]
    with torch.no_grad():
        far_above.raw_multiplier.fill_(-1.0)
    far_above.after_step(0)
    assert float(far_above.multiplier.detach()) == 0


def test_the_bound_is_the_mean_free_energy_of_the_images_that_training_draws(
    base: HVAEGenerator, table: ImageTable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    bounds = []
    monkeypatch.setattr(FinetuneTask, "__init__", lambda *given: bounds.append(given[5]) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        finetune(copy.deepcopy(base), table, [Nothing()], tuning(), Run(tmp_path, CPU, quiet=True))
    rows, train = table.rows("train", known=base.graph.variables), tuning().train
    values = table.encode(base.graph.variables, rows)
    data = ImageData(table, rows, values, train, noise_size=base.network.noise_size)
    energies = []
    for step in range(len(data)):
        (batch,) = data[step]
        noise = base.network.split_noise(batch.noise)
        inferred = base.network.infer(batch.x, base.context(batch.attributes), noise)
        energies.append(float(free_energy(base.network, batch.x, inferred, 5.0, base.settings)["loss"]))
    assert bounds == [pytest.approx(sum(energies) / len(energies), rel=1e-6)]


def tuned(
    base: HVAEGenerator,
    table: ImageTable,
    guide: AttributePredictor,
    folder: Path,
    stops: tuple[int | None, ...] = (None,),
    **options: object,
) -> HVAEGenerator:
    generator = copy.deepcopy(base)
    for stop in stops:
        generator = copy.deepcopy(base)
        run = Run(folder, CPU, quiet=True, stop_at=stop)
        finetune(generator, table, [AttributeRule(guide, is_soft=True)], tuning(**options), run)  # type: ignore[arg-type]
    return generator


def test_a_stopped_run_goes_on_to_the_same_weights(
    base: HVAEGenerator, table: ImageTable, guide: AttributePredictor, tmp_path: Path
) -> None:
    whole = tuned(base, table, guide, tmp_path / "whole")
    parts = tuned(base, table, guide, tmp_path / "parts", stops=(2, None))
    assert whole.fingerprint == parts.fingerprint != base.fingerprint
    for name, value in whole.network.state_dict().items():
        assert torch.equal(value, parts.network.state_dict()[name]), name


def test_the_guide_stays_as_it_was_and_a_null_intervention_returns_the_image(
    base: HVAEGenerator, table: ImageTable, guide: AttributePredictor, tmp_path: Path
) -> None:
    before = copy.deepcopy(guide.state_dict())
    generator = tuned(base, table, guide, tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in guide.state_dict().items())
    assert not guide.training
    rows = table.rows("test")[:8]
    x, pa = to_signed(table.images.read(rows)), table.encode(PARENTS, rows)
    assert composition(generator, x, pa).max() < 1e-3
    assert not any(parameter.requires_grad for parameter in generator.network.parameters())


def test_only_the_decoder_changes_where_that_is_asked_for(
    base: HVAEGenerator, table: ImageTable, guide: AttributePredictor, tmp_path: Path
) -> None:
    generator = tuned(base, table, guide, tmp_path, trained="decoder")
    same = {
        name: torch.equal(value, base.network.state_dict()[name])
        for name, value in generator.network.state_dict().items()
    }
    encoder = [is_same for name, is_same in same.items() if name.startswith("encoder")]
    assert encoder
    assert all(encoder)
    assert not all(same.values())


@pytest.mark.slow
def test_fine_tuning_brings_images_closer_to_what_was_asked_for(
    base: HVAEGenerator, table: ImageTable, guide: AttributePredictor, tmp_path: Path
) -> None:
    generator = tuned(base, table, guide, tmp_path, epochs=40)
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert lines[-1]["target"] < lines[0]["target"]
    rows = table.rows("test")
    x, pa = to_signed(table.images.read(rows)), table.encode(base.graph.variables, rows)
    other = torch.where(pa["scanner"] == 0, 3, 0)

    def sees(made: HVAEGenerator) -> float:
        x_cf = made.predict(made.abduct(x, pa), pa | {"scanner": other})
        return float(guide.nll(guide(x_cf), "scanner", other).mean())

    assert sees(generator) < sees(base)


def test_what_cannot_be_tuned_is_refused(
    base: HVAEGenerator, table: ImageTable, guide: AttributePredictor, tmp_path: Path
) -> None:
    unfitted = HVAEGenerator(settings(), table.attributes, table.images.shape)
    with pytest.raises(UserError, match="not been fitted"):
        finetune(
            unfitted, table, [AttributeRule(guide, is_soft=True)], tuning(), Run(tmp_path, CPU, quiet=True)
        )
    with pytest.raises(UserError, match=r"finetune\.do"):
        tuned(base, table, guide, tmp_path, do=("sex",))
    assert not list(tmp_path.iterdir())

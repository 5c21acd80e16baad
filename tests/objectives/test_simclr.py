"""SimCLR: the loss equals its definition in float64, the temperature acts, the encoder and the head are
trained."""

import pytest
import torch
from view_toys import batch_of

from cfssl.models.backbone import BackboneSettings, create_backbone
from cfssl.objectives import create_objective
from cfssl.objectives.simclr import SimCLR, SimCLRSettings, masked_nt_xent
from cfssl.objectives.supervised import SupervisedSettings


def nt_xent(first: torch.Tensor, second: torch.Tensor, temperature: float) -> float:
    """The definition, term by term, in float64."""
    z = torch.nn.functional.normalize(torch.cat([first, second]).double(), dim=1)
    similarity = (z @ z.T / temperature).exp()
    total, half = 0.0, len(first)
    for i in range(2 * half):
        positive = similarity[i, (i + half) % (2 * half)]
        total -= float(torch.log(positive / (similarity[i].sum() - similarity[i, i])))
    return total / (2 * half)


def encoder() -> torch.nn.Module:
    return create_backbone(BackboneSettings("test_resnet"), channels=1, image_size=32, seed=0)


IMAGES = torch.rand(12, 2, 1, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_the_loss_is_the_definition_at_the_configured_temperature(temperature: float) -> None:
    objective = SimCLR(
        encoder(), SimCLRSettings(temperature=temperature, hidden=32, output=16), seed=0
    ).eval()
    with torch.no_grad():
        z = objective.head(objective.student(IMAGES.flatten(0, 1))).unflatten(0, (-1, 2))
        expected = nt_xent(z[:, 0], z[:, 1], temperature)
        assert float(objective(batch_of(IMAGES), 0)["loss"]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("batch_norm", [False, True])
def test_the_head_has_batch_normalisation_behind_both_layers_or_none(batch_norm: bool) -> None:
    objective = SimCLR(encoder(), SimCLRSettings(hidden=32, output=16, batch_norm=batch_norm), seed=0)
    normalised = [m.num_features for m in objective.head.modules() if isinstance(m, torch.nn.BatchNorm1d)]
    assert normalised == ([32, 16] if batch_norm else [])


def test_the_order_of_the_two_views_is_immaterial() -> None:
    objective = SimCLR(encoder(), SimCLRSettings(hidden=32, output=16), seed=0).eval()
    with torch.no_grad():
        forward = objective(batch_of(IMAGES), 0)["loss"]
        backward = objective(batch_of(IMAGES.flip(1)), 0)["loss"]
    torch.testing.assert_close(forward, backward)


def test_the_loss_stays_float32_under_bf16_autocast() -> None:
    objective = SimCLR(encoder(), SimCLRSettings(hidden=32, output=16), seed=0).eval()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert objective(batch_of(IMAGES), 0)["loss"].dtype == torch.float32


def test_gradients_reach_every_parameter() -> None:
    objective = SimCLR(encoder(), SimCLRSettings(hidden=32, output=16), seed=0)
    with (
        torch.no_grad()
    ):  # timm's residual branches start at zero, which holds back the gradients behind them
        for parameter in objective.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    objective(batch_of(IMAGES), 0)["loss"].backward()
    for name, parameter in objective.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "test_vit", "test_efficientnet", "resnet18"])
def test_heads_fit_what_the_backbone_gives(name: str) -> None:
    student = create_backbone(BackboneSettings(name), channels=1, image_size=32, seed=0)
    for settings, classes in (
        (SimCLRSettings(hidden=8, output=4), None),
        (SupervisedSettings(target="dx"), 3),
    ):
        objective = create_objective(settings, student, 0, images=12, steps=1, classes=classes)
        found = objective(batch_of(IMAGES, {"dx": torch.arange(12) % 3}), 0)
        assert torch.isfinite(found["loss"])


def test_equal_seeds_start_equal_and_others_differ() -> None:
    def weights(seed: int) -> torch.Tensor:
        student = create_backbone(BackboneSettings("test_resnet"), channels=1, image_size=32, seed=seed)
        objective = create_objective(SimCLRSettings(), student, seed, images=12, steps=1)
        return torch.cat([parameter.flatten() for parameter in objective.parameters()])

    assert torch.equal(weights(3), weights(3))
    assert not torch.equal(weights(3), weights(4))


def test_supervised_loss_is_the_mean_cross_entropy_over_all_views() -> None:
    target = torch.arange(12) % 3
    objective = create_objective(
        SupervisedSettings(target="dx"), encoder(), 0, images=12, steps=1, classes=3
    ).eval()
    with torch.no_grad():
        found = objective(batch_of(IMAGES, {"dx": target}), 0)
        logits = objective.logits(IMAGES.flatten(0, 1)).double().log_softmax(1)
    expected = -logits[torch.arange(24), target.repeat_interleave(2)].mean()
    assert float(found["loss"]) == pytest.approx(float(expected), rel=1e-5)
    accuracy = (logits.argmax(1) == target.repeat_interleave(2)).float().mean()
    assert float(found["accuracy"]) == pytest.approx(float(accuracy))


def masked_definition(z: torch.Tensor, codes: torch.Tensor, temperature: float) -> float:
    """The definition with false negatives left out, term by term, in float64; `z` (B, 2, D)."""
    z = torch.nn.functional.normalize(z.double(), dim=2)
    losses = []
    for item in range(len(z)):
        for view in range(2):
            total = positive = torch.exp(z[item, view] @ z[item, 1 - view] / temperature)
            for other in range(len(z)):
                if other != item and not (codes[item] == codes[other] >= 0):
                    total = total + torch.exp(z[other] @ z[item, view] / temperature).sum()
            losses.append(-torch.log(positive / total))
    return float(torch.stack(losses).mean())


CODES = torch.tensor([0, 0, 1, -1, 2, 0, -1, 3, 3, 4, 5, -1])


@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_items_that_share_a_value_are_no_negatives_of_each_other(temperature: float) -> None:
    settings = SimCLRSettings(temperature=temperature, hidden=32, output=16, false_negatives="patient")
    objective = SimCLR(encoder(), settings, seed=0).eval()
    with torch.no_grad():
        z = objective.head(objective.student(IMAGES.flatten(0, 1))).unflatten(0, (-1, 2))
        found = float(objective(batch_of(IMAGES, {"patient": CODES}), 0)["loss"])
    assert found == pytest.approx(masked_definition(z, CODES, temperature), rel=1e-5)
    assert found < masked_definition(z, torch.arange(12), temperature) - 0.01


@pytest.mark.parametrize("codes", [torch.full((12,), -1), torch.arange(12)])
def test_without_any_shared_value_the_masked_loss_and_its_gradient_are_lightlys(codes: torch.Tensor) -> None:
    from lightly.loss import NTXentLoss

    generator = torch.Generator().manual_seed(3)
    views = torch.randn(2, 12, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    losses = masked_nt_xent(views[0], views[1], codes, 0.2), NTXentLoss(0.2)(views[0], views[1])
    gradients = [torch.autograd.grad(loss, views)[0] for loss in losses]
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*gradients)


def test_a_batch_of_one_patient_has_nothing_to_push_apart() -> None:
    views = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(3))
    assert float(masked_nt_xent(views[0], views[1], torch.zeros(6, dtype=torch.long), 0.1)) == 0.0

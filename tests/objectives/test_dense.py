"""The dense objectives: who is compared with whom, and what the losses are told."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from dense_toys import CROPS, SIZE, STILL, scene

from cfssl.data.geometry import warp
from cfssl.models.backbone import BackboneSettings, create_backbone
from cfssl.models.dense import DecoderSettings
from cfssl.objectives import create_objective, labelling_masks, takes_views
from cfssl.objectives.dense import (
    Dense,
    DVDSettings,
    MVDSettings,
    SDVDSettings,
    SMVDSettings,
    class_codes,
    trusted,
    view_pairs,
)
from cfssl.seeds import torch_generator

SMALL = {"points": 24, "hidden": 16, "output": 8, "decoder": DecoderSettings(widths=(16, 8, 8, 8, 8))}
LUNGS = ("left", "right")
METHODS = {
    "dvd": DVDSettings(**SMALL),
    "s_dvd": SDVDSettings(**SMALL, structures=LUNGS),
    "mvd": MVDSettings(**SMALL),
    "s_mvd": SMVDSettings(**SMALL, structures=LUNGS),
}


def dense(settings: object, seed: int = 0) -> Dense:
    encoder = create_backbone(BackboneSettings("test_resnet"), 1, SIZE, seed)
    objective = create_objective(settings, encoder, seed, images=100, steps=10, channels=1)
    assert isinstance(objective, Dense)
    return objective


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("views", [2, 4])
def test_a_training_step_lowers_the_loss_of_its_batch(name: str, views: int) -> None:
    objective, batch = dense(METHODS[name]), scene(6, views, CROPS)
    optimiser = torch.optim.AdamW(objective.parameters(), lr=3e-3)
    losses = []
    for _ in range(12):
        loss = objective(batch, 0)["loss"]  # at the same points
        losses.append(loss.item())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert losses[-1] < losses[0] - 0.05
    assert all(math.isfinite(loss) for loss in losses)


@pytest.mark.parametrize("name", METHODS)
def test_an_untrained_network_is_at_the_logarithm_of_the_number_of_candidates(name: str) -> None:
    """Where all projections are nearly alike, every candidate is as likely."""
    objective, batch = dense(METHODS[name]), scene(5, 3, CROPS)
    torch.nn.init.zeros_(objective.head[2].weight)
    torch.nn.init.ones_(objective.head[2].bias)
    found = objective(batch, 0)
    points = 24 * 5 * found["overlap"].item()
    if name in ("dvd", "s_dvd"):
        assert found["overlap"] == 1  # else every pair has another number of candidates
        assert found["loss"].item() == pytest.approx(2 * math.log(points), abs=1e-4)
    else:
        assert found["loss"].item() == pytest.approx(math.log(3 * points - 1), abs=1e-4)


def plain_infonce(a: torch.Tensor, b: torch.Tensor, tau: float) -> torch.Tensor:
    """Of matched rows (N, C), over the rows of `b`."""
    z_a, z_b = (torch.nn.functional.normalize(z.double(), dim=1) for z in (a, b))
    s = z_a @ z_b.T / tau
    return (s.logsumexp(1) - s.diagonal()).mean()


def test_dvd_of_views_that_are_not_augmented_is_infonce_of_the_same_pixels() -> None:
    """The whole chain, points to loss, against the formula on the projected map."""
    settings = replace(METHODS["dvd"], points=32 * 32)  # every pixel once
    objective, batch = dense(settings).eval(), scene(2, 3, STILL)
    batch = replace(batch, images=torch.rand(batch.images.shape, generator=torch_generator(0)))
    valid = batch.valid[0, 0]
    with torch.no_grad():
        found = objective(batch, 0)["loss"]
        maps = objective.network(batch.images.flatten(0, 1)).unflatten(0, (2, 3))
        z = objective.head(maps.permute(0, 1, 3, 4, 2))[:, :, valid]  # (B, V, n, C)
        first, *others = (view.flatten(0, 1) for view in z.unbind(1))
        pairs = [plain_infonce(first, other, 0.7) + plain_infonce(other, first, 0.7) for other in others]
    # of the pixels whose neighbourhood is valid every one is drawn once or twice, so up to that
    expected = torch.stack(pairs).mean()
    repeated = 2 * math.log(32 * 32 / valid.sum().item())
    assert found.item() == pytest.approx(expected.item() + repeated, abs=0.02)


def test_mirrored_counterfactual_pairs_are_matched_through_their_maps() -> None:
    """A network that tells every pixel's place in the source has nothing left to learn: its loss is at the
    floor of perfect matches whatever the views' geometry, and far above when the maps are taken away."""

    class Places(torch.nn.Module):
        """(B V, 1, H, W) -> sines of the source coordinates that the images hold."""

        encoder = torch.nn.Identity()

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            waves = [torch.sin(k * images) for k in range(1, 9)] + [
                torch.cos(k * images) for k in range(1, 9)
            ]
            return torch.cat(waves, dim=1)

    objective = dense(replace(METHODS["dvd"], temperature=0.05))
    objective.network, objective.head = Places(), torch.nn.Identity()
    batch = scene(4, 2, replace(CROPS, horizontal_flip=0.5))
    y, x = np.mgrid[-1:1:48j, -1:1:48j].astype(np.float32)
    shown = np.array(
        [
            [np.stack([warp(3 * (part + item), affine, SIZE) for part in (x, y)]) for affine in own]
            for item, own in enumerate(batch.affine.double().numpy())
        ]
    )
    batch = replace(batch, images=torch.from_numpy(shown))
    with torch.no_grad():
        matched = objective(batch, 0)["loss"]
        mistaken = objective(replace(batch, affine=torch.eye(2, 3).expand_as(batch.affine)), 0)["loss"]
    assert matched < 3
    assert mistaken > matched + 3


def test_s_methods_follow_the_labels_and_not_the_places() -> None:
    """With projections that tell the class alone, the silver losses are at their floor; DVD is not, for which
    pixels of a class differ."""
    for name in ("s_dvd", "s_mvd"):
        objective, batch = dense(METHODS[name]), scene(6, 2, CROPS)
        assert batch.labels is not None
        classes = class_codes(batch.labels)

        class Classes(torch.nn.Module):
            encoder = torch.nn.Identity()

            def forward(self, images: torch.Tensor, classes: torch.Tensor = classes) -> torch.Tensor:
                one_hot = torch.nn.functional.one_hot(classes.flatten(0, 1), 3)
                return one_hot.permute(0, 3, 1, 2).float()

        class Nearest(torch.nn.Module):
            """The class that a bilinear value is mostly of."""

            def forward(self, z: torch.Tensor) -> torch.Tensor:
                return torch.nn.functional.one_hot(z.argmax(-1), 3).float()

        objective.network, objective.head = Classes(), Nearest()
        at_floor = objective(batch, 0)["loss"]
        assert batch.labels is not None
        swapped = replace(batch, labels=batch.labels.flip(0))
        assert at_floor < objective(swapped, 0)["loss"] - 0.1


def test_labels_and_points_of_both_views_reach_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    from cfssl.objectives import dense as module

    def spy(a: torch.Tensor, b: torch.Tensor, temperature: float, **options: object) -> torch.Tensor:
        seen.append(options)
        return a.sum() * 0

    monkeypatch.setattr(module, "pair_loss", spy)
    settings = SDVDSettings(
        **SMALL, structures=LUNGS, background_anchors=True, exclusion_radius=0.05, anchors="all_pairs"
    )
    batch = scene(4, 3, CROPS)
    dense(settings)(batch, 0)
    assert len(seen) == 6  # three pairs, both ways
    for options in seen:
        first, second = options["labels"]  # type: ignore[misc]
        assert (first == second)[options["is_known"]].float().mean() > 0.9  # edges fall on either side
        assert set(first.unique().tolist()) == {0, 1, 2}
        assert options["background_anchors"] is True
        assert options["exclusion_radius"] == 0.05
        assert options["source"].shape == (4, 24, 2)  # type: ignore[attr-defined]


def test_pairs_of_views_are_those_with_the_real_one_or_all() -> None:
    assert list(view_pairs(4, "view0")) == [(0, 1), (0, 2), (0, 3)]
    assert list(view_pairs(3, "all_pairs")) == [(0, 1), (0, 2), (1, 2)]


def test_codes_are_the_first_mask_and_unknown_where_nobody_looked() -> None:
    labels = torch.zeros(3, 2, 2, 1, 4, dtype=torch.bool)
    labels[0, 0, 0, 0, 0] = labels[0, 0, 0, 0, 1] = labels[0, 0, 1, 0, 1] = labels[0, 0, 1, 0, 2] = True
    labels[1, 1, 1, 0, 3] = True
    codes = class_codes(labels)
    assert codes[0, 0, 0].tolist() == [1, 1, 2, 0]
    assert codes[0, 1, 0].tolist() == [0, 0, 0, 0]
    assert codes[1, :, 0].tolist() == [[0, 0, 0, 0], [0, 0, 0, 2]]
    assert (codes[2] == -1).all()


def test_points_are_a_function_of_seed_and_step() -> None:
    objective, batch = dense(METHODS["mvd"]), scene(3, 2, CROPS)
    first, again, later = (objective(batch, step)["loss"].item() for step in (0, 0, 1))
    assert first == again
    assert first != later


def test_the_losses_stay_in_float32_under_autocast() -> None:
    objective, batch = dense(METHODS["dvd"]).eval(), scene(3, 2, CROPS)
    exact = objective(batch, 0)["loss"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = objective(batch, 0)["loss"]
    assert mixed.dtype == torch.float32
    assert mixed.item() == pytest.approx(exact.item(), abs=0.05)


def test_the_student_is_the_encoder_under_the_decoder() -> None:
    objective = dense(METHODS["dvd"])
    assert objective.student is objective.network.encoder
    assert objective.student(torch.rand(2, 1, *SIZE)).shape == (2, 96)
    keys = list(objective.state_dict())
    assert len(keys) == len(set(keys))
    assert all(key.startswith(("network.encoder.", "network.decoder.", "head.")) for key in keys)


def test_what_the_methods_take() -> None:
    assert labelling_masks(METHODS["s_dvd"]) == labelling_masks(METHODS["s_mvd"]) == LUNGS
    assert labelling_masks(METHODS["dvd"]) == ()
    assert takes_views(METHODS["mvd"]) == (2, None)


@pytest.mark.parametrize("name", METHODS)
def test_points_that_a_counterfactual_changed_weigh_less(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from cfssl.objectives import dense as module

    seen = []
    loss = "pair_loss" if name.endswith("dvd") else "multi_view_loss"

    def spy(*arguments: torch.Tensor, **options: torch.Tensor) -> torch.Tensor:
        seen.append(options["weight"])
        return arguments[0].sum() * 0

    monkeypatch.setattr(module, loss, spy)
    batch = scene(3, 2, CROPS)
    change = torch.zeros(3, 2, *SIZE)
    change[1, 1] = 0.3
    dense(replace(METHODS[name], change_scale=0.1))(replace(batch, change=change), 0)
    for weight in seen:
        expected = torch.ones(3, 24) if loss == "pair_loss" else torch.ones(3, 2, 24)
        expected[(1,) if loss == "pair_loss" else (1, 1)] = math.exp(-3)
        torch.testing.assert_close(weight, expected)


def test_a_label_is_trusted_as_its_mask_and_background_as_the_least_of_them() -> None:
    confidence = torch.tensor([[0.9, 0.6], [0.3, 0.8]])
    codes = torch.tensor([[[0, 1, 2]], [[2, -1, 1]]])
    assert (
        trusted(confidence, codes).tolist() == torch.tensor([[[0.6, 0.9, 0.6]], [[0.8, 0.3, 0.3]]]).tolist()
    )


@pytest.mark.parametrize("name", ["s_dvd", "s_mvd"])
def test_points_with_doubtful_labels_weigh_less_in_the_loss(name: str) -> None:
    """With equal confidence nothing changes; an image that is not trusted at all counts like one without
    labels, up to its points as negatives."""
    batch, settings = scene(4, 2, CROPS), replace(METHODS[name], label_confidence=True)
    plain = dense(METHODS[name])(batch, 0)["loss"]

    def loss(confidence: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = dense(settings)(replace(batch, confidence=confidence), 0)["loss"]
        return found

    torch.testing.assert_close(loss(torch.full((4, 2), 0.7)), plain)
    doubtful = torch.full((4, 2), 0.7)
    doubtful[1] = 0.0
    assert batch.labels is not None
    unlabelled = batch.labels.clone()
    unlabelled[1] = False
    expected = dense(METHODS[name])(replace(batch, labels=unlabelled), 0)["loss"]
    torch.testing.assert_close(loss(doubtful), expected)
    assert not torch.isclose(expected, plain, rtol=1e-4)


def test_doubt_and_change_multiply(monkeypatch: pytest.MonkeyPatch) -> None:
    from cfssl.objectives import dense as module

    seen = []

    def spy(*arguments: torch.Tensor, **options: torch.Tensor) -> torch.Tensor:
        seen.append(options["weight"])
        return arguments[0].sum() * 0

    monkeypatch.setattr(module, "multi_view_loss", spy)
    settings = replace(METHODS["s_mvd"], label_confidence=True, change_scale=0.1)
    change = torch.zeros(3, 2, *SIZE)
    change[:, 1] = 0.1
    batch = replace(scene(3, 2, CROPS), change=change, confidence=torch.full((3, 2), 0.5))
    dense(settings)(batch, 0)
    expected = torch.tensor([0.5, 0.5 * math.exp(-1)])[:, None].expand(3, 2, 24)
    torch.testing.assert_close(seen[0], expected)

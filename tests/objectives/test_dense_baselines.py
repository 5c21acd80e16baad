"""Dense baselines against their formulas, written plainly."""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from dense_toys import CROPS, SIZE, scene
from torch import nn

from cfssl.data.geometry import to_source
from cfssl.errors import UserError
from cfssl.models.backbone import BackboneSettings, create_backbone
from cfssl.models.dense import DecoderSettings, Grid
from cfssl.objectives import comparison, create_objective, labelling_masks
from cfssl.objectives.grids import (
    DetConSettings,
    PixProSettings,
    VICRegLSettings,
    agreement,
    cell_places,
    near_cells,
    propagated,
    region_means,
)
from cfssl.objectives.local_regions import LocalRegionsSettings, region_contrast, region_offsets
from cfssl.objectives.points import item_generators
from cfssl.objectives.queues import DenseCLSettings, Queue, VADeRSettings, queue_size
from cfssl.seeds import torch_generator

DECODER = DecoderSettings(widths=(16, 8, 8, 8, 8))
METHODS = {
    "vader": VADeRSettings(points=24, queue=300, hidden=16, output=8, momentum=0.9, decoder=DECODER),
    "densecl": DenseCLSettings(queue=64, hidden=16, output=8, momentum=0.9, stride=8),
    "pixpro": PixProSettings(stride=8, hidden=16, output=8),
    "vicregl": VICRegLSettings(stride=8, hidden=16, output=16, matches=(10, 4)),
    "detcon": DetConSettings(structures=("left", "right"), stride=8, hidden=16, output=8),
    "local_regions": LocalRegionsSettings(output=8, decoder=replace(DECODER, stride=4)),
}


def method(name: str, **changes: object) -> nn.Module:
    encoder = create_backbone(BackboneSettings("test_resnet"), 1, SIZE, 0)
    settings = replace(METHODS[name], **changes)
    return create_objective(settings, encoder, 0, images=100, steps=20, channels=1)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch_generator("baselines", seed))


def train(objective: nn.Module, steps: range, batches: int, moves: bool = True) -> list[float]:
    """The losses of steps on that many scenes in turn; teachers and queues stand still without `moves`."""
    optimiser = torch.optim.SGD(objective.parameters(), lr=0.05)
    losses = []
    for step in steps:
        objective.train()
        loss = objective(scene(8, 2, CROPS, seed=step % batches), step)["loss"]
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(objective.parameters(), 1.0)
        optimiser.step()
        if moves:
            objective.after_step(step)  # type: ignore[operator]
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("name", METHODS)
def test_training_ends_where_an_interrupted_one_ends(name: str) -> None:
    """The state of an objective is all there is: saved after three steps and loaded into a new one, it goes
    on with the same bits."""
    whole, first, second = method(name), method(name), method(name)
    losses = train(whole, range(6), batches=3)
    assert all(math.isfinite(loss) for loss in losses)
    train(first, range(3), batches=3)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert train(second, range(3, 6), batches=3) == losses[3:]
    assert all(torch.equal(second.state_dict()[key], value) for key, value in whole.state_dict().items())


@pytest.mark.parametrize("name", METHODS)
def test_steps_lower_the_loss_of_a_batch_against_what_stands_still(name: str) -> None:
    losses = train(method(name), range(12), batches=1, moves=False)
    assert np.mean(losses[-3:]) < np.mean(losses[:3]) - 0.01


@pytest.mark.parametrize("name", METHODS)
def test_the_student_is_the_encoder_and_gets_gradients(name: str) -> None:
    objective = method(name)
    objective(scene(4, 2, CROPS), 0)["loss"].backward()
    student = objective.student
    assert isinstance(student, nn.Module)
    assert student(torch.rand(2, 1, *SIZE)).shape == (2, 96)
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in student.parameters())
    assert all(not p.requires_grad for key, p in objective.named_parameters() if key.startswith("teacher"))


def test_what_compares_the_images_of_a_batch_says_so() -> None:
    alone = {name for name, settings in METHODS.items() if comparison(settings) is None}
    assert alone == {"vader", "densecl", "pixpro", "local_regions"}
    assert labelling_masks(METHODS["detcon"]) == ("left", "right")


def test_a_queue_holds_the_last_keys_of_a_step_and_nothing_before_it_ends() -> None:
    queue = Queue(10, 4, seed=0, name="test")
    first = queue.keys.clone()
    torch.testing.assert_close(first.norm(dim=1), torch.ones(10))
    keys = nn.functional.normalize(draw(14, 4), dim=1)
    queue.see(keys[:3])
    queue.see(keys[3:6])
    assert torch.equal(queue.keys, first)
    queue.move()
    assert torch.equal(queue.keys, torch.cat([keys[:6], first[6:]]))
    queue.see(keys[6:12])
    queue.move()
    assert torch.equal(queue.keys, torch.cat([keys[10:12], keys[2:6], keys[6:10]]))
    queue.move()  # a step without keys
    assert queue.place == 2
    queue.see(torch.cat([keys, keys]))  # more than it holds: the last of them
    queue.move()
    assert {tuple(key) for key in queue.keys.tolist()} == {tuple(key) for key in keys[4:].tolist()}


def test_the_contrast_with_a_queue_is_cross_entropy() -> None:
    queue = Queue(50, 8, seed=0, name="test").double()
    q, k = (nn.functional.normalize(draw(6, 8, seed=seed).double(), dim=1) for seed in (1, 2))
    logits = torch.cat([(q * k).sum(1, keepdim=True), q @ queue.keys.T], dim=1) / 0.2
    expected = nn.functional.cross_entropy(logits, torch.zeros(6, dtype=torch.long), reduction="none")
    torch.testing.assert_close(queue.contrast(q, k, 0.2), expected, atol=1e-12, rtol=1e-12)


def test_a_queue_is_a_quarter_of_the_images_unless_told() -> None:
    assert queue_size(None, 4000, 1) == 1000
    assert queue_size(None, 100, 1) == 256
    assert queue_size(None, 10**6, 32) == 65_536
    assert queue_size(77, 10**6, 32) == 77


def test_densecl_pairs_a_cell_with_the_most_similar_one_and_remembers_means() -> None:
    objective, batch = method("densecl").eval(), scene(3, 2, CROPS)
    with torch.no_grad():
        found = objective(batch, 0)
        cells, pooled = objective.grid(objective.student, batch.images[:, 0])
        others, other_pooled = objective.grid(
            objective.student, batch.images[:, 1]
        )  # the teacher starts alike
        unit = nn.functional.normalize
        best = (unit(cells, dim=2) @ unit(others, dim=2).mT).argmax(2)
        q, k = (unit(objective.heads["dense"](part), dim=2) for part in (cells, others))
        losses = []
        for item in range(3):
            for cell in range(cells.shape[1]):
                own = q[item, cell] @ k[item, best[item, cell]]
                logits = torch.cat([own[None], objective.queues["dense"].keys @ q[item, cell]]) / 0.2
                losses.append(logits.logsumexp(0) - logits[0])
        assert found["dense"].item() == pytest.approx(torch.stack(losses).mean().item(), abs=1e-4)
        q, k = (unit(objective.heads["whole"](part), dim=1) for part in (pooled, other_pooled))
        logits = torch.cat([(q * k).sum(1, keepdim=True), q @ objective.queues["whole"].keys.T], 1) / 0.2
        whole = (logits.logsumexp(1) - logits[:, 0]).mean()
        assert found["whole"].item() == pytest.approx(whole.item(), abs=1e-4)
        assert found["loss"].item() == pytest.approx((found["dense"] + found["whole"]).item() / 2, abs=1e-5)
        objective.after_step(0)
        remembered = objective.queues["dense"].keys[:3]
        torch.testing.assert_close(
            remembered, unit(unit(objective.heads["dense"](others), dim=2).mean(1), dim=1)
        )


def test_cells_are_alike_where_their_centres_lie_within_the_share_of_the_diagonal() -> None:
    batch = scene(12, 2, CROPS)
    size, distance = (4, 4), 0.7
    found = near_cells(batch.affine, size, distance)
    places = cell_places(batch.affine, size).double()
    centre = (2 * np.arange(4) + 1) / 4 - 1
    grid = np.stack(np.meshgrid(centre, centre), axis=-1).reshape(-1, 2)
    for item in range(12):
        diagonals = []
        for view in range(2):
            affine = batch.affine[item, view].double().numpy()
            np.testing.assert_allclose(places[item, view], to_source(affine, grid), atol=1e-6)
            corners = to_source(
                affine, np.array([[-0.25, -0.25], [0.25, 0.25], [-0.25, 0.25], [0.25, -0.25]])
            )
            diagonals += [np.linalg.norm(corners[0] - corners[1]), np.linalg.norm(corners[2] - corners[3])]
        for i in range(16):
            for j in range(16):
                gap = float((places[item, 0, i] - places[item, 1, j]).norm())
                if abs(gap - distance * max(diagonals)) > 1e-6:
                    assert bool(found[item, i, j]) == (gap < distance * max(diagonals))


def test_propagation_and_agreement_are_their_sums() -> None:
    x, g, z = (draw(2, 5, 3, seed=seed).double() for seed in (1, 2, 3))
    y = propagated(x, g, gamma=2.0)
    cosine = nn.functional.cosine_similarity
    for item in range(2):
        for i in range(5):
            terms = [cosine(x[item, i], x[item, j], dim=0).clamp_min(0) ** 2 * g[item, j] for j in range(5)]
            torch.testing.assert_close(y[item, i], torch.stack(terms).sum(0))
    alike = torch.zeros(2, 5, 5, dtype=torch.bool)
    assert agreement(y, z, alike) == 0
    alike[0, 1, 2] = alike[0, 3, 3] = True
    expected = (y[0, 1] @ z[0, 2] + y[0, 3] @ z[0, 3]) / 2  # the other item has no pair
    torch.testing.assert_close(agreement(y, z, alike), expected)


def test_a_perfect_pixpro_student_is_at_minus_two() -> None:
    objective, batch = method("pixpro"), scene(3, 2, CROPS)
    objective.transform = nn.Conv2d(8, 8, 1)
    nn.init.zeros_(objective.transform.weight)
    nn.init.ones_(objective.transform.bias)  # whatever is propagated is this vector
    teacher = objective.teacher["projector"]
    nn.init.zeros_(teacher[3].weight)
    nn.init.ones_(teacher[3].bias)
    assert objective(batch, 0)["loss"].item() == pytest.approx(-2, abs=1e-5)


def test_vicregl_is_told_where_the_cells_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    objective, batch = method("vicregl"), scene(3, 2, CROPS)
    seen = {}

    def spy(features: list, grids: list) -> torch.Tensor:
        seen["features"], seen["grids"] = features, grids
        return features[0][0].sum()

    monkeypatch.setattr(objective.loss, "forward", spy)
    objective(batch, 0)
    whole, local = seen["features"][1]
    assert whole.shape == (3, 16)
    assert local.shape == (3, 4, 4, 16)
    corner = seen["grids"][1][0, 3, 0]  # last row, first column
    affine = batch.affine[0, 1].double().numpy()
    np.testing.assert_allclose(corner, to_source(affine, np.array([[-0.75, 0.75]]))[0], atol=1e-6)


def test_region_means_weigh_cells_by_the_share_of_their_pixels() -> None:
    maps = draw(2, 3, 2, 2).double()
    codes = torch.randint(0, 3, (2, 6, 6), generator=torch_generator("codes"))
    means, shares = region_means(maps, codes, 4)
    for item in range(2):
        for label in range(3):
            inside = codes[item] == label
            pixels = maps[item].repeat_interleave(3, 1).repeat_interleave(3, 2)[:, inside]  # (3, n)
            torch.testing.assert_close(means[item, label].float(), pixels.mean(1).float())
            assert shares[item, label].item() == pytest.approx(inside.float().mean().item(), abs=1e-6)
    assert (shares[:, 3] == 0).all()
    assert (means[:, 3] == 0).all()


def test_detcon_draws_regions_that_its_views_show(monkeypatch: pytest.MonkeyPatch) -> None:
    objective, batch = method("detcon"), scene(3, 2, CROPS)
    assert batch.labels is not None
    labels = batch.labels.clone()
    labels[0, :, 1] = False  # the right one is never seen in item 0
    labels[1] = False  # nobody looked: one region, the background
    drawn = []

    def spy(first: torch.Tensor, second: torch.Tensor, *ids: torch.Tensor) -> torch.Tensor:
        drawn.extend(ids)
        return first.sum()

    monkeypatch.setattr(objective.loss, "forward", spy)
    objective(replace(batch, labels=labels), 0)
    for ids in drawn:
        assert ids.shape == (3, 16)
        assert 2 not in ids[0]
        assert set(ids[1].tolist()) == {0}


def test_region_contrast_is_its_formula_over_negatives_of_the_same_images() -> None:
    z, generators = draw(2, 2, 4, 5).double(), item_generators((0, 1), 0)
    every = region_contrast(z, 0.1, negatives=6, generators=generators)  # all the others
    unit = nn.functional.normalize(z, dim=3)
    for item in range(2):
        losses = []
        for view in range(2):
            for region in range(4):
                others = [unit[item, v, r] for v in range(2) for r in range(4) if r != region]
                own = unit[item, view, region]
                positive = torch.exp(own @ unit[item, 1 - view, region] / 0.1)
                negative = sum(torch.exp(own @ other / 0.1) for other in others)
                losses.append(-torch.log(positive / (positive + negative)))
        assert every[item].item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-9)
    fewer = region_contrast(z, 0.1, negatives=2, generators=generators)
    assert (fewer < every).all()


def test_regions_are_blocks_of_neighbouring_points() -> None:
    offsets = region_offsets(3, (8, 16), torch.device("cpu"))
    assert offsets.shape == (9, 2)
    assert offsets[4].tolist() == [0, 0]
    assert offsets[0].tolist() == [-2 / 16, -2 / 8]
    assert offsets[5].tolist() == [2 / 16, 0]
    with pytest.raises(ValueError, match="the other 1 regions of two views are 2; lower it"):
        LocalRegionsSettings(regions=2, negatives=5)


def test_a_grid_is_chosen_by_its_stride() -> None:
    encoder = create_backbone(BackboneSettings("test_resnet"), 1, SIZE, 0).eval()
    x = torch.rand(2, 1, *SIZE)
    cells, pooled = Grid(encoder, 8)(encoder, x)
    assert cells.shape == (2, 16, 48)
    torch.testing.assert_close(pooled, encoder(x))
    maps = Grid(encoder, 8).map(encoder, x)
    torch.testing.assert_close(maps.flatten(2).mT, cells)
    assert Grid(encoder, None).width == 96
    with pytest.raises(UserError, match="stride is 7, but the grids of ResNet have the strides 2, 4, 8, 16"):
        Grid(encoder, 7)

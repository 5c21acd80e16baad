"""Targets and cross-entropies are those of lightly and of their definitions; what follows, follows once."""

import math

import pytest
import torch
from torch import nn

from cfssl.objectives.teacher import (
    Centre,
    Teacher,
    entropies,
    patches_cross_entropy,
    running_statistics_held,
    sinkhorn_targets,
    softmax_targets,
    views_cross_entropy,
)

GENERATOR = torch.Generator().manual_seed(0)
PROTOTYPES = 16


def logits_of(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, PROTOTYPES, generator=GENERATOR, dtype=torch.float64)


@pytest.mark.parametrize("local", [0, 1, 8])
def test_the_loss_between_views_is_lightlys_with_its_mean_over_pairs(local: int) -> None:
    from lightly.loss import DINOLoss

    oracle = DINOLoss(PROTOTYPES, student_temp=0.1).double()
    oracle.center += torch.randn(PROTOTYPES, generator=GENERATOR, dtype=torch.float64)
    teacher, student = logits_of(2, 6), logits_of(2 + local, 6).requires_grad_()
    targets = softmax_targets(teacher, oracle.center, 0.06)
    found = views_cross_entropy(targets, student, 0.1)
    expected = oracle(list(teacher), list(student), teacher_temp=0.06)
    torch.testing.assert_close(found, expected)
    pairs = [(t, s) for t in range(2) for s in range(2 + local) if t != s]
    assert len(pairs) == {0: 2, 1: 4, 8: 18}[local]
    cross = [-(targets[t] * (student[s] / 0.1).log_softmax(-1)).sum(-1).mean() for t, s in pairs]
    torch.testing.assert_close(found, torch.stack(cross).mean())
    gradients = [torch.autograd.grad(loss, student)[0] for loss in (found, expected)]
    torch.testing.assert_close(*gradients)


def test_the_loss_of_patches_is_lightlys_and_nothing_without_any() -> None:
    from lightly.loss import IBOTPatchLoss

    mask = torch.rand(5, 3, 4, generator=GENERATOR) < 0.4
    mask[2] = False
    oracle = IBOTPatchLoss(PROTOTYPES, student_temp=0.1).double()
    teacher, student = logits_of(int(mask.sum())), logits_of(int(mask.sum()))
    centre = oracle.center.value.clone()
    weights = (1 / mask.sum((1, 2), keepdim=True) / len(mask)).expand_as(mask)[mask].double()
    found = patches_cross_entropy(softmax_targets(teacher, centre, 0.05), student, weights, 0.1)
    torch.testing.assert_close(found, oracle(teacher, student, mask, teacher_temp=0.05))
    nothing = logits_of(0).requires_grad_()
    loss = patches_cross_entropy(nothing.detach(), nothing, nothing.new_zeros(0), 0.1)
    assert float(loss.detach()) == 0
    assert torch.autograd.grad(loss, nothing)[0].shape == (0, PROTOTYPES)


def test_the_centre_is_lightlys_and_takes_micro_batches_as_one_batch() -> None:
    from lightly.models.modules.center import Center

    oracle, centre = Center((1, PROTOTYPES), momentum=0.9).double(), Centre(PROTOTYPES, 0.9).double()
    for _ in range(3):
        logits = logits_of(12)
        oracle.update(logits)
        for part in logits.split(4):
            centre.see(part)
            assert not torch.allclose(centre.value, oracle.value[0])
        centre.move()
        torch.testing.assert_close(centre.value, oracle.value[0])
    before = centre.value.clone()
    centre.see(logits_of(0))
    centre.move()
    assert torch.equal(centre.value, before)
    assert set(centre.state_dict()) == {"value"}  # the rest is zero between steps


def sinkhorn(logits: torch.Tensor, temperature: float, iterations: int) -> torch.Tensor:
    """The published algorithm: exponentials first, then sums over prototypes and over images in turn."""
    q = (logits / temperature).exp().T
    q = q / q.sum()
    for _ in range(iterations):
        q = q / q.sum(1, keepdim=True) / len(q)
        q = q / q.sum(0, keepdim=True) / q.shape[1]
    return (q * q.shape[1]).T


def test_sinkhorn_targets_are_the_published_ones_and_use_every_prototype_in_the_limit() -> None:
    logits = logits_of(32) / 4
    torch.testing.assert_close(sinkhorn_targets(logits, 0.07), sinkhorn(logits, 0.07, 3))
    for _ in range(60):
        logits = 0.07 * sinkhorn_targets(logits, 0.07).log()
    used = sinkhorn_targets(logits, 0.07).sum(0)
    torch.testing.assert_close(used, torch.full_like(used, 2.0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scale", [1.0, 30.0, 1e4])
def test_sinkhorn_targets_are_finite_in_float32_whatever_the_logits(scale: float) -> None:
    logits = scale * logits_of(24).float()
    logits[0] -= 20 * scale  # far under the others: a shift by the greatest would leave nothing of it
    found = sinkhorn_targets(logits, 0.04)
    assert found.isfinite().all()
    torch.testing.assert_close(found.sum(1), torch.ones(24))
    if scale == 1.0:
        torch.testing.assert_close(found.double(), sinkhorn(logits.double(), 0.04, 3), rtol=1e-3, atol=1e-5)


def test_entropies_tell_the_two_ways_of_collapsing_from_health() -> None:
    def of(targets: torch.Tensor) -> list[float]:
        return [float(value) for value in entropies(targets[None]).values()]

    same = torch.zeros(8, 8)
    same[:, 3] = 1
    assert of(torch.full((8, 8), 1 / 8)) == pytest.approx([1, 1])  # says nothing
    assert of(same) == pytest.approx([0, 0])  # says the same of every image
    assert of(torch.eye(8)) == pytest.approx([0, 1])
    halves = torch.tensor([[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]])
    assert of(halves) == pytest.approx([math.log(2) / math.log(4), 1])


def network(seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5))


def test_a_teacher_starts_as_its_student_and_follows_by_the_momentum() -> None:
    student = network(0)
    teacher = Teacher({"net": network(1)}, {"net": student})
    start = {name: value.clone() for name, value in student.state_dict().items()}
    assert all(torch.equal(value, start[name]) for name, value in teacher["net"].state_dict().items())
    with torch.no_grad():
        for parameter in student.parameters():
            parameter += 1
    teacher.follow({"net": student}, 0.75)
    now = dict(student.named_parameters())
    for name, value in teacher["net"].named_parameters():
        torch.testing.assert_close(value, 0.75 * start[name] + 0.25 * now[name])


def test_a_teacher_normalises_by_the_batch_and_drops_nothing() -> None:
    student = network(0)
    teacher = Teacher({"net": network(1)}, {"net": student})
    student(100 * torch.rand(8, 1, 8, 8, generator=GENERATOR))  # moves the student's running statistics
    teacher.follow({"net": student}, 0.9)
    images = torch.rand(8, 1, 8, 8, generator=GENERATOR)
    said = teacher["net"](images)
    torch.testing.assert_close(said.mean((0, 2, 3)), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(said.std((0, 2, 3), correction=0), torch.ones(4), atol=0.01, rtol=0)
    assert torch.equal(teacher["net"](images), said)


def test_a_teacher_is_never_trained() -> None:
    holder = nn.ModuleDict({"teacher": Teacher({"net": network(1)}, {"net": network(0)})}).train()
    assert holder.training
    training = {name for name, module in holder["teacher"].named_modules() if module.training}
    assert training == {"net.1"}  # the batch normalisation
    assert not any(parameter.requires_grad for parameter in holder.parameters())


def test_held_running_statistics_are_not_moved_by_what_is_normalised_alike() -> None:
    net, images = network(0)[:2].train(), torch.rand(8, 1, 8, 8, generator=GENERATOR)
    before = {name: value.clone() for name, value in net.named_buffers()}
    with running_statistics_held(net):
        held = net(images)
    assert torch.equal(net[1].running_mean, before["1.running_mean"])
    assert torch.equal(net[1].running_var, before["1.running_var"])
    assert torch.equal(net(images), held)
    assert not torch.equal(net[1].running_mean, before["1.running_mean"])

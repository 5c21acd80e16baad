"""What self-distillation has beside a student: a teacher that follows it, targets made of what the teacher
says, and the cross-entropies that pull the student there.

Everything that moves outside the optimiser moves once per optimiser step, from all its micro-batches
(`Teacher.follow`, `Centre.move`). Logits enter in float32, outside autocast.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import distributed, nn

from cfssl.objectives.gathered import gathered

SINKHORN_ITERATIONS = 3
BATCH_NORMS = nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm


class Teacher(nn.ModuleDict):
    """Networks by name, started from a student's of the same names and moved by `follow` alone; never trained
    by gradients. In training, too, all of it is in eval mode but its batch normalisation, which takes the
    statistics of what it is given (Caron et al. 2021, Grill et al. 2020): those that a student has gathered
    fit neither the teacher's weights nor, after local views, any of its images."""

    def __init__(self, copies: Mapping[str, nn.Module], students: Mapping[str, nn.Module]) -> None:
        """`copies`: networks of the same shapes, whatever their weights."""
        super().__init__(copies)
        for name, student in students.items():
            self[name].load_state_dict(student.state_dict())
        self.requires_grad_(False).train()

    def train(self, mode: bool = True) -> "Teacher":
        super().train(False)
        for module in self.modules():
            if isinstance(module, BATCH_NORMS):
                module.train(mode)
        return self

    @torch.no_grad()
    def follow(self, students: Mapping[str, nn.Module], momentum: float) -> None:
        """weights <- momentum * weights + (1 - momentum) * student's."""
        from lightly.models.utils import update_momentum

        for name, student in students.items():
            update_momentum(student, self[name], momentum)


@contextmanager
def running_statistics_held(network: nn.Module) -> Iterator[None]:
    """Inside, batches are normalised by their own statistics as ever, but leave no trace in the running ones,
    which an encoder is used with afterwards."""
    norms = [module for module in network.modules() if isinstance(module, BATCH_NORMS)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


class Centre(nn.Module):
    """The moving mean c (K,) of the teacher's logits (Caron et al. 2021, equation 4).

    `see` adds up what the micro-batches of a step hold, in all processes; `move` takes them in:
    c <- momentum * c + (1 - momentum) * mean. A step without any logits leaves it.
    """

    value: torch.Tensor
    total: torch.Tensor
    count: torch.Tensor

    def __init__(self, size: int, momentum: float) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("value", torch.zeros(size))
        # Zero between steps, so nothing to save.
        self.register_buffer("total", torch.zeros(size), persistent=False)
        self.register_buffer("count", torch.zeros(()), persistent=False)

    @torch.no_grad()
    def see(self, logits: torch.Tensor) -> None:
        """Logits (N, K); N may be 0."""
        self.total += logits.sum(0)
        self.count += len(logits)

    @torch.no_grad()
    def move(self) -> None:
        if distributed.is_initialized():
            distributed.all_reduce(self.total)
            distributed.all_reduce(self.count)
        moved = self.momentum * self.value + (1 - self.momentum) * self.total / self.count.clamp_min(1)
        self.value.copy_(torch.where(self.count > 0, moved, self.value))
        self.total.zero_()
        self.count.zero_()


def softmax_targets(logits: torch.Tensor, centre: torch.Tensor, temperature: float) -> torch.Tensor:
    """softmax((logits - c) / temperature) of logits (..., K)."""
    return ((logits - centre) / temperature).softmax(-1)


def sinkhorn_targets(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """Of logits (N, K): exp(logits / temperature), scaled in turn so that every prototype is used equally
    over the images of all processes, and every image's targets sum to one (Caron et al. 2020, section 3.1;
    three times, as DINOv2 has it).

    Computed on logarithms, where no logit is too large: the exponentials of the original overflow above
    logits of 3.5 at a temperature of 0.04, and shifted by their greatest they would underflow as far below.
    """
    log_targets = logits / temperature
    for _ in range(SINKHORN_ITERATIONS):
        log_targets = log_targets - logsumexp_of_all(log_targets)
        log_targets = log_targets - log_targets.logsumexp(1, keepdim=True)
    return log_targets.exp()


def logsumexp_of_all(x: torch.Tensor) -> torch.Tensor:
    """Over the first dimension of `x` (N, K) in all processes: (K,)."""
    found = x.logsumexp(0)
    if distributed.is_initialized():
        top = found.clone()
        distributed.all_reduce(top, distributed.ReduceOp.MAX)
        share = (found - top).exp()
        distributed.all_reduce(share)
        found = top + share.log()
    return found


def views_cross_entropy(targets: torch.Tensor, logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """Of the teacher's `targets` (T, B, K) and the student's `logits` (S, B, K), whose first T views are the
    same: the mean over images and over all pairs of different views (Caron et al. 2021, equation 3), 18 of
    them for T = 2 and S = 10."""
    views, images = targets.shape[:2]
    logits = logits / temperature
    # -sum_k t_k log softmax(s)_k = logsumexp(s) - t s, so that no log-softmax of all logits is kept.
    normaliser = logits.logsumexp(-1)  # (S, B)
    agreement = (targets * (logits.sum(0) - logits[:views])).sum()
    loss = views * normaliser.sum() - normaliser[:views].sum() - agreement
    return loss / (images * views * (len(logits) - 1))


def patches_cross_entropy(
    targets: torch.Tensor, logits: torch.Tensor, weights: torch.Tensor, temperature: float
) -> torch.Tensor:
    """Of the teacher's `targets` and the student's `logits` (N, K) of N masked patches, weighted by `weights`
    (N,) (Zhou et al. 2022, equation 2); 0 for N = 0."""
    logits = logits / temperature
    return ((logits.logsumexp(-1) - (targets * logits).sum(-1)) * weights).sum()


def entropies(targets: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of targets (..., K), as shares of the greatest possible, log K. `teacher_entropy`: the mean one of an
    image, which goes to 1 when the teacher says nothing. `marginal_entropy`: of the mean target, which goes
    to 0 when the teacher says the same of every image."""
    flat = targets.flatten(0, -2)
    greatest = math.log(flat.shape[1])
    return {
        "teacher_entropy": torch.special.entr(flat).sum(1).mean() / greatest,
        "marginal_entropy": torch.special.entr(gathered(flat.mean(0)[None]).mean(0)).sum() / greatest,
    }

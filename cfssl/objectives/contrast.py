"""The contrast of many points with many others: exact, in memory that grows with their number alone.

    l_a = log sum_{j in A(a)} exp(s_aj) - sum_j t_aj s_aj,      s_aj = q_a . k_j / tau

for rows q and columns k: InfoNCE (van den Oord et al. 2018) where the target t_a is one column, and the
supervised contrastive loss (Khosla et al. 2020, equation 2) where it is the mean over several. The matrix s,
N x M, is made and left again a few rows at a time. What a loss needs of it is a weighted sum of l_a, whose
gradient by s_aj is, up to the factor that arrives from behind,

    weight_a (exp(s_aj - log sum exp(s_a)) - t_aj),

known as soon as a row is there. So the gradients by q and k are summed up in the same pass, instead of making
every block once more when they are asked for: three matrix products as in the plain form, not four, and N x C
numbers kept instead of N x M.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

BLOCK = 2**21  # similarities at a time: 8 MiB of float32, and no faster with more
ROWS = 64  # at least, however many columns there are: products of fewer rows are slow


class Near(NamedTuple):
    """What is particular to the columns in the image of a row: their range among all, which of them are left
    out of the sum, (r, c) bool, and their share in the row's target, (r, c), where there are targets. Rows
    whose shares are all zero have no target."""

    columns: slice
    left_out: torch.Tensor | None = None
    share: torch.Tensor | None = None


def contrast(
    q: torch.Tensor,
    k: torch.Tensor,
    weight: torch.Tensor,
    temperature: float,
    itself: torch.Tensor | None = None,
    near: Callable[[slice], Near] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """sum_a weight_a l_a of the rows `q` (N, C) against the columns `k` (M, C), and sum_a weight_a, which has
    no gradient; both in the type of `q` and `k`, float32 or float64.

    `weight` (N,) gets no gradient either. `itself` (N,): the column that is the row itself and is left out.
    `near(rows)`: what is particular to a range of rows. Where it gives shares, they make the target t_a, and
    a row without target weighs nothing; where it does not, there is no second term. A row that weighs
    something has to have a column that is not left out.
    """
    return Contrast.apply(q, k, weight, temperature, itself, near)


def row_blocks(rows: int, columns: int) -> Iterator[slice]:
    """Ranges of rows that have at most BLOCK similarities with all columns, the first of them the longest;
    of ROWS rows where that is more."""
    size = max(ROWS, BLOCK // max(columns, 1))
    return (slice(start, min(start + size, rows)) for start in range(0, rows, size))


class Contrast(torch.autograd.Function):
    """`contrast`, with its gradient made on the way."""

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        weight: torch.Tensor,
        temperature: float,
        itself: torch.Tensor | None,
        near: Callable[[slice], Near] | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        is_trained = any(ctx.needs_input_grad[:2])
        gradient_q, gradient_k = (torch.zeros_like(part) if is_trained else None for part in (q, k))
        tiny, least = torch.finfo(q.dtype).tiny, torch.finfo(q.dtype).min
        scaled = q / temperature
        losses, weights = q.new_zeros(len(q)), weight.to(q.dtype, copy=True)
        blocks = list(row_blocks(len(q), len(k)))
        memory = q.new_empty(blocks[0].stop if blocks else 0, len(k))
        for rows in blocks:
            block = torch.mm(scaled[rows], k.mT, out=memory[: rows.stop - rows.start])  # (r, M)
            if itself is not None:
                block.scatter_(1, itself[rows, None], -torch.inf)
            share = None
            if near is not None:
                columns, left_out, share = near(rows)
                inside = block[:, columns]
                if share is not None:
                    mass = share.sum(1, keepdim=True)
                    weights[rows] *= mass[:, 0] > 0
                    share /= mass.clamp_min(tiny)
                    # A column that is left out has a share of zero and a similarity of -inf.
                    losses[rows] -= torch.where(share > 0, share * inside, 0).sum(1)
                if left_out is not None:
                    inside.masked_fill_(left_out, -torch.inf)
            # With everything left out, these limits keep a row that weighs nothing finite.
            top = block.amax(1, keepdim=True).clamp_min(least)
            total = block.sub_(top).exp_().sum(1, keepdim=True).clamp_min(tiny)
            losses[rows] += (top + total.log())[:, 0]
            if gradient_q is None or gradient_k is None:
                continue
            if share is not None:
                block[:, columns] -= share * total
            factor = weights[rows, None] / total
            gradient_q[rows] = block @ k * (factor / temperature)
            gradient_k.addmm_(block.mT, scaled[rows] * factor)
        ctx.save_for_backward(gradient_q, gradient_k)
        mass = weights.sum()
        ctx.mark_non_differentiable(mass)
        return losses @ weights, mass

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factor: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gradient_q, gradient_k = ctx.saved_tensors
        return factor * gradient_q, factor * gradient_k, None, None, None, None

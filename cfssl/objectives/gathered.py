"""What a loss takes from all processes that train together, so that two of them find what one finds. Alone,
everything stays as it is."""

import torch
from torch import distributed


def gathered(x: torch.Tensor) -> torch.Tensor:
    """The rows (N, ...) of all processes, which bring equally many, in the order of the ranks, with their
    gradients: the mean over the processes of a loss of these has the gradient that it has in one process."""
    from lightly.utils import dist

    return torch.cat(dist.gather(x)) if dist.world_size() > 1 else x


@torch.no_grad()
def gathered_uneven(x: torch.Tensor) -> torch.Tensor:
    """The rows (n, ...) of all processes, which need not bring equally many, without gradients."""
    from lightly.utils import dist

    if dist.world_size() == 1:
        return x
    counts = torch.cat(dist.gather(torch.tensor([len(x)], device=x.device))).tolist()
    padded = x.new_zeros(max(counts), *x.shape[1:])
    padded[: len(x)] = x
    return torch.cat([rows[:count] for rows, count in zip(dist.gather(padded), counts, strict=True)])


def mean_of_all(total: torch.Tensor, mass: torch.Tensor) -> torch.Tensor:
    """`total` of this process by the `mass` of all, times the number of processes: the mean of the processes'
    is the weighted mean over all that they hold. 0 without any mass."""
    processes = 1
    if distributed.is_initialized():
        mass, processes = mass.clone(), distributed.get_world_size()
        distributed.all_reduce(mass)
    return total * processes / torch.where(mass > 0, mass, 1)

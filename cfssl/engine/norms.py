"""Batch normalisation over the images of all processes that train together, so that it is the same as in one.

On GPUs this is torch's `SyncBatchNorm`. There is none for CPUs, where the moments are pooled here (Chan et
al. 1983, with any number of parts): for n_r numbers with mean m_r and variance v_r in process r,

    m = sum n_r m_r / n,    v = sum n_r (v_r + (m_r - m)^2) / n .
"""

from functools import partial

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from cfssl.engine.processes import count


def pool_statistics(task: nn.Module, device: torch.device) -> None:
    """From here on the batch normalisations of `task` in train mode use the statistics of all processes that
    train together, in place; parameters and buffers stay the same objects under the same names."""
    if count() == 1:
        return
    if device.type == "cuda":
        from timm.layers import convert_sync_batchnorm

        convert_sync_batchnorm(task)
        return
    for module in task.modules():
        if isinstance(module, _BatchNorm):
            module.forward = partial(pooled_forward, module)  # type: ignore[method-assign]


def pooled_forward(norm: _BatchNorm, x: torch.Tensor) -> torch.Tensor:
    """What `norm` makes of `x` (N, C, ...), of which every process has a part."""
    from timm.layers import BatchNormAct2d

    if not norm.training or count() == 1:
        return type(norm).forward(norm, x)
    y = normalised(norm, x)
    return norm.act(norm.drop(y)) if isinstance(norm, BatchNormAct2d) else y


def normalised(norm: _BatchNorm, x: torch.Tensor) -> torch.Tensor:
    """`x` (N, C, ...) by the moments of all processes, which the running ones follow."""
    mean, var, total = pooled_moments(x)
    if norm.running_mean is not None and norm.running_var is not None:
        assert norm.num_batches_tracked is not None
        with torch.no_grad():
            norm.num_batches_tracked.add_(1)
            share = 1 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
            norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), share)
            norm.running_var.lerp_((var * total / (total - 1)).to(norm.running_var.dtype), share)
    scale = (var + norm.eps).rsqrt()
    scale = scale if norm.weight is None else scale * norm.weight
    shift = -mean * scale
    shift = shift if norm.bias is None else shift + norm.bias
    shape = (1, -1, *[1] * (x.ndim - 2))
    return (x * scale.view(shape) + shift.view(shape)).to(x.dtype)


def pooled_moments(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean and variance (C,) of the channels of `x` (N, C, ...) in all processes, float32 or float64, with
    their gradients, and of how many numbers."""
    from lightly.utils import dist

    x = x.to(torch.promote_types(x.dtype, torch.float32))
    var, mean = torch.var_mean(x, dim=[0, *range(2, x.ndim)], correction=0)
    numbers = mean.new_full((1,), x.numel() / x.shape[1])
    found = torch.stack(dist.gather(torch.cat([mean, var, numbers])))  # (processes, 2 C + 1)
    means, variances = found[:, :-1].chunk(2, dim=1)
    total = found[:, -1].sum()
    share = found[:, -1:] / total
    mean = (share * means).sum(0)
    return mean, (share * (variances + (means - mean).square())).sum(0), total

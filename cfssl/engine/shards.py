"""Models of which every process holds a part of each weight (FSDP), for those that outgrow one device.

Between steps a weight is a DTensor. Checkpoints hold whole tensors: `whole` collects them, `part_like` cuts
them again.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, distribute_tensor


def sharded(task: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """`task`, cut over the processes in place: the blocks of its vision transformers, of which only one is
    whole at a time, and the rest at once."""
    from torch.distributed.fsdp import fully_shard

    of_data = mesh["data_parallel"]
    for network in list(task.modules()):
        blocks = getattr(network, "blocks", None)
        for block in blocks if isinstance(blocks, nn.Sequential | nn.ModuleList) else ():
            fully_shard(block, mesh=of_data)
    fully_shard(task, mesh=of_data)
    return task


def whole(node: Any) -> Any:
    """A state (nested dicts, lists and values) with whole tensors on the CPU in place of parts. All processes
    have to ask."""
    if isinstance(node, DTensor):
        return node.full_tensor().cpu()
    if isinstance(node, Mapping):
        return {name: whole(value) for name, value in node.items()}
    if isinstance(node, list | tuple):
        return [whole(value) for value in node]
    return node


def part_like(value: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """`value`, whole or a part already, as this process's part of it where `reference` is one."""
    if isinstance(value, DTensor) or not isinstance(reference, DTensor):
        return value
    return distribute_tensor(
        value.to(reference.device), reference.device_mesh, reference.placements, src_data_rank=None
    )


def own_part(value: torch.Tensor) -> torch.Tensor:
    """What this process holds of `value`."""
    return value.to_local() if isinstance(value, DTensor) else value

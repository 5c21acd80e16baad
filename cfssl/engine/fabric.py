"""Lightning Fabric as the loop needs it: on the device of this process, alone or with those that train
together."""

import warnings
from typing import Any

import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins.environments import ClusterEnvironment
from lightning_fabric.strategies import DDPStrategy, ModelParallelStrategy
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from cfssl.engine.precision import create_precision
from cfssl.engine.processes import count, rank
from cfssl.engine.run import HardwareSettings
from cfssl.engine.shards import sharded
from cfssl.engine.world import world


class Member(ClusterEnvironment):
    """Tells Fabric what processes.py has settled. To Fabric every process is a node of its own with one
    device, so that nodes need not have equally many."""

    @property
    def creates_processes_externally(self) -> bool:
        return True

    @property
    def main_address(self) -> str:
        return "127.0.0.1"  # nobody has to meet any more

    @property
    def main_port(self) -> int:
        return 0

    @staticmethod
    def detect() -> bool:
        return False

    def world_size(self) -> int:
        return count()

    def set_world_size(self, size: int) -> None:
        pass

    def global_rank(self) -> int:
        return rank()

    def set_global_rank(self, rank: int) -> None:
        pass

    def local_rank(self) -> int:
        return 0

    def node_rank(self) -> int:
        return rank()


class Whole(DDPStrategy):
    """Every process holds the whole model. Buffers are the same everywhere but while a step is under way, and
    not sent around. Parameters that nothing depends on, as while a backbone is held, have no gradient."""

    def __init__(self) -> None:
        super().__init__(broadcast_buffers=False, find_unused_parameters=True)

    def setup_module(self, module: nn.Module) -> DistributedDataParallel:
        with warnings.catch_warnings():  # the new name of this option is unknown to older versions
            warnings.filterwarnings("ignore", message=".*broadcast_buffers")
            return super().setup_module(module)


def create_fabric(hardware: HardwareSettings) -> Fabric:
    """Launched."""
    options: dict[str, Any] = {"accelerator": "cpu", "devices": 1}
    if hardware.device.type == "cuda":
        # Where a task of SLURM sees its own GPU alone, that is number 0.
        options = {"accelerator": "cuda", "devices": [world().local_rank % torch.cuda.device_count()]}
    if count() > 1 and hardware.strategy == "fsdp":
        options["strategy"] = ModelParallelStrategy(sharded)
    elif count() > 1:
        options["strategy"] = Whole()
    fabric = Fabric(num_nodes=count(), plugins=[create_precision(hardware), Member()], **options)
    fabric.launch()
    return fabric

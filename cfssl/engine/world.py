"""Which of several processes this one is, from the variables of whoever started them. Without torch, so that
the command line may ask."""

import os
import socket
from dataclasses import dataclass


@dataclass(frozen=True)
class World:
    """This process among those that were started with it: `rank` of `size`, and `local_rank` among those of
    its machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0


def world() -> World:
    """From RANK, WORLD_SIZE and LOCAL_RANK as torchrun sets them, else from those of a SLURM step with
    several tasks; without either this process is alone."""
    found = os.environ
    if "RANK" in found and "WORLD_SIZE" in found:
        local = found.get("LOCAL_RANK", found.get("SLURM_LOCALID", "0"))
        return World(int(found["RANK"]), int(found["WORLD_SIZE"]), int(local))
    if int(found.get("SLURM_STEP_NUM_TASKS", "1")) > 1:  # SLURM_NTASKS is there in a batch script as well
        names = "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"
        return World(*(int(found[name]) for name in names))
    return World()


def meeting_place() -> str:
    """Where the processes meet, as an address for torch's rendezvous: what torchrun or MASTER_ADDR and
    MASTER_PORT say, else the node of the first task and a port that follows from the number of the job."""
    found = os.environ
    if "TORCHELASTIC_RUN_ID" in found:
        return "env://"
    port = found.get("MASTER_PORT", str(15_000 + int(found.get("SLURM_JOB_ID", "0")) % 20_000))
    address = found.get("MASTER_ADDR")
    if address is None:
        from lightning_fabric.plugins.environments import SLURMEnvironment

        nodes = found.get("SLURM_STEP_NODELIST", found.get("SLURM_JOB_NODELIST", "127.0.0.1"))
        address = SLURMEnvironment.resolve_root_node_address(nodes)
    try:
        socket.getaddrinfo(address, None)
    except OSError:  # the name of a node that means nothing outside of SLURM
        address = found.get("SLURM_LAUNCH_NODE_IPADDR", "127.0.0.1")
    return f"tcp://{address}:{port}"

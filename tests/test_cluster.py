"""A real SLURM, brought up for the test: an array, an urgent job that takes the nodes away, a node that dies,
and in the end the bytes of a run without any of it."""

from pathlib import Path

import cluster
import pytest


@pytest.mark.slow
@pytest.mark.skipif(
    bool(cluster.missing_tools()), reason="SLURM is not there; Debian: slurmctld slurmd slurm-client munge"
)
def test_a_recipe_on_a_cluster_survives_preemption_and_the_loss_of_a_node(tmp_path: Path) -> None:
    found = cluster.scenario(tmp_path)
    assert all(count >= 1 for count in found["restarts"].values())
    assert sum(found["restarts"].values()) >= 3  # both by the urgent job, one by the loss of its node
    assert found["weights_equal"]
    assert found["bank_equal"]
    assert found["two_nodes_equal"]
    assert found["shards"] >= 2
    assert found["reports"]
    assert not list((tmp_path / "cluster" / "pids").glob("*"))

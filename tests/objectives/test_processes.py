"""Two processes find what one finds: losses, gradients, targets and centres, and of every objective also its
batch statistics, centres, queues and teacher's buffers."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from processes import COUNT, found

SCRIPT = Path(__file__).parent / "processes.py"


@pytest.mark.slow
def test_two_processes_find_what_one_finds(tmp_path: Path) -> None:
    commands = [[sys.executable, str(SCRIPT), str(rank), str(tmp_path)] for rank in (0, 1)]
    running = [subprocess.Popen(command) for command in commands]
    assert [process.wait(timeout=600) for process in running] == [0, 0]
    first, second = (dict(np.load(tmp_path / f"{rank}.npz")) for rank in (0, 1))
    expected = found(slice(0, COUNT))
    for name in expected:
        both = np.concatenate([first[name], second[name]]) if name == "sinkhorn" else first[name]
        # losses are computed in float32, whatever enters
        np.testing.assert_allclose(both, expected[name], rtol=1e-4, atol=1e-6, err_msg=name)
        if name != "sinkhorn":
            np.testing.assert_array_equal(second[name], first[name], err_msg=name)

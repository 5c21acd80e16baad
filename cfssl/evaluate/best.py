"""The moment of a training that is kept: of evenly spaced ones that with the best figure on validation rows.

What enters: a network in training and a figure of it, of which more is better. What leaves: a file with the
network as it was at the best moment so far; nothing else is chosen there.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from cfssl.engine.checkpoint import save_checkpoint
from cfssl.engine.loop import Observation
from cfssl.engine.run import Run, read_metrics
from cfssl.evaluate.evaluations import choice_of


class Best:
    """An observer of the training loop: takes the `figure` called `name` of the validation rows every so many
    steps, and writes the network to `path` whenever it is better than ever before, with `how` it came about.
    """

    def __init__(
        self,
        network: nn.Module,
        name: str,
        figure: Callable[[], float],
        every: int,
        run: Run,
        path: Path,
        how: Mapping[str, Any],
    ) -> None:
        self.network, self.name, self.figure, self.every = network, name, figure, every
        self.run, self.path, self.how = run, path, how

    def __call__(self, step: int) -> Observation:
        found = float(f"{self.figure():.6g}")  # as it is read again after an interruption
        if all(found > earlier[self.name] for earlier in checks_of(self.run, self.name)):
            save_checkpoint(self.path, {"network": self.network.state_dict(), "how": dict(self.how)})
        return Observation({self.name: found})


def checks_of(run: Run, name: str = "val_auc") -> list[dict[str, Any]]:
    """The lines of the run's metrics that tell of the validation rows."""
    lines = read_metrics(run.metrics_path) if run.metrics_path.exists() else []
    return [line for line in lines if name in line]


def tuning_protocol(
    how: Mapping[str, Any], run: Run, name: str = "val_auc", called: str = "AUC"
) -> dict[str, Any]:
    """What a result says of the training in the folder of `run` and of the moment that was chosen; `how` as
    `Best` was given it: {"epochs", "batch", "steps_per_epoch"}."""
    short = name.removeprefix("val_")
    checks = checks_of(run, name)
    grid = [{"epoch": (line["step"] + 1) / how["steps_per_epoch"], short: line[name]} for line in checks]
    best = max(grid, key=lambda line: line[short])  # max keeps the first of equals
    return {
        "epochs": how["epochs"],
        "batch": how["batch"],
        **choice_of("epoch", best["epoch"], grid, called),
    }

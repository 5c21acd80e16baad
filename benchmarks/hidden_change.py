"""The bank that no recipe can ask for, an arm of bank_quality.py: the phantom's true do(scanner), whose views
have the disease turned over as well, while the index of the bank says nothing of it.

    python benchmarks/hidden_change.py pretrain RUNS RECIPE [OVERRIDE ...]

(or "bank build" in one word). Everything but the generator is the recipe's own: bank, judge, gate, views,
training. Its stages have keys of their own.
"""

import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from pretraining import RECIPES, Task

from cfssl.data.pixels import to_signed
from cfssl.data.table import Attributes
from cfssl.generation import Generation
from cfssl.generators.base import Exogenous
from cfssl.generators.oracle import OracleGenerator
from cfssl.pipeline import Pipeline
from cfssl.provenance import fingerprint
from cfssl.recipe import load_recipe
from cfssl.stages import BANK_CODE, Stage

CHANGED = "disease"


class HiddenChangeOracle(OracleGenerator):
    """Renders patients under their do(), ill where the table calls them well and well where it calls them
    ill."""

    @property
    def fingerprint(self) -> str:
        return fingerprint("hidden change", CHANGED, super().fingerprint)

    def predict(self, u: Exogenous, pa_cf: Attributes) -> torch.Tensor:
        rows = u["row"].cpu().numpy()
        parents = {name: pa_cf[name].cpu() for name in self.graph.image_parents}
        turned = 1 - self.table.encode([CHANGED], rows)[CHANGED]
        return to_signed(self.truth.counterfactual(rows, parents | {CHANGED: turned}))


class HiddenChangeGeneration(Generation):
    @cached_property
    def bank_stage(self) -> Stage:
        return self.production.stage("bank", "hidden change", CHANGED, super().bank_stage.key, code=BANK_CODE)

    @cached_property
    def generator(self) -> HiddenChangeOracle:
        generator = HiddenChangeOracle(self.recipe.generator, self.table)
        generator.fit(self.table, self.production.run(self.bank_stage.folder))
        return generator


class HiddenChangePipeline(Pipeline):
    generation_type = HiddenChangeGeneration


@dataclass(frozen=True)
class HiddenChangeTask(Task):
    """`recipe` with this bank instead of its own."""

    def pipeline(self, runs: Path) -> Pipeline:
        recipe = load_recipe(RECIPES / self.recipe, self.overrides)
        return HiddenChangePipeline(recipe, runs, quiet=True)

    def command(self, verb: str, runs: Path) -> list[str]:
        return [sys.executable, __file__, verb, str(runs), self.recipe, *self.overrides]


def main() -> None:
    verb, runs, recipe, *overrides = sys.argv[1:]
    job = HiddenChangeTask(recipe, tuple(overrides)).pipeline(Path(runs))
    if verb == "bank build":
        job.generation.bank  # noqa: B018
    else:
        job.objective  # noqa: B018


if __name__ == "__main__":
    main()

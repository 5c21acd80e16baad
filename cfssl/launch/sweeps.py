"""Several experiments at once: recipes, and combinations of values of some of their keys."""

import itertools
from collections.abc import Sequence
from pathlib import Path

from cfssl.errors import UserError
from cfssl.pipeline import Pipeline
from cfssl.recipe import load_recipe


def pipelines(words: Sequence[str], sweep: Sequence[str], runs: Path) -> list[Pipeline]:
    """Of every recipe file among `words` with every combination of the values of `sweep` ("train.seed=0,1");
    the other words are overrides for all. A swept experiment is called after its recipe and its values.
    Raises `UserError` where no word is a recipe, and for a sweep without values."""
    overrides = [word for word in words if "=" in word and not Path(word).is_file()]
    recipes = [Path(word) for word in words if word not in overrides]
    if not recipes:
        raise UserError(f"None of {', '.join(words)} is a recipe; name at least one file.")
    axes = [axis(entry) for entry in sweep]
    found = []
    for recipe in recipes:
        for values in itertools.product(*axes):
            name = []
            if values:
                parts = [load_recipe(recipe, overrides).name]
                parts += [f"{key.rpartition('.')[2]}-{value}" for key, value in values]
                name = [f"name={'-'.join(parts)}"]
            own = [f"{key}={value}" for key, value in values]
            found.append(Pipeline(load_recipe(recipe, [*overrides, *own, *name]), runs))
    return found


def axis(entry: str) -> list[tuple[str, str]]:
    """`key=a,b` as [(key, a), (key, b)]."""
    key, _, values = entry.partition("=")
    found = [value.strip() for value in values.split(",") if value.strip()]
    if not key or not found:
        raise UserError(f"The sweep {entry!r} is not of the form key.path=a,b; write e.g. train.seed=0,1,2.")
    return [(key, value) for value in found]

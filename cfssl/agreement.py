"""Whether a recipe and a table fit each other: checked once the table is prepared, before any training."""

from dataclasses import replace

from cfssl.bank.build import plan_views
from cfssl.data.table import ImageTable
from cfssl.errors import UserError, nearest
from cfssl.evaluate.evaluations import lacking
from cfssl.generators import create_generator
from cfssl.generators.hvae import HVAESettings
from cfssl.models.backbone import check_backbone, create_backbone
from cfssl.objectives.supervised import SupervisedSettings
from cfssl.recipe import Recipe


def check_against_table(recipe: Recipe, table: ImageTable) -> None:
    """Refuses a recipe that names attributes or values which the table does not have, or evaluations that
    cannot work on its splits; all mistakes at once."""
    mistakes = []

    def known(path: str, name: str, kinds: tuple[str, ...]) -> None:
        attribute = table.attributes.get(name)
        if attribute is None:
            mistakes.append(f"{path} = {name!r}: no such attribute{nearest(name, table.attributes)}")
        elif attribute.kind not in kinds:
            mistakes.append(f"{path} = {name!r}: is {attribute.kind}, expected {' or '.join(kinds)}")

    everything, discrete = ("binary", "categorical", "continuous"), ("binary", "categorical")
    if recipe.generator is not None:
        for name in recipe.generator.parents:
            known("generator.parents", name, everything)
        for child, causes in recipe.generator.graph.items():
            for name in (child, *causes):
                known(f"generator.graph.{child}", name, everything)
    for variable, values in recipe.bank.do.items():
        known(f"bank.do.{variable}", variable, discrete if values == "all" else everything)
        attribute = table.attributes.get(variable)
        if attribute is not None and attribute.categories and values != "all":
            mistakes += [
                f"bank.do.{variable} = {value!r}: not among its values {', '.join(attribute.categories)}"
                for value in values
                if str(value) not in attribute.categories
            ]
    if isinstance(recipe.objective, SupervisedSettings):
        known("objective.target", recipe.objective.target, discrete)
    for index, evaluation in enumerate(recipe.evaluate):
        path = f"evaluate[{index}].target"
        known(path, evaluation.target, discrete)
        attribute = table.attributes.get(evaluation.target)
        if attribute is not None and attribute.kind in discrete:
            mistakes += [
                f"{path} = {evaluation.target!r}: {reason}; every category is needed in every split"
                for reason in lacking(table, evaluation.target)
            ]
        for name in evaluation.by:
            known(f"evaluate[{index}].by", name, discrete)
    try:
        check_backbone(recipe.backbone.name)
    except UserError as error:
        mistakes.append(str(error))
    labelled = recipe.objective.target if isinstance(recipe.objective, SupervisedSettings) else None
    usable = table.rows("train", known=[labelled] if labelled and labelled in table.attributes else [])
    if len(usable) < recipe.train.batch:
        images = f"{len(usable)} images" + (f" with a known {labelled!r}" if labelled else "")
        mistakes.append(f"train.batch = {recipe.train.batch}: the training split has only {images}")
    if not mistakes:  # names that exist are needed to build anything
        mistakes += [*generator_mistakes(recipe, table), *view_mistakes(recipe, table)]
    if mistakes:
        lines = "".join(f"\n  - {mistake}" for mistake in dict.fromkeys(mistakes))
        raise UserError(f"The recipe {recipe.name} does not fit the table {table.name}:{lines}")


def generator_mistakes(recipe: Recipe, table: ImageTable) -> list[str]:
    """What keeps the recipe's generator from being built, fitted or asked for the bank's views."""
    settings = recipe.generator
    if settings is None:
        return []
    try:
        generator = create_generator(settings, table)
        plan_views(recipe.bank.do, generator.graph, table.attributes)
    except UserError as error:
        return [str(error)]
    usable = len(table.rows("train", known=generator.graph.variables))
    batch = settings.train.batch if isinstance(settings, HVAESettings) else 1
    if usable < batch:
        return [f"generator.train.batch = {batch}: only {usable} training images have all its variables"]
    return []


def view_mistakes(recipe: Recipe, table: ImageTable) -> list[str]:
    """What the view plan asks of a bank that will not hold it, and of an encoder that does not have it."""
    found = []
    plan = recipe.views.counterfactual
    try:
        if plan is not None:
            categories, values = table.attributes[plan.variable].categories, recipe.bank.do[plan.variable]
            plan.chance(categories if values == "all" else [str(value) for value in values], categories)
    except UserError as error:
        found.append(str(error))
    try:
        if recipe.backbone.drop_path:  # not every model has it
            channels, size = recipe.views.shape(table.images.shape)
            create_backbone(replace(recipe.backbone, pretrained=False), channels, size, seed=0)
    except UserError as error:
        found.append(str(error))
    return found

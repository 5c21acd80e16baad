"""Whether a recipe and a table fit each other: checked once the table is prepared, before any training."""

from cfssl.bank.build import plan_views
from cfssl.data.labels import refuse_taken_names
from cfssl.data.plan import domain_counts
from cfssl.data.table import ImageTable
from cfssl.errors import UserError, nearest, quoted
from cfssl.evaluate.evaluations import lacking
from cfssl.evaluate.finetune import schedule, view_settings
from cfssl.evaluate.masked import labelled_rows, shares
from cfssl.evaluate.settings import FineTuningSettings, SegmentSettings
from cfssl.experiment import Recipe
from cfssl.generators import FittedSettings, HVAESettings, create_generator
from cfssl.generators.fitted import refuse_other_data
from cfssl.generators.targets import AreaRuleSettings, area_specs
from cfssl.measure import PredictorSettings, create_measure, rows_of_part
from cfssl.models.backbone import check_backbone, check_size, create_backbone
from cfssl.models.dense import DecoderSettings, Grid, create_dense
from cfssl.models.initial import check_initial
from cfssl.objectives import coded_columns, known_attributes, labelling_masks
from cfssl.objectives.dinov2 import DINOv2Settings, check_masking


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

    rules = recipe.finetune.rules if recipe.finetune else ()
    regressed = {f"finetune.rules[{index}].guide" for index, rule in enumerate(rules) if rule.name == "reg"}
    everything, discrete = ("binary", "categorical", "continuous"), ("binary", "categorical")
    if isinstance(recipe.generator, FittedSettings):
        try:
            refuse_other_data(recipe.generator, table)
        except UserError as error:
            mistakes.append(str(error))
    elif recipe.generator is not None:
        for name in recipe.generator.parents:
            known("generator.parents", name, everything)
        for child, causes in recipe.generator.graph.items():
            for name in (child, *causes):
                known(f"generator.graph.{child}", name, everything)
    for variable, values in (entry for joint in recipe.bank.interventions for entry in joint.items()):
        known(f"bank.do.{variable}", variable, discrete if values == "all" else everything)
        attribute = table.attributes.get(variable)
        if attribute is not None and attribute.categories and values != "all":
            mistakes += [
                f"bank.do.{variable} = {value!r}: not among its values {', '.join(attribute.categories)}"
                for value in values
                if str(value) not in attribute.categories
            ]
    for path, settings in recipe.measures().items():
        if isinstance(settings, PredictorSettings):
            for name in settings.attributes:
                known(f"{path}.attributes", name, ("continuous",) if path in regressed else everything)
        else:
            mistakes += [
                f"{path}.structures = {name!r}: no such mask{nearest(name, table.mask_names)}"
                for name in settings.structures
                if name not in table.mask_names
            ]
    targets = known_attributes(recipe.objective)
    for name in targets:
        known("objective.target", name, discrete)
    for name in coded_columns(recipe.objective):
        if name not in table.coded_names:
            mistakes.append(
                f"objective.false_negatives = {name!r}: neither a discrete attribute nor the group"
                f"{nearest(name, table.coded_names)}"
            )
    masks = (*table.mask_names, *(recipe.silver.names if recipe.silver else ()))
    mistakes += [
        f"objective.structures = {name!r}: no such mask{nearest(name, masks)}"
        for name in labelling_masks(recipe.objective)
        if name not in masks
    ]
    for index, evaluation in enumerate(recipe.evaluate):
        for name in evaluation.attributes:
            known(f"evaluate[{index}].by", name, discrete)
        if isinstance(evaluation, SegmentSettings):
            mistakes += segment_mistakes(recipe, table, evaluation, table, f"evaluate[{index}]")
            continue
        path = f"evaluate[{index}].target"
        known(path, evaluation.target, discrete)
        attribute = table.attributes.get(evaluation.target)
        if attribute is not None and attribute.kind in discrete:
            mistakes += [
                f"{path} = {evaluation.target!r}: {reason}; every category is needed in every split"
                for reason in lacking(table, evaluation.target)
            ]
        if isinstance(evaluation, FineTuningSettings):
            mistakes += tuning_mistakes(recipe, table, evaluation, table)
    if recipe.monitor is not None and recipe.monitor.target is not None:
        path, target = "monitor.target", recipe.monitor.target
        known(path, target, discrete)
        if target in table.attributes and table.attributes[target].kind in discrete:
            mistakes += [
                f"{path} = {target!r}: {reason}; every category is needed there"
                for reason in lacking(table, target, ("train", "val"))
            ]
    try:
        check_backbone(recipe.backbone.name)
    except UserError as error:
        mistakes.append(str(error))
    usable = table.rows("train", known=[name for name in targets if name in table.attributes])
    if len(usable) < recipe.train.batch:
        images = f"{len(usable)} images" + "".join(f" with a known {name!r}" for name in targets)
        mistakes.append(f"train.batch = {recipe.train.batch}: the training split has only {images}")
    if not mistakes:  # names that exist are needed to build anything
        mistakes += [*generator_mistakes(recipe, table), *view_mistakes(recipe, table)]
        mistakes += [*measure_mistakes(recipe, table), *area_mistakes(recipe, table)]
        mistakes += gate_mistakes(recipe, table)
    if mistakes:
        lines = "".join(f"\n  - {mistake}" for mistake in dict.fromkeys(mistakes))
        raise UserError(f"The recipe {recipe.name} does not fit the table {table.name}:{lines}")


def check_external(recipe: Recipe, table: ImageTable, name: str, external: ImageTable) -> None:
    """Refuses an external set that the encoder cannot see or that the evaluations which name it cannot use;
    all mistakes at once."""
    mistakes = []
    channels, own = external.images.shape[0], table.images.shape[0]
    if channels != own:
        mistakes.append(f"its images have {channels} channels and the encoder's {own}; prepare them alike")
    for evaluation in recipe.evaluate:
        if name not in evaluation.external:
            continue
        mistakes += [
            f"it has no discrete attribute {by!r}, by which {evaluation.label} forms groups"
            f"{nearest(by, external.attributes)}; evaluate it without"
            for by in evaluation.attributes
            if by not in external.attributes or not external.attributes[by].categories
        ]
        if isinstance(evaluation, SegmentSettings):
            mistakes += segment_mistakes(recipe, table, evaluation, external, evaluation.label)
            continue
        target, of = evaluation.target, external.attributes.get(evaluation.target)
        wanted = table.attributes[target].categories
        if of is None:
            mistakes.append(f"it has no attribute {target!r}{nearest(target, external.attributes)}")
        elif of.categories != wanted:
            mistakes.append(
                f"its {target!r} is {of.kind} of {quoted(of.categories)}, and that of {table.name} has "
                f"{quoted(wanted)}, in this order; declare the same categories"
            )
        else:
            mistakes += [
                f"{reason} ({target!r} of {evaluation.label}); every category is needed in every split"
                for reason in lacking(external, target)
            ]
        if isinstance(evaluation, FineTuningSettings):
            mistakes += tuning_mistakes(recipe, table, evaluation, external)
    if mistakes:
        lines = "".join(f"\n  - {mistake}" for mistake in dict.fromkeys(mistakes))
        raise UserError(
            f"The external set {name} ({external.name}) does not fit the recipe {recipe.name}:{lines}"
        )


def segment_mistakes(
    recipe: Recipe, table: ImageTable, settings: SegmentSettings, tuned: ImageTable, path: str
) -> list[str]:
    """What keeps the structures of `settings` from being segmented in `tuned` by the encoder of `table`."""
    if unknown := [name for name in settings.structures if name not in tuned.mask_names]:
        return [
            f"{path}.structures = {name!r}: no such mask{nearest(name, tuned.mask_names)}" for name in unknown
        ]
    found = tuning_mistakes(recipe, table, settings, tuned)
    try:
        if not len(labelled_rows(tuned, settings, "test")):
            found.append(f"{path}: no test image of {tuned.name} has masks")
        for fold in range(settings.folds):
            rows = shares(settings, tuned, min(settings.fractions), settings.seeds[0], fold)
            schedule(settings, len(rows.train), settings.seeds[0])
        channels, size = recipe.views.shape(table.images.shape)
        encoder = create_backbone(recipe.backbone, channels, size, seed=0)
        create_dense(encoder, settings.decoder or DecoderSettings(), channels, seed=0)
    except UserError as error:
        found.append(f"{path}: {error}")
    return found


def check_silver(recipe: Recipe, table: ImageTable, source: ImageTable) -> None:
    """Refuses a table of human masks that the segmentor of silver masks cannot learn from, or whose images
    are not of the shape of the recipe's own; all mistakes at once."""
    silver, mistakes = recipe.silver, []
    assert silver is not None
    settings = silver.segmentor
    if source.images.shape != table.images.shape:
        found, own = (" x ".join(map(str, images.shape)) for images in (source.images, table.images))
        mistakes.append(
            f"its images are {found} and those of {table.name} are {own}; prepare both with the same `size` "
            "and `channels`"
        )
    try:
        create_measure(settings, source)
        refuse_taken_names(table, settings.structures)
    except UserError as error:
        mistakes.append(str(error))
    usable = len(rows_of_part(source, source.rows("train"), settings.part))
    if usable < settings.train.batch:
        part = "" if settings.part == "all" else f" of the {settings.part} half"
        mistakes.append(
            f"silver.segmentor.train.batch = {settings.train.batch}: only {usable} training images{part} are "
            "there"
        )
    if mistakes:
        lines = "".join(f"\n  - {mistake}" for mistake in mistakes)
        raise UserError(f"silver.data ({source.name}) does not fit the recipe {recipe.name}:{lines}")


def tuning_mistakes(
    recipe: Recipe, table: ImageTable, settings: FineTuningSettings | SegmentSettings, tuned: ImageTable
) -> list[str]:
    """What keeps the encoder of `table` from being fine-tuned on the images of `tuned`."""
    try:
        size = recipe.views.shape(table.images.shape)[1]
        views = view_settings(settings, size, recipe.views.border, tuned.images.shape)
        views.refuse_colours(tuned.images.shape[0])
    except UserError as error:
        return [f"{settings.label}: {error}"]
    return []


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
    if usable == 0:
        return [f"generator.name = {settings.name!r}: no training image has all its variables"]
    if isinstance(settings, HVAESettings) and usable < settings.train.batch:
        return [
            f"generator.train.batch = {settings.train.batch}: only {usable} training images have all its "
            "variables"
        ]
    if recipe.finetune is not None and usable < recipe.finetune.train.batch:
        return [
            f"finetune.train.batch = {recipe.finetune.train.batch}: only {usable} training images have all "
            "variables of the generator"
        ]
    return []


def gate_mistakes(recipe: Recipe, table: ImageTable) -> list[str]:
    """What the gate is told to keep and can never find changed."""
    if recipe.bank.gate is None or recipe.generator is None:
        return []
    found, graph = [], recipe.generator.causal_graph(table.attributes)
    for name, most in recipe.bank.gate.unchanged.items():
        path = f"bank.gate.unchanged.{name} = {most}"
        if table.attributes[name].kind != "continuous" and most >= 1:
            found.append(f"{path}: of a discrete attribute it is a total variation; give less than 1")
        if all(name in graph.affected(joint) for joint in recipe.bank.interventions):
            found.append(f"{path}: every do() of bank.do affects {name}; name what is to stay, or remove it")
    return found


def measure_mistakes(recipe: Recipe, table: ImageTable) -> list[str]:
    """What keeps guides and judges from being built, trained or used."""
    found = []
    for path, settings in recipe.measures().items():
        names = settings.attributes if isinstance(settings, PredictorSettings) else ()
        try:
            create_measure(settings, table)
        except UserError as error:
            found.append(f"{path}: {error}")
        usable = len(rows_of_part(table, table.rows("train", known=names), settings.part))
        if usable < settings.train.batch:
            part = "" if settings.part == "all" else f" of the {settings.part} half"
            what = f" have all of {', '.join(names)}" if names else " are there"
            found.append(
                f"{path}.train.batch = {settings.train.batch}: only {usable} training images{part}{what}"
            )
        if names and len(table.rows("val", known=names)) == 0:
            found.append(f"{path}: no validation image has all of {', '.join(names)}; it is calibrated there")
    if recipe.audit is not None and recipe.generator is not None:
        needed = {*recipe.generator.causal_graph(table.attributes).variables, *recipe.audit.judge.attributes}
        split = recipe.audit.split
        if len(table.rows(split, known=sorted(needed))) == 0:
            found.append(
                f"audit.split = {split!r}: none of its images has all of {', '.join(sorted(needed))}"
            )
    return found


def area_mistakes(recipe: Recipe, table: ImageTable) -> list[str]:
    """Areas that are intervened on without anything that could measure them, or that an audit would take for
    areas that are to stay."""
    if recipe.generator is None:
        return []
    found = []
    if recipe.finetune is not None:
        for index, rule in enumerate(recipe.finetune.rules):
            try:
                if isinstance(rule, AreaRuleSettings):
                    area_specs(rule, table, recipe.finetune.do or recipe.generator.parents)
            except UserError as error:
                found.append(f"finetune.rules[{index}]: {error}")
    audit, areas = recipe.audit, [name for name in recipe.bank.variables if name in table.areas]
    if audit is not None and areas:
        known = recipe.generator.causal_graph(table.attributes).variables
        specs = [table.areas[name] for name in known if name in table.areas]
        needed = {part for spec in specs for part in (spec.structure, spec.map_structure)}
        segmented = audit.segmentor.structures if audit.segmentor else ()
        if missing := sorted(needed - set(segmented)):
            found.append(
                f"audit.segmentor.structures lacks {', '.join(missing)}, on which areas of the generator are "
                f"measured; bank.do sets {', '.join(areas)}"
            )
        for joint in recipe.bank.interventions:
            if len(together := [name for name in joint if name in table.areas]) > 1:
                found.append(
                    f"bank.do sets {' and '.join(together)} together, and an audit follows one area at a "
                    "time; set them one by one, or remove audit"
                )
    return found


def view_mistakes(recipe: Recipe, table: ImageTable) -> list[str]:
    """What the view plan asks of a bank that will not hold it, looks of images without colours, and views and
    objective of an encoder."""
    found = []
    plan = recipe.views.counterfactual
    try:
        if plan is not None:
            domains = domain_counts(table, plan.variables, table.rows("train"))
            held = list(plan.held(plan_views(recipe.bank.do, None, table.attributes)).values())
            plan.chance(held, domains)
            plan.target_weights(held, domains)
    except UserError as error:
        found.append(str(error))
    try:
        recipe.views.refuse_colours(table.images.shape[0])
    except UserError as error:
        found.append(str(error))
    return found + encoder_mistakes(recipe, table)


def encoder_mistakes(recipe: Recipe, table: ImageTable) -> list[str]:
    """What views and objective ask of an encoder that does not have it, and weights that do not fit it."""
    backbone, local, objective = recipe.backbone, recipe.views.local, recipe.objective
    is_special = any(hasattr(objective, name) for name in ("ibot_weight", "decoder", "stride"))
    if not (backbone.drop_path or backbone.options or local or is_special or recipe.init):
        return []
    channels, size = recipe.views.shape(table.images.shape)
    sizes = [size, (local.size, local.size)] if local else [size]
    try:
        encoder = create_backbone(backbone, channels, size, seed=0, any_size=local is not None)
        for each in sizes:
            check_size(encoder, backbone.name, channels, each)
        if isinstance(objective, DINOv2Settings):
            check_masking(objective, encoder)
        decoder, stride = getattr(objective, "decoder", None), getattr(objective, "stride", None)
        if decoder is not None:
            create_dense(encoder, decoder, channels, seed=0)
        if stride is not None:
            Grid(encoder, stride)
        if recipe.init is not None:
            check_initial(recipe.init, encoder, backbone.name, channels)
    except UserError as error:
        return [str(error)]
    return []

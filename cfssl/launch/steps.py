"""A recipe as steps, each of which makes one stage from stages that are there. What one process does in
order, jobs of a cluster do side by side."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

from cfssl.launch.profile import Kind
from cfssl.pipeline import Pipeline
from cfssl.stages import Stage
from cfssl.summary import report_of


@dataclass(frozen=True)
class Step:
    """`name`: that of the stage's folder, the same in every recipe that shares it. `needs`: names of steps.
    `make`: makes the stage. `make_part(index, count)`: of a step that can be divided, a part of it, after
    whose last `make` puts it together; `missing_parts(count)`: which parts are left."""

    kind: Kind
    name: str
    needs: tuple[str, ...]
    make: Callable[[], object]
    is_done: Callable[[], bool]
    make_part: Callable[[int, int], object] | None = None
    missing_parts: Callable[[int], list[int]] | None = None


def steps(job: Pipeline) -> list[Step]:
    """All steps of a recipe, each once, what they need first. The last one, the report, is always to be
    done."""
    generation, evaluation, labelling = job.generation, job.evaluation, job.labelling
    found: dict[str, Step] = {}

    def add(
        kind: Kind,
        stage: Stage | None,
        needs: Iterable[Stage | None],
        make: Callable[[], object],
        make_part: Callable[[int, int], object] | None = None,
        missing_parts: Callable[[int], list[int]] | None = None,
    ) -> None:
        if stage is not None and stage.folder.name not in found:
            names = tuple(dict.fromkeys(of.folder.name for of in needs if of is not None))
            found[stage.folder.name] = Step(
                kind, stage.folder.name, names, make, lambda: stage.done, make_part, missing_parts
            )

    table = job.table_stage
    add("table", table, [], lambda: job.table)
    for name, settings in job.recipe.external.items():
        own = job.production.table_stage(settings)
        add("table", own, [], partial(job.production.table, settings))
        add("table", evaluation.external_stage(name), [table, own], lambda: evaluation.externals)
    silver = None
    if job.recipe.silver is not None:
        source, silver = labelling.source_stage, labelling.stage
        add("table", source, [table], lambda: labelling.source)
        add("measure", labelling.segmentor_stage, [source], lambda: labelling.segmentor)
        add("silver", silver, [labelling.segmentor_stage, table], lambda: labelling.table)
    for network in generation.guides_and_judges:
        add("measure", generation.measure_stage(network), [table], partial(generation.measure, network))
    base, generator = generation.base_stage, generation.generator_stage
    add("generator", base, [table], lambda: generation.base)
    add("generator", generator, [base, *generation.guide_stages], lambda: generation.generator)
    judges = generation.judge_stages
    gate = judges[:1] if job.recipe.bank.gate is not None else []
    bank = generation.bank_stage
    add(
        "bank",
        bank,
        [table, generator, *gate],
        lambda: generation.bank,
        generation.build_part,
        generation.missing_parts,
    )
    add("audit", generation.audit_stage, [generator, *judges], generation.audited)
    encoder = job.encoder_stage
    add("encoder", encoder, [table, bank, silver], lambda: job.objective)
    for trial in evaluation.trials:
        external = [] if trial.external is None else [evaluation.external_stage(trial.external)]
        features = evaluation.features_stages(trial)
        for of in dict.fromkeys((trial.fitted, trial.external)) if features else ():
            make_features = partial(evaluation.features, of)
            add("features", evaluation.features_stage(of), [encoder, *external], make_features)
        needs = [encoder, *external, *features]
        add("evaluation", evaluation.stage(trial), needs, partial(evaluation.asked, trial))
    name = f"report-{job.recipe.name}"
    found[name] = Step("report", name, tuple(found), partial(report, job), lambda: False)
    return list(found.values())


def report(job: Pipeline) -> None:
    """The records and the page of a recipe whose stages are there."""
    job.run()
    report_of(job)

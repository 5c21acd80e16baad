"""What a person looks at after a run: contact sheets, result lines, and the report page of one recipe or of
several side by side."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cfssl.chromaps import chromaps_of
from cfssl.data.table import ImageTable
from cfssl.engine.run import read_metrics
from cfssl.errors import UserError
from cfssl.evaluate.grouped import Arms, labels_of, mean_of, name_of
from cfssl.evaluate.groups import classification_arms
from cfssl.evaluate.monitor import first_warnings
from cfssl.evaluate.segmented import targets
from cfssl.evaluate.settings import ClassificationSettings, EvaluationSettings, SegmentSettings
from cfssl.pipeline import Pipeline
from cfssl.provenance import environment
from cfssl.sheets import audited_sheet, bank_sheet
from cfssl.visualise.audit import write_audit
from cfssl.visualise.cells import MINUS, titled
from cfssl.visualise.curves import training_curves
from cfssl.visualise.evaluation_tables import Arm
from cfssl.visualise.report import Picture, Report, write_report


def report_of(job: Pipeline) -> Path:
    """Runs what is missing of a recipe and writes its page, and beside it that of its audit."""
    page = compare({job.recipe.name: job}, job.folder, job.recipe.name)
    if job.recipe.audit is not None:
        audit_page(job)
    return page


def compare(
    jobs: Mapping[str, Pipeline],
    folder: Path,
    title: str,
    descriptions: Mapping[str, str] | None = None,
    minutes: float | None = None,
) -> Path:
    """One self-contained page for recipes that share a table: a table per evaluation with the recipes as
    rows, the paired differences of every arm from the first, pictures of the products, and curves. `jobs`:
    name of the arm -> its pipeline; the last one's bank is shown."""
    results = {name: job.run() for name, job in jobs.items()}
    *_, shown = jobs.values()
    folder.mkdir(parents=True, exist_ok=True)
    pictures = []
    if shown.generation.bank.views:
        path = folder / "bank.png"
        bank_sheet(shown, path)
        truth = " beside the true counterfactual, rendered from the same patient" if shown.table.truth else ""
        caption = f"Training images and the counterfactuals stored in the bank{truth}."
        pictures.append(Picture("Counterfactuals", caption, path))
    for name, job in jobs.items():
        pictures.append(
            Picture(f"First batch: {name}", "Views as the objective sees them.", job.first_batch())
        )
    curves = folder / "training.png"
    training_curves(curves, {name: job.metrics_path for name, job in jobs.items()})
    captions = [caption(list(jobs.values())) for caption in (curves_caption, monitor_caption)]
    pictures.append(Picture("Training", " ".join(filter(None, captions)), curves))
    pictures += [picture for name, job in jobs.items() for picture in overlays(name, job)]
    pictures += [picture for name, job in jobs.items() for picture in colour_maps(name, job)]
    describe = descriptions or {}
    arms = [Arm(name, describe.get(name, ""), results[name]) for name in jobs]
    record = environment()
    provenance = {
        "table": shown.table.name,
        "data fingerprint": shown.table.fingerprint,
        "training seed": sorted({job.recipe.train.seed for job in jobs.values()}),
        **record,
        "command": " ".join(["cfssl", *record["command"][1:]]),
    }
    if minutes is not None:
        provenance["minutes"] = round(minutes, 2)
    page = folder / "report.html"
    recipe = (shown.folder / "recipe.yaml").read_text(encoding="utf-8")
    size = " x ".join(map(str, shown.table.images.shape))
    subtitle = f"{shown.table.name}, {len(shown.table)} images of {size}"
    write_report(Report(title, subtitle, pictures, arms, differences(jobs), provenance, recipe), page)
    return page


def overlays(arm: str, job: Pipeline) -> list[Picture]:
    """The sheet of every segmentation of an arm."""
    found = []
    for trial in job.evaluation.trials:
        if isinstance(trial.settings, SegmentSettings):
            title = f"Segmentation: {arm}, {trial.label.removeprefix('segment-')}"
            caption = (
                "Test images with the best, median and worst Dice, with the most labels and the first seed."
            )
            found.append(Picture(title, caption, job.evaluation.overlays(trial)))
    return found


def colour_maps(arm: str, job: Pipeline) -> list[Picture]:
    """The CHRO-map of an arm's first image, where its recipe asks for them; all of them and their page are
    written beside the report."""
    if job.recipe.chromap is None:
        return []
    folder = job.folder / "chromap"
    chromaps_of(job, folder, job.recipe.chromap)
    caption = (
        "Pixels coloured by their embeddings, in a training image and its counterfactuals. "
        f"{folder.name}/chromap.html shows more, and the nearest pixels of any point."
    )
    return [Picture(f"CHRO-map: {arm}", caption, folder / "image-000.png")]


def curves_caption(jobs: Sequence[Pipeline]) -> str:
    """What the loss curves of several arms can be compared for."""
    tasks = [[job.recipe.section(name) for name in ("views", "objective")] for job in jobs]
    if all(task == tasks[0] for task in tasks):
        return "Loss of the pre-training."
    return (
        "Loss of the pre-training. The arms differ in views or objective and so solve tasks of different "
        "difficulty on one axis: a lower curve does not mean a better encoder."
    )


def monitor_caption(jobs: Sequence[Pipeline]) -> str:
    """What the curves of the monitors show, and of what they warned; empty without a monitor."""
    sentences = []
    lines = {job.recipe.name: read_metrics(job.metrics_path) for job in jobs}
    if any("effective_rank" in line for found in lines.values() for line in found):
        sentences.append("Below it what the monitor saw of the encoder, on training and validation images.")
    for name, found in lines.items():
        sentences += [
            f"Warning: {warning} of {name}, from step {step} on."
            for warning, step in first_warnings(found).items()
        ]
    return " ".join(sentences)


def differences(jobs: Mapping[str, Pipeline]) -> list[dict[str, Any]]:
    """Every other arm minus the first, paired on the test rows, for each evaluation that both have: overall,
    the mean over the groups, the worst group and the gap of every grouping. With the largest label fraction,
    over all of its seeds."""
    (reference, first), *others = jobs.items()
    found = []
    for trial in first.evaluation.trials:
        for name, job in others:
            theirs = {other.label: other for other in job.evaluation.trials}
            if trial.label in theirs and same_rows(first, job, trial.external):
                arms = job.evaluation.scores(trial.label), first.evaluation.scores(trial.label)
                table = first.evaluation.table_of(trial.external)
                where = f" on {trial.external} ({trial.way})" if trial.external else ""
                compared = (
                    mask_differences_of(trial.settings, table, *arms, where)
                    if isinstance(trial.settings, SegmentSettings)
                    else differences_of(trial.settings, table, *arms, where)
                )
                found += [{"name": f"{name} {MINUS} {reference}", **entry} for entry in compared]
    return found


def same_rows(one: Pipeline, other: Pipeline, external: str | None) -> bool:
    """Whether what is fitted and tested in a trial is the same table for both."""
    tables = [
        {job.evaluation.table_of(name).fingerprint for job in (one, other)} for name in (None, external)
    ]
    return all(len(fingerprints) == 1 for fingerprints in tables)


def mask_differences_of(
    settings: SegmentSettings,
    table: ImageTable,
    arrays: Mapping[str, np.ndarray],
    reference: Mapping[str, np.ndarray],
    on: str = "",
) -> list[dict[str, Any]]:
    """As `differences_of`, of the Dice of every structure and of their mean."""
    names = {seed: f"dice-{max(settings.fractions):g}-{seed}" for seed in settings.seeds}
    seeds = [seed for seed, name in names.items() if name in arrays and name in reference]
    if not seeds:
        return []
    test = table.frame.iloc[reference["row"]]
    patients = None if table.group is None else test[table.group].to_numpy()
    found = []
    for target, columns in targets(settings):
        a, b = (
            [mean_of(of[names[seed]][:, columns].mean(1)) for seed in seeds] for of in (arrays, reference)
        )
        arms = Arms(a, b, len(test), lambda _: "", patients=patients, resamples=settings.resamples)
        groups = {name_of(grouping): labels_of(test, grouping) for grouping in settings.by}
        variant = f" ({settings.variant})" if settings.variant else ""
        what = f"{titled(settings.name)} of {target}{variant}{on}{labels_used(settings, seeds)}"
        about = {"unit": "Dice", "seeds_of": "downstream"}
        found += [
            {"of": f"{what}, {where}", **about, **entry} for where, entry in everywhere(arms, groups).items()
        ]
    return found


def everywhere(arms: Arms, groups: Mapping[str, np.ndarray]) -> dict[str, dict[str, Any]]:
    """The differences of two arms on all rows, and of every grouping the mean over its groups, the worst and
    the gap."""
    found = {"all": arms.overall()}
    for grouping, labels in groups.items():
        worst = arms.worst_group(labels)
        if worst["groups"]:
            mean = arms.mean_of_groups(labels, worst["groups"])
            found[f"mean over {grouping} {', '.join(worst['groups'])}"] = mean
        found[f"each arm's worst {grouping}"] = worst
        found[f"gap between each arm's best and worst {grouping}"] = arms.gap(labels)
    return found


def labels_used(settings: EvaluationSettings, seeds: Sequence[int]) -> str:
    """The largest label fraction and its seeds, where there is a choice."""
    fraction = max(settings.fractions)
    which = f" (seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))})"
    share = "" if fraction == 1 else f", {100 * fraction:g} % of the labels"
    return share + (which if fraction < 1 or len(seeds) > 1 else "")


def differences_of(
    settings: ClassificationSettings,
    table: ImageTable,
    arrays: Mapping[str, np.ndarray],
    reference: Mapping[str, np.ndarray],
    on: str = "",
) -> list[dict[str, Any]]:
    """The scores `arrays` minus those of `reference`, both as `Evaluation.scores` returns them. `on`: what
    the tested rows are called, where they are not those of the recipe's table."""
    fraction = max(settings.fractions)
    names = {seed: f"scores-{fraction:g}-{seed}" for seed in settings.seeds}
    seeds = [seed for seed, name in names.items() if name in arrays and name in reference]
    if not seeds:
        return []
    y = reference["y"]
    arms = [arrays[names[seed]] for seed in seeds], [reference[names[seed]] for seed in seeds]
    test, resamples = table.frame.iloc[reference["row"]], settings.resamples
    patients = None if table.group is None else test[table.group].to_numpy()
    groups = {name_of(grouping): labels_of(test, grouping) for grouping in settings.by}
    found = everywhere(classification_arms(y, *arms, patients=patients, resamples=resamples), groups)
    what = f"{titled(settings.name)} of {settings.target}{on}{labels_used(settings, seeds)}"
    about = {"unit": "AUC", "seeds_of": "downstream"}
    return [{"of": f"{what}, {where}", **about, **entry} for where, entry in found.items()]


def audit_page(job: Pipeline, items: int = 6) -> Path:
    """The page of a recipe's audit, with counterfactuals of images of the audited split."""
    if job.recipe.audit is None or job.generation.generator is None:
        raise UserError(
            f"The recipe {job.recipe.name} has no audit; add a section audit with a judge, e.g. audit: "
            "{judge: {attributes: [scanner, sex, disease]}}."
        )
    record, folder = job.generation.audited(), job.folder / "audit"
    folder.mkdir(parents=True, exist_ok=True)
    audited_sheet(job, folder / "counterfactuals.png", items)
    caption = f"Images of the {record['split']} split under every do() of the bank, none of them trained on."
    sheet = Picture("Counterfactuals", caption, folder / "counterfactuals.png")
    made_by = {name: record[name] for name in ("generator", "split", "n")}
    provenance = {**made_by, "judge": record["judge"]["fingerprint"], **environment()}
    return write_audit(record, folder, f"Audit of {job.recipe.name}", provenance, [sheet])


def print_result(result: Mapping[str, Any]) -> None:
    """Overall and per-group values of one evaluation, as plain lines."""
    metric = result["metrics"][0]
    share = result["protocol"]["label_fraction"]
    where = f" on {result['external']} ({result['way']})" if "external" in result else ""
    variant = f" ({result['variant']})" if result.get("variant") else ""
    print(
        f"{result['evaluation']} of {result['target']}{variant}{where}, {share:.0%} of the labels, {metric} "
        "with 95 % intervals"
    )
    print(f"  {'all':<24}{_value(result['overall'][metric])}  n {result['overall']['n']}")
    for grouping, content in result["groups"].items():
        for group, row in content["table"].items():
            print(f"  {f'{grouping} {group}':<24}{_value(row[metric])}  n {row['n']}")
        worst = content["worst"][metric]
        if worst is not None and content["gap"][metric] is not None:
            print(f"  worst {grouping}: {worst['group']}; gap {_value(content['gap'][metric])}")


def _value(entry: Mapping[str, Any]) -> str:
    if entry["value"] is None:
        return f"-      ({entry['reason']})"
    if entry["low"] is None:
        return f"{entry['value']:.3f}  ({entry['reason']})"
    return f"{entry['value']:.3f}  [{entry['low']:.3f}, {entry['high']:.3f}]"

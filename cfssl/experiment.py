"""What an experiment is: its sections, each owned by the room that uses it, and what cannot work together.

`recipe.py` reads it from files.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.dataclasses import dataclass

from cfssl.bank.settings import BankSettings
from cfssl.data.datasets import (
    MorphoMNISTSettings,
    PhantomChestSettings,
    PhantomTubeSettings,
    TableSettings,
)
from cfssl.data.views import ViewSettings
from cfssl.engine.loop import TrainSettings
from cfssl.engine.run import HardwareSettings
from cfssl.errors import nearest
from cfssl.evaluate.settings import (
    AuditSettings,
    FineTuningSettings,
    MonitorSettings,
    ProbeSettings,
    SegmentSettings,
)
from cfssl.generators import FittedSettings, GeneratorSettings, HVAESettings
from cfssl.generators.finetune import FinetuneSettings
from cfssl.measure import PredictorSettings, SegmentorSettings
from cfssl.models.backbone import BackboneSettings
from cfssl.models.initial import InitSettings
from cfssl.objectives import ObjectiveSettings, comparison, takes_local, takes_views
from cfssl.objectives.simclr import SimCLRSettings
from cfssl.settings import STRICT, Count
from cfssl.silver import SilverSettings

DataSettings = PhantomChestSettings | PhantomTubeSettings | MorphoMNISTSettings | TableSettings
AnyEvaluation = ProbeSettings | FineTuningSettings | SegmentSettings
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]


@dataclass(frozen=True, config=STRICT)
class ChromapsSettings:
    """How many training images are drawn as CHRO-maps, with all their counterfactuals, and by which preset of
    visualise/chromap.py."""

    images: Count = 3
    preset: Literal["default", "paper"] = "default"


class Recipe(BaseModel):
    """One experiment: table, generator, bank, views, objective, encoder, evaluations. `silver`: masks that
    the table has not, by a segmentor of another table. `chromap`: pictures of embeddings beside the report;
    null draws none. `external`: further data sets that evaluations may ask
    for by their names; nothing is pre-trained on them."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Name
    data: Annotated[DataSettings, Field(discriminator="name")]
    silver: SilverSettings | None = None
    generator: Annotated[GeneratorSettings, Field(discriminator="name")] | None = None
    finetune: FinetuneSettings | None = None
    bank: BankSettings = Field(default_factory=BankSettings)
    audit: AuditSettings | None = None
    views: ViewSettings = Field(default_factory=ViewSettings)
    objective: Annotated[ObjectiveSettings, Field(discriminator="name")] = Field(
        default_factory=SimCLRSettings
    )
    backbone: BackboneSettings = Field(default_factory=BackboneSettings)
    init: InitSettings | None = None
    train: TrainSettings = Field(default_factory=TrainSettings)
    monitor: MonitorSettings | None = None
    external: dict[Name, Annotated[DataSettings, Field(discriminator="name")]] = Field(default_factory=dict)
    evaluate: tuple[Annotated[AnyEvaluation, Field(discriminator="name")], ...] = ()
    chromap: ChromapsSettings | None = None
    hardware: HardwareSettings = Field(default_factory=HardwareSettings)
    track: Literal["none", "wandb", "tensorboard"] = "none"

    def section(self, name: str) -> Any:
        """A section as JSON-serialisable settings, for content keys."""
        return self.model_dump(mode="json")[name]

    def variables(self) -> set[str]:
        """Everything that the generator's graph knows."""
        if self.generator is None:
            return set()
        graph = self.generator.graph
        return {*self.generator.parents, *graph}.union(*graph.values())

    def measures(self) -> dict[str, PredictorSettings | SegmentorSettings]:
        """The networks that guide and judge, by where they stand in the recipe."""
        rules = self.finetune.rules if self.finetune else ()
        found = {f"finetune.rules[{index}].guide": rule.guide for index, rule in enumerate(rules)}
        if self.audit is not None:
            found |= {"audit.judge": self.audit.judge}
            found |= {"audit.segmentor": self.audit.segmentor} if self.audit.segmentor else {}
        return found

    def trainings(self) -> dict[str, TrainSettings]:
        """How everything is trained, by where it stands in the recipe."""
        evaluations = {f"evaluate[{index}]": of for index, of in enumerate(self.evaluate)}
        trained = {"": self, "generator": self.generator, "finetune": self.finetune}
        silver = {"silver.segmentor": self.silver.segmentor} if self.silver else {}
        sections = {**trained, **silver, **self.measures(), **evaluations}
        found = {f"{path}.train".lstrip("."): getattr(of, "train", None) for path, of in sections.items()}
        return {path: train for path, train in found.items() if train is not None}

    def problems(self) -> list[str]:
        """Combinations that cannot work, one sentence each."""
        parts = (generator_problems, audit_problems, bank_problems, evaluation_problems, training_problems)
        return [problem for part in parts for problem in part(self)]


def generator_problems(recipe: Recipe) -> list[str]:
    """Of generator and finetune."""
    found = []
    generator, finetune, variables = recipe.generator, recipe.finetune, recipe.variables()
    if recipe.bank.do and generator is None:
        found.append("bank.do asks for counterfactuals, but there is no generator; add one or remove bank.do")
    if generator is not None and not recipe.bank.do:
        found.append(
            "generator is given, but bank.do is empty; name what to intervene on, e.g. bank.do: "
            "{scanner: all}"
        )
    if generator is not None and (strangers := sorted(set(recipe.bank.variables) - variables)):
        found.append(
            f"bank.do intervenes on {strangers}, which is not among the generator's variables "
            f"{sorted(variables)}"
        )
    if finetune is None:
        return found
    if not isinstance(generator, HVAESettings | FittedSettings):
        return [*found, "finetune changes an hvae, but generator is not one; set generator.name: hvae"]
    if strangers := sorted(set(finetune.do) - variables):
        found.append(
            f"finetune.do intervenes on {strangers}, which is not among the generator's variables "
            f"{sorted(variables)}"
        )
    for index, rule in enumerate(finetune.rules):
        unknown = [name for name in getattr(rule.guide, "attributes", ()) if name not in variables]
        if unknown:
            found.append(
                f"finetune.rules[{index}].guide predicts {unknown}, which the generator does not know and "
                f"cannot be held to; its variables are {sorted(variables)}"
            )
    return found


def audit_problems(recipe: Recipe) -> list[str]:
    """Of audit and bank.gate, and of judges that are guides."""
    found, audit, gate = [], recipe.audit, recipe.bank.gate
    if audit is None:
        return ["bank.gate drops views that audit.judge disagrees with; add audit.judge"] if gate else []
    if not recipe.bank.do:
        found.append("audit looks at the counterfactuals of bank.do, which is empty; name what to do")
    if gate is not None and (unjudged := sorted(set(recipe.bank.variables) - set(audit.judge.attributes))):
        found.append(
            f"bank.gate asks audit.judge about {unjudged}, which bank.do intervenes on and the judge does "
            "not predict; add them to audit.judge.attributes"
        )
    if gate is not None and (unjudged := sorted(set(gate.unchanged) - set(audit.judge.attributes))):
        found.append(
            f"bank.gate.unchanged asks audit.judge about {unjudged}, which it does not predict; add them to "
            "audit.judge.attributes"
        )
    guides = [rule.guide for rule in recipe.finetune.rules] if recipe.finetune else []
    for judge, name in ((audit.judge, "judge"), (audit.segmentor, "segmentor")):
        if judge in guides:
            found.append(
                f"audit.{name} is the very guide of finetune.rules[{guides.index(judge)}]; give it another "
                "train.seed and the other part of the training images"
            )
    return found


def bank_problems(recipe: Recipe) -> list[str]:
    """Of what views ask for."""
    found, plan = [], recipe.views.counterfactual
    sets = [sorted(joint) for joint in recipe.bank.interventions]
    if plan is not None and plan.variable is None and not sets:
        found.append(
            "views.counterfactual shows every do() of the bank, but bank.do is empty; name what to do"
        )
    elif plan is not None and plan.variable is not None and sorted(plan.variables) not in sets:
        alone = isinstance(plan.variable, str)
        wanted = plan.variable if alone else list(plan.variables)
        does = sets if isinstance(recipe.bank.do, tuple) else sorted(recipe.bank.do)
        joint = ", ".join(f"{name}: all" for name in plan.variables)
        found.append(
            f"views.counterfactual.variable is {wanted!r}, but bank.do intervenes on {does or 'nothing'}"
            + ("" if alone else f"; to set these together write bank.do: [{{{joint}}}]")
        )
    return found


def evaluation_problems(recipe: Recipe) -> list[str]:
    """Of evaluate and external."""
    found = []
    names = [evaluation.label for evaluation in recipe.evaluate]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        found.append(
            f"evaluate holds {repeated} more than once; merge them or change their target or fraction"
        )
    segmented: dict[tuple[str, str], int] = {}
    for index, evaluation in enumerate(recipe.evaluate):
        if isinstance(evaluation, SegmentSettings):
            for name in evaluation.structures:
                first = segmented.setdefault((name, evaluation.variant), index)
                if first != index or evaluation.structures.count(name) > 1:
                    found.append(
                        f"evaluate[{index}].structures names {name!r}, which evaluate[{first}] segments in "
                        "the same way; name each structure once"
                    )
        for name in evaluation.external:
            if name not in recipe.external:
                found.append(
                    f"evaluate[{index}].external names {name!r}, which is no external set"
                    f"{nearest(name, recipe.external)}"
                )
    asked = {name for evaluation in recipe.evaluate for name in evaluation.external}
    for name, settings in recipe.external.items():
        if name not in asked:
            found.append(
                f"external.{name} is evaluated by nothing; name it in the external of an evaluation or "
                "remove it"
            )
        if settings == recipe.data:
            found.append(f"external.{name} is the very table of data; give another one")
    return found


def training_problems(recipe: Recipe) -> list[str]:
    """Of batches, micro-batches and the objective."""
    found = []
    name, accumulate = recipe.objective.name, recipe.train.accumulate
    least, most = takes_views(recipe.objective)
    if recipe.views.count < least or (most is not None and recipe.views.count > most):
        views = f"{least} views" + (" or more" if most is None else "")
        found.append(f"objective {name} takes {views}, but views.count is {recipe.views.count}")
    if recipe.views.local is not None and not takes_local(recipe.objective):
        found.append(f"views.local is given, but objective {name} looks at the other views alone; remove it")
    if accumulate > 1 and (compared := comparison(recipe.objective)):
        found.append(
            f"train.accumulate is {accumulate}, but {compared} compares the images of a micro-batch with "
            f"each other, {recipe.train.batch // accumulate} instead of the {recipe.train.batch} of "
            "train.batch; set train.accumulate: 1 and choose train.batch to fit the memory"
        )
    found += process_problems(recipe)
    if recipe.init is not None and recipe.init.head_warmup >= recipe.train.epochs:
        found.append(
            f"init.head_warmup is {recipe.init.head_warmup} and train.epochs {recipe.train.epochs}, so that "
            "the backbone would never be trained; lower it"
        )
    for path, train in recipe.trainings().items():
        if train.batch % train.accumulate:
            found.append(
                f"{path}.batch ({train.batch}) is not a multiple of {path}.accumulate ({train.accumulate})"
            )
    return found


def process_problems(recipe: Recipe) -> list[str]:
    """Of several processes that train together."""
    found, hardware = [], recipe.hardware
    parts, batch = recipe.train.accumulate * hardware.processes, recipe.train.batch
    if hardware.processes > 1 and batch % parts:
        found.append(
            f"train.batch ({batch}) is not a multiple of train.accumulate x hardware.devices x "
            f"hardware.nodes ({parts}), so that the processes cannot share it"
        )
    if hardware.strategy == "fsdp":
        if hardware.processes == 1:
            found.append(
                "hardware.strategy is fsdp, but there is one process; raise hardware.devices or nodes"
            )
        if hardware.precision == "16-mixed":
            found.append("hardware.strategy fsdp knows no loss scale; set hardware.precision: bf16-mixed")
        if recipe.monitor is not None:
            found.append("hardware.strategy fsdp leaves no process with a whole encoder; set monitor: null")
        if recipe.init is not None and recipe.init.head_warmup:
            found.append("hardware.strategy fsdp cannot hold a part of the weights; set init.head_warmup: 0")
    return found

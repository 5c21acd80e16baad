"""The generator's side of a recipe: what is trained on real images to make its bank.

    table -> generator -> (guides -> fine-tuned generator) -> bank (-> judge -> gate, audit)

Guides and the judge are stages of their own, so that arms that differ in their target rule share the base
generator and the guide.
"""

import copy
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from cfssl.bank.build import build, plan_bank, plan_views
from cfssl.bank.gate import apply_gate
from cfssl.bank.parts import Part, parts_with
from cfssl.bank.shards import Plan, View, complete_shard, finish, read_bank_record
from cfssl.bank.staging import staged
from cfssl.bank.store import Bank
from cfssl.data.table import ImageTable
from cfssl.engine.progress import ProgressBar
from cfssl.engine.run import Run, torch_threads
from cfssl.errors import UserError
from cfssl.evaluate.audit import audit
from cfssl.files import made_folders, read_json, write_json
from cfssl.generators import FittedGenerator, FittedSettings, create_generator
from cfssl.generators.finetune import finetune
from cfssl.generators.hvae import HVAEGenerator
from cfssl.generators.targets import TargetRule, create_rule
from cfssl.measure import MeasureSettings
from cfssl.measure.judge import PredictorJudge
from cfssl.production import Production
from cfssl.stages import AUDIT_CODE, BANK_CODE, FINETUNE_CODE, GENERATOR_CODE, Stage


class Generation:
    """`table`: opens the prepared table when it is first needed; `table_key`: of its stage."""

    def __init__(self, production: Production, table_key: str, table: Callable[[], ImageTable]) -> None:
        self.production, self.recipe = production, production.recipe
        self.table_key, self._table = table_key, table

    @property
    def table(self) -> ImageTable:
        return self._table()

    @cached_property
    def base_stage(self) -> Stage | None:
        """The generator as the likelihood alone makes it, or as it was given."""
        settings = self.recipe.generator
        if settings is None:
            return None
        section, precision = self.recipe.section("generator"), self.recipe.hardware.precision
        if isinstance(settings, FittedSettings):  # what it holds counts, not where it lies
            section = {**section, "file": settings.content}
        return self.production.stage("generator", section, precision, self.table_key, code=GENERATOR_CODE)

    @cached_property
    def guide_stages(self) -> list[Stage]:
        """One per rule of the fine-tuning."""
        rules = self.recipe.finetune.rules if self.recipe.finetune else ()
        return [self.measure_stage(rule.guide) for rule in rules]

    @cached_property
    def generator_stage(self) -> Stage | None:
        """The generator that makes the bank, fine-tuned where the recipe says so."""
        if self.recipe.finetune is None or self.base_stage is None:
            return self.base_stage
        section, precision = self.recipe.section("finetune"), self.recipe.hardware.precision
        keys = [stage.key for stage in (self.base_stage, *self.guide_stages)]
        return self.production.stage("finetune", section, precision, keys, code=FINETUNE_CODE)

    @cached_property
    def judge_stages(self) -> list[Stage]:
        """The independent predictor, and the segmentor and the embedding where the audit has them."""
        return [self.measure_stage(settings) for settings in self._judges()]

    @property
    def guides_and_judges(self) -> list[MeasureSettings]:
        """The frozen networks that the recipe has trained, guides first."""
        rules = self.recipe.finetune.rules if self.recipe.finetune else ()
        return [*(rule.guide for rule in rules), *self._judges()]

    @cached_property
    def bank_stage(self) -> Stage:
        generator = self.generator_stage.key if self.generator_stage else None
        section = self.recipe.section("bank")
        judges = [stage.key for stage in self.judge_stages[:1]] if self.recipe.bank.gate else None
        return self.production.stage("bank", section, self.table_key, generator, judges, code=BANK_CODE)

    @cached_property
    def audit_stage(self) -> Stage | None:
        if self.recipe.audit is None or self.generator_stage is None:
            return None
        keys = [stage.key for stage in (self.generator_stage, *self.judge_stages)]
        sections = self.recipe.section("audit"), self.recipe.section("bank")["do"]
        return self.production.stage("audit", sections, keys, self.table_key, code=AUDIT_CODE)

    def measure_stage(self, settings: MeasureSettings) -> Stage:
        """Of a guide or judge."""
        return self.production.measure_stage(settings, self.table_key)

    def stages(self) -> list[Stage]:
        """All stages up to the bank and its audit, in order, each once."""
        found = [self.base_stage, *self.guide_stages, self.generator_stage, *self.judge_stages]
        found += [self.bank_stage, self.audit_stage]
        return list(dict.fromkeys(stage for stage in found if stage is not None))

    @cached_property
    def base(self) -> FittedGenerator | None:
        """The generator before any fine-tuning, on the CPU."""
        stage, settings = self.base_stage, self.recipe.generator
        if stage is None or settings is None:
            return None
        generator = create_generator(settings, self.table)

        def make(folder: Path) -> None:
            if not isinstance(settings, FittedSettings):
                run = self.production.run(folder)
                generator.fit(self.table, run)
                run.close()
            generator.save(stage.product)

        self.production.finish(stage, make)
        Run(stage.folder).checkpoint_path.unlink(missing_ok=True)
        generator.load(stage.product)
        return generator

    @cached_property
    def generator(self) -> FittedGenerator | None:
        """The generator that makes the bank, on the device of the recipe."""
        stage, settings, generator = self.generator_stage, self.recipe.finetune, copy.deepcopy(self.base)
        if stage is None or generator is None:
            return None
        if settings is not None:
            assert isinstance(generator, HVAEGenerator)  # the recipe's own check
            hvae = generator

            def make(folder: Path) -> None:
                run = self.production.run(folder)
                finetune(hvae, self.table, self.rules(), settings, run)
                hvae.save(stage.product)
                run.close()

            self.production.finish(stage, make)
            Run(stage.folder).checkpoint_path.unlink(missing_ok=True)
            generator.load(stage.product)
        generator.to(self.recipe.hardware.device)
        return generator

    def rules(self) -> list[TargetRule]:
        """The target rules of the recipe's fine-tuning with their trained guides."""
        settings = self.recipe.finetune
        if settings is None:
            return []
        variables = settings.do or self.recipe.generator.parents  # type: ignore[union-attr]
        return [create_rule(rule, self.measure(rule.guide), self.table, variables) for rule in settings.rules]

    def measure(self, settings: MeasureSettings) -> Any:
        """A guide or judge, trained on real images, frozen."""
        return self.production.measure(settings, self.table_key, self.table)

    @cached_property
    def bank(self) -> Bank:
        """The opened bank; raises `UserError` when one of its files is missing or truncated."""
        self.production.finish(self.bank_stage, self.build_bank)
        bank = self._open_bank()
        if self.recipe.bank.gate is not None and bank.gate is None:  # mending an index drops the gate
            self.build_bank(self.bank_stage.folder)
            bank = self._open_bank()
        return bank

    @cached_property
    def staged_bank(self) -> Bank:
        """The bank as it is read again and again: from a disk of this node where the recipe names one."""
        place = self.recipe.hardware.stage
        return self.bank if place is None else staged(self.bank, place)

    def _open_bank(self) -> Bank:
        made_by = self.generator.fingerprint if self.generator is not None else None
        folder = self.bank_stage.folder / "bank"
        return Bank.open(folder, table_fingerprint=self.table.fingerprint, generator_fingerprint=made_by)

    def build_bank(self, stage_folder: Path, check: bool = False) -> None:
        """Writes the shards that are missing or incomplete, and with `check` those whose bytes fail; also
        mends a finished bank whose files were lost. Then the gate, where the recipe has one."""
        self._build_shards(stage_folder, check)
        self._gate(stage_folder)

    def build_part(self, index: int, count: int, check: bool = False) -> range:
        """Writes what is missing of the `index`-th of `count` parts of the bank (see `cfssl.bank.parts`), and
        returns its shards. Any number of processes may build parts at once, also the same one; `finish_bank`
        makes a bank of them. Raises `UserError` unless table and generator are there: else every part would
        make them."""
        part, stage = Part(index, count), self.bank_stage
        needed = [self.production.table_stage(self.recipe.data), self.generator_stage]
        missing = [stage.name for stage in needed if stage is not None and not stage.done]
        if missing:
            verb = "check" if self.generator_stage is None else "fit"
            raise UserError(
                f"The recipe {self.recipe.name} has no {' and no '.join(missing)} yet, which every part of "
                f"its bank would make for itself; run `cfssl {verb}` with this recipe once before its parts."
            )
        shards = part.of(plan_bank(*self._bank_content, **self._bank_options).shard_count)
        with made_folders(stage.folder), torch_threads(self.recipe.hardware.threads):
            self._build_shards(stage.folder, check, shards)
        return shards

    def missing_parts(self, count: int) -> list[int]:
        """The numbers of those of `count` parts of the bank that are not whole; all of them before the first
        was begun, when nobody knows how many shards there will be."""
        folder = self.bank_stage.folder / "bank"
        if not (folder / "bank.json").exists():
            return list(range(count))
        plan = Plan.from_json(read_bank_record(folder / "bank.json")["plan"])
        missing = [shard for shard in range(plan.shard_count) if complete_shard(folder, plan, shard) is None]
        return parts_with(missing, plan.shard_count, count)

    def finish_bank(self, parts: int | None = None) -> Bank:
        """Makes a bank of its parts when all are there, and applies the gate. Raises `UserError` while shards
        are missing, and names them and those of `parts` parts that they lie in."""

        def make(folder: Path) -> None:
            finish(folder / "bank", parts)
            self._gate(folder)

        self.production.finish(self.bank_stage, make)
        return self.bank

    @cached_property
    def _bank_content(self) -> tuple[ImageTable, np.ndarray, FittedGenerator | None, list[View]]:
        """Table, rows, generator and do()s of the bank."""
        table, generator, do = self.table, self.generator, self.recipe.bank.do
        graph = generator.graph if generator is not None else None
        views = plan_views(do, graph, table.attributes) if do else []
        return table, table.rows("train"), generator, views

    @property
    def _bank_options(self) -> dict[str, Any]:
        return {"megabytes": self.recipe.bank.shard_megabytes, "device": self.recipe.hardware.device}

    def _build_shards(self, stage_folder: Path, check: bool, shards: range | None = None) -> None:
        """All shards of the bank, or some, which make no bank yet."""
        plan = plan_bank(*self._bank_content, **self._bank_options)
        numbers = range(plan.shard_count) if shards is None else shards
        total = sum(len(plan.items(shard)) for shard in numbers)
        with ProgressBar("bank", total=total, quiet=self.production.quiet) as bar:
            build(
                stage_folder / "bank",
                *self._bank_content,
                **self._bank_options,
                shards=shards,
                check=check,
                progress=lambda done, _: bar.advance(steps=done - bar.done, items=done - bar.items),
            )

    def _gate(self, stage_folder: Path) -> None:
        settings, table = self.recipe.bank, self.table
        if settings.gate is None or self.recipe.audit is None:
            return
        judge = self.measure(self.recipe.audit.judge)
        made = int(Bank.open(stage_folder / "bank").made[:, 1:].sum())
        with ProgressBar("gate", total=made, unit="views", quiet=self.production.quiet) as bar:
            apply_gate(
                stage_folder / "bank",
                PredictorJudge(judge, (*settings.variables, *settings.gate.unchanged)),
                settings.gate,
                judge.fingerprint,
                table.attributes,
                progress=lambda done, _: bar.advance(steps=done - bar.done, items=done - bar.items),
                device=self.recipe.hardware.device,
            )

    def audited(self) -> dict[str, Any]:
        """The audit of the generator, see `cfssl.evaluate.audit`; only of a recipe that has one."""
        stage, settings = self.audit_stage, self.recipe.audit
        assert stage is not None and settings is not None  # noqa: PT018  the recipe's own check

        def make(folder: Path) -> None:
            generator = self.generator
            assert generator is not None
            record = audit(
                generator,
                self.table,
                self.recipe.bank.do,
                self.measure(settings.judge),
                self.measure(settings.segmentor) if settings.segmentor else None,
                self.measure(settings.embedding) if settings.embedding else None,
                settings,
                guides=[rule.fingerprint for rule in self.rules()],
                device=self.recipe.hardware.device,
            )
            write_json(stage.product, record)

        self.production.finish(stage, make)
        found: dict[str, Any] = read_json(stage.product)
        return found

    def _judges(self) -> list[MeasureSettings]:
        if self.recipe.audit is None:
            return []
        audit_ = self.recipe.audit
        judges = [audit_.judge, audit_.segmentor, audit_.embedding]
        return [settings for settings in judges if settings is not None]

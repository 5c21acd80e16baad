"""The silver labels of a recipe: masks that its table has not, by a segmentor of another table.

    table of silver.data -> segmentor -> silver masks of the recipe's table -> table with both

The segmentor is a stage like a guide or judge, so that recipes that learn from the same human masks share it.
"""

from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

from cfssl.agreement import check_silver
from cfssl.data.archive import refuse_taken_place, write_archive
from cfssl.data.labels import LabelledTable
from cfssl.data.table import ImageTable
from cfssl.engine.progress import ProgressBar
from cfssl.errors import UserError
from cfssl.files import read_json, write_json
from cfssl.measure import Segmentor
from cfssl.production import Production
from cfssl.silver import SilverSettings, agreement_text, validated, write_silver
from cfssl.stages import SILVER_CODE, Stage


class Labelling:
    """`table`: opens the prepared table when it is first needed; `table_key`: of its stage."""

    def __init__(self, production: Production, table_key: str, table: Callable[[], ImageTable]) -> None:
        self.production, self.recipe = production, production.recipe
        self.table_key, self._table = table_key, table

    @property
    def settings(self) -> SilverSettings:
        """Raises `UserError` for a recipe that has none."""
        if self.recipe.silver is None:
            raise UserError(
                f"The recipe {self.recipe.name} makes no silver masks; add a silver section with the table "
                "and the segmentor that they are learned from."
            )
        return self.recipe.silver

    @property
    def source_stage(self) -> Stage:
        """Of the table that the segmentor is trained on."""
        return self.production.table_stage(self.settings.data)

    @property
    def segmentor_stage(self) -> Stage:
        return self.production.measure_stage(self.settings.segmentor, self.source_stage.key)

    @property
    def stage(self) -> Stage:
        """Of the silver masks."""
        keys = self.segmentor_stage.key, self.table_key
        return self.production.stage("silver", self.settings.threshold, *keys, code=SILVER_CODE)

    def stages(self) -> list[Stage]:
        """All stages up to the silver masks, in order; none of a recipe without them."""
        return [] if self.recipe.silver is None else [self.source_stage, self.segmentor_stage, self.stage]

    def keys(self, names: Iterable[str]) -> list[str]:
        """What something that takes the masks `names` of `table` depends on besides the recipe's own table:
        the key of the silver masks where it takes one of them."""
        silver = self.recipe.silver
        return [self.stage.key] if silver is not None and set(names) & set(silver.names) else []

    @cached_property
    def source(self) -> ImageTable:
        """The table that the segmentor is trained on. Raises `UserError` where it does not fit the recipe's
        own."""
        source = self.production.table(self.settings.data)
        check_silver(self.recipe, self._table(), source)
        return source

    @cached_property
    def segmentor(self) -> Segmentor:
        """The segmentor, trained and frozen."""
        found = self.production.measure(self.settings.segmentor, self.source_stage.key, self.source)
        assert isinstance(found, Segmentor)
        return found

    @cached_property
    def table(self) -> LabelledTable:
        """The recipe's table with its silver masks, where the recipe has any, beside its own."""
        table = self._table()
        if self.recipe.silver is None:
            return LabelledTable(table.folder, table.truth)
        self.source  # noqa: B018  refused before anything is trained
        self.production.finish(self.stage, self._make)
        return LabelledTable(table.folder, table.truth, self.stage.product.parent)

    def _make(self, folder: Path) -> None:
        table, threshold, segmentor = self._table(), self.settings.threshold, self.segmentor
        score: dict[str, Any] = {"validation": validated(segmentor, self.source, threshold)}
        with ProgressBar("silver", total=len(table), quiet=self.production.quiet) as bar:

            def progress(done: int) -> None:
                bar.advance(steps=done - bar.done, items=done - bar.items)

            score["own"] = write_silver(folder / "silver", segmentor, table, threshold, progress)
        write_json(folder / "score.json", score)

    @property
    def score(self) -> dict[str, Any]:
        """How the silver masks agree with human ones, see `cfssl.silver.agreement`: `validation`, those of
        the table that the segmentor was trained on; `own`, those of the recipe's table that have the same
        names."""
        self.table  # noqa: B018
        found: dict[str, Any] = read_json(self.stage.folder / "score.json")
        return found

    def score_text(self) -> list[str]:
        """`score` for a person, and the range of the confidence, a line each."""
        score, table = self.score, self.table
        lines = agreement_text(f"validation images of {self.source.name}", score["validation"])
        lines += agreement_text(f"images of {table.name} that have such a mask", score["own"])
        assert table.silver is not None
        for name, sure in table.silver.confidence.items():
            lines.append(
                f"{name}: confidence {sure.min():.3f} to {sure.max():.3f}, median {sure.median():.3f}"
            )
        return lines

    def export(self, path: Path) -> None:
        """The recipe's table with its silver masks and their confidence as one `.npz` that is a table itself.
        Raises `UserError` where something lies there, before anything is made."""
        refuse_taken_place(path)
        self.settings  # noqa: B018  of a recipe without any, the same table would come out
        write_archive(path, self.table)

"""Tables of numbers as people read them: intervals in smaller type, and a reason where a value is missing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

TITLES = {
    "linear_probe": "Linear probe",
    "knn": "k nearest neighbours",
    "finetune": "Fine-tuning",
    "segment": "Segmentation",
    "auc": "AUC",
    "average_precision": "average precision",
    "balanced_accuracy": "balanced accuracy",
    "macro_f1": "macro F1",
    "brier": "Brier score",
    "calibration_error": "expected calibration error",
    "dice": "Dice",
    "hd95": "Hausdorff distance (95 %) in pixels",
    "asd": "average surface distance in pixels",
    "surface_dice": "surface Dice",
}
DASH, MINUS = "—", "−"


@dataclass(frozen=True)
class Cell:
    """A value, its interval in smaller type, and a footnote."""

    text: str
    interval: str = ""
    note: str = ""


@dataclass(frozen=True)
class Table:
    """Rows (name, cells), without cells for an arm that was not evaluated; `columns` are (heading, lines
    below), `corner` the heading of the names."""

    title: str
    columns: Sequence[tuple[str, Sequence[str]]]
    rows: Sequence[tuple[str, Sequence[Cell]]]
    corner: str = "arm"

    @property
    def notes(self) -> list[str]:
        """The footnotes, in order of appearance."""
        return list(dict.fromkeys(cell.note for _, cells in self.rows for cell in cells if cell.note))


def figure(entry: Mapping[str, Any], signed: bool = False, decimals: int = 3) -> Cell:
    """{"value", "low", "high", "reason"} as a cell; a missing value or interval is footnoted with its
    reason."""
    if entry["value"] is None:
        return Cell(DASH, note=entry.get("reason", "no value"))
    text = number(entry["value"], signed, decimals)
    if entry["low"] is None or entry["high"] is None:
        return Cell(text, note=f"no interval: {entry.get('reason', 'not computed')}")
    low, high = (number(entry[end], signed, decimals) for end in ("low", "high"))
    return Cell(text, f"[{low}, {high}]")


def number(value: float, signed: bool = False, decimals: int = 3) -> str:
    """With a true minus sign."""
    return f"{value:{'+' if signed else ''}.{decimals}f}".replace("-", MINUS)


def size(row: Mapping[str, Any]) -> tuple[str, str]:
    """The test rows of a column, and how many are positive (or of each class)."""
    positives = row["positives"]
    if isinstance(positives, int):
        return f"n = {row['n']}", f"{positives} positive"
    return f"n = {row['n']}", f"by class {', '.join(map(str, positives))}"


def titled(name: str) -> str:
    """The field's name of an evaluation or metric."""
    return TITLES.get(name, name.replace("_", " "))


def spread(entry: Mapping[str, Any]) -> Cell:
    """{"mean", "sd", "n"} as a cell."""
    if entry["mean"] is None:
        return Cell(DASH, note="no value")
    if entry["sd"] is None:
        return Cell(number(entry["mean"]), note="one seed has a value")
    return Cell(number(entry["mean"]), f"± {number(entry['sd'])}")


def words(content: Any) -> str:
    """Nested content in one line."""
    if content is None:
        return DASH
    if isinstance(content, bool):
        return "yes" if content else "no"
    if isinstance(content, Mapping):
        return ", ".join(f"{key} {words(value)}" for key, value in content.items())
    if isinstance(content, list | tuple):
        mark = "; " if any(isinstance(entry, Mapping | list | tuple) for entry in content) else ", "
        return mark.join(map(words, content))
    return str(content)

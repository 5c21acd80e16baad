"""Whose masks are labels: which rows of a table have some, and who of the patients trains and who chooses.

What enters: a table with masks and the settings of a segmentation. What leaves: rows. A patient's images stay
together in label fractions and in folds, and test rows are never among them.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from cfssl.data.labels import silver_name
from cfssl.data.table import ImageTable, texts
from cfssl.errors import UserError, nearest, quoted
from cfssl.evaluate.grouped import labels_of
from cfssl.evaluate.probe import subset_labels
from cfssl.evaluate.settings import SegmentSettings
from cfssl.seeds import derive_seed

READ = 512  # images whose masks are looked at at a time


def labelled_rows(table: ImageTable, settings: SegmentSettings, split: str) -> np.ndarray:
    """The rows of a split whose masks are labels. Raises `UserError` for a column or a value that the table
    does not have."""
    rows, labelled = table.rows(split), settings.labelled
    if labelled == "all":
        return rows
    if labelled == "masked":
        return rows[_has_pixels(table, rows, settings.structures)]
    keep = np.ones(len(rows), dtype=bool)
    for column, accepted in labelled.items():
        if column not in table.frame.columns:
            raise UserError(
                f"labelled asks for column {column!r}, which table {table.name!r} does not have"
                f"{nearest(column, table.frame.columns)}."
            )
        held, values = texts(table.frame[column]), texts(pd.Series(list(accepted), dtype=object))
        strange = values[~values.isin(held.dropna())]
        if len(strange):
            raise UserError(
                f"labelled accepts {quoted(strange)} of column {column!r}, which table {table.name!r} does "
                f"not hold{nearest(strange.iloc[0], held.dropna().unique())}."
            )
        keep &= held.isin(values).to_numpy()[rows]
    return rows[keep]


def _has_pixels(table: ImageTable, rows: np.ndarray, structures: tuple[str, ...]) -> np.ndarray:
    """Whether any of the table's masks has a pixel, (n,). Silver masks, which every image has, say nothing
    about human ones; they count where they are among the `structures`."""
    assert table.masks is not None  # a structure of it is segmented
    counted = [
        place
        for place, name in enumerate(table.mask_names)
        if name in structures or not name.startswith(silver_name(""))
    ]
    chunks = [rows[start : start + READ] for start in range(0, len(rows), READ)]
    found = [table.masks.read(chunk)[:, counted].any((1, 2, 3)) for chunk in chunks]
    return np.concatenate(found) if found else np.zeros(0, dtype=bool)


@dataclass(frozen=True)
class Shares:
    """Rows that train a network and rows that choose its moment, of the label `fraction`, redrawn by `seed`,
    and of one of the folds."""

    train: np.ndarray
    val: np.ndarray
    fraction: float
    seed: int
    fold: int


def shares(settings: SegmentSettings, table: ImageTable, fraction: float, seed: int, fold: int) -> Shares:
    """See `Shares`. Raises `UserError` where no row is left to train on or to choose with."""
    train, val = (labelled_rows(table, settings, split) for split in ("train", "val"))
    if settings.folds > 1:
        train, val = folded(settings, table, np.sort(np.concatenate([train, val])), fold)
    for name, rows in (("training", train), ("validation", val)):
        if not len(rows):
            raise UserError(
                f"{settings.label} has no {name} row of {table.name} with masks; change the splits, "
                "evaluate.folds or evaluate.labelled."
            )
    names, person = np.unique(patients_of(table, train), return_inverse=True)
    strata = None
    if settings.by:  # of a patient with several images that of the first
        first = np.unique(person, return_index=True)[1]
        strata = labels_of(table.frame.iloc[train[first]], settings.by[0])
    kept = subset_labels(np.zeros(len(names), np.int64), strata, fraction, seed)
    return Shares(train[np.isin(person, kept)], val, fraction, seed, fold)


def folded(
    settings: SegmentSettings, table: ImageTable, rows: np.ndarray, fold: int
) -> tuple[np.ndarray, np.ndarray]:
    """`rows` without and with those of the patients of one fold, whose groups (the first of `by`) are spread
    over the folds alike. Raises `UserError` for fewer patients than folds."""
    from sklearn.model_selection import StratifiedGroupKFold

    people = patients_of(table, rows)
    if (count := len(np.unique(people))) < settings.folds:
        raise UserError(
            f"{settings.label} divides {count} patients of {table.name} into {settings.folds} folds; lower "
            "evaluate.folds."
        )
    groups = np.zeros(len(rows), np.int64)
    if settings.by:
        groups = pd.factorize(labels_of(table.frame.iloc[rows], settings.by[0]), use_na_sentinel=False)[0]
    state = derive_seed(settings.train.seed, "folds") % 2**32
    division = StratifiedGroupKFold(settings.folds, shuffle=True, random_state=state)
    kept, held = list(division.split(rows[:, None], groups, people))[fold]
    return rows[kept], rows[held]


def patients_of(table: ImageTable, rows: np.ndarray) -> np.ndarray:
    """Who is in each row, (n,); a row without a group is somebody of its own."""
    if table.group is None:
        return rows
    return texts(table.frame[table.group].iloc[rows]).to_numpy()

"""Who may learn from which row: train, val and test, such that nothing known about a test image was seen in
training.

Enter: the frame, the group column and a number per row that is equal for identical pixels. Leave: one split
name per row. Rows of one group (a patient) and rows with identical pixels always share a split.

Own splits are drawn greedily, largest groups first: each group goes where the chi-square distance between
the counts so far and the wanted counts falls most, over the total, each stratifying attribute and their
combinations, each of these divided by its number of strata so that a row weighs alike in all. For single
rows this is Sainte-Laguë apportionment (place the next where (have + 1/2) / wanted is smallest), so the
total is met to a row, and strata to a few.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import pandas as pd
from pydantic.dataclasses import dataclass
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from cfssl.data.table import SPLITS, Attribute, texts
from cfssl.errors import UserError, listed, nearest, quoted
from cfssl.seeds import numpy_generator
from cfssl.settings import STRICT

DEFAULT_FRACTIONS = (0.7, 0.15, 0.15)
SPELLINGS = {"training": "train", "valid": "val", "validation": "val", "testing": "test"} | {
    name: name for name in SPLITS
}


@dataclass(frozen=True, config=STRICT)
class SplitSettings:
    """How rows are divided.

    column: a given split (values train, val, test, in the usual spellings). Without `column` and `fractions`
        a column called `split` is taken as given where there is one; otherwise the table draws its own
        splits.
    fractions: shares of train, val and test for own splits; they sum to 1, and a share of 0 leaves that
        split out.
    stratify: attributes whose values should be spread alike over the splits; continuous ones by quartile.
    duplicates: what to do when a given split has identical images on both sides: `refuse`, or `drop` the
        copies in the split that is trained on (train before val before test), which leaves the held-out sets
        as published.
    may_be_empty: given splits that need no row.
    """

    column: str | None = None
    fractions: tuple[float, float, float] | None = None
    stratify: tuple[str, ...] = ()
    seed: int = 0
    duplicates: Literal["refuse", "drop"] = "refuse"
    may_be_empty: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.column is not None and self.fractions is not None:
            raise UserError(
                f"`split` names a column ({self.column!r}) and fractions; keep the column or draw own "
                "splits, not both."
            )
        if self.fractions is not None and (
            not all(0 <= share <= 1 for share in self.fractions) or abs(sum(self.fractions) - 1) > 1e-6
        ):
            raise UserError(
                f"`split.fractions` is {self.fractions}; give three shares (train, val, test) that sum to 1."
            )
        strange = [name for name in self.may_be_empty if name not in SPLITS]
        if strange:
            raise UserError(
                f"`split.may_be_empty` names {strange[0]!r}, which is no split{nearest(strange[0], SPLITS)}."
            )

    def given_column(self, columns: Sequence[str]) -> str | None:
        """The column of `columns` that holds given splits, None where own splits are drawn."""
        if self.column is not None and self.column not in columns:
            raise UserError(f"The table has no split column {self.column!r}{nearest(self.column, columns)}.")
        given = self.column or ("split" if self.fractions is None and "split" in columns else None)
        drawn = [f"`split.{name}`" for name in ("stratify", "seed") if getattr(self, name)]
        if given is not None and drawn:
            raise UserError(
                f"{' and '.join(drawn)} is for own splits, and the splits are given by column {given!r}; "
                "remove it, or draw own splits with `split.fractions`."
            )
        if given is None and (self.duplicates != "refuse" or self.may_be_empty):
            raise UserError(
                "`split.duplicates` and `split.may_be_empty` are for splits given by a column, and this "
                "table draws its own; remove them, or name the column in `split.column`."
            )
        return given


def assign_splits(
    frame: pd.DataFrame,
    attributes: Mapping[str, Attribute],
    group: str | None,
    content: np.ndarray,
    settings: SplitSettings,
) -> tuple[np.ndarray, np.ndarray]:
    """Splits (N,) of str, and which rows (N,) bool to keep; False only under `duplicates="drop"`.

    content: (N,) integers, equal where the pixels are identical. Raises `UserError` when a group or
    identical images stand in two given splits, or a split is empty.
    """
    given = settings.given_column(list(frame.columns))
    groups = _groups(frame, group)
    if given is None:
        count = len(frame)
        shares = settings.fractions or DEFAULT_FRACTIONS
        units = _joined(np.arange(count) if groups is None else pd.factorize(groups)[0], content)
        splits = draw_splits(units, _strata(frame, attributes, settings.stratify), settings)
        keep = np.ones(count, dtype=bool)
        optional = [name for name, share in zip(SPLITS, shares, strict=True) if not share]
        origin = f"{count} images in {len(np.unique(units))} groups leave"
        advice = "add images, or change `split.fractions` (0 leaves a split out)"
    else:
        splits = _given(frame[given], given)
        keep = _check_given(splits, frame.index, group, groups, content, settings)
        optional = list(settings.may_be_empty)
        origin = f"column {given!r} names"
        advice = "add images, or list it under `split.may_be_empty`"
    empty = [name for name in SPLITS if name not in optional and not (splits[keep] == name).any()]
    if empty:
        raise UserError(
            f"The split {' and '.join(map(repr, empty))} is empty: {origin} no image for it; {advice}."
        )
    return splits, keep


def draw_splits(units: np.ndarray, strata: np.ndarray, settings: SplitSettings) -> np.ndarray:
    """Own splits (N,) for rows whose `units` (N,) int may not be parted, spreading each column of `strata`
    (N, S) int alike.
    """
    rank = numpy_generator(settings.seed, "splits").permutation(len(units))  # order among groups of one size
    frame = pd.DataFrame({"unit": units, "rank": rank})
    members = (
        frame.groupby("unit")["rank"]
        .agg(["size", "min"])
        .sort_values(["size", "min"], ascending=[False, True])
    )
    position = pd.Series(np.arange(len(members)), index=members.index)[units].to_numpy()

    # contents[p]: how many rows of the p-th unit fall into each stratum, the first being "any row"
    labels = [np.zeros(len(units), dtype=np.int64), *strata.T]
    if strata.shape[1] > 1:
        labels.append(pd.DataFrame(strata).groupby(list(range(strata.shape[1]))).ngroup().to_numpy())
    shifted, offset = [], 0
    weights: list[float] = []  # without them many small strata, all rounded alike, would outvote the total
    for label in labels:
        shifted.append(label + offset)
        levels = int(label.max(initial=0)) + 1
        weights += [1 / levels] * levels
        offset += levels
    shares = {
        name: share
        for name, share in zip(SPLITS, settings.fractions or DEFAULT_FRACTIONS, strict=True)
        if share
    }
    totals = np.bincount(np.concatenate(shifted), minlength=offset)
    wanted = [(totals * share).tolist() for share in shares.values()]
    have = [[0.0] * offset for _ in shares]
    contents: list[dict[int, int]] = [{} for _ in range(len(members))]
    for row, place in enumerate(position.tolist()):
        for label in shifted:
            contents[place][int(label[row])] = contents[place].get(int(label[row]), 0) + 1

    chosen = []
    for content in contents:
        changes = [
            sum(
                weights[s] * count * (2 * (have_k[s] - want_k[s]) + count) / want_k[s]
                for s, count in content.items()
            )
            for have_k, want_k in zip(have, wanted, strict=True)
        ]
        best = int(np.argmin(changes))
        chosen.append(best)
        for stratum, count in content.items():
            have[best][stratum] += count
    return np.array(list(shares))[np.array(chosen)][position]


def _groups(frame: pd.DataFrame, group: str | None) -> pd.Series | None:
    if group is None:
        return None
    if group not in frame.columns:
        raise UserError(f"The table has no group column {group!r}{nearest(group, frame.columns)}.")
    values = texts(frame[group])
    if values.isna().any():
        raise UserError(
            f"The group column {group!r} is empty in {listed(values.index[values.isna()])}, so these images "
            f"cannot be kept out of other splits; fill it in or filter with `where: {{{group}: present}}`."
        )
    return values


def _joined(groups: np.ndarray, content: np.ndarray) -> np.ndarray:
    """Units (N,): rows connected by a common group or identical pixels, directly or through other rows."""
    count = int(groups.max(initial=-1)) + 1
    size = count + int(content.max(initial=-1)) + 1
    links = coo_array((np.ones(len(groups), dtype=bool), (groups, content + count)), shape=(size, size))
    return connected_components(links, directed=False)[1][groups]


def _strata(frame: pd.DataFrame, attributes: Mapping[str, Attribute], names: Sequence[str]) -> np.ndarray:
    columns = [np.zeros((len(frame), 0), dtype=np.int64)]
    for name in names:
        if name not in attributes:
            raise UserError(
                f"`split.stratify` names {name!r}, which is no attribute of the "
                f"table{nearest(name, attributes)}."
            )
        column = frame[name]
        if attributes[name].kind == "continuous":
            column = pd.qcut(column.astype(float), 4, labels=False, duplicates="drop")
        codes, _ = pd.factorize(column, use_na_sentinel=False)  # missing is a stratum of its own
        columns.append(codes[:, None])
    return np.concatenate(columns, axis=1)


def _given(column: pd.Series, name: str) -> np.ndarray:
    splits = texts(column).str.lower().map(SPELLINGS)
    if splits.isna().any():
        bad = column[splits.isna()]
        raise UserError(
            f"The split column {name!r} holds {quoted(bad.unique())} in {listed(bad.index)}; expected "
            f"{', '.join(SPLITS)} in every row."
        )
    return splits.to_numpy(dtype="U5")


def _check_given(
    splits: np.ndarray,
    index: pd.Index,
    group: str | None,
    groups: pd.Series | None,
    content: np.ndarray,
    settings: SplitSettings,
) -> np.ndarray:
    """Which rows to keep. Raises `UserError` where something stands in two splits; `index` names the rows."""
    if groups is not None:
        per_group = pd.Series(splits).groupby(groups.to_numpy()).nunique()
        crossing = list(per_group.index[per_group > 1])
        if crossing:
            raise UserError(
                f"{len(crossing)} values of the group column {group!r} stand in more than one split (first: "
                f"{quoted(crossing[:3])}); correct the split column or let the table draw its own splits by "
                "giving `split.fractions`."
            )
    order = pd.Series(splits).map({name: place for place, name in enumerate(SPLITS)})
    last = order.groupby(content).transform("max").to_numpy()
    keep = order.to_numpy() == last  # of identical images the held-out ones stay
    if not keep.all() and settings.duplicates == "refuse":
        shown = []
        for place in np.flatnonzero(~keep)[:3]:
            copy = np.flatnonzero((content == content[place]) & keep)[0]
            shown.append(f"row {index[place]} in {splits[place]} is row {index[copy]} in {splits[copy]}")
        raise UserError(
            f"Identical images stand in different given splits, in {listed(index[~keep])} "
            f"({'; '.join(shown)}); "
            "correct the split column, set `split.duplicates: drop` to leave out the copies that are "
            "trained on, "
            "or draw own splits with `split.fractions`."
        )
    return keep

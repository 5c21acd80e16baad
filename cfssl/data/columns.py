"""From the raw cells of a table to typed attributes.

Enter: a CSV or Parquet file, and what the user declares of its columns. Leave: columns of numbers or text,
and `Attribute`s.

Empty cells (and NaN) are missing; other tokens ("unknown") only where `missing` lists them. In a column whose
categories are inferred, a text that usually means missing is refused: it would become a category. A column
of text becomes numbers only if every present cell is a number without leading zeros.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
from pydantic.dataclasses import dataclass

from cfssl.data.table import Attribute, Kind, encode_column, texts
from cfssl.errors import UserError, nearest, quoted
from cfssl.settings import STRICT

CONTINUOUS_FROM = 11  # numeric columns with fewer different whole numbers are grades, not measurements
CATEGORIES_UP_TO = 20  # text columns with more different values are free text
USUALLY_MISSING = ("nan", "na", "n/a", "null", "none", "?", "unknown")
MISSING, SPACES, INFINITE = (
    "texts that usually mean a missing value",
    "values that differ only by spaces around them",
    "numbers that are not finite",
)
DOUBTS = {
    MISSING: "name them in `missing`, or declare the attribute's `categories` if they are values",
    SPACES: "correct them, or declare the attribute's `categories`",
    INFINITE: "correct them, or name them in `missing`",
}

Where = Mapping[str, Sequence[Any] | Literal["present"]]


@dataclass(frozen=True, config=STRICT)
class AttributeSpec:
    """What the user says of an attribute; what is left out is inferred.

    column: the column it is read from, if not the one of its own name.
    positive: values of that column which make a binary attribute positive; all other present values make it
        negative. `categories` then names (negative, positive), ("no", "yes") if not given.
    """

    kind: Kind | None = None
    categories: tuple[str, ...] = ()
    positive: tuple[str, ...] = ()
    column: str | None = None


def read_columns(path: Path, missing: Sequence[str] = ()) -> pd.DataFrame:
    """A CSV or Parquet file as a frame of natural values. Raises `UserError` where it is broken."""
    try:
        if path.suffix.lower() == ".parquet":
            raw = pd.read_parquet(path)
        else:
            options: dict[str, Any] = {"dtype": str, "keep_default_na": False, "encoding": "utf-8-sig"}
            header = pd.read_csv(path, header=None, nrows=1, **options).iloc[0]
            if header.duplicated().any():
                raise UserError(
                    f"{path} has two columns called {header[header.duplicated()].iloc[0]!r}; rename one."
                )
            raw = pd.read_csv(path, na_values=[""], **options)
            if not isinstance(raw.index, pd.RangeIndex):  # pandas takes surplus cells for row names
                raise UserError(
                    f"{path} has rows with more cells than the header has names; name every column."
                )
    except (OSError, ValueError) as error:  # pandas' and pyarrow's own errors derive from ValueError
        raise UserError(
            f"{path} is not a readable table ({' '.join(str(error).split())[:200]}); check the file."
        ) from None
    if raw.empty:
        raise UserError(f"{path} has no rows; expected one per image.")
    return pd.DataFrame(
        {str(name): natural(raw[name], missing) for name in raw.columns}, index=pd.RangeIndex(len(raw))
    )


def natural(column: pd.Series, missing: Sequence[str] = ()) -> pd.Series:
    """A raw column as float64 or text; empty cells, the tokens in `missing` and, among numbers, NaN are
    missing."""
    if column.dtype.kind in "iuf" and not (column.dtype.kind in "iu" and column.abs().max() > 2**53):
        values = pd.Series(column.to_numpy(np.float64, na_value=np.nan), index=column.index)
        return values.mask(texts(column).isin(list(missing)))
    text = texts(column)
    text = text.mask(text.isin(["", *missing]))
    present = text.dropna()
    numbers = _numbers(present[present.str.strip().str.lower() != "nan"])
    return text if numbers is None else numbers.reindex(text.index)


def _numbers(values: pd.Series) -> pd.Series | None:
    """Texts as numbers (which may be infinite), None where not all are numbers, or where they are written or
    so large that they would not come back."""
    numbers = pd.to_numeric(values, errors="coerce").astype(np.float64)
    written = values.str.match(r"[+-]?0\d").any()
    large = numbers.abs().between(2**53, np.inf, inclusive="neither").any()
    return numbers if len(values) and numbers.notna().all() and not written and not large else None


class Selected(NamedTuple):
    """The remaining rows (index kept), the attributes, and why other columns are none."""

    frame: pd.DataFrame
    attributes: dict[str, Attribute]
    left_out: dict[str, str]


def select(
    frame: pd.DataFrame,
    path: Path,
    specs: Mapping[str, AttributeSpec],
    where: Where,
    group: str | None = None,
    ignore: Mapping[str, str | None] | None = None,
) -> Selected:
    """Derived columns, then `where`, then types.

    path: names the table in messages. ignore: columns that are not taken for attributes unless declared, and
    why (None for those which have another role). Raises one `UserError` for all inferred columns in doubt.
    """
    passed_over = {**(ignore or {}), "split": None, **({group: None} if group else {})}
    derived = {}
    for name, spec in specs.items():
        column = spec.column or name
        require(frame, column, path, f"column for attribute {name!r}")
        if name == "split" or (spec.column not in (None, name) and name in frame.columns):
            raise UserError(
                f"Attribute {name!r} has the name of another column of {path}; choose another name."
            )
        derived[name] = positives(name, spec, frame[column]) if spec.positive else frame[column]
        if spec.column and not spec.positive:
            passed_over[spec.column] = None  # renamed
    frame = _filtered(frame.assign(**derived), path, where)
    if group is not None:
        require(frame, group, path, "group column")
        frame[group] = texts(frame[group])
    attributes: dict[str, Attribute] = {}
    left_out: dict[str, str] = {}
    doubts: dict[str, list[str]] = {}
    for name in [*specs, *(column for column in frame.columns if column not in {*specs, *passed_over})]:
        for what, found in doubtful(frame[name], specs.get(name)).items():
            doubts.setdefault(what, []).append(f"{name!r} ({quoted(found)})")
        if doubts:
            continue
        if name not in specs and (why := no_attribute(frame[name])):
            left_out[name] = why
        else:
            attributes[name] = resolve_attribute(name, frame[name], specs.get(name))
    if doubts:
        raise UserError(
            " ".join(
                f"Columns of {path} hold {what}: {', '.join(found)}; {DOUBTS[what]}."
                for what, found in doubts.items()
            )
        )
    left_out |= {name: why for name, why in passed_over.items() if why and name not in specs}
    return Selected(typed(frame, attributes), attributes, left_out)


def doubtful(column: pd.Series, spec: AttributeSpec | None = None) -> dict[str, list[str]]:
    """What needs the user's word before a column becomes an attribute: a key of `DOUBTS` -> the values found.
    Declared categories are taken as they are, and a declared continuous attribute is checked later."""
    if spec is not None and (spec.categories or spec.positive or spec.kind == "continuous"):
        return {}
    present = column.dropna()
    if present.dtype.kind == "f":
        found = {INFINITE: texts(present[np.isinf(present)]).unique().tolist()}
    else:
        values = pd.Series(present.unique(), dtype="str")
        bare = values.str.strip()
        tokens = bare.str.lower().isin(USUALLY_MISSING)
        if (spec is None or spec.kind is None) and no_attribute(column) and _numbers(bare[~tokens]) is None:
            return {}  # free text, in which any word may stand
        twins = bare.duplicated(keep=False) & ~tokens
        found = {MISSING: values[tokens].tolist(), SPACES: values[twins].tolist()}
    return {what: values for what, values in found.items() if values}


def _filtered(frame: pd.DataFrame, path: Path, where: Where) -> pd.DataFrame:
    keep = np.ones(len(frame), dtype=bool)
    for column, accepted in where.items():
        require(frame, column, path, "column for `where`")
        if isinstance(accepted, str):
            if accepted != "present":
                raise UserError(
                    f"`where.{column}` is {accepted!r}; give a list of accepted values, or the word present."
                )
            keep &= frame[column].notna().to_numpy()
            continue
        held = texts(frame[column])
        values = texts(pd.Series(list(accepted), dtype=object))
        strange = values[~values.isin(held.dropna())]
        if len(strange):
            known = held.dropna().unique()
            raise UserError(
                f"`where.{column}` accepts what {path} does not hold: "
                f"{'; '.join(f'{value!r}{nearest(value, known)}' for value in strange)}."
            )
        keep &= held.isin(values).to_numpy()
    if not keep.any():
        raise UserError(f"The filters `where` ({quoted(where)}) together leave no row of {path}; relax them.")
    return frame[keep].copy()


def require(frame: pd.DataFrame, column: str, path: Path, what: str) -> None:
    """Raises `UserError` where the frame has no such column."""
    if column not in frame.columns:
        raise UserError(f"{path} has no {what} {column!r}{nearest(column, frame.columns)}.")


def positives(name: str, spec: AttributeSpec, column: pd.Series) -> pd.Series:
    """A binary column derived from the values of another one; missing stays missing."""
    values = texts(column)
    for positive in spec.positive:
        if not (values == str(positive)).any():
            raise UserError(
                f"`positive` of attribute {name!r} names {positive!r}, which its column never "
                f"holds{nearest(positive, values.dropna().unique())}."
            )
    if spec.kind not in (None, "binary"):
        raise UserError(f"Attribute {name!r} has `positive` and is declared {spec.kind}; declare it binary.")
    names = tuple(map(str, spec.categories)) or ("no", "yes")
    if len(names) != 2:
        raise UserError(f"Attribute {name!r} has `positive` and categories {quoted(names)}; give two names.")
    wanted = set(map(str, spec.positive))
    return values.map(lambda value: names[value in wanted], na_action="ignore").astype("str")


def resolve_attribute(name: str, column: pd.Series, spec: AttributeSpec | None = None) -> Attribute:
    """Kind and categories as declared, the rest inferred; `declared` is True when the user gave the kind.

    Inferred: two values make a binary attribute; numbers with fractions or more than ten values a continuous
    one; up to ten whole numbers or 20 texts a categorical one. Raises `UserError` where an attribute cannot
    be resolved.
    """
    spec = spec or AttributeSpec()
    kind = spec.kind or ("binary" if spec.positive else None)
    declared = kind is not None
    if not column.notna().any():
        raise UserError(
            f"Attribute {name!r} has no value in any row; check its column, `missing` and `where`."
        )
    if kind is None:
        kind, why = infer_kind(column), no_attribute(column)
        if why is not None:
            raise UserError(f"Attribute {name!r} is {why}; declare its `kind`.")
    if kind == "continuous":
        return Attribute(name, kind, spec.categories, declared)
    categories = tuple(map(str, spec.categories)) or (("no", "yes") if spec.positive else ())
    if not categories:
        present = column.dropna().drop_duplicates().sort_values()  # numbers by value, text by letter
        categories = tuple(texts(present))
    return Attribute(name, kind, categories, declared)


def typed(frame: pd.DataFrame, attributes: Mapping[str, Attribute]) -> pd.DataFrame:
    """The frame with its attributes as float64 or text.

    Raises `UserError` for values that do not fit them.
    """
    columns = {}
    for name, attribute in attributes.items():
        encode_column(frame[name], attribute)
        numeric = attribute.kind == "continuous"
        columns[name] = frame[name].astype(np.float64) if numeric else texts(frame[name])
    return frame.assign(**columns)


def infer_kind(column: pd.Series) -> Kind:
    """The kind of an undeclared column that is an attribute. See `resolve_attribute`."""
    present = column.dropna()
    different = present.nunique()
    if different == 2:
        return "binary"
    if present.dtype.kind == "f" and (different >= CONTINUOUS_FROM or (present % 1 != 0).any()):
        return "continuous"
    return "categorical"


def no_attribute(column: pd.Series) -> str | None:
    """Why an undeclared column is no attribute, None where it is one."""
    present = column.dropna()
    different = present.nunique()
    if different < 2:
        return "the same in all rows" if different else "empty"
    if present.dtype.kind == "f":
        whole = bool((present % 1 == 0).all())
        identifiers = whole and different == len(present) >= CONTINUOUS_FROM
        return "a whole number that differs in every row, like an identifier" if identifiers else None
    if different > CATEGORIES_UP_TO:
        return f"text of {different} different values"
    return "text that differs in most rows" if different > len(present) / 2 else None

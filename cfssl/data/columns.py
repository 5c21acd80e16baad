"""From the raw cells of a table to typed attributes.

Enter: a CSV or Parquet file, and what the user declares of its columns. Leave: columns of numbers or text,
and `Attribute`s.

Empty cells (and NaN) are missing; other tokens ("unknown") only where `missing` lists them. A column of text
becomes numbers only if every present cell is a finite number without leading zeros.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from pydantic.dataclasses import dataclass

from cfssl.data.table import Attribute, Kind, encode_column, texts
from cfssl.errors import UserError, nearest, quoted
from cfssl.settings import STRICT

CONTINUOUS_FROM = 11  # numeric columns with fewer different whole numbers are grades, not measurements
CATEGORIES_UP_TO = 20  # text columns with more different values are free text


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
    """A raw column as float64 or text; empty cells and the tokens in `missing` become NaN."""
    if column.dtype.kind in "iuf" and not (column.dtype.kind in "iu" and column.abs().max() > 2**53):
        numbers = pd.Series(column.to_numpy(np.float64, na_value=np.nan), index=column.index)
        return numbers.mask(texts(column).isin(list(missing)))
    text = texts(column)
    text = text.mask(text.isin(["", *missing]))
    present = text.dropna()
    numbers = pd.to_numeric(present, errors="coerce").astype(np.float64)
    if (
        len(present)
        and np.isfinite(numbers).all()
        and not present.str.match(r"[+-]?0\d").any()
        and numbers.abs().max() <= 2**53
    ):
        return numbers.reindex(text.index)
    return text


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


def resolve_attribute(name: str, column: pd.Series, spec: AttributeSpec | None = None) -> Attribute | None:
    """Kind and categories as declared, the rest inferred; None for an undeclared column that is no attribute.

    `declared` is True when the user gave the kind. Inferred: two values make a binary attribute; numbers
    with fractions or more than ten values a continuous one; up to ten whole numbers or 20 texts a
    categorical one. No attributes: constants, text that differs in more than half of the rows, and whole
    numbers that all differ (identifiers). Raises `UserError` where a declared attribute cannot be resolved.
    """
    kind = (spec and (spec.kind or ("binary" if spec.positive else None))) or None
    declared = kind is not None
    kind = kind or infer_kind(column)
    if kind is None:
        if spec is None:
            return None
        raise UserError(
            f"Attribute {name!r} has values that look like identifiers, free text or a constant; declare "
            "its `kind`."
        )
    if kind == "continuous":
        return Attribute(name, kind, spec.categories if spec else (), declared)
    categories = tuple(map(str, spec.categories)) if spec else ()
    if not categories and spec and spec.positive:
        categories = ("no", "yes")
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


def infer_kind(column: pd.Series) -> Kind | None:
    """The kind of an undeclared column, None where it is no attribute. See `resolve_attribute`."""
    present = column.dropna()
    different = present.nunique()
    if different < 2:
        return None
    if present.dtype.kind == "f":
        whole = bool((present % 1 == 0).all())
        if whole and different == len(present) >= CONTINUOUS_FROM:
            return None
        if different > 2 and (different >= CONTINUOUS_FROM or not whole):
            return "continuous"
    elif different > CATEGORIES_UP_TO or different > len(present) / 2:
        return None
    return "binary" if different == 2 else "categorical"

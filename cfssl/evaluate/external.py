"""External sets: whether one may be called so, which it may not be when the encoder or a choice has seen it.

Enter: the table of the pre-training and an external one. Leaves: a record of what was compared, or a refusal.

Published code drew the test patients of its held-out scanner first and its training patients from all of
them afterwards, so that most of the test patients were trained on (specification, section 7c).
"""

import hashlib
from typing import Any

import numpy as np

from cfssl.data.table import ImageTable, texts
from cfssl.errors import UserError, listed, quoted

READ = 512  # images at a time
SEEN = ("train", "val")


def compared(table: ImageTable, external: ImageTable, name: str, has_same_ids: bool) -> dict[str, Any]:
    """{"images", "ids": how many of both tables were compared, and what was found}. Raises `UserError` where
    an image of `external` is, pixel for pixel, one of the train or val split of `table`, and where one of its
    groups has an image there.

    `has_same_ids`: whether an id of the tables' group columns means the same patient in both. Where it does
    not, patients of two hospitals may well be called alike; then ids in both are counted, not refused. Images
    are compared as they are stored: prepared in another size or depth, the same picture is not recognised.
    """
    for of in (table, external):
        refuse_crossing(of)
    seen = np.concatenate([table.rows(split) for split in SEEN])
    known = set(digests(table, seen))
    everything = np.arange(len(external))
    twins = [
        row for row, digest in zip(everything, digests(external, everything), strict=True) if digest in known
    ]
    if twins:
        raise UserError(
            f"The external set {name} ({external.name}) holds {len(twins)} images that are also in the train "
            f"or val split of {table.name}, in {listed(twins)}; an external set must be new to the encoder, "
            "so leave them out of one of the tables."
        )
    record: dict[str, Any] = {"images": {"of": [len(seen), len(external)], "in_both": 0}, "ids": None}
    if table.group is not None and table.group == external.group:
        ids = [
            set(texts(of.frame[of.group].iloc[rows])) for of, rows in ((table, seen), (external, everything))
        ]
        common = sorted(ids[0] & ids[1])
        if common and has_same_ids:
            raise UserError(
                f"The external set {name} ({external.name}) shares {len(common)} values of the group column "
                f"{table.group!r} with the train or val split of {table.name} ({quoted(common[:3])}"
                f"{', ...' if len(common) > 3 else ''}), and both are made from the same source, so that "
                "these are the same patients; leave them out of one of the tables."
            )
        record["ids"] = {
            "column": table.group,
            "of": [len(found) for found in ids],
            "in_both": len(common),
            "mean_the_same": has_same_ids,
        }
    return record


def refuse_crossing(table: ImageTable) -> None:
    """Raises `UserError` where a group of the table has images in two splits."""
    if table.group is None:
        return
    frame = table.frame
    splits = frame.groupby(table.group, observed=True)["split"].nunique()
    if crossing := [str(name) for name in splits.index[splits > 1]]:
        raise UserError(
            f"{len(crossing)} values of the group column {table.group!r} of {table.name} have images in more "
            f"than one split ({quoted(crossing[:3])}); split whole groups."
        )


def digests(table: ImageTable, rows: np.ndarray) -> list[bytes]:
    """Of the stored pixels of each row, their shape and their type."""
    kind, found = f"{table.images.shape} {table.images.dtype}".encode(), []
    for start in range(0, len(rows), READ):
        for image in table.images.read(rows[start : start + READ]):
            digest = hashlib.blake2b(kind, digest_size=16)
            digest.update(np.ascontiguousarray(image).data)
            found.append(digest.digest())
    return found

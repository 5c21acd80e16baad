"""From a table and a generator to a bank: abduct every image once, act, and predict each intervened view.

Enters: a table, some of its rows, a generator (or none: real images only) and a list of do()s. Leaves: a bank
folder. The bytes of a shard are a function of the plan alone. Images go through the generator in batches that
are cut from the shard's own items, attributes are abducted with random numbers seeded per (seed, row, do),
and real and counterfactual images share size, depth and rounding, so that nothing but the intervention tells
them apart.
"""

import hashlib
import itertools
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from cfssl.bank.shards import Plan, View, begin, complete_shard, finish, view_checksum, write_shard
from cfssl.data.pixels import to_signed, to_stored
from cfssl.data.table import Attribute, Attributes, ImageTable
from cfssl.errors import UserError
from cfssl.generators.base import Exogenous, Generator, intervention
from cfssl.scm.graph import CausalGraph
from cfssl.seeds import derive_seed, torch_generator

Values = str | float | Sequence[str | float]  # "all", one value, or a list of them
SHARDS = 1024  # about how many files a large bank has
SHARD_MEGABYTES = (64, 1024)

Interventions = Mapping[str, Values] | Sequence[Mapping[str, Values]]


def plan_views(
    do: Interventions, graph: CausalGraph | None, attributes: Mapping[str, Attribute]
) -> list[View]:
    """The do()s that an intervention plan asks for, each once, in order.

    `{"scanner": "all", "sex": ["F"]}` intervenes on one variable at a time. A list holds joint interventions:
    each of its mappings gives all combinations of its values, `[{"scanner": ["A", "B"], "sex": "all"}]`.
    Raises `UserError` for names and values the table or the graph does not know, and for interventions that
    cannot reach the image.
    """
    combined = [{name: values} for name, values in do.items()] if isinstance(do, Mapping) else list(do)
    views: list[View] = []
    for joint in combined:
        _refuse_without_effect(joint, graph, attributes)
        choices = [_values(name, values, attributes[name]) for name, values in joint.items()]
        views += [dict(zip(joint, chosen, strict=True)) for chosen in itertools.product(*choices)]
    for view in views:
        intervention(view, attributes, 1)  # refuses values that the attribute cannot take
    return [view for place, view in enumerate(views) if view not in views[:place]]


def plan_bank(
    table: ImageTable,
    rows: np.ndarray,
    generator: Generator | None,
    views: Sequence[View],
    seed: int = 0,
    batch: int = 64,
    megabytes: float | None = None,
    rows_per_shard: int | None = None,
    device: torch.device | str = "cpu",
) -> Plan:
    """The plan of a bank, which says how many shards it has. `megabytes` (2^20 bytes) bounds the size of a
    shard unless `rows_per_shard` is given; without either it grows with the bank, see `shard_megabytes`. A
    shard holds at least one item. Raises `UserError` for rows or depths it cannot store."""
    rows = np.asarray(rows, dtype=np.int64)
    if len(rows) == 0 or rows.min() < 0 or rows.max() >= len(table) or len(np.unique(rows)) < len(rows):
        raise UserError(
            f"A bank takes rows 0 to {len(table) - 1} of its table, each once, and at least one; found "
            f"{len(rows)} rows, {len(np.unique(rows))} of them different; check which rows are selected."
        )
    dtype = np.dtype(table.images.dtype)
    if dtype not in (np.uint8, np.uint16):
        raise UserError(
            f"The images of {table.name} are {dtype}, expected uint8 or uint16; prepare the table again."
        )
    if views and generator is None:
        raise UserError(
            f"The bank asks for {len(views)} counterfactuals per image and has no generator; give it one."
        )
    item_bytes = (1 + len(views)) * math.prod(table.images.shape) * dtype.itemsize
    megabytes = shard_megabytes(len(rows) * item_bytes) if megabytes is None else megabytes
    fitting = max(1, int(megabytes * 2**20) // item_bytes)
    return Plan(
        dtype=dtype.name,
        shape=tuple(int(side) for side in table.images.shape),
        rows=len(rows),
        rows_fingerprint=hashlib.blake2b(rows.tobytes(), digest_size=8).hexdigest(),
        rows_per_shard=rows_per_shard or fitting,
        batch=batch,
        views=tuple(dict(view) for view in views),
        table=table.fingerprint,
        generator=None if generator is None else generator.fingerprint,
        graph=None if generator is None else generator.graph.to_json(),
        seed=seed,
        device=None if generator is None else torch.device(device).type,
    )


def shard_megabytes(total: int) -> float:
    """How large a shard of a bank of `total` bytes is, in units of 2^20: 64, then as much as keeps their
    number at 1,024, but no more than fits into memory while it is made."""
    return min(max(SHARD_MEGABYTES[0], total / 2**20 / SHARDS), SHARD_MEGABYTES[1])


def build(
    path: Path | str,
    table: ImageTable,
    rows: np.ndarray,
    generator: Generator | None = None,
    views: Sequence[View] = (),
    seed: int = 0,
    *,
    batch: int = 64,
    megabytes: float | None = None,
    rows_per_shard: int | None = None,
    device: torch.device | str = "cpu",
    shards: Iterable[int] | None = None,
    check: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Builds a bank, or goes on with one that was interrupted; whole shards are kept.

    `shards` builds only these, for array jobs (see `cfssl.bank.parts`); then `cfssl.bank.shards.finish` has
    to be called once when all are there. `device`: where the image side of the generator lies. `check`
    compares the pixels of the shards that are there with their checksums, and makes those that `verify` would
    name again; without it their sizes are compared. `progress(done, total)` counts images. Raises `UserError`
    when the folder holds something else, and when the generator returns something that is no image.
    """
    folder, rows = Path(path), np.asarray(rows, dtype=np.int64)
    plan = plan_bank(table, rows, generator, views, seed, batch, megabytes, rows_per_shard, device)
    numbers = list(range(plan.shard_count)) if shards is None else list(shards)
    if numbers and (min(numbers) < 0 or max(numbers) >= plan.shard_count):
        raise UserError(
            f"Shards {min(numbers)} to {max(numbers)} were asked for, expected 0 to {plan.shard_count - 1}; "
            "correct the range."
        )
    begin(folder, plan)
    source = _Source(table, generator, torch.device(device))
    total, done = sum(len(plan.items(number)) for number in numbers), 0
    for number in numbers:
        items = plan.items(number)
        if complete_shard(folder, plan, number, check) is None:
            images, index = _make_shard(plan, items, rows[items.start : items.stop], source)
            write_shard(folder, plan, number, images, index)
        done += len(items)
        if progress is not None:
            progress(done, total)
    if shards is None:
        finish(folder)


class _Source:
    """What the pixels come from."""

    def __init__(self, table: ImageTable, generator: Generator | None, device: torch.device) -> None:
        self.table, self.generator, self.device = table, generator, device
        self._present: dict[str, np.ndarray] = {}  # (len(table),) bool: the attribute has a value

    def known(self, names: Iterable[str], rows: np.ndarray) -> np.ndarray:
        """(n,) bool: all attributes `names` are present in the row."""
        found = np.ones(len(rows), dtype=bool)
        for name in names:
            if name not in self._present:
                self._present[name] = np.zeros(len(self.table), dtype=bool)
                self._present[name][self.table.rows(known=[name])] = True
            found &= self._present[name][rows]
        return found


def _make_shard(plan: Plan, items: range, rows: np.ndarray, source: _Source) -> tuple[np.ndarray, pa.Table]:
    """Pixels (n, 1+K, C, H, W) and index of the items, whose table rows are `rows` (n,)."""
    real = source.table.images.read(rows)
    images = np.repeat(real[:, None], plan.slots, axis=1)
    index = _ShardIndex(plan, items, rows, source)
    if plan.views:
        for start in range(0, len(rows), plan.batch):
            _make_counterfactuals(plan, slice(start, start + plan.batch), rows, images, index, source)
    return images, index.to_table(images)


@torch.no_grad()
def _make_counterfactuals(
    plan: Plan, block: slice, rows: np.ndarray, images: np.ndarray, index: "_ShardIndex", source: _Source
) -> None:
    """Fills slots 1..K of a block of items, where the row has the parents of the image and what the do()
    concerns, and the do() changes something."""
    table, generator, device = source.table, source.generator, source.device
    assert generator is not None  # plan_bank refuses views without a generator
    parents = generator.graph.image_parents
    places = np.arange(len(rows))[block]
    places = places[source.known(parents, rows[places])]
    if len(places) == 0:
        return
    x = to_signed(images[places, 0]).to(device)
    u = generator.abduct(x, _to(table.encode(parents, rows[places]), device))
    for slot, view in enumerate(plan.views, 1):
        names = dict.fromkeys((*parents, *generator.graph.concerned(view)))
        able = np.flatnonzero(source.known(names, rows[places]))
        factual = table.encode(names, rows[places[able]])
        do = intervention(view, table.attributes, len(able))
        changes = torch.stack([value != factual[name] for name, value in do.items()]).any(0)
        chosen = able[changes.numpy()]
        if len(chosen) == 0:
            continue
        where, u_chosen = places[chosen], _take(u, torch.from_numpy(chosen))
        factual, do = _take(factual, changes), _take(do, changes)
        pa_cf, seeds = _act(generator, u_chosen, factual, do, rows[where], view, plan.seed)
        x = generator.predict(u_chosen, _to(pa_cf, device))
        _refuse_no_image(x, (len(where), *plan.shape), rows[where], view)
        images[where, slot] = to_stored(x, images.dtype)
        index.note(where, slot, pa_cf, seeds)


def _act(
    generator: Generator,
    u: Exogenous,
    factual: Attributes,
    do: Attributes,
    rows: np.ndarray,
    view: View,
    seed: int,
) -> tuple[Attributes, list[int]]:
    """pa* of each row with random numbers of its own, so that its neighbours in the batch do not matter; and
    the seeds, -1 where nothing follows from the do()."""
    if generator.graph.affected(do) == set(do):
        return generator.act(u, factual, do, torch_generator(seed)), [-1] * len(rows)
    text = json.dumps(view, sort_keys=True)
    seeds = [derive_seed(seed, "bank", int(row), text) for row in rows]
    streams = [torch.Generator().manual_seed(own) for own in seeds]
    return generator.act(u, factual, do, streams), seeds


class _ShardIndex:
    """The index rows of one shard while it is being made; see `Bank.index`."""

    def __init__(self, plan: Plan, items: range, rows: np.ndarray, source: _Source) -> None:
        self.plan, self.items, self.rows, self.attributes = plan, items, rows, source.table.attributes
        shape = len(rows), plan.slots
        self.available = np.zeros(shape, dtype=bool)
        self.available[:, 0] = True
        self.seeds = np.full(shape, -1, dtype=np.int64)
        self.factual: dict[str, np.ndarray] = {}
        self.counterfactual: dict[str, np.ndarray] = {}
        for name, attribute in self.attributes.items():
            known = np.flatnonzero(source.known([name], rows))
            column = np.full(len(rows), None, dtype=object)
            column[known] = _natural(source.table.encode([name], rows[known])[name], attribute)
            self.factual[name] = np.repeat(column[:, None], plan.slots, axis=1)
            self.counterfactual[name] = self.factual[name].copy()

    def note(self, places: np.ndarray, slot: int, pa_cf: Attributes, seeds: list[int]) -> None:
        """Records that the views of `places` (n,) in a slot were generated."""
        self.available[places, slot] = True
        self.seeds[places, slot] = seeds
        for name, values in pa_cf.items():
            self.counterfactual[name][places, slot] = _natural(values, self.attributes[name])

    def to_table(self, images: np.ndarray) -> pa.Table:
        count, slots = self.available.shape
        columns: dict[str, pa.Array] = {
            "item": pa.array(np.repeat(np.asarray(self.items, dtype=np.int64), slots)),
            "slot": pa.array(np.tile(np.arange(slots, dtype=np.int16), count)),
            "row": pa.array(np.repeat(self.rows, slots)),
            "do": pa.array([None, *map(json.dumps, self.plan.views)] * count, pa.string()),
            "available": pa.array(self.available.ravel()),
            "seed": pa.array(self.seeds.ravel()),
            "checksum": pa.array([view_checksum(view) for item in images for view in item], pa.binary(16)),
        }
        for name, attribute in self.attributes.items():
            kind = pa.float64() if attribute.kind == "continuous" else pa.string()
            columns[f"factual.{name}"] = pa.array(self.factual[name].ravel(), kind)
            columns[f"counterfactual.{name}"] = pa.array(self.counterfactual[name].ravel(), kind)
        return pa.table(columns)


def _natural(values: torch.Tensor, attribute: Attribute) -> np.ndarray:
    """Codes as categories, continuous values as floats: (n,) objects."""
    if attribute.kind == "continuous":
        return values.double().numpy().astype(object)
    return np.array(attribute.categories, dtype=object)[values.numpy()]


def _values(name: str, values: Values, attribute: Attribute) -> list[str | float]:
    if values == "all":
        if attribute.kind == "continuous":
            raise UserError(
                f"do({name}=all) needs categories, but {name} is continuous; list the values to set it to."
            )
        return list(attribute.categories)
    return [values] if isinstance(values, str | float | int) else list(values)


def _refuse_without_effect(
    do: Mapping[str, Any], graph: CausalGraph | None, attributes: Mapping[str, Attribute]
) -> None:
    for name in do:
        if name not in attributes:
            raise UserError(
                f"do() names {name!r}, expected one of {', '.join(sorted(attributes))}; correct bank.do."
            )
    if graph is not None and not graph.affected(do) & set(graph.image_parents):
        raise UserError(
            f"do({', '.join(do)}) cannot change the image, whose parents are "
            f"{', '.join(graph.image_parents)}; intervene on one of these or on their causes."
        )


def _refuse_no_image(x: torch.Tensor, expected: tuple[int, ...], rows: np.ndarray, view: View) -> None:
    if tuple(x.shape) != expected:
        raise UserError(
            f"The generator returned {tuple(x.shape)} for do({view}), expected {expected}; real and "
            "counterfactual images must have one size."
        )
    finite = torch.isfinite(x).flatten(1).all(1).cpu().numpy()
    if not finite.all():
        raise UserError(
            f"The generator returned NaN or infinite pixels for do({view}) in table row {rows[~finite][0]}; "
            "it has diverged: fit it again."
        )


def _take(values: Mapping[str, torch.Tensor], places: torch.Tensor) -> dict[str, torch.Tensor]:
    return {name: value[places.to(value.device)] for name, value in values.items()}


def _to(values: Attributes, device: torch.device) -> Attributes:
    return {name: value.to(device) for name, value in values.items()}

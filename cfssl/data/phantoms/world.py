"""What all phantoms share: draws, splits, the table they make, and their true counterfactuals.

A world is `images, masks = f(parents, u)`. Its area attributes are no parents: they are measured on the
masks, with region maps that the factual masks gave. `do(area = a)` is answered through the parent that moves
this area (the width of that part of a lung): its value is searched whose masks have the area nearest to `a`,
and the image is rendered with it.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from cfssl.data.regions import AreaSpec, Maps, factual_maps, measure_areas
from cfssl.data.table import SPLITS, Attribute, Attributes
from cfssl.errors import UserError, nearest
from cfssl.seeds import torch_generator

Noise = Mapping[str, Tensor]
"""Exogenous factors `u`, each (n,): scalars, and int64 seeds of the per-pixel fields."""

PIXELS_PER_CHUNK = 2**17  # what one thread renders at a time: temporaries stay in the cache
ROWS_PER_SEARCH = 512  # images whose maps are held while areas are searched
HALVINGS = 10  # of a factor's range, when an area is searched: a step is then below a pixel
SPLIT_SHARES = {"train": 0.6, "val": 0.15, "test": 0.25}


class Factor(NamedTuple):
    """The parent that moves an area, upwards, and the range in which it is searched."""

    parent: str
    low: float
    high: float


class Rendering(Protocol):
    @property
    def images(self) -> NDArray[np.uint8]: ...  # (n, C, H, W)
    @property
    def masks(self) -> NDArray[np.uint8]: ...  # (n, M, H, W) of 0 and 1


class Masked(Protocol):
    def masks(self) -> NDArray[np.uint8]: ...  # (n, M, H, W)


class World(Protocol):
    """`attributes`: the parents of the image, then the areas. `movers`: how an area is set; areas of a later
    mapping disturb those of an earlier one by a few pixels at most."""

    @property
    def name(self) -> str: ...
    @property
    def attributes(self) -> Mapping[str, Attribute]: ...
    @property
    def mask_names(self) -> tuple[str, ...]: ...
    @property
    def areas(self) -> Mapping[str, AreaSpec]: ...
    @property
    def movers(self) -> tuple[Mapping[str, Factor], ...]: ...
    def sample(
        self, count: int, generator: torch.Generator, split: str
    ) -> tuple[Attributes, dict[str, Tensor]]: ...
    def render(self, parents: Attributes, u: Noise) -> Rendering: ...
    def masks(self, parents: Attributes, u: Noise) -> NDArray[np.uint8]:
        """The masks of `render` alone, in less time."""
        ...

    def follow(self, parents: Attributes, u: Noise, do: Iterable[str]) -> Attributes:
        """`parents`, in which `do` is set already, with what follows from it."""
        ...


def truncated_normal(
    count: int, mean: float, spread: float, limits: tuple[float, float], rng: torch.Generator
) -> Tensor:
    """(count,) float32 draws of a normal distribution cut to `limits`, by inverting its distribution."""
    low, high = (math.erf((limit - mean) / spread / math.sqrt(2)) for limit in limits)
    uniform = torch.rand(count, generator=rng, dtype=torch.float64)
    normal = torch.erfinv(low + (high - low) * uniform) * math.sqrt(2)
    return (mean + spread * normal).clamp(*limits).float()


def split_counts(world: str, count: int, splits: Mapping[str, float]) -> dict[str, int]:
    """Images per split. Values that add up to 1 are shares of `count` (train takes the rounding), integers
    are counts. `world` names the phantom in messages."""
    if unknown := sorted(set(splits) - set(SPLITS)):
        raise UserError(
            f"{world} splits name {unknown}; the splits are {', '.join(SPLITS)}, use these names."
        )
    if all(isinstance(value, int) for value in splits.values()) and sum(splits.values()) == count:
        return {name: int(splits.get(name, 0)) for name in SPLITS}
    if any(value < 0 for value in splits.values()) or not math.isclose(sum(splits.values()), 1, abs_tol=1e-6):
        raise UserError(
            f"{world} splits are {dict(splits)}; give shares that add up to 1, or whole numbers that "
            f"add up to the count {count}."
        )
    counts = {name: int(count * splits.get(name, 0) + 1e-9) for name in SPLITS}
    return counts | {"train": count - counts["val"] - counts["test"]}


def refuse_shares(world: str, domains: Mapping[str, float], known: Iterable[str]) -> None:
    """Raises `UserError` unless `domains` are shares of the `known` domains that add up to 1."""
    known = tuple(known)
    if unknown := sorted(set(domains) - set(known)):
        raise UserError(f"{world} domains name {unknown}; use the names of scanners, {', '.join(known)}.")
    if any(share < 0 for share in domains.values()) or not math.isclose(
        sum(domains.values()), 1, abs_tol=1e-6
    ):
        raise UserError(f"{world} domains are {dict(domains)}; give shares of at least 0 that add up to 1.")


def in_chunks(count: int, size: int, work: Callable[[slice], Any]) -> None:
    """Calls `work` for slices of `count` rows of `size` x `size` images, on as many threads as torch has."""
    step = max(1, PIXELS_PER_CHUNK // size**2)
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        list(pool.map(work, (slice(start, min(start + step, count)) for start in range(0, count, step))))


def to_numpy(values: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in values.items()}


def pick_rows(values: Mapping[str, np.ndarray], rows: slice) -> dict[str, np.ndarray]:
    return {name: value[rows] for name, value in values.items()}


def masks_in_chunks(
    size: int, outline: Callable[..., "Masked"], parents: Attributes, u: Noise
) -> NDArray[np.uint8]:
    """The masks (n, M, H, W) of `outline(size, parents, u)`, on as many threads as torch has."""
    pa, noise = to_numpy(parents), to_numpy(u)
    count = len(next(iter(pa.values())))
    parts: dict[int, NDArray[np.uint8]] = {}

    def mask_rows(rows: slice) -> None:
        parts[rows.start] = outline(size, pick_rows(pa, rows), pick_rows(noise, rows)).masks()

    in_chunks(count, size, mask_rows)
    return np.concatenate([parts[start] for start in sorted(parts)])


@dataclass(frozen=True)
class WorldTruth:
    """The true counterfactuals of a table built by `build_world`, row by row in the same order. See
    `cfssl.data.table.Truth`."""

    world: World
    parents: Attributes
    u: dict[str, Tensor]
    areas: Attributes  # factual, as the table has them

    def counterfactual(self, rows: NDArray[np.int64], parents: Attributes) -> NDArray[np.uint8]:
        """(n, C, H, W): the images of `rows` with their own exogenous factors and the given `parents`; a
        parent that is not given keeps its factual value, and so does an area that is given and holds with
        them already. Other areas are reached as nearly as the factor's range allows."""
        return self.rendered(rows, parents).images

    def rendered(self, rows: NDArray[np.int64], parents: Attributes) -> Rendering:
        """As `counterfactual`, with masks."""
        wanted, u = self._with_areas(rows, parents, ())
        return self.world.render(wanted, u)

    def attributes(self, rows: NDArray[np.int64], do: Attributes) -> Attributes:
        """All attributes (n,) of `rows` under `do`: what it sets, what the world's mechanisms and the row's
        own noise make of it, the factor that moved an area, and all areas measured again with the factual
        maps; an area that was set comes back as it was reached. Everything else keeps its factual value."""
        wanted, u = self._with_areas(rows, do, do)
        maps = self._maps(rows)
        measured = self._measured(wanted, u, maps, self.world.areas)
        return {name: (wanted | measured)[name] for name in self.world.attributes}

    def _with_areas(
        self, rows: NDArray[np.int64], given: Attributes, do: Iterable[str]
    ) -> tuple[Attributes, dict[str, Tensor]]:
        """Parents (n,) of `rows` once `given` is set, what follows from `do`, and factors that bring the
        given areas; and the noise."""
        for name in given:
            if name not in self.world.attributes:
                raise UserError(
                    f"{self.world.name} has no attribute {name!r}{nearest(name, self.world.attributes)}."
                )
        factual, u = self._picked(rows)
        direct = {name: value for name, value in given.items() if name not in self.world.areas}
        parents = self.world.follow(factual | direct, u, do)
        stages = [movers for movers in self.world.movers if any(name in given for name in movers)]
        for movers in stages * len(stages):  # again: a later stage may have moved an earlier one by a pixel
            wanted = {name: given[name] for name in movers if name in given}
            for start in range(0, len(rows), ROWS_PER_SEARCH):
                part = slice(start, start + ROWS_PER_SEARCH)
                own, noise, targets = (
                    {name: value[part] for name, value in values.items()} for values in (parents, u, wanted)
                )
                maps = self._maps(rows[part], wanted)
                for parent, value in self._search(own, noise, targets, movers, maps).items():
                    parents[parent] = parents[parent].clone()
                    parents[parent][part] = value
        return parents, u

    def _search(
        self, parents: Attributes, u: Noise, wanted: Attributes, movers: Mapping[str, Factor], maps: Maps
    ) -> Attributes:
        """The values (n,) of the factors whose areas are nearest to those `wanted`, by bisection, all areas
        at a time: each factor moves its own. Where an area holds already its factor stays."""
        specs = {name: self.world.areas[name] for name in wanted}
        best = {name: parents[movers[name].parent].clone() for name in wanted}

        def errors(values: Attributes) -> Attributes:
            changed = {movers[name].parent: value for name, value in values.items()}
            measured = self._measured(parents | changed, u, maps, specs)
            return {name: measured[name] - wanted[name] for name in wanted}

        least = {name: error.abs() for name, error in errors(best).items()}
        pixel = 100 / math.prod(next(iter(maps.values())).shape[-2:])
        holds = {name: error <= pixel / 2 for name, error in least.items()}
        if all(bool(rows.all()) for rows in holds.values()):
            return {}
        low, high = (
            {name: torch.full_like(best[name], getattr(movers[name], end)) for name in wanted}
            for end in ("low", "high")
        )
        for step in range(HALVINGS + 2):  # the ends first, then the middles
            tried = (low, high)[step] if step < 2 else {n: (low[n] + high[n]) / 2 for n in wanted}
            for name, error in errors(tried).items():
                better = (error.abs() < least[name]) & ~holds[name]
                best[name] = torch.where(better, tried[name], best[name])
                least[name] = torch.where(better, error.abs(), least[name])
                if step >= 2:
                    above = error > 0
                    high[name] = torch.where(above, tried[name], high[name])
                    low[name] = torch.where(above, low[name], tried[name])
        return {movers[name].parent: value for name, value in best.items()}

    def _maps(self, rows: NDArray[np.int64], names: Iterable[str] | None = None) -> Maps:
        parents, u = self._picked(rows)
        specs = self.world.areas if names is None else {name: self.world.areas[name] for name in names}
        return factual_maps(torch.from_numpy(self.world.masks(parents, u)), self.world.mask_names, specs)

    def _measured(
        self, parents: Attributes, u: Noise, maps: Maps, specs: Mapping[str, AreaSpec]
    ) -> Attributes:
        masks = torch.from_numpy(self.world.masks(parents, u))
        return measure_areas(masks, self.world.mask_names, specs, maps)

    def _picked(self, rows: NDArray[np.int64]) -> tuple[Attributes, dict[str, Tensor]]:
        """Factual parents and noise (n,) of `rows`."""
        picked = torch.as_tensor(rows, dtype=torch.int64)
        parents, u = ({n: v[picked] for n, v in values.items()} for values in (self.parents, self.u))
        return parents, u


def build_world(
    world: World, count: int, seed: int, splits: Mapping[str, float] | None = None
) -> tuple[pd.DataFrame, NDArray[np.uint8], NDArray[np.uint8], WorldTruth]:
    """A table of `count` images, one per patient: (frame, images (N,C,H,W), masks (N,M,H,W), truth).

    The frame has a column per attribute (natural values), `patient` and `split`; rows stand split by split.
    `splits` gives shares (default train .6, val .15, test .25) or counts. A split's images do not depend on
    the sizes of the other splits."""
    counts = split_counts(world.name, count, SPLIT_SHARES if splits is None else splits)
    drawn = [world.sample(n, torch_generator(seed, world.name, split), split) for split, n in counts.items()]
    parents = {
        name: torch.cat([part[name] for part, _ in drawn])
        for name in world.attributes
        if name not in world.areas
    }
    u = {name: torch.cat([part[name] for _, part in drawn]) for name in drawn[0][1]}
    rendered = world.render(parents, u)
    chunks = [
        measure_areas(
            torch.from_numpy(rendered.masks[start : start + ROWS_PER_SEARCH]), world.mask_names, world.areas
        )
        for start in range(0, count, ROWS_PER_SEARCH)
    ]
    areas = {name: torch.cat([chunk[name] for chunk in chunks]) for name in world.areas}
    frame = pd.DataFrame(index=range(count))
    for name, attribute in world.attributes.items():
        values = (parents | areas)[name].numpy()
        frame[name] = (
            np.array(attribute.categories)[values] if attribute.categories else values.astype(np.float64)
        )
    frame["patient"] = [f"p{number:06d}" for number in range(count)]
    frame["split"] = np.repeat(list(counts), list(counts.values()))
    return frame, rendered.images, rendered.masks, WorldTruth(world, parents, u, areas)

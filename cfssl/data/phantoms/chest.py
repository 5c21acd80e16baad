"""`phantom_chest`: chest radiographs from a known causal model `image, masks = f(parents, u)`.

Graph: `sex`, `age`, `scanner` and six regional lung widths are roots; `disease <- age`; all of them cause
the image. Every exogenous factor is kept in `u`, so `render(world, other_parents, u)` is the true
counterfactual of an image. The disease is a pleural effusion of graded size and density at one lung base,
with a wider heart. `chest_anatomy` draws the patient, `chest_scanner` is the machine.

The parameters were fixed from SimCLR and supervised runs alone. Levels with 2,400 training images at 64 px,
20 epochs of timm's test_resnet, 3,000 test images with scanners balanced, disease AUC on A / B / C / D:
linear probe on SimCLR .883 / .852 / .777 / .688, supervised .995 / .992 / .933 / .751 (seed 0; three seeds at
the benchmark's budget stand in benchmarks/results/acquisition_shift.md).
"""

import math
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from scipy.ndimage import binary_dilation
from torch import Tensor

from cfssl.data.phantoms import chest_anatomy
from cfssl.data.phantoms.chest_anatomy import MASKS, REGIONS
from cfssl.data.phantoms.chest_scanner import SCANNERS as MACHINES
from cfssl.data.phantoms.chest_scanner import acquire, noise_field
from cfssl.data.table import SPLITS, Attribute, Attributes
from cfssl.errors import UserError, nearest
from cfssl.seeds import torch_generator

SCANNERS = tuple(MACHINES)
ATTRIBUTES: dict[str, Attribute] = {
    "sex": Attribute("sex", "binary", ("F", "M"), declared=True),
    "age": Attribute("age", "continuous", declared=True),  # years, 20 to 90
    "scanner": Attribute("scanner", "categorical", SCANNERS, declared=True),
    "disease": Attribute("disease", "binary", ("no", "yes"), declared=True),
    **{
        region: Attribute(region, "continuous", declared=True) for region in REGIONS
    },  # relative width of that part of the lung
}
IMAGE_PARENTS = tuple(ATTRIBUTES)

AGE_MEAN, AGE_SPREAD, AGE_RANGE = 55.0, 18.0, (20.0, 90.0)
REGION_SPREAD, REGION_RANGE = 0.06, (0.8, 1.2)
DISEASE_LOGIT, DISEASE_PER_DECADE = -0.1, 0.25  # log odds at 55 years and their rise with age
PIXELS_PER_CHUNK = 2**17  # what one thread renders at a time: temporaries stay in the cache


@dataclass(frozen=True)
class ChestWorld:
    """Settings of the world. `domains`: share of each scanner in train and val. The test split has equal
    shares where `balanced_test`, so that rare scanners get a usable interval, else those of `domains`. `rho`
    from 0 (independent) to 1 ties the scanner to the disease in the train split only: the diseased move to
    the later scanners, shares unchanged."""

    size: int = 64
    domains: Mapping[str, float] = field(default_factory=lambda: {"A": 0.6, "B": 0.25, "C": 0.1, "D": 0.05})
    rho: float = 0.0
    balanced_test: bool = True

    def __post_init__(self) -> None:
        if self.size not in (64, 128):
            raise UserError(
                f"phantom_chest size is {self.size}; it draws 64 or 128 pixels, choose one of them."
            )
        if unknown := sorted(set(self.domains) - set(SCANNERS)):
            raise UserError(
                f"phantom_chest domains name {unknown}; use the names of scanners, {', '.join(SCANNERS)}."
            )
        if any(share < 0 for share in self.domains.values()) or not math.isclose(
            sum(self.domains.values()), 1, abs_tol=1e-6
        ):
            raise UserError(
                f"phantom_chest domains are {dict(self.domains)}; give shares of at least 0 that add up to 1."
            )
        if not 0 <= self.rho <= 1:
            raise UserError(f"phantom_chest rho is {self.rho}; it is a strength, give a number from 0 to 1.")

    def shares(self, split: str) -> list[float]:
        """Probability of each scanner, in the order of SCANNERS, in a split."""
        if split == "test" and self.balanced_test:
            return [1 / len(SCANNERS)] * len(SCANNERS)
        return [float(self.domains.get(name, 0.0)) for name in SCANNERS]


@dataclass(frozen=True)
class Rendered:
    images: NDArray[np.uint8]  # (n, 1, H, W)
    masks: NDArray[
        np.uint8
    ]  # (n, 4, H, W) of 0 and 1: left lung, right lung, heart, effusion; lungs include the effusion
    areas: NDArray[np.float32]  # (n, 6), columns as in REGIONS, share of the image


def truncated_normal(
    count: int, mean: float, spread: float, limits: tuple[float, float], rng: torch.Generator
) -> Tensor:
    """(count,) float32 draws of a normal distribution cut to `limits`, by inverting its distribution."""
    low, high = (math.erf((limit - mean) / spread / math.sqrt(2)) for limit in limits)
    uniform = torch.rand(count, generator=rng, dtype=torch.float64)
    normal = torch.erfinv(low + (high - low) * uniform) * math.sqrt(2)
    return (mean + spread * normal).clamp(*limits).float()


def disease_probability(age: Tensor) -> Tensor:
    """P(disease = yes | age in years)."""
    return torch.sigmoid(DISEASE_LOGIT + DISEASE_PER_DECADE * (age.double() - 55) / 10)


def prevalence() -> float:
    """P(disease = yes), by quadrature over the distribution of age."""
    age = torch.linspace(*AGE_RANGE, 2001, dtype=torch.float64)
    weight = torch.exp(-0.5 * ((age - AGE_MEAN) / AGE_SPREAD) ** 2)
    return float((weight * disease_probability(age)).sum() / weight.sum())


def disease_mechanism(age: Tensor, noise: Tensor) -> Tensor:
    """disease = [noise < P(yes | age)]: int64 codes from age (years) and uniform `u["disease_noise"]`."""
    return (noise.double() < disease_probability(age)).long()


def sample(
    world: ChestWorld, count: int, generator: torch.Generator, split: str = "train"
) -> tuple[Attributes, dict[str, Tensor]]:
    """Draws `count` patients of a split: the parents (codes and values as in ATTRIBUTES) and all exogenous
    noise `u`, each (count,). `u` holds scalars and int64 seeds of the per-pixel fields, so it stays small and
    every image can be rendered on its own."""

    def uniform() -> Tensor:
        return torch.rand(count, generator=generator)

    parents: Attributes = {
        "sex": (uniform() < 0.5).long(),
        "age": truncated_normal(count, AGE_MEAN, AGE_SPREAD, AGE_RANGE, generator),
    }
    u = {"disease_noise": uniform()}
    disease = disease_mechanism(parents["age"], u["disease_noise"])
    # The scanner is a quantile of `rank`. Tied patients get a rank from the top `p` if diseased and from the
    # rest if not: given p = P(disease), ranks stay uniform over the population and the shares of the scanners
    # do not move.
    rank, tied, p = uniform(), uniform() < (world.rho if split == "train" else 0.0), prevalence()
    dependent_rank = torch.where(disease == 1, 1 - p + p * rank, (1 - p) * rank)
    borders = torch.tensor(world.shares(split)).cumsum(0)[:-1]
    parents["scanner"] = torch.bucketize(torch.where(tied, dependent_rank, rank), borders, right=True)
    parents["disease"] = disease
    for region in REGIONS:
        parents[region] = truncated_normal(count, 1.0, REGION_SPREAD, REGION_RANGE, generator)
    u |= {name: torch.randn(count, generator=generator) for name in chest_anatomy.NORMALS}
    u |= {name: uniform() for name in chest_anatomy.UNIFORMS}
    u |= {
        name: torch.randint(2**62, (count,), generator=generator) for name in ("texture_seed", "noise_seed")
    }
    return parents, u


def render(world: ChestWorld, parents: Attributes, u: Mapping[str, Tensor]) -> Rendered:
    """`f(parents, u)`: a pure function, row by row, of values (n,). Uses as many threads as torch does."""
    pa = {name: parents[name].numpy() for name in IMAGE_PARENTS}
    noise = {name: value.numpy() for name, value in u.items()}
    count, size = len(pa["age"]), world.size
    images = np.empty((count, 1, size, size), np.uint8)
    masks = np.empty((count, len(MASKS), size, size), np.uint8)
    areas = np.empty((count, len(REGIONS)), np.float32)

    def render_rows(rows: slice) -> None:
        own_noise = {name: value[rows] for name, value in noise.items()}
        anatomy = chest_anatomy.draw(size, {name: value[rows] for name, value in pa.items()}, own_noise)
        grain = noise_field(own_noise["noise_seed"], size)
        for code, name in enumerate(SCANNERS):
            chosen = np.flatnonzero(pa["scanner"][rows] == code)
            if len(chosen):
                images[rows.start + chosen, 0] = acquire(
                    anatomy.attenuation[chosen], MACHINES[name], grain[chosen]
                )
        masks[rows], areas[rows] = anatomy.masks, anatomy.areas

    step = max(1, PIXELS_PER_CHUNK // size**2)
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        list(
            pool.map(render_rows, (slice(start, min(start + step, count)) for start in range(0, count, step)))
        )
    return Rendered(images, masks, areas)


def silver_masks(masks: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """What a lung segmenter trained on healthy lungs would say: (n, 4, H, W) like `masks`, with both lungs
    corrupted.

    The corruption: a lung loses its effusion and a margin of 1/32 of the image's side around it; where there
    is no effusion the silver lungs are the gold lungs. Heart and effusion channels are unchanged."""
    side = 2 * (masks.shape[-1] // 32) + 1
    margin = binary_dilation(masks[:, MASKS.index("effusion")], np.ones((1, side, side), bool))
    silver = masks.copy()
    silver[:, : MASKS.index("heart")] &= ~margin[:, None]
    return silver


@dataclass(frozen=True)
class ChestTruth:
    """The true counterfactuals of a table built by `build`, row by row in the same order."""

    world: ChestWorld
    parents: Attributes
    u: dict[str, Tensor]
    areas: NDArray[np.float32]  # (N, 6) factual areas, columns as in REGIONS

    def counterfactual(self, rows: NDArray[np.int64], parents: Attributes) -> NDArray[np.uint8]:
        """(n, 1, H, W): the images of `rows` with their own exogenous factors and the given `parents`; a
        parent that is not given keeps its factual value."""
        return self.rendered(rows, parents).images

    def rendered(self, rows: NDArray[np.int64], parents: Attributes) -> Rendered:
        """As `counterfactual`, with masks and areas."""
        factual, u = self._factual(rows, parents)
        return render(self.world, factual | parents, u)

    def attributes(self, rows: NDArray[np.int64], do: Attributes) -> Attributes:
        """All attributes (n,) of `rows` under `do`: a new age brings the disease that the row's own noise
        makes of it, unless the disease is set as well; everything else keeps its factual value."""
        factual, u = self._factual(rows, do)
        result = factual | do
        if "age" in do and "disease" not in do:
            result["disease"] = disease_mechanism(result["age"], u["disease_noise"])
        return result

    def _factual(self, rows: NDArray[np.int64], names: Iterable[str]) -> tuple[Attributes, dict[str, Tensor]]:
        """Parents and noise (n,) of `rows`, once `names` are known to be attributes."""
        for name in names:
            if name not in self.parents:
                raise UserError(f"phantom_chest has no attribute {name!r}{nearest(name, self.parents)}.")
        picked = torch.as_tensor(rows, dtype=torch.int64)
        parents, u = ({n: v[picked] for n, v in values.items()} for values in (self.parents, self.u))
        return parents, u


def split_counts(count: int, splits: Mapping[str, float]) -> dict[str, int]:
    """Images per split. Values that add up to 1 are shares of `count` (train takes the rounding), integers
    are counts."""
    if unknown := sorted(set(splits) - set(SPLITS)):
        raise UserError(
            f"phantom_chest splits name {unknown}; the splits are {', '.join(SPLITS)}, use these names."
        )
    if all(isinstance(value, int) for value in splits.values()) and sum(splits.values()) == count:
        return {name: int(splits.get(name, 0)) for name in SPLITS}
    if any(value < 0 for value in splits.values()) or not math.isclose(sum(splits.values()), 1, abs_tol=1e-6):
        raise UserError(
            f"phantom_chest splits are {dict(splits)}; give shares that add up to 1, or whole numbers that "
            f"add up to the count {count}."
        )
    counts = {name: int(count * splits.get(name, 0) + 1e-9) for name in SPLITS}
    return counts | {"train": count - counts["val"] - counts["test"]}


def build(
    world: ChestWorld, count: int, seed: int, splits: Mapping[str, float] | None = None
) -> tuple[pd.DataFrame, NDArray[np.uint8], NDArray[np.uint8], ChestTruth]:
    """A table of `count` images, one per patient: (frame, images (N,1,H,W), masks (N,4,H,W), truth).

    The frame has a column per attribute (natural values), `patient` and `split`; rows stand split by split.
    `splits` gives shares (default train .6, val .15, test .25) or counts. A split's images do not depend on
    the sizes of the other splits."""
    counts = split_counts(count, {"train": 0.6, "val": 0.15, "test": 0.25} if splits is None else splits)
    drawn = [
        sample(world, n, torch_generator(seed, "phantom_chest", split), split) for split, n in counts.items()
    ]
    parents = {name: torch.cat([part[name] for part, _ in drawn]) for name in IMAGE_PARENTS}
    u = {name: torch.cat([part[name] for _, part in drawn]) for name in drawn[0][1]}
    rendered = render(world, parents, u)
    frame = pd.DataFrame(index=range(count))
    for name, attribute in ATTRIBUTES.items():
        values = parents[name].numpy()
        frame[name] = (
            np.array(attribute.categories)[values] if attribute.categories else values.astype(np.float64)
        )
    frame["patient"] = [f"p{number:06d}" for number in range(count)]
    frame["split"] = np.repeat(list(counts), list(counts.values()))
    return frame, rendered.images, rendered.masks, ChestTruth(world, parents, u, rendered.areas)

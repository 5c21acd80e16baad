"""`phantom_chest`: chest radiographs from a known causal model `image, masks = f(parents, u)`.

Graph: `sex`, `age`, `scanner` and six regional lung widths are roots; `disease <- age`; all of them cause
the image. Every exogenous factor is kept in `u`, so `render(world, other_parents, u)` is the true
counterfactual of an image. The areas of the lungs' thirds are measured on the masks, and can be set. The
disease is a pleural effusion of graded size and density at one lung base, with a wider heart.
`chest_anatomy` draws the patient, `chest_scanner` is the machine.

The parameters were fixed from SimCLR and supervised runs alone. Levels with 2,400 training images at 64 px,
20 epochs of timm's test_resnet, 3,000 test images with scanners balanced, disease AUC on A / B / C / D:
linear probe on SimCLR .883 / .852 / .777 / .688, supervised .995 / .992 / .933 / .751 (seed 0; three seeds at
the benchmark's budget stand in benchmarks/results/acquisition_shift.md).
"""

from collections.abc import Iterable, Mapping
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
from cfssl.data.phantoms.chest_scanner import acquire
from cfssl.data.phantoms.fields import noise_field
from cfssl.data.phantoms.world import (
    Factor,
    Noise,
    WorldTruth,
    build_world,
    in_chunks,
    masks_in_chunks,
    pick_rows,
    refuse_shares,
    to_numpy,
    truncated_normal,
)
from cfssl.data.regions import THIRDS, AreaSpec
from cfssl.data.table import Attribute, Attributes
from cfssl.errors import UserError

SCANNERS = tuple(MACHINES)
PARENTS: dict[str, Attribute] = {
    "sex": Attribute("sex", "binary", ("F", "M"), declared=True),
    "age": Attribute("age", "continuous", declared=True),  # years, 20 to 90
    "scanner": Attribute("scanner", "categorical", SCANNERS, declared=True),
    "disease": Attribute("disease", "binary", ("no", "yes"), declared=True),
    # relative width of that part of the lung
    **{region: Attribute(region, "continuous", declared=True) for region in REGIONS},
}
IMAGE_PARENTS = tuple(PARENTS)
AREAS = {
    f"{side}_{third}_area": AreaSpec(f"{side}_lung", "thirds", third)
    for side in ("left", "right")
    for third in THIRDS
}
"""Areas of the thirds of each lung mask, in percent of the image: measured, no parents."""
SILVER = ("silver_left_lung", "silver_right_lung")
"""What `silver_masks` makes of the lungs."""
ATTRIBUTES = PARENTS | {name: Attribute(name, "continuous", declared=True) for name in AREAS}

AGE_MEAN, AGE_SPREAD, AGE_RANGE = 55.0, 18.0, (20.0, 90.0)
REGION_SPREAD, REGION_RANGE = 0.06, (0.8, 1.2)
SEARCH_RANGE = (0.6, 1.4)  # of a region's factor when its area is set
DISEASE_LOGIT, DISEASE_PER_DECADE = -0.1, 0.25  # log odds at 55 years and their rise with age


@dataclass(frozen=True)
class ChestWorld:
    """Settings of the world. `domains`: share of each scanner in train and val. The test split has equal
    shares where `balanced_test`, so that rare scanners get a usable interval, else those of `domains`. `rho`
    from 0 (independent) to 1 ties the scanner to the disease in the train split only: the diseased move to
    the later scanners, shares unchanged.

    `women`: their share in train and val; half of the test split where `balanced_test`. `sex_effect` from 0
    to 1: how much fainter the same effusion is in a woman (up to chest_anatomy.FAINTER_IN_WOMEN), so that
    the disease looks different in the two sexes."""

    size: int = 64
    domains: Mapping[str, float] = field(default_factory=lambda: {"A": 0.6, "B": 0.25, "C": 0.1, "D": 0.05})
    rho: float = 0.0
    balanced_test: bool = True
    women: float = 0.5
    sex_effect: float = 0.0

    def __post_init__(self) -> None:
        if self.size not in (64, 128):
            raise UserError(
                f"phantom_chest size is {self.size}; it draws 64 or 128 pixels, choose one of them."
            )
        refuse_shares("phantom_chest", self.domains, SCANNERS)
        for name, what in (("rho", "strength"), ("women", "share"), ("sex_effect", "strength")):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(
                    f"phantom_chest {name} is {getattr(self, name)}; it is a {what}, give a number from 0 to "
                    "1."
                )

    def shares(self, split: str) -> list[float]:
        """Probability of each scanner, in the order of SCANNERS, in a split."""
        if split == "test" and self.balanced_test:
            return [1 / len(SCANNERS)] * len(SCANNERS)
        return [float(self.domains.get(name, 0.0)) for name in SCANNERS]

    def share_of_women(self, split: str) -> float:
        return 0.5 if split == "test" and self.balanced_test else self.women

    @property
    def name(self) -> str:
        return "phantom_chest"

    @property
    def attributes(self) -> Mapping[str, Attribute]:
        return ATTRIBUTES

    @property
    def mask_names(self) -> tuple[str, ...]:
        return MASKS

    @property
    def areas(self) -> Mapping[str, AreaSpec]:
        return AREAS

    @property
    def movers(self) -> tuple[Mapping[str, Factor], ...]:
        return ({f"{region}_area": Factor(region, *SEARCH_RANGE) for region in REGIONS},)

    def sample(
        self, count: int, generator: torch.Generator, split: str = "train"
    ) -> tuple[Attributes, dict[str, Tensor]]:
        return sample(self, count, generator, split)

    def render(self, parents: Attributes, u: Noise) -> "Rendered":
        return render(self, parents, u)

    def masks(self, parents: Attributes, u: Noise) -> NDArray[np.uint8]:
        """The masks of `render`, without drawing the images."""
        return masks_in_chunks(self.size, chest_anatomy.outline, parents, u)

    def follow(self, parents: Attributes, u: Noise, do: Iterable[str]) -> Attributes:
        """A new age brings the disease that the row's own noise makes of it, unless the disease is set as
        well."""
        do = set(do)
        if "age" in do and "disease" not in do:
            return parents | {"disease": disease_mechanism(parents["age"], u["disease_noise"])}
        return parents


@dataclass(frozen=True)
class Rendered:
    images: NDArray[np.uint8]  # (n, 1, H, W)
    masks: NDArray[
        np.uint8
    ]  # (n, 4, H, W) of 0 and 1: left lung, right lung, heart, effusion; lungs include the effusion
    areas: NDArray[
        np.float32
    ]  # (n, 6), columns as in REGIONS: anatomical thirds to a part of a pixel, share of the image


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
        "sex": (uniform() < 1 - world.share_of_women(split)).long(),
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


def render(world: ChestWorld, parents: Attributes, u: Noise) -> Rendered:
    """`f(parents, u)`: a pure function, row by row, of values (n,). Uses as many threads as torch does."""
    pa, noise = to_numpy({name: parents[name] for name in IMAGE_PARENTS}), to_numpy(u)
    count, size = len(pa["age"]), world.size
    images = np.empty((count, 1, size, size), np.uint8)
    masks = np.empty((count, len(MASKS), size, size), np.uint8)
    areas = np.empty((count, len(REGIONS)), np.float32)

    def render_rows(rows: slice) -> None:
        own_noise = pick_rows(noise, rows)
        anatomy = chest_anatomy.draw(size, pick_rows(pa, rows), own_noise, world.sex_effect)
        grain = noise_field(own_noise["noise_seed"], size)
        for code, name in enumerate(SCANNERS):
            chosen = np.flatnonzero(pa["scanner"][rows] == code)
            if len(chosen):
                images[rows.start + chosen, 0] = acquire(
                    anatomy.attenuation[chosen], MACHINES[name], grain[chosen]
                )
        masks[rows], areas[rows] = anatomy.masks, anatomy.areas

    in_chunks(count, size, render_rows)
    return Rendered(images, masks, areas)


def silver_masks(masks: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """What a lung segmenter trained on healthy lungs would say of the gold `masks` (n, 4, H, W):
    (n, 2, H, W), channels as in SILVER.

    A lung loses its effusion and a margin of 1/32 of the image's side around it; where there is no effusion
    the silver lungs are the gold lungs."""
    side = 2 * (masks.shape[-1] // 32) + 1
    margin = binary_dilation(masks[:, MASKS.index("effusion")], np.ones((1, side, side), bool))
    return masks[:, : len(SILVER)] & ~margin[:, None]


def build(
    world: ChestWorld, count: int, seed: int, splits: Mapping[str, float] | None = None
) -> tuple[pd.DataFrame, NDArray[np.uint8], NDArray[np.uint8], WorldTruth]:
    """See `build_world`."""
    return build_world(world, count, seed, splits)

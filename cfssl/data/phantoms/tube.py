"""`phantom_tube`: straightened coronary arteries from a known causal model `image, masks = f(parents, u)`.

As in a curved reformation of CT angiography that follows the vessel: it runs along the rows, proximal end up,
a contrast-filled lumen in a thin wall, in fat between the heart muscle on one side and the pericardium on the
other. Graph: `sex`, `age`, the reconstruction `kernel`, the amount of plaque and the calibre of each of three
segments are roots, and all of them cause the image. Side, kind (calcified or soft), place and length of each
plaque are exogenous. A plaque of thickness T narrows the lumen by NARROWING * T and bulges outwards by the
rest.

Areas of lumen and plaque in each segment are measured on thirds of the vessel's centre line, and can be set:
a plaque's by its amount, which narrows the lumen there; a lumen's by the calibre, which leaves the plaque.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from cfssl.data.phantoms.fields import (
    Floats,
    bell,
    between,
    blur_matrix,
    bumps,
    coverage,
    noise_field,
    ramp,
    textures,
)
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
from cfssl.data.regions import AreaSpec, region_names
from cfssl.data.table import Attribute, Attributes
from cfssl.errors import UserError

SEGMENTS = region_names("arc")
MASKS = ("lumen", "plaque", "vessel")  # the vessel is lumen and plaque
PLAQUES = tuple(f"plaque_{segment}" for segment in SEGMENTS)
CALIBRES = tuple(f"calibre_{segment}" for segment in SEGMENTS)


@dataclass(frozen=True)
class Kernel:
    """Lengths in pixels of a 64-pixel image; they grow with the size."""

    blur: float  # standard deviation
    edges: float  # how much of the difference to a blurred image is added
    noise: float  # standard deviation, in units of the grey scale
    grain: float  # standard deviation of the filter that makes the noise grainy


KERNELS = {"soft": Kernel(0.9, 0.0, 0.022, 1.0), "sharp": Kernel(0.35, 0.7, 0.055, 0.35)}
EDGE_BLUR = 1.3  # of the image whose difference enhances edges

PARENTS: dict[str, Attribute] = {
    "sex": Attribute("sex", "binary", ("F", "M"), declared=True),
    "age": Attribute("age", "continuous", declared=True),  # years, 30 to 90
    "kernel": Attribute("kernel", "binary", tuple(KERNELS), declared=True),
    # amount of plaque, 0 to 1, and relative calibre of that segment
    **{name: Attribute(name, "continuous", declared=True) for name in (*PLAQUES, *CALIBRES)},
}
AREAS = {
    f"{mask}_{segment}_area": AreaSpec(mask, "arc", segment, map_from="vessel")
    for mask in ("lumen", "plaque")
    for segment in SEGMENTS
}
ATTRIBUTES = PARENTS | {name: Attribute(name, "continuous", declared=True) for name in AREAS}

# Exogenous factors: a standard normal, or a uniform on [0, 1], per image.
NORMALS = (
    "radius", "taper", "shift", "contrast", "wave_1", "wave_2", "muscle_place", "pericardium_place",
    *(f"place_{segment}" for segment in SEGMENTS),
)  # fmt: skip
UNIFORMS = (
    "phase_1", "phase_2", "muscle_side", "chamber", "branch", "branch_side", "branch_place",
    *(f"{what}_{segment}" for segment in SEGMENTS for what in ("side", "kind", "length", "eccentricity")),
)  # fmt: skip

AGE_MEAN, AGE_SPREAD, AGE_RANGE = 60.0, 12.0, (30.0, 90.0)
PLAQUE_MEAN, PLAQUE_SPREAD, PLAQUE_RANGE = 0.35, 0.28, (0.0, 1.0)
CALIBRE_SPREAD, CALIBRE_RANGE, SEARCH_RANGE = 0.06, (0.8, 1.2), (0.6, 1.4)

RADIUS = 0.24  # of the proximal lumen, of half the image's width
THICKNESS = 1.25  # of the largest plaque, of the radius
NARROWING = 0.65
HALF_LENGTH = (0.085, 0.125)  # of a plaque, of the vessel's length: it stays inside its segment
WALL = 0.045
# Grey values: about -200 HU is black, 700 HU white.
LUNG, FAT, SOFT_PLAQUE, WALL_GREY, MUSCLE, CHAMBER, LUMEN, CALCIUM = (
    0.03,
    0.14,
    0.36,
    0.33,
    0.42,
    0.60,
    0.70,
    1.08,
)
TEXTURE_GRIDS = (6, 14, 30)  # cells along one side: outlines, mottle, strands


@dataclass(frozen=True)
class Outlines:
    """Edges and coverage, (n, H, W) unless it says otherwise."""

    column: dict[str, Floats]  # exogenous factors (n, 1, 1)
    along: Floats  # (1, H, 1), 0 proximal, 1 distal
    across: Floats  # from the centre line
    pixel: float
    inner: Floats  # signed distance to the lumen's edge, positive inside
    outer: Floats  # to the vessel's
    calcified: Floats  # (n, H, 1): 1 where a plaque at this height is calcified

    def masks(self) -> NDArray[np.uint8]:
        """(n, 3, H, W), channels as in MASKS."""
        lumen, vessel = self.inner >= 0, self.outer >= 0
        return np.stack([lumen, vessel & ~lumen, vessel], axis=1).astype(np.uint8)


def outline(size: int, parents: Mapping[str, np.ndarray], u: Mapping[str, np.ndarray]) -> Outlines:
    """The vessels' outlines at `size` x `size` pixels. `parents` and `u` hold arrays of shape (n,)."""
    column = {n: np.asarray(v, np.float32)[:, None, None] for n, v in u.items() if not n.endswith("_seed")}
    age = (np.asarray(parents["age"], np.float32)[:, None, None] - 60) / np.float32(15)
    male = np.asarray(parents["sex"], np.float32)[:, None, None]
    pixel = 2 / size
    grid = (np.arange(size, dtype=np.float32) + np.float32(0.5)) / np.float32(size)
    s, x = grid[None, :, None], 2 * grid[None, None] - 1  # (1, H, 1), (1, 1, W)

    turn = np.float32(2 * np.pi)
    bend = 1 + 0.25 * age  # old vessels wind more
    line = 0.03 * column["shift"] + bend * (
        0.028 * column["wave_1"] * np.sin(turn * (0.8 * s + column["phase_1"]))
        + 0.012 * column["wave_2"] * np.sin(turn * (1.9 * s + column["phase_2"]))
    )
    radius = RADIUS * (1 + 0.07 * column["radius"] + 0.10 * (male - 0.5) + 0.04 * age)
    radius = radius * (1 - (0.38 + 0.06 * column["taper"]) * s)  # (n, H, 1)
    radius = radius * (1 + 0.02 * column["wave_2"] * np.sin(turn * (3.3 * s + column["phase_1"])))
    widths = zip(CALIBRES, bumps(s), strict=True)
    calibre = 1 + sum((np.asarray(parents[name], np.float32)[:, None, None] - 1) * b for name, b in widths)

    left, right, calcified = (np.zeros_like(radius) for _ in range(3))
    for number, segment in enumerate(SEGMENTS):
        amount = np.asarray(parents[f"plaque_{segment}"], np.float32)[:, None, None]
        place = np.float32((number + 0.5) / 3) + 0.012 * np.clip(column[f"place_{segment}"], -2.5, 2.5)
        off = (s - place) / between(HALF_LENGTH, column[f"length_{segment}"])
        thickness = THICKNESS * amount * radius * np.maximum(1 - off * off, 0) ** np.float32(0.8)
        other = thickness * np.maximum(0.7 * column[f"eccentricity_{segment}"] - 0.35, 0)
        on_left = column[f"side_{segment}"] < 0.5
        left = left + np.where(on_left, thickness, other)
        right = right + np.where(on_left, other, thickness)
        calcified = np.where(
            np.abs(off) < 1.3, (column[f"kind_{segment}"] < 0.5).astype(np.float32), calcified
        )
    across = x - line
    half = radius * calibre
    # A rough surface, of up to half a pixel: smooth upright edges would cross the pixels of many rows at
    # once, and areas could only be set in such steps.
    row = np.arange(size, dtype=np.float32)[None, :, None]
    rough = 0.6 * np.sin(turn * (row / 11.3 + column["phase_2"]))
    rough = rough + 0.4 * np.sin(turn * (row / 4.7 + 3 * column["phase_1"]))
    surface = across + np.float32(0.5 * pixel) * rough
    inner = np.minimum(surface + half - NARROWING * left, half - NARROWING * right - surface)
    outer = np.minimum(surface + half + (1 - NARROWING) * left, half + (1 - NARROWING) * right - surface)
    return Outlines(column, s, across, pixel, inner, outer, calcified)


def draw(
    size: int, parents: Mapping[str, np.ndarray], u: Mapping[str, np.ndarray]
) -> tuple[Floats, Outlines]:
    """Grey values (n, H, W) before the kernel, about 0 to 1.1, and the outlines."""
    shape = outline(size, parents, u)
    column, s, pixel = shape.column, shape.along, shape.pixel
    edge, mottle, strands = textures(u["texture_seed"], size, TEXTURE_GRIDS)

    side = np.where(column["muscle_side"] < 0.5, np.float32(-1), np.float32(1))
    towards = side * shape.across  # positive on the side of the muscle
    fat = FAT + 0.03 * mottle + 0.05 * np.maximum(strands - 0.6, 0)
    deep = towards - 0.50 - 0.08 * column["muscle_place"] + 0.10 * edge
    muscle = coverage(deep, 0.12)
    grey = fat + muscle * (MUSCLE + 0.025 * mottle - fat)
    cavity = coverage(deep - 0.22 - 0.5 * column["chamber"], 0.10)
    grey += cavity * (CHAMBER + 0.01 * mottle - grey)
    beyond = -towards - 0.72 - 0.08 * column["pericardium_place"] + 0.05 * edge
    grey += coverage(beyond - 0.04, 0.06) * (LUNG + 0.04 * np.maximum(strands, 0) - grey)
    grey += 0.22 * bell(beyond, 0.03)  # pericardium

    lumen_grey = LUMEN * (1 + 0.05 * column["contrast"]) - 0.06 * s
    start: Floats = s - 0.15 - 0.7 * column["branch_place"]  # a branch leaves downwards and fades
    out: Floats = np.where(column["branch_side"] < 0.5, -shape.across, shape.across)
    branch = bell(start - 0.28 * out, 0.028) * ramp(out, 0.0, 0.1) * (1 - ramp(out, 0.30, 0.62))
    branch = branch * ramp(column["branch"], 0.35, 0.45)
    grey += branch * np.maximum(lumen_grey - grey, 0)

    grey += coverage(shape.outer + WALL, WALL) * (WALL_GREY - grey)
    kind = SOFT_PLAQUE + 0.03 * mottle
    kind = kind + shape.calcified * (CALCIUM + 0.05 * mottle - kind)
    grey += coverage(shape.outer, pixel) * (kind - grey)
    grey += coverage(shape.inner, pixel) * (lumen_grey - grey)
    return grey, shape


def reconstruct(grey: Floats, kernel: Kernel, noise: Floats) -> NDArray[np.uint8]:
    """The images (n, H, W) that `kernel` makes of `grey` (n, H, W) with white noise (n, H, W)."""
    size = grey.shape[-1]
    scale = size / 64
    blur, wide, grain = (blur_matrix(size, s * scale) for s in (kernel.blur, EDGE_BLUR, kernel.grain))
    image = blur @ grey @ blur.T
    if kernel.edges:
        image += np.float32(kernel.edges) * (image - wide @ image @ wide.T)
    strength = np.sqrt((grain**2).sum(1))  # what the filter leaves of white noise
    image += (grain @ noise @ grain.T) * (np.float32(kernel.noise) / (strength[:, None] * strength[None]))
    return np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8)


@dataclass(frozen=True)
class Rendered:
    images: NDArray[np.uint8]  # (n, 1, H, W)
    masks: NDArray[np.uint8]  # (n, 3, H, W) of 0 and 1, channels as in MASKS


@dataclass(frozen=True)
class TubeWorld:
    """Settings of the world. `domains`: share of each kernel, in every split."""

    size: int = 64
    domains: Mapping[str, float] = field(default_factory=lambda: {"soft": 0.7, "sharp": 0.3})

    name = "phantom_tube"
    attributes = ATTRIBUTES
    mask_names = MASKS
    areas = AREAS
    movers = (
        {f"{name}_area": Factor(name, *PLAQUE_RANGE) for name in PLAQUES},
        {f"lumen_{s}_area": Factor(f"calibre_{s}", *SEARCH_RANGE) for s in SEGMENTS},
    )

    def __post_init__(self) -> None:
        if self.size not in (32, 64):
            raise UserError(
                f"phantom_tube size is {self.size}; it draws 32 or 64 pixels, choose one of them."
            )
        refuse_shares("phantom_tube", self.domains, KERNELS)

    def sample(
        self, count: int, generator: torch.Generator, split: str = "train"
    ) -> tuple[Attributes, dict[str, Tensor]]:
        """Draws `count` patients: the parents (codes and values as in PARENTS) and all exogenous noise `u`,
        each (count,). All splits are alike."""

        def uniform() -> Tensor:
            return torch.rand(count, generator=generator)

        parents: Attributes = {
            "sex": (uniform() < 0.5).long(),
            "age": truncated_normal(count, AGE_MEAN, AGE_SPREAD, AGE_RANGE, generator),
            "kernel": (uniform() >= float(self.domains.get("soft", 0.0))).long(),
        }
        for name in PLAQUES:
            parents[name] = truncated_normal(count, PLAQUE_MEAN, PLAQUE_SPREAD, PLAQUE_RANGE, generator)
        for name in CALIBRES:
            parents[name] = truncated_normal(count, 1.0, CALIBRE_SPREAD, CALIBRE_RANGE, generator)
        u = {name: torch.randn(count, generator=generator) for name in NORMALS}
        u |= {name: uniform() for name in UNIFORMS}
        u |= {n: torch.randint(2**62, (count,), generator=generator) for n in ("texture_seed", "noise_seed")}
        return parents, u

    def render(self, parents: Attributes, u: Noise) -> Rendered:
        """`f(parents, u)`: a pure function, row by row, of values (n,); on as many threads as torch has."""
        pa, noise = to_numpy({name: parents[name] for name in PARENTS}), to_numpy(u)
        count, size = len(pa["age"]), self.size
        images = np.empty((count, 1, size, size), np.uint8)
        masks = np.empty((count, len(MASKS), size, size), np.uint8)

        def render_rows(rows: slice) -> None:
            own_noise = pick_rows(noise, rows)
            grey, shape = draw(size, pick_rows(pa, rows), own_noise)
            grain = noise_field(own_noise["noise_seed"], size)
            for code, name in enumerate(KERNELS):
                chosen = np.flatnonzero(pa["kernel"][rows] == code)
                if len(chosen):
                    images[rows.start + chosen, 0] = reconstruct(grey[chosen], KERNELS[name], grain[chosen])
            masks[rows] = shape.masks()

        in_chunks(count, size, render_rows)
        return Rendered(images, masks)

    def masks(self, parents: Attributes, u: Noise) -> NDArray[np.uint8]:
        """The masks of `render`, without drawing the images."""
        return masks_in_chunks(self.size, outline, parents, u)

    def follow(self, parents: Attributes, u: Noise, do: Iterable[str]) -> Attributes:
        """All parents are roots: nothing follows."""
        return parents


def build(
    world: TubeWorld, count: int, seed: int, splits: Mapping[str, float] | None = None
) -> tuple[pd.DataFrame, NDArray[np.uint8], NDArray[np.uint8], WorldTruth]:
    """See `build_world`."""
    return build_world(world, count, seed, splits)

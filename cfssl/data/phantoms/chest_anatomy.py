"""The patient of `phantom_chest`: parents and exogenous factors in, attenuation field and masks out.

Coordinates: the image spans [-1, 1] in x (rightwards) and y (downwards); pose (shift, zoom, tilt) maps it to
the patient's frame. As in a radiograph the patient's left is on the right of the image. `lateral` is the
distance from the midline, on either side. Attenuation is in units where air is 0 and the mediastinum about
0.9. Everything is float32 numpy with a leading batch axis, and an image's values depend on its own row alone,
so that rows can be rendered in any grouping with the same bytes.

The lung's lateral edge at height t (0 apex, 1 costophrenic angle) is its medial edge plus its width times
`1 + sum over regions of (factor - 1) * bump(t)`. A bump is zero outside its third of the lung and at
its borders: the outline stays continuous, and a factor changes the area of its own region and of no other.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cfssl.data.phantoms.fields import Floats, bell, between, bumps, coverage, ramp, textures

REGIONS = ("left_upper", "left_middle", "left_lower", "right_upper", "right_middle", "right_lower")
MASKS = ("left_lung", "right_lung", "heart", "effusion")

# Exogenous factors: a standard normal, or a uniform on [0, 1], per image.
NORMALS = (
    "shift_x", "shift_y", "zoom", "tilt", "thorax_width", "body_width", "body_thickness", "mediastinum_width",
    "apex_left", "apex_right", "dome_left", "dome_right", "heart_width", "heart_height", "heart_x", "heart_y",
    "rib_spacing", "rib_strength", "clavicle_height", "clavicle_slope", "lung_density", "hilum", "breast",
)  # fmt: skip
UNIFORMS = (
    "rib_phase", "bubble", "haze_left", "haze_right", "effusion_side", "effusion_size", "effusion_contrast",
)  # fmt: skip

# From the smallest to the largest effusion: height of the fluid at the chest wall (of a lung about 1.25),
# the attenuation it adds (the lung takes away about 0.36), and the relative widening of the heart with it.
EFFUSION_HEIGHT = (0.22, 0.62)
EFFUSION_CONTRAST = (0.12, 0.28)
HEART_GROWTH = (0.04, 0.20)
ANGLE_BELOW_DOME = 0.24  # how far the costophrenic angle hangs below the top of the diaphragm
FAINTER_IN_WOMEN = 0.6  # of an effusion's contrast, at the full effect of sex
HAZE = 0.10  # largest attenuation of the harmless basal haze that healthy and diseased lungs have alike
TEXTURE_GRIDS = (9, 22, 48)  # cells of the soft-tissue, lung and vessel textures along one side


@dataclass(frozen=True)
class Anatomy:
    attenuation: Floats  # (n, H, W), about 0 to 1.2
    masks: NDArray[np.uint8]  # (n, 4, H, W), channels as in MASKS
    areas: Floats  # (n, 6), columns as in REGIONS: share of the image covered by that third of the lung


@dataclass(frozen=True)
class Outlines:
    """Where everything lies, (n, H, W) or broadcastable to it; all that the masks depend on."""

    column: dict[str, Floats]  # exogenous factors (n, 1, 1)
    age: Floats  # standardised
    male: Floats
    pixel: float
    x: Floats
    y: Floats
    lateral: Floats
    mediastinum: Floats
    edge: Floats
    dome: NDArray[np.floating]
    bottom: Floats
    heights: tuple[Floats, Floats]  # left, right: (n, H)
    heart_distance: Floats
    lung: Floats
    fluid: Floats

    @property
    def is_left(self) -> NDArray[np.bool_]:
        return self.x > 0

    def by_side(self, left: Floats, right: Floats) -> Floats:
        return np.where(self.is_left, left, right)

    def masks(self) -> NDArray[np.uint8]:
        """(n, 4, H, W), channels as in MASKS."""
        filled = self.lung >= 0.5
        heart = coverage(self.heart_distance, self.pixel) >= 0.5
        channels = [filled & self.is_left, filled & ~self.is_left, heart, self.fluid >= 0.5]
        return np.stack(channels, axis=1).astype(np.uint8)

    def areas(self) -> Floats:
        """(n, 6), columns as in REGIONS: share of the image covered by that third of the lung."""
        areas = []
        for own, t in zip((self.is_left, ~self.is_left), self.heights, strict=True):
            rows = np.where(own, self.lung, np.float32(0)).sum(axis=2)  # (n, H)
            third = np.clip((3 * t).astype(np.int64), 0, 2)  # t is negative above the apex, where rows are 0
            areas += [
                np.where(third == number, rows, np.float32(0)).sum(axis=1) / self.lung.shape[-1] ** 2
                for number in range(3)
            ]
        return np.stack(areas, axis=1)


def outline(size: int, parents: dict[str, np.ndarray], u: dict[str, np.ndarray]) -> Outlines:
    """The patients' outlines at `size` x `size` pixels. `parents` and `u` hold arrays of shape (n,)."""
    column = {
        name: np.asarray(value, np.float32)[:, None, None]
        for name, value in u.items()
        if name != "noise_seed"
    }
    age = (np.asarray(parents["age"], np.float32)[:, None, None] - 55) / np.float32(20)
    male = np.asarray(parents["sex"], np.float32)[:, None, None]
    sick = np.asarray(parents["disease"], np.float32)[:, None, None]
    factor = {name: np.asarray(parents[name], np.float32)[:, None, None] for name in REGIONS}
    pixel = 2 / size
    grid = ((np.arange(size, dtype=np.float32) + np.float32(0.5)) * np.float32(pixel) - 1).astype(np.float32)
    zoom = 1 + np.float32(0.035) * column["zoom"]
    y = (grid[None, :, None] - np.float32(0.03) - np.float32(0.035) * column["shift_y"]) / zoom  # (n, H, 1)
    x = (grid[None, None, :] - np.float32(0.03) * column["shift_x"]) / zoom
    x = x - np.float32(0.03) * column["tilt"] * y  # (n, H, W)

    lateral = np.abs(x)
    is_left = x > 0

    def by_side(left: Floats, right: Floats) -> Floats:
        return np.where(is_left, left, right)

    # Heart first: the lungs end at it. It widens to the patient's left, and with the disease.
    growth = 1 + sick * between(HEART_GROWTH, column["effusion_size"])
    heart_width = (0.31 + 0.015 * male) * (1 + 0.07 * column["heart_width"] + 0.03 * age) * growth
    heart_height = 0.25 * (1 + 0.06 * column["heart_height"])
    across = x - (0.085 + 0.02 * column["heart_x"] + 0.45 * (heart_width - 0.31))
    along = y - (0.27 + 0.03 * column["heart_y"])
    turned = 0.90 * across + 0.43 * along, 0.90 * along - 0.43 * across
    across, along = turned[0] / heart_width, turned[1] / heart_height
    heart_distance = (1 - np.sqrt(across * across + along * along)) * heart_height
    heart = coverage(heart_distance, pixel)

    # Lungs, one boundary at a time; each is chosen by the side of the midline a pixel lies on.
    lung_half = (0.72 + 0.03 * male) * (1 + 0.035 * column["thorax_width"])
    mediastinum = 0.115 * (1 + 0.12 * column["mediastinum_width"]) + 0.012 * np.maximum(age, 0)
    edges, medials, domes, heights = [], [], [], []
    for side, dome_mean in (("left", 0.42), ("right", 0.36)):
        apex = -0.76 + 0.03 * column[f"apex_{side}"]
        dome = dome_mean + 0.055 * column[f"dome_{side}"]
        t = (y - apex) / (dome + ANGLE_BELOW_DOME - apex)  # (n, H, 1)
        inside = np.clip(t, 0, 1)
        medial = mediastinum + 0.15 * (1 - inside) ** 7
        bulge = np.sqrt(1 - (1 - inside) ** 2.6) * (0.80 + 0.20 * inside)
        width = 0.30 + (lung_half - 0.30) * bulge - medial - 0.07 * (1 - np.clip(inside * 6, 0, 1)) ** 2
        thirds = zip(("upper", "middle", "lower"), bumps(t), strict=True)
        width = width * (1 + sum((factor[f"{side}_{third}"] - 1) * bump for third, bump in thirds))
        edges.append(medial + width)
        medials.append(np.where(t > 0, medial, np.float32(2)))  # above the apex there is no lung
        domes.append(dome)
        heights.append(t[:, :, 0])
    edge, medial = (by_side(*sides) for sides in (edges, medials))
    dome = domes[1] + (domes[0] - domes[1]) * ramp(x, -0.1, 0.1)  # no step at the midline
    offset = lateral - 0.22
    bottom = dome + np.where(offset > 0, np.float32(1.0), np.float32(0.9)) * offset * offset
    lung = coverage(edge - lateral, pixel) * coverage(lateral - medial, pixel) * coverage(bottom - y, pixel)
    lung *= 1 - heart

    # Effusion: fluid at one base, its surface rising towards the chest wall (meniscus).
    here = (is_left == (column["effusion_side"] < 0.5)) * sick
    fluid_height = between(EFFUSION_HEIGHT, column["effusion_size"])
    outward = np.clip((lateral - medial) / np.maximum(edge - medial, 0.05), 0, 1)
    angle = dome + ANGLE_BELOW_DOME
    surface = angle - fluid_height * (0.62 + 0.38 * outward * outward * outward)
    fluid = lung * coverage(y - surface, 1.5 * pixel) * here
    return Outlines(
        column, age, male, pixel, x, y, lateral, mediastinum, edge, dome, bottom,
        (heights[0], heights[1]), heart_distance, lung, fluid,
    )  # fmt: skip


def draw(
    size: int, parents: dict[str, np.ndarray], u: dict[str, np.ndarray], sex_effect: float = 0.0
) -> Anatomy:
    """The patients' anatomy at `size` x `size` pixels. `parents` and `u` hold arrays of shape (n,).
    `sex_effect`: see `ChestWorld`."""
    shape = outline(size, parents, u)
    column, age, male, pixel = shape.column, shape.age, shape.male, shape.pixel
    x, y, lateral, edge = shape.x, shape.y, shape.lateral, shape.edge
    mediastinum, bottom, heart_distance = shape.mediastinum, shape.bottom, shape.heart_distance
    soft_texture, lung_texture, vessel_texture = textures(u["texture_seed"], size, TEXTURE_GRIDS)
    angle = shape.dome + ANGLE_BELOW_DOME
    haze = ramp(y - angle, -0.55, -0.05) * shape.by_side(column["haze_left"], column["haze_right"])

    # Soft tissue, from the skin inwards.
    half_width = 0.95 + 0.02 * column["body_width"] + 0.03 * male + 0.05 * ramp(-y, 0.15, 0.6)
    slope = np.clip(lateral - 0.14, 0, None)
    skin = np.minimum(half_width - lateral, (y + 0.90 - 0.26 * slope - 0.16 * slope * slope) * 0.8)
    body = np.maximum(coverage(skin, 0.10), coverage(0.20 + 0.02 * male - lateral, 0.08) * np.float32(0.7))
    chest_wall = bell(lateral - edge - 0.035, 0.045) * ramp(y, -0.75, -0.4)
    midline = coverage(mediastinum + 0.015 - lateral, 0.10)
    below = coverage(y - bottom, 2 * pixel)
    bubble_x, bubble_y = (x - 0.40) / 0.16, (y - bottom - 0.13) / 0.075
    bubble = bubble_x * bubble_x + bubble_y * bubble_y
    bubble = np.maximum(1 - 0.4 * bubble * bubble, 0) * ramp(column["bubble"], 0.3, 1.0)
    flank = np.maximum(1 - 1.04 * lateral * lateral, 0)
    tissue = 0.40 + 0.04 * column["body_thickness"] + 0.16 * flank + 0.05 * y + 0.03 * soft_texture
    tissue += 0.08 * chest_wall + 0.16 * midline * ramp(y, -1.1, -0.5)
    tissue += below * (0.17 + 0.03 * soft_texture - 0.22 * bubble)
    tissue += (1 - below) * 0.10 * coverage(heart_distance, 0.08)
    tissue += 0.10 * bell(lateral - 0.86, 0.09) * bell(y + 0.58, 0.09)  # shoulder joints
    tissue -= 0.10 * bell(x, 0.035) * (1 - ramp(y, -0.35, -0.15))  # trachea
    breast_size = 0.32 * (1 + 0.12 * column["breast"])
    breast_x, breast_y = (lateral - 0.43) / breast_size, (y - 0.20) / (0.85 * breast_size)
    breast = np.sqrt(np.maximum(1 - breast_x * breast_x - breast_y * breast_y, 0)) * ramp(y, -0.2, 0.3)
    tissue += (1 - male) * 0.085 * breast

    # Bones: ribs inside the cage, clavicles, spine.
    cage = coverage(edge + 0.06 - lateral, 0.05) * ramp(lateral, 0.08, 0.2)
    cage *= ramp(y, -0.8, -0.62) * (1 - 0.6 * below)
    spacing = 0.165 * (1 + 0.05 * column["rib_spacing"])
    turn = np.float32(2 * np.pi)
    back = np.cos(turn * ((y - 0.10 * lateral - 0.42 * lateral * lateral) / spacing + column["rib_phase"]))
    front = np.cos(turn * ((y + 0.75 * lateral - 0.35) / (1.45 * spacing) + column["rib_phase"]))
    ribs = np.maximum(back, -0.35) + 0.45 * np.maximum(front, -0.35) * ramp(lateral, 0.2, 0.4)
    tissue += 0.055 * (1 + 0.15 * column["rib_strength"] - 0.18 * age) * cage * ribs
    slant = 0.30 + 0.06 * column["clavicle_slope"] + 0.35 * (0.75 - lateral)
    clavicle = y + 0.60 - 0.025 * column["clavicle_height"] + slant * (lateral - 0.08)
    tissue += 0.10 * bell(clavicle, 0.032) * ramp(lateral, 0.07, 0.12) * (1 - ramp(lateral, 0.70, 0.85))
    vertebrae = 0.6 + 0.4 * np.cos(turn * y / (0.62 * spacing))  # (n, H, 1)
    tissue += 0.05 * vertebrae * coverage(0.065 - lateral, 0.04)

    # Lungs: air, vessels around the hila, haze, fluid; the aortic knob that grows with age.
    reach = bell(lateral - 0.17, 0.17) * bell(y + 0.02, 0.26)
    air = -0.36 + 0.02 * column["lung_density"] + 0.014 * lung_texture + 0.018 * vessel_texture + HAZE * haze
    air += reach * (0.10 + 0.02 * column["hilum"] + 0.04 * vessel_texture)
    knob = bell(x - mediastinum - 0.015, 0.06) * bell(y + 0.30, 0.075)
    fluid_contrast = between(EFFUSION_CONTRAST, column["effusion_contrast"])
    if sex_effect:
        fluid_contrast = fluid_contrast * (1 - np.float32(FAINTER_IN_WOMEN * sex_effect) * (1 - male))
    attenuation = (
        body * (tissue + (0.08 + 0.07 * age) * knob) + shape.lung * air + fluid_contrast * shape.fluid
    )

    return Anatomy(attenuation, shape.masks(), shape.areas())

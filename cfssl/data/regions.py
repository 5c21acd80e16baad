"""Where a structure is measured: soft region maps that sum to one, and areas in percent of the image.

Enter: masks (B, H, W), or probabilities of a segmentor. Leave: maps (B, R, H, W) and areas. Regional areas
are the parents of positional segmentor guidance, A[s, r] = mean over pixels of R[s, r] * P[s]. Maps are
computed from the factual mask and held fixed for its counterfactuals, else a structure that shrinks would
move its own regions; so areas are differentiable in the probabilities and maps in nothing.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F

from cfssl.errors import UserError, nearest, quoted

Layout = Literal["whole", "thirds", "lungs", "sectors", "rings", "arc"]
THIRDS = ("upper", "middle", "lower")
NAMES: dict[str, tuple[str, ...]] = {
    "whole": ("whole",),
    "thirds": THIRDS,
    "lungs": tuple(f"{side}_{third}" for side in ("left", "right") for third in THIRDS),
    "arc": ("proximal", "middle", "distal"),
}
PARTS = {"sectors": 4, "rings": 3}  # regions of the layouts that can have any number of them
BLEND = 1.5  # pixels over which one region fades into the next


def region_names(layout: Layout, parts: int | None = None) -> tuple[str, ...]:
    """The regions of a layout, in the order of its maps; sectors and rings are numbered from 1."""
    _refuse_unknown(layout, parts)
    if layout in NAMES:
        return NAMES[layout]
    return tuple(f"{layout[:-1]}_{number + 1}" for number in range(parts or PARTS[layout]))


def region_maps(
    mask: torch.Tensor, layout: Layout, parts: int | None = None, blend: float = BLEND
) -> torch.Tensor:
    """mask (B, H, W), a structure where it is at least .5 -> (B, R, H, W) float32 in [0, 1], which sum to 1
    over R at every pixel, inside the mask and outside. Where the mask is empty the image takes its place.

    layout: `whole`; `thirds` of the mask's extent in rows; `lungs`, one mask of both, parted at the gap
        between them, in thirds of each (the patient's left is on the right of the image); `sectors` about the
        centroid, clockwise from the top; `rings` about the centroid, from within, each with an equal share of
        the mask's area; `arc`, thirds of the centre line of a tube that runs along the rows.
    parts: how many sectors (default 4) or rings (3). blend: pixels over which a region fades into the next.
    Raises `UserError` for a layout that does not exist or has fixed parts.
    """
    _refuse_unknown(layout, parts)
    inside = mask >= 0.5 if mask.is_floating_point() else mask.bool()
    inside = inside | ~inside.any(dim=2).any(dim=1)[:, None, None]
    return LAYOUTS[layout](inside, max(blend, 1e-3), parts or PARTS.get(layout, 0))


def areas(probabilities: torch.Tensor, maps: torch.Tensor) -> torch.Tensor:
    """probabilities (B, H, W) of one structure, maps (B, R, H, W) -> (B, R), percent of the image. Regions
    add up to the structure's area."""
    height, width = probabilities.shape[1:]
    return torch.einsum("bhw,brhw->br", probabilities.float(), maps) * (100 / (height * width))


@dataclass(frozen=True)
class AreaSpec:
    """How an attribute is measured: the area of the mask `structure` in one region of a layout, which is laid
    out on the mask `map_from`, by default the structure itself."""

    structure: str
    layout: Layout
    region: str
    map_from: str | None = None

    def __post_init__(self) -> None:
        known = region_names(self.layout)
        if self.region not in known:
            raise UserError(
                f"Layout {self.layout!r} has no region {self.region!r}{nearest(self.region, known)}."
            )

    @property
    def map_structure(self) -> str:
        return self.map_from or self.structure

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def region_index(spec: AreaSpec) -> int:
    """The channel of the spec's region in the maps of its layout."""
    return region_names(spec.layout).index(spec.region)


Maps = dict[tuple[str, Layout], torch.Tensor]
"""(mask, layout) -> maps (B, R, H, W)."""


def declared_areas(layouts: Mapping[str, Layout], mask_names: Sequence[str]) -> dict[str, AreaSpec]:
    """{mask: layout} -> the areas it declares, `<mask>_<region>_area`, of a whole structure `<mask>_area`.
    Raises `UserError` for a mask that is not in `mask_names`."""
    specs = {}
    for mask, layout in layouts.items():
        if mask not in mask_names:
            raise UserError(f"`areas` names {mask!r}, which is no mask{nearest(mask, mask_names)}.")
        for region in region_names(layout):
            name = f"{mask}_area" if layout == "whole" else f"{mask}_{region}_area"
            specs[name] = AreaSpec(mask, layout, region)
    return specs


def factual_maps(masks: torch.Tensor, names: Sequence[str], specs: Mapping[str, AreaSpec]) -> Maps:
    """The maps that `specs` need, laid out on factual masks (B, S, H, W) with the channels `names`."""
    needed = dict.fromkeys((spec.map_structure, spec.layout) for spec in specs.values())
    return {(mask, layout): region_maps(_channel(masks, names, mask), layout) for mask, layout in needed}


def measure_areas(
    masks: torch.Tensor, names: Sequence[str], specs: Mapping[str, AreaSpec], maps: Maps | None = None
) -> dict[str, torch.Tensor]:
    """The areas `specs` of masks or probabilities (B, S, H, W) with the channels `names`: attribute -> (B,)
    float32, percent of the image. `maps`: as the factual masks gave them, by default those of `masks`.
    Differentiable in `masks`. Raises `UserError` where a channel is missing."""
    maps = factual_maps(masks.detach(), names, specs) if maps is None else maps
    measured = {
        (structure, *key): areas(_channel(masks, names, structure), maps[key])
        for structure, key in {(s.structure, (s.map_structure, s.layout)) for s in specs.values()}
    }
    return {
        name: measured[spec.structure, spec.map_structure, spec.layout][:, region_index(spec)]
        for name, spec in specs.items()
    }


def _channel(masks: torch.Tensor, names: Sequence[str], name: str) -> torch.Tensor:
    if name not in names:
        raise UserError(f"There is no mask {name!r} to measure{nearest(name, names)}.")
    return masks[:, list(names).index(name)]


def _refuse_unknown(layout: str, parts: int | None) -> None:
    if layout not in get_args(Layout):
        raise UserError(f"There is no region layout {layout!r}{nearest(layout, get_args(Layout))}.")
    if parts is not None and (layout not in PARTS or parts < 1):
        raise UserError(
            f"Region layout {layout!r} cannot have {parts} parts; give a number of at least 1 for "
            f"{quoted(PARTS)}, and none for others."
        )


def _grid(inside: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Row and column numbers, (1, H, 1) and (1, 1, W) float32."""
    height, width = inside.shape[1:]
    rows = torch.arange(height, device=inside.device, dtype=torch.float32)
    columns = torch.arange(width, device=inside.device, dtype=torch.float32)
    return rows[None, :, None], columns[None, None]


def _between(position: torch.Tensor, borders: Sequence[torch.Tensor], blend: float) -> torch.Tensor:
    """Maps of regions that follow one another: `position` in pixels, ascending `borders` that broadcast
    against it -> (B, R, ...). Differences of ramps that only fall, so they sum to 1."""
    passed = [((position - border) / blend + 0.5).clamp(0, 1) for border in borders]
    one, none = torch.ones_like(passed[0]), torch.zeros_like(passed[0])
    return torch.stack([a - b for a, b in zip([one, *passed], [*passed, none], strict=True)], dim=1)


def _row_thirds(inside: torch.Tensor, blend: float) -> torch.Tensor:
    """(B, 3, H, 1)"""
    rows, _ = _grid(inside)
    present = inside.any(dim=2, keepdim=True)  # (B, H, 1)
    top = torch.where(present, rows, math.inf).amin(dim=1, keepdim=True) - 0.5
    bottom = torch.where(present, rows, -math.inf).amax(dim=1, keepdim=True) + 0.5
    return _between(rows, [top + (bottom - top) * share for share in (1 / 3, 2 / 3)], blend)


def _whole(inside: torch.Tensor, blend: float, parts: int) -> torch.Tensor:
    return torch.ones_like(inside, dtype=torch.float32)[:, None]


def _thirds(inside: torch.Tensor, blend: float, parts: int) -> torch.Tensor:
    return _row_thirds(inside, blend).expand(-1, -1, -1, inside.shape[2]).contiguous()


def _lungs(inside: torch.Tensor, blend: float, parts: int) -> torch.Tensor:
    """The gap is the emptiest column between the centres of what lies on either side of the centroid."""
    _, columns = _grid(inside)
    columns = columns[:, 0]  # (1, W)
    profile = inside.sum(dim=1).float()  # (B, W)

    def centre(weights: torch.Tensor) -> torch.Tensor:
        return (weights * columns).sum(1, keepdim=True) / weights.sum(1, keepdim=True).clamp(min=1)

    middle = centre(profile)
    low, high = centre(profile * (columns <= middle)), centre(profile * (columns >= middle))
    candidates = torch.where((columns >= low) & (columns <= high), profile, math.inf)
    emptiest = candidates == candidates.amin(dim=1, keepdim=True)
    split = centre(emptiest.float())[:, :, None]  # (B, 1, 1), the middle of the gap
    sides = _between(columns[:, None], [split], blend)  # (B, 2, 1, W): image left, image right
    halves = [columns[:, None] > split, columns[:, None] <= split]  # the patient's left, right
    maps = []
    for side, half in zip((1, 0), halves, strict=True):
        own = inside & half
        own = torch.where(own.any(dim=2).any(dim=1)[:, None, None], own, inside)
        maps.append(_row_thirds(own, blend) * sides[:, side, None])
    return torch.cat(maps, dim=1)


def _polar(inside: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Distance in pixels to the centroid of the mask, and angle in [0, 2 pi), clockwise from the top."""
    rows, columns = _grid(inside)
    count = inside.sum(dim=(1, 2), keepdim=True)
    down = rows - (inside * rows).sum(dim=(1, 2), keepdim=True) / count
    right = columns - (inside * columns).sum(dim=(1, 2), keepdim=True) / count
    return torch.hypot(down, right), torch.atan2(right, -down) % (2 * math.pi)


def _sectors(inside: torch.Tensor, blend: float, parts: int) -> torch.Tensor:
    if parts == 1:
        return _whole(inside, blend, parts)
    radius, angle = _polar(inside)
    centres = (torch.arange(parts, device=inside.device)[None, :, None, None] + 0.5) * (2 * math.pi / parts)
    apart = (angle[:, None] - centres + math.pi) % (2 * math.pi) - math.pi
    depth = (math.pi / parts - apart.abs()) * radius[:, None]  # along the arc, positive inside
    maps = (depth / blend + 0.5).clamp(0, 1)
    return maps / maps.sum(dim=1, keepdim=True)  # at the centroid all sectors meet


def _rings(inside: torch.Tensor, blend: float, parts: int) -> torch.Tensor:
    radius, _ = _polar(inside)
    if parts == 1:
        return _whole(inside, blend, parts)
    ordered = torch.where(inside, radius, math.inf).flatten(1).sort(dim=1).values
    count = inside.sum(dim=(1, 2))
    borders = []
    for number in range(1, parts):
        place = ((count * number) // parts).clamp(max=count - 1)[:, None]
        border = (ordered.gather(1, place) + ordered.gather(1, (place - 1).clamp(min=0))) / 2
        borders.append(border[:, :, None])
    return _between(radius, borders, blend)


def _arc(inside: torch.Tensor, blend: float, parts: int) -> torch.Tensor:
    rows, columns = _grid(inside)
    count = inside.sum(dim=2).float()  # (B, H)
    present = count > 0
    centre = (inside * columns).sum(dim=2) / count.clamp(min=1)
    # Rows without a pixel lie on the line between the nearest that have one, or straight beyond the ends.
    number = rows[:, :, 0].long().expand_as(centre)
    height = centre.shape[1]
    before = torch.where(present, number, -1).cummax(dim=1).values
    after = torch.where(present, number, height).flip(1).cummin(dim=1).values.flip(1)
    first, last = (after[:, :1], before[:, -1:])
    before, after = torch.where(before < 0, first, before), torch.where(after >= height, last, after)
    share = (number - before) / (after - before).clamp(min=1)
    line = torch.lerp(centre.gather(1, before), centre.gather(1, after), share.clamp(0, 1))
    # A mask has whole pixels: five rows smooth the steps, which would lengthen the line.
    line = F.avg_pool1d(F.pad(line[:, None], (2, 2), mode="replicate"), 5, stride=1)[:, 0]
    steps = torch.sqrt(1 + line.diff(dim=1) ** 2)
    length = F.pad(steps.cumsum(dim=1), (1, 0))  # (B, H), pixels along the line from the first row
    start, stop = length.gather(1, first) - 0.5, length.gather(1, last) + 0.5
    thirds = [(start + (stop - start) * share)[:, :, None] for share in (1 / 3, 2 / 3)]
    return _between(length[:, :, None], thirds, blend).expand(-1, -1, -1, inside.shape[2]).contiguous()


LAYOUTS: dict[str, Callable[[torch.Tensor, float, int], torch.Tensor]] = {
    "whole": _whole,
    "thirds": _thirds,
    "lungs": _lungs,
    "sectors": _sectors,
    "rings": _rings,
    "arc": _arc,
}

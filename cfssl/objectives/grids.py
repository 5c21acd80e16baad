"""Dense baselines on the encoder's own grid, without a decoder: PixPro (Xie et al. 2021), VICRegL (Bardes et
al. 2022) and DetCon (Henaff et al. 2021).

Where the cells of two views lie in their source is known exactly through the views' maps. lightly's
transforms for VICRegL space the cells of a crop so that the last one lies outside of it; its loss is used
here with places of our own.
"""

import copy
from typing import Annotated, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import nn

from cfssl.data.views import ViewBatch
from cfssl.engine.schedules import cosine
from cfssl.models.backbone import feature_size
from cfssl.models.dense import Grid
from cfssl.models.heads import lightly_head
from cfssl.models.seeded import seeded
from cfssl.objectives.dense import Structures, class_codes
from cfssl.objectives.gathered import mean_of_all
from cfssl.objectives.points import apply, item_generators, pixel_centres
from cfssl.objectives.teacher import Teacher
from cfssl.settings import STRICT, Count, NonNegative, Positive, Probability


@dataclass(frozen=True, config=STRICT)
class PixProSettings:
    """`stride`: of the grid, in pixels; null: the encoder's last. `distance`: cells whose centres lie nearer
    than this share of the larger one's diagonal are alike. `gamma`: sharpness of the propagation. `momentum`
    of the teacher, by half a cosine to 1. `hidden` and `output`: widths of the projection."""

    name: Literal["pixpro"] = "pixpro"
    stride: Count | None = None
    distance: Positive = 0.7
    gamma: Positive = 2.0
    momentum: Probability = 0.99
    hidden: Count = 2048
    output: Count = 256


@dataclass(frozen=True, config=STRICT)
class VICRegLSettings:
    """`stride`: of the grid, in pixels; null: the encoder's last. `whole_weight`: alpha, the share of the
    pooled features' loss. `matches`: of cells, by features of the first and of the second view. The other
    weights as of VICReg; `hidden` and `output`: widths of both projections."""

    name: Literal["vicregl"] = "vicregl"
    stride: Count | None = None
    whole_weight: Probability = 0.75
    matches: tuple[Count, Count] = (20, 4)
    hidden: Count = 2048
    output: Count = 2048
    invariance: NonNegative = 25.0
    variance: NonNegative = 25.0
    covariance: NonNegative = 1.0


@dataclass(frozen=True, config=STRICT)
class DetConSettings:
    """`structures`: the masks that make the regions, as of S-DVD; background is one. `regions`: drawn per
    view among those it shows, with replacement. `stride`: of the grid, in pixels; null: the encoder's last.
    `hidden` and `output`: widths of the projection."""

    structures: Structures = Field(kw_only=True)
    name: Literal["detcon"] = "detcon"
    temperature: Positive = 0.1
    regions: Annotated[int, Field(ge=2)] = 16
    stride: Count | None = None
    hidden: Count = 2048
    output: Count = 128


class PixPro(nn.Module):
    """`forward(batch, step)` takes two views per item and returns {"loss", "overlap"}; `student` is what gets
    exported."""

    def __init__(self, encoder: nn.Module, settings: PixProSettings, seed: int, steps: int) -> None:
        """`steps`: of the whole training."""
        super().__init__()
        self.student, self.settings, self.steps = encoder, settings, steps
        self.grid = Grid(encoder, settings.stride)

        def projector() -> nn.Module:
            return seeded(
                lambda: nn.Sequential(
                    nn.Conv2d(self.grid.width, settings.hidden, 1, bias=False),
                    nn.BatchNorm2d(settings.hidden),
                    nn.ReLU(inplace=True),
                    nn.Conv2d(settings.hidden, settings.output, 1),
                ),
                seed,
                "pixpro projector",
            )

        self.projector = projector()
        self.transform = seeded(
            lambda: nn.Conv2d(settings.output, settings.output, 1), seed, "pixpro transform"
        )
        copies = {"encoder": copy.deepcopy(encoder), "projector": projector()}
        self.teacher = Teacher(copies, self._students())

    def _students(self) -> dict[str, nn.Module]:
        return {"encoder": self.student, "projector": self.projector}

    def forward(self, batch: ViewBatch, step: int) -> dict[str, torch.Tensor]:
        images = batch.images.flatten(0, 1).contiguous(memory_format=torch.channels_last)
        x = self.projector(self.grid.map(self.student, images))  # (2B, D, h, w)
        g = self.transform(x)
        with torch.no_grad():
            z = self.teacher["projector"](self.grid.map(self.teacher["encoder"], images))
        alike = near_cells(batch.affine, x.shape[2:], self.settings.distance)  # (B, hw, hw)
        with torch.autocast(x.device.type, enabled=False):
            x, g, z = (part.float().flatten(2).mT for part in (x, g, z))  # (2B, hw, D)
            y = propagated(x, g, self.settings.gamma)
            y, z = (nn.functional.normalize(part, dim=2).unflatten(0, (-1, 2)) for part in (y, z))
            found = [
                agreement(y[:, 0], z[:, 1], alike),
                agreement(y[:, 1], z[:, 0], alike.mT),
            ]
        return {"loss": -(found[0] + found[1]), "overlap": alike.flatten(1).any(1).float().mean()}

    def after_step(self, step: int) -> None:
        """The teacher follows."""
        self.teacher.follow(self._students(), cosine(step, self.steps, self.settings.momentum, 1.0))


def propagated(x: torch.Tensor, g: torch.Tensor, gamma: float) -> torch.Tensor:
    """The pixel propagation module (Xie et al. 2021, equation 3): y_i = sum_j max(cos(x_i, x_j), 0)^gamma g_j
    of cells x and their transforms g, (B, N, D) each."""
    unit = nn.functional.normalize(x, dim=2)
    similarity = (unit @ unit.mT).clamp_min(0)
    return similarity.pow(gamma) @ g


def agreement(y: torch.Tensor, z: torch.Tensor, alike: torch.Tensor) -> torch.Tensor:
    """The mean cosine of unit vectors y, z (B, N, D) over the pairs `alike` (B, N, N) of an image, averaged
    over the images that have any; 0 without."""
    count = alike.sum((1, 2))
    means = ((y @ z.mT) * alike).sum((1, 2)) / count.clamp_min(1)
    return mean_of_all(means.sum(), (count > 0).sum())


def cell_places(affine: torch.Tensor, size: tuple[int, int] | torch.Size) -> torch.Tensor:
    """Where the cells of grids of `size` (h, w) of views with `affine` (..., 2, 3) have their centres in the
    source: (..., h w, 2) float32."""
    return apply(affine.double(), pixel_centres(size, affine.device)).float()


def near_cells(affine: torch.Tensor, size: tuple[int, int] | torch.Size, distance: float) -> torch.Tensor:
    """Which cells of the first and the second view are alike (Xie et al. 2021, equation 1): (B, h w, h w)
    bool for `affine` (B, 2, 2, 3). Distances are in shares of the source's sides."""
    places = cell_places(affine, size)
    height, width = size
    cell = affine[..., :2] * affine.new_tensor([2 / width, 2 / height])  # the cell's sides as columns
    diagonals = torch.stack([cell.sum(-1), cell[..., 0] - cell[..., 1]]).norm(dim=-1).amax(0)  # (B, 2)
    largest = diagonals.amax(1)[:, None, None]
    return torch.cdist(places[:, 0], places[:, 1]) < distance * largest


class VICRegL(nn.Module):
    """`forward(batch, step)` takes two views per item and returns {"loss"}; `student` is what gets
    exported."""

    def __init__(self, encoder: nn.Module, settings: VICRegLSettings, seed: int) -> None:
        super().__init__()
        from lightly.loss import VICRegLLoss

        self.student, self.grid = encoder, Grid(encoder, settings.stride)
        sizes = settings.hidden, settings.output
        self.whole = lightly_head(
            "VICRegProjectionHead", seed, "vicregl whole", feature_size(encoder), *sizes
        )
        self.local = lightly_head(
            "VicRegLLocalProjectionHead", seed, "vicregl local", self.grid.width, *sizes
        )
        self.loss = VICRegLLoss(
            settings.invariance,
            settings.variance,
            settings.covariance,
            alpha=settings.whole_weight,
            gather_distributed=True,
            num_matches=settings.matches,
        )

    def forward(self, batch: ViewBatch, step: int) -> dict[str, torch.Tensor]:
        images = batch.images.flatten(0, 1).contiguous(memory_format=torch.channels_last)
        cells, pooled, size = self.grid.sized(self.student, images)
        whole, local = self.whole(pooled), self.local(cells)
        places = cell_places(batch.affine, size)  # (B, 2, N, 2)
        with torch.autocast(whole.device.type, enabled=False):
            whole = whole.float().unflatten(0, (-1, 2))
            local = local.float().unflatten(1, size).unflatten(0, (-1, 2))  # (B, 2, h, w, D)
            features = [(whole[:, view], local[:, view]) for view in (0, 1)]
            grids = [places[:, view].unflatten(1, size) for view in (0, 1)]
            return {"loss": self.loss(features, grids).squeeze()}

    def after_step(self, step: int) -> None:
        """Nothing moves outside the optimiser."""


class DetCon(nn.Module):
    """DetConS. `forward(batch, step)` takes two views per item with their labels and returns {"loss"};
    `student` is what gets exported."""

    def __init__(self, encoder: nn.Module, settings: DetConSettings, seed: int) -> None:
        super().__init__()
        from lightly.loss import DetConSLoss

        self.student, self.settings, self.seed = encoder, settings, seed
        self.grid = Grid(encoder, settings.stride)
        sizes = self.grid.width, settings.hidden, settings.output
        self.head = lightly_head("SimCLRProjectionHead", seed, "detcon head", *sizes)
        self.loss = DetConSLoss(settings.temperature, gather_distributed=True)

    def forward(self, batch: ViewBatch, step: int) -> dict[str, torch.Tensor]:
        assert batch.labels is not None, "DetCon is given the masks of its views"
        images = batch.images.flatten(0, 1).contiguous(memory_format=torch.channels_last)
        maps = self.grid.map(self.student, images)  # (2B, C, h, w)
        codes = class_codes(batch.labels).flatten(0, 1).clamp_min(0)
        count = len(self.settings.structures) + 1
        pooled, shares = region_means(maps, codes, count)  # (2B, M, C), (2B, M)
        generators = item_generators(batch.position, self.seed, "regions", step)
        shown = (shares > 0).float().cpu().unflatten(0, (-1, 2))
        drawn = torch.cat(
            [
                torch.multinomial(views, self.settings.regions, replacement=True, generator=generator)
                for views, generator in zip(shown, generators, strict=True)
            ]
        ).to(maps.device)  # (2B, R)
        chosen = pooled.gather(1, drawn[..., None].expand(-1, -1, pooled.shape[2]))
        z = self.head(chosen.flatten(0, 1)).unflatten(0, chosen.shape[:2])
        with torch.autocast(z.device.type, enabled=False):
            (first, second), (of_first, of_second) = (
                part.unflatten(0, (-1, 2)).unbind(1) for part in (z.float(), drawn)
            )
            return {"loss": self.loss(first, second, of_first, of_second)}

    def after_step(self, step: int) -> None:
        """Nothing moves outside the optimiser."""


def region_means(maps: torch.Tensor, codes: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean features (B, M, C) of the classes 0..M-1 in maps (B, C, h, w), and the share of the image that
    each covers (B, M). `codes` (B, H, W) long: a cell counts for a class by the share of its pixels."""
    one_hot = nn.functional.one_hot(codes, count).permute(0, 3, 1, 2).float()
    shares = nn.functional.adaptive_avg_pool2d(one_hot, (maps.shape[2], maps.shape[3]))  # (B, M, h, w)
    sums = torch.einsum("bmhw,bchw->bmc", shares, maps.float())
    area = shares.sum((2, 3))
    return (sums / area.clamp_min(1e-6)[..., None]).to(maps.dtype), area / shares[0, 0].numel()

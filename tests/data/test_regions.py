"""Region maps add up to one everywhere and lie where a person would draw them; areas are sums over pixels."""

import math

import numpy as np
import pytest
import torch

from cfssl.data.regions import (
    AreaSpec,
    Layout,
    areas,
    declared_areas,
    factual_maps,
    measure_areas,
    region_maps,
    region_names,
)
from cfssl.errors import UserError
from cfssl.seeds import torch_generator

ALL: tuple[Layout, ...] = ("whole", "thirds", "lungs", "sectors", "rings", "arc")
ROWS, COLUMNS = torch.meshgrid(torch.arange(48.0), torch.arange(40.0), indexing="ij")


def disc(row: float, column: float, radius: float) -> torch.Tensor:
    return torch.hypot(ROWS - row, COLUMNS - column) <= radius


def shapes() -> torch.Tensor:
    """A disc, two lungs, a bent tube with a gap, noise, one pixel, nothing, everything: (7, 48, 40)."""
    tube = (COLUMNS - 20 - 6 * torch.sin(ROWS / 9)).abs() < 4
    tube[20:24] = False
    point = torch.zeros(48, 40, dtype=torch.bool)
    point[0, 39] = True
    noise = torch.rand(48, 40, generator=torch_generator("regions")) > 0.5
    empty = torch.zeros_like(noise)
    two = disc(20, 9, 8) | disc(26, 30, 7)
    return torch.stack([disc(25, 18, 11), two, tube, noise, point, empty, ~empty])


@pytest.mark.parametrize("blend", [0.0, 1.0, 1.5, 3.0])
@pytest.mark.parametrize("layout", ALL)
def test_maps_sum_to_one_at_every_pixel_of_any_mask(layout: Layout, blend: float) -> None:
    maps = region_maps(shapes(), layout, blend=blend)
    assert maps.shape == (7, len(region_names(layout)), 48, 40)
    assert maps.dtype == torch.float32
    assert maps.min() >= 0
    torch.testing.assert_close(maps.sum(dim=1), torch.ones(7, 48, 40), atol=2e-6, rtol=0)


@pytest.mark.parametrize("layout", ALL)
def test_a_map_depends_on_its_own_mask_alone(layout: Layout) -> None:
    together = region_maps(shapes(), layout)
    alone = torch.cat([region_maps(mask[None], layout) for mask in shapes()])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("layout", ALL)
def test_an_empty_mask_is_laid_out_on_the_image(layout: Layout) -> None:
    empty = torch.zeros(1, 48, 40)
    assert torch.equal(region_maps(empty, layout), region_maps(torch.ones(1, 48, 40), layout))


@pytest.mark.parametrize("layout", ALL)
def test_areas_of_all_regions_are_the_area_of_the_structure(layout: Layout) -> None:
    probabilities = torch.rand(7, 48, 40, generator=torch_generator("areas"))
    measured = areas(probabilities, region_maps(shapes(), layout))
    expected = 100 * probabilities.double().mean(dim=(1, 2))
    torch.testing.assert_close(measured.sum(dim=1).double(), expected, atol=1e-4, rtol=0)


def test_areas_are_differentiable_in_the_probabilities_and_their_gradient_is_the_map() -> None:
    maps = region_maps(shapes(), "thirds")
    probabilities = torch.rand(7, 48, 40, generator=torch_generator(1)).requires_grad_()
    areas(probabilities, maps)[:, 1].sum().backward()
    torch.testing.assert_close(probabilities.grad, maps[:, 1] * 100 / (48 * 40))


def test_thirds_part_the_extent_of_the_mask_and_not_the_image() -> None:
    mask = torch.zeros(1, 48, 40)
    mask[0, 10:40, 5:20] = 1
    maps = region_maps(mask, "thirds", blend=1.0)[0, :, :, 0]
    expected = torch.zeros(3, 48)
    expected[0, :20], expected[1, 20:30], expected[2, 30:] = 1, 1, 1
    torch.testing.assert_close(maps, expected)
    torch.testing.assert_close(areas(mask, region_maps(mask, "thirds")), torch.full((1, 3), 150 * 100 / 1920))


def test_a_border_fades_linearly_over_the_blend() -> None:
    upper = region_maps(torch.ones(1, 48, 40), "thirds", blend=4.0)[
        0, 0, :, 0
    ]  # border between rows 15 and 16
    torch.testing.assert_close(upper[13:19], torch.tensor([1.0, 0.875, 0.625, 0.375, 0.125, 0.0]))


def test_the_patients_left_lung_is_on_the_right_of_the_image_and_has_its_own_thirds() -> None:
    mask = torch.zeros(1, 48, 40)
    mask[0, 3:33, 4:16] = 1  # image left, the patient's right
    mask[0, 9:45, 24:34] = 1
    measured = dict(
        zip(region_names("lungs"), areas(mask, region_maps(mask, "lungs"))[0] * 19.2, strict=True)
    )
    for third in ("upper", "middle", "lower"):
        assert measured[f"right_{third}"].item() == pytest.approx(120, abs=1e-3)
        assert measured[f"left_{third}"].item() == pytest.approx(120, abs=1e-3)


def test_lungs_of_different_width_are_parted_at_the_gap_and_not_at_the_centroid() -> None:
    mask = torch.zeros(1, 48, 40)
    mask[0, 6:42, 1:25] = 1
    mask[0, 6:42, 29:35] = 1
    measured = areas(mask, region_maps(mask, "lungs"))[0] * 19.2
    torch.testing.assert_close(measured, torch.tensor([72.0] * 3 + [288.0] * 3), atol=1e-3, rtol=0)


def test_one_lung_alone_still_gives_maps() -> None:
    measured = areas(disc(20, 9, 8)[None], region_maps(disc(20, 9, 8)[None], "lungs"))
    assert torch.isfinite(measured).all()


@pytest.mark.parametrize("parts", [1, 2, 4, 7])
def test_sectors_and_rings_of_a_disc_have_equal_areas(parts: int) -> None:
    grid = torch.arange(96.0) - 47.5
    mask = (torch.hypot(grid[:, None], grid[None]) < 40)[None]
    for layout in ("sectors", "rings"):
        measured = areas(mask, region_maps(mask, layout, parts))[0]
        assert len(measured) == parts == len(region_names(layout, parts))
        assert (measured / measured.mean() - 1).abs().max() < 0.03, layout


def test_sectors_run_clockwise_from_the_top_and_rings_from_within() -> None:
    grid = torch.arange(64.0) - 31.5
    mask = (torch.hypot(grid[:, None], grid[None]) < 28)[None]
    sectors, rings = region_maps(mask, "sectors")[0], region_maps(mask, "rings")[0]
    corners = [(20, 43), (43, 43), (43, 20), (20, 20)]  # row, column
    assert [int(sectors[:, row, column].argmax()) for row, column in corners] == [0, 1, 2, 3]
    # Equal areas: borders at r * sqrt(k / 3).
    for radius, ring in ((5, 0), (15.0, 0), (17.5, 1), (22.0, 1), (24.0, 2), (27, 2)):
        assert int(rings[:, 31, 31 + round(radius)].argmax()) == ring


def test_arc_thirds_have_equal_length_along_a_bent_line() -> None:
    """A line that runs straight for half of its rows and slanted for the rest; oracle: Pythagoras."""
    rows = np.arange(96)
    line = np.where(rows < 48, 20.0, 20.0 + 0.75 * (rows - 48))
    mask = torch.from_numpy(np.abs(np.arange(80)[None] - line[:, None]) <= 4)[None]
    maps = region_maps(mask, "arc", blend=1.0)[0, :, :, 0]
    total = 48 + 48 * math.hypot(1, 0.75)  # 108: thirds of 36
    borders = maps.sum(dim=1).cumsum(0)[:2]
    expected = torch.tensor([total / 3, 48 + (2 * total / 3 - 48) / math.hypot(1, 0.75)])
    torch.testing.assert_close(borders, expected, atol=0.7, rtol=0)


def test_a_gap_in_a_tube_does_not_move_its_arc_thirds() -> None:
    whole = (COLUMNS - 20 - 0.5 * ROWS / 2).abs() < 4
    broken = whole.clone()
    broken[18:30] = False
    torch.testing.assert_close(
        region_maps(broken[None], "arc"), region_maps(whole[None], "arc"), atol=0.15, rtol=0
    )


def test_maps_of_the_factual_mask_stay_while_the_structure_shrinks() -> None:
    """Cut the lower half of a disc away: the upper third keeps its area under the factual map."""
    specs = declared_areas({"blob": "thirds"}, ["blob"])
    factual = disc(24, 20, 12)[None, None].float()
    shrunk = factual.clone()
    shrunk[:, :, 30:] = 0
    maps = factual_maps(factual, ["blob"], specs)
    before, after = (measure_areas(m, ["blob"], specs, maps) for m in (factual, shrunk))
    assert torch.equal(before["blob_upper_area"], after["blob_upper_area"])
    assert after["blob_lower_area"] < 0.5 * before["blob_lower_area"]
    moved = measure_areas(shrunk, ["blob"], specs)
    assert moved["blob_upper_area"] != after["blob_upper_area"]


def test_an_area_may_be_laid_out_on_another_mask() -> None:
    masks = torch.stack([disc(24, 20, 15), disc(12, 20, 3)])[None].float()
    spec = {
        "a": AreaSpec("small", "thirds", "upper", map_from="big"),
        "b": AreaSpec("small", "thirds", "upper"),
    }
    measured = measure_areas(masks, ["big", "small"], spec)
    assert measured["a"].item() == pytest.approx(100 * masks[0, 1].mean().item(), rel=0.1)
    assert measured["b"] < 0.5 * measured["a"]


def test_declared_areas_have_the_names_of_mask_and_region() -> None:
    specs = declared_areas({"lung": "lungs", "heart": "whole"}, ["heart", "lung"])
    assert list(specs)[:2] == ["lung_left_upper_area", "lung_left_middle_area"]
    assert specs["heart_area"] == AreaSpec("heart", "whole", "whole")
    assert AreaSpec(**specs["lung_right_lower_area"].to_json()) == specs["lung_right_lower_area"]


def test_what_does_not_exist_is_refused_with_the_nearest_name() -> None:
    mask = torch.ones(1, 4, 4)
    with pytest.raises(UserError, match="nearest is 'lungs'"):
        region_maps(mask, "lung")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="cannot have 4 parts"):
        region_maps(mask, "thirds", parts=4)
    with pytest.raises(UserError, match="nearest is 'upper'"):
        AreaSpec("lung", "thirds", "uper")
    with pytest.raises(UserError, match="nearest is 'heart'"):
        declared_areas({"haert": "whole"}, ["heart"])
    with pytest.raises(UserError, match="no mask 'lung'"):
        measure_areas(mask[None], ["heart"], {"a": AreaSpec("lung", "whole", "whole")})

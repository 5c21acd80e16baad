"""The interactive page, in a real browser: what lights up is what numpy finds nearest."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chromap_toys import CHANNELS, SIZE, some_views

from cfssl.errors import UserError
from cfssl.seeds import numpy_generator
from cfssl.visualise.chromap import fit, overlay, transform
from cfssl.visualise.chromap_consistency import consistency
from cfssl.visualise.chromap_page import Shown, encoded, write_page
from cfssl.visualise.chromap_views import Views, similarity_map

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
HEIGHT, WIDTH = SIZE
ROUNDING = 0.01  # of cosines between embeddings of 8 bits


def test_the_page_keeps_cosines_to_what_it_says() -> None:
    """Embeddings of 100 channels that lie in 6 dimensions up to a little noise."""
    rng = numpy_generator("codes")
    rows = rng.standard_normal((1000, 6)) @ rng.standard_normal((6, 100)) + 0.01 * rng.standard_normal(
        (1000, 100)
    )
    rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    codes = encoded(rows)
    assert codes.values.dtype == np.int8
    assert codes.values.shape == (1000, 8)
    values = codes.values.astype(np.float64)
    values /= np.linalg.norm(values, axis=1, keepdims=True)
    gap = np.abs(values @ values.T - rows @ rows.T)
    assert codes.error == pytest.approx(np.sqrt(np.mean(gap**2)), rel=0.1)
    assert codes.error < 0.01
    assert codes.largest_error <= gap.max()
    assert codes.median == pytest.approx(np.median(rows @ rows.T), abs=0.03)


@pytest.fixture(scope="module")
def images() -> list[Views]:
    masks = np.zeros((3, *SIZE), int)
    masks[:, 4:12, 2:9] = 1
    names = ["factual", "do(scanner=B)", "do(scanner=<C>)"]
    return [some_views(0, masks=masks, names=names), some_views(1, masks=masks, names=names)]


@pytest.fixture(scope="module")
def page(images: list[Views], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The page in Chromium, with what it asked for and complained of."""
    api = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed: pip install playwright"
    )
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip("there is no Chromium: apt-get install chromium")
    path = tmp_path_factory.mktemp("page") / "chromap.html"
    state = fit(images)
    shown = []
    for name, views in zip(("p1", "p2"), images, strict=True):
        colours = overlay(state, transform(state, views.embeddings), views.images)
        shown.append(Shown(name, views, colours, consistency(state, views, {1: "lung"})))
    found = write_page(path, state, shown, {1: "lung"})
    assert found["dimensions"] == CHANNELS  # none are left out, so that rounding alone is
    options = ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium's sandbox refuses root
    with api.sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=browser, args=options, timeout=300_000)
        opened = chromium.new_page(viewport={"width": 1200, "height": 900})
        opened.set_default_timeout(120_000)
        opened.asked, opened.complaints = [], []
        opened.on("request", lambda request: opened.asked.append(request.url))
        opened.on("console", lambda message: opened.complaints.append(message.text))
        opened.on("pageerror", lambda error: opened.complaints.append(str(error)))
        opened.goto(path.as_uri())
        yield opened
        assert opened.complaints == []
        assert opened.asked == [path.as_uri()]
        chromium.close()


def point_at(page: Any, view: int, x: int, y: int, click: bool = False) -> None:
    page.keyboard.press("Escape")
    stack = page.locator(".stack").nth(view)
    stack.scroll_into_view_if_needed()
    box = stack.bounding_box()
    place = box["x"] + (x + 0.5) / WIDTH * box["width"], box["y"] + (y + 0.5) / HEIGHT * box["height"]
    page.mouse.move(*place)
    if click:
        page.mouse.click(*place)
    settle(page)


def settle(page: Any) -> None:
    """Until what was asked for is drawn."""
    page.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")


def lit(page: Any) -> np.ndarray:
    """(images, views, H, W) bool: pixels with a heat colour."""
    alphas = page.evaluate(
        """() => [...document.querySelectorAll(".stack canvas")].map(canvas => {
            const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
            return Array.from(data).filter((_, place) => place % 4 === 3); })"""
    )
    return (np.array(alphas) > 0).reshape(2, 3, *SIZE)


def marked(page: Any) -> list[dict[str, str]]:
    """What every view says about its nearest pixel."""
    script = "() => [...document.querySelectorAll('figure[data-view]')].map(figure => ({...figure.dataset}))"
    return list(page.evaluate(script))


def test_pointing_at_a_pixel_lights_up_its_nearest_pixels_in_all_views(
    page: Any, images: list[Views]
) -> None:
    for image, view, x, y in ((0, 0, 5, 7), (0, 2, 20, 3), (1, 1, 0, 19)):
        point_at(page, 3 * image + view, x, y)
        true = np.stack(similarity_map(images, (x, y), view, image))
        found, low = lit(page), float(page.inner_text("#low"))
        share = float(page.inner_text("#shown").removesuffix(" %")) / 100
        assert found.mean() == pytest.approx(share, abs=0.002)
        assert low == pytest.approx(np.quantile(true, 1 - share), abs=ROUNDING)
        assert found[true > low + ROUNDING].all()
        assert not found[true < low - ROUNDING].any()
        for place, entry in enumerate(marked(page)):
            one = true[divmod(place, 3)].copy()
            if place == 3 * image + view:  # the nearest pixel elsewhere
                rows, columns = np.indices(SIZE)
                one[np.hypot(columns - x, rows - y) <= 0.1 * max(SIZE)] = -1
            assert one[int(entry["y"]), int(entry["x"])] > one.max() - ROUNDING
            assert float(entry["cosine"]) == pytest.approx(one.max(), abs=ROUNDING)


def test_the_point_is_told_in_words_with_its_class(page: Any) -> None:
    point_at(page, 1, 3, 5)
    assert page.inner_text("#said") == "(3, 5) lung of p1, do(scanner=B)"
    point_at(page, 5, 20, 15)
    assert page.inner_text("#said") == "(20, 15) background of p2, do(scanner=<C>)"


def test_a_click_keeps_the_point_until_it_is_let_go(page: Any) -> None:
    point_at(page, 0, 5, 7, click=True)
    kept = lit(page)
    assert kept.any()
    box = page.locator(".stack").nth(2).bounding_box()
    page.mouse.move(box["x"] + 9, box["y"] + 9)
    settle(page)
    assert (lit(page) == kept).all()
    assert page.inner_text("#said").startswith("Kept: (5, 7)")
    page.click("#free")
    assert not lit(page).any()
    assert page.inner_text("#said") == "No point yet."


def test_the_keyboard_moves_keeps_and_lets_go(page: Any, images: list[Views]) -> None:
    page.mouse.move(1, 1)
    page.locator(".stack").nth(1).focus()
    for key in ("ArrowLeft", "ArrowLeft", "ArrowDown", "Shift+ArrowUp"):  # the first goes to the middle
        page.keyboard.press(key)
    settle(page)
    x, y = WIDTH // 2 - 1, HEIGHT // 2 + 1 - 10
    assert page.inner_text("#said").startswith(f"({x}, {y})")
    true = np.stack(similarity_map(images, (x, y), 1, 0))
    assert true[lit(page)].min() > true[~lit(page)].max() - ROUNDING
    page.keyboard.press("Enter")
    assert page.inner_text("#said").startswith("Kept")
    page.keyboard.press("Escape")
    assert not lit(page).any()


def test_the_slider_sets_how_many_pixels_light_up(page: Any) -> None:
    point_at(page, 0, 5, 7, click=True)
    for value, share in ((100, 1.0), (67, 0.1023), (45, 0.0224)):
        page.evaluate(
            """value => { const slider = document.getElementById("share"); slider.value = value;
            slider.dispatchEvent(new Event("input")); }""",
            value,
        )
        assert lit(page).mean() == pytest.approx(share, abs=0.002)


def test_the_image_can_be_shown_without_colours(page: Any) -> None:
    shown = page.locator(".stack img").first
    before = shown.get_attribute("src")
    page.check("input[value=grey]")
    assert shown.get_attribute("src") != before
    page.check("input[value=colours]")
    assert shown.get_attribute("src") == before


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_legible_in_light_and_dark(page: Any, scheme: str) -> None:
    """Contrast of at least 4.5 (WCAG 2.2, AA) of all text with the ground that it stands on."""
    page.emulate_media(color_scheme=scheme)
    pairs = page.evaluate(
        """() => [...document.querySelectorAll("h1, h2, p, figcaption, small, th, td, kbd, label, #said")]
          .filter(e => e.innerText).map(e => {
            let ground = e;
            while (ground.parentElement && getComputedStyle(ground).backgroundColor === "rgba(0, 0, 0, 0)")
              ground = ground.parentElement;
            return [getComputedStyle(e).color, getComputedStyle(ground).backgroundColor]; })"""
    )

    def luminance(colour: str) -> float:
        rgb = np.array([float(part) for part in colour.split("(")[1].rstrip(")").split(",")[:3]]) / 255
        linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    assert len(pairs) > 20
    for colours in pairs:
        dark, light = sorted(map(luminance, colours))
        assert (light + 0.05) / (dark + 0.05) >= 4.5, colours


def test_a_volume_has_no_page(tmp_path: Path) -> None:
    volume = Views(np.ones((1, 4, 3, 5, 5)), np.ones((1, 3, 5, 5)))
    with pytest.raises(UserError, match="slices"):
        write_page(tmp_path / "x.html", fit([volume]), [Shown("v", volume, np.ones((1, 3, 5, 5, 3)))])

"""The page as visitors see it, in a real browser. Screenshots are kept in outputs/screenshots."""

import base64
import json
import re
import shutil
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, Download, Locator, Page, expect, sync_playwright

from rad import RADPipeline

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), ""
)
SCREENSHOTS = Path(__file__).parent.parent.parent / "outputs" / "screenshots"
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
LAYOUT_SHIFTS = """
window.shift = 0;
new PerformanceObserver(list => { for (const entry of list.getEntries()) window.shift += entry.value; })
  .observe({type: "layout-shift", buffered: true});
"""
# WCAG's contrast of every visible text with what lies behind it
LOW_CONTRAST = """
() => {
  const rgba = text => { const n = text.match(/[\\d.]+/g).map(Number); return n.length < 4 ? [...n, 1] : n; };
  const light = ([r, g, b]) => [r, g, b].map(v => v / 255)
    .map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
  const behind = node => {
    for (; node; node = node.parentElement) {
      const color = rgba(getComputedStyle(node).backgroundColor);
      if (color[3] > .99) return color;
    }
    return [255, 255, 255, 1];
  };
  const bad = [], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode.parentElement, text = walker.currentNode.textContent.trim();
    const hidden = !node.checkVisibility({opacityProperty: true}) || node.closest("svg, .caption-label");
    if (!text || hidden) continue;
    const [a, b] = [light(rgba(getComputedStyle(node).color)), light(behind(node))].sort((x, y) => y - x);
    if ((a + .05) / (b + .05) < 4.5) bad.push(text.slice(0, 40) + " " + ((a + .05) / (b + .05)).toFixed(1));
  }
  return bad;
}
"""

pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no Chromium is installed: apt-get install chromium")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


def open_page(browser: Browser, served, width: int = 1440, scheme: str = "light") -> Page:
    page = browser.new_page(viewport={"width": width, "height": 1000}, color_scheme=scheme)
    page.set_default_timeout(30_000)
    expect.set_options(timeout=30_000)
    page.add_init_script(LAYOUT_SHIFTS)
    page.goto(served.local_url)
    expect(page.get_by_role("button", name="Inspect", exact=True)).to_be_visible()
    expect(page.get_by_label("Product", exact=True)).to_have_value("Detect automatically")
    return page


@pytest.fixture
def page(browser, served) -> Iterator[Page]:
    page = open_page(browser, served)
    errors = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    yield page
    page.context.close() if len(browser.contexts) > 1 else page.close()
    assert not errors


def screenshot(page: Page, name: str) -> None:
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SCREENSHOTS / f"{name}.png", full_page=True)


def open_tab(page: Page, name: str) -> Locator:
    """Opens a tab, which on a narrow page may hide behind a button; returns what the page shows then."""
    tab = page.get_by_role("tab", name=name, exact=True).first
    if not tab.is_visible():
        page.locator(".overflow-menu > button").first.click()
        tab = page.locator(".overflow-dropdown button", has_text=name)
    tab.click()
    return page.locator("[role=tabpanel]:visible").first


def run_example(page: Page, name: str = "hex nut scratch") -> Locator:
    """Picks an example; returns its verdict."""
    page.get_by_role("button", name=f"Thumbnail {name}").or_(
        page.locator(f"button:has(img[alt='{name}'])")
    ).first.click()
    verdict = page.locator(".verdict").first
    expect(verdict).to_contain_text("Compared with")
    return verdict


def set_rate(page: Page, steps: int) -> None:
    """Moves the alarm by so many steps, with the keyboard."""
    slider = page.locator("#rate")
    slider.focus()
    for _ in range(abs(steps)):
        page.locator("#rate").focus()
        page.keyboard.press("ArrowRight" if steps > 0 else "ArrowLeft")


def download(page: Page, link: Locator) -> Path:
    with page.expect_download() as event:
        link.click()
    received: Download = event.value
    return Path(received.path())


# -- what visitors do -------------------------------------------------------------------------------------------------


def test_ways_to_give_a_picture(page, part):
    """The three buttons, and a file dropped on the picture's place; what is no picture is refused at once."""
    place = page.locator("[role=tabpanel]:visible").first
    for name in ("Upload file", "Capture from camera", "Paste from clipboard"):
        expect(place.get_by_label(name)).to_be_visible()
    content = base64.b64encode(Path(part).read_bytes()).decode()
    for name, data in (("notes.png", ""), ("part.png", content)):
        files = page.evaluate_handle(
            """([name, data]) => {
              const files = new DataTransfer();
              const bytes = Uint8Array.from(atob(data), character => character.charCodeAt(0));
              files.items.add(new File([bytes], name, {type: "image/png"}));
              return files;
            }""",
            [name, data],
        )
        place.locator("button:has-text('Drop a picture here')").first.dispatch_event("drop", {"dataTransfer": files})
        if name == "notes.png":
            expect(page.get_by_text("notes.png is not an image").first).to_be_visible()
    expect(place.locator("img[alt='The picture to inspect']")).to_be_visible()
    page.get_by_role("button", name="Inspect", exact=True).click()
    expect(page.locator(".verdict").first).to_contain_text("product: gravel")


def test_an_example_its_verdict_and_the_alarm(page):
    verdict = run_example(page)
    expect(verdict).to_contain_text("Defect")
    expect(verdict).to_contain_text("of the surface; a good part looks this odd less than 1 time in 2,400.")
    expect(verdict).to_contain_text("product: hex_nut")
    heat = page.locator("img.heat")
    assert heat.evaluate("image => image.naturalWidth > 0 && getComputedStyle(image).opacity") == "0.6"
    page.get_by_label("Opacity of the heat").fill("0.1")
    assert heat.evaluate("image => getComputedStyle(image).opacity") == "0.1"

    set_rate(page, 4)
    expect(verdict).to_contain_text("Alarm set to 20 %")
    set_rate(page, -7)
    expect(verdict).to_contain_text("Alarm set to 0.1 %")

    panel = open_tab(page, "Regions")
    regions = panel.locator("[data-testid^=cell-][data-testid$='-0']").all_inner_texts()
    assert [text.strip() for text in regions] == [str(i + 1) for i in range(len(regions))] and regions
    expect(page.locator("[role=tabpanel]:visible").last.get_by_text("peak", exact=False).first).to_be_visible()
    open_tab(page, "Among good parts")
    expect(page.locator("svg[role=img]").first).to_have_attribute(
        "aria-label", re.compile("Score .* 240 good pictures")
    )


def test_the_verdict_is_that_of_the_picture_shown(page):
    """Another picture while one is scored, and none."""
    verdict = page.locator(".verdict").first
    for name in ("brick stain", "capsule crack"):
        page.locator(f"button:has(img[alt='{name}'])").first.click()
        page.wait_for_timeout(100)
    expect(verdict).to_contain_text("product: capsule")
    page.wait_for_timeout(2000)
    assert "product: capsule" in verdict.inner_text()
    page.get_by_role("button", name="Inspect", exact=True).click()
    page.wait_for_timeout(100)
    page.get_by_label("Clear").or_(page.get_by_label("Remove Image")).first.click()
    page.wait_for_timeout(2500)
    assert "No picture yet" in verdict.inner_text()


def test_files_are_what_they_say(page):
    run_example(page)
    open_tab(page, "Save")
    page.get_by_role("button", name="Save the result").click()
    result = json.loads(download(page, page.locator("a[download$='_result.json']")).read_text())
    assert result["is_anomalous"] and result["category"] == "hex_nut" and result["size"] == [256, 256]
    raw = np.load(download(page, page.locator("a[download$='_map.npy']")))
    deep = np.asarray(Image.open(download(page, page.locator("a[download$='_map.png']"))))
    assert raw.shape == deep.shape == (256, 256) and np.abs(deep / 1024 - 8 - raw.clip(-8, 56)).max() < 0.001
    expected = RADPipeline.from_embedded("synthetic")("rad/pretrained/examples/hex_nut_scratch.png")
    assert np.allclose(raw, expected.anomaly_map[0], atol=1e-3)


def test_why_and_the_restoration(page):
    open_tab(page, "Why")
    expect(page.get_by_text("Inspect a picture in the first tab").first).to_be_visible()
    open_tab(page, "Inspect")
    run_example(page, "paper spot")  # which takes a round of 20 steps
    open_tab(page, "Why")
    levels = page.locator(".flipbook").first
    expect(levels.locator("figure")).to_have_count(4)
    caption, noised = levels.locator(".caption"), levels.locator("img").first
    expect(caption).to_contain_text("t = 201")
    before = noised.get_attribute("src")
    page.get_by_label("Noise level").focus()
    page.keyboard.press("ArrowRight")
    expect(caption).not_to_contain_text("t = 201")
    assert noised.get_attribute("src") != before
    maps = page.locator("figcaption").all_inner_texts()
    assert {"RGB difference", "KL", "feature error", "fused"} <= set(maps)

    page.get_by_role("button", name="Restore this picture").click()
    steps = page.locator(".flipbook").last
    expect(steps.locator(".caption")).to_contain_text("Step 0 of", timeout=120_000)
    first = steps.locator("img").get_attribute("src")
    expect(steps.locator("svg")).to_have_attribute("aria-label", "Distance to good parts")
    steps.get_by_role("button", name="Play").click()
    expect(steps.get_by_role("button", name="Stop")).to_be_visible()
    expect(steps.locator(".caption")).not_to_contain_text("Step 0 of")
    expect(steps.get_by_role("button", name="Play")).to_be_visible()  # it has come to the end
    number, last = steps.locator(".caption").inner_text().split("Step ")[1].split(",")[0].split(" of ")
    assert number == last and steps.locator("img").get_attribute("src") != first
    open_tab(page, "Inspect")
    open_tab(page, "Good version")
    expect(page.get_by_text("Distance to good parts:")).to_be_visible()
    run_example(page, "brick stain")
    expect(page.get_by_text("Distance to good parts:")).to_have_count(0)  # that was the other picture's
    page.get_by_label("Clear").or_(page.get_by_label("Remove Image")).first.click()
    expect(page.locator(".verdict").first).to_contain_text("No picture yet")


@pytest.fixture(scope="module")
def archive(two_category_images, tmp_path_factory) -> tuple[str, str]:
    """Zips of 3 and of 200 pictures; in the first, the second picture has a white patch."""
    folder = tmp_path_factory.mktemp("archives")
    picture = two_category_images[0][-1].copy()
    picture.save(folder / "good.png")
    picture.paste("white", (10, 10, 40, 40))
    picture.save(folder / "bad.png")
    for name, count in (("few", 3), ("many", 200)):
        with zipfile.ZipFile(folder / f"{name}.zip", "w") as file:
            for number in range(count):
                file.write(folder / ("bad.png" if number == 1 else "good.png"), f"{number:03d}.png")
    return str(folder / "few.zip"), str(folder / "many.zip")


def test_a_batch(page, archive, tmp_path):
    (tmp_path / "notes.txt").write_text("no picture")
    panel = open_tab(page, "Batch")
    panel.locator("input[type=file]").first.set_input_files([archive[0], str(tmp_path / "notes.txt")])
    expect(panel.locator(".file-preview tr")).to_have_count(2)
    panel.get_by_role("button", name="Inspect all").click()
    headline = panel.locator(".verdict").first
    expect(headline).to_contain_text("1 file could not be read")
    table = panel.locator("table").last
    expect(table).to_contain_text("notes.txt is not an image")
    expect(panel.locator("svg[role=img]")).to_have_attribute("aria-label", re.compile("Scores of 3 pictures"))
    expect(panel.locator(".grid-container img").first).to_have_attribute("alt", re.compile("few/001.png"))

    names = panel.locator("[data-testid^=cell-][data-testid$='-0']")
    assert [name.strip() for name in names.all_inner_texts()] == [
        "few/000.png",
        "few/001.png",
        "few/002.png",
        "notes.txt",
    ]
    heading = panel.get_by_role("columnheader", name="score")
    heading.locator(".text").click()
    heading.get_by_label("Open cell menu").click()
    page.get_by_role("menuitem", name="Sort descending").click()
    expect(names.first).to_contain_text("few/001.png")
    panel.get_by_role("button", name="Save results").click()
    rows = json.loads(download(page, panel.locator("a[download='batch.json']")).read_text())["pictures"]
    assert [row["verdict"] == "error" for row in rows] == [False, False, False, True]
    with zipfile.ZipFile(download(page, panel.locator("a[download='maps.zip']"))) as maps:
        assert len(maps.namelist()) == 3
    set_rate(page, 4)
    expect(headline).to_contain_text("Alarm set to 20 %")
    screenshot(page, "batch")


def test_a_long_batch_can_be_cancelled_and_the_page_answers(page, archive):
    panel = open_tab(page, "Batch")
    panel.locator("input[type=file]").first.set_input_files(archive[1])
    expect(panel.locator(".file-preview tr")).to_have_count(1)
    panel.get_by_role("button", name="Inspect all").click()
    headline = panel.locator(".verdict").first
    expect(headline).to_contain_text("of 200 pictures done")
    set_rate(page, 4)
    open_tab(page, "Inspect")
    assert "Defect" in run_example(page).inner_text()  # beside it
    open_tab(page, "Batch")
    panel.get_by_role("button", name="Cancel").click()
    expect(panel.locator("svg[role=img]")).to_be_visible()  # what is done is shown
    time.sleep(1.5)
    said = headline.inner_text()
    time.sleep(1.5)
    assert headline.inner_text() == said and "of 200 pictures done" in said, "it went on"
    assert "Alarm set to 20 %" in said, "the alarm is as it was when the batch began"


def test_a_product_of_ones_own(page, good_images, tmp_path):
    for i, picture in enumerate(good_images):
        picture.save(tmp_path / f"{i:02d}.png")
    files = sorted(str(path) for path in tmp_path.glob("*.png"))
    panel = open_tab(page, "Your product")
    panel.locator("input[type=file]").first.set_input_files(files[:3])
    expect(panel.locator(".file-preview tr")).to_have_count(3)
    panel.get_by_role("button", name="Fit my model").click()
    expect(page.get_by_text("Give at least 10 good pictures, got 3.")).to_be_visible()
    panel.locator("input[type=file]").first.set_input_files(files[3:])
    expect(panel.locator(".file-preview tr")).to_have_count(12)
    panel.get_by_label("Name").fill("brick wall")
    panel.get_by_role("button", name="Fit my model").click()
    expect(panel.locator(".verdict").first).to_contain_text("brick wall: ready")
    expect(panel.locator(".facts")).to_contain_text("of 12")
    expect(page.get_by_label("Model", exact=True)).to_have_value("Yours: brick wall")
    expect(panel.get_by_text("--pretrained_model_name_or_path").first).to_be_visible()
    screenshot(page, "product")
    with zipfile.ZipFile(download(page, panel.locator("a[download='brick-wall.zip']"))) as zipped:
        zipped.extractall(tmp_path)
    assert RADPipeline.from_pretrained(tmp_path / "brick-wall").normality.config.categories == ["brick wall"]

    open_tab(page, "Inspect").locator("input[type=file]").first.set_input_files(files[0])
    page.get_by_role("button", name="Inspect", exact=True).click()
    expect(page.locator(".verdict").first).to_contain_text("Compared with 12 good pictures")
    expect(page.locator(".verdict").first).to_contain_text("product: brick wall")
    expect(page.locator(".verdict").first).to_contain_text("Alarm set to 10 %")  # what a dozen pictures can tell
    expect(page.locator(".verdict").first).to_contain_text("takes 99 good images held out, 87 more")


def test_models(page, hub, pipeline):
    panel = open_tab(page, "Models")
    expect(panel.locator(".facts")).to_contain_text("brick, gravel")
    page.get_by_label("Model", exact=True).click()
    page.get_by_role("option", name="Magnetic tiles (MTD)").click()
    expect(panel.locator(".facts")).to_contain_text("Magnetic Tile Defects")
    expect(panel.locator(".card").first).to_contain_text("Limits")
    panel.get_by_label("Hub id").fill("user/nothing")
    panel.get_by_role("button", name="Load from the Hub").click()
    expect(page.get_by_text("There is no folder or Hub repository 'user/nothing', or it is private")).to_be_visible()
    pipeline.push_to_hub("user/parts", token="hf_user")
    panel.get_by_label("Hub id").fill("user/parts")
    panel.get_by_role("button", name="Load from the Hub").click()
    expect(page.get_by_label("Model", exact=True)).to_have_value("user/parts")
    expect(panel.locator(".facts")).to_contain_text("object")
    screenshot(page, "models")


# -- how it looks -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1440])
def test_looks(browser, served, width, scheme):
    page = open_page(browser, served, width, scheme)
    page.wait_for_timeout(500)
    page.evaluate("window.shift = 0")
    run_example(page)
    page.wait_for_timeout(500)
    assert page.evaluate("window.shift") < 0.1, "the layout jumps"
    if width < 640:  # the alarm stays in sight, and the verdict below it
        page.evaluate("scrollTo(0, 1200)")
        page.wait_for_timeout(200)
        assert page.locator(".rate").first.bounding_box()["y"] == pytest.approx(0, abs=1)
        page.evaluate("document.querySelector('.verdict').scrollIntoView({block: 'start'})")
        page.wait_for_timeout(200)
        rate, verdict = (page.locator(name).first.bounding_box() for name in (".rate", ".verdict"))
        assert rate["y"] + rate["height"] <= verdict["y"] + 1
    for name in ("Inspect", "Why", "Batch", "Your product", "Models"):
        open_tab(page, name)
        if name == "Why":
            expect(page.locator(".flipbook figure").first).to_be_visible()
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), f"{name} is wider than the window"
        assert page.evaluate("[...document.images].filter(image => !image.alt).map(image => image.outerHTML)") == []
        assert page.evaluate(LOW_CONTRAST) == [], name
        screenshot(page, f"{name.lower().replace(' ', '-')}-{width}-{scheme}")
    page.close()


def test_everything_is_reached_with_the_keyboard(page):
    reached = set()
    for _ in range(60):
        page.keyboard.press("Tab")
        reached.add(
            page.evaluate("(e => e.getAttribute('aria-label') || e.id || e.innerText)(document.activeElement)")
        )
    for name in ("Model", "Product", "rate", "Inspect", "Why"):
        assert any(name in str(found) for found in reached), f"{name} in {reached}"
    page.get_by_role("tab", name="Why", exact=True).focus()
    page.keyboard.press("Enter")
    expect(page.get_by_role("button", name="Restore this picture")).to_be_visible()

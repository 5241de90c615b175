"""The report in headless Chromium: `pip install -e ".[browser]"`, a Chromium, and `pytest -m browser`."""

from __future__ import annotations

import os
import shutil
import time

import numpy as np
import pytest
from PIL import Image
from stored import NATIVE, save_run

from rcb_lmms.engine.ledger import pack_kept
from rcb_lmms.families.places import split_region
from rcb_lmms.report import gallery, html, statistics
from rcb_lmms.report.sheets import Sheet

pytestmark = pytest.mark.browser

HOSTILE = '<script>document.title="taken"</script><img src=x onerror="document.title=1">'
TARGETS = ["yes", "no"] * 30
# Tokens that RCB keeps of sample n: these two of the image's 4 x 4.
KEPT = [1, 14]


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install -e '.[browser]'")
    # Debian's package or one that PATH has; else the one that `playwright install chromium` fetched.
    path = os.environ.get("RCB_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    with playwright.sync_playwright() as running:
        chromium = running.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield chromium
        chromium.close()


def opened(browser, file, **options):
    """The page, and everything that it says to the console or throws."""
    page, said = browser.new_page(**{"viewport": {"width": 1200, "height": 900}, **options}), []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: None if request.url.startswith(("file:", "data:")) else said.append(request.url))
    page.goto(file.as_uri())
    return page, said


def _answers(flipped: dict[int, str]) -> list[str]:
    return [flipped.get(number, target) for number, target in enumerate(TARGETS)]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """Three runs: unpruned wrong on sample 5; RCB on 0 and 3, with another wrong answer on 5; random on 0 to 39."""
    folder = tmp_path_factory.mktemp("report")
    common = {
        "questions": [HOSTILE if number == 0 else f"Is there object {number}?" for number in range(60)],
        "categories": ["random", "popular", "adversarial"] * 20,
    }
    kept = [[pack_kept(KEPT, NATIVE)]] * 60
    save_run(folder / "runs" / "full", "none", _answers({5: "yes"}), TARGETS, **common)
    rcb = _answers({0: HOSTILE, 3: "yes", 5: "maybe"})
    save_run(folder / "runs" / "rcb", "rcb", rcb, TARGETS, keep=2, kept=kept, **common)
    random = _answers({number: "neither" for number in range(40)})
    save_run(folder / "runs" / "random", "random", random, TARGETS, keep=2, seed=1, kept=kept, **common)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(statistics, "RESAMPLES", 99)
        patch.setattr(gallery.Gallery, "show", _shown)
        yield html.write_report(folder / "runs", folder / "report.html")


def _shown(self, run, task, row, native):
    """The pictures of a sample without its data set: of each pair of questions, an image of its own."""
    pixels = np.random.default_rng(row["doc_id"] // 2).integers(0, 255, (80, 160, 3), dtype=np.uint8)
    boxes = split_region((40, 0, 120, 80), (4, 4))
    return [self._picture(Sheet("x", Image.fromarray(pixels), (0,), (boxes,), ((4, 4),)))]


def numbers(page) -> dict[str, str]:
    terms, values = page.locator("#numbers dt").all_inner_texts(), page.locator("#numbers dd").all_inner_texts()
    return dict(zip(terms, values, strict=True))


def titles(page) -> list[str]:
    return page.locator("#samples h3").all_inner_texts()


def test_it_opens_with_the_numbers_of_a_method_against_the_unpruned_model(browser, report):
    page, said = opened(browser, report)
    assert page.locator("#before option:checked").inner_text() == "unpruned"
    assert page.locator("#after option:checked").inner_text() == "rcb, keep=2"
    assert numbers(page) == {
        "samples": "60",
        "same answer": "95.0%",
        "right to wrong": "2",
        "wrong to right": "0",
        "right before": "98.3%",
        "right after": "95.0%",
    }
    assert titles(page) == [HOSTILE, "Is there object 3?", "Is there object 5?"]
    assert page.title() != "taken"
    assert page.locator("#samples script, #samples img").count() == 0
    assert said == []


def test_filters_and_search_choose_samples(browser, report):
    page, said = opened(browser, report)
    page.select_option("#outcome", "lost")
    assert titles(page) == [HOSTILE, "Is there object 3?"]
    page.select_option("#outcome", "other")
    assert titles(page) == ["Is there object 5?"]
    page.select_option("#outcome", "differ")
    page.select_option("#category", "random")
    assert titles(page) == [HOSTILE, "Is there object 3?"]
    page.fill("#search", "OBJECT 3")
    assert titles(page) == ["Is there object 3?"]
    page.fill("#search", "maybe")
    assert titles(page) == []
    assert page.inner_text("#count") == "0 of 0 samples shown"
    assert said == []


def test_any_two_runs_are_compared(browser, report):
    page, said = opened(browser, report)
    page.select_option("#after", label="random, keep=2, seed=1")
    assert numbers(page)["right to wrong"] == "39"
    assert len(titles(page)) == 24
    page.click("#more")
    assert len(titles(page)) == 40
    assert not page.is_visible("#more")
    page.select_option("#before", label="random, keep=2, seed=1")
    page.select_option("#after", label="rcb, keep=2")
    assert page.locator("#before option:checked").inner_text() == "random, keep=2, seed=1"
    assert (numbers(page)["right to wrong"], numbers(page)["wrong to right"]) == ("0", "37")
    assert said == []


def test_kept_tokens_lie_where_they_lie_on_the_image(browser, report):
    page, _ = opened(browser, report)
    whole, pruned = page.locator("#samples li").nth(1).locator("svg").all()
    assert whole.locator(".pruned").count() == 0
    path = pruned.locator(".pruned").get_attribute("d")
    # Columns of 20 pixels from 40 on, rows of 20: fourteen tokens are dark, and not these two.
    corners = {(40 + 20 * (token % 4), 20 * (token // 4)) for token in range(16) if token not in KEPT}
    assert {tuple(map(float, part.split("H")[0].split())) for part in path.split("M")[1:]} == corners
    assert pruned.get_attribute("viewBox") == "0 0 160 80"
    assert "2 of 16 visual tokens" in page.locator("#samples li").nth(1).inner_text()
    page.uncheck("#overlay")
    assert not pruned.locator(".pruned").is_visible()


def test_it_is_used_by_keyboard_alone(browser, report):
    page, _ = opened(browser, report)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    seen = []
    for _ in range(40):
        page.keyboard.press("Tab")
        seen.append(page.evaluate("document.activeElement.id"))
        if seen[-1] == "after":
            break
    assert {"theme", "benchmark", "before", "after"} <= {*seen}
    page.keyboard.press("ArrowDown")
    assert page.locator("#after option:checked").inner_text() == "random, keep=2, seed=1"
    assert numbers(page)["right to wrong"] == "39"


def test_light_dark_phone_and_print(browser, report):
    background = "getComputedStyle(document.body).backgroundColor"
    light, _ = opened(browser, report, color_scheme="light")
    dark, _ = opened(browser, report, color_scheme="dark")
    assert (light.evaluate(background), dark.evaluate(background)) == ("rgb(255, 255, 255)", "rgb(23, 23, 28)")
    light.click("#theme")
    assert light.evaluate(background) == dark.evaluate(background)
    light.click("#theme")
    assert light.evaluate(background) == "rgb(255, 255, 255)"
    dark.set_viewport_size({"width": 794, "height": 1123})  # A4
    dark.emulate_media(media="print")
    assert dark.evaluate("document.documentElement.scrollWidth") <= 794
    assert dark.evaluate(background) == "rgb(255, 255, 255)"
    assert not dark.is_visible("#controls")
    phone, _ = opened(browser, report, viewport={"width": 360, "height": 740})
    assert phone.evaluate("document.documentElement.scrollWidth") <= 360


def test_a_thousand_samples_open_within_two_seconds(browser, tmp_path, monkeypatch):
    monkeypatch.setattr(statistics, "RESAMPLES", 99)
    monkeypatch.setattr(gallery.Gallery, "show", _shown)
    targets = ["yes"] * 1000
    kept = [[pack_kept([number % 16], NATIVE)] for number in range(1000)]
    save_run(tmp_path / "full", "none", targets, targets)
    for seed in range(1, 7):
        save_run(tmp_path / f"{seed}", "random", ["no"] * 1000, targets, keep=1, seed=seed, kept=kept)
    file = html.write_report(tmp_path, tmp_path / "report.html")
    assert 5e6 < file.stat().st_size < 15e6
    began = time.perf_counter()
    page, said = opened(browser, file)
    page.wait_for_selector("#samples li")
    assert time.perf_counter() - began < 2
    assert page.inner_text("#count") == "24 of 1000 samples shown"
    assert said == []

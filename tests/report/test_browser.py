"""The page in a browser: nothing on the console, nothing wider than the window, sorting and hiding by real clicks."""

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import Browser, chromium

from bench.boards.leaderboard import Stored
from bench.report.page import page

pytestmark = pytest.mark.slow  # a browser has to start
HOSTILE = "<script>document.title = 'broken'</script>_with_a_name_that_is_too_long_for_a_telephone"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    driver = shutil.which("chromedriver")
    if driver is None or not any(map(shutil.which, ("chromium", "google-chrome", "chrome"))):
        pytest.skip("no Chromium with its chromedriver here: install Debian's chromium and chromium-driver")
    with chromium(driver) as started:
        yield started


@pytest.fixture(scope="module")
def file(results: Path, save_run: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    hostile = {"checkpoint_sha256": "e" * 64, "word": HOSTILE}
    save_run(results, HOSTILE, "autoattack", {"apgd-ce": {0: 1, 1: 1, 2: 1}}, hostile)
    clean = {idx: np.full((1, 2, 2), 0.1 * idx + 0.05, dtype=np.float32) for idx in range(8)}
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(page(Stored.read(results), {}, lambda run: clean), encoding="utf-8")
    return path


TABLE = "table[id='digits_Linf-0.2-table-1']"


def cells(browser: Browser, key: str) -> list[str]:
    """The visible cells of a column of the ranked rows, from the top."""
    script = f"""
        const table = document.querySelector("{TABLE}");
        const at = [...table.tHead.rows[0].cells].findIndex((head) => head.dataset.column === "{key}");
        return [...table.tBodies[0].rows].map((row) => row.cells[at]).filter((cell) => cell.offsetWidth)
          .map((cell) => cell.innerText);"""
    found: list[str] = browser.run(script)
    return found


@pytest.mark.parametrize("width", [390, 1400])
@pytest.mark.parametrize("dark", [False, True])
def test_nothing_is_wider_than_the_window_and_nobody_complains(width: int, dark: bool, browser: Browser, file: Path):
    browser.open(file, width, dark=dark)
    browser.run("for (const one of document.querySelectorAll('details')) one.open = true")
    assert browser.run("return document.documentElement.scrollWidth") <= width
    assert browser.run("return document.title") != "broken"
    assert browser.console() == []
    # every picture is there, and no figure is empty
    assert browser.run("return [...document.images].every((image) => image.naturalWidth > 0)")
    assert browser.run("return [...document.querySelectorAll('svg')].every((one) => one.getBBox().width > 50)")
    ink, paper = browser.run(
        "const s = getComputedStyle(document.body); return [s.color, s.backgroundColor]"
        ".map((colour) => Number(colour.match(/\\d+/)[0]))"
    )
    assert (ink > paper) == dark


@pytest.mark.parametrize("width", [390, 1400])
def test_a_click_on_a_head_sorts_ranked_rows_and_another_turns_them_round(width: int, browser: Browser, file: Path):
    browser.open(file, width)
    assert "".join(cells(browser, "rank")) == "123"  # dense, the hostile one, moe
    # robustness: the best first; names: by the alphabet; what is not known comes last, whichever way round
    for key, orders in {"ra_worst": ("123", "321"), "model": ("213", "312"), "rank": ("123", "321")}.items():
        for order in orders:
            browser.click(f"{TABLE} th[data-column='{key}'] button")
            assert "".join(cells(browser, "rank")) == order, key
    for _ in range(2):
        browser.click(f"{TABLE} th[data-column='certified_accuracy'] button")
        assert cells(browser, "certified_accuracy") == ["12.50", "–", "–"]
    sort = browser.run(f"return document.querySelector(\"{TABLE} th[data-column='certified_accuracy']\").ariaSort")
    assert sort == "ascending"
    assert browser.console() == []


@pytest.mark.parametrize("width", [390, 1400])
def test_a_click_hides_a_column_and_shows_another(width: int, browser: Browser, file: Path):
    browser.open(file, width)
    assert cells(browser, "ra") != []
    assert cells(browser, "objective") == []
    browser.click("section[id='digits_Linf-0.2'] .chooser summary")
    for key in ("ra", "objective"):
        browser.click(f"input[data-table='digits_Linf-0.2-table-1'][value='{key}']")
    assert cells(browser, "ra") == []
    assert cells(browser, "objective") == ["at", "–", "at"]
    browser.click("input[data-table='digits_Linf-0.2-table-1'][value='ra']")
    assert len(cells(browser, "ra")) == 3
    assert browser.console() == []


def test_a_models_name_opens_its_details(browser: Browser, file: Path):
    browser.open(file, 1400)
    browser.click(f"{TABLE} tbody a")
    opened = "return document.querySelector(location.hash.replace(/([.])/g, '\\\\$1')).open"
    until = time.monotonic() + 10
    while not (found := browser.run(opened)) and time.monotonic() < until:  # told a little later
        time.sleep(0.05)
    assert found

"""The report page in a real browser: quiet console, full charts, a phone's width, light and dark.

Needs Chromium and its driver (Debian: chromium, chromium-driver); skipped where they are not installed.
"""

import json
import shutil

import pytest

from pipelines.evaluate.report import page
from tests.pipelines.figures import METHODS, REFERENCES, claim, examples, made_up, typed

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="no Chromium with chromedriver here (Debian: chromium, chromium-driver)"
)
PHONE, DESK = 390, 1280
VARIANTS = {
    "full": made_up(examples=examples(), warnings=["only 12 users: the intervals are rough, narrow ones too"]),
    "bare": made_up(
        methods={"none": made_up()["methods"]["none"]},
        verdict=claim({"none": METHODS["none"][:2]}),
        references={},
        groups={},
        reference=None,
        task="a_task_with_a_very_long_name_x",
    ),
    "rouge": json.loads(
        json.dumps(made_up(task="LaMP_5")).replace('"accuracy"', '"rouge1"').replace('"f1"', '"rougeL"')
    ),
    "rating": json.loads(json.dumps(made_up(task="LaMP_3")).replace('"accuracy"', '"mae"').replace('"f1"', '"rmse"')),
}


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    home = tmp_path_factory.mktemp("browser")
    for word in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--hide-scrollbars",  # a phone's lie over the page
        f"--user-data-dir={home}",
    ):
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    root = tmp_path_factory.mktemp("pages")
    return {name: page.write(str(root / name), typed(report))["report.html"] for name, report in VARIANTS.items()}


def show(browser, address: str, width: int, scheme: str = "light") -> None:
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    )
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    )
    browser.get(f"file://{address}")


def contrast(one: list[float], other: list[float]) -> float:
    """WCAG 2 contrast of two colours, each r, g, b of 0 to 255."""

    def light(colour):
        parts = [c / 255 for c in colour[:3]]
        parts = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    high, low = sorted((light(one), light(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


COLOURS = """
const shown = e => getComputedStyle(e), rgb = text => text.match(/[\\d.]+/g).map(Number);
const paper = rgb(shown(document.querySelector('figure')).backgroundColor);
const texts = [...document.querySelectorAll('figure svg text')].map(e => rgb(shown(e).fill));
return {ground: rgb(shown(document.body).backgroundColor), ink: rgb(shown(document.body).color), paper, texts,
        muted: rgb(shown(document.querySelector('figcaption')).color)};
"""
CHARTS = """
return [...document.querySelectorAll('figure')].map(f => { const svg = f.querySelector('svg'), box = svg.getBBox();
  const shown = svg.getBoundingClientRect();
  return {name: f.id, role: svg.getAttribute('role'), width: shown.width, height: shown.height, drawn: box.width,
    marks: [...svg.querySelectorAll('path, use')].filter(m => m.getBoundingClientRect().width > 0 ||
                                                               m.getBoundingClientRect().height > 0).length,
    outside: [...svg.querySelectorAll('text')].filter(t => { const b = t.getBoundingClientRect();
      return b.left < shown.left - 1 || b.right > shown.right + 1 || b.top < shown.top - 1 ||
             b.bottom > shown.bottom + 1; }).map(t => t.textContent),
    smallest: Math.min(...[...svg.querySelectorAll('text')].map(t => t.getBoundingClientRect().height)),
    words: svg.getAttribute('aria-labelledby').split(' ').map(id => document.getElementById(id).textContent),
    rows: f.querySelectorAll('tbody tr').length}; });
"""
WIDE = """
const edge = document.documentElement.clientWidth + 1;
const over = e => !e.closest('svg, details table') && e.getClientRects().length &&
                  e.getBoundingClientRect().right > edge;
return {scroll: document.documentElement.scrollWidth, client: document.documentElement.clientWidth,
        wide: [...document.querySelectorAll('main *')].filter(over).map(e => e.outerHTML.slice(0, 80))};
"""


@pytest.mark.parametrize("name", list(VARIANTS))
@pytest.mark.parametrize("width", [PHONE, DESK])
def test_the_page_is_quiet_full_and_fits(browser, pages, name, width):
    show(browser, pages[name], width)
    assert [entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")] == []
    assert browser.execute_script("return performance.getEntriesByType('resource').map(e => e.name)") == []
    charts = browser.execute_script(CHARTS)
    assert len(charts) == (2 if name == "bare" else 6)
    for chart in charts:
        assert chart["role"] == "img" and all(len(words) > 10 for words in chart["words"]), chart
        assert chart["width"] > 200 and chart["height"] > 80 and chart["drawn"] > 200, chart
        assert chart["marks"] >= 3 and chart["rows"] >= 1 and chart["outside"] == [], chart
        assert chart["smallest"] >= 9, chart
    for summary in browser.find_elements("css selector", "summary"):  # clicked through
        summary.click()
    assert all(table.is_displayed() for table in browser.find_elements("css selector", "details table"))
    found = browser.execute_script(WIDE)
    assert found["wide"] == [] and found["scroll"] <= found["client"] == width
    tables = browser.find_elements("css selector", "table.headline tbody")
    rows = [len(table.find_elements("css selector", "tr")) for table in tables]
    assert rows == ([1] if name == "bare" else [len(METHODS), len(REFERENCES)])


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark_are_readable(browser, pages, scheme):
    show(browser, pages["full"], DESK, scheme)
    colours = browser.execute_script(COLOURS)
    assert (sum(colours["ground"][:3]) < 150) == (scheme == "dark")
    assert contrast(colours["ink"], colours["ground"]) > 7 and contrast(colours["muted"], colours["paper"]) > 4.5
    assert len(colours["texts"]) > 50
    on_marks = [text for text in colours["texts"] if contrast(text, colours["paper"]) < 4.5]
    # only the numbers that stand on coloured bars have the paper's own colour
    assert all(text[:3] == colours["paper"][:3] for text in on_marks)


def test_what_users_wrote_is_shown_as_text_only_when_asked_for(browser, pages):
    show(browser, pages["full"], DESK)
    assert len(browser.find_elements("css selector", ".example")) == 10
    assert browser.find_elements("css selector", ".example b") == []
    assert "<b>romance</b>" in browser.find_element("css selector", ".example").text
    show(browser, pages["rouge"], DESK)
    assert browser.find_elements("css selector", ".example") == []

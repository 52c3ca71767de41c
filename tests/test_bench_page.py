"""The report of a benchmark in a browser."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from benchmarked import results
from browsers import browsing, seen_at
from selenium import webdriver

from mlxspec.bench.report.writing import write_report

# The contrast of every visible text with what is behind it (WCAG 2, relative luminance).
CONTRAST = """
const part = (v) => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
const light = (c) => c.map(part).reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
const rgb = (text) => text.match(/[\\d.]+/g).slice(0, 3).map(Number);
const paper = light(rgb(getComputedStyle(document.body).backgroundColor));
const seen = [...document.querySelectorAll("p, dt, dd, h1, h2, td, th, text, li, summary, a")]
  .filter((one) => one.checkVisibility() && !one.matches(".again > :first-child"));
return Math.min(...seen.map((one) => {
  const style = getComputedStyle(one);
  const ink = light(rgb(one.namespaceURI.endsWith("svg") ? style.fill : style.color));
  return (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05);
}));
"""
# Texts that reach out of the page, or out of their own drawing.
OUTSIDE = """
const wide = document.documentElement.clientWidth;
return [...document.querySelectorAll("svg text, td, th, p, dd")]
  .filter((one) => one.checkVisibility() && !one.closest("thead"))
  .filter((one) => {
    const box = one.getBoundingClientRect();
    return box.left < -0.5 || box.right > wide + 0.5;
  }).map((one) => one.textContent);
"""
# Pairs of texts in one drawing that lie upon each other.
TOUCHING = """
const found = [];
for (const svg of document.querySelectorAll("svg")) {
  if (!svg.checkVisibility()) continue;
  const texts = [...svg.querySelectorAll("text")].map((one) => [one, one.getBoundingClientRect()]);
  texts.forEach(([one, a], i) => texts.slice(i + 1).forEach(([other, b]) => {
    const across = Math.min(a.right, b.right) - Math.max(a.left, b.left);
    const down = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
    if (across > 1 && down > 4) found.push([one.textContent, other.textContent]);
  }));
}
return found;
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    with browsing() as driver:
        *_, path = write_report(results(), tmp_path_factory.mktemp("report"))
        driver.get(path.as_uri())
        yield driver
        assert driver.get_log("browser") == []


@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_scrolls_sideways_or_lies_upon_something_else(page, width):
    seen_at(page, width, dark=False)
    beyond = "const all = document.documentElement; return all.scrollWidth - all.clientWidth"
    assert page.execute_script(beyond) == 0
    assert page.execute_script(OUTSIDE) == []
    assert page.execute_script(TOUCHING) == []
    count = "[...document.querySelectorAll('svg')].filter(one => one.checkVisibility()).length"
    assert page.execute_script(f"return {count} * 2 == document.querySelectorAll('svg').length")


@pytest.mark.parametrize("dark", [False, True])
def test_every_text_stands_out(page, dark):
    seen_at(page, 1280, dark=dark)
    assert page.execute_script(CONTRAST) >= 4.5


def test_letters_keep_their_size_on_a_narrow_page(page):
    size = """
    const text = [...document.querySelectorAll("text.tick")].find((one) => one.checkVisibility());
    const scale = text.ownerSVGElement.getScreenCTM().a;
    return parseFloat(getComputedStyle(text).fontSize) * scale;
    """
    for width in (1280, 390):
        seen_at(page, width, dark=False)
        assert 11 <= page.execute_script(size) <= 14


def test_paper_gets_all_tables_and_dark_ink_whatever_the_scheme(page):
    seen_at(page, 1280, dark=True)
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    hidden = """
    return [...document.querySelectorAll("td")].filter((one) => !one.checkVisibility(
      {contentVisibilityAuto: true, visibilityProperty: true})).length;
    """
    assert page.execute_script(hidden) == 0
    assert page.execute_script("return getComputedStyle(document.body).color") == "rgb(0, 0, 0)"

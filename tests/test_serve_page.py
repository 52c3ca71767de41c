"""The page of the server, in a browser."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from browsers import browsing, seen_at
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait
from servers import Served, served
from talkers import talker

from mlxspec.pairs.loading import load

WAIT_S = 30


class Page:
    """The page in a browser."""

    def __init__(self, driver: webdriver.Chrome) -> None:
        self.driver = driver

    def open(self, url: str, *, width: int = 1280, dark: bool = False) -> None:
        """The page, once that of the test before is gone."""
        self.driver.get("about:blank")
        self.complaints()
        seen_at(self.driver, width, dark=dark)
        self.driver.get(url)

    def __call__(self, name: str) -> WebElement:
        return self.driver.find_element(By.ID, name)

    def all(self, selector: str) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def text(self, selector: str) -> str:
        return self.run(f"return document.querySelector('{selector}').textContent")

    def run(self, script: str) -> Any:
        return self.driver.execute_script(script)

    def set(self, **values: object) -> None:
        """Give fields their values."""
        for name, value in values.items():
            self.driver.execute_script(
                "document.getElementById(arguments[0]).value = arguments[1]", name, str(value)
            )

    def until(self, holds: Callable[[], object]) -> None:
        WebDriverWait(self.driver, WAIT_S, 0.05).until(lambda _: holds())

    def until_ready(self) -> None:
        self.until(lambda: self.text("#state") == "ready")

    def until_over(self) -> None:
        self.until(lambda: not self("stop").is_displayed())

    def complaints(self) -> list[str]:
        """What the console has against the page since the last call."""
        return [one["message"] for one in self.driver.get_log("browser")]


@pytest.fixture(scope="module")
def browser() -> Iterator[webdriver.Chrome]:
    with browsing() as driver:
        yield driver


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with served(measures=True) as one:
        yield one


@pytest.fixture
def page(browser: webdriver.Chrome, server: Served) -> Iterator[Page]:
    one = Page(browser)
    one.open(server.url)
    one.until_ready()
    yield one
    assert one.complaints() == []


def test_a_text_arrives_in_the_colours_of_its_authors(page: Page, server: Served) -> None:
    page.set(prompt="def fibonacci(n):", tokens=40, proposals=3)
    page("go").click()
    page.until(lambda: "limit" in page.text("#lane .said"))
    page.until_over()
    body = {"prompt": "def fibonacci(n):", "max_tokens": 40, "temperature": 0}
    with server.client() as client:
        answer = client.post("/v1/completions", json=body).json()
    assert page.text("#lane .text") == answer["choices"][0]["text"]
    assert page.all("#lane .by-draft")
    assert page.all("#lane .by-target")
    drawn = page.all("#lane .by-draft")[0]
    assert "underline" in drawn.value_of_css_property("text-decoration")
    assert re.search(r"\d tok/s[\d.]+ × plain", page.text("#lane dd"))
    assert page.all("#rounds rect")
    assert page.text("#positions .rate").endswith("%")
    page.until(lambda: "Tokens written" in page.text("#totals"))
    assert page.all("#curve polyline")


def test_a_chat_has_its_reasoning_apart_and_follows_what_is_expected(
    browser: webdriver.Chrome,
) -> None:
    page = Page(browser)
    with served(lambda: talker("<think>hm</think>a b c d e f g h")) as server:
        page.open(server.url)
        page.until_ready()
        page.set(prompt="0", expected="a b c d e f g h", proposals=4)
        page("go").click()
        page.until(lambda: "by itself" in page.text("#lane .said"))
        assert page.text("#lane .thinks") == "hm"
        assert page.text("#lane .text") == "hma b c d e f g h"
        assert page.all("#lane .by-prediction")
        assert page.complaints() == []


def test_a_race_of_two_settings_ends_in_the_same_tokens(page: Page) -> None:
    page("tab-race").click()
    page.set(tokens=24, first="off", second="3")
    page("go").click()
    page.until_over()
    assert page.text("#verdict").startswith("Same tokens: all 24")
    assert page.text("#lane-first .text") == page.text("#lane-second .text")


def test_a_race_shows_the_first_difference(page: Page) -> None:
    page("tab-race").click()
    page.set(tokens=24, temperature=1.5, seed=5, first="off", second="3")
    page("go").click()
    page.until_over()
    found = re.match(r"First difference: token (\d+) of (\d+)", page.text("#verdict"))
    assert found
    first, second = (page.text(f"#lane-{one} .text") for one in ("first", "second"))
    pairs = enumerate(zip(first, second, strict=False))
    same = next(place for place, (one, other) in pairs if one != other)
    for lane, text in (("first", first), ("second", second)):
        marked = "".join(one.get_attribute("textContent") for one in page.all(f"#lane-{lane} mark"))
        assert marked
        assert text[same:].startswith(marked)


@pytest.fixture
def slowed(server: Served) -> Iterator[None]:
    """Rounds so far apart that a text lasts until the page looks at the queue, once a second."""
    watchers = server.service.worker.watchers
    watchers.append(lambda step: time.sleep(0.1))
    yield
    watchers.pop()


@pytest.mark.usefixtures("slowed")
def test_a_text_is_written_and_stopped_by_keyboard(page: Page, server: Served) -> None:
    page("tab-write").send_keys(Keys.ARROW_RIGHT)
    assert page("tab-race").get_attribute("aria-selected") == "true"
    page("tab-race").send_keys(Keys.ARROW_LEFT)
    assert page("write").is_displayed()
    page.set(tokens=3000)
    page("prompt").send_keys(Keys.CONTROL, Keys.ENTER)
    page.until(lambda: page.text("#lane .text"))
    page.until(lambda: page.text("#queue") == "1 running")
    page("stop").send_keys(Keys.ENTER)
    page.until_over()
    assert page.text("#lane .said") == "Stopped."
    page.until(server.is_idle)


def test_what_the_server_refuses_is_told_in_its_words(page: Page) -> None:
    page.set(prompt="x y " * 5000)
    page("go").click()
    page.until(lambda: page.all("#lane .said.wrong"))
    assert "context" in page.text("#lane .said")
    assert all("400" in one for one in page.complaints())


@pytest.mark.parametrize("dark", [False, True])
def test_nothing_is_wider_than_a_phone(page: Page, server: Served, dark: bool) -> None:
    page.open(server.url, width=390, dark=dark)
    page.until_ready()
    for tab in ("write", "race"):
        page(f"tab-{tab}").click()
        assert page.run("return document.documentElement.scrollWidth") <= 390
        assert page("go").is_displayed()
    paper = page.run("return getComputedStyle(document.body).backgroundColor")
    assert (int(paper.split("(")[1].split(",")[0]) < 128) == dark


def test_a_key_is_asked_for_and_kept_for_the_tab_alone(browser: webdriver.Chrome) -> None:
    page = Page(browser)
    with served(key="s3cret") as server:
        page.open(server.url)
        page.until(lambda: page("ask").is_displayed())
        assert page.complaints() == []
        page("key").send_keys("wrong", Keys.ENTER)
        page.until(lambda: page("ask-wrong").is_displayed())
        page("key").send_keys("s3cret", Keys.ENTER)
        page.until_ready()
        assert page.run("return [...Object.values(sessionStorage)]") == ["s3cret"]
        assert page.run("return localStorage.length + document.cookie.length") == 0
        page.set(tokens=8)
        page("go").click()
        page.until(lambda: "limit" in page.text("#lane .said"))
        page.until_over()
        page.driver.refresh()
        page.until_ready()
        page("forget").click()
        assert page("ask").is_displayed()
        assert page.run("return sessionStorage.length") == 0
        assert all("401" in one for one in page.complaints())


def test_a_server_that_loads_says_so(browser: webdriver.Chrome) -> None:
    goes_on = threading.Event()

    def make() -> Any:
        goes_on.wait(WAIT_S)
        return load()

    page = Page(browser)
    with served(make, wait=False) as server:
        page.open(server.url)
        page.until(lambda: page.text("#state") == "is loading its models")
        goes_on.set()
        page.until_ready()
        assert page.complaints() == []


def test_the_page_needs_nothing_from_elsewhere(server: Served) -> None:
    with server.client() as client:
        answer = client.get("/")
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"
    without_names = answer.text.replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"https?://| src=|@import|url\(| on[a-z]+=\"| style=\"", without_names)

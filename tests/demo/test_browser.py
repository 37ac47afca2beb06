"""The page in a real browser. Needs Chromium and its driver (Debian: chromium chromium-driver)."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.webdriver import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

from cots.model.retrieval_model import RetrievalModel
from demo.engine import Engine
from demo.page import EVERYDAY_EXAMPLES
from index.build import build
from tests.demo.conftest import serving

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver on the path")

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update",
)  # fmt: skip


class Page:
    """One browser on the page; what a visitor does and sees."""

    def __init__(self, driver: webdriver.Chrome, address: str) -> None:
        self.driver = driver
        self.address = address

    def open(self, query: str = "", width: int = 1440, height: int = 900, dark: bool = False) -> None:
        screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        self.driver.get(f"{self.address}/{query}")
        self.wait("document.querySelector('.cots .card')")

    def run(self, script: str) -> object:
        return self.driver.execute_script(script)

    def wait(self, condition: str) -> None:
        """Wait until a condition in JavaScript holds and no search is under way."""
        busy = "document.querySelector('.cots[data-busy]')"
        WebDriverWait(self.driver, 30, 0.05).until(lambda _: self.run(f"return Boolean(({condition}) && !{busy})"))

    def one(self, selector: str) -> WebElement:
        return self.driver.find_element(By.CSS_SELECTOR, f".cots {selector}")

    def all(self, selector: str) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, f".cots {selector}")

    def search(self, text: str) -> None:
        box = self.one("input[name=text]")
        box.send_keys(Keys.CONTROL, "a")
        box.send_keys(text, Keys.ENTER)

    def wait_for_results(self) -> None:
        self.wait("document.querySelector('.cots .card .score')")

    def wait_for_message(self) -> str:
        self.wait("!document.querySelector('.cots .message').hidden")
        return self.one(".message").text


@pytest.fixture(scope="module")
def driver() -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM or ""
    for flag in FLAGS:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def page(driver: webdriver.Chrome, address: str) -> Page:
    return Page(driver, address)


def test_nothing_is_asked_of_another_host_and_nothing_fails(page: Page) -> None:
    page.open()
    page.search("a dog")
    page.wait_for_results()
    page.wait("[...document.querySelectorAll('.tile .still')].every((still) => still.complete && still.naturalWidth)")
    events = [json.loads(entry["message"])["message"] for entry in page.driver.get_log("performance")]
    asked = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    assert any("/thumb/" in url for url in asked)
    assert [url for url in asked if not url.startswith((page.address, "data:", "blob:"))] == []
    assert page.driver.get_log("browser") == []


def test_enter_searches_and_the_address_keeps_the_search(page: Page) -> None:
    page.open()
    assert not page.all(".score")
    page.search("a red square")
    page.wait_for_results()
    assert "q=a+red+square" in page.driver.current_url
    assert "encoding" in page.one(".timing").text
    page.driver.back()
    page.wait("!document.querySelector('.cots .score')")
    page.open("?q=a+dog&kind=video")
    page.wait_for_results()
    assert page.one("input[name=text]").get_attribute("value") == "a dog"
    assert {card.get_attribute("data-kind") for card in page.all(".card")} == {"video"}


def test_an_example_searches(page: Page) -> None:
    page.open()
    example = page.one(".examples button")
    words = example.text
    example.click()
    page.wait_for_results()
    assert page.one("input[name=text]").get_attribute("value") == words


def test_captions_cannot_inject_markup(page: Page) -> None:
    page.open()
    page.search("a dog")
    page.wait_for_results()
    (card,) = [card for card in page.all(".card") if card.get_attribute("data-path").endswith("red.png")]
    assert "<script>" in card.find_element(By.CSS_SELECTOR, ".caption").text
    card.find_element(By.CSS_SELECTOR, ".tile").click()
    assert "<script>" in page.one(".viewer-caption").text
    assert page.run("return typeof window.broken") == "undefined"


def test_a_clip_plays_its_moment_in_a_loop_under_the_pointer(page: Page) -> None:
    page.open("?q=a+dog&kind=video")
    page.wait_for_results()
    assert page.run("return [...document.querySelectorAll('.tile video')].every((clip) => !clip.src && clip.muted)")
    video = page.one(".card .tile:has(video)")
    card = page.one(".card:has(video)")
    start, end = float(card.get_attribute("data-start")), float(card.get_attribute("data-end"))
    ActionChains(page.driver).move_to_element(video).perform()
    page.wait("document.querySelector('.tile.playing video')?.currentTime > 0")
    page.run(f"document.querySelector('.tile video').currentTime = {end - 0.3}")
    page.wait(f"document.querySelector('.tile video').currentTime < {end - 0.6}")
    assert page.run("return document.querySelector('.tile video').currentTime") >= start - 0.3
    ActionChains(page.driver).move_to_element(page.one(".brand")).perform()
    page.wait("document.querySelector('.tile video').paused")


def test_more_like_this_from_a_card_and_from_the_viewer(page: Page) -> None:
    page.open()
    for button in (".card .like", ".viewer .viewer-like"):
        first = page.one(".card").get_attribute("data-id")
        if "viewer" in button:
            page.one(".card .tile").click()
        page.run(f"document.querySelector('{button}').click()")
        page.wait(f"location.search === '?like={first}' && document.querySelector('.score')")
        assert first not in {card.get_attribute("data-id") for card in page.all(".card")}
        assert page.one(".token").is_displayed()


def test_a_search_like_an_item_that_was_removed_says_so_without_a_broken_picture(page: Page) -> None:
    for width in (1440, 390):
        page.open(width=width)
        page.driver.get(f"{page.address}/?like=99999")
        page.wait("document.querySelector('.token.gone')")
        assert page.wait_for_message().startswith("What this search starts from is no longer in the gallery")
        assert not page.one(".token img").is_displayed()
        assert page.one(".token-name").text == "Like this"
    page.one(".token-remove").click()
    page.wait("document.querySelector('.cots .card') && !location.search")
    assert not page.one(".token").is_displayed()


def test_a_long_caption_is_read_from_its_beginning(page: Page) -> None:
    page.open()
    page.run("document.querySelector('.cots .card').dataset.caption = 'a long caption '.repeat(200)")
    page.one(".card .tile").click()
    assert page.run("const details = document.querySelector('.details'); return details.scrollHeight > innerHeight")
    assert page.run("return document.querySelector('.details').scrollTop") == 0
    page.run("document.querySelector('.details').scrollTop = 300; document.querySelector('.viewer .next').click()")
    page.run("document.querySelector('.viewer .previous').click()")
    assert page.run("return document.querySelector('.details').scrollTop") == 0


def test_a_file_that_is_gone_is_said_to_be_readably(
    page: Page, media_folder: Path, tiny_model: RetrievalModel, tmp_path: Path
) -> None:
    lost = tmp_path / "lost.png"
    shutil.copy(media_folder / "red.png", lost)
    build([lost, media_folder / "blue.png"], tmp_path / "gallery", tiny_model)
    lost.unlink()
    with serving(Engine(tmp_path / "gallery", tiny_model)) as address:
        bare = Page(page.driver, address)
        bare.open(dark=True)
        bare.wait("document.querySelector('.tile.gone')")
        ink, paper = bare.run(
            "const tile = document.querySelector('.tile.gone');"
            "return [getComputedStyle(tile, '::before').color, getComputedStyle(tile).backgroundColor]"
            ".map((colour) => colour.match(/\\d+/g).map(Number))"
        )
        assert sum(paper) - sum(ink) > 300
        bare.one(".tile.gone").click()
        bare.wait("document.querySelector('.stage p')")
        assert bare.one(".stage p").text == "This file is no longer there."
        assert not bare.one(".viewer-open").is_displayed()
        bare.run("document.querySelector('.viewer :is(.next, .previous):not(:disabled)').click()")
        bare.wait("document.querySelector('.stage img')?.naturalWidth")
        assert bare.one(".viewer-open").is_displayed()


def test_back_leaves_a_search_that_was_asked_twice(page: Page) -> None:
    page.open()
    page.search("a dog")
    page.wait_for_results()
    page.search("a dog")
    page.wait_for_results()
    page.driver.back()
    page.wait("!location.search && !document.querySelector('.cots .score')")
    assert "?" not in page.driver.current_url


def test_a_long_name_of_a_source_stays_on_a_narrow_screen(page: Page) -> None:
    page.open("?q=a+dog", 390, 844)
    page.wait_for_results()
    page.one(".refine").click()
    edges = page.run(
        "return [...document.querySelectorAll('.field :is(input, select)')].map((field) => {"
        "const { left, right } = field.getBoundingClientRect(); return [left, right]; })"
    )
    assert len(edges) == 3
    assert len({tuple(edge) for edge in edges}) == 1


@pytest.mark.parametrize("width", [1440, 320])
def test_dots_stand_between_the_parts_of_the_timing_line_and_at_no_edge(page: Page, width: int) -> None:
    page.open("?q=a+dog", width, 844)
    page.wait_for_results()
    assert "·" not in page.one(".timing").text
    left, right, parts = page.run(
        "const line = document.querySelector('.timing').getBoundingClientRect();"
        "return [line.left, line.right, [...document.querySelectorAll('.timing span')].map((part) => {"
        "const { left, right, top } = part.getBoundingClientRect();"
        "return [left, right, top, left + parseFloat(getComputedStyle(part, '::before').left)]; })]"
    )
    tops = [top for _, _, top, _ in parts]
    assert (len(set(tops)) == 1) is (width == 1440)
    for place, (start, end, top, dot) in enumerate(parts):
        leads = place == 0 or tops[place - 1] != top
        assert (dot < left) is leads, "the first of a line has its dot outside, where it is clipped"
        assert leads or parts[place - 1][1] < dot < start
        assert end <= right + 0.5


def test_words_of_captions_are_offered_only_where_there_are_captions(
    page: Page, media_folder: Path, tiny_model: RetrievalModel, tmp_path: Path
) -> None:
    page.open()
    page.one(".refine").click()
    assert page.one(".modes").is_displayed()
    build([media_folder / "red.png"], tmp_path, tiny_model)
    with serving(Engine(tmp_path, tiny_model)) as address:
        bare = Page(page.driver, address)
        bare.open()
        bare.one(".refine").click()
        assert not bare.one(".modes").is_displayed()
        assert bare.one(".examples button").text == EVERYDAY_EXAMPLES[0]


def test_an_empty_search_is_answered_by_a_sentence(page: Page) -> None:
    page.open()
    page.search("   ")
    assert page.wait_for_message() == "Type a few words, or drop in a picture, to search."


def test_filters_that_leave_nothing_are_answered_by_a_sentence(page: Page) -> None:
    page.open("?q=a+dog&source=clips")
    page.wait_for_results()
    page.one(".kinds label:nth-of-type(2)").click()
    assert page.wait_for_message() == "No picture from clips matches; choose another kind or source."


def test_a_picture_searches_and_a_broken_one_gets_a_sentence(page: Page, media_folder: Path) -> None:
    page.open()
    upload = page.one("input.file")
    upload.send_keys(str(media_folder / "secret.txt"))
    assert page.wait_for_message().startswith("secret.txt: not an image")
    upload.send_keys(str(media_folder / "blue.png"))
    page.wait_for_results()
    assert page.one(".card").get_attribute("data-path").endswith("blue.png")
    page.one("input[name=text]").send_keys("a square", Keys.ENTER)
    page.wait("location.search === '?q=a+square' && document.querySelector('.score')")
    assert page.one(".token").is_displayed()


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize(("width", "height", "columns"), [(1440, 900, 5), (390, 844, 2)])
def test_the_layout_fits_the_screen_and_follows_the_theme(
    page: Page, width: int, height: int, columns: int, dark: bool
) -> None:
    page.open("?q=a+dog", width, height, dark)
    page.wait_for_results()
    assert page.run("return document.documentElement.scrollWidth") == width
    tops = [card.rect["y"] for card in page.all(".card")]
    assert tops.count(tops[0]) == columns
    red, green, blue = page.run(
        "const canvas = document.createElement('canvas').getContext('2d');"
        "canvas.fillStyle = getComputedStyle(document.body).backgroundColor; canvas.fillRect(0, 0, 1, 1);"
        "return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3)"
    )
    assert (max(red, green, blue) < 60) is dark
    assert not page.all("footer") or not page.one("footer").is_displayed()


def test_all_that_can_be_used_has_a_name(page: Page) -> None:
    page.open("?q=a+dog")
    page.wait_for_results()
    nameless = page.run(
        "return [...document.querySelectorAll('.cots :is(button, a, input, select, img)')]"
        ".filter((part) => !(part.ariaLabel || part.alt || part.textContent.trim() || part.labels?.length"
        " || part.ariaHidden || part.closest('[hidden]'))).map((part) => part.outerHTML)"
    )
    assert nameless == []

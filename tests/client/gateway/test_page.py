"""The web page in a real browser: Chromium without a window, driven by its own chromedriver, over a cluster of its own.

With CLEAVE_WRITE_SCREENSHOTS=1 the pictures of docs/pictures are written anew.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from deploy.local import simulated_policy
from tests.client.gateway.stand import LONG, Running, gateway
from tests.client.gateway.test_exposure import segments
from tests.faults.fleet import until
from tests.faults.puppet import ROOT

selenium = pytest.importorskip("selenium", reason="the page's test needs selenium: pip install selenium")

from selenium.webdriver import Chrome, ChromeOptions, ChromeService  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (BROWSER and DRIVER), reason="the page's test needs a browser: apt install chromium chromium-driver"
)
WIDE, PHONE = (1280, 800), (320, 680)
GROWTHS = """
    window.growths = [];
    new MutationObserver(() => {
      const texts = document.querySelectorAll("#log .assistant .text");
      const now = texts.length ? texts[texts.length - 1].textContent.length : 0;
      if (now > (growths.at(-1) ?? 0)) growths.push(now);
      if (now && window.pressed) {
        document.dispatchEvent(new KeyboardEvent("keydown", { key: window.pressed, bubbles: true }));
        window.pressed = null;
      }
    }).observe(document.getElementById("log"), { childList: true, subtree: true, characterData: true });
"""


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with gateway(tmp_path_factory.mktemp("recorded"), "--record", "--pad-bank", "16MiB") as one:
        until(one.ready)
        yield one
        one.end()


@pytest.fixture(scope="module")
def browser() -> Iterator[Chrome]:
    options = ChromeOptions()
    options.binary_location = str(BROWSER)
    for word in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--hide-scrollbars"):
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = Chrome(options, ChromeService(str(DRIVER)))
    yield driver
    driver.quit()


class Page:
    """A tab with the page."""

    def __init__(self, browser: Chrome, url: str, size: tuple[int, int] = WIDE, scheme: str = "light") -> None:
        self.browser, self.url = browser, url
        self.resize(size)
        feature = {"name": "prefers-color-scheme", "value": scheme}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
        browser.get(url)

    def resize(self, size: tuple[int, int]) -> None:
        metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": size == PHONE}
        self.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    def run(self, script: str) -> Any:
        return self.browser.execute_script(script)

    def one(self, selector: str) -> Any:
        return self.browser.find_element("css selector", selector)

    def text(self, selector: str) -> str:
        return str(self.run(f"return document.querySelector({json.dumps(selector)})?.textContent ?? ''"))

    def shown(self, selector: str) -> bool:
        return bool(self.one(selector).is_displayed())

    def ask(self, text: str, key: str = "") -> None:
        """By keyboard, and wait for the end of the answer; `key` is pressed as soon as there is some of it."""
        until(lambda: self.one("#send").is_enabled() and self.text("#model") != "")
        self.run(GROWTHS + f"window.pressed = {json.dumps(key)};")
        self.one("#message").send_keys(text, Keys.ENTER)
        until(lambda: self.text("#log article:last-child .note") != "")

    def overflow(self) -> int:
        """Pixels that are wider than the screen."""
        return int(self.run("return document.documentElement.scrollWidth - innerWidth"))

    def save(self, path: Path, name: str) -> None:
        """A picture; into docs too, where that is wanted."""
        content = self.browser.get_screenshot_as_png()
        (path / name).write_bytes(content)
        if os.environ.get("CLEAVE_WRITE_SCREENSHOTS") == "1":
            (ROOT / "docs" / "pictures").mkdir(exist_ok=True)
            (ROOT / "docs" / "pictures" / name).write_bytes(content)


@pytest.fixture
def page(recorded: Running, browser: Chrome) -> Iterator[Page]:
    """Afterwards: nothing was asked of another host, and the console has nothing to complain about."""
    browser.get_log("performance"), browser.get_log("browser")
    page = Page(browser, recorded.url + "/")
    yield page
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [one["params"]["request"]["url"] for one in messages if one["method"] == "Network.requestWillBeSent"]
    assert recorded.url + "/page/main.js" in asked
    assert [url for url in asked if not url.startswith(recorded.url + "/")] == []
    assert browser.get_log("browser") == []


def test_an_answer_streams_under_a_red_badge_beside_what_was_recorded(
    page: Page, recorded: Running, tmp_path: Path
) -> None:
    page.ask("What is Cleave?")
    assert len(page.run("return growths")) >= 3  # of the answer, piece by piece
    assert re.search(
        r"\d+ tokens · [\d.]+ tokens/s · [\d,]+ products verified", page.text("#log article:last-child .note")
    )
    assert page.one("#badge").get_attribute("data-state") == "simulated"
    assert "Simulated" in page.text("#badge")
    red, green, blue = map(int, re.findall(r"\d+", page.one("#badge").value_of_css_property("color"))[:3])
    assert red > 2 * max(green, blue)
    until(lambda: page.text("#recorded .words") != "")
    page.ask("And what is a one-time pad?")  # a second turn, which knows the first
    assert page.run("return document.querySelectorAll('#log article').length") == 4
    until(lambda: "tells nothing" in page.text("#computed .reading"))
    words = bytes.fromhex(page.text("#recorded .words"))
    sent = b"".join(words[at : at + 4][::-1] for at in range(0, len(words), 4))  # written as numbers
    assert len(sent) == 96
    assert any(sent in path.read_bytes() for path in segments(recorded))
    assert "one-time" not in page.text("#recorded .reading")
    assert page.run("return document.querySelectorAll('#recorded rect').length") == 64
    assert page.shown("#exchanges tr")
    page.save(tmp_path, "gateway.png")


def test_on_a_phone_nothing_is_wider_than_the_screen(recorded: Running, page: Page, tmp_path: Path) -> None:
    page = Page(page.browser, page.url, PHONE, "dark")
    assert page.overflow() == 0
    assert page.one("#message").value_of_css_property("font-size") == "16px"  # smaller ones make some phones zoom in
    page.ask("What is a one-time pad?")
    until(lambda: page.shown("#exchanges"))
    assert page.overflow() == 0
    page.resize((PHONE[0], 1180))
    page.run("scrollTo(0, 0)")
    page.save(tmp_path, "gateway-phone.png")
    page.one("#badge").send_keys(Keys.ENTER)
    assert page.shown("#verdict")
    assert page.overflow() == 0


def test_the_verdict_opens_by_keyboard(page: Page) -> None:
    until(lambda: page.one("#badge").get_attribute("data-state") == "simulated")
    for _ in range(8):  # back from the message, where the page begins
        if page.run("return document.activeElement.id") != "badge":
            page.browser.switch_to.active_element.send_keys(Keys.SHIFT, Keys.TAB)
    assert page.run("return document.activeElement.id") == "badge"
    page.browser.switch_to.active_element.send_keys(Keys.ENTER)
    assert page.shown("#verdict")
    steps = page.text("#verdict-steps")
    assert "report signature" in steps
    assert "measurement" in steps
    assert "proves nothing" in page.text("#verdict-words")
    page.browser.switch_to.active_element.send_keys(Keys.ESCAPE)
    assert not page.shown("#verdict")
    assert page.run("return document.activeElement.id") == "badge"


def test_escape_stops_an_answer_and_the_chat_goes_on(page: Page) -> None:
    page.ask(LONG, key="Escape")
    assert "stopped" in page.text("#log article:last-child .note")
    assert 0 < len(page.text("#log article:last-child .text")) < 60
    page.ask("What is Cleave?")
    assert "stopped" not in page.text("#log article:last-child .note")
    page.one("#new").click()
    assert page.run("return document.querySelectorAll('#log article').length") == 0


def test_what_is_said_is_text_and_no_html(page: Page) -> None:
    until(lambda: page.text("#model") != "")
    page.one("#message").send_keys("<b>one</b><img src=x>", Keys.SHIFT, Keys.ENTER)
    page.ask("two")
    assert page.text("#log .user .text") == "<b>one</b><img src=x>\ntwo"
    assert page.run("return document.querySelectorAll('#log b, #log img').length") == 0


def test_a_key_is_asked_for_and_nothing_is_sent_unverified(browser: Chrome, tmp_path: Path) -> None:
    policy, key = tmp_path / "policy.toml", tmp_path / "key"
    policy.write_text(simulated_policy.text("ab" * 32, "ab" * 48, "secure-infer", []))
    key.write_text("open-sesame")
    words = ("--connect", "127.0.0.1:1", "--policy", str(policy), "--api-key-file", str(key))
    with gateway(tmp_path, *words) as running:
        until(lambda: running.get("/ready")["step"] is not None)
        page = Page(browser, running.url + "/")
        until(lambda: page.shown("#key"))
        assert not page.shown("#key-refused")
        page.one("#key-value").send_keys("wrong", Keys.ENTER)
        until(lambda: page.shown("#key-refused"))
        page.one("#key-value").send_keys("open-sesame", Keys.ENTER)
        until(lambda: page.one("#badge").get_attribute("data-state") == "none")
        assert "nothing is sent" in page.text("#badge")
        assert not page.one("#send").is_enabled()
        until(lambda: "make gateway" in page.text("#panel-note"))
        assert not page.shown("#panel-body")

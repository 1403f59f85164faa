"""
A real browser without a window: Debian's Chromium, driven by selenium through its own driver.

It resolves no names, so that no page brings anything from outside this machine.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.wait import WebDriverWait

WAIT_SECONDS = 20
ARGUMENTS = (
    *("headless=new", "no-sandbox", "disable-dev-shm-usage", "disable-gpu", "no-first-run"),
    *("disable-background-networking", "disable-component-update", "disable-sync"),
    "host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1, EXCLUDE localhost",
    "force-color-profile=srgb",
)
# Of every text that is shown: what it says, its size, and the contrast to what is behind it, by
# WCAG 2.1. What is behind is the nearest colour that is not seen through.
CONTRAST = """
const light = (colour) => {
  const parts = colour.match(/[\\d.]+/g).slice(0, 3).map((one) => one / 255)
    .map((one) => one <= 0.04045 ? one / 12.92 : ((one + 0.055) / 1.055) ** 2.4);
  return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2];
};
const behind = (element) => {
  for (let one = element; one; one = one.parentElement) {
    const colour = getComputedStyle(one).backgroundColor;
    if (!/, 0\\)$|transparent/.test(colour)) return colour;
  }
  return 'rgb(255, 255, 255)';
};
const found = [];
const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (texts.nextNode()) {
  const element = texts.currentNode.parentElement, said = texts.currentNode.data.trim();
  if (!said || !element.offsetParent && element !== document.body) continue;
  const style = getComputedStyle(element);
  const [a, b] = [light(style.color), light(behind(element))].sort((x, y) => y - x);
  found.push([said, parseFloat(style.fontSize), (a + 0.05) / (b + 0.05)]);
}
return found;
"""


class Chromium:
    """The browser, as a context; its profile is a new one."""

    def __init__(self) -> None:
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            folder = stack.enter_context(
                tempfile.TemporaryDirectory(prefix="kb-chromium-", ignore_cleanup_errors=True)
            )
            options = webdriver.ChromeOptions()
            options.binary_location = shutil.which("chromium") or "chromium"
            for argument in (*ARGUMENTS, f"user-data-dir={folder}"):
                options.add_argument(f"--{argument}")
            options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
            service = Service(shutil.which("chromedriver") or "chromedriver")
            self.driver = webdriver.Chrome(options=options, service=service)
            stack.callback(self.driver.quit)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def url(self) -> str:
        """Where it is."""
        return str(self.driver.current_url)

    @property
    def text(self) -> str:
        """What a person reads."""
        return str(self.driver.find_element(By.TAG_NAME, "body").text)

    def open(self, url: str) -> None:
        """Go to a page, and wait until it is loaded."""
        self.driver.get(url)

    def sign_in(self, url: str, user: str, until: str, *, refuse: bool = False) -> None:
        """
        Do as a person does at the provider, until a page says something.

        Args:
            until: What the last page says.
            refuse: They change their mind.
        """
        self.open(url)
        for _ in range(10):
            if until in self.text:
                return
            for field in self._found("input[name=login]"):
                field.send_keys(user)
                self._found("input[name=password]")[0].send_keys("any")
            page = self.driver.find_element(By.TAG_NAME, "html")
            self._found("a[href*=abort]" if refuse else "button[type=submit]")[0].click()
            WebDriverWait(self.driver, WAIT_SECONDS).until(lambda _, page=page: _is_gone(page))
        raise AssertionError(f"no page says {until!r}")

    def show(self, *, width: int, height: int, dark: bool = False) -> None:
        """Be a screen of that size, in that scheme."""
        size = {"width": width, "height": height, "deviceScaleFactor": 2, "mobile": width < 500}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})

    def picture(self, file: Path) -> None:
        """Write what is on the screen as a PNG."""
        assert self.driver.save_screenshot(str(file))

    def contrasts(self) -> list[tuple[str, float, float]]:
        """Return each text, its size in pixels, and its contrast to what is behind it."""
        return [tuple(one) for one in self.ask(CONTRAST)]

    def ask(self, script: str) -> Any:
        """Return what a script in the page returns."""
        return self.driver.execute_script(script)

    def asked(self) -> list[tuple[str, str]]:
        """Return what was asked for since the last time: of which page, and what."""
        found = []
        for entry in self.driver.get_log("performance"):
            event = json.loads(entry["message"])["message"]
            if event["method"] == "Network.requestWillBeSent":
                found.append((event["params"]["documentURL"], event["params"]["request"]["url"]))
        return found

    def _found(self, selector: str) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)


def _is_gone(page: WebElement) -> bool:
    from selenium.common.exceptions import StaleElementReferenceException

    try:
        page.is_enabled()
    except StaleElementReferenceException:
        return True
    return False

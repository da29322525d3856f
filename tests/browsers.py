"""A real browser: a headless Chromium, and a user of it."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

from tests.servers import missing


@contextmanager
def chromium(profile: Path, *more_arguments: str, rules: str = "") -> Iterator[webdriver.Chrome]:
    """Run a headless Chromium that can reach only this machine. `rules` are rules for the addresses of other hosts."""
    program, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if program is None or driver is None:
        missing("chromium")
    options = webdriver.ChromeOptions()
    options.binary_location = str(program)
    for argument in (
        *("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--window-size=1280,900"),
        *("--disable-background-networking", "--no-first-run", "--disable-component-update"),
        f"--host-resolver-rules={rules}MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
        f"--user-data-dir={profile}",
        *more_arguments,
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=driver))
    try:
        yield browser
    finally:
        browser.quit()


class Reader:
    """A user of the browser."""

    def __init__(self, browser: webdriver.Chrome, address: str) -> None:
        self.browser, self.address = browser, address

    def open(self, path: str) -> None:
        """Open a page."""
        self.browser.get(self.address + path)

    def first(self, selector: str) -> WebElement:
        """Return the first matching element of the page."""
        return self.browser.find_element(By.CSS_SELECTOR, selector)

    def press(self, selector: str) -> None:
        """Click a button or link and wait for the next page."""
        before = self.first("html")
        self.first(selector).click()
        WebDriverWait(self.browser, 10).until(lambda _: self.first("html") != before)

    def log_in(self, password: str) -> None:
        """Log in with a password."""
        self.first("#password").send_keys(password)
        self.press("form button")

    def jobs(self) -> list[str]:
        """Return the ids of the jobs on the page."""
        return [box.get_attribute("value") or "" for box in self.browser.find_elements(By.NAME, "rowid")]

    def message(self) -> str:
        """Return the message about the last action."""
        return self.first(".message").text

    def widths(self, selector: str) -> list[int]:
        """Wait until the pictures are loaded. Return their widths."""
        script = (
            f"return [...document.querySelectorAll('{selector}')].map(image => image.complete && image.naturalWidth)"
        )
        WebDriverWait(self.browser, 10).until(lambda browser: all(browser.execute_script(script)))
        widths: list[int] = self.browser.execute_script(script)
        return widths

    def errors(self) -> list[str]:
        """Return what the browser refused to load or run since the last call, except refused pages."""
        logged = self.browser.get_log("browser")  # type: ignore[no-untyped-call]  # selenium
        return [entry["message"] for entry in logged if entry["level"] == "SEVERE" and "401" not in entry["message"]]

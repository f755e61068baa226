"""A headless Chromium, and a page in it by what a user does."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from conftest import need_module, needs

FLAGS = (
    "headless=new",
    "no-sandbox",
    "disable-gpu",
    "disable-dev-shm-usage",
    "disable-quic",
    "no-first-run",
    "disable-background-networking",
    "disable-component-update",
    "disable-sync",
    "window-size=1280,900",
)
WAIT = 10  # seconds until what the page does by itself must have happened


def start(profile: Path) -> Any:
    """The browser, with nothing from the network; ends the test where there is none."""
    need_module("chromium", "selenium", "selenium is not installed; `pip install selenium`")
    browser, control = shutil.which("chromium"), shutil.which("chromedriver")
    if browser is None or control is None:
        needs("chromium", "no Chromium with its driver; on Debian: `apt-get install chromium chromium-driver`")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for flag in (*FLAGS, f"user-data-dir={profile}"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    started = webdriver.Chrome(options=options, service=Service(control))
    started.set_page_load_timeout(60)
    started.set_script_timeout(30)
    return started


class Page:
    """A page in the browser, by what a user does with it."""

    def __init__(self, driver: Any, path: Path) -> None:
        from selenium.webdriver.common.by import By
        from selenium.webdriver.common.keys import Keys
        from selenium.webdriver.support.ui import WebDriverWait

        self.driver, self.keys, self.css = driver, Keys, By.CSS_SELECTOR
        self.wait = WebDriverWait(driver, WAIT, 0.05)
        for log in ("browser", "performance"):
            driver.get_log(log)
        driver.get("about:blank")
        driver.get(path.as_uri())
        self.url = path.as_uri()

    def find(self, selector: str) -> Any:
        return self.driver.find_element(self.css, selector)

    def all(self, selector: str) -> list[Any]:
        return self.driver.find_elements(self.css, selector)

    def run(self, code: str, *arguments: Any) -> Any:
        return self.driver.execute_script(code, *arguments)

    def until(self, code: str) -> None:
        self.wait.until(lambda _: self.run(f"return {code}"))

    def press(self, *keys: str) -> None:
        from selenium.webdriver.common.action_chains import ActionChains

        ActionChains(self.driver).send_keys(*keys).perform()

    def focused(self) -> Any:
        return self.driver.switch_to.active_element

    def tab_to(self, selector: str, most: int = 40) -> None:
        """Presses Tab until what `selector` names has the focus."""
        for _ in range(most):
            self.press(self.keys.TAB)
            if self.run("return document.activeElement.matches(arguments[0])", selector):
                return
        raise AssertionError(f"{most} times Tab did not lead to {selector}")

    def column(self, table: str, heading: str) -> list[str]:
        """What a column says, from top to bottom, in the rows that are shown."""
        return self.run(
            """const table = document.getElementById(arguments[0]);
            const at = [...table.tHead.rows[0].cells].findIndex((cell) => cell.textContent.trim() === arguments[1]);
            const shown = [...table.tBodies].filter((group) => !group.hidden);
            return shown.map(({ rows }) => rows[0].cells[at].dataset.v ?? rows[0].cells[at].textContent.trim());""",
            table,
            heading,
        )

    def heading(self, table: str, title: str) -> Any:
        return next(th for th in self.all(f"#{table} > thead th") if th.text.split("\n")[0].strip() == title)

    def complaints(self) -> list[str]:
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def requests(self) -> list[str]:
        """Every address that the browser asked for since the page was opened."""
        found = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        return [m["params"]["request"]["url"] for m in found if m["method"] == "Network.requestWillBeSent"]

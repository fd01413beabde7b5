"""Drive the Chromium of this machine, without a browser of the driver's own."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome")
GRAVE = ("serious", "critical")  # axe-core's words for what keeps people out


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Start Chromium once for a module; skip the test where there is none."""
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.skip("there is no Chromium on PATH; install it (Debian: `apt install chromium`)")
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield started
        started.close()


@dataclass(slots=True)
class Opened:
    """Hold a page that is open, with what it complained about and what it asked for."""

    page: Page
    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def find_grave_violations(self) -> list[tuple[str, str]]:
        """Return the rules of axe-core that the page breaks gravely, each with the first element that does."""
        found = Axe().run(self.page).response["violations"]
        return [(of["id"], of["nodes"][0]["html"]) for of in found if of["impact"] in GRAVE]


def open_page(
    browser: Browser, file: Path, *, width: int = 1400, scheme: str = "light", scripts: bool = True
) -> Opened:
    """Open a file in a window of its own."""
    context = browser.new_context(
        viewport={"width": width, "height": 900}, color_scheme=scheme, java_script_enabled=scripts
    )
    opened = Opened(page=context.new_page())
    opened.page.on("console", lambda said: opened.complaints.append(f"{said.type}: {said.text}"))
    opened.page.on("pageerror", lambda error: opened.complaints.append(str(error)))
    opened.page.on("request", lambda request: opened.requests.append(request.url))
    opened.page.goto(file.as_uri())
    return opened

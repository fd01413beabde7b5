"""The documentation's site: it builds without a warning, and its reference has every command and every name."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from browser import browser, open_page  # noqa: F401  a fixture, too

import fuselm
from fuselm.cli.main import app

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-W", "ignore", "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    return folder


def commands(command, name: str = "fuselm") -> list[str]:
    below = getattr(command, "commands", {}).values()
    return [name, *(n for sub in below if not sub.hidden for n in commands(sub, f"{name} {sub.name}"))]


def test_the_reference_has_every_command_and_every_public_name(site):
    page = (site / "reference" / "commands.html").read_text(encoding="utf-8")
    headings = re.findall(r"<h2[^>]*><code>([^<]+)</code>", page)
    assert headings == commands(typer.main.get_command(app))[1:]
    page = (site / "reference" / "api.html").read_text(encoding="utf-8")
    missing = [name for name in fuselm.__all__ if f'id="fuselm.{name}"' not in page]
    assert not missing
    assert page.count("&gt;&gt;&gt; ") >= len(fuselm.__all__)  # examples are shown as code


def test_the_overview_of_the_reference_has_every_command():
    page = (ROOT / "docs" / "reference" / "index.md").read_text(encoding="utf-8")
    listed = {name for cell in re.findall(r"^\| (`.*?) \|", page, re.MULTILINE) for name in re.findall(r"`(\w+)", cell)}
    assert listed == {name.split()[1] for name in commands(typer.main.get_command(app))[1:]}


def test_pages_fetch_nothing_from_elsewhere(site):
    """A page of the site is whole without a network: styles, scripts and figures lie beside it."""
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 10
    for page in pages:
        text = page.read_text(encoding="utf-8")
        loaded = re.findall(r'<(?:script|img|iframe)[^>]*\ssrc="([^"]+)"', text)
        loaded += re.findall(r'<link[^>]*rel="(?:stylesheet|icon|preconnect)"[^>]*href="([^"]+)"', text)
        loaded += re.findall(r'<link[^>]*href="([^"]+)"[^>]*rel="(?:stylesheet|icon|preconnect)"', text)
        assert loaded
        assert not [address for address in loaded if re.match(r"(https?:)?//", address)], page


def test_links_out_of_the_folder_of_documentation_lead_to_copies(site):
    assert (site / "files" / "docs").exists() is False
    security = (site / "security.html").read_text(encoding="utf-8")
    assert 'href="project/SECURITY.html"' in security and (site / "project" / "SECURITY.html").is_file()


def test_the_search_works_in_a_page_that_is_opened_from_a_folder(site, browser):
    opened = open_page(browser, site / "index.html")
    opened.page.locator("input[name=query]").click()
    opened.page.keyboard.type("alignment")
    opened.page.locator(".md-search-result__item").first.wait_for(state="attached", timeout=60_000)
    assert not [address for address in opened.requests if address.startswith("http")]

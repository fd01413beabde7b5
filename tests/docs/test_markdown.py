"""Every page of Markdown: links and anchors lead somewhere, and lists are lists on GitHub and on the site alike."""

import itertools
import re
from pathlib import Path

import markdown_pages
import pytest
from markdown_pages import ROOT

PAGES = markdown_pages.find_pages()
MOST_COLUMNS, MOST_README_LINES = 100, 130
ITEM = re.compile(r"([-*]|\d+\.) ")


def test_the_pages_are_found():
    assert {Path("README.md"), Path("docs/store.md"), Path("examples/corpus/README.md")} <= set(PAGES)


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links_lead_somewhere(page):
    broken = []
    for number, link in markdown_pages.links(page):
        path, _, anchor = link.partition("#")
        target = (ROOT / page.parent / path).resolve() if path else ROOT / page
        if not target.exists():
            broken.append(f"{page}:{number}: {link}: no such file")
        elif anchor and anchor not in markdown_pages.anchors(target.relative_to(ROOT.resolve())):
            broken.append(f"{page}:{number}: {link}: no such heading")
    assert not broken, "\n".join(broken)


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_a_list_has_an_empty_line_before_it(page):
    """Without one GitHub shows a list and the site a paragraph."""
    lines = markdown_pages.lines_of_text(page)
    glued = [
        f"{page}:{number}: {line}"
        for (_, before), (number, line) in itertools.pairwise(lines)
        if ITEM.match(line) and before.strip() and not ITEM.match(before) and not before.startswith(" ")
    ]
    assert not glued, "\n".join(glued)


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_lines_have_at_most_100_columns(page):
    """Tables may have longer lines, because a row cannot be broken; so may code, because some commands cannot."""
    long = [n for n, line in markdown_pages.lines_of_text(page) if len(line) > MOST_COLUMNS and line[0] not in "|#"]
    assert not long, f"{page}: lines {long}"


def test_the_readme_is_short():
    lines = markdown_pages.read(Path("README.md")).splitlines()
    assert len(lines) <= MOST_README_LINES
    assert [line for line in lines if len(line) > MOST_COLUMNS] == []


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_no_sentence_has_two_relative_clauses_with_which(page):
    sentences = [
        (number, sentence)
        for number, text in markdown_pages.paragraphs(page)
        if not text.startswith("|")
        for sentence in re.split(r"(?<=[.:;?!]) ", re.sub(r"`[^`]*`", "code", text))
    ]
    assert not [f"{page}:{n}: {s}" for n, s in sentences if len(re.findall(r"\bwhich\b", s)) > 1]


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_the_table_of_packages_has_all_of_them(page):
    """No package is forgotten, and none that is gone is listed."""
    rows = re.findall(r"^\| `(\w+)` \|", markdown_pages.read(Path(page)), re.MULTILINE)
    folders = {path.parent.name for path in (ROOT / "src" / "fuselm").glob("*/__init__.py")}
    assert set(rows) == folders and len(rows) == len(folders)

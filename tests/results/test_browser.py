"""Test the pages of a real run in Chromium: layout, colours, keyboard, accessibility, and the token view."""

import re

import pytest
from browser import browser, open_page
from page_runs import pages

__all__ = ["browser", "pages"]  # fixtures
PAGES = ("report", "diagnosis", "fidelity", "study", "pruning", "merge")
LARGEST = 2_000_000  # bytes


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1400])
@pytest.mark.parametrize("name", PAGES)
def test_a_page_fits_its_window_and_keeps_nobody_out(browser, pages, name, width, scheme):
    opened = open_page(browser, pages[name], width=width, scheme=scheme)
    assert opened.complaints == []
    assert opened.page.evaluate("document.documentElement.scrollWidth") == width
    assert opened.find_grave_violations() == []
    assert opened.requests == [pages[name].as_uri()]  # nothing from a network
    assert pages[name].stat().st_size < LARGEST
    opened.page.context.close()


@pytest.mark.parametrize("name", PAGES)
def test_a_page_opens_with_its_answer_and_links_to_its_sections(browser, pages, name):
    page = open_page(browser, pages[name]).page
    assert len(page.locator("main header .verdict").first.inner_text()) > 20
    links = page.locator(".contents a").all()
    assert [link.inner_text() for link in links] == page.locator("main > section h2").all_inner_texts()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Enter")
    assert page.evaluate("location.hash") == "#content"


@pytest.mark.parametrize("name", PAGES)
def test_dark_and_light_pages_differ(browser, pages, name):
    shades = [
        open_page(browser, pages[name], scheme=scheme).page.evaluate("getComputedStyle(document.body).backgroundColor")
        for scheme in ("light", "dark")
    ]
    darkness = [sum(map(int, re.findall(r"\d+", shade)[:3])) for shade in shades]
    assert darkness[0] > 700 and darkness[1] < 100


def test_a_page_says_everything_without_scripts_and_on_paper(browser, pages):
    page = open_page(browser, pages["report"], scripts=False).page
    assert page.locator("section svg:visible").count() >= 6
    assert page.get_by_text("The token view needs JavaScript").is_visible()
    printed = open_page(browser, pages["report"], width=720).page  # of A4
    printed.emulate_media(media="print")
    assert printed.evaluate("document.documentElement.scrollWidth") == 720
    assert not printed.locator(".contents").is_visible() and not printed.locator(".choices:visible").count()
    assert printed.locator("section h2:visible").count() == printed.locator("section h2").count()


def test_a_domain_can_be_chosen(browser, pages):
    page = open_page(browser, pages["report"]).page
    chooser = page.locator(".chooser").first
    assert chooser.locator("[data-choice]:visible").get_attribute("data-choice") == "all"
    chooser.get_by_text("french", exact=True).first.click()
    assert chooser.locator("[data-choice]:visible").get_attribute("data-choice") == "french"
    page.keyboard.press("ArrowRight")
    assert chooser.locator("[data-choice]:visible").get_attribute("data-choice") == "python"


@pytest.mark.parametrize("name", ["report", "diagnosis", "study"])
def test_values_of_a_figure_are_told_to_a_pointer_and_to_the_keyboard(browser, pages, name):
    page = open_page(browser, pages[name]).page
    figure = page.locator("svg[tabindex]:visible").first
    figure.focus()
    page.keyboard.press("ArrowRight")
    first = page.locator(".tip").inner_text()
    page.keyboard.press("ArrowRight")
    second = page.locator(".tip").inner_text()
    assert re.search(r"\d\.\d", first) and re.search(r"\d\.\d", second) and first != second
    page.keyboard.press("Escape")
    assert not page.locator(".tip").is_visible()
    figure.locator("circle").first.hover()
    assert re.search(r"\d\.\d", page.locator(".tip").inner_text())


def test_a_table_wider_than_a_phone_scrolls_by_keyboard(browser, pages):
    page = open_page(browser, pages["report"], width=400).page
    region = page.get_by_role("region", name=re.compile("^Held-out text, scrolls"))
    region.focus()
    page.keyboard.press("ArrowRight")
    page.wait_for_function("element => element.scrollLeft > 0", arg=region.element_handle())
    head = region.locator("tbody th").first.bounding_box()
    assert head["x"] >= region.bounding_box()["x"] - 1  # the names of rows stay


def test_a_token_shows_every_distribution_by_pointer_and_by_keyboard(browser, pages):
    opened = open_page(browser, pages["report"], width=1400)
    page = opened.page
    page.select_option("#token-document", label=page.locator("optgroup[label^=training] option").first.inner_text())
    tokens = page.locator("[role=option]")
    tokens.nth(7).click()
    assert page.locator(".token-said").inner_text().startswith("Token 8 of ")
    names = page.locator(".card h3").all_inner_texts()
    assert names == ["own", "other", "fusion", "base", "clm", "fused"]
    assert page.locator(".card li.came").count() >= 3
    page.keyboard.press("ArrowRight")
    assert page.locator(".token-said").inner_text().startswith("Token 9 of ")
    assert page.locator("[role=listbox]").get_attribute("aria-activedescendant") == "token-8"
    page.keyboard.press("End")
    assert page.locator("[role=option][aria-selected=true]").get_attribute("id") == f"token-{tokens.count() - 1}"
    page.keyboard.press("Home")
    page.keyboard.press("ArrowDown")
    boxes = [tokens.nth(n).bounding_box() for n in (0, int(page.locator(".at").get_attribute("id")[6:]))]
    assert boxes[1]["y"] > boxes[0]["y"] and abs(boxes[1]["x"] - boxes[0]["x"]) < 60
    assert opened.complaints == [] and opened.find_grave_violations() == []


def test_what_fusion_saved_is_the_same_in_words_and_in_colour(browser, pages):
    page = open_page(browser, pages["report"]).page
    for rival in ("clm", "base"):
        page.locator(".token-view .choices").get_by_text(rival, exact=True).click()
        page.locator("[role=option]").first.click()
        signs = set()
        for _ in range(20):
            said = page.locator(".token-said").inner_text()
            value = re.search(rf"fused − {rival} = ([−+]\d+\.\d\d) bits", said)[1]
            kind = page.locator("[role=option].at").get_attribute("class").split()
            signs.add(value[0])
            assert ("better" if float(value.replace("−", "-")) <= 0 else "worse") in kind or value[1:] == "0.00"
            page.keyboard.press("ArrowRight")
        assert signs == {"−", "+"}


def test_a_held_out_document_says_that_no_source_was_asked(browser, pages):
    page = open_page(browser, pages["report"]).page
    assert (
        page.locator("#token-document option").first.locator("xpath=..").get_attribute("label") == "held-out documents"
    )
    assert page.locator(".card h3").all_inner_texts() == ["base", "clm", "fused"]
    assert page.get_by_text("Not captured: this document is held out").is_visible()

"""foreign_text.py: text that others wrote is shown and never takes effect, in each language that fuselm writes."""

import html
import io
import json
import unicodedata
import xml.etree.ElementTree as ElementTree

import hypothesis.strategies as st
import yaml
from hypothesis import given
from markdown_it import MarkdownIt

from fuselm.system import foreign_text, terminal

ACTING = "\x00\x07\x08\r\n\t\x1b\x7f\x85\x9b\u061c\u200e\u2028\u2029\u202e\u2066\ufeff\U000e0041\ud800\udcff\uffff"
anything = st.text(st.one_of(st.characters(), st.sampled_from(ACTING + "[]<>&\"'`*_#|~$\\:/@-+.1 ")), max_size=31)
markdown = MarkdownIt("commonmark", {"linkify": False}).enable(["table", "strikethrough"])


def unescaped(text: str) -> str:
    """Return what `escape_controls` made its result from, if that has no backslash."""
    return text.encode("latin-1", "backslashreplace").decode("unicode_escape")


@given(anything)
def test_escaping_leaves_no_acting_character_and_loses_none(text):
    shown = foreign_text.escape_controls(text)
    assert all(unicodedata.category(c) not in ("Cc", "Cs", "Zl", "Zp") for c in shown)
    assert not set(shown) & set(ACTING)
    if "\\" not in text:
        assert unescaped(shown) == text


def test_visible_characters_are_not_changed():
    for text in ("", "Ünïcødé 中文 😀👩‍🚀", "می‌خواهم", "no-break\xa0space", r"C:\x1b"):
        assert foreign_text.escape_controls(text) == text
    assert foreign_text.escape_controls("a\x1b[31m\n\u202eb\ud800") == r"a\x1b[31m\n\u202eb\ud800"
    assert foreign_text.escape_controls("a\n\tb\r", keep="\n\t") == "a\n\tb\\r"
    assert foreign_text.put_on_one_line(" a\r\n  b\tc\x07 ") == r"a b c\x07"


@given(anything)
def test_html_and_xml_show_the_characters_and_make_no_element_of_them(text):
    written = f'<p title="{foreign_text.escape_html(text)}">{foreign_text.escape_html(text)}</p>'
    element = ElementTree.fromstring(written)
    assert element.text or "" == element.get("title") == foreign_text.escape_controls(text)
    assert not list(element)


def shown_by_markdown(source: str) -> str:
    """Return the text of the only paragraph that Markdown makes of a source, which has no element."""
    opening, inline, closing = markdown.parse(source)
    assert (opening.type, closing.type) == ("paragraph_open", "paragraph_close")
    assert {child.type for child in inline.children} <= {"text", "text_special"}, inline.children
    return "".join(child.content for child in inline.children)


@given(anything)
def test_markdown_shows_the_characters_in_a_line_and_in_a_table(text):
    written = foreign_text.escape_markdown(text)
    expected = foreign_text.escape_controls(text)
    assert "\n" not in written
    assert shown_by_markdown(f"x {written} x") == f"x {expected} x"
    if expected.strip() and expected.strip(" ") == expected.strip() and not expected.startswith("    "):
        assert shown_by_markdown(written).strip(" ") == expected.strip(" ")
    tokens = markdown.parse(f"| a | b |\n|---|---|\n| {written} | c |\n")
    cells = [token for token in tokens if token.type == "inline"]
    assert [cell.content for cell in cells[:2]] == ["a", "b"] and len(cells) == 4
    assert "".join(child.content for child in cells[2].children) == expected.strip()


@given(anything)
def test_code_spans_hold_any_characters(text):
    written = foreign_text.write_code(text)
    expected = foreign_text.escape_controls(text)
    if expected:
        children = markdown.parse(f"x {written} x")[1].children
        assert [child.type for child in children] == ["text", "code_inline", "text"]
        assert children[1].content.strip(" ") == expected.strip(" ")


def test_addresses_in_foreign_text_do_not_become_links():
    written = foreign_text.escape_markdown("see https://a.example/x and www.a.example, me@a.example")
    assert "https:/" not in written and "www." not in written and "me@" not in written
    assert html.unescape(written) == "see https://a.example/x and www.a.example, me@a.example"


@given(st.recursive(anything, lambda inner: st.lists(inner) | st.dictionaries(anything, inner), max_leaves=7))
def test_json_is_exact_and_holds_no_acting_character(value):
    for indent in (None, 1):
        written = foreign_text.write_json(value, indent=indent)
        assert not set(written.replace("\n", "")) & set(ACTING)
        written.encode("utf-8")
        assert json.loads(written) == value


def test_escaped_text_is_safe_in_yaml_too():
    name = foreign_text.escape_controls("a\n---\n# x\u202e")
    assert yaml.safe_load(yaml.safe_dump({"name": name}, allow_unicode=True)) == {"name": name}


def printed(*renderables, **options) -> str:
    console = terminal.open_console()
    console.file = io.StringIO()
    console.width = 211
    for renderable in renderables:
        console.print(renderable, **options)
    return console.file.getvalue()


@given(anything)
def test_a_console_prints_strings_as_text_wherever_they_stand(text):
    from rich.table import Table

    shown = foreign_text.escape_controls(text)
    table = Table(text, title=text, caption=text)
    table.add_row(text)
    out = printed(text, table, terminal.make_plain_text(text), soft_wrap=True)
    assert not set(out.replace("\n", "")) & set(ACTING)
    if shown.strip():
        assert out.count(shown.strip()) >= 5


def test_our_own_styles_are_shown():
    console = terminal.open_console()
    assert str(console.render_str("[b]x[/b] :smile:", style="bold")) == "[b]x[/b] :smile:"
    assert console.render_str("x", style="bold").spans

"""Tables of the reference agree with the code that they describe: columns and policies of stores, and all choices."""

import re
from pathlib import Path

import markdown_pages
import pyarrow as pa

from fuselm.alignment.choices import METHODS
from fuselm.fusion.choices import FUNCTIONS
from fuselm.models.chat.variants import DIFFERENCES
from fuselm.sources.interchange import foreign
from fuselm.stores import policies, rounding, rows
from fuselm.system import manifest

STORE = markdown_pages.read(Path("docs/store.md"))


def table_after(page: str, heading: str) -> list[list[str]]:
    """Return the cells of the first table behind a heading, without its head."""
    behind = page[page.index(f"\n{heading}\n") :]
    lines = re.search(r"(?:^\|.*\n)+", behind, re.MULTILINE)[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def describe_type(kind: pa.DataType) -> str:
    inner = kind.value_type if pa.types.is_list(kind) else kind
    name = {"double": "float64", "float": "float32"}.get(str(inner), str(inner))
    return f"list of {name}" if pa.types.is_list(kind) else name


def test_the_page_of_stores_has_every_column_with_its_type():
    shown = {name.strip("`"): kind for name, kind, *_ in table_after(STORE, "## part-NNNNN.parquet")}
    written = {field.name: describe_type(field.type) for field in rows.SCHEMA}
    assert shown == written | {"weights": "list of float32"}  # which only fused stores have


def test_the_page_of_stores_has_every_policy_with_its_defaults():
    shown = {}
    for name, options, _ in table_after(STORE, "## Which entries are kept"):
        values = re.findall(r"`(\w+)` ([\d.]+)", options)
        shown[re.match(r"`(\w+)`", name)[1]] = {option: float(value) for option, value in values}
    assert shown == policies.POLICIES


def test_the_page_of_stores_has_the_grids_and_the_format():
    assert f"multiple of 1/{rounding.ROOTS}" in STORE and f"multiples of 1/{rounding.GOLD_STEPS} nat" in STORE
    assert f"multiple of 1/{rounding.TAIL_ROOTS}" in STORE and f"multiples of 1/{rounding.WEIGHT_STEPS}" in STORE
    assert ["`format`", str(manifest.FORMAT)] in table_after(STORE, "## manifest.json")


def test_pages_have_every_layout_function_and_method():
    assert {name.strip("`") for name, *_ in table_after(STORE, "### Layouts")} == set(foreign.LAYOUTS)
    paper = markdown_pages.read(Path("docs/paper.md"))
    assert {name.strip("`") for name, *_ in table_after(paper, "## Fusion")} == set(FUNCTIONS)
    short = markdown_pages.read(Path("docs/explanation/fuse.md"))
    named = set(re.findall(r"`(\w+)`", " ".join(name for name, _ in table_after(short, "## Other ways"))))
    assert named | {"fixed"} == set(FUNCTIONS)
    alignment = markdown_pages.read(Path("docs/alignment.md"))
    assert all(f"`{method}`" in alignment for method in METHODS)


def test_the_page_of_conversations_has_every_difference():
    page = markdown_pages.read(Path("docs/explanation/conversations.md"))
    assert dict(table_after(page, "## What a template does to a conversation")) == DIFFERENCES

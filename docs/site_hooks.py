"""Complete the site while mkdocs builds it: the reference of commands, and the repository's files that pages link to.

A link that leads out of docs/ works on GitHub and not on a site. So Markdown of the repository's root becomes a page
under project/, and any other file that a page links to is copied to files/.
"""

import os
import posixpath
import re
from pathlib import Path

import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
ROOT_PAGES = ("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")
LINK = re.compile(r"(?<=\]\()(?!https?:|mailto:|#)([^)\s#]+)(#[^)\s]*)?(?=\))")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the page of commands, the root's pages, and every file that a page links to outside of docs/."""
    files.append(File.generated(config, "reference/commands.md", content=describe_commands()))
    for name in ROOT_PAGES:
        text = (ROOT / name).read_text(encoding="utf-8")
        files.append(File.generated(config, f"project/{name}", content=text))
    copied = {path for page in [*files] if page.is_documentation_page() for path in find_files(page)}
    for path in sorted(copied):
        files.append(File.generated(config, f"files/{path}", abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead links that leave docs/ to where their files are on the site."""

    def lead(link: re.Match[str]) -> str:
        target = place_of(resolve(page.file.src_uri, link[1]))
        return os.path.relpath(target, posixpath.dirname(page.file.src_uri) or ".") + (link[2] or "")

    return LINK.sub(lead, markdown)


def find_files(page: File) -> list[str]:
    """Return the files that are no pages and that a page links to, by their paths in the repository."""
    linked = (resolve(page.src_uri, link[1]) for link in LINK.finditer(page.content_string))
    return [path for path in linked if place_of(path) == f"files/{path}" and (ROOT / path).is_file()]


def resolve(page: str, link: str) -> str:
    """Return the path in the repository that a link of a page leads to."""
    at_root = page.startswith("project/")
    return posixpath.normpath(link if at_root else posixpath.join("docs", posixpath.dirname(page), link))


def place_of(path: str) -> str:
    """Return where a path of the repository is on the site."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if path == "README.md":
        return "index.md"
    return f"project/{path}" if path in ROOT_PAGES else f"files/{path}"


def describe_commands() -> str:
    """Write the reference of commands from the command line itself."""
    from fuselm.cli.main import app

    lines = [
        "# Commands",
        "",
        "This page is made from the help of every command. Where a command takes a run file, arguments",
        "such as `train.learning_rate=1e-4` behind it override options of the file.",
    ]
    describe_command(typer.main.get_command(app), "fuselm", lines)
    return "\n".join(lines) + "\n"


def describe_command(command, name: str, lines: list[str]) -> None:
    """Append a section for a command, and then those of the commands below it."""
    context = typer.Context(command, info_name=name)
    if name != "fuselm":
        lines += ["", f"## `{name}`", "", (command.help or "").strip()]
        usage = " ".join([name, *command.collect_usage_pieces(context)])
        lines += ["", "```text", usage, "```"]
        records = [p.get_help_record(context) for p in command.get_params(context)]
        rows = [record for record in records if record and record[0] != "--help"]
        if rows:
            lines += ["", "| argument or option | meaning |", "|---|---|"]
            lines += [f"| {code(left)} | {right.replace('|', chr(92) + '|')} |" for left, right in rows]
    for sub in getattr(command, "commands", {}).values():
        if not sub.hidden:
            describe_command(sub, f"{name} {sub.name}", lines)


def code(text: str) -> str:
    """Return text as code of a table's cell."""
    return "`" + text.replace("|", "\\|") + "`"

"""Read the project's Markdown: its pages, and in a page the headings, links and lines outside of code and tables."""

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
FENCE = re.compile(r"^(?: {0,3})(```+|~~~+)")
LINK = re.compile(r"(?<!!)\[(?:[^\][]|\[[^\]]*\])*\]\(([^)\s]+)\)|!\[[^\]]*\]\(([^)\s]+)\)")


def find_pages() -> list[Path]:
    """Return every Markdown page that git knows or would add, by its path from the root."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", "*.md"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return sorted(Path(line) for line in set(listed) if (ROOT / line).is_file() and not line.startswith("tests/"))


def read(page: Path) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def lines_of_text(page: Path) -> list[tuple[int, str]]:
    """Return the numbered lines that are in no block of code."""
    found, fence = [], None
    for number, line in enumerate(read(page).splitlines(), 1):
        mark = FENCE.match(line)
        if fence is None and mark:
            fence = mark[1]
        elif fence is not None:
            if mark and mark[1].startswith(fence) and line.strip() == mark[1]:
                fence = None
        elif not line.startswith("    "):
            found.append((number, line))
    return found


def paragraphs(page: Path) -> list[tuple[int, str]]:
    """Return the paragraphs and items of lists, each on one line, with the number of its first line."""
    found: list[tuple[int, list[str]]] = []
    before = -1
    for number, line in lines_of_text(page):
        starts = number != before + 1 or not line.strip() or re.match(r"\s*([-*] |\d+\. |#|\||<)", line)
        if line.strip():
            if starts or not found:
                found.append((number, []))
            found[-1][1].append(line.strip())
            before = number
        else:
            before = -1
    return [(number, " ".join(lines)) for number, lines in found]


def links(page: Path) -> list[tuple[int, str]]:
    """Return the links and images of a page that lead to a place in the project."""
    found = []
    for number, text in paragraphs(page):
        plain = re.sub(r"`[^`]*`", lambda code: "x" * len(code[0]), text)
        targets = [link[1] or link[2] for link in LINK.finditer(plain)]
        found += [(number, target) for target in targets if not re.match(r"[a-z]+:", target)]
    return found


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub and the site both make them."""
    found: dict[str, int] = {}
    names = set()
    for _, line in lines_of_text(page):
        if heading := re.match(r"#{1,6} +(.*)", line):
            plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading[1].strip())
            slug = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
            names.add(f"{slug}-{found[slug]}" if slug in found else slug)
            found[slug] = found.get(slug, 0) + 1
    return names

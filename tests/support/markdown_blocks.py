"""Take the blocks of code out of a page of Markdown, and the commands out of a block of shell."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import markdown_pages

BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FILE_NAME = re.compile(r"# (\S+\.ya?ml)\n")


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """Hold a block of code: its language, its text, and its line on the page."""

    language: str
    text: str
    line: int

    @property
    def file_name(self) -> str | None:
        """Return the name of the file that a block shows, which its first line says."""
        return name[1] if self.language == "yaml" and (name := FILE_NAME.match(self.text)) else None


def find_blocks(page: Path) -> list[Block]:
    text = markdown_pages.read(page)
    return [
        Block(language=match[1], text=match[2], line=text.count("\n", 0, match.start()) + 1)
        for match in BLOCK.finditer(text)
    ]


def commands(block: Block) -> Iterator[str]:
    """Yield the commands of a block of shell, without comments, each on one line."""
    for line in block.text.replace("\\\n", " ").splitlines():
        if command := re.sub(r"(^|\s+)#.*$", "", line).strip():
            yield re.sub(r"\s+", " ", command)

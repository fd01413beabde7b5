"""Build the quickstart corpus: 60 short documents in each of five domains, from Debian packages.

    python examples/corpus/build.py [quickstart.jsonl]
    python examples/corpus/build.py --larger [larger.jsonl]

The larger one is training text only, more of the same kinds: some 66,000 SmolLM2 tokens a domain. Its rows say so, so
that a run of both files holds out what a run of the quickstart alone does; and none of it shares a word 8-gram with the
quickstart.jsonl beside this script.

Downloads the packages of `SOURCES` with `apt-get download` into a temporary folder and reads the files out of them;
nothing is installed, and nothing is needed beyond Python and Debian's `apt-get` and `dpkg-deb` (run `apt-get update`
first if the packages are not found). Writes one JSON object a line with `text`, `domain`, `source` (package, version,
file) and `license`. The same package versions give the same bytes.

A document is 500 to 1400 bytes of neighbouring paragraphs of one page, or one function or class. Word 8-grams that
occur twice mark copied text: a document is refused when it shares more than `SHARED` of its own with those already
taken. French and German take different pages, so that no document is the translation of another.
"""

import argparse
import ast
import fnmatch
import html.parser
import json
import os
import random
import re
import subprocess
import tarfile
import tempfile
import textwrap
import unicodedata
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

SEED = 20240601
SMALLEST, LARGEST = 500, 1400  # bytes of a document
SHARED = 0.02  # share of a document's word 8-grams that may occur in earlier documents
MISSING = "\ufffd"  # stands for a power, a footnote or words shown by script only; its paragraph is refused


class Source(NamedTuple):
    """Describe files of a Debian package that give documents of one domain: how many to which corpus."""

    domain: str
    package: str
    count: int
    larger: int
    license: str
    files: str  # patterns of paths below usr, separated by spaces
    skip: str = ""  # likewise; these files are left out
    pages: slice = slice(None)  # of the sorted paths


LIBREOFFICE_SKIP = "*/sbasic/* *main0*.html *menu*.html *license* *00000*"
HANDBOOK_SKIP = "*/index.html */preface.html */foreword.html *acknowledgments* *derivative*"
PYTHON_SKIP = "*/test/* */tests/* */idlelib/* */lib2to3/* */encodings/* */pydoc_data/* */distutils/* */turtledemo/*"
RUST_BOOKS = "book reference nomicon embedded-book edition-guide rustc rustdoc"
RUST = " ".join(f"*/html/{book}/*.html" for book in RUST_BOOKS.split())
RUST_SKIP = "*print.html *contributing* *influences*"
POSTGRESQL_SKIP = "*release* *biblio* *legal*"
SQLITE_SKIP = "*/releaselog/* *copyright* *changes*"
INSTALL_SKIP = "*/index.html */apf.html"
DEVELOPERS_SKIP = "*/developers-reference.html */index.html */search.html"
EVEN, ODD = slice(0, None, 2), slice(1, None, 2)

SOURCES = (
    Source("english", "r-cran-janeaustenr", 60, 293, "LicenseRef-public-domain", "lib/R/*/data/Rdata.rdb"),
    Source("french", "debian-handbook", 34, 58, "CC-BY-SA-3.0", "*/html/fr-FR/*.html", HANDBOOK_SKIP, EVEN),
    Source("french", "libreoffice-help-fr", 26, 104, "MPL-2.0", "*/text/*.html", LIBREOFFICE_SKIP, EVEN),
    Source("french", "installation-guide-amd64", 0, 50, "GPL-2.0-only", "*/fr/*.html", INSTALL_SKIP, EVEN),
    Source("french", "developers-reference-fr", 0, 46, "GPL-2.0-or-later", "*/fr/*.html", DEVELOPERS_SKIP, EVEN),
    Source("german", "debian-handbook", 34, 60, "CC-BY-SA-3.0", "*/html/de-DE/*.html", HANDBOOK_SKIP, ODD),
    Source("german", "libreoffice-help-de", 26, 86, "MPL-2.0", "*/text/*.html", LIBREOFFICE_SKIP, ODD),
    Source("german", "installation-guide-amd64", 0, 44, "GPL-2.0-only", "*/de/*.html", INSTALL_SKIP, ODD),
    Source("german", "developers-reference-de", 0, 36, "GPL-2.0-or-later", "*/de/*.html", DEVELOPERS_SKIP, ODD),
    Source("python", "libpython3.11-minimal", 14, 97, "PSF-2.0", "lib/python3.11/*.py", PYTHON_SKIP),
    Source("python", "libpython3.11-stdlib", 46, 216, "PSF-2.0", "lib/python3.11/*.py", PYTHON_SKIP),
    Source("technical_english", "postgresql-doc-15", 20, 130, "PostgreSQL", "*/html/*.html", POSTGRESQL_SKIP),
    Source("technical_english", "rust-doc", 20, 130, "MIT OR Apache-2.0", RUST, RUST_SKIP),
    Source("technical_english", "sqlite3-doc", 20, 130, "LicenseRef-public-domain", "*/sqlite3/*.html", SQLITE_SKIP),
)

# Frequent words that tell the languages apart: the help pages hold untranslated paragraphs.
WORDS = {
    "english": "the of and to is that for with are this be by from it as you can not was her",
    "french": "le la les un une des du de et est dans pour que qui sur par avec ce au aux en pas ou ne se vous à",
    "german": "der die das und ist ein eine nicht mit den von für auf werden wird im zu sich oder dem des sie als",
}


def run(*command: str | Path, cwd: Path | None = None) -> str:
    """Return the standard output of a command; raise its last line of complaint as a one-line error."""
    try:
        return subprocess.run(command, cwd=cwd, check=True, capture_output=True, text=True).stdout
    except FileNotFoundError:
        raise SystemExit(
            f"build.py: {command[0]}: not found, needed to read Debian packages; run this on Debian or Ubuntu, "
            "or use the quickstart.jsonl beside this script"
        ) from None
    except subprocess.CalledProcessError as error:
        complaint = (error.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise SystemExit(
            f"build.py: {command[-1]}: {command[0]} failed ({complaint}); run `apt-get update` and try again"
        ) from None


def fetch(package: str, sources: list[Source]) -> tuple[str, dict[str, bytes]]:
    """Download a package; return its version, and the files that any source asks for, by their path below usr."""
    with tempfile.TemporaryDirectory() as folder:
        run("apt-get", "download", package, cwd=Path(folder))
        package_file = next(Path(folder).glob("*.deb"))
        return run("dpkg-deb", "-f", package_file, "Version").strip(), read_package(package_file, sources)


def read_package(package_file: Path, sources: list[Source]) -> dict[str, bytes]:
    """Read the files that any of the sources asks for, by their path below usr."""
    contents = {}
    with (
        subprocess.Popen(["dpkg-deb", "--fsys-tarfile", package_file], stdout=subprocess.PIPE) as unpack,
        tarfile.open(fileobj=unpack.stdout, mode="r|") as archive,
    ):
        for member in archive:
            path = member.name.removeprefix("./usr/")
            if member.isfile() and any(wanted(path, source) for source in sources):
                contents[path] = archive.extractfile(member).read()
    return contents


def wanted(path: str, source: Source) -> bool:
    def matches(patterns: str) -> bool:
        return any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns.split())

    return matches(source.files) and not matches(source.skip)


# From files to sections: lists of neighbouring paragraphs.


HEADINGS = {"h1", "h2", "h3", "h4", "h5", "h6"}
NOT_PROSE = {"ul", "ol", "dl", "table", "pre", "blockquote", "nav", "header", "footer", "aside", "img", "object"}
BLOCKS = HEADINGS | NOT_PROSE | {"p", "div", "section", "li", "td"}
EMPTY = {"br", "hr", "img", "input", "link", "meta", "wbr", "base", "col", "area"}  # tags that are never closed
DROPPED = {"script", "style", "sup", "sub", "button", "head"}
DROPPED_CLASSES = {"url", "sidebar", "navheader", "navfooter", "figure", "note", "tip", "warning", "related", "caption"}
DROPPED_CLASSES |= {"toc", "embedded", "howtoget", "relatedtopics"}


class Page(html.parser.HTMLParser):
    """Collect the running paragraphs of an HTML page in `sections`, one for each heading.

    A section ends at the first list, table or listing: what follows it often can't be understood alone.
    """

    def __init__(self, text: str) -> None:
        super().__init__()
        self.sections: list[list[str]] = []
        self.open: list[tuple[str, str]] = []  # tag and role: "dropped", "paragraph", "ignored" or ""
        self.words: list[str] | None = None  # of the open paragraph
        self.ended = False  # the section met something that is not prose
        self.feed(text)
        self.close()
        self.finish()

    def finish(self) -> None:
        if self.words is not None and self.sections and not self.ended:
            self.sections[-1].append(" ".join("".join(self.words).split()))
        self.words = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        classes = set((attributes.get("class") or "").split())
        dropped = tag in DROPPED or "hidden" in attributes or bool(classes & DROPPED_CLASSES)
        inside = {role for _, role in self.open}
        role = "dropped" if dropped else "ignored" if tag in NOT_PROSE else ""
        if not dropped and "dropped" not in inside:
            if tag in BLOCKS:
                self.finish()
            if tag in HEADINGS and "ignored" not in inside:
                self.sections.append([])
                self.ended = False
            if tag in NOT_PROSE:
                self.ended = True
            if (tag == "p" or "para" in classes) and "ignored" not in inside:
                role, self.words = "paragraph", []
        if tag == "br":
            self.handle_data(" ")
        if tag in ("sup", "sub") or "hidden" in attributes:
            self.handle_data(MISSING)
        if tag not in EMPTY:
            self.open.append((tag, role))

    def handle_endtag(self, tag: str) -> None:
        if tag not in (name for name, _ in self.open):
            return
        while True:
            name, role = self.open.pop()
            if role == "paragraph":
                self.finish()
            if name == tag:
                return

    def handle_data(self, data: str) -> None:
        if self.words is not None and not any(role == "dropped" for _, role in self.open):
            self.words.append(data)


def novel_chapters(database: bytes) -> Iterator[tuple[str, list[str]]]:
    """Yield the name and paragraphs of each chapter of the novels in an R database of character vectors.

    The database is a row of zlib streams, each behind its length in four bytes. Inside each, R's serialisation writes
    a character vector as type 16 and a length, then each string as flags, a length and the bytes (all big-endian).
    """
    while database:
        inflate = zlib.decompressobj()
        data = inflate.decompress(database[4:])
        database = inflate.unused_data
        at = data.index(b"\0\0\0\x10") + 8
        lines = []
        while at < len(data):
            length = int.from_bytes(data[at + 4 : at + 8], "big")
            lines.append(data[at + 8 : at + 8 + length].decode())
            at += 8 + length
        paragraphs = [" ".join(paragraph.split()) for paragraph in "\n".join(lines).split("\n\n")]
        chapters: list[list[str]] = []
        for paragraph in filter(None, paragraphs):
            if re.match("(chapter|volume) ", paragraph, re.IGNORECASE):
                chapters.append([])
            elif chapters:
                chapters[-1].append(re.sub(r"\b_|_\b|_(?=\W|$)", "", paragraph))
        for number, chapter in enumerate(filter(None, chapters), start=1):
            yield f"{lines[0].strip().title()}, chapter {number}", chapter


def python_sections(code: str) -> list[list[str]]:
    """Return functions, classes and methods with their decorators; none of a file that has terms of its own."""
    if "copyright" in code.lower():
        return []
    lines = code.splitlines()
    top = [node for node in ast.parse(code).body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    methods = [
        method for node in top if isinstance(node, ast.ClassDef) for method in node.body
        if isinstance(method, ast.FunctionDef)
    ]  # fmt: skip
    sections = []
    for node in [*top, *methods]:
        first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
        text = textwrap.dedent("\n".join(line.rstrip() for line in lines[first - 1 : node.end_lineno]))
        if not text.startswith(" "):  # a string's line at the left margin keeps a method from moving there
            sections.append([text])
    return sections


# From sections to documents.


def is_prose(paragraph: str, language: str) -> bool:
    """Tell whether a paragraph has whole sentences of the language, and no debris of markup or links."""
    words = re.findall(r"\w+", paragraph.lower())
    share = {
        name: sum(word in frequent.split() for word in words) / max(len(words), 1) for name, frequent in WORDS.items()
    }
    debris = r"</?\w|&#?\w+;|https?:|\(\s*\)|\[\s*\]|\s[.,](\s|$)|\.\.\.|[\uFFFD|{}→_]|FIXME|TODO"
    return (
        len(words) >= 8
        and share[language] >= 0.15
        and share[language] >= 2.5 * max(value for name, value in share.items() if name != language)
        and re.match(r"[\"'“«„‘]?\s?[A-ZÀ-ÖØ-Þ]", paragraph) is not None
        and re.search(r"[.!?…][\"'”»“’)]*$", paragraph) is not None
        and not re.search(debris, paragraph)
        and not any(unicodedata.category(character) in ("Cc", "Cf", "Co", "Cn") for character in paragraph)
    )


def cut(section: list[str], language: str | None, chance: random.Random) -> Iterator[str]:
    """Cut documents of the wanted size from neighbouring paragraphs of a section; `language` None is for code."""
    taken: list[str] = []
    least = chance.randint(SMALLEST, 1100)
    for paragraph in section:
        if language and not is_prose(paragraph, language):
            taken = []
            continue
        taken.append(unicodedata.normalize("NFC", paragraph))
        text = "\n\n".join(taken)
        size = len(text.encode())
        if size > LARGEST:
            taken = []
        elif size >= least:
            yield text
            taken, least = [], chance.randint(SMALLEST, 1100)
    text = "\n\n".join(taken)
    if SMALLEST <= len(text.encode()) <= LARGEST:
        yield text


def eight_grams(text: str) -> list[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return [tuple(words[i : i + 8]) for i in range(len(words) - 7)]


def file_documents(path: str, content: bytes, source: Source) -> dict[str, list[str]]:
    """Return the documents of a file by their place: the path below usr, or a novel's chapter."""
    chance = random.Random(f"{SEED} {source.domain} {path}")
    language = {"technical_english": "english", "python": None}.get(source.domain, source.domain)
    if path.endswith(".rdb"):
        places = {chapter: [paragraphs] for chapter, paragraphs in novel_chapters(content)}
    elif path.endswith(".py"):
        places = {path: python_sections(content.decode())}
    else:
        places = {path: Page(content.decode()).sections}
    return {
        place: [text for section in sections for text in cut(section, language, chance)]
        for place, sections in places.items()
    }


def choose(
    places: dict[str, list[str]], count: int, seen: set[tuple[str, ...]], chance: random.Random
) -> Iterator[tuple[str, str]]:
    """Choose `count` documents with their places, if there are so many, in turn from every place.

    Their 8-grams are added to `seen`.
    """
    waiting = {place: chance.sample(texts, len(texts)) for place, texts in sorted(places.items()) if texts}
    while count and waiting:
        for place in chance.sample(sorted(waiting), len(waiting)):
            text = waiting[place].pop()
            if not waiting[place]:
                del waiting[place]
            grams = eight_grams(text)
            repeated = sum(gram in seen for gram in grams) + len(grams) - len(set(grams))
            if repeated <= SHARED * len(grams):
                seen.update(grams)
                yield place, text
                count -= 1
            if not count:
                return


def build(sources: Iterable[Source], apart_from: Iterable[str] = ()) -> list[dict[str, str]]:
    """Return the corpus's rows, sorted by domain and source: `count` of each source that has some.

    None shares an 8-gram with the texts to keep apart from.
    """
    packages: dict[str, list[Source]] = {}
    for source in sources:
        if source.count:
            packages.setdefault(source.package, []).append(source)
    others = {gram for text in apart_from for gram in eight_grams(text)}
    rows, seen = [], set()
    for package, of_package in packages.items():
        version, contents = fetch(package, of_package)
        for source in of_package:
            places: dict[str, list[str]] = {}
            for path in sorted(path for path in contents if wanted(path, source))[source.pages]:
                for place, texts in file_documents(path, contents[path], source).items():
                    places[place] = [text for text in texts if others.isdisjoint(eight_grams(text))]
            chosen = list(choose(places, source.count, seen, random.Random(f"{SEED} {source.domain}")))
            if len(chosen) < source.count:
                raise SystemExit(
                    f"build.py: {package} {version} has {len(chosen)} documents for {source.domain}, not "
                    f"{source.count}; the package has changed, ask `SOURCES` for fewer"
                )
            for place, text in chosen:
                origin = f"{package} {version}: {place}"
                rows.append({"text": text, "domain": source.domain, "source": origin, "license": source.license})
    return sorted(rows, key=lambda row: (row["domain"], row["source"], row["text"]))


def build_larger(quickstart: Path) -> list[dict[str, str]]:
    """Return the larger corpus's rows: training text that keeps apart from the quickstart's."""
    lines = quickstart.read_text(encoding="utf-8").splitlines()
    sources = [source._replace(count=source.larger) for source in SOURCES]
    return [row | {"split": "train"} for row in build(sources, apart_from=[json.loads(line)["text"] for line in lines])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--larger", action="store_true", help="training text beside the quickstart's")
    parser.add_argument(
        "file", nargs="?", type=Path, help="default: quickstart.jsonl or larger.jsonl beside this script"
    )
    asked = parser.parse_args()
    quickstart = Path(__file__).with_name("quickstart.jsonl")
    rows = build_larger(quickstart) if asked.larger else build(SOURCES)
    output = asked.file or (quickstart.with_name("larger.jsonl") if asked.larger else quickstart)
    temporary = output.with_suffix(".partial")
    temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    os.replace(temporary, output)
    for domain in dict.fromkeys(row["domain"] for row in rows):
        sizes = [len(row["text"].encode()) for row in rows if row["domain"] == domain]
        print(f"{domain}: {len(sizes)} documents, {sum(sizes):,} bytes")


if __name__ == "__main__":
    main()

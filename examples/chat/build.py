"""Build the conversations of examples/chat.yaml, and questions whose answers can be checked.

    pip install reasoning-gym
    python examples/chat/build.py [FOLDER]

Writes `conversations.jsonl`, rows of `messages` with `domain`, `split`, `source` and `license`, and `questions.jsonl`,
rows of `question`, `answer`, `task`, `source` and `license`, to the folder of this script. They are made of three
things: functions of Python's standard library, whose body answers their signature and docstring; help pages in English,
French and German, whose sections answer their headings; and questions of reasoning-gym, whose answers are short.

Needs reasoning-gym, and Debian's `apt-get` and `dpkg-deb` as examples/corpus/build.py does, whose words it uses
here too. The same versions of the packages give the same bytes. A page or module is in one split only; the three
languages take different pages, so that none is the translation of another; answers that share more than `SHARED` of
their word 8-grams with those before them are refused, and questions that were asked before.
"""

import argparse
import ast
import html.parser
import json
import os
import random
import re
import sys
import textwrap
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))
from corpus import build as corpus

SEED = 20241130
SMALLEST, LARGEST = 100, 600  # bytes of an answer, unless it is checkable
LARGEST_PROMPT = 500  # bytes
SYSTEM = 0.25  # share of conversations with a system prompt
TURNS = {1: 0.75, 2: 0.18, 3: 0.07}  # share of conversations with so many turns of the assistant
SPLITS = {"heldout": 36, "dev": 8, "train": 60}  # conversations of a domain
QUESTIONS = {"heldout": 300, "dev": 120, "train": 800}  # likewise, of reasoning
CHECKED_OF_TASK = 50  # questions of each task in questions.jsonl
FROM_PAGE, FROM_MODULE = 1, 3  # conversations at most

HELP_SKIP = corpus.LIBREOFFICE_SKIP + " *copyright*"
SOURCES = (
    corpus.Source("english", "libreoffice-help-en-us", 1, 0, "MPL-2.0", "*/text/*.html", HELP_SKIP, slice(0, None, 3)),
    corpus.Source("french", "libreoffice-help-fr", 1, 0, "MPL-2.0", "*/text/*.html", HELP_SKIP, slice(1, None, 3)),
    corpus.Source("german", "libreoffice-help-de", 1, 0, "MPL-2.0", "*/text/*.html", HELP_SKIP, slice(2, None, 3)),
    corpus.Source("python", "libpython3.11-stdlib", 1, 0, "PSF-2.0", "lib/python3.11/*.py", corpus.PYTHON_SKIP),
)
PROMPTS = {
    "english": ("What does the help of LibreOffice say about “{}”?", "LibreOffice: {}", "Explain “{}” in LibreOffice."),
    "french": ("Que dit l'aide de LibreOffice sur « {} » ?", "LibreOffice : {}", "Explique « {} » dans LibreOffice."),
    "german": ("Was sagt die Hilfe von LibreOffice zu „{}“?", "LibreOffice: {}", "Erkläre „{}“ in LibreOffice."),
    "python": (
        "Write the body of this function of the module {}:\n\n{}",
        "This is from Python's {}. What comes after the docstring?\n\n{}",
    ),
}
SYSTEMS = {
    "english": "You answer questions about LibreOffice in a few sentences.",
    "french": "Tu réponds en quelques phrases aux questions sur LibreOffice.",
    "german": "Du beantwortest Fragen zu LibreOffice in wenigen Sätzen.",
    "python": "You write Python. Answer with code only.",
}
ANSWER_ONLY = "Answer with the result only."

# Tasks of reasoning-gym with their settings, as easy as they come: the models are small.
TASKS: Mapping[str, Mapping[str, object]] = {
    "calendar_arithmetic": {},
    "chain_sum": {"max_terms": 3, "max_digits": 2},
    "family_relationships": {"max_family_size": 5},
    "gcd": {"max_value": 100},
    "letter_counting": {"max_words": 8},
    "number_sequence": {"min_value": 0, "max_complexity": 2},
    "products": {"max_digits": 2},
    "simple_equations": {"max_terms": 2, "max_value": 20},
    "spell_backward": {"max_word_len": 6},
    "syllogism": {},
}
GYM_LICENSE = "Apache-2.0"


class Turn(NamedTuple):
    """Hold a prompt and its answer."""

    prompt: str
    answer: str


class HelpPage(html.parser.HTMLParser):
    """Collect the headings of a help page, each with the paragraphs and steps below it, in `sections`.

    A section ends at the first table, note or listing: what follows it often can't be understood alone.
    """

    def __init__(self, text: str) -> None:
        super().__init__()
        self.sections: list[tuple[str, list[str]]] = []
        self.open: list[tuple[str, bool]] = []  # tag, and whether its text is dropped
        self.words: list[str] = []
        self.block = ""  # the tag of the heading, paragraph or step that is open
        self.steps: int | None = None  # of the numbered list that is open
        self.ended = True
        self.feed(text)
        self.close()
        self.finish()

    def finish(self) -> None:
        text = " ".join("".join(self.words).split())
        self.words = []
        if self.block in corpus.HEADINGS:
            self.sections.append((text, []))
            self.ended = False
        elif self.block == "p" and text and not self.ended:
            if self.steps is not None:
                self.steps += 1
                text = f"{self.steps}. {text}"
            self.sections[-1][1].append(text)
        self.block = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        classes = set((attributes.get("class") or "").split())
        dropped = tag in corpus.DROPPED or "hidden" in attributes or bool(classes & corpus.DROPPED_CLASSES)
        if tag in corpus.HEADINGS or tag in {"p", "div", "ol", "ul", "table", "pre"}:
            self.finish()
        if (dropped and tag == "div" and "noteicon" not in classes) or tag in {"ul", "table", "pre"}:
            self.ended = True
        if tag == "ol":
            self.steps = 0
        if (tag == "p" or tag in corpus.HEADINGS) and not dropped and not any(lost for _, lost in self.open):
            self.block = tag
        if tag in ("sup", "sub") or "hidden" in attributes:
            self.words.append(corpus.MISSING)
        if tag == "br":
            self.words.append(" ")
        if tag not in corpus.EMPTY:
            self.open.append((tag, dropped))

    def handle_endtag(self, tag: str) -> None:
        if tag not in (name for name, _ in self.open):
            return
        if tag == self.block or tag in {"ol", "div"}:
            self.finish()
        if tag == "ol":
            self.steps = None
        while self.open.pop()[0] != tag:
            pass

    def handle_data(self, data: str) -> None:
        if self.block and not any(dropped for _, dropped in self.open):
            self.words.append(data)


def help_turns(page: str, language: str, chance: random.Random) -> Iterator[Turn]:
    """Yield a question from each heading whose section is an answer of whole sentences in the language."""
    for heading, blocks in HelpPage(page).sections:
        heading = unicodedata.normalize("NFC", heading)
        answer = unicodedata.normalize("NFC", "\n".join(blocks))
        lines = answer.splitlines()
        if re.search(r"[\uFFFD:;<>|{}]|LibreOffice|^\W|^$", heading) or not SMALLEST <= len(answer.encode()) <= LARGEST:
            continue
        if not corpus.is_prose(re.sub(r"(^|\n)\d+\. ", " ", answer).strip(), language):
            continue
        if len({line.startswith("1.") or line[0].isdigit() for line in lines}) == 1 or lines[0][-1] in ".:":
            yield Turn(chance.choice(PROMPTS[language]).format(heading), answer)


def python_turns(code: str, module: str, chance: random.Random) -> Iterator[Turn]:
    """Yield each function or method with a docstring as a question, and what follows the docstring as its answer."""
    if "copyright" in code.lower():  # terms of its own
        return
    lines = [line.rstrip() for line in code.splitlines()]
    for node in ast.walk(ast.parse(code)):
        if not isinstance(node, ast.FunctionDef) or not ast.get_docstring(node) or len(node.body) < 2:
            continue
        after = node.body[0].end_lineno
        if node.body[1].lineno == after:
            continue
        head = textwrap.dedent("\n".join(lines[node.lineno - 1 : after]))
        body = textwrap.dedent("\n".join(lines[after : node.end_lineno])).strip("\n")
        if head.startswith(" ") or body.startswith((" ", "#")) or not body:
            continue
        if SMALLEST <= len(body.encode()) <= LARGEST and len(head.encode()) <= LARGEST_PROMPT - 80:
            yield Turn(chance.choice(PROMPTS["python"]).format(f"`{module}`", head), body)


def read_turns(path: str, content: bytes, source: corpus.Source) -> list[Turn]:
    """Return the turns of a page or module, in its order."""
    chance = random.Random(f"{SEED} {source.domain} {path}")
    if source.domain == "python":
        module = path.removeprefix("lib/python3.11/").removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        return list(python_turns(content.decode(), module, chance))
    return list(help_turns(content.decode(), source.domain, chance))


def choose_conversations(
    places: Mapping[str, Sequence[Turn]], at_most: int, chance: random.Random
) -> Iterator[tuple[str, list[Turn]]]:
    """Yield conversations of neighbouring turns with their place, all of a place after one another."""
    seen: set[tuple[str, ...]] = set()
    asked: set[str] = set()
    for place in chance.sample(sorted(places), len(places)):
        turns = []
        for turn in places[place]:
            grams = corpus.eight_grams(turn.answer)
            repeated = sum(gram in seen for gram in grams) + len(grams) - len(set(grams))
            if turn.prompt not in asked and turn.answer not in asked and repeated <= corpus.SHARED * len(grams):
                seen.update(grams)
                asked.update(turn)
                turns.append(turn)
        for _ in range(at_most):
            count = chance.choices(list(TURNS), list(TURNS.values()))[0]
            if turns:
                yield place, turns[:count]
                turns = turns[count:]


def make_row(turns: Sequence[Turn], system: str | None, **said: str) -> dict:
    messages = [{"role": "system", "content": system}] if system else []
    for prompt, answer in turns:
        messages += [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    return {"messages": messages, **said}


def build_from_packages() -> Iterator[dict]:
    """Yield the rows made of Debian packages; those of a page or module have one split."""
    for source in SOURCES:
        version, contents = corpus.fetch(source.package, [source])
        paths = sorted(contents)[source.pages]
        places = {path: turns for path in paths if (turns := read_turns(path, contents[path], source))}
        chance = random.Random(f"{SEED} {source.domain}")
        at_most = FROM_MODULE if source.domain == "python" else FROM_PAGE
        wanted = dict(SPLITS)
        split, last = next(iter(wanted)), None
        for place, turns in choose_conversations(places, at_most, chance):
            if place != last and wanted[split] <= 0:
                del wanted[split]
                if not wanted:
                    break
                split = next(iter(wanted))
            last = place
            wanted[split] -= 1
            system = SYSTEMS[source.domain] if chance.random() < SYSTEM else None
            origin = f"{source.package} {version}: {place}"
            yield make_row(turns, system, domain=source.domain, split=split, source=origin, license=source.license)
        else:
            raise SystemExit(f"build.py: {source.package} {version} has too few answers; ask `SPLITS` for fewer")


def draw_questions(task: str, seed: int, count: int, asked: set[str]) -> list[Turn]:
    """Return questions of a task that were not asked before, and add them to `asked`."""
    import reasoning_gym

    turns = []
    for entry in reasoning_gym.create_dataset(task, seed=seed, size=20 * count, **TASKS[task]):
        question, answer = entry["question"].strip(), str(entry["answer"]).strip()
        if question not in asked and len(turns) < count:
            asked.add(question)
            turns.append(Turn(question, answer))
    if len(turns) < count:
        raise SystemExit(f"build.py: reasoning-gym's {task} has {len(turns)} questions of this kind, not {count}")
    return turns


def build_reasoning(asked: set[str]) -> Iterator[dict]:
    """Yield the rows made of reasoning-gym's questions, each split of seeds of its own."""
    version = metadata.version("reasoning-gym")
    for seed, (split, wanted) in enumerate(QUESTIONS.items(), start=1):
        chance = random.Random(f"{SEED} reasoning {split}")
        for task in TASKS:
            count = wanted // len(TASKS)
            waiting = draw_questions(task, seed, count, asked)
            while waiting:
                number = chance.choices(list(TURNS), list(TURNS.values()))[0]
                turns, waiting = waiting[:number], waiting[number:]
                system = ANSWER_ONLY if chance.random() < SYSTEM else None
                if not system:
                    turns = [Turn(f"{turn.prompt}\n{ANSWER_ONLY}", turn.answer) for turn in turns]
                origin = f"reasoning-gym {version}: {task}, seed {seed}"
                yield make_row(turns, system, domain="reasoning", split=split, source=origin, license=GYM_LICENSE)


def build_questions(asked: set[str]) -> Iterator[dict]:
    version = metadata.version("reasoning-gym")
    seed = len(QUESTIONS) + 1
    for task in TASKS:
        for question, answer in draw_questions(task, seed, CHECKED_OF_TASK, asked):
            origin = f"reasoning-gym {version}: {task}, seed {seed}"
            prompt = f"{question}\n{ANSWER_ONLY}"
            yield {"question": prompt, "answer": answer, "task": task, "source": origin, "license": GYM_LICENSE}


def write_rows(path: Path, rows: Sequence[Mapping]) -> None:
    temporary = path.with_suffix(".partial")
    temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    os.replace(temporary, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=Path(__file__).parent)
    folder = parser.parse_args().folder
    asked: set[str] = set()
    rows = [*build_from_packages(), *build_reasoning(asked)]
    rows.sort(key=lambda row: (row["domain"], row["split"], row["source"], json.dumps(row["messages"])))
    questions = list(build_questions(asked))
    write_rows(folder / "conversations.jsonl", rows)
    write_rows(folder / "questions.jsonl", questions)
    for domain in dict.fromkeys(row["domain"] for row in rows):
        for split in SPLITS:
            messages = [row["messages"] for row in rows if (row["domain"], row["split"]) == (domain, split)]
            answers = [m["content"] for of in messages for m in of if m["role"] == "assistant"]
            size = sum(len(answer.encode()) for answer in answers)
            print(f"{domain}, {split}: {len(messages)} conversations, {len(answers)} answers of {size:,} bytes")
    print(f"{len(questions)} questions")


if __name__ == "__main__":
    main()

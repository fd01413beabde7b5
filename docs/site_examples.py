"""Show the examples in docstrings as code: put a fence around each block of lines that starts with `>>>`."""

import re

import griffe

EXAMPLE = re.compile(r"(?:^>>> .*\n?)(?:^(?=\S).*\n?)*", re.MULTILINE)


class FencedExamples(griffe.Extension):
    """Fence the examples of every object that has a docstring."""

    def on_object(self, *, obj: griffe.Object, **_: object) -> None:
        """Rewrite the docstring of an object when it is loaded."""
        if obj.docstring:
            obj.docstring.value = fence_examples(obj.docstring.value)


def fence_examples(docstring: str) -> str:
    """Return a docstring with a fence around each example and what it prints."""
    return EXAMPLE.sub(lambda example: f"```pycon\n{example[0].rstrip()}\n```\n", docstring)

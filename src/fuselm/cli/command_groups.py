"""Show the commands in groups, those that a newcomer needs first, each with its whole description."""

import textwrap
from collections.abc import Sequence
from typing import Any

from typer.core import TyperGroup

GROUPS = {
    "Fuse models": ("init", "doctor", "plan", "run"),
    "Look at a fusion": ("inspect", "diagnose", "fidelity", "evaluate"),
    "Make the stages of a run one by one": ("capture", "align", "fuse", "train", "report"),
    "Compare runs": ("study",),
    "Work with weights": ("merge", "prune"),
    "Keep, share and delete": ("push", "store", "clean"),
    "Look up options": ("options", "schema"),
}
OTHERS = "More"  # commands that no group names

EPILOG = """
Examples:
  fuselm init my.yaml               ask for models and texts, and write a run file
  fuselm plan my.yaml               what it will take
  fuselm run my.yaml                make everything; stopped, it resumes
  fuselm run my.yaml train.learning_rate=3e-5    with another option
  fuselm options train              what may be set, and what it does
  fuselm COMMAND --help             what a command takes
"""
RUN_EXAMPLES = """\b
Examples:
  fuselm run my.yaml                             make everything
  fuselm run my.yaml train.learning_rate=3e-5    make again what depends on this option

A run that was stopped, by Ctrl-C or a kill, resumes when the same command runs again.
"""
EVALUATE_EXAMPLES = """\b
Examples:
  fuselm evaluate runs/mine                            the scores of a finished run
  fuselm evaluate runs/mine --texts held-out.jsonl     of its fused model on other texts
  fuselm evaluate Qwen/Qwen2.5-0.5B --texts held-out.jsonl
  fuselm evaluate runs/mine --tasks arc_easy,hellaswag --limit 500    of all its models
  fuselm evaluate runs/mine --tasks offline            what needs no network
"""
INSPECT_EXAMPLES = """\b
Examples:
  fuselm inspect runs/mine --doc 3                 all tokens of a document
  fuselm inspect runs/mine --doc 3 --tokens 0:20   the first of them
"""
DIAGNOSE_EXAMPLES = """\b
Examples:
  fuselm diagnose my.yaml                        can fusing help?
  fuselm diagnose my.yaml align.top_k=32         with another option
  fuselm diagnose runs/mine --report page.html   a page of a run that is there
"""
FIDELITY_EXAMPLES = """\b
Examples:
  fuselm fidelity runs/mine                      what alignment lost in a run
  fuselm fidelity --source A --target B --texts texts.jsonl --report page.html
"""
CLEAN_EXAMPLES = """\b
Examples:
  fuselm clean runs --dry-run            what is there, and what needs it
  fuselm clean runs --captures           captures, too, that are aligned
  fuselm clean --converted --dry-run     GGUF files that were converted to folders
"""


class GroupedCommands(TyperGroup):
    """List commands by `GROUPS`. Text is plain, so that help needs no other library and comes at once."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names of the commands in the order in which they are shown."""
        known = [name for names in GROUPS.values() for name in names if name in self.commands]
        return [*known, *(name for name in self.commands if name not in known)]

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write a section for each group."""
        names = self.list_commands(ctx)
        grouped = {name for group in GROUPS.values() for name in group}
        for title, group in [*GROUPS.items(), (OTHERS, [name for name in names if name not in grouped])]:
            self._write_section(formatter, title, [name for name in group if name in names])

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Write examples below the commands."""
        formatter.write(EPILOG)

    def _write_section(self, formatter: Any, title: str, names: Sequence[str]) -> None:
        if not names:
            return
        width = max(len(name) for name in self.commands) + 4
        with formatter.section(title):
            for name in names:
                described = (self.commands[name].help or "").split("\n\n")[0]
                lines = textwrap.wrap(" ".join(described.split()), max(formatter.width - width, 20))
                formatter.write(f"  {name:{width - 2}s}{lines[0] if lines else ''}\n")
                formatter.write("".join(f"{'':{width}s}{line}\n" for line in lines[1:]))

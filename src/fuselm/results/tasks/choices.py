"""List the names that stand for several tasks."""

# The suites of FuseLLM, Wan et al., ICLR 2024, section 4.1, as lm-eval has them: Big-Bench Hard with chains of thought
# in the prompt, five tasks of common sense without examples. MultiPL-E is HumanEval in other programming languages,
# which lm-eval does not have; its Python is.
PAPER = ("bbh_cot_fewshot", "arc_easy", "arc_challenge", "boolq", "hellaswag", "openbookqa")
PAPER_CODE = ("humaneval",)  # with `run_code`
HELDOUT = ("last_words", "continuations")  # about the run's own held-out documents
OFFLINE = ("minimal_pairs", "copying")  # come with fuselm and need no network
OFFLINE_CODE = ("code_completion",)  # with `run_code`


def expand_presets(names: list[str], *, run_code: bool, has_documents: bool) -> list[str]:
    """Return the tasks that the names stand for, each once: `paper` and `offline` are several.

    `run_code` adds what runs code, and `has_documents` what is asked about a run's held-out documents.
    """
    presets = {
        "paper": [*PAPER, *(PAPER_CODE if run_code else ())],
        "offline": [*OFFLINE, *(HELDOUT if has_documents else ()), *(OFFLINE_CODE if run_code else ())],
    }
    return list(dict.fromkeys(task for name in names for task in presets.get(name, [name])))

"""Read a tokenizer's pipeline, the JSON that describes it: its merges, and what it does at the edges of a text."""

import json
from collections.abc import Set

from tokenizers import Tokenizer

from fuselm.models import bpe, token_strings

HARMLESS = {"Sequence", "Replace", "Prepend", "NFC"}  # normalizers that leave the bytes of a token to the merges


def compile_pipeline(pipeline: dict, corrected: Set[int]) -> bpe.Merges | None:
    """Return a pipeline as compiled BPE, without its pre-tokenizer; None if it does more than BPE merges.

    `corrected` holds the ids whose bytes are not those that their strings spell; merges cannot tell them.
    """
    model = pipeline["model"]
    changes = set(token_strings.list_component_types(pipeline["normalizer"])) - HARMLESS
    decorated = model.get("continuing_subword_prefix") or model.get("end_of_word_suffix") or model.get("dropout")
    if model["type"] != "BPE" or changes or decorated or corrected.intersection(model["vocab"].values()):
        return None
    ids = model["vocab"]
    pairs = [merge if isinstance(merge, list) else merge.split(" ") for merge in model["merges"]]
    mark = token_strings.find_space_mark(pipeline)
    byte_level = "ByteLevel" in token_strings.find_spelling_types(pipeline)
    singles = {s: i for s, i in ids.items() if len(s) == 1}
    return bpe.compile_merges(
        [(ids[a], ids[b], ids[a + b]) for a, b in pairs if a in ids and b in ids and a + b in ids],
        {} if byte_level else {c.replace(mark, " ").encode(): i for c, i in singles.items()},
        {token_strings.build_byte_alphabet()[c]: i for c, i in singles.items()}
        if byte_level
        else {int(m[1], 16): i for s, i in ids.items() if (m := token_strings.BYTE_TOKEN.fullmatch(s))},
    )


def bound_collapse(pipeline: dict) -> int:
    """Return by how many tokens a text may get fewer, at most, when characters are put behind it.

    A token that is completed takes the place of its parts. WordPiece makes one token of a word that becomes too long.
    """
    added = max((len(token["content"]) for token in pipeline["added_tokens"]), default=0)
    word = pipeline["model"].get("max_input_chars_per_word") or 0
    return 32 + min(added, 1000) + min(word, 1000)


def build_continuing_tokenizer(tokenizer: Tokenizer) -> Tokenizer:
    """Return the same tokenizer for text that continues another: it puts no space of its own before it."""
    pipeline = json.loads(tokenizer.to_str())
    for part in ("normalizer", "pre_tokenizer"):
        pipeline[part] = _drop_dummy_prefix(pipeline[part])
    continuing = Tokenizer.from_str(json.dumps(pipeline))
    continuing.encode_special_tokens = True  # a special token's name in a text is text
    return continuing


def _drop_dummy_prefix(part: dict | None) -> dict | None:
    if part is None or part["type"] == "Prepend":
        return None
    for name in ("pretokenizers", "normalizers"):
        if name in part:
            part[name] = [kept for p in part[name] if (kept := _drop_dummy_prefix(p)) is not None]
    if part["type"] == "Metaspace":
        part["prepend_scheme"] = "never"
    if part["type"] == "ByteLevel":
        part["add_prefix_space"] = False
    return part

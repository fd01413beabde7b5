"""Check that a folder's fast tokenizer and its SentencePiece file have one vocabulary and read text alike.

The weights were trained with one of them. If ids mean different pieces, the model is refused, because nobody can tell
which is right. If the two only cut a text differently, the tokens still spell it: a warning says so, and tokenizer.json
is used.
"""

import functools
import logging
from collections import Counter
from pathlib import Path

from tokenizers import Tokenizer

from fuselm.system import fingerprints

SAMPLES = (
    "a The quick brown fox jumps over 13 lazy dogs; isn't it, at 3.5 km/h?",
    "a def f(x):\n    return x + 1  # two  spaces\n",
    "a naïve Ærøskøbing, été, Größe, 知识融合, привет, 한국어, 🙂",
)
FORMAT = 1  # raise this when the same files are judged otherwise


def check_twins(folder: Path, tokenizer: Tokenizer) -> None:
    """Raise `ValueError` if ids mean different pieces in tokenizer.json and a SentencePiece file beside it.

    Ids may be shifted as a whole, as in models that came from fairseq. A file of another kind is ignored.
    """
    if not (folder / "tokenizer.json").is_file():
        return
    for file in sorted(folder.glob("*.model")):
        hashes = [fingerprints.hash_file_once(path) for path in (folder / "tokenizer.json", file)]
        key = f"twins {FORMAT} {hashes[0]} {hashes[1]}"
        pieces, text = fingerprints.recall_or_compute(key, lambda file=file: _find_differences(file, tokenizer))
        if pieces:
            raise ValueError(
                f"{folder}: tokenizer.json and {file.name} differ: {pieces}; the weights were trained with one, "
                "so remove the other one"
            )
        if text:
            _warn_once(f"{folder}: tokenizer.json and {file.name} differ: {text}; tokenizer.json is used")


@functools.cache
def _warn_once(message: str) -> None:
    logging.getLogger("fuselm").warning(message)


def _find_differences(file: Path, tokenizer: Tokenizer) -> list[str]:
    """Describe the first difference of pieces, and of texts; a string is empty if there is none.

    A file that SentencePiece cannot read has no differences.
    """
    import sentencepiece

    try:
        twin = sentencepiece.SentencePieceProcessor(model_file=str(file))
    except (RuntimeError, OSError):
        return ["", ""]
    return [_find_piece_difference(twin, tokenizer), _find_text_difference(twin, tokenizer)]


def _find_piece_difference(twin, tokenizer: Tokenizer) -> str:
    """Compare the pieces of which text is made; control and unknown pieces may have other names."""
    ordinary = [i for i in range(len(twin)) if not (twin.is_control(i) or twin.is_unknown(i) or twin.is_unused(i))]
    found = {i: tokenizer.token_to_id(twin.id_to_piece(i)) for i in ordinary}
    shifts = Counter(to - i for i, to in found.items() if to is not None)
    shift = shifts.most_common(1)[0][0] if shifts else 0
    for i, to in found.items():
        if to != i + shift:
            there = tokenizer.id_to_token(i + shift)
            return f"id {i + shift} is {there!r} in one and {twin.id_to_piece(i)!r} in the other"
    return ""


def _find_text_difference(twin, tokenizer: Tokenizer) -> str:
    """Compare how both cut a few texts, except for the first token, before which a space may be optional."""
    for text in SAMPLES:
        ours = tokenizer.encode(text, add_special_tokens=False).tokens
        theirs = twin.encode(text, out_type=str)
        pair = next((p for p in zip(ours[1:], theirs[1:], strict=False) if p[0] != p[1]), None)
        if pair or len(ours) != len(theirs):
            one, other = pair or (f"{len(ours)} tokens", f"{len(theirs)} tokens")
            return f"of {text!r} one makes {one!r} where the other makes {other!r}"
    return ""

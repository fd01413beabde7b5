"""Find the bytes of every token, as the tokenizer itself decodes them; see docs/tokenizers.md.

A token is decoded between two others, because a decoder may treat the first and the last token of a text differently,
or join tokens with spaces. Half a character decodes to U+FFFD: what it stands for is read from its string, and checked
by decoding it together with the tokens of the other half.
"""

import hashlib
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from tokenizers import Tokenizer

from fuselm.models import token_strings
from fuselm.system import fingerprints
from fuselm.system.errors import summarize_error

SLOW = 20_000  # tokens; of more, the corrections that decoding them found are kept
FORMAT = 1  # of what is kept; raise it when the same tokenizer would be read otherwise
BLOCK = 1 << 15  # tokens that are decoded at a time
CONTEXTS = (("a", "b"), (" ", " "), ("", ""), ("\n", "."))  # a text is tokenized between these
LOST = "\ufffd"  # decoders write this for bytes that are no character
# These complete a character: bytes before some that continue one, by the number of those, and bytes after one.
LEADS = (b"", b"\xc3", b"\xe1", b"\xf1")
TAILS = (b"", b"\x80", b"\xa0", b"\x90", b"\x80\x80", b"\xa0\x80", b"\x90\x80", b"\x90\x80\x80", b"\x80\x80\x80")


class Frame(NamedTuple):
    """Hold tokens to decode others between: ids before and after, and the text that they spell by themselves."""

    before: list[int]
    after: list[int]
    prefix: str
    suffix: str


def read_token_bytes(
    tokenizer: Tokenizer, description: str, pipeline: dict, spelled: list[bytes | None]
) -> list[bytes | None]:
    """Return `spelled` as the tokenizer's own decoder corrects it; the result is kept if it took long.

    `description` is the tokenizer's JSON, and `pipeline` what it holds.
    """

    def find() -> dict[str, str]:
        return {str(i): text for i, text in find_corrections(tokenizer, pipeline, spelled).items()}

    if len(spelled) < SLOW:
        corrections = find()
    else:
        key = hashlib.sha256(description.encode()).hexdigest()[:16]
        corrections = fingerprints.recall_or_compute(f"token bytes {FORMAT} {key} {len(spelled)}", find)
    result = list(spelled)
    for token, text in corrections.items():
        result[int(token)] = text.encode() or None
    return result


def find_corrections(tokenizer: Tokenizer, pipeline: dict, spelled: Sequence[bytes | None]) -> dict[int, str]:
    """Return what the tokenizer decodes, for the ids whose bytes are not those that their strings seem to spell.

    Where the two differ, the decoder is right unless only the other bytes are tokenized to that token. Raises
    `ValueError` for a token of half a character that does not decode with the other half.
    """
    if pipeline["decoder"] is None:
        return _find_space_joined(tokenizer, spelled)
    added = {token["id"] for token in pipeline["added_tokens"]}
    frames = _build_frames(tokenizer, spelled, added)
    if not frames:
        return {}
    different: dict[int, str] = {}
    known = [i for i, b in enumerate(spelled) if b is not None]
    for frame, tokens in (
        (frames[0], [i for i in known if i not in _list_ids(frames[0])]),
        (frames[-1], _list_ids(frames[0])),
    ):
        for begin in range(0, len(tokens), BLOCK):
            block = tokens[begin : begin + BLOCK]
            for token, text in zip(block, _decode_between(tokenizer, frame, [[i] for i in block]), strict=True):
                by_string = (spelled[token] or b"").decode("utf-8", "replace")
                if text not in (None, by_string) and not (LOST in text and LOST in by_string):
                    different[token] = text
    corrections = {}
    for token, text in different.items():
        by_string = _is_tokenized_to(tokenizer, spelled[token] or b"", token)
        if by_string and (LOST in text or not _is_tokenized_to(tokenizer, text.encode(), token)):
            continue
        if LOST in text:
            raise ValueError(_describe_disagreement(tokenizer, token, spelled[token] or b"", text))
        corrections[token] = text
    _check_halves(tokenizer, frames[0], spelled, added | corrections.keys())
    return corrections


def _build_frames(tokenizer: Tokenizer, spelled: Sequence[bytes | None], added: set[int]) -> list[Frame]:
    """Build two frames that share no token, or fewer if there are not enough letters."""

    def is_letter(token: int, string: bytes) -> bool:
        name = tokenizer.id_to_token(token) or ""
        return string.strip().isalpha() and not token_strings.BYTE_TOKEN.fullmatch(name)

    short = [i for i, b in enumerate(spelled) if b and len(b) <= 2 and i not in added and is_letter(i, b)]
    inner = [i for i in short if len(spelled[i] or b"") == 1]
    outer = [i for i in short if i not in inner] + inner
    outer = outer or [i for i, b in enumerate(spelled) if b and i not in added and b.strip().isalnum()][:2]
    frames: list[Frame] = []
    used: set[int] = set()
    for _ in range(2):
        after = next((i for i in reversed(inner) if i not in used), None)
        before = next((i for i in outer if i not in used and i != after), after)
        if before is None:
            break
        frame = Frame([before], [], _decode(tokenizer, [[before]])[0], "")
        if after not in (None, before):
            letter, both = (spelled[after] or b"").decode(), _decode(tokenizer, [[before, after]])[0]
            if both.endswith(letter):
                frame = Frame([before], [after], both.removesuffix(letter), letter)
        frames.append(frame)
        used |= {before, *frame.after}
    return frames


def _list_ids(frame: Frame) -> list[int]:
    return frame.before + frame.after


def _decode(tokenizer: Tokenizer, sequences: list[list[int]]) -> list[str]:
    try:
        return tokenizer.decode_batch(sequences, skip_special_tokens=False)
    except Exception as error:  # the tokenizers library raises nothing narrower
        raise ValueError(
            f"tokenizer: its decoder fails ({summarize_error(error)}); needs one that decodes its own ids"
        ) from error


def _decode_between(tokenizer: Tokenizer, frame: Frame, sequences: Iterable[list[int]]) -> list[str | None]:
    """Decode each sequence within the frame; return None where the text around it changes, too."""
    texts = _decode(tokenizer, [[*frame.before, *ids, *frame.after] for ids in sequences])
    within = len(frame.prefix) + len(frame.suffix)
    return [
        text[len(frame.prefix) : len(text) - len(frame.suffix)]
        if len(text) >= within and text.startswith(frame.prefix) and text.endswith(frame.suffix)
        else None
        for text in texts
    ]


def _is_tokenized_to(tokenizer: Tokenizer, string: bytes, token: int) -> bool:
    """Tell whether the tokenizer makes that token of these bytes in one of `CONTEXTS`."""
    text = string.decode("utf-8", "ignore")
    if text.encode() != string:
        lead, tail = _complete_character(string) or (b"", b"")
        text = (lead + string + tail).decode("utf-8", "ignore")
    tried = [before + text + after for before, after in CONTEXTS] if text else []
    return any(token in encoding.ids for encoding in tokenizer.encode_batch(tried, add_special_tokens=False))


def _complete_character(string: bytes) -> tuple[bytes, bytes] | None:
    """Return bytes before and after `string` that make it text; None if it is part of no text."""
    continuing = next((n for n, byte in enumerate(string) if byte & 0xC0 != 0x80), len(string))
    for lead in LEADS[: continuing + 1] if continuing < len(LEADS) else ():
        for tail in TAILS:
            try:
                (lead + string + tail).decode()
            except UnicodeDecodeError:
                continue
            return lead, tail
    return None


def _check_halves(tokenizer: Tokenizer, frame: Frame, spelled: Sequence[bytes | None], leave: set[int]) -> None:
    """Decode every token of half a character with tokens of single bytes that complete it. Raises `ValueError`."""
    byte_ids = {b[0]: i for i, b in enumerate(spelled) if b is not None and len(b) == 1 and i not in leave}
    tokens, sequences, texts = [], [], []
    for token, string in enumerate(spelled):
        if string is None or token in leave or string.isascii():
            continue
        if string.decode("utf-8", "ignore").encode() == string or (halves := _complete_character(string)) is None:
            continue
        lead, tail = halves
        if all(byte in byte_ids for byte in lead + tail):
            tokens.append(token)
            sequences.append([*(byte_ids[b] for b in lead), token, *(byte_ids[b] for b in tail)])
            texts.append((lead + string + tail).decode())
    for token, text, decoded in zip(tokens, texts, _decode_between(tokenizer, frame, sequences), strict=True):
        if decoded is not None and decoded != text and not _is_tokenized_to(tokenizer, spelled[token] or b"", token):
            raise ValueError(_describe_disagreement(tokenizer, token, text.encode(), decoded))


def _describe_disagreement(tokenizer: Tokenizer, token: int, string: bytes, decoded: str) -> str:
    return (
        f"tokenizer: token {token} {tokenizer.id_to_token(token)!r} reads as {string!r} and decodes to {decoded!r}; "
        "needs a tokenizer.json whose decoder belongs to its model"
    )


def _find_space_joined(tokenizer: Tokenizer, spelled: Sequence[bytes | None]) -> dict[int, str]:
    """Return all tokens with a space in front, if they spell a text only when spaces join them."""
    words = [b.decode() for b in spelled if b and b.isalpha() and b.isascii()][:64]
    text = " ".join(words)
    strings = [spelled[i] or b"" for i in tokenizer.encode(text, add_special_tokens=False).ids]
    if b"".join(strings).strip() == text.encode() or b" ".join(strings) != text.encode():
        return {}
    return {i: " " + b.decode() for i, b in enumerate(spelled) if b}

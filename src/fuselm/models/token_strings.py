"""Spell the bytes that a token's string seems to stand for, by the types of a tokenizer's components.

Only its string says what a token of half a character stands for. token_bytes.py checks everything else against what
the tokenizer itself decodes.
"""

import functools
import re
from collections.abc import Callable, Iterator

BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
SPACE_MARK = "\u2581"  # SentencePiece writes it


def spell_strings(pipeline: dict, strings: list[str | None]) -> list[bytes | None]:
    """Return the bytes of every token string; None where the id stands for no text.

    An added token that the model itself does not have is found only as it is written, so it spells its content.
    Special and unknown tokens stand for no text.
    """
    spell = _choose_speller(pipeline)
    spelled = [None if string is None else spell(string) for string in strings]
    own = list_own_tokens(pipeline["model"])
    for added in pipeline["added_tokens"]:
        if added["id"] < len(spelled):
            if added["special"]:
                spelled[added["id"]] = None
            elif own.get(added["content"]) != added["id"]:
                spelled[added["id"]] = added["content"].encode()
    unknown = find_unknown_id(pipeline["model"])
    if unknown is not None and unknown < len(spelled):
        spelled[unknown] = None
    return [b or None for b in spelled]


def list_own_tokens(model: dict) -> dict[str, int]:
    """Return the ids of the model's own token strings, without added tokens."""
    vocabulary = model["vocab"]
    return vocabulary if isinstance(vocabulary, dict) else {piece[0]: i for i, piece in enumerate(vocabulary)}


def find_unknown_id(model: dict) -> int | None:
    """Return the id that stands for whatever the model has no token for."""
    if model.get("unk_id") is not None:
        return model["unk_id"]
    return list_own_tokens(model).get(model.get("unk_token") or "")


def list_component_types(part: dict | None) -> list[str]:
    """List the type names of a tokenizer component and of those inside it."""
    return [inner["type"] for inner in _walk_components(part)]


def find_spelling_types(pipeline: dict) -> set[str]:
    """Return the types that say how strings spell text: the decoder's, or without one those before the model."""
    return {t for part in _list_spelling_parts(pipeline) for t in list_component_types(part)}


def find_word_mark(pipeline: dict) -> str:
    """Return the character that stands for the space before a word in token strings; WordPiece has none."""
    types = find_spelling_types(pipeline)
    return "\u0120" if "ByteLevel" in types else "" if "WordPiece" in types else find_space_mark(pipeline)


def find_space_mark(pipeline: dict) -> str:
    """Return the character that a tokenizer of SentencePiece's kind writes for a space, by default U+2581."""
    for part in (pipeline["decoder"], pipeline["pre_tokenizer"], pipeline["normalizer"]):
        for component in _walk_components(part):
            if component["type"] == "Metaspace":
                return component["replacement"]
            if component["type"] == "Replace" and part is pipeline["decoder"] and component["content"] == " ":
                pattern = component["pattern"].get("String", "")
                if len(pattern) == 1:
                    return pattern
    return SPACE_MARK


def reads_byte_tokens(pipeline: dict) -> bool:
    """Tell whether tokens such as `<0xE2>` stand for a byte."""
    return "ByteFallback" in find_spelling_types(pipeline) or bool(pipeline["model"].get("byte_fallback"))


@functools.cache
def build_byte_alphabet() -> dict[str, int]:
    """Return the byte of each of GPT-2's printable characters."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}


def _list_spelling_parts(pipeline: dict) -> list[dict | None]:
    return [pipeline["decoder"]] if pipeline["decoder"] else [pipeline["pre_tokenizer"], pipeline["normalizer"]]


def _walk_components(part: dict | None) -> Iterator[dict]:
    if part is not None:
        yield part
        for name in ("decoders", "pretokenizers", "normalizers"):
            for inner in part.get(name, []):
                yield from _walk_components(inner)


def _choose_speller(pipeline: dict) -> Callable[[str], bytes]:
    types = find_spelling_types(pipeline)
    if "ByteLevel" in types:
        return _spell_byte_level
    if "WordPiece" in types or pipeline["model"]["type"] == "WordPiece":
        prefix = pipeline["model"].get("continuing_subword_prefix") or "##"
        return functools.partial(_spell_word_piece, prefix=prefix)
    components = [c for part in _list_spelling_parts(pipeline) for c in _walk_components(part)]
    suffixes = [c["suffix"] for c in components if c["type"] == "BPEDecoder"]
    if suffixes:
        return lambda string: string.replace(suffixes[0], " ").encode()
    return functools.partial(_spell_plain, mark=find_space_mark(pipeline), byte_fallback=reads_byte_tokens(pipeline))


def _spell_byte_level(string: str) -> bytes:
    alphabet = build_byte_alphabet()
    return bytes(alphabet[c] for c in string) if all(c in alphabet for c in string) else string.encode()


def _spell_plain(string: str, mark: str, byte_fallback: bool) -> bytes:
    if byte_fallback and (match := BYTE_TOKEN.fullmatch(string)):
        return bytes([int(match[1], 16)])
    return string.replace(mark, " ").encode()


def _spell_word_piece(string: str, prefix: str) -> bytes:
    """Spell a piece of WordPiece, which drops white space; a piece that begins a word spells the space before it."""
    if string.startswith(prefix) and string != prefix:
        return string[len(prefix) :].encode()
    return (" " + string if string[:1].isalnum() else string).encode()

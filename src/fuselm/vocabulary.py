"""A tokenizer, described by the bytes that each id stands for; and texts as byte spans.

The pipeline of the tokenizer itself says how a token's string spells bytes: the byte-level alphabet, SentencePiece's
space mark and byte fallback, WordPiece's continuation prefix. No class or model name is looked at. DESIGN.md section 3.
"""

import bisect
import functools
import json
import re
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int, UInt8
from numpy import ndarray
from tokenizers import Tokenizer

from fuselm import bpe

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPACE_MARK = "\u2581"  # SentencePiece's
UNMAPPED = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class Segmentation:
    """A text as tokens. Token i covers the bytes `starts[i]` to `starts[i+1]` (the last one: to `size`).

    `starts[0]` is -1 where the tokenizer puts a space of its own before the text. Spans tile the text; a token has
    an empty span where a normaliser made several tokens of one character.
    """

    ids: Int[ndarray, "tokens"]
    starts: Int[ndarray, "tokens"]  # bytes
    size: int  # bytes of text

    @property
    def ends(self) -> Int[ndarray, "tokens"]:
        return np.append(self.starts[1:], self.size)[: len(self.starts)]


class Vocabulary:
    """The bytes of every id of a model's output layer, and how text becomes ids.

    `token_bytes[id]` is None where the id stands for no text: special and unknown tokens, padding rows. The
    `tokenizer` is taken over: it will read the names of special tokens as text.
    """

    def __init__(self, tokenizer: Tokenizer, output_size: int):
        pipeline = json.loads(tokenizer.to_str())
        special = {added["id"] for added in pipeline["added_tokens"] if added["special"]}  # no text is made of them
        needed = 1 + max((i for i in tokenizer.get_vocab().values() if i not in special), default=-1)
        if needed > output_size:
            raise ValueError(
                f"tokenizer: {needed} tokens, but the model's output layer has {output_size} rows; "
                "tokenizer and model don't belong together"
            )
        self.size = output_size
        self.token_strings: list[str | None] = [tokenizer.id_to_token(i) for i in range(output_size)]
        self.token_bytes: list[bytes | None] = _token_bytes(pipeline, self.token_strings)
        self.word_mark = _word_mark(pipeline)
        self.largest_collapse = _largest_collapse(pipeline)
        self._tokenizer = tokenizer
        self._tokenizer.encode_special_tokens = True  # a special token's name in a text is text
        self._encoded: dict[bytes, tuple[int, ...]] = {}

    @functools.cached_property
    def _bare(self) -> Tokenizer:
        """The same tokenizer for text that goes on rather than begins: it puts no space of its own before it."""
        pipeline = json.loads(self._tokenizer.to_str())
        for part in ("normalizer", "pre_tokenizer"):
            pipeline[part] = _without_dummy_prefix(pipeline[part])
        bare = Tokenizer.from_str(json.dumps(pipeline))
        bare.encode_special_tokens = True
        return bare

    @functools.cached_property
    def id_of(self) -> dict[bytes, int]:
        """The id of every byte string that is a token: of several the lowest, byte fallback tokens last."""
        ids: dict[bytes, int] = {}
        for i in sorted(range(self.size), key=lambda i: bool(_BYTE_TOKEN.fullmatch(self.token_strings[i] or ""))):
            if spelled := self.token_bytes[i]:
                ids.setdefault(spelled, i)
        return ids

    @functools.cached_property
    def merges(self) -> bpe.Merges | None:
        """The tokenizer as compiled BPE, without its pre-tokenizer; None if it is of another kind or changes text."""
        pipeline = json.loads(self._tokenizer.to_str())
        model = pipeline["model"]
        changes = set(_types(pipeline["normalizer"])) - {"Sequence", "Replace", "Prepend", "NFC"}
        decorated = model.get("continuing_subword_prefix") or model.get("end_of_word_suffix") or model.get("dropout")
        if model["type"] != "BPE" or changes or decorated:
            return None
        ids = model["vocab"]
        pairs = [merge if isinstance(merge, list) else merge.split(" ") for merge in model["merges"]]
        byte_level = "ByteLevel" in _spelling_types(pipeline)
        singles = {s: i for s, i in ids.items() if len(s) == 1}
        return bpe.compile_merges(
            [(ids[a], ids[b], ids[a + b]) for a, b in pairs if a in ids and b in ids and a + b in ids],
            {} if byte_level else {c.replace(_SPACE_MARK, " ").encode(): i for c, i in singles.items()},
            {_byte_alphabet()[c]: i for c, i in singles.items()}
            if byte_level
            else {int(m[1], 16): i for s, i in ids.items() if (m := _BYTE_TOKEN.fullmatch(s))},
        )

    @functools.cached_property
    def packed_bytes(self) -> tuple[Int[ndarray, "offsets"], UInt8[ndarray, "bytes"]]:
        """Where each id's bytes begin and end in one array of all of them; none for ids without text."""
        spelled = [b or b"" for b in self.token_bytes]
        offsets = np.append(0, np.cumsum([len(b) for b in spelled])).astype(np.int64)
        return offsets, np.frombuffer(b"".join(spelled), np.uint8)

    @functools.cached_property
    def _sorted_bytes(self) -> list[bytes]:
        return sorted(spelled for spelled in self.token_bytes if spelled)

    @functools.cached_property
    def _longest(self) -> int:
        return max(map(len, self.id_of), default=0)

    def count_with_bytes(self) -> int:
        """How many ids stand for text."""
        return len(self._sorted_bytes)

    def count_continuing(self, typed: bytes) -> int:
        """How many ids stand for bytes that begin with `typed` and are longer."""
        low = bisect.bisect_right(self._sorted_bytes, typed)
        return bisect.bisect_left(self._sorted_bytes, typed + b"\xff" * (self._longest + 1)) - low

    def segment(self, text: str) -> Segmentation:
        """Tokenize, without special tokens, and find the bytes of `text` that each token covers."""
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        data = text.encode()
        spelled = [self.token_bytes[i] or b"" for i in encoding.ids]
        lengths = np.fromiter(map(len, spelled), np.int64, len(spelled))
        starts = np.cumsum(lengths) - lengths
        joined = b"".join(spelled)
        if joined == b" " + data:
            starts = starts - 1
        elif joined != data:
            starts = _starts_from_offsets(text, data, spelled, encoding.offsets)
        return Segmentation(ids=np.array(encoding.ids, np.int32), starts=starts.astype(np.int32), size=len(data))

    def count_tokens(self, texts: list[str]) -> list[int]:
        return [len(e.ids) for e in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def token_ends(self, text: str) -> Int[ndarray, "tokens"]:
        """Return the character at which each token ends.

        The bytes that tokens spell say it; where these are not the text's, the tokenizer does, and may err.
        """
        data = text.encode()
        ids = self._tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids
        ends = np.cumsum(np.diff(self.packed_bytes[0])[np.array(ids, np.int64)])
        if not ids or ends[-1] - len(data) not in (0, 1):  # one is a space that is put before the text
            offsets = self._tokenizer.encode(text, add_special_tokens=False).offsets
            return np.array([end for _, end in offsets], np.int64)
        begun = np.cumsum(np.frombuffer(data, np.uint8) & 0xC0 != 0x80)
        return np.append(0, begun)[np.maximum(ends - (ends[-1] - len(data)), 0)]

    def encode_bytes(self, strings: list[bytes]) -> list[tuple[int, ...]]:
        """The tokens that the tokenizer would go on with for each string; `UNMAPPED` ends what it can't spell.

        Bytes that are no text, or that the tokenizer would change, get the longest tokens that spell them.
        """
        missing = list({s for s in strings if s not in self._encoded})
        texts = [s.decode("utf-8", "ignore") for s in missing]
        for s, encoding in zip(missing, self._bare.encode_batch_fast(texts, add_special_tokens=False), strict=True):
            ids = tuple(encoding.ids)
            spelled = b"".join(self.token_bytes[i] or b"\xff" for i in ids)  # 0xff is in no text
            if not s.startswith(spelled):
                ids, spelled = (), b""
            self._encoded[s] = ids if spelled == s else ids + self._longest_tokens(s[len(spelled) :])
        return [self._encoded[s] for s in strings]

    def _longest_tokens(self, string: bytes) -> tuple[int, ...]:
        ids = []
        while string:
            for length in range(min(len(string), self._longest), 0, -1):
                if (found := self.id_of.get(string[:length])) is not None:
                    ids.append(found)
                    string = string[length:]
                    break
            else:
                return (*ids, UNMAPPED)
        return tuple(ids)


def _starts_from_offsets(text: str, data: bytes, spelled: list[bytes], offsets: list[tuple[int, int]]) -> ndarray:
    """Spans where the tokens don't spell the text (a normaliser changed it, or dropped white space).

    A token that spells what follows covers that; another one covers what follows up to the end of the characters
    the tokenizer says it came from. What no token came from belongs to the token after it, at the end of the text to
    the last one.
    """
    byte_of = np.zeros(len(text) + 1, np.int64)
    np.cumsum([len(c.encode()) for c in text], out=byte_of[1:])
    starts = np.zeros(len(spelled), np.int64)
    position = 0
    for i, (token, (_, last)) in enumerate(zip(spelled, offsets, strict=True)):
        starts[i] = position
        end = int(byte_of[last])
        if token and data.startswith(token, position) and position + len(token) <= end:
            position += len(token)
        else:
            position = max(position, end)
    return starts


def _largest_collapse(pipeline: dict) -> int:
    """Return by how many tokens a text may get fewer, at most, when characters are put behind it.

    A token that is completed takes the place of its parts. WordPiece makes one token of a word that becomes too long.
    """
    added = max((len(token["content"]) for token in pipeline["added_tokens"]), default=0)
    word = pipeline["model"].get("max_input_chars_per_word") or 0
    return 32 + min(added, 1000) + min(word, 1000)


def _spelling_types(pipeline: dict) -> set[str]:
    """Types of the components that say how token strings spell text: the decoder's, else those before the model."""
    parts = ["decoder"] if pipeline["decoder"] else ["pre_tokenizer", "normalizer"]
    return {t for part in parts for t in _types(pipeline[part])}


def _word_mark(pipeline: dict) -> str:
    """The character that stands for the space before a word in token strings; none in WordPiece."""
    types = _spelling_types(pipeline)
    return "\u0120" if "ByteLevel" in types else "" if "WordPiece" in types else _SPACE_MARK


def _token_bytes(pipeline: dict, strings: list[str | None]) -> list[bytes | None]:
    types = _spelling_types(pipeline)
    if "ByteLevel" in types:
        spell = _spell_byte_level
    elif "WordPiece" in types:
        prefix = pipeline["model"].get("continuing_subword_prefix") or "##"
        spell = functools.partial(_spell_word_piece, prefix=prefix)
    else:
        spell = functools.partial(_spell_plain, byte_fallback="ByteFallback" in types)
    result = [None if s is None else spell(s) for s in strings]
    for added in pipeline["added_tokens"]:
        if added["id"] < len(result):
            result[added["id"]] = None if added["special"] else added["content"].encode()
    unknown = pipeline["model"].get("unk_token")
    if pipeline["model"].get("unk_id") is not None:
        result[pipeline["model"]["unk_id"]] = None
    elif unknown is not None and unknown in strings:
        result[strings.index(unknown)] = None
    return [r or None for r in result]


def _types(part: dict | None) -> list[str]:
    """Type names of a tokenizer component and of those inside it."""
    if part is None:
        return []
    nested = [p for name in ("decoders", "pretokenizers", "normalizers") for p in part.get(name, [])]
    return [part["type"], *(t for p in nested for t in _types(p))]


@functools.cache
def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable character for each byte, inverted."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}


def _spell_byte_level(string: str) -> bytes | None:
    alphabet = _byte_alphabet()
    return bytes(alphabet[c] for c in string) if all(c in alphabet for c in string) else string.encode()


def _spell_plain(string: str, byte_fallback: bool) -> bytes:
    if byte_fallback and (match := _BYTE_TOKEN.fullmatch(string)):
        return bytes([int(match[1], 16)])
    return string.replace(_SPACE_MARK, " ").encode()


def _spell_word_piece(string: str, prefix: str) -> bytes:
    """WordPiece drops white space: a piece that begins a word, but no punctuation, stands for the space too."""
    if string.startswith(prefix) and string != prefix:
        return string[len(prefix) :].encode()
    return (" " + string if string[:1].isalnum() else string).encode()


def _without_dummy_prefix(part: dict | None) -> dict | None:
    if part is None or part["type"] == "Prepend":
        return None
    for name in ("pretokenizers", "normalizers"):
        if name in part:
            part[name] = [kept for p in part[name] if (kept := _without_dummy_prefix(p)) is not None]
    if part["type"] == "Metaspace":
        part["prepend_scheme"] = "never"
    if part["type"] == "ByteLevel":
        part["add_prefix_space"] = False
    return part

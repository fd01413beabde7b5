"""Describe a tokenizer by the bytes that each id stands for, and turn text into ids.

The tokenizer's own decoder says what the bytes are (token_bytes.py), not the name of a class or a model.
"""

import bisect
import functools
import hashlib
import json
from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Bool, Int, UInt8
from numpy import ndarray
from tokenizers import Tokenizer

from fuselm.models import bpe, segmentation, token_bytes, token_strings
from fuselm.models.segmentation import Segmentation
from fuselm.system import fingerprints
from fuselm.system.errors import name_tokenizer_errors

UNMAPPED = -1
SLOW = 20_000  # tokens; of more, what decoding them corrected is remembered
FORMAT = 1  # of what is remembered; raise it when the same tokenizer would be read otherwise


class Vocabulary:
    """Hold the bytes of every id of a model's output layer, and turn text into ids.

    `token_bytes[id]` is None where the id stands for no text: special and unknown tokens, padding rows. The
    `tokenizer` is taken over: it will read the names of special tokens as text.

    >>> vocabulary = fuselm.load_vocabulary(fuselm.locate_model("models/target"))
    >>> text = vocabulary.segment("a text")
    >>> text.starts[0], len(text.ids) == len(text.starts)
    (np.int32(0), True)
    """

    def __init__(self, tokenizer: Tokenizer, output_size: int):
        description = tokenizer.to_str()
        pipeline = json.loads(description)
        special = {added["id"] for added in pipeline["added_tokens"] if added["special"]}  # no text is made of them
        needed = 1 + max((i for i in tokenizer.get_vocab().values() if i not in special), default=-1)
        if needed > output_size:
            raise ValueError(
                f"tokenizer: {needed} tokens, but the model's output layer has {output_size} rows; "
                "they don't belong together: take the tokenizer that the model came with"
            )
        self.size = output_size
        self.token_strings: list[str | None] = [tokenizer.id_to_token(i) for i in range(output_size)]
        self.word_mark = token_strings.find_word_mark(pipeline)
        self.largest_collapse = _largest_collapse(pipeline)
        self._tokenizer = tokenizer
        self._tokenizer.encode_special_tokens = True  # a special token's name in a text is text
        spelled = token_strings.spell_strings(pipeline, self.token_strings)
        self.token_bytes: list[bytes | None] = _decoded(tokenizer, description, pipeline, spelled)
        self._corrected = {
            i for i, pair in enumerate(zip(spelled, self.token_bytes, strict=True)) if pair[0] != pair[1]
        }
        self._encoded: dict[bytes, tuple[int, ...]] = {}

    @property
    def is_corrected(self) -> bool:
        """Tell whether a token stands for other bytes than its string seems to spell."""
        return bool(self._corrected)

    @functools.cached_property
    def _bare(self) -> Tokenizer:
        """Return the same tokenizer for text that continues another: it puts no space of its own before it."""
        pipeline = json.loads(self._tokenizer.to_str())
        for part in ("normalizer", "pre_tokenizer"):
            pipeline[part] = _without_dummy_prefix(pipeline[part])
        bare = Tokenizer.from_str(json.dumps(pipeline))
        bare.encode_special_tokens = True
        return bare

    @functools.cached_property
    def id_by_bytes(self) -> dict[bytes, int]:
        """Return the id of every byte string that is a token: the lowest of several, byte fallback tokens last."""
        is_byte = [bool(token_strings.BYTE_TOKEN.fullmatch(string or "")) for string in self.token_strings]
        ids: dict[bytes, int] = {}
        for i in sorted(range(self.size), key=is_byte.__getitem__):
            if spelled := self.token_bytes[i]:
                ids.setdefault(spelled, i)
        return ids

    @functools.cached_property
    def merges(self) -> bpe.Merges | None:
        """Return the tokenizer as compiled BPE, without its pre-tokenizer; None if it is no such tokenizer."""
        pipeline = json.loads(self._tokenizer.to_str())
        model = pipeline["model"]
        changes = set(token_strings.list_component_types(pipeline["normalizer"])) - {
            "Sequence",
            "Replace",
            "Prepend",
            "NFC",
        }
        decorated = model.get("continuing_subword_prefix") or model.get("end_of_word_suffix") or model.get("dropout")
        if model["type"] != "BPE" or changes or decorated or self._corrected.intersection(model["vocab"].values()):
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

    @functools.cached_property
    def packed_bytes(self) -> tuple[Int[ndarray, "offsets"], UInt8[ndarray, "bytes"]]:
        """Return where each id's bytes begin and end in an array of all bytes, and that array."""
        spelled = [b or b"" for b in self.token_bytes]
        offsets = np.append(0, np.cumsum([len(b) for b in spelled])).astype(np.int64)
        return offsets, np.frombuffer(b"".join(spelled), np.uint8)

    @functools.cached_property
    def _sorted_bytes(self) -> list[bytes]:
        return sorted(spelled for spelled in self.token_bytes if spelled)

    @functools.cached_property
    def _longest(self) -> int:
        return max(map(len, self.id_by_bytes), default=0)

    def count_with_bytes(self) -> int:
        """Count the ids that stand for text."""
        return len(self._sorted_bytes)

    def count_continuing(self, typed: bytes) -> int:
        """Count the ids that stand for bytes that begin with `typed` and are longer."""
        low = bisect.bisect_right(self._sorted_bytes, typed)
        return bisect.bisect_left(self._sorted_bytes, typed + b"\xff" * (self._longest + 1)) - low

    def segment(self, text: str) -> Segmentation:
        """Tokenize, without special tokens, and find the bytes of `text` that each token covers."""
        with name_tokenizer_errors():
            encoding = self._tokenizer.encode(text, add_special_tokens=False)
        return segmentation.segment(text, encoding.ids, self.spell(encoding.ids), encoding.offsets)

    def spell(self, ids: Iterable[int]) -> list[bytes | None]:
        """Return the bytes of each token."""
        return [self.token_bytes[i] for i in ids]

    def find_spelled(
        self, ids: Int[ndarray, "tokens"], starts: Int[ndarray, "tokens"], text: str
    ) -> Bool[ndarray, "tokens"]:
        """Return one flag per token of a text: does it spell what it covers? `starts` are bytes of the text."""
        return segmentation.find_spelled(self.spell(ids.tolist()), starts, text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text that the tokenizer decodes tokens to; the bytes that they spell, if it has no decoder."""
        if self._tokenizer.decoder is None:
            return b"".join(b or b"" for b in self.spell(ids)).decode("utf-8", "replace")
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)

    def count_tokens(self, texts: list[str]) -> list[int]:
        """Count the tokens of each text, without special tokens."""
        with name_tokenizer_errors():
            return [len(e.ids) for e in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def count_tokens_and_unspelled(self, texts: list[str]) -> tuple[list[int], list[int]]:
        """Count the tokens of each text, and those of its bytes that no token spells."""
        tokens, unspelled = [], []
        with name_tokenizer_errors():
            encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        for text, encoding in zip(texts, encodings, strict=True):
            ids, data = encoding.ids, text.encode()
            joined = b"".join([self._covered_bytes[i] for i in ids])
            tokens.append(len(ids))
            unspelled.append(0 if joined in (data, b" " + data) else self.segment(text).unspelled_bytes)
        return tokens, unspelled

    @functools.cached_property
    def _covered_bytes(self) -> list[bytes]:
        return [b or b"" for b in self.token_bytes]

    def find_token_ends(self, text: str) -> Int[ndarray, "tokens"]:
        """Return the character at which each token ends.

        The bytes that tokens spell decide; if they are not the text's, the tokenizer's own offsets do, and may err.
        """
        data = text.encode()
        with name_tokenizer_errors():
            ids = self._tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids
        ends = np.cumsum(np.diff(self.packed_bytes[0])[np.array(ids, np.int64)])
        if not ids or ends[-1] - len(data) not in (0, 1):  # one is a space that is put before the text
            offsets = self._tokenizer.encode(text, add_special_tokens=False).offsets
            return np.array([end for _, end in offsets], np.int64)
        begun = np.cumsum(np.frombuffer(data, np.uint8) & 0xC0 != 0x80)
        return np.append(0, begun)[np.maximum(ends - (ends[-1] - len(data)), 0)]

    def encode_bytes(self, strings: list[bytes]) -> list[tuple[int, ...]]:
        """Return the tokens that the tokenizer continues a text with for each string; `UNMAPPED` ends an unspelled one.

        Bytes that are no text, or that the tokenizer would change, get the longest tokens that spell them.
        """
        missing = list({s for s in strings if s not in self._encoded})
        texts = [s.decode("utf-8", "ignore") for s in missing]
        with name_tokenizer_errors():
            encodings = self._bare.encode_batch_fast(texts, add_special_tokens=False)
        for s, encoding in zip(missing, encodings, strict=True):
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
                if (found := self.id_by_bytes.get(string[:length])) is not None:
                    ids.append(found)
                    string = string[length:]
                    break
            else:
                return (*ids, UNMAPPED)
        return tuple(ids)


def _decoded(tokenizer: Tokenizer, description: str, pipeline: dict, spelled: list[bytes | None]) -> list[bytes | None]:
    """Return `spelled` as the tokenizer's own decoder corrects it."""

    def correct() -> dict[str, str]:
        return {str(i): text for i, text in token_bytes.find_corrections(tokenizer, pipeline, spelled).items()}

    if len(spelled) < SLOW:
        corrections = correct()
    else:
        key = hashlib.sha256(description.encode()).hexdigest()[:16]
        corrections = fingerprints.recall_or_compute(f"token bytes {FORMAT} {key} {len(spelled)}", correct)
    result = list(spelled)
    for token, text in corrections.items():
        result[int(token)] = text.encode() or None
    return result


def _largest_collapse(pipeline: dict) -> int:
    """Return by how many tokens a text may get fewer, at most, when characters are put behind it.

    A token that is completed takes the place of its parts. WordPiece makes one token of a word that becomes too long.
    """
    added = max((len(token["content"]) for token in pipeline["added_tokens"]), default=0)
    word = pipeline["model"].get("max_input_chars_per_word") or 0
    return 32 + min(added, 1000) + min(word, 1000)


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

"""Describe a tokenizer by the bytes that each id stands for, and turn text into ids.

The tokenizer's own decoder says what the bytes are (token_bytes.py). No name of a class or a model decides anything.
"""

import bisect
import copy
import functools
import json
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from jaxtyping import Bool, Int, UInt8
from numpy import ndarray
from tokenizers import Tokenizer

from fuselm.models import bpe, joined_bytes, segmentation, token_bytes, token_strings, tokenizer_pipeline
from fuselm.models.chat.messages import Dialogue
from fuselm.models.segmentation import Segmentation
from fuselm.system.errors import name_tokenizer_errors

UNMAPPED = -1  # ends the ids of a string that tokens do not spell to its end
MOST_ENCODED = 1 << 18  # strings whose tokens are remembered


class Vocabulary:
    """Hold the bytes of every id of a model's output layer, and turn text into ids.

    `token_bytes[id]` is None if the id stands for no text, as special and unknown tokens and padding rows do. The
    vocabulary changes the given `tokenizer`: it will read the names of special tokens as text.

    >>> vocabulary = fuselm.load_vocabulary(fuselm.locate_model("models/target"))
    >>> text = vocabulary.segment("a text")
    >>> text.starts[0], len(text.ids) == len(text.starts)
    (np.int32(0), True)
    """

    def __init__(self, tokenizer: Tokenizer, output_size: int):
        description = tokenizer.to_str()
        pipeline = json.loads(description)
        special = {added["id"] for added in pipeline["added_tokens"] if added["special"]}  # texts contain none of them
        needed = 1 + max((i for i in tokenizer.get_vocab().values() if i not in special), default=-1)
        if needed > output_size:
            raise ValueError(
                f"tokenizer: {needed} tokens, but the model's output layer has {output_size} rows; "
                "they do not belong together; take the tokenizer that the model came with"
            )
        self.size = output_size
        self.token_strings: list[str | None] = [tokenizer.id_to_token(i) for i in range(output_size)]
        self.word_mark = token_strings.find_word_mark(pipeline)
        self.largest_collapse = tokenizer_pipeline.bound_collapse(pipeline)
        self._tokenizer = tokenizer
        self._tokenizer.encode_special_tokens = True  # a special token's name in a text is text
        spelled = token_strings.spell_strings(pipeline, self.token_strings)
        self.token_bytes: list[bytes | None] = token_bytes.read_token_bytes(tokenizer, description, pipeline, spelled)
        self._corrected = {
            i for i, pair in enumerate(zip(spelled, self.token_bytes, strict=True)) if pair[0] != pair[1]
        }
        self._encoded: dict[bytes, tuple[int, ...]] = {}
        self.read_dialogue: Callable[[Dialogue], Segmentation] | None = None  # by a chat template, if there is one
        self.chat_fingerprint: str | None = None  # of that template, and of all that it makes of a conversation

    def __repr__(self) -> str:
        return f"Vocabulary({self.size:,} ids, {self.count_with_bytes():,} stand for text)"

    @property
    def is_corrected(self) -> bool:
        """Tell whether a token stands for other bytes than its string seems to spell."""
        return bool(self._corrected)

    def describe(self) -> str:
        """Return the tokenizer as JSON."""
        return self._tokenizer.to_str()

    def spell_ends(self, ends: Sequence[int]) -> "Vocabulary":
        """Return the same vocabulary where each of `ends` stands for the byte 0xFF, the end of a conversation's turn.

        That byte is spelled by the first of them, and by no other token; text has none.
        """
        spelling = copy.copy(self)
        cached = [name for name, value in vars(Vocabulary).items() if isinstance(value, functools.cached_property)]
        for name in cached:
            spelling.__dict__.pop(name, None)
        spelling._encoded = {}
        spelling.token_bytes = [None if b == b"\xff" else b for b in self.token_bytes]
        for end in ends:
            spelling.token_bytes[end] = b"\xff"
        spelling.id_by_bytes = {**spelling.id_by_bytes, b"\xff": ends[0]}
        if self.merges is not None:
            byte_ids = self.merges.byte_ids.copy()
            byte_ids[0xFF] = ends[0]
            spelling.merges = self.merges._replace(byte_ids=byte_ids)
        return spelling

    @functools.cached_property
    def id_by_bytes(self) -> dict[bytes, int]:
        """Map every byte string that is a token to its id: the lowest of several, byte fallback tokens last."""
        is_byte = [bool(token_strings.BYTE_TOKEN.fullmatch(string or "")) for string in self.token_strings]
        ids: dict[bytes, int] = {}
        for i in sorted(range(self.size), key=is_byte.__getitem__):
            if spelled := self.token_bytes[i]:
                ids.setdefault(spelled, i)
        return ids

    @functools.cached_property
    def merges(self) -> bpe.Merges | None:
        """Return the tokenizer as compiled BPE, without its pre-tokenizer; None if it is no such tokenizer."""
        return tokenizer_pipeline.compile_pipeline(json.loads(self._tokenizer.to_str()), self._corrected)

    @functools.cached_property
    def _continuing_tokenizer(self) -> Tokenizer:
        """Return the same tokenizer for text that continues another: it puts no space of its own before it."""
        return tokenizer_pipeline.build_continuing_tokenizer(self._tokenizer)

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
    def _most_bytes(self) -> int:
        """Return the number of bytes of the longest token."""
        return max(map(len, self.id_by_bytes), default=0)

    def count_with_bytes(self) -> int:
        """Count the ids that stand for text."""
        return len(self._sorted_bytes)

    def count_continuing(self, typed: bytes) -> int:
        """Count the ids whose bytes begin with `typed` and are longer."""
        low = bisect.bisect_right(self._sorted_bytes, typed)
        return bisect.bisect_left(self._sorted_bytes, typed + b"\xff" * (self._most_bytes + 1)) - low

    def segment(self, text: str | Dialogue) -> Segmentation:
        """Tokenize, without special tokens, and find the bytes of `text` that each token covers.

        A conversation is read in the model's chat template, and its response bytes stand for a text. Raises
        `ValueError` if the model has no template, or the template refuses the conversation.
        """
        if isinstance(text, Dialogue):
            return self._segment_dialogue(text)
        (ids,) = self.tokenize([text])
        data = text.encode()
        if (starts := self.find_starts(ids, data)) is not None:
            return Segmentation(ids=ids, starts=starts, spelled=np.ones(len(ids), bool), size=len(data))
        with name_tokenizer_errors():
            encoding = self._tokenizer.encode(text, add_special_tokens=False)  # with offsets, in twice the time
        return segmentation.segment(text, encoding.ids, self.spell(encoding.ids), encoding.offsets)

    def tokenize(self, texts: Sequence[str]) -> list[Int[ndarray, "_"]]:
        """Return the tokens of texts as `segment` does, without the bytes that they cover."""
        with name_tokenizer_errors():
            encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in encodings]

    def _segment_dialogue(self, dialogue: Dialogue) -> Segmentation:
        if self.read_dialogue is None:
            raise ValueError("a conversation needs a model with a chat template; set chat.template")
        return self.read_dialogue(dialogue)

    def spell(self, ids: Iterable[int]) -> list[bytes | None]:
        """Return the bytes of each token."""
        return [self.token_bytes[i] for i in ids]

    def find_spelled(
        self, ids: Int[ndarray, "tokens"], starts: Int[ndarray, "tokens"], text: str | Dialogue
    ) -> Bool[ndarray, "tokens"]:
        """Return one flag per token of a text: does it spell what it covers? `starts` are positions in bytes."""
        data = text.encode()
        if isinstance(text, str):
            return self.find_spelled_bytes(ids, starts, data)
        strings, flags = self.spell(ids.tolist()), [np.zeros(0, bool)]
        for turn in segmentation.split_turns(strings, starts, data):
            flags.append(segmentation.find_spelled(strings[turn.tokens], turn.starts, turn.data))
        return np.concatenate(flags)

    def find_spelled_bytes(
        self, ids: Int[ndarray, "tokens"], starts: Int[ndarray, "tokens"], data: bytes
    ) -> Bool[ndarray, "tokens"]:
        """Return what `find_spelled` does of a text that is given as bytes."""
        if self.is_spelled_by(ids, starts, data):
            return np.ones(len(ids), bool)
        return segmentation.find_spelled(self.spell(ids.tolist()), starts, data)

    def is_spelled_by(self, ids: Int[ndarray, "tokens"], starts: Int[ndarray, "tokens"], data: bytes) -> bool:
        """Tell whether tokens that begin at `starts` spell all of a text, maybe with a space before it."""
        own = self.find_starts(ids, data)
        return own is not None and np.array_equal(own, starts)

    def find_starts(self, ids: Int[ndarray, "tokens"], data: bytes) -> Int[ndarray, "tokens"] | None:
        """Return the byte at which each token of a text begins; None if they do not spell it (joined_bytes.py)."""
        return joined_bytes.find_starts(ids, *self.packed_bytes, data)

    def decode(self, ids: Sequence[int]) -> str:
        """Decode tokens to text by the tokenizer's decoder, or by the bytes that they spell if it has none."""
        if self._tokenizer.decoder is None:
            return b"".join(b or b"" for b in self.spell(ids)).decode("utf-8", "replace")
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)

    def count_tokens(self, texts: Sequence[str | Dialogue]) -> list[int]:
        """Count the tokens of each text without special tokens, or all that are read of a conversation."""
        plain = [text for text in texts if isinstance(text, str)]
        with name_tokenizer_errors():
            counts = iter([len(e.ids) for e in self._tokenizer.encode_batch_fast(plain, add_special_tokens=False)])
        return [next(counts) if isinstance(text, str) else len(self.segment(text).read_ids) for text in texts]

    def count_tokens_and_unspelled(self, texts: Sequence[str | Dialogue]) -> tuple[list[int], list[int]]:
        """Count the tokens of each text as `count_tokens` does, and those of its bytes that no token spells."""
        tokens, unspelled = [], []
        plain = [text for text in texts if isinstance(text, str)]
        with name_tokenizer_errors():
            encodings = iter(self._tokenizer.encode_batch_fast(plain, add_special_tokens=False))
        for text in texts:
            if isinstance(text, Dialogue):
                read = self.segment(text)
                tokens.append(len(read.read_ids))
                unspelled.append(read.unspelled_bytes)
                continue
            ids, data = next(encodings).ids, text.encode()
            joined = b"".join([self._covered_bytes[i] for i in ids])
            tokens.append(len(ids))
            unspelled.append(0 if joined in (data, b" " + data) else self.segment(text).unspelled_bytes)
        return tokens, unspelled

    @functools.cached_property
    def _covered_bytes(self) -> list[bytes]:
        return [b or b"" for b in self.token_bytes]

    def find_token_ends(self, text: str) -> Int[ndarray, "tokens"]:
        """Return the character at which each token ends.

        The bytes that tokens spell decide. If they are not the text's, the tokenizer's own offsets decide and may err.
        """
        data = text.encode()
        with name_tokenizer_errors():
            ids = self._tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids
        ends = np.cumsum(np.diff(self.packed_bytes[0])[np.array(ids, np.int64)])
        if not ids or ends[-1] - len(data) not in (0, 1):  # a space before the text is one more
            offsets = self._tokenizer.encode(text, add_special_tokens=False).offsets
            return np.array([end for _, end in offsets], np.int64)
        begun = np.cumsum(np.frombuffer(data, np.uint8) & 0xC0 != 0x80)
        return np.append(0, begun)[np.maximum(ends - (ends[-1] - len(data)), 0)]

    def encode_bytes(self, strings: list[bytes]) -> list[tuple[int, ...]]:
        """Return the tokens that the tokenizer makes of each string behind a text; `UNMAPPED` ends an unspelled one.

        Bytes that are no text, or that the tokenizer would change, get the longest tokens that spell them.
        """
        known = self._encoded  # other threads may replace it
        missing = list({s for s in strings if s not in known})
        if missing and len(known) + len(missing) > MOST_ENCODED:
            known = self._encoded = {s: known[s] for s in strings if s in known}
        texts = [s.decode("utf-8", "ignore") for s in missing]
        with name_tokenizer_errors():
            encodings = self._continuing_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        for s, encoding in zip(missing, encodings, strict=True):
            ids = tuple(encoding.ids)
            spelled = b"".join(self.token_bytes[i] or b"\xff" for i in ids)  # 0xff is in no text
            if not s.startswith(spelled):
                ids, spelled = (), b""
            known[s] = ids if spelled == s else ids + self._cut_greedily(s[len(spelled) :])
        return [known[s] for s in strings]

    def _cut_greedily(self, string: bytes) -> tuple[int, ...]:
        ids = []
        while string:
            for length in range(min(len(string), self._most_bytes), 0, -1):
                if (found := self.id_by_bytes.get(string[:length])) is not None:
                    ids.append(found)
                    string = string[length:]
                    break
            else:
                return (*ids, UNMAPPED)
        return tuple(ids)

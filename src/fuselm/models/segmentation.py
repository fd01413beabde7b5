"""Find the bytes of a text that each token covers, and whether it spells them; see docs/tokenizers.md."""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int
from numpy import ndarray

from fuselm.models.chat.messages import END_OF_TURN

BITS_PER_UNSPELLED_BYTE = 8  # as by the uniform code over bytes, which gives no credit
COMPARABLE = 0.01  # a model that leaves a larger share of bytes unspelled gets no verdict


def compute_bits_per_byte(nats: float, size: int | float) -> float:
    """Return the bits per byte of a text of `size` bytes to which a model gives `nats`; 0 if it is empty."""
    return nats / max(size, 1) / math.log(2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """Hold all tokens that a model reads of a conversation: its template, what users say, and the responses.

    Nothing predicts the `first` token, which stands where a text has the model's context token. Of `ids`, which follow
    it, those that are `kept` are the tokens of the segmentation.
    """

    first: int
    ids: Int[ndarray, "read"]
    kept: Bool[ndarray, "read"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Segmentation:
    """Hold a text as tokens. Token i covers the bytes `starts[i]` to `starts[i+1]` (the last one: to `size`).

    `starts[0]` is -1 where the tokenizer puts a space of its own before the text. Spans tile the text; a token has
    an empty span where a normaliser made several tokens of one character. Token i is `spelled` if its own bytes are
    those that it covers.

    A conversation is segmented by its response bytes. `reading` says what else the model reads of it.
    """

    ids: Int[ndarray, "tokens"]
    starts: Int[ndarray, "tokens"]  # bytes
    spelled: Bool[ndarray, "tokens"]
    size: int  # bytes of text
    reading: Reading | None = None

    @property
    def read_ids(self) -> Int[ndarray, "read"]:
        """Return all tokens that a model reads, except the one in place of the context token."""
        return self.ids if self.reading is None else self.reading.ids

    @property
    def is_kept(self) -> Bool[ndarray, "read"]:
        """Flag those of the tokens that are read which are tokens of the text."""
        return np.ones(len(self.ids), bool) if self.reading is None else self.reading.kept

    @property
    def ends(self) -> Int[ndarray, "tokens"]:
        """Return the byte at which each token's span ends."""
        return np.append(self.starts[1:], self.size)[: len(self.starts)]

    @property
    def unspelled_bytes(self) -> int:
        """Count the bytes of text that no token spells."""
        return count_unspelled(self.starts, self.spelled, self.size)


def segment(text: str, ids: Sequence[int], spelled: Sequence[bytes | None], offsets: Sequence[tuple[int, int]]):
    """Find the bytes of `text` that each token covers, by the bytes that it stands for and by its characters."""
    data = text.encode()
    strings = [b or b"" for b in spelled]
    joined = b"".join(strings)
    if joined in (data, b" " + data):
        lengths = np.fromiter(map(len, strings), np.int64, len(strings))
        starts = np.cumsum(lengths) - lengths - (len(joined) - len(data))
        is_spelled = np.ones(len(strings), bool)
    else:
        starts = _find_starts_from_offsets(text, data, strings, offsets)
        is_spelled = find_spelled(strings, starts, data)
    return Segmentation(ids=np.array(ids, np.int32), starts=starts.astype(np.int32), spelled=is_spelled, size=len(data))


def find_spelled(
    strings: Sequence[bytes | None], starts: Int[ndarray, "tokens"], data: bytes
) -> Bool[ndarray, "tokens"]:
    """Return one flag per token: whether its bytes are those that it covers in the text.

    The first may begin, and the last may end, with a space that the tokenizer puts around the text.
    """
    if not len(starts):
        return np.zeros(0, bool)
    stream, first = b" " + data, int(starts[0]) + 1
    if b"".join(b or b"" for b in strings) == stream[first:]:
        lengths = [len(b or b"") for b in strings]
        if np.array_equal(np.cumsum([first - 1, *lengths[:-1]]), starts):
            return np.ones(len(starts), bool)
    ends = [*(starts[1:] + 1).tolist(), len(stream)]
    covered = [stream[begin:end] for begin, end in zip((starts + 1).tolist(), ends, strict=True)]
    result = np.array([(b or b"") == part for b, part in zip(strings, covered, strict=True)])
    result[-1] |= strings[-1] == covered[-1] + b" "
    return result


class Turn(NamedTuple):
    """Describe a response within a segmentation: its tokens, where they begin in its own bytes, and these."""

    tokens: slice
    starts: Int[ndarray, "tokens"]
    data: bytes


def split_turns(strings: Sequence[bytes | None], starts: Int[ndarray, "tokens"], data: bytes) -> Iterator[Turn]:
    """Yield the responses of a conversation, each with `END_OF_TURN`; a text without that byte is one of them.

    A response's first token may begin with a space that is not of the response, as that of a text may.
    """
    ends = [n + 1 for n, byte in enumerate(data) if byte == END_OF_TURN[0]]
    edges = [0, *ends] if ends and ends[-1] == len(data) else [0, *ends, len(data)]
    for begin, end in itertools.pairwise(edges):
        first, stop = np.searchsorted(starts.clip(0), (begin, end)).tolist()
        if end == len(data):
            stop = len(starts)
        own = starts[first:stop] - np.int32(begin)
        string = (strings[first] or b"") if stop > first else b""
        is_at_begin = begin > 0 and len(own) > 0 and own[0] == 0
        if is_at_begin and not data.startswith(string, begin) and (b" " + data[begin:end]).startswith(string):
            own[0] = -1
        yield Turn(slice(first, stop), own, data[begin:end])


def count_bytes(starts: Int[ndarray, "tokens"], size: int) -> Int[ndarray, "tokens"]:
    """Count the bytes of text that each token covers: they add up to `size`, unless there are no tokens.

    A space that the tokenizer puts before the text is no byte of it: starts `[-1, 2]` of 4 bytes are 2 and 2.
    """
    begins = starts.clip(0).astype(np.int64)
    return np.append(begins[1:], size)[: len(begins)] - begins


def count_unspelled(starts: Int[ndarray, "tokens"], spelled: Bool[ndarray, "tokens"], size: int) -> int:
    """Count the bytes of a text that no token spells: all of them if there are no tokens."""
    return size - int(count_bytes(starts, size)[spelled].sum())


def describe_shares(shares: Mapping[str, float]) -> str:
    """Name the domains of which too many bytes are not spelled, with the shares."""
    return ", ".join(f"{share:.1%} of {d}" for d, share in shares.items() if d != "average" and share > COMPARABLE)


def _find_starts_from_offsets(
    text: str, data: bytes, strings: list[bytes], offsets: Sequence[tuple[int, int]]
) -> ndarray:
    """Find spans where the tokens don't spell the text (a normaliser changed it, or dropped white space).

    A token that spells what follows covers it, if it ends before the characters that the next one came from. Any other
    token covers what follows up to the end of the characters that the tokenizer says it came from. What no token came
    from belongs to the token after it, and to the last one at the end of the text.
    """
    byte_of = np.zeros(len(text) + 1, np.int64)
    np.cumsum([len(c.encode()) for c in text], out=byte_of[1:])
    starts = np.zeros(len(strings), np.int64)
    position = 0
    nexts = [*(first for first, _ in offsets[1:]), len(text)][: len(offsets)]
    for i, (token, (_, last), following) in enumerate(zip(strings, offsets, nexts, strict=True)):
        starts[i] = position
        end = int(byte_of[last])
        limit = max(end, int(byte_of[following]))
        if token and data.startswith(token, position) and position + len(token) <= limit:
            position += len(token)
        elif i == 0 and len(token) > 1 and (b" " + data).startswith(token) and len(token) - 1 <= limit:
            starts[i] = -1
            position = len(token) - 1
        else:
            position = max(position, end)
    return starts

"""Learn from texts what comes after each token of a source; branches.py puts it after tokens that did not come."""

import functools
from collections import Counter, defaultdict
from collections.abc import Iterable

from fuselm.models.chat.messages import END_OF_TURN, Dialogue
from fuselm.models.vocabulary import Vocabulary

LEAST_BYTES, MOST_BYTES = 6, 40  # bytes that are kept of what follows; white space is followed to its end
MOST_FOLLOWERS = 32  # of one token
MOST_POOLED = 8  # of other tokens of its class
MOST_TOKENS = 1 << 19  # of the texts
PRIOR = 2.0  # what tokens of the same class are followed by counts as much as this many occurrences
NOTHING = b""  # stands for all that changes no tokens before it


class Followers:
    """Hold what follows each token of a source in texts, with probabilities.

    A token that is seldom or never in the texts borrows from the tokens whose last character is of the same class. If
    that is a letter, it borrows nothing: what comes next is then taken to begin a token of its own.
    """

    def __init__(self, source: Vocabulary, texts: Iterable[str | Dialogue]):
        self._token_bytes = source.token_bytes
        self._by_token: dict[int, Counter[bytes]] = defaultdict(Counter)
        self._by_class: dict[str, Counter[bytes]] = defaultdict(Counter)
        left = MOST_TOKENS
        for text in texts:
            if left <= 0:
                break
            segmentation, data = source.segment(text), text.encode()
            left -= len(segmentation.ids)
            for token, end in zip(segmentation.ids.tolist(), segmentation.ends.tolist(), strict=True):
                if follower := _cut_follower(data, end):
                    self._by_token[token][follower] += 1
                    self._by_class[_classify_end(self._token_bytes[token])][follower] += 1
        self._pools = {kind: _choose(found, MOST_POOLED) for kind, found in self._by_class.items() if kind != "letter"}
        self.of = functools.cache(self._find)

    def _find(self, token: int) -> dict[bytes, float]:
        """Return what may follow a token, with probabilities that sum to 1."""
        pooled = self._pools.get(_classify_end(self._token_bytes[token])) or {NOTHING: 1.0}
        if (own := self._by_token.get(token)) is None:
            return pooled
        share = own.total() / (own.total() + PRIOR)
        result = {follower: p * share for follower, p in _choose(own, MOST_FOLLOWERS).items()}
        for follower, p in pooled.items():
            result[follower] = result.get(follower, 0.0) + p * (1 - share)
        return result


def _choose(counts: Counter[bytes], most: int) -> dict[bytes, float]:
    """Return shares of all strings or, if there are more than `most`, of a systematic sample in alphabetical order."""
    strings, total = sorted(counts), counts.total()
    if len(strings) <= most:
        return {s: counts[s] / total for s in strings}
    result: Counter[bytes] = Counter()
    index, passed = 0, counts[strings[0]]
    for k in range(most):
        while passed <= (k + 0.5) * total / most:
            index += 1
            passed += counts[strings[index]]
        result[strings[index]] += 1 / most
    return dict(result)


def _cut_follower(data: bytes, begin: int) -> bytes:
    """Return some bytes from `begin` on that do not end in white space or inside a character, or end a turn.

    Nothing follows the end of a text or of a turn.
    """
    if data[begin - 1 : begin] == END_OF_TURN:
        return b""
    end = min(begin + LEAST_BYTES, len(data))
    while end < min(len(data), begin + MOST_BYTES) and data[end - 1 : end].isspace():
        end += 1
    while end < len(data) and data[end] & 0xC0 == 0x80:
        end += 1
    if (turn_ends := data.find(END_OF_TURN, begin, end)) >= 0:
        return data[begin : turn_ends + 1]
    return b"" if data[end - 1 : end].isspace() else data[begin:end]


def _classify_end(string: bytes | None) -> str:
    """Name the class of a token's last character."""
    last = (string or b"")[-1:]
    if last.isalpha() or last >= b"\x80":
        return "letter"
    if last in (b"\n", b"\r"):
        return "line end"
    if last.isspace():
        return "space" if string == b" " else "spaces"
    return "digit" if last.isdigit() else "other"

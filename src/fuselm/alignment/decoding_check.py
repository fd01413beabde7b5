"""Measure whether a source's candidates off the text spell what their bytes say, for `fuselm fidelity`.

On the text itself a wrong map of tokens to bytes may not show. So the likeliest other tokens of some rows are decoded
after the tokens before them, and what they add is compared with their bytes; then it is tokenized again.
"""

from dataclasses import dataclass

import numpy as np

from fuselm.models.token_bytes import LOST
from fuselm.models.vocabulary import Vocabulary
from fuselm.stores.store import Trace

ROWS = 256  # of all documents, at most, are looked at
EACH = 8  # rows of one document
CANDIDATES = 3  # of one row
BEFORE = 16  # tokens that are decoded before a candidate


@dataclass(slots=True, kw_only=True)
class DecodingCheck:
    """Probability of candidates that were tried, and of those whose bytes are right."""

    rows: int = 0
    tried: float = 0.0
    right: float = 0.0

    def add(self, vocabulary: Vocabulary, trace: Trace) -> None:
        """Try candidates of a few rows, evenly spread over the document."""
        count = min(EACH, ROWS - self.rows, len(trace.tokens))
        for row in np.linspace(0, len(trace.tokens) - 1, max(count, 0)).astype(int).tolist():
            self.rows += 1
            ids, logprobs = trace.distributions.row(row)
            order = np.argsort(-logprobs, kind="stable")
            others = [e for e in order.tolist() if ids[e] != trace.tokens[row] and vocabulary.token_bytes[ids[e]]]
            for e in others[:CANDIDATES]:
                outcome = decodes_to_its_bytes(
                    vocabulary, trace.tokens[max(row - BEFORE, 0) : row].tolist(), int(ids[e])
                )
                if outcome is not None:
                    mass = float(np.exp(logprobs[e]))
                    self.tried += mass
                    self.right += mass * outcome

    @property
    def share(self) -> float:
        return self.right / self.tried if self.tried else 1.0


def decodes_to_its_bytes(vocabulary: Vocabulary, before: list[int], token: int) -> bool | None:
    """Tell whether tokens decode to what their bytes say, and that is tokenized to the bytes of `token` again.

    A space that the tokenizer puts at either end may be there or not. None where nothing can be said: a token before
    stands for no text, or what is decoded is no whole characters.
    """
    strings = vocabulary.spell([*before, token])
    text = vocabulary.decode([*before, token])
    if None in strings or LOST in text:
        return None
    joined = b"".join(b or b"" for b in strings)
    begun = joined.removeprefix(b" ")
    if text.encode() not in (joined, begun, joined.removesuffix(b" "), begun.removesuffix(b" ")):
        return False
    again = vocabulary.segment(text)
    last = again.ends > again.size - len((strings[-1] or b"").strip(b" "))
    return bool(again.spelled[last].all())

"""Check for `fuselm fidelity` that tokens which are not in the text decode to what their bytes say.

A wrong map of tokens to bytes may not show on the text itself. So the most probable other tokens of some rows are
decoded after the tokens before them, and what they add is compared with their bytes; then it is tokenized again.
"""

from dataclasses import dataclass

import numpy as np

from fuselm.models.chat.messages import END_OF_TURN
from fuselm.models.token_bytes import LOST
from fuselm.models.vocabulary import Vocabulary
from fuselm.stores.store import Trace

MOST_ROWS = 256  # rows that are checked, of all documents
ROWS_PER_DOCUMENT = 8
CANDIDATES_PER_ROW = 3
TOKENS_BEFORE = 16  # tokens that are decoded before a candidate


@dataclass(slots=True, kw_only=True)
class DecodingCheck:
    """Hold the mass of the candidates that were tried, and of those whose bytes are right."""

    rows: int = 0
    tried: float = 0.0
    right: float = 0.0

    def add(self, vocabulary: Vocabulary, trace: Trace) -> None:
        """Try candidates of a few rows, evenly spread over the document."""
        count = min(ROWS_PER_DOCUMENT, MOST_ROWS - self.rows, len(trace.tokens))
        for row in np.linspace(0, len(trace.tokens) - 1, max(count, 0)).astype(int).tolist():
            self.rows += 1
            ids, logprobs = trace.distributions.row(row)
            order = np.argsort(-logprobs, kind="stable")
            others = [e for e in order.tolist() if ids[e] != trace.tokens[row] and vocabulary.token_bytes[ids[e]]]
            for e in others[:CANDIDATES_PER_ROW]:
                outcome = decodes_to_its_bytes(
                    vocabulary, trace.tokens[max(row - TOKENS_BEFORE, 0) : row].tolist(), int(ids[e])
                )
                if outcome is not None:
                    mass = float(np.exp(logprobs[e]))
                    self.tried += mass
                    self.right += mass * outcome

    @property
    def share(self) -> float:
        """Return the share of the tried candidates' mass whose bytes are right, or 1 if none was tried."""
        return self.right / self.tried if self.tried else 1.0


def decodes_to_its_bytes(vocabulary: Vocabulary, before: list[int], token: int) -> bool | None:
    """Return whether tokens decode to what their bytes say, and the text tokenizes to the bytes of `token` again.

    A space that the tokenizer puts at either end may be there or not. Return None where nothing can be said, because a
    token before stands for no text, or because the decoded text does not consist of whole characters.
    """
    strings = vocabulary.spell([*before, token])
    text = vocabulary.decode([*before, token])
    if None in strings or END_OF_TURN in strings or LOST in text:
        return None
    joined = b"".join(b or b"" for b in strings)
    begun = joined.removeprefix(b" ")
    if text.encode() not in (joined, begun, joined.removesuffix(b" "), begun.removesuffix(b" ")):
        return False
    tokenized = vocabulary.segment(text)
    last = tokenized.ends > tokenized.size - len((strings[-1] or b"").strip(b" "))
    return bool(tokenized.spelled[last].all())

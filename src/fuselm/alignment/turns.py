"""Align a conversation response by response, each as a text of its own.

Template text stands between two responses, so nothing that a model may write continues from one into the next.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

from fuselm.alignment.stretches import place_rows, take_rows
from fuselm.models.chat.messages import END_OF_TURN
from fuselm.models.segmentation import Segmentation, split_turns
from fuselm.models.vocabulary import Vocabulary
from fuselm.stores.distributions import Distributions
from fuselm.stores.store import Trace


class AlignedTurn(NamedTuple):
    """Hold a response as a text: its trace, the target's tokens of it, and where these are in the conversation."""

    trace: Trace
    target: Segmentation
    data: bytes
    tokens: slice


def pair_turns(
    source: Vocabulary, target: Vocabulary, trace: Trace, segmentation: Segmentation, data: bytes
) -> Iterator[AlignedTurn]:
    """Yield the responses of a conversation as both tokenizers read them; a text is yielded whole."""
    if END_OF_TURN not in data:
        yield AlignedTurn(trace, segmentation, data, slice(0, len(segmentation.ids)))
        return
    of_source = split_turns(source.spell(trace.tokens.tolist()), trace.starts, data)
    of_target = split_turns(target.spell(segmentation.ids.tolist()), segmentation.starts, data)
    for read, wanted in zip(of_source, of_target, strict=True):
        size = len(read.data)
        own = replace(
            trace,
            size=size,
            tokens=trace.tokens[read.tokens],
            starts=read.starts,
            distributions=take_rows(trace.distributions, read.tokens),
            weights=trace.weights[read.tokens],
        )
        text = Segmentation(
            ids=segmentation.ids[wanted.tokens],
            starts=wanted.starts,
            spelled=segmentation.spelled[wanted.tokens],
            size=size,
        )
        yield AlignedTurn(own, text, read.data, wanted.tokens)


def align_by_turn(
    align: Callable[[AlignedTurn], Distributions], turns: Iterator[AlignedTurn], tokens: int
) -> Distributions:
    """Return the rows of all turns, each aligned by itself."""
    return place_rows(tokens, [(turn.tokens, align(turn)) for turn in turns])

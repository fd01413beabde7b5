"""Choose the tokens of a conversation that count, the assistants' contents and the ends of turns, with their bytes."""

from collections.abc import Sequence, Set
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int
from numpy import ndarray

from fuselm.models import segmentation
from fuselm.models.chat.control_tokens import EncodedText
from fuselm.models.chat.messages import END_OF_TURN
from fuselm.models.segmentation import Segmentation
from fuselm.models.vocabulary import Vocabulary


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """Hold one assistant's turn: the message it is, and its tokens as a text of its own.

    The text is the content and the byte `END_OF_TURN`. It begins at byte `begin` of the response bytes, and its tokens
    are `rows` of the conversation's kept tokens. `segmentation.starts[0]` is -1 where the first token has the space
    before the content, too.
    """

    message: int
    begin: int
    rows: slice
    segmentation: Segmentation


@dataclass(frozen=True, slots=True, kw_only=True)
class ByteSpan:
    """Say where a content is in an encoded text, in bytes.

    Each of `pieces` has the bytes of the content and of the text where it begins, and its size.
    """

    content: bytes
    begin: int
    end: int
    pieces: tuple[tuple[int, int, int], ...]
    until: int  # the turn's end is looked for before this byte


def find_end(encoded: EncodedText, span: ByteSpan, ends: Set[int], *, anywhere: bool) -> int | None:
    """Return the token that ends a turn: the first of `ends` that the template writes behind the content.

    Nothing but white space may stand before it, unless it may be `anywhere`, as behind tool calls. None if there is
    none.
    """
    for n in range(int(np.searchsorted(encoded.begins, span.end)), len(encoded.ids)):
        if encoded.begins[n] >= span.until and n > 0 and encoded.begins[n] > span.end:
            return None
        if encoded.controls[n] and int(encoded.ids[n]) in ends:
            return n
        if not anywhere and encoded.data[max(encoded.begins[n], 0) : encoded.ends[n]].strip():
            return None
    return None


def find_next(encoded: EncodedText, span: ByteSpan, tokens: Sequence[int]) -> int | None:
    """Return the token behind a content; None if there is none before the next content."""
    n = tokens[-1] + 1 if tokens else int(np.searchsorted(encoded.begins, span.end))
    return n if n < len(encoded.ids) and encoded.begins[n] < span.until else None


def choose_content_tokens(encoded: EncodedText, span: ByteSpan, strings: Sequence[bytes | None]) -> tuple[list, list]:
    """Return the tokens of a content, and the byte of it at which each begins; `strings` are the text's tokens' bytes.

    A token that begins before the content begins at -1 if it has the one space before it, too.
    """
    tokens: list[int] = []
    starts: list[int] = []
    for content, begin, size in span.pieces:
        inside = (encoded.begins < begin + size) & (encoded.ends > begin)
        inside |= (encoded.begins == encoded.ends) & (encoded.begins > begin) & (encoded.begins <= begin + size)
        for n in np.flatnonzero(inside & ~encoded.controls).tolist():
            if tokens and n <= tokens[-1]:
                continue
            early = begin - int(encoded.begins[n])
            with_space = early == 1 and not tokens and content == 0 and (strings[n] or b"").startswith(b" ")
            tokens.append(n)
            starts.append(-1 if with_space else content - min(early, 0))
    if tokens and starts[0] > 0:
        starts[0] = 0  # it stands for what was left out before it
    return tokens, starts


def build_turn(
    message: int,
    begin: int,
    first_row: int,
    ids: Int[ndarray, "tokens"],
    starts: Sequence[int],
    content: bytes,
    vocabulary: Vocabulary,
) -> Turn:
    """Build a turn of its tokens and of where they begin; `vocabulary` spells the ends of turns."""
    data = content + END_OF_TURN
    begins = np.array(starts, np.int32)
    spelled = segmentation.find_spelled(vocabulary.spell(ids.tolist()), begins, data)
    return Turn(
        message=message,
        begin=begin,
        rows=slice(first_row, first_row + len(ids)),
        segmentation=Segmentation(ids=ids.astype(np.int32), starts=begins, spelled=spelled, size=len(data)),
    )


def join_turns(turns: Sequence[Turn]) -> Segmentation:
    """Return the turns as one segmentation of the response bytes.

    A turn's first token may begin one byte early, at the end of the turn before it: see `Turn`.
    """
    parts = [turn.segmentation for turn in turns]
    return Segmentation(
        ids=np.concatenate([part.ids for part in parts]),
        starts=np.concatenate([turn.segmentation.starts + turn.begin for turn in turns]).astype(np.int32),
        spelled=np.concatenate([part.spelled for part in parts]),
        size=sum(part.size for part in parts),
    )


def is_merged(encoded: EncodedText, span: ByteSpan, tokens: Sequence[int], starts: Sequence[int]) -> bool:
    """Tell whether a content's first or last token has some of the template's text, except for the space before it."""
    early = starts[:1] != [-1] and any(encoded.begins[n] < span.pieces[0][1] for n in tokens[:1])
    return bool(early) or any(encoded.ends[n] > sum(span.pieces[-1][1:]) for n in tokens[-1:])


def is_swallowed(encoded: EncodedText, span: ByteSpan, tokens: Sequence[int]) -> bool:
    """Tell whether special tokens beside a content take white space of it, as those of Phi-3 do."""
    if not span.pieces or not tokens:
        return bool(span.pieces)
    return bool(
        encoded.own_begins[tokens[0]] > span.pieces[0][1] or encoded.ends[tokens[-1]] < sum(span.pieces[-1][1:])
    )


def mark_tokens(encoded: EncodedText, begin: int, end: int) -> Bool[ndarray, "tokens"]:
    """Return one flag per token: whether it is among those that cover these bytes, from the first to the last."""
    flags = np.zeros(len(encoded.ids), bool)
    own = encoded.own_begins
    if len(inside := np.flatnonzero((own < end) & (encoded.ends > begin) & (own < encoded.ends))):
        flags[inside[0] : inside[-1] + 1] = True
    return flags

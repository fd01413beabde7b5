"""Cut a conversation into pieces that every reader takes whole: between turns first, with what was said before.

A piece holds some exchanges, each what is asked and what the assistant then says. Before them stand the system's
message and as many earlier exchanges as fit, which are context: nothing in them is learned again. A response that does
not fit behind what it answers is shortened, and its turn then has no end.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from fuselm.documents import cutting
from fuselm.documents.cutting import Reader
from fuselm.documents.texts import TextRow
from fuselm.models.chat.messages import Dialogue, Message

CONTEXT_SHARE = 0.5  # of a piece, for earlier exchanges
Exchange = list[Message]


def is_readable(row: TextRow, readers: Sequence[Reader], *, skip: Callable[[str], None] | None) -> bool:
    """Tell whether every reader's chat template takes a row's conversation; texts are always taken.

    Raises `ValueError`, with the row's line, unless there is `skip`, which gets the message instead.
    """
    if isinstance(row.text, str):
        return True
    for reader in readers:
        try:
            reader.vocabulary.segment(row.text)
        except ValueError as error:
            if skip is None:
                raise ValueError(f"{row.where}: {error}") from None
            skip(f"{row.where}: {error}")
            return False
    return True


def cut_dialogue(dialogue: Dialogue, readers: Sequence[Reader], max_bytes: int | None = None) -> Iterator[Dialogue]:
    """Yield pieces that fit `max_bytes` of contents and all readers; none where not even a question fits."""

    def fits(piece: Dialogue) -> bool:
        if max_bytes is not None and piece.count_bytes() > max_bytes:
            return False
        return all(r.vocabulary.count_tokens([piece])[0] < r.max_tokens for r in readers)

    if fits(dialogue):
        yield dialogue
        return
    head, exchanges = split_exchanges(dialogue.messages)

    def join(context: Sequence[Exchange], new: Sequence[Exchange]) -> Dialogue:
        before = [_make_context(message) for exchange in context for message in exchange]
        return replace(dialogue, messages=(*head, *before, *(m for exchange in new for m in exchange)))

    begin, largest = 0, 0
    while begin < len(exchanges):
        first = _find_context(exchanges, begin, largest * CONTEXT_SHARE)
        while first < begin and not fits(join(exchanges[first:begin], exchanges[begin : begin + 1])):
            first += 1
        stop = begin
        while stop < len(exchanges) and fits(join(exchanges[first:begin], exchanges[begin : stop + 1])):
            stop += 1
        if stop == begin:
            piece = _shorten_response(join([], exchanges[begin : begin + 1]), fits)
            stop = begin + 1
        else:
            while first > 0 and fits(join(exchanges[first - 1 : begin], exchanges[begin:stop])):
                first -= 1
            piece = join(exchanges[first:begin], exchanges[begin:stop])
        if piece is not None and piece.responses:
            largest = max(largest, piece.count_bytes())
            yield piece
        begin = stop


def split_exchanges(messages: Sequence[Message]) -> tuple[list[Message], list[Exchange]]:
    """Return the messages before the first question, and the exchanges, each from a question to the next one."""
    head: list[Message] = []
    exchanges: list[Exchange] = []
    for message in messages:
        if not exchanges and message.role in ("system", "developer"):
            head.append(message)
        elif not exchanges or (message.role == "user" and exchanges[-1][-1].role != "user"):
            exchanges.append([message])
        else:
            exchanges[-1].append(message)
    return head, exchanges


def _find_context(exchanges: Sequence[Exchange], begin: int, most: float) -> int:
    """Return the first of the exchanges right before `begin` that have at most `most` bytes together."""
    first, size = begin, 0
    while first > 0:
        size += sum(len(message.content.encode()) for message in exchanges[first - 1])
        if size > most:
            break
        first -= 1
    return first


def _make_context(message: Message) -> Message:
    """Return a message that is read and not learned."""
    return replace(message, extra={**message.extra, "weight": 0}) if message.role == "assistant" else message


def _shorten_response(piece: Dialogue, fits: Callable[[Dialogue], bool]) -> Dialogue | None:
    """Return a piece of one exchange up to as much of a response as fits; None if nothing of its first one does."""
    for last in [n for n, message in enumerate(piece.messages) if message.is_response][::-1]:
        message = piece.messages[last]

        def cut(length: int, last: int = last, message: Message = message) -> Dialogue:
            shortened = replace(message, content=message.content[:length], is_unfinished=True)
            return replace(piece, messages=(*piece.messages[:last], shortened))

        if not fits(cut(1)):
            continue
        low, high = 1, len(message.content)  # the longest prefix that fits is in [low, high)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(cut(middle)) else (low, middle)
        length = cutting.find_last_border(message.content, 0, low)
        return cut(len(shown)) if (shown := message.content[:length].rstrip()) else None
    return None

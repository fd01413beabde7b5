"""Check that what a model reads of a conversation is what the assistant says, or that the difference is named."""

from collections.abc import Sequence

import numpy as np

from fuselm.models.chat.chat_vocabulary import ChatVocabulary, Conversation
from fuselm.models.chat.messages import Dialogue, Message

CHANGES = {"trimmed", "dropped", "rewritten", "missing", "merged"}  # of the bytes of a content


def check_rows(chat: ChatVocabulary, read: Conversation, messages: Sequence[Message]) -> None:
    """Check that kept rows are the responses' bytes, turn by turn, or that their difference is named."""
    dialogue = Dialogue(messages=tuple(messages))
    rows = np.flatnonzero(read.kept)
    assert read.segmentation.size == len(dialogue.encode())
    assert read.segmentation.ids.tolist() == read.ids[rows].tolist()
    assert [turn.message for turn in read.turns] == [n for n, m in enumerate(messages) if m.is_response]
    assert sum(len(turn.segmentation.ids) for turn in read.turns) == len(rows)
    named = {(d.message, d.what) for d in read.differences}
    for turn in read.turns:
        data, own = messages[turn.message].content.encode() + b"\xff", turn.segmentation
        assert own.ids.tolist() == read.segmentation.ids[turn.rows].tolist()
        assert own.size == len(data) and own.starts[0] in (-1, 0) and (np.diff(own.starts) >= 0).all()
        spelled = b"".join(b or b"" for b in chat.vocabulary.spell(own.ids.tolist()))
        changes = {what for n, what in named if n == turn.message and what in CHANGES | {"no end"}}
        if not changes and chat.vocabulary.segment(messages[turn.message].content).spelled.all():
            assert spelled in (data, b" " + data) and own.spelled.all()
        assert own.spelled[-1] == (not changes & {"no end", "missing"})
        for start, end, i, is_spelled in zip(own.starts, own.ends, own.ids, own.spelled, strict=True):
            if is_spelled:
                assert chat.vocabulary.token_bytes[i] in (data[max(start, 0) : end], b" " + data[:end])

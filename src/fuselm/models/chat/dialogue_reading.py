"""Let a vocabulary read conversations as it reads texts: by the bytes of what the assistant says."""

from functools import partial

import numpy as np

from fuselm.models.chat.chat_vocabulary import ChatVocabulary, load_chat_vocabulary
from fuselm.models.chat.messages import Dialogue
from fuselm.models.locating import Model
from fuselm.models.segmentation import Reading, Segmentation
from fuselm.models.vocabulary import Vocabulary


def add_chat_template(
    model: Model, vocabulary: Vocabulary, *, template: str | None = None, system: str | None = None
) -> Vocabulary:
    """Return a vocabulary that reads conversations, too; its tokens that end a turn stand for the end-of-turn byte.

    `template` and `system` are those of `load_chat_vocabulary`. Raises what that raises.
    """
    chat = load_chat_vocabulary(model, vocabulary, template=template, system=system)
    result = chat.vocabulary
    result.read_dialogue, result.chat_fingerprint = partial(segment_dialogue, chat), chat.fingerprint
    return result


def segment_dialogue(chat: ChatVocabulary, dialogue: Dialogue) -> Segmentation:
    """Return the tokens of a conversation's responses, and with them all that the model reads.

    Raises `ValueError` if the template refuses the conversation, or puts responses together.
    """
    conversation = chat.read(dialogue.messages, dialogue.tools or None)
    places = np.flatnonzero(conversation.kept)
    kept = np.zeros(len(conversation.ids), bool)
    ids, starts, spelled, size = [], [], [], 0
    for turn in conversation.turns:
        message = dialogue.messages[turn.message]
        if not message.is_response:
            continue
        own = turn.segmentation
        if own.size != len(message.content.encode()) + 1:
            raise ValueError(
                f"{chat.name}: its chat template reads several messages of the assistant as one; join them, or leave "
                "the conversation out"
            )
        count, length = len(own.ids) - message.is_unfinished, own.size - message.is_unfinished
        kept[places[turn.rows][:count]] = True
        ids.append(own.ids[:count])
        starts.append(own.starts[:count].clip(-1 if size == 0 else 0) + size)
        spelled.append(own.spelled[:count])
        size += length
    return Segmentation(
        ids=np.concatenate(ids).astype(np.int32),
        starts=np.concatenate(starts).astype(np.int32),
        spelled=np.concatenate(spelled),
        size=size,
        reading=Reading(first=int(conversation.ids[0]), ids=conversation.ids[1:].astype(np.int32), kept=kept[1:]),
    )

"""Read conversations as a model does: its token ids, the rows that count, and the bytes that those stand for."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Bool, Int
from numpy import ndarray

from fuselm.models.chat import contents, probing, templates, turns
from fuselm.models.chat.contents import Placed
from fuselm.models.chat.control_tokens import ControlTokens, EncodedText, list_added_tokens
from fuselm.models.chat.message_forms import build_form
from fuselm.models.chat.messages import Message
from fuselm.models.chat.prompting import Prompting
from fuselm.models.chat.rendering import TemplateRefusal
from fuselm.models.chat.turns import ByteSpan, Turn
from fuselm.models.chat.variants import Difference, Numbered, list_variants
from fuselm.models.locating import Model
from fuselm.models.segmentation import Segmentation
from fuselm.models.vocabulary import Vocabulary
from fuselm.system import fingerprints

FORMAT = 1  # of what is read; raise it when the same template and messages would be read otherwise


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """Hold a conversation as one model reads it.

    - `ids`, shape (tokens): all that it reads.
    - `kept`, shape (tokens): whether a token's row counts: the assistants' contents, and the token that ends each turn.
    - `assistant`, shape (tokens): what the template says that the assistant generates (`{% generation %}`); the same
      as `kept` if it does not say.
    - `segmentation`: the kept tokens as tokens of the response bytes, `messages.Dialogue.encode`.
    - `turns`: the same by turn, each as a text of its own. Nothing is aligned across turns.
    - `differences`: what the template changed.
    """

    ids: Int[ndarray, "tokens"]
    kept: Bool[ndarray, "tokens"]
    assistant: Bool[ndarray, "tokens"]
    segmentation: Segmentation
    turns: tuple[Turn, ...]
    differences: tuple[Difference, ...]


class ChatVocabulary:
    """Know how a model reads conversations: its template, its special tokens and what ends a turn.

    `vocabulary` is the model's, where each of `end_ids` stands for the end of a turn; the first is the one that the
    template writes. `fingerprint` tells whether two of them read every conversation the same way.
    """

    def __init__(self, model: Model, vocabulary: Vocabulary, template: templates.Template, system: str | None):
        self.name = model.name
        self._system = system
        self._context_token = model.context_token
        self._prompting, probe = _probe(model.name, template)
        self._knows_system = probe.knows_system
        description = vocabulary.describe()
        added = {a["content"]: a for a in list_added_tokens(description) if a["id"] < vocabulary.size}
        known = templates.read_end_tokens(model.folder, template.names)
        known = [added[end]["id"] if isinstance(end, str) and end in added else end for end in known]
        ends = list(dict.fromkeys(end for end in known if isinstance(end, int) and 0 <= end < vocabulary.size))
        strings = {
            string: a["id"]
            for string, a in added.items()
            if a["special"] or a["id"] in ends or (string.strip() and any(string in part for part in probe.middle))
        }
        self._controls = ControlTokens(vocabulary, description, strings)
        self.end_ids = tuple(dict.fromkeys([*self._find_written_ends(probe, ends), *ends]))
        if not self.end_ids:
            raise ValueError(
                f"{self.name}: nothing ends a turn: its chat template writes no special token behind the assistant's "
                "content, and the model has no EOS; name an eos_token in tokenizer_config.json"
            )
        self.vocabulary = vocabulary.spell_ends(self.end_ids)
        self.fingerprint = fingerprints.hash_lines(
            [
                f"chat {FORMAT}",
                repr((template.text, template.with_tools, sorted(template.names.items()), template.is_own)),
                repr((system, self.end_ids, sorted(strings.items()))),
            ]
        )

    def read(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None = None) -> Conversation:
        """Return a conversation as this model reads it. `tools` describe functions, for templates that know them.

        Raises `ValueError`, in one line, if the template refuses the conversation, or leaves out a whole turn.
        """
        if not any(message.is_response for message in messages):
            raise ValueError(f"{self.name}: a conversation has nothing that the assistant says; leave it out")
        refusal = None
        for variant, differences in list_variants(messages, self._system, knows_system=self._knows_system):
            try:
                return self._read(variant, differences, tools)
            except TemplateRefusal as error:
                refusal = refusal or error
        raise ValueError(
            f"{self.name}: its chat template refuses the conversation ({refusal}); leave the conversation or the "
            "model out"
        )

    def _read(
        self, variant: Sequence[Numbered], differences: Sequence[Difference], tools: Sequence[Mapping] | None
    ) -> Conversation:
        plain = [build_form(item.message, parse_arguments=item.parse_arguments) for item in variant]
        brackets = self._controls.choose_brackets([plain, tools])
        forms = self._controls.hide(plain, brackets)
        tools = self._controls.hide(list(tools), brackets) if tools else None
        asked = [form["content"] for form in forms]
        wanted = [n for n, item in enumerate(variant) if item.message.is_response]
        text, placed = contents.find_contents(asked, wanted, self._prompting.bind(forms, tools))
        generated = self._prompting.find_generated(forms, tools, text)

        edges = {edge for span in generated for edge in span} | {e for place in placed for e in _list_edges(place)}
        cuts = sorted({0, len(text), *edges})
        finished = [self._controls.finish(text[a:b], brackets) for a, b in itertools.pairwise(cuts)]
        byte_of = dict(zip(cuts, np.cumsum([0, *(len(part.encode()) for part in finished)]).tolist(), strict=True))
        encoded = self._controls.encode("".join(finished), brackets)
        spans = [self._measure(asked[n], place, byte_of, brackets) for n, place in zip(wanted, placed, strict=True)]
        untils = [*(span.begin for span in spans[1:]), byte_of[len(text)] + 1]
        spans = [replace(span, until=until) for span, until in zip(spans, untils, strict=True)]

        found = [*differences]
        found += [
            Difference(message=item.place, what="control tokens")
            for item in variant
            if self._controls.contains(item.message.content)
        ]
        found += [
            Difference(message=variant[n].place, what=place.how)
            for n, place in zip(wanted, placed, strict=True)
            if place.how != contents.EXACT
        ]
        marked = [(byte_of[a], byte_of[b]) for a, b in generated]
        return self._build(encoded, spans, [variant[n] for n in wanted], marked, found)

    def _measure(self, content: str, place: Placed, byte_of: Mapping[int, int], brackets: int) -> ByteSpan:
        def reveal(text: str) -> bytes:
            return self._controls.reveal(text, brackets).encode()

        return ByteSpan(
            content=reveal(content),
            begin=byte_of[place.begin],
            end=byte_of[place.end],
            pieces=tuple(
                (
                    len(reveal(content[: p.content])),
                    byte_of[p.rendered],
                    len(reveal(content[p.content : p.content + p.size])),
                )
                for p in place.pieces
            ),
            until=0,
        )

    def _build(
        self,
        encoded: EncodedText,
        spans: Sequence[ByteSpan],
        items: Sequence[Numbered],
        marked: Sequence[tuple[int, int]],
        differences: list[Difference],
    ) -> Conversation:
        ids, rows, found = encoded.ids, [], []
        strings = self.vocabulary.spell(ids.tolist())
        for span, item in zip(spans, items, strict=True):
            tokens, starts = turns.choose_content_tokens(encoded, span, strings)
            if turns.is_merged(encoded, span, tokens, starts):
                differences.append(Difference(message=item.place, what="merged"))
            if not tokens:
                differences.append(Difference(message=item.place, what=contents.MISSING))
            elif turns.is_swallowed(encoded, span, tokens):
                differences.append(Difference(message=item.place, what=contents.TRIMMED))
            end = turns.find_end(encoded, span, set(self.end_ids), anywhere="tool_calls" in item.message.extra)
            if end is None:
                end = turns.find_next(encoded, span, tokens)
                if end is None and span is spans[-1]:
                    end, ids = len(ids), np.append(ids, np.int32(self.end_ids[0]))
                    differences.append(Difference(message=item.place, what="end added"))
                else:
                    differences.append(Difference(message=item.place, what="no end"))
            if end is not None:
                starts.append(len(span.content) if tokens else 0)
                tokens.append(end)
            if not tokens:
                raise TemplateRefusal(f"it leaves out message {item.place}")
            begin = found[-1].begin + found[-1].segmentation.size if found else 0
            found.append(
                turns.build_turn(item.place, begin, len(rows), ids[tokens], starts, span.content, self.vocabulary)
            )
            rows += tokens
        kept = np.zeros(len(ids), bool)
        kept[rows] = True
        assistant = np.zeros(len(ids), bool) if marked else kept
        for a, b in marked:
            assistant[: len(encoded.ids)] |= turns.mark_tokens(encoded, a, b)
        if kept[0] or (not self._prompting.template.is_own and ids[0] != self._context_token):
            ids = np.append(np.int32(self._context_token), ids)
            kept, assistant = np.append(False, kept), np.append(False, assistant)
        return Conversation(
            ids=ids,
            kept=kept,
            assistant=assistant,
            segmentation=turns.join_turns(found),
            turns=tuple(found),
            differences=tuple(dict.fromkeys(differences)),
        )

    def _find_written_ends(self, probe: probing.Probe, known: Sequence[int]) -> list[int]:
        """Return the control tokens that a template writes directly behind the assistants' contents, the last first.

        A token that stands before the user's contents, too, begins a message and ends none, unless the model's files
        say that it ends what is generated.
        """
        brackets = 0
        encoded = [self._controls.encode(self._controls.finish(part, brackets), brackets) for part in probe.parts]
        headers = {int(part.ids[part.controls][-1]) for part in encoded[:-1:2] if part.controls.any()}
        found = []
        for part in encoded[:1:-2]:
            first = int(part.ids[part.controls][0]) if part.controls.any() else None
            before = part.data[: part.begins[part.controls][0]] if part.controls.any() else b""
            if first is not None and not before.strip() and (first in known or first not in headers):
                found.append(first)
        return found


def _probe(name: str, template: templates.Template) -> tuple[Prompting, probing.Probe]:
    """Return how to render a template, and what it writes. Raises `ValueError` if it writes no contents."""
    refusals = []
    for in_parts in (False, True):
        prompting = Prompting(name, template, in_parts=in_parts)
        try:
            if (probe := probing.probe_template(prompting.render)) is not None:
                return prompting, probe
        except TemplateRefusal as error:
            refusals.append(error)
    if len(refusals) == 2:  # contents as texts, and in parts
        raise ValueError(f"{name}: its chat template refuses a question and its answer ({refusals[0]}); correct it")
    raise ValueError(f"{name}: its chat template does not write what messages say, in their order; correct it")


def _list_edges(place: Placed) -> list[int]:
    pieces = [edge for piece in place.pieces for edge in (piece.rendered, piece.rendered + piece.size)]
    return [place.begin, place.end, *pieces]


def load_chat_vocabulary(
    model: Model, vocabulary: Vocabulary, *, template: str | None = None, system: str | None = None
) -> ChatVocabulary:
    """Return how a model reads conversations.

    `template` is for a model without one: `plain`, or a template's text, such as the target's. `system` is a system
    prompt that this model reads in front of a conversation's own.

    Raises:
        ValueError: If the model has no chat template and `template` is None, or its template cannot be used.
    """
    return ChatVocabulary(model, vocabulary, templates.find_template(model.folder, template), system)

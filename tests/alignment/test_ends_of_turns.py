"""Test that the end of a turn keeps its probability when a conversation is aligned, whatever the templates."""

import drawn
import numpy as np
import pytest
from chat_templates import Family, build_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fuselm.alignment.aligner import Aligner
from fuselm.models.chat.dialogue_reading import add_chat_template
from fuselm.models.chat.messages import Dialogue, Message
from fuselm.models.vocabulary import Vocabulary

END = b"\xff"
ENDS = ("<e>", "<f>", "<g>")
ROLES = ("<u>", "<a>")
SAID = "{% for m in messages %}{{ '<u>' if m.role == 'user' else '<a>' }}{{ SAID }}{% endfor %}"
TEMPLATES = {
    name: SAID.replace("SAID", said)
    for name, said in {
        "end": "m.content + '<e>'",
        "end and space": "m.content + '<e> '",
        "space before": "' ' + m.content + '<e>'",
    }.items()
}
said = st.text("ab é", min_size=1, max_size=9)
answers = st.lists(said, min_size=1, max_size=3)
merges = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=6)


def talk(answers: list[str]) -> Dialogue:
    """Return a conversation; it is built outside of strategies, which the type checker would disturb."""
    pairs = [(("user", "a b"), ("assistant", answer)) for answer in answers]
    return Dialogue(messages=tuple(Message(role=role, content=c) for pair in pairs for role, c in pair))


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    def build_vocabulary(pairs: list, template: str, *, ends: int = 3, dummy_prefix: bool | None = None) -> Vocabulary:
        base = drawn.byte_pairs(pairs, dummy_prefix=dummy_prefix).describe()
        family = Family(text=TEMPLATES[template], special=(*ROLES, *ENDS), eos="<e>", ends=ENDS[:ends])
        return add_chat_template(*build_model(family, base, tmp_path_factory.mktemp("ends") / "model"))

    return build_vocabulary


def find_ends(vocabulary: Vocabulary, ids: np.ndarray) -> list[int]:
    return [n for n, spelled in enumerate(vocabulary.spell(ids.tolist())) if spelled == END]


def sum_ends(vocabulary: Vocabulary, trace, row: int) -> float:
    """Return the log-probability of the event: of all tokens that end a turn."""
    ids, logprobs, *_ = trace.distributions.row(row)
    return float(np.log(sum(np.exp(p) for i, p in zip(ids, logprobs, strict=True) if vocabulary.token_bytes[i] == END)))


strings = settings(max_examples=10, suppress_health_check=list(HealthCheck), database=None)


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("dummy_prefix", [None, False])
def test_span_keeps_the_probability_of_the_end(template, dummy_prefix, build):
    """A source of letters has no token that goes on where a target's ends, so that the event is its own row's."""
    source = build([], "end")

    @strings
    @given(pairs=merges, said=answers, seed=st.integers(0, 99))
    def check(pairs, said, seed):
        dialogue = talk(said)
        target = build(pairs, template, ends=1, dummy_prefix=dummy_prefix)
        trace = drawn.trace_of(source, dialogue, np.random.default_rng(seed))
        aligned = Aligner(source, target).align(trace, dialogue)
        own, theirs = find_ends(source, trace.tokens), find_ends(target, aligned.tokens)
        assert len(own) == len(theirs) == len(dialogue.responses)
        spelled = target.find_spelled(aligned.tokens, aligned.starts, dialogue)
        for before, after in zip(own, theirs, strict=True):
            if after == 0 or spelled[after - 1]:
                assert aligned.distributions.gold[after] == pytest.approx(sum_ends(source, trace, before), abs=1e-3)

    check()


@pytest.mark.parametrize("template", TEMPLATES)
def test_span_keeps_the_probability_of_a_turn_and_its_end(template, build):
    """Whatever the tokens, probabilities along a turn multiply to the source's own, its other ends added."""

    @strings
    @given(of_source=merges, of_target=merges, said=answers, seed=st.integers(0, 99))
    def check(of_source, of_target, said, seed):
        dialogue = talk(said)
        source, target = build(of_source, "end", ends=1), build(of_target, template)
        trace = drawn.trace_of(source, dialogue, np.random.default_rng(seed))
        aligned = Aligner(source, target).align(trace, dialogue)
        if target.find_spelled(aligned.tokens, aligned.starts, dialogue).all():
            assert aligned.distributions.gold.sum() >= trace.distributions.gold.sum() - 1e-3

    check()


@pytest.mark.parametrize("method", ["exact", "mined", "statistics", "cooccurrence"])
def test_the_papers_methods_map_ends_to_the_targets_end(method, build):
    source, target = build([(0, 1)], "end"), build([(1, 0)], "end and space", ends=2)
    dialogue = talk(["ab é", "ba"])
    trace = drawn.trace_of(source, dialogue, np.random.default_rng(0))
    aligned = Aligner(source, target, method=method, texts=[dialogue]).align(trace, dialogue)
    own, theirs = find_ends(source, trace.tokens), find_ends(target, aligned.tokens)
    for before, after in zip(own, theirs, strict=True):
        ids, logprobs, *_ = aligned.distributions.row(after)
        mass = [float(p) for i, p in zip(ids, logprobs, strict=True) if target.token_bytes[i] == END]
        assert mass == [pytest.approx(sum_ends(source, trace, before), abs=1e-3)]


def test_no_other_special_token_is_aligned(build):
    source, target, dialogue = build([], "end"), build([(0, 1)], "end and space"), talk(["b"])
    trace = drawn.trace_of(source, dialogue, np.random.default_rng(0))
    aligned = Aligner(source, target).align(trace, dialogue)
    special = {i for i, string in enumerate(target.token_strings) if string in (*ROLES, "<s>")}
    assert not special & set(aligned.distributions.ids.tolist())

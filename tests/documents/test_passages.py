"""passages.py: rows hold every document once, behind others of its domain and nothing else."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fuselm.documents import passages
from fuselm.documents.passages import Group, Passage, Prefix, fit_prefix
from fuselm.models.loading import load_tokenizer
from fuselm.models.locating import locate_model
from fuselm.models.segmentation import Reading
from fuselm.models.vocabulary import Segmentation, Vocabulary

DOMAINS = ("english", "french")
documents = st.lists(st.tuples(st.integers(0, 23), st.sampled_from(DOMAINS)), max_size=19)


def planned(lengths, domains, *, batch_tokens=61, window=None, context_length=9973, **prefix) -> list[list[Passage]]:
    window = window or slice(0, len(lengths))
    groups = [domain if isinstance(domain, Group) else Group(domain) for domain in domains]
    members = {of: [n for n, group in enumerate(groups) if group == of] for of in dict.fromkeys(groups)}
    return passages.plan_batches(
        window, lengths, members, prefix=Prefix(context_length=context_length, **prefix), batch_tokens=batch_tokens
    )


def segmentation(ids: list[int]) -> Segmentation:
    starts, spelled = np.arange(len(ids), dtype=np.int32), np.ones(len(ids), bool)
    return Segmentation(ids=np.array(ids, np.int32), starts=starts, spelled=spelled, size=len(ids))


@settings(deadline=None)
@given(
    documents=documents,
    tokens=st.integers(0, 31),
    separator_tokens=st.integers(0, 2),
    context_length=st.integers(31, 97),
)
def test_rows_hold_each_document_once_behind_others_of_its_domain(documents, tokens, separator_tokens, context_length):
    lengths, domains = [n for n, _ in documents], [d for _, d in documents]
    batches = planned(lengths, domains, tokens=tokens, separator_tokens=separator_tokens, context_length=context_length)
    assert sorted(n for batch in batches for n in passages.list_documents(batch)) == list(range(len(documents)))
    for passage in (p for batch in batches for p in batch):
        assert len({domains[n] for n in (*passage.documents, *passage.before)}) == 1
        assert not set(passage.documents) & set(passage.before) and passage.prefix <= tokens
        texts = [segmentation([n] * length) for n, length in enumerate(lengths)]
        row, kept = passages.join_tokens(passage, texts, np.full(separator_tokens, -1, np.int32))
        assert row[kept].tolist() == [i for n in passage.documents for i in texts[n].ids]
        assert set(row[: passage.prefix].tolist()) <= {-1, *passage.before}
        assert 1 + len(row) <= max(context_length, 1 + max(lengths))


def conversation(first: int, ids: list[int]) -> Segmentation:
    """Return a conversation that the model begins with `first`, all of whose other tokens are the response's."""
    read = np.array(ids, np.int32)
    return replace(segmentation(ids), reading=Reading(first=first, ids=read, kept=np.ones(len(ids), bool)))


@settings(deadline=None)
@given(lengths=st.lists(st.integers(1, 23), max_size=19), tokens=st.integers(0, 61), context_length=st.integers(31, 97))
def test_conversations_are_read_whole_behind_whole_conversations(lengths, tokens, context_length):
    groups = [Group("english", n % 2 == 0) for n in range(len(lengths))]
    batches = planned(lengths, groups, tokens=tokens, separator_tokens=2, context_length=context_length)
    assert sorted(n for batch in batches for n in passages.list_documents(batch)) == list(range(len(lengths)))
    for passage in (p for batch in batches for p in batch):
        chain = [*passage.before, *passage.documents]
        assert len({groups[n] for n in chain}) == 1
        if not groups[chain[0]].is_conversations:
            continue
        texts = [conversation(-n - 1, [n] * length) for n, length in enumerate(lengths)]
        row, kept = passages.join_tokens(passage, texts, np.full(2, 99, np.int32))
        whole = [i for n in chain for i in (-n - 1, *[n] * lengths[n])]
        assert row.tolist() == whole[1:] and passage.prefix <= tokens
        assert row[kept].tolist() == [n for n in passage.documents for _ in range(lengths[n])]
        assert 1 + len(row) <= max(context_length, 1 + max(lengths))


def test_a_conversation_that_is_too_long_for_a_prefix_is_left_out_of_it():
    chats = [Group("english", True)] * 4
    rows = [p for batch in planned([40, 3, 90, 9], chats, tokens=15) for p in batch]
    assert {tuple(p.documents): (p.before, p.prefix) for p in rows} == {
        (0, 1): ([3], 10),
        (2,): ([3, 1], 14),
        (3,): ([1], 4),
    }


def test_without_a_prefix_each_document_is_a_row():
    lengths = [5, 3, 11, 7]
    batches = planned(lengths, ["english"] * 4, batch_tokens=22)
    assert batches == [passages.put_each_alone([2, 3]), passages.put_each_alone([0, 1])]


def test_a_row_has_the_documents_before_it_in_front_and_the_first_one_those_after_it():
    lengths = [20] * 6
    batches = planned(lengths, ["english"] * 6, tokens=10, separator_tokens=0, batch_tokens=1)
    first, *others = sorted((row for batch in batches for row in batch), key=lambda row: row.documents)
    assert first == Passage(documents=[0, 1], before=[2], prefix=10)
    assert others == [
        Passage(documents=[2, 3], before=[1], prefix=10),
        Passage(documents=[4, 5], before=[3], prefix=10),
    ]


def test_a_row_takes_the_last_tokens_of_what_is_before():
    row, kept = passages.join_tokens(
        Passage(documents=[1, 2], before=[0], prefix=4),
        [segmentation([1, 2, 3, 4]), segmentation([5, 6]), segmentation([7])],
        np.array([0], np.int32),
    )
    assert row.tolist() == [2, 3, 4, 0, 5, 6, 0, 7]
    assert kept.tolist() == [False] * 4 + [True, True, False, True]


def test_a_document_as_long_as_the_context_has_nothing_in_front():
    (row,) = (
        p
        for batch in planned([30, 9], ["english"] * 2, tokens=16, context_length=31)
        for p in batch
        if 0 in p.documents
    )
    assert row == Passage(documents=[0], before=[], prefix=0)


@pytest.mark.parametrize("window", [slice(0, 2), slice(2, 5)])
def test_a_window_has_its_own_documents_and_others_in_front(window):
    batches = planned([50] * 5, ["english"] * 5, tokens=10, window=window)
    rows = sorted((p for batch in batches for p in batch), key=lambda p: p.documents)
    assert [p.documents for p in rows] == [[n] for n in range(window.start, window.stop)]
    assert [p.before for p in rows] == [[n - 1 or 0] if n else [1] for n in range(window.start, window.stop)]


def test_a_domain_of_one_row_is_read_in_halves_each_in_front_of_the_other():
    first, second = sorted(
        (p for b in planned([7] * 4, ["english"] * 4, tokens=9) for p in b), key=lambda p: p.documents
    )
    assert first == Passage(documents=[0, 1], before=[2, 3], prefix=9)
    assert second == Passage(documents=[2, 3], before=[0, 1], prefix=9)


def test_a_row_with_too_few_before_it_takes_some_after_it_too():
    batches = planned([2, 70, 9, 90], ["english"] * 4, tokens=10)
    (row,) = (p for batch in batches for p in batch if p.documents == [1])
    assert (row.before, row.prefix) == ([2, 0], 10)


def test_a_prefix_leaves_documents_their_part_of_a_short_context(byte_level, word_piece):
    vocabularies = [
        Vocabulary(load_tokenizer(m), m.output_size) for m in (locate_model(str(f)) for f in (byte_level, word_piece))
    ]
    assert [fit_prefix(v, 512, 256).tokens for v in vocabularies] == [102, 102]
    assert fit_prefix(vocabularies[0], 512, 64).tokens == 64
    by_bytes, by_words = (fit_prefix(vocabulary, 512, 64).separator_tokens for vocabulary in vocabularies)
    assert by_bytes > 0 == by_words  # its tokenizer has no line breaks


def test_an_extracted_batch_reads_the_same():
    texts = [segmentation([n] * 10) for n in range(9)]
    for batch in planned([10] * 9, ["english", "french", "german"] * 3, tokens=10, batch_tokens=40):
        chosen, renumbered = passages.extract_batch(batch, texts)
        for here, there in zip(batch, renumbered, strict=True):
            expected, found = (
                passages.join_tokens(p, of, texts[0].ids[:1]) for p, of in ((here, texts), (there, chosen))
            )
            assert all(map(np.array_equal, expected, found))

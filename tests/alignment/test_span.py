"""Check span.py where tokenizers differ most: every kind into every other, on texts that are hard to split."""

import functools
import itertools
import json

import drawn
import numpy as np
import pytest
from aligned_rows import faithful, span_rows, total
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors, trainers
from tokenizers import models as kinds

from fuselm.alignment import span
from fuselm.alignment.aligner import Aligner
from fuselm.alignment.spelling import spell_vocabulary
from fuselm.models.vocabulary import Vocabulary
from fuselm.stores.distributions import Distributions, check_distributions

HARD = {
    "characters cut in two": "日本語と漢字、naïve café – Straße",
    "emoji with joiners": "ok 👨‍👩‍👧‍👦! 🏳️‍🌈🇩🇪",
    "line ends, tabs, runs of spaces": "if x:\r\n\t\treturn  0\n\n\n    # end   \n",
    "numbers": "1234567 and 3.14159, 2024-01-02",
    "not in normal form": "e\u0301tude A\u030angstro\u0308m",
    "capitals": "The BBC and NASA",
    "names of special tokens": "<s> </s> <unk> a<s>b",
    "one byte": "x",
    "a line end alone": "\n",
    "nothing": "",
    "long words": "Donaudampfschifffahrtsgesellschaft internationalisation",
}


def train_vocabulary(texts: list[str], tokenizer: Tokenizer, trainer: trainers.Trainer) -> Vocabulary:
    tokenizer.train_from_iterator(texts, trainer)
    return Vocabulary(tokenizer, tokenizer.get_vocab_size() + 3)


def byte_level(texts: list[str], size: int, digits: str = r"\p{N}") -> Vocabulary:
    tokenizer = Tokenizer(kinds.BPE())
    words = Regex(r" ?\p{L}+|" + digits + r"| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(words, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return train_vocabulary(
        texts, tokenizer, trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    )


def normalizing(texts: list[str]) -> Vocabulary:
    vocabulary = byte_level(texts, 700)
    pipeline = json.loads(vocabulary._tokenizer.to_str())
    pipeline["normalizer"] = {"type": "NFC"}
    return Vocabulary(Tokenizer.from_str(json.dumps(pipeline)), vocabulary.size)


def unigram(texts: list[str]) -> Vocabulary:
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = Tokenizer(kinds.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=800, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    pieces = json.loads(tokenizer.to_str())["model"]["vocab"]
    pieces = pieces[:1] + [[byte, -20.0] for byte in fallback] + pieces[1:]
    tokenizer.model = kinds.Unigram([(piece, score) for piece, score in pieces], unk_id=0, byte_fallback=True)
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return Vocabulary(tokenizer, tokenizer.get_vocab_size() + 3)


def characters(texts: list[str]) -> Vocabulary:
    """Return a vocabulary of characters, with bytes for unknown ones: many ids stand for only one byte."""
    known = sorted({c for text in texts for c in text if c.isascii() and c != " "} | {"▁"})
    tokens = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *known]
    ids = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(kinds.BPE(vocab=ids, merges=[], unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return Vocabulary(tokenizer, len(tokens) + 3)


KINDS = {
    "bytes": functools.partial(byte_level, size=256),
    "byte-level, digits singly": functools.partial(byte_level, size=600),
    "byte-level, digits in threes": functools.partial(byte_level, size=900, digits=r"\p{N}{1,3}"),
    "byte-level, normal form": normalizing,
    "unigram": unigram,
    "characters": characters,
}


@pytest.fixture(scope="module")
def vocabularies(training_texts) -> dict[str, Vocabulary]:
    texts = [*training_texts[:60], *HARD.values(), " ".join(map(str, range(1000)))]
    return {name: make(texts) for name, make in KINDS.items()}


@pytest.mark.parametrize(("source_kind", "target_kind"), list(itertools.permutations(KINDS, 2)))
def test_nothing_is_lost_between_any_two_kinds(source_kind, target_kind, vocabularies):
    source, target = vocabularies[source_kind], vocabularies[target_kind]
    aligner = Aligner(source, target, top_k=10_000, method="span")
    for n, text in enumerate(HARD.values()):
        trace = drawn.trace_of(source, text, np.random.default_rng(n), top_k=7)
        aligned = aligner.align(trace, text)
        check_distributions(aligned.distributions, target.size)
        has_text = np.diff(np.append(aligned.starts, aligned.size)) > 0
        informed, spelled = aligned.distributions.informed, target.segment(text).spelled
        if spelled.all() and source.segment(text).spelled.all():
            assert np.array_equal(informed, has_text)
        assert not (informed & ~(spelled & has_text)).any()
        assert total(aligned) >= total(trace) * (1 + 1e-5) - 1e-4  # other ways to the same tokens may add up to more


@pytest.mark.parametrize("with_bos", ["source", "target"])
def test_a_bos_on_one_side_only_is_not_text(with_bos, vocabularies):
    plain, other = vocabularies["byte-level, digits in threes"], vocabularies["byte-level, digits singly"]
    pipeline = json.loads(other._tokenizer.to_str())
    bos, eos = other.size, other.size + 1
    names = {"<s>": bos, "</s>": eos}
    pipeline["added_tokens"] = [
        {"id": i, "content": name, "special": True}
        | dict.fromkeys(["single_word", "lstrip", "rstrip", "normalized"], False)
        for name, i in names.items()
    ]
    tokenizer = Tokenizer.from_str(json.dumps(pipeline))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=list(names.items()))
    assert tokenizer.encode("a").ids[::2] == [bos, eos]
    marked = Vocabulary(tokenizer, other.size + 2)
    source, target = (marked, plain) if with_bos == "source" else (plain, marked)
    aligner = Aligner(source, target, top_k=10_000, method="span")
    for n, text in enumerate(HARD.values()):
        trace = drawn.trace_of(source, text, np.random.default_rng(n), top_k=7)
        aligned = aligner.align(trace, text)
        assert aligned.tokens.tolist() == target.segment(text).ids.tolist()
        assert total(aligned) >= total(trace) * (1 + 1e-5) - 1e-4
        if with_bos == "target":
            assert not {bos, eos} & {*aligned.tokens.tolist(), *aligned.distributions.ids.tolist()}


@pytest.mark.parametrize("target_kind", ["byte-level, digits in threes", "unigram", "characters"])
def test_hard_texts_equal_the_reference(target_kind, vocabularies):
    source, target = vocabularies["byte-level, digits singly"], vocabularies[target_kind]
    aligner = Aligner(source, target, top_k=10_000, method="span")
    for n, text in enumerate(HARD.values()):
        trace = drawn.trace_of(source, text, np.random.default_rng(n), top_k=5)
        drawn.assert_same(aligner.align(trace, text).distributions, *span_rows(source, target, trace, text))


def test_a_source_of_single_bytes_is_aligned_exactly(vocabularies):
    """With single bytes there is one way to every text, so the chain rule gives its rows."""
    source = vocabularies["bytes"]
    for name, target in vocabularies.items():
        if name == "bytes":
            continue
        for n, text in enumerate(HARD.values()):
            if not faithful(target, text):
                continue
            trace = drawn.trace_of(source, text, np.random.default_rng(n))
            aligned = Aligner(source, target, top_k=10_000, method="span").align(trace, text)
            assert total(aligned) == pytest.approx(total(trace), rel=1e-5, abs=1e-5), (name, text)


def test_entries_that_agree_keep_their_share_of_the_next_token():
    """The source gives ab 0.5, abb 0.3 and a 0.2. After the target's a and b, abb still has 3 parts of 8."""
    source, target = drawn.byte_pairs([(0, 1), (5, 1)]), drawn.byte_pairs([])
    a, ab, abb = (source.id_by_bytes[s] for s in (b"a", b"ab", b"abb"))
    b = source.id_by_bytes[b"b"]
    text = "aba"
    segmentation = source.segment(text)
    assert segmentation.ids.tolist() == [ab, a]
    rows = [{ab: 0.5, abb: 0.3, a: 0.2}, {a: 0.9, b: 0.1}]
    trace = drawn.trace(segmentation, drawn.distributions_of(rows, [0.0, 0.0], np.log([0.5, 0.9]).tolist()))
    first, second, third = drawn.rows_of(Aligner(source, target, method="span").align(trace, text).distributions)
    ta, tb = target.id_by_bytes[b"a"], target.id_by_bytes[b"b"]
    assert first == pytest.approx({ta: 1.0})
    assert second == pytest.approx({tb: 0.8})  # after a alone, nothing is known of the next token
    assert third == pytest.approx({ta: 5 / 8 * 0.9, tb: 3 / 8 + 5 / 8 * 0.1})


def test_a_tail_is_shared_by_the_ids_that_were_not_kept():
    """The ids with text are a, b, space, two bytes of é, aa and ab. Only b is kept; 3 of the other 6 begin with a."""
    source, target = drawn.byte_pairs([(0, 0), (0, 1)]), drawn.byte_pairs([])
    b, aa = source.id_by_bytes[b"b"], source.id_by_bytes[b"aa"]
    trace = drawn.trace(source.segment("aa"), drawn.distributions_of([{b: 0.4}], [0.6], [np.log(0.1)]))
    assert trace.tokens.tolist() == [aa]
    first, second = drawn.rows_of(Aligner(source, target, method="span").align(trace, "aa").distributions)
    ta, tb = target.id_by_bytes[b"a"], target.id_by_bytes[b"b"]
    share = 0.5 / 5  # gold is taken out of the tail; five other ids were not kept
    assert first == pytest.approx({ta: 0.1 + 2 * share, tb: 0.4})
    assert second == pytest.approx({ta: 0.1 / (0.1 + 2 * share)})


def test_mass_that_reaches_no_id_has_a_cause(vocabularies):
    source, target = vocabularies["byte-level, digits in threes"], vocabularies["unigram"]
    spelling = spell_vocabulary(source, target)
    for n, text in enumerate(HARD.values()):
        trace = drawn.trace_of(source, text, np.random.default_rng(n), top_k=5)
        d, lost = span.follow_text(source, target, spelling, trace, target.segment(text), text.encode(), 3)
        assert lost.shape == (len(d), len(span.CAUSES)) and (lost >= -1e-6).all()
        np.testing.assert_allclose(lost.sum(1)[d.informed], d.tail[d.informed], atol=1e-5)


def test_gold_tokens_that_the_tokenizer_never_makes_are_followed():
    """The trace has another tokenization of the text than its own tokenizer makes."""
    source, target = drawn.byte_pairs([(0, 1)]), drawn.byte_pairs([(1, 0)])
    a, b = source.id_by_bytes[b"a"], source.id_by_bytes[b"b"]
    ids, starts = np.array([a, b, a], np.int32), np.array([0, 1, 2], np.int32)  # instead of ab, a
    segmentation = drawn.Segmentation(ids=ids, starts=starts, spelled=np.ones(3, bool), size=3)
    rows = [{a: 0.5, b: 0.5}] * 3
    trace = drawn.trace(segmentation, drawn.distributions_of(rows, [0.0] * 3, [np.log(0.5)] * 3))
    aligned = Aligner(source, target, method="span").align(trace, "aba")
    assert [target.token_bytes[i] for i in aligned.tokens] == [b"a", b"ba"]
    assert total(aligned) == pytest.approx(3 * np.log(0.5))


def test_a_document_of_a_hundred_thousand_tokens_is_aligned(vocabularies):
    source, target = vocabularies["byte-level, digits singly"], vocabularies["byte-level, digits in threes"]
    text = " ".join(HARD.values()) * 500
    segmentation = source.segment(text)
    tokens, random = len(segmentation.ids), np.random.default_rng(0)
    assert tokens > 100_000
    ids = np.stack([segmentation.ids, random.integers(0, 600, tokens), random.integers(0, 600, tokens)], 1)
    ids[:, 1:][ids[:, 1:] == ids[:, :1]] = 601
    ids[:, 2][ids[:, 2] == ids[:, 1]] = 602
    d = Distributions(
        offsets=3 * np.arange(tokens + 1),
        ids=ids.ravel().astype(np.int32),
        logprobs=np.log(np.tile([0.5, 0.3, 0.1], tokens)).astype(np.float32),
        gold=np.full(tokens, np.log(0.5), np.float32),
        tail=np.full(tokens, 0.1, np.float32),
    )
    trace = drawn.trace(segmentation, d)
    aligned = Aligner(source, target, method="span").align(trace, text)
    check_distributions(aligned.distributions, target.size)
    assert aligned.distributions.informed.all()
    assert total(trace) * (1 + 1e-5) <= total(aligned) <= 0.9 * total(trace)

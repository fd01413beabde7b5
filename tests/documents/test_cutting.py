"""cutting.py: pieces are those of bisection that tokenizes every prefix, whatever the tokenizer."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, trainers
from tokenizers import models as kinds

from fuselm.documents.cutting import Reader, cut_text
from fuselm.models.loading import load_tokenizer
from fuselm.models.locating import locate_model
from fuselm.models.vocabulary import Vocabulary

QUICKSTART = Path(__file__).parents[2] / "examples" / "corpus" / "quickstart.jsonl"
TEXTS = [json.loads(line)["text"] for line in QUICKSTART.read_text(encoding="utf-8").splitlines()[::7]]
BORDERS = (r"\n\s*\n", r"\n", r"[.!?。！？][\"'”’)\]]*\s", r"\s")


def cut_slowly(text: str, fits: Callable[[str], bool]) -> Iterator[str]:
    """Yield each piece by bisection over prefixes of the rest, tokenizing each of them whole."""
    while not fits(text):
        low, high = 1, len(text)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(text[:middle]) else (low, middle)
        found = ([m.end() for m in re.compile(border).finditer(text, low // 2, low)] for border in BORDERS)
        end = next((ends[-1] for ends in found if ends), low)
        if end == 1 and not fits(text[:1]):
            raise ValueError(f"character {text[:1]!r}")
        yield text[:end]
        text = text[end:]
    yield text


def pieces_of(cutter: Iterator[str]) -> list[str] | str:
    """Return the pieces, or the one character that was refused."""
    try:
        return list(cutter)
    except ValueError as error:
        return str(error).rpartition("character ")[2]


def assert_same(text: str, readers: list[Reader], max_bytes: int | None) -> None:
    def fits(part: str) -> bool:
        if max_bytes is not None and len(part.encode()) > max_bytes:
            return False
        return all(r.vocabulary.count_tokens([part])[0] + 1 <= r.max_tokens for r in readers)

    assert pieces_of(cut_text(text, readers, max_bytes)) == pieces_of(cut_slowly(text, fits))


# ---- tokenizers of every kind, learned from the demo's texts


def bpe(pre_tokenizer=None, normalizer=None, *, alphabet=(), **options) -> Tokenizer:
    tokenizer = Tokenizer(kinds.BPE(**options))
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    return tokenizer


BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
SPLIT = Regex(
    r"\p{N}{1,3}(?=(\p{N}{3})*(?!\p{N}))|[^\r\n\p{L}\p{N}]?\p{L}+| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def llama_3() -> Tokenizer:
    """Return a tokenizer that keeps words that are tokens whole, and groups digits from the right."""
    split = pre_tokenizers.Split(SPLIT, "isolated")
    return bpe(pre_tokenizers.Sequence([split, BYTES]), ignore_merges=True)


def across_words() -> Tokenizer:
    return bpe(BYTES)


def prefixed() -> Tokenizer:
    return bpe(pre_tokenizers.Metaspace(prepend_scheme="always"), unk_token="<unk>", fuse_unk=True)


def lower_casing() -> Tokenizer:
    changes = [normalizers.NFKD(), normalizers.Lowercase(), normalizers.StripAccents(), normalizers.Strip()]
    return bpe(pre_tokenizers.Whitespace(), normalizers.Sequence(changes), unk_token="<unk>")


def squeezing() -> Tokenizer:
    return bpe(pre_tokenizers.Metaspace(), normalizers.Replace(Regex(r"\s+"), " "), unk_token="<unk>")


def unigram() -> Tokenizer:
    tokenizer = Tokenizer(kinds.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    return tokenizer


def unigram_without_words() -> Tokenizer:
    tokenizer = Tokenizer(kinds.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(" ", "▁")])
    return tokenizer


def short_words() -> Tokenizer:
    """Return a tokenizer that makes one token of a word of more than 23 characters."""
    tokenizer = Tokenizer(kinds.WordPiece(unk_token="<unk>", max_input_chars_per_word=23))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return tokenizer


def whole_words() -> Tokenizer:
    tokenizer = Tokenizer(kinds.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


TRAINERS = {
    kinds.BPE: trainers.BpeTrainer,
    kinds.Unigram: trainers.UnigramTrainer,
    kinds.WordPiece: trainers.WordPieceTrainer,
    kinds.WordLevel: trainers.WordLevelTrainer,
}
KINDS = [
    llama_3, across_words, prefixed, lower_casing, squeezing, unigram, unigram_without_words, short_words, whole_words
]  # fmt: skip


@pytest.fixture(scope="module")
def vocabularies(byte_level, sentence_piece, word_piece) -> dict[str, Vocabulary]:
    result = {}
    for folder in (byte_level, sentence_piece, word_piece):
        model = locate_model(str(folder))
        result[folder.name] = Vocabulary(load_tokenizer(model), model.output_size)
    for make in KINDS:
        tokenizer = make()
        options = {"unk_token": "<unk>"} if isinstance(tokenizer.model, kinds.Unigram) else {}
        trainer = TRAINERS[type(tokenizer.model)](
            vocab_size=701, special_tokens=["<unk>"], show_progress=False, **options
        )
        tokenizer.train_from_iterator([text[:701] for text in TEXTS], trainer)
        tokenizer.decoder = decoders.ByteLevel() if make in (llama_3, across_words) else None
        tokenizer.add_tokens([AddedToken("\n    ", normalized=False), AddedToken("a long token of several words")])
        result[make.__name__] = Vocabulary(tokenizer, tokenizer.get_vocab_size())
    return result


CHARACTERS = ["a", "0", " ", "\n", "🙂", "日本", "ab ", "e\u0301", "\x01", "a\u200d"]
PHRASES = ["a long token of several words", "a long token of", "\n    ", "12345"]
PARTS = st.one_of(
    st.tuples(st.sampled_from(CHARACTERS), st.integers(1, 307)),
    st.tuples(st.sampled_from(PHRASES), st.integers(1, 3)),
    st.tuples(st.text("ab \n.é日0", max_size=17), st.integers(1, 7)),
)
NAMES = ["byte_level", "sentence_piece", "word_piece", *(make.__name__ for make in KINDS)]


PROSE = st.tuples(st.integers(0, 20), st.integers(0, 97), st.integers(0, 1501))  # which text, from where, how long


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=25)
@given(
    parts=st.lists(PARTS | PROSE, max_size=7),
    max_tokens=st.integers(1, 601),
    max_bytes=st.none() | st.integers(4, 2003),
)
def test_pieces_are_those_of_tokenizing_every_prefix(name, vocabularies, parts, max_tokens, max_bytes):
    text = "".join(
        part[0] * part[1] if isinstance(part[0], str) else TEXTS[part[0]][part[1] :][: part[2]] for part in parts
    )
    assert_same(text, [Reader(name=name, vocabulary=vocabularies[name], max_tokens=max_tokens)], max_bytes)


@pytest.mark.parametrize("max_tokens", [13, 211, 499])
@pytest.mark.parametrize("max_bytes", [None, 997])
def test_pieces_fit_all_readers_at_once(vocabularies, max_tokens, max_bytes):
    text = "\n\n".join(TEXTS[:2])
    for names in zip(*[iter(NAMES)] * 3, strict=True):
        readers = [
            Reader(name=name, vocabulary=vocabularies[name], max_tokens=max_tokens + 7 * n)
            for n, name in enumerate(names)
        ]
        assert_same(text, readers, max_bytes)


def test_a_wrong_guess_from_token_ends_is_noticed(vocabularies):
    """Cut text without spaces behind one space: the tokens' reported ends crowd in its first fifth."""
    reader = Reader(name="across_words", vocabulary=vocabularies["across_words"], max_tokens=64)
    assert_same("ab " + "日本" * 123, [reader], None)

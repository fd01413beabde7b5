"""Test vocabulary.py: the bytes of ids, the spans of tokens and the tokens of bytes, for each kind of tokenizer."""

import json
import unicodedata
from pathlib import Path

import drawn
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers import models as kinds

from fuselm.models import segmentation
from fuselm.models.loading import load_tokenizer
from fuselm.models.locating import locate_model
from fuselm.models.vocabulary import UNMAPPED, Vocabulary

UNSEEN = Path(__file__).parents[1] / "data" / "unseen.jsonl"
KINDS = ["byte_level", "sentence_piece", "word_piece"]
ODD = [
    "",
    "a",
    " ",
    "  a",
    "\n",
    "\t",
    "é",
    "e\u0301",
    "ﬁ",
    "▁",
    "▁▁a",
    "a▁b",
    "\u200d",
    "👨‍👩‍👧‍👦",
    "a\r\n\tb",
    "日本",
    "\x00",
    "\ufeffa",
]
every_kind = pytest.mark.parametrize("kind", KINDS)
few = settings(max_examples=60)


@pytest.fixture(scope="module")
def vocabularies(byte_level, sentence_piece, word_piece) -> dict[str, Vocabulary]:
    return {folder.name: vocabulary_of(folder) for folder in (byte_level, sentence_piece, word_piece)}


def vocabulary_of(spec: Path) -> Vocabulary:
    model = locate_model(str(spec))
    return Vocabulary(load_tokenizer(model), model.output_size)


def spelled(vocabulary: Vocabulary, ids) -> bytes:
    return b"".join(vocabulary.token_bytes[i] or b"" for i in ids)


def unseen() -> list[str]:
    return [json.loads(line)["text"] for line in UNSEEN.read_text(encoding="utf-8").splitlines()]


# ---- the bytes of ids


def bytes_of(vocabulary: Vocabulary, string: str) -> bytes | None:
    return vocabulary.token_bytes[vocabulary.token_strings.index(string)]


def test_byte_level_tokens_stand_for_their_bytes(vocabularies):
    vocabulary = vocabularies["byte_level"]
    assert {bytes([byte]) for byte in range(256)} <= vocabulary.id_by_bytes.keys()
    assert (bytes_of(vocabulary, "Ġthe"), bytes_of(vocabulary, "Ċ"), bytes_of(vocabulary, "Ã")) == (
        b" the",
        b"\n",
        b"\xc3",
    )
    assert vocabulary.word_mark == "Ġ"


def test_sentence_piece_tokens_stand_for_their_bytes(vocabularies):
    vocabulary = vocabularies["sentence_piece"]
    assert (bytes_of(vocabulary, "▁the"), bytes_of(vocabulary, "<0x0A>"), bytes_of(vocabulary, "▁")) == (
        b" the",
        b"\n",
        b" ",
    )
    assert {bytes([byte]) for byte in range(256)} <= vocabulary.id_by_bytes.keys()
    assert vocabulary.word_mark == "▁"


def test_word_pieces_stand_for_their_bytes_and_the_space_before_a_word(vocabularies):
    vocabulary = vocabularies["word_piece"]
    assert (bytes_of(vocabulary, "the"), bytes_of(vocabulary, "##e"), bytes_of(vocabulary, ",")) == (
        b" the",
        b"e",
        b",",
    )
    assert vocabulary.word_mark == ""


@every_kind
def test_special_tokens_and_rows_without_a_token_stand_for_nothing(kind, vocabularies):
    vocabulary = vocabularies[kind]
    special = {"<|endoftext|>", "<s>", "</s>", "<unk>", "[PAD]", "[UNK]", "[CLS]", "[SEP]"}
    for string, text in zip(vocabulary.token_strings, vocabulary.token_bytes, strict=True):
        assert (text is None) == (string is None or string in special)
        assert text != b""
    assert len(vocabulary.token_bytes) == vocabulary.size
    assert vocabulary.count_with_bytes() == sum(text is not None for text in vocabulary.token_bytes)


def test_an_added_token_that_is_not_special_is_its_text():
    tokenizer = Tokenizer.from_str(drawn.byte_pairs([])._tokenizer.to_str())
    tokenizer.add_tokens(["  "])
    vocabulary = Vocabulary(tokenizer, 11)
    assert vocabulary.token_bytes[vocabulary.token_strings.index("  ")] == b"  "
    assert spelled(vocabulary, vocabulary.segment("a  b").ids) == b"a  b"


def test_the_id_in_use_is_found_among_several_for_the_same_bytes():
    vocabulary = drawn.byte_pairs([], dummy_prefix=False)
    assert vocabulary.token_bytes.count(b"a") == 2
    assert vocabulary.token_strings[vocabulary.id_by_bytes[b"a"]] == "a"
    assert vocabulary.token_strings[vocabulary.id_by_bytes[b"\xc3"]] == "<0xC3>"


@every_kind
@few
@given(data=st.data())
def test_counts_of_continuing_ids_are_right(kind, data):
    vocabulary = data.draw(drawn.kinds_of_vocabulary[kind])()
    typed = data.draw(st.text("ab é", max_size=3)).encode()
    expected = sum(bool(text) and text.startswith(typed) and text != typed for text in vocabulary.token_bytes)
    assert vocabulary.count_continuing(typed) == expected


def test_a_tokenizer_with_more_tokens_than_the_model_has_rows_is_refused():
    tokenizer = Tokenizer(kinds.WordLevel({"a": 0, "b": 1, "c": 6}, unk_token="a"))
    message = (
        r"^tokenizer: 7 tokens, but the model's output layer has 5 rows; they do not belong together; take the "
        r"tokenizer that the model came with$"
    )
    with pytest.raises(ValueError, match=message):
        Vocabulary(tokenizer, 5)


def test_a_special_token_beyond_the_output_layer_does_no_harm():
    """Try such a token as Gemma 3's for images, for which its text models have no row."""
    vocabulary = drawn.byte_pairs([])
    tokenizer, rows = vocabulary._tokenizer, vocabulary.size - drawn.FILLER_ROWS
    tokenizer.add_special_tokens(["<image>"])
    found = Vocabulary(tokenizer, rows)
    assert len(found.token_bytes) == rows
    assert found.segment("ab <image> b").ids.max() < rows


# ---- the spans of tokens


@every_kind
def test_spans_tile_any_text(kind, vocabularies):
    for text in [*ODD, *unseen()]:
        segmentation = vocabularies[kind].segment(text)
        assert segmentation.size == len(text.encode())
        assert len(segmentation.starts) == len(segmentation.ends) == len(segmentation.ids)
        assert (np.diff(segmentation.starts) >= 0).all()
        if len(segmentation.ids):
            assert segmentation.starts[0] in (-1, 0) and segmentation.ends[-1] == segmentation.size
            assert np.array_equal(segmentation.starts[1:], segmentation.ends[:-1])
            assert segmentation.starts.max() <= segmentation.size


@every_kind
@few
@given(data=st.data())
def test_spans_are_the_bytes_of_their_tokens_where_the_tokens_spell_the_text(kind, data):
    vocabulary = data.draw(drawn.kinds_of_vocabulary[kind])()
    text = data.draw(drawn.word_texts if kind == "word_piece" else drawn.texts)
    segmentation = vocabulary.segment(text)
    stream = b" " + text.encode()
    assert spelled(vocabulary, segmentation.ids) in (stream, stream[1:])
    for token, (begin, end) in zip(segmentation.ids, drawn.spans(segmentation.starts, segmentation.size), strict=True):
        assert vocabulary.token_bytes[token] == stream[begin:end]


def test_a_tokenizers_own_space_lies_before_the_text(vocabularies):
    segmentation = vocabularies["sentence_piece"].segment("the")
    assert segmentation.starts[0] == -1
    assert vocabularies["byte_level"].segment("the").starts[0] == 0
    assert vocabularies["sentence_piece"].segment("").starts.tolist() == []


def test_what_the_tokenizer_lowers_or_drops_belongs_to_a_token(vocabularies):
    vocabulary = vocabularies["word_piece"]
    segmentation = vocabulary.segment("The\n\nEnd ")
    covered = [b"The\n\nEnd "[begin:end] for begin, end in zip(segmentation.starts, segmentation.ends, strict=True)]
    assert b"".join(covered) == b"The\n\nEnd "
    assert covered[0].startswith(b"T") and covered[-1].endswith(b" ")
    assert spelled(vocabulary, segmentation.ids) == b" the end"


@every_kind
def test_names_of_special_tokens_in_a_text_are_text(kind, vocabularies):
    vocabulary = vocabularies[kind]
    for name in ("<|endoftext|>", "<s>", "</s>", "[CLS]", "[SEP]", "[PAD]"):
        ids = vocabulary.segment(f"a {name} b").ids
        names = {vocabulary.token_strings[i] for i in ids}
        assert name not in names
        assert vocabulary.count_tokens([f"a {name} b", ""]) == [len(ids), 0]


# ---- the tokens of any bytes


@pytest.mark.parametrize("kind", ["byte_level", "sentence_piece"])
@few
@given(string=st.binary(max_size=13) | st.text(max_size=7).map(str.encode))
def test_any_bytes_are_spelled(kind, string, vocabularies):
    (ids,) = vocabularies[kind].encode_bytes([string])
    assert UNMAPPED not in ids
    assert spelled(vocabularies[kind], ids) == string


@every_kind
@few
@given(data=st.data())
def test_a_string_that_cannot_be_spelled_ends_unmapped(kind, data):
    vocabulary = data.draw(drawn.kinds_of_vocabulary[kind])()
    strings = data.draw(st.lists(st.binary(max_size=3) | st.text("ab éAZ\xff", max_size=5).map(str.encode), max_size=5))
    encoded = vocabulary.encode_bytes(strings)
    assert encoded == vocabulary.encode_bytes(strings) == [vocabulary.encode_bytes([s])[0] for s in strings]
    for string, ids in zip(strings, encoded, strict=True):
        assert UNMAPPED not in ids[:-1]
        if ids[-1:] == (UNMAPPED,):
            rest = string.removeprefix(spelled(vocabulary, ids[:-1]))
            assert rest != b"" and not any(rest[:n] in vocabulary.id_by_bytes for n in range(1, len(rest) + 1))
        else:
            assert spelled(vocabulary, ids) == string


@few
@given(drawn.byte_level, drawn.texts)
def test_text_continues_with_the_tokenizers_own_tokens(make, text):
    vocabulary = make()
    assert list(vocabulary.encode_bytes([text.encode()])[0]) == vocabulary.segment(text).ids.tolist()


def test_text_that_continues_gets_no_space_of_its_own(vocabularies):
    vocabulary = vocabularies["sentence_piece"]
    assert spelled(vocabulary, vocabulary.segment("the").ids) == b" the"
    whole, bare = vocabulary.encode_bytes([b" the", b"the"])
    assert list(whole) == vocabulary.segment("the").ids.tolist()
    assert spelled(vocabulary, bare) == b"the"


def test_few_strings_are_remembered(vocabularies, monkeypatch):
    from fuselm.models import vocabulary as module

    vocabulary, strings = vocabularies["byte_level"], [b"%d?" % n for n in range(101)]
    monkeypatch.setattr(module, "MOST_ENCODED", 7)
    expected = [vocabulary.encode_bytes([string])[0] for string in strings]
    for begin in range(0, 101, 5):
        assert vocabulary.encode_bytes(strings[begin : begin + 8]) == expected[begin : begin + 8]
        assert len(vocabulary._encoded) <= 8


def test_capitals_are_not_spelled_by_a_vocabulary_without_them(vocabularies):
    assert vocabularies["word_piece"].encode_bytes([b" The"]) == [(UNMAPPED,)]


# ---- the demo's models


@pytest.mark.real
@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("smollm2", lambda text: text),
        ("gemma3", lambda text: text.replace("▁", " ")),
        ("qwen2.5", lambda text: unicodedata.normalize("NFC", text)),
    ],
    ids=["smollm2", "gemma3", "qwen2.5"],
)
def test_real_tokenizers_spell_unseen_text(name, read, real_models):
    vocabulary = vocabulary_of(real_models[name])
    for text in [*ODD, *unseen()]:
        segmentation = vocabulary.segment(text)
        assert spelled(vocabulary, segmentation.ids) == read(text).encode()
        tokens = zip(segmentation.ids, segmentation.starts, segmentation.ends, strict=True)
        covered = [(vocabulary.token_bytes[token], text.encode()[begin:end]) for token, begin, end in tokens]
        assert b"".join(piece for _, piece in covered) == text.encode()
        assert read(text) != text or all(token == piece for token, piece in covered)


def test_a_space_before_the_text_is_no_byte_of_its_first_token():
    starts = np.array([-1, 2], np.int32)
    assert segmentation.count_bytes(starts, 4).tolist() == [2, 2]
    assert segmentation.count_bytes(starts[:0], 4).tolist() == []

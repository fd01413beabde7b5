"""Test token_bytes.py, segmentation.py and sentencepiece_check.py: what tokens stand for, and spell of a text."""

import io
import json
import re

import lossy
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers import models as kinds

from fuselm.alignment import decoding_check
from fuselm.models import sentencepiece_check
from fuselm.models.vocabulary import Vocabulary

HOSTILE = [
    *("", " ", "  a", "\n\n", "\x00", "\ufeffa", "a\r\n\tb", "The  Café, it's (fine)!", "e\u0301 ﬁ ẞ Ⅷ ａ１"),
    *("▁▁▁ x▁y", "Ġ ĠĠdef café", "<tool>   y <left>", "  <left> model modelling", "<secret> <unk> <|end|>"),
    *("知识 融合", "👨‍👩‍👧", "    return x\n        y"),
]
pieces = st.sampled_from([*"ab é\nA▁Ġ知ﬁ", "e\u0301", "  ", "the", " and", "<tool>", "model"]) | st.characters(
    exclude_categories=["Cs"]
)
hostile_texts = st.lists(pieces, max_size=9).map("".join)
every_family = pytest.mark.parametrize("family", lossy.FAMILIES)


@pytest.fixture(scope="module")
def vocabularies(training_texts) -> dict[str, Vocabulary]:
    texts = [text[:300] for text in training_texts[:60]]
    return {family: lossy.vocabulary(family, texts) for family in lossy.FAMILIES}


def check(vocabulary: Vocabulary, text: str) -> None:
    """Assert that every byte is spelled by a token or counted, and that what is spelled is the text there."""
    segmentation = vocabulary.segment(text)
    stream, strings = b" " + text.encode(), vocabulary.spell(segmentation.ids.tolist())
    assert np.array_equal(segmentation.spelled, vocabulary.find_spelled(segmentation.ids, segmentation.starts, text))
    assert (np.diff(segmentation.starts) >= 0).all() and segmentation.size == len(text.encode())
    total = 0
    for i, (begin, end) in enumerate(zip(segmentation.starts.tolist(), segmentation.ends.tolist(), strict=True)):
        if segmentation.spelled[i]:
            covered = stream[begin + 1 : end + 1]
            last = (covered + b" ",) if i == len(strings) - 1 else ()
            assert (strings[i] or b"") in (covered, *last)
            total += end - max(begin, 0)
    assert total + segmentation.unspelled_bytes == segmentation.size
    counted = vocabulary.count_tokens_and_unspelled([text])
    assert counted == ([len(segmentation.ids)], [segmentation.unspelled_bytes])


@every_family
def test_spelled_and_unspelled_bytes_add_up_to_the_text(family, vocabularies, training_texts):
    for text in [*HOSTILE, *(text[:200] for text in training_texts[::7])]:
        check(vocabularies[family], text)


@settings(max_examples=200, deadline=None)
@given(family=st.sampled_from(sorted(lossy.FAMILIES)), text=hostile_texts)
def test_spelled_and_unspelled_bytes_add_up_to_any_text(family, text, vocabularies):
    check(vocabularies[family], text)


@every_family
def test_bytes_are_what_the_tokenizer_decodes(family, vocabularies, training_texts):
    """Check that tokens decode to the text if they spell all of it."""
    vocabulary, whole = vocabularies[family], 0
    for text in training_texts[::5]:
        for line in (*text.split("\n")[:3], " ".join(re.findall("[a-z]+", text)[:9])):
            segmentation = vocabulary.segment(line)
            if segmentation.unspelled_bytes == 0 and len(segmentation.ids):
                whole += 1
                assert vocabulary.decode(segmentation.ids.tolist()).strip(" ") == line.strip(" ")
    assert whole or "words" in family


@pytest.mark.parametrize("family", ["byte-level", "SentencePiece", "SentencePiece, nothing in front"])
def test_nothing_is_unspelled_where_nothing_can_be(family, vocabularies, training_texts):
    texts = [*(text for text in HOSTILE if "▁" not in text), *training_texts[::5]]
    assert not any(vocabularies[family].segment(text).unspelled_bytes for text in texts)


def bytes_of(vocabulary: Vocabulary, string: str) -> bytes | None:
    return vocabulary.token_bytes[vocabulary.token_strings.index(string)]


def test_added_tokens_of_the_vocabulary_are_what_they_decode_to(vocabularies):
    """Try Gemma's runs of spaces: added tokens, neither special nor normalized, and pieces of its model."""
    pipeline = json.loads(vocabularies["SentencePiece, nothing in front"]._tokenizer.to_str())
    run = next(piece for piece in pipeline["model"]["vocab"] if len(piece) > 2 and set(piece) == {"▁"})
    tokenizer = Tokenizer.from_str(json.dumps(pipeline))
    tokenizer.add_tokens([AddedToken(run, normalized=False)])
    vocabulary = Vocabulary(tokenizer, tokenizer.get_vocab_size())
    assert bytes_of(vocabulary, run) == b" " * len(run)
    text = "x" + " " * len(run) + "y"
    assert vocabulary.segment(text).unspelled_bytes == 0 and vocabulary.merges is not None
    assert vocabulary.segment(f"x{run}y").unspelled_bytes == 3 * len(run)  # U+2581 is read as spaces


def test_added_tokens_that_only_their_own_text_becomes_are_that_text(vocabularies):
    sentence_piece = vocabularies["SentencePiece, nothing in front, added tokens"]
    assert bytes_of(sentence_piece, "▁▁▁") == "▁▁▁".encode()  # no piece of the model: found before spaces are marked
    assert bytes_of(sentence_piece, "▁▁▁▁▁") == b"     "  # normalized: spaces become it
    byte_level = vocabularies["byte-level, added tokens"]
    assert bytes_of(byte_level, "café") == "café".encode()  # and not the bytes of these characters of the alphabet
    assert bytes_of(byte_level, "Ġ") == b" "  # the model's own
    assert bytes_of(byte_level, "<secret>") is None


def test_decoders_decide_what_marks_and_ends_of_words_are(vocabularies):
    assert bytes_of(vocabularies["metaspace, another mark"], "_the") == b" the"
    assert bytes_of(vocabularies["ends of words"], "the</w>") == b"the "
    assert bytes_of(vocabularies["words, no decoder"], "the") == b" the"
    assert bytes_of(vocabularies["WordPiece"], "(") == b" ("
    assert vocabularies["metaspace, another mark"].word_mark == "_"


def test_a_decoder_of_any_pattern_is_believed():
    tokens = ["<unk>", "a", "b", "~", "~a", "%n", "a%n"]
    pairs = [("~", "a"), ("a", "%n")]
    tokenizer = Tokenizer(kinds.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=pairs, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Replace(" ", "~"), normalizers.Replace("\n", "%n")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split("%n", "isolated")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("~", " "), decoders.Replace("%n", "\n"), decoders.Fuse()])
    vocabulary = Vocabulary(tokenizer, len(tokens))
    assert [vocabulary.token_bytes[i] for i in range(1, 7)] == [b"a", b"b", b" ", b" a", b"\n", b"a\n"]


def test_bytes_that_do_not_decode_together_are_refused():
    """Try a model that writes bytes as <0x..>, of which its decoder knows nothing."""
    tokens = ["<unk>", "a", "b", *(f"<0x{byte:02X}>" for byte in range(256))]
    ids = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(kinds.BPE(vocab=ids, merges=[], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Fuse()
    assert bytes_of(Vocabulary(tokenizer, len(tokens)), "<0xC3>") == b"\xc3"
    crossed = {**ids, "<0xC3>": ids["<0xC4>"], "<0xC4>": ids["<0xC3>"]}
    swapped = Tokenizer(kinds.BPE(vocab=crossed, merges=[], unk_token="<unk>", byte_fallback=True))
    swapped.decoder = decoders.Sequence(
        [decoders.Replace("<0xC3>", "<0xC5>"), decoders.ByteFallback(), decoders.Fuse()]
    )
    assert bytes_of(Vocabulary(swapped, len(tokens)), "<0xC3>") == b"\xc3"  # text still becomes it
    swapped.model = kinds.BPE(vocab=crossed, merges=[], unk_token="<unk>", byte_fallback=False)
    with pytest.raises(ValueError, match=r"^tokenizer: token \d+ '<0x..>' reads as .* and decodes to .*; needs a"):
        Vocabulary(swapped, len(tokens))


def test_candidates_off_the_text_show_a_wrong_map(vocabularies):
    vocabulary = vocabularies["SentencePiece, nothing in front"]
    before = vocabulary.segment("x = a").ids.tolist()
    for string in ("▁the", "s", "<0x0A>"):
        assert decoding_check.decodes_to_its_bytes(vocabulary, before, vocabulary.token_strings.index(string))
    assert decoding_check.decodes_to_its_bytes(vocabulary, before, vocabulary.token_strings.index("<0xC3>")) is None
    token = vocabulary.token_strings.index("▁the")
    wrong = Vocabulary(Tokenizer.from_str(vocabulary._tokenizer.to_str()), vocabulary.size)
    wrong.token_bytes[token] = "▁the".encode()
    assert decoding_check.decodes_to_its_bytes(wrong, before, token) is False


def test_candidates_of_a_tokenizer_without_a_decoder_are_no_wrong_map(vocabularies):
    whole = vocabularies["byte-level"]
    description = json.loads(whole._tokenizer.to_str()) | {"decoder": None}
    vocabulary = Vocabulary(Tokenizer.from_str(json.dumps(description)), whole.size)
    assert vocabulary.token_bytes == whole.token_bytes
    before = vocabulary.segment("x = a").ids.tolist()
    assert decoding_check.decodes_to_its_bytes(vocabulary, before, vocabulary.token_strings.index("Ġthe"))


# ---- a SentencePiece file beside tokenizer.json


@pytest.fixture(scope="module")
def sentence_piece_file(training_texts) -> bytes:
    import sentencepiece

    lines = [line for text in training_texts[:60] for line in text.split("\n") if line.strip()]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return model.getvalue()


def twin_folder(folder, model: bytes, shift: int = 0, swap: bool = False):
    """Write a folder with a SentencePiece file and its conversion, ids shifted or two of them swapped."""
    import sentencepiece

    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(model)
    piece = sentencepiece.SentencePieceProcessor(model_proto=model)
    strings = [f"<extra{n}>" for n in range(shift)] + [piece.id_to_piece(i) for i in range(len(piece))]
    if swap:
        strings[-1], strings[-2] = strings[-2], strings[-1]
    rank = {piece.id_to_piece(i): piece.get_score(i) for i in range(len(piece))}
    cuts = [(s[:n], s[n:]) for s in strings if s in rank for n in range(1, len(s))]
    pairs = sorted((p for p in cuts if p[0] in rank and p[1] in rank), key=lambda p: -rank["".join(p)])
    ids = {s: i for i, s in enumerate(strings)}
    tokenizer = Tokenizer(kinds.BPE(vocab=ids, merges=pairs, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder, tokenizer


@pytest.mark.parametrize("shift", [0, 2])
def test_a_folder_whose_two_tokenizers_agree_is_fine(shift, sentence_piece_file, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("FUSELM_CACHE", str(tmp_path / "cache"))
    sentencepiece_check.check_twins(*twin_folder(tmp_path / "model", sentence_piece_file, shift=shift))
    assert not caplog.messages


def test_a_folder_whose_ids_mean_different_pieces_is_refused(sentence_piece_file, tmp_path, monkeypatch):
    monkeypatch.setenv("FUSELM_CACHE", str(tmp_path / "cache"))
    folder, tokenizer = twin_folder(tmp_path / "model", sentence_piece_file, swap=True)
    with pytest.raises(
        ValueError, match=r"model: tokenizer.json and tokenizer.model differ: id \d+ is '.*' in one and "
    ):
        sentencepiece_check.check_twins(folder, tokenizer)


def test_a_folder_whose_tokenizers_cut_text_otherwise_is_named(sentence_piece_file, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("FUSELM_CACHE", str(tmp_path / "cache"))
    folder, tokenizer = twin_folder(tmp_path / "model", sentence_piece_file)
    tokenizer.pre_tokenizer = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.normalizer = normalizers.Sequence([tokenizer.normalizer, normalizers.Lowercase()])
    tokenizer.save(str(folder / "tokenizer.json"))
    sentencepiece_check.check_twins(folder, tokenizer)
    assert "tokenizer.json and tokenizer.model differ: of " in caplog.text and len(caplog.messages) == 1


def test_a_file_of_another_kind_beside_it_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("FUSELM_CACHE", str(tmp_path / "cache"))
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")  # as tiktoken's
    sentencepiece_check.check_twins(tmp_path, Tokenizer(kinds.BPE()))

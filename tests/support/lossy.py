"""Train small tokenizers of every decoder and of every way to lose text, for property tests."""

import functools
import json
from collections.abc import Callable, Sequence

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, trainers
from tokenizers import models as kinds

from fuselm.models.vocabulary import Vocabulary

SPECIAL = ["<unk>", "<|end|>"]
ADDED = [  # of all flags; among them characters of the byte alphabet, the space mark, and runs of white space
    AddedToken("▁▁▁", normalized=False),
    AddedToken("▁▁▁▁▁", normalized=True),
    AddedToken("Ġ", normalized=False),
    AddedToken("café", normalized=False),
    AddedToken("ĠĠdef", normalized=True),
    AddedToken("<tool>", rstrip=True, normalized=False),
    AddedToken("<left>", lstrip=True, normalized=False),
    AddedToken("model", single_word=True, normalized=False),
    AddedToken("\n\n", normalized=False),
    AddedToken("ẞ", normalized=True),
    AddedToken("<secret>", special=True, normalized=False),
]


def _train(tokenizer: Tokenizer, texts: Sequence[str], trainer: type, **options) -> Tokenizer:
    tokenizer.train_from_iterator(texts, trainer(show_progress=False, special_tokens=SPECIAL, **options))
    return tokenizer


def byte_level(texts: Sequence[str], *, whole: bool = True, prefix: bool = False, normal_form=None) -> Tokenizer:
    tokenizer = Tokenizer(kinds.BPE())
    tokenizer.normalizer = normal_form
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet() if whole else []
    return _train(tokenizer, texts, trainers.BpeTrainer, vocab_size=400, initial_alphabet=alphabet)


def metaspace(texts: Sequence[str], *, mark: str = "▁", scheme: str = "always") -> Tokenizer:
    tokenizer = Tokenizer(kinds.BPE(unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=mark, prepend_scheme=scheme)
    tokenizer.decoder = decoders.Metaspace(replacement=mark, prepend_scheme=scheme)
    return _train(tokenizer, texts, trainers.BpeTrainer, vocab_size=300, limit_alphabet=50)


def sentence_piece(texts: Sequence[str], *, prepend: bool, fallback: bool = True) -> Tokenizer:
    learned = Tokenizer(kinds.BPE())
    learned.normalizer = normalizers.Replace(" ", "▁")
    learned.pre_tokenizer = pre_tokenizers.Split(Regex("▁+[^▁]*|[^▁]+"), "isolated")
    _train(learned, texts, trainers.BpeTrainer, vocab_size=300, limit_alphabet=50)
    model = json.loads(learned.to_str())["model"]
    pieces = [*SPECIAL, *([f"<0x{byte:02X}>" for byte in range(256)] if fallback else []), *model["vocab"]]
    ids = {piece: n for n, piece in enumerate(dict.fromkeys(pieces))}
    merges = [tuple(pair) for pair in model["merges"]]
    tokenizer = Tokenizer(kinds.BPE(vocab=ids, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=fallback))
    replace = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace]) if prepend else replace
    strip = [decoders.Strip(" ", 1, 0)] if prepend else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


def unigram(texts: Sequence[str], *, squeeze: bool) -> Tokenizer:
    tokenizer = Tokenizer(kinds.Unigram())
    if squeeze:
        space = normalizers.Replace(Regex(r"\s+"), " ")
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.NFKC(), normalizers.Lowercase(), space, normalizers.Strip()]
        )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return _train(tokenizer, texts, trainers.UnigramTrainer, vocab_size=300, unk_token="<unk>")


def word_piece(texts: Sequence[str], *, lowercase: bool) -> Tokenizer:
    tokenizer = Tokenizer(kinds.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return _train(tokenizer, texts, trainers.WordPieceTrainer, vocab_size=400)


def word_ends(texts: Sequence[str]) -> Tokenizer:
    tokenizer = Tokenizer(kinds.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.BPEDecoder(suffix="</w>")
    return _train(tokenizer, texts, trainers.BpeTrainer, vocab_size=400, end_of_word_suffix="</w>")


def words(texts: Sequence[str], *, decoder=None) -> Tokenizer:
    tokenizer = Tokenizer(kinds.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if decoder is not None:
        tokenizer.decoder = decoder
    return _train(tokenizer, texts, trainers.WordLevelTrainer, vocab_size=400)


def with_added(make: Callable[[Sequence[str]], Tokenizer], texts: Sequence[str]) -> Tokenizer:
    tokenizer = make(texts)
    for token in ADDED:
        (tokenizer.add_special_tokens if token.special else tokenizer.add_tokens)([token])
    return tokenizer


PLAIN: dict[str, Callable[[Sequence[str]], Tokenizer]] = {
    "byte-level": byte_level,
    "byte-level, space in front": functools.partial(byte_level, prefix=True),
    "byte-level, bytes missing": functools.partial(byte_level, whole=False),
    "byte-level, NFC": functools.partial(byte_level, normal_form=normalizers.NFC()),
    "byte-level, NFKC": functools.partial(byte_level, normal_form=normalizers.NFKC()),
    "metaspace": metaspace,
    "metaspace, another mark": functools.partial(metaspace, mark="_", scheme="first"),
    "metaspace, never in front": functools.partial(metaspace, scheme="never"),
    "SentencePiece": functools.partial(sentence_piece, prepend=True),
    "SentencePiece, nothing in front": functools.partial(sentence_piece, prepend=False),
    "SentencePiece, no fallback": functools.partial(sentence_piece, prepend=True, fallback=False),
    "unigram": functools.partial(unigram, squeeze=False),
    "unigram, squeezed": functools.partial(unigram, squeeze=True),
    "WordPiece": functools.partial(word_piece, lowercase=False),
    "WordPiece, lower case": functools.partial(word_piece, lowercase=True),
    "ends of words": word_ends,
    "words, no decoder": words,
    "words, WordPiece's decoder": functools.partial(words, decoder=decoders.WordPiece()),
}
FAMILIES = PLAIN | {f"{name}, added tokens": functools.partial(with_added, make) for name, make in PLAIN.items()}


def vocabulary(name: str, texts: Sequence[str], filler_rows: int = 3) -> Vocabulary:
    """Make a tokenizer of a family, for an output layer with some more rows."""
    tokenizer = FAMILIES[name](texts)
    return Vocabulary(tokenizer, max(tokenizer.get_vocab().values()) + 1 + filler_rows)

"""Build small tokenizers of every family that language models use, trained on the quickstart's texts.

Each is a function of texts to a `Tokenizer`; `FAMILIES` has them by name. Some lose text: they lower-case it, collapse
white space, or write `<unk>` for what they do not know.
"""

import json
from collections.abc import Callable, Sequence

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors, trainers
from tokenizers import models as kinds
from tokenizers.normalizers import Normalizer
from tokenizers.pre_tokenizers import PreTokenizer

Texts = Sequence[str]
END = "<|endoftext|>"


def byte_level(
    texts: Texts,
    *,
    size: int = 500,
    prefix_space: bool = False,
    before: Sequence[PreTokenizer] = (),
    normalizer: Normalizer | None = None,
    alphabet: bool = True,
) -> Tokenizer:
    """Return GPT-2's kind. Without `alphabet`, bytes that the texts lack are dropped."""
    tokenizer = Tokenizer(kinds.BPE())
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*before, pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet() if alphabet else [],
        special_tokens=[END],
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def digits_singly(texts: Texts) -> Tokenizer:
    return byte_level(texts, before=[pre_tokenizers.Digits(individual_digits=True)])


def bytes_alone(texts: Texts) -> Tokenizer:
    return byte_level([], size=257)


def english_bytes(texts: Texts) -> Tokenizer:
    """Return byte-level BPE that was trained on ASCII without its initial alphabet: other bytes are dropped."""
    return byte_level(["".join(c for c in text if c.isascii()) for text in texts], alphabet=False)


def with_prefix_tokens(texts: Texts) -> Tokenizer:
    """Return byte-level BPE whose post-processor puts [gMASK]<sop> in front and [SEP] behind."""
    tokenizer = byte_level(texts)
    tokenizer.add_special_tokens(["[gMASK]", "<sop>", "[SEP]"])
    names = [(name, tokenizer.token_to_id(name)) for name in ("[gMASK]", "<sop>", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[gMASK] <sop> $A [SEP]", pair="[gMASK] <sop> $A $B [SEP]", special_tokens=names
    )
    return tokenizer


def with_added_tokens(texts: Texts) -> Tokenizer:
    """Return byte-level BPE with added tokens of all flags."""
    tokenizer = byte_level(texts, normalizer=normalizers.NFC())
    tokenizer.add_special_tokens([AddedToken("<s>", special=True), AddedToken("<mask>", special=True, lstrip=True)])
    tokenizer.add_tokens(
        [
            AddedToken("    ", normalized=False),
            AddedToken("\t\t", normalized=True),
            AddedToken("def", single_word=True),
            AddedToken("the", single_word=True, lstrip=True),
            AddedToken("import", rstrip=True),
            AddedToken("é", normalized=True),
            AddedToken("<tool>", normalized=False),
        ]
    )
    return tokenizer


def sentence_piece(
    texts: Texts, *, prefix: bool = True, fallback: bool = True, mark: str = "▁", added: Sequence[str] = ()
) -> Tokenizer:
    """Return SentencePiece's BPE as Llama 2 (`prefix`) or Gemma has it; `added` are tokens that are not special."""
    learned = Tokenizer(kinds.BPE())
    learned.pre_tokenizer = pre_tokenizers.Metaspace(replacement=mark, prepend_scheme="never")
    learned.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=400, limit_alphabet=71, show_progress=False))
    model = json.loads(learned.to_str())["model"]
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)] if fallback else []
    strings = dict.fromkeys(["<unk>", "<s>", "</s>", *byte_tokens, *model["vocab"], *added])
    tokenizer = Tokenizer(
        kinds.BPE(
            vocab={string: i for i, string in enumerate(strings)},
            merges=[tuple(pair) for pair in model["merges"]],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=fallback,
        )
    )
    prepended = [normalizers.Prepend(mark)] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*prepended, normalizers.Replace(" ", mark)])
    stripped = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(mark, " "), decoders.ByteFallback(), decoders.Fuse(), *stripped]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in added])
    return tokenizer


def gemma(texts: Texts) -> Tokenizer:
    """Return what the Hub has of Gemma: runs of the space mark and line breaks are added tokens."""
    return sentence_piece(texts, prefix=False, added=[*("▁" * n for n in range(2, 9)), "\n", "\n\n"])


def metaspace_first(texts: Texts) -> Tokenizer:
    """Return BPE with byte fallback whose Metaspace puts a mark before the first word only, as newer Llamas."""
    tokenizer = sentence_piece(texts, prefix=False)
    tokenizer.normalizer = None
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return tokenizer


def other_mark(texts: Texts) -> Tokenizer:
    """Return BPE with another mark for spaces than SentencePiece's, by Metaspace, unknown characters as <unk>."""
    tokenizer = Tokenizer(kinds.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="_", prepend_scheme="never")
    tokenizer.decoder = decoders.Metaspace(replacement="_", prepend_scheme="never")
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>", END], show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def unknown_characters(texts: Texts) -> Tokenizer:
    """Return BPE without byte fallback, trained on ASCII: other characters fuse to <unk>."""
    tokenizer = Tokenizer(kinds.BPE(unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>", END], show_progress=False)
    tokenizer.train_from_iterator(["".join(c for c in text if c.isascii()) for text in texts], trainer)
    return tokenizer


def unigram(texts: Texts, *, normalizer: Normalizer | None = None) -> Tokenizer:
    """Return T5's and XLM-R's kind: Unigram with <unk>, the mark in front."""
    tokenizer = Tokenizer(kinds.Unigram())
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=400, special_tokens=["<unk>", END], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def squeezed(texts: Texts) -> Tokenizer:
    """Return Unigram that lower-cases and collapses white space, as ALBERT and XLNet do."""
    return unigram(
        texts,
        normalizer=normalizers.Sequence(
            [
                normalizers.NFKC(),
                normalizers.Lowercase(),
                normalizers.Replace(Regex(r"\s+"), " "),
                normalizers.Strip(),
            ]
        ),
    )


def word_piece(texts: Texts, *, lowercase: bool = True) -> Tokenizer:
    """Return BERT's kind, with [CLS] and [SEP] by its post-processor."""
    tokenizer = Tokenizer(kinds.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=500, special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]"], show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return tokenizer


def cased_word_piece(texts: Texts) -> Tokenizer:
    return word_piece(texts, lowercase=False)


def word_ends(texts: Texts) -> Tokenizer:
    """Return GPT-1's kind: BPE whose words end in </w>."""
    tokenizer = Tokenizer(kinds.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.BPEDecoder(suffix="</w>")
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<unk>", END], end_of_word_suffix="</w>", show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def clip(texts: Texts) -> Tokenizer:
    """Return CLIP's kind: byte-level with </w>, lower-casing, white space collapsed."""
    tokenizer = Tokenizer(kinds.BPE(unk_token=END, end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"), "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[END],
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def characters(texts: Texts) -> Tokenizer:
    """Return one token for each character that the texts have, <unk> for others."""
    alphabet = sorted({c for text in texts for c in text})
    tokenizer = Tokenizer(
        kinds.BPE(vocab={s: i for i, s in enumerate(["<unk>", END, *alphabet])}, merges=[], unk_token="<unk>")
    )
    tokenizer.add_special_tokens(["<unk>", END])
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


FAMILIES: dict[str, Callable[[Texts], Tokenizer]] = {
    "byte-level": byte_level,
    "byte-level, prefix space": lambda texts: byte_level(texts, prefix_space=True),
    "byte-level, digits singly": digits_singly,
    "byte-level, NFC": lambda texts: byte_level(texts, normalizer=normalizers.NFC()),
    "bytes alone": bytes_alone,
    "byte-level, bytes missing": english_bytes,
    "byte-level, prefix tokens": with_prefix_tokens,
    "byte-level, added tokens of all flags": with_added_tokens,
    "SentencePiece BPE, prefix (Llama 2)": sentence_piece,
    "SentencePiece BPE, added spaces (Gemma)": gemma,
    "SentencePiece BPE, first word marked": metaspace_first,
    "SentencePiece BPE, no fallback": lambda texts: sentence_piece(texts, fallback=False),
    "Metaspace, other mark": other_mark,
    "BPE, unknown characters": unknown_characters,
    "Unigram": unigram,
    "Unigram, lower case, white space collapsed": squeezed,
    "WordPiece, lower case (BERT)": word_piece,
    "WordPiece, cased": cased_word_piece,
    "BPE, word ends (GPT-1)": word_ends,
    "byte-level, word ends (CLIP)": clip,
    "characters": characters,
}

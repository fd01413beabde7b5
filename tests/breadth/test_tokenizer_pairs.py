"""Align every ordered pair of tokenizer families by `span` over hostile texts, and check what must always hold.

Rows are of two kinds. `full` ones give every id of the source some probability, so other ways to the same bytes only
add to what the source itself gives a text. `divergent` ones have, besides the token that comes, only candidates that
spell something else than the text: there is no other way, and the aligned probabilities have to multiply to the
source's own.
"""

import itertools
import math

import numpy as np
import pytest
from drawn import distributions_of, trace, trace_of
from numpy import ndarray
from tokenizer_families import FAMILIES
from tokenizers import Tokenizer

from fuselm.alignment.aligner import Aligner
from fuselm.models.loading import load_tokenizer
from fuselm.models.locating import locate_model
from fuselm.models.vocabulary import Segmentation, Vocabulary
from fuselm.stores.distributions import check_distributions

FAST = [
    "byte-level",
    "byte-level, bytes missing",
    "SentencePiece BPE, prefix (Llama 2)",
    "SentencePiece BPE, added spaces (Gemma)",
    "Unigram, lower case, white space collapsed",
    "WordPiece, lower case (BERT)",
]
PAIRS = list(itertools.product(FAMILIES, repeat=2))
SLOW = [pair for pair in PAIRS if not set(pair) <= set(FAST)]
HOSTILE = [
    "",
    "a",
    " ",
    "知识融合是把几个模型的长处合并到一个模型里。",
    "a👨‍👩‍👧‍👦b 🇨🇭 👍🏽",
    "e\u0301a\u0302\u0323 A\u030angstro\u0308m ﬁ ½",
    "\tdef f(x):\n\t\treturn x\n",
    "a  b   c        d    ",
    "two\r\nlines\r\n\r\n  and trailing \t ",
    "nul \x00 and \x7f\x01",
    "a\u2581mark \u2581\u2581 and _one",
    "<s> in <|endoftext|> the <unk> text [CLS] </w> <0x41> <mask> <tool>",
    "Donaudampfschifffahrtsgesellschaftskapitaen" * 3,
    "İstanbul ǅ ß ẞ Σίσυφος",
    "\ufeffbom \u200b\u200d zero\u2028width\u3000space",
]
CANDIDATES = 13  # of a divergent row


@pytest.fixture(scope="module")
def vocabularies(training_texts) -> "Vocabularies":
    return Vocabularies(training_texts)


class Vocabularies(dict):
    """Hold vocabularies by family, each made at its first use, and their tokenizers."""

    def __init__(self, texts: list[str]):
        super().__init__()
        self.tokenizers: dict[str, Tokenizer] = {}
        self._texts = texts

    def __missing__(self, family: str) -> Vocabulary:
        tokenizer = FAMILIES[family](self._texts)
        self.tokenizers[family] = tokenizer
        self[family] = Vocabulary(Tokenizer.from_str(tokenizer.to_str()), tokenizer.get_vocab_size() + 3)
        return self[family]


@pytest.fixture(scope="module")
def excerpts(texts) -> list[str]:
    """Return the beginning of one document of each domain."""
    by_domain = {row["domain"]: row["text"][:113] for row in texts}
    return list(by_domain.values())


@pytest.mark.parametrize(("source", "target"), list(itertools.product(FAST, repeat=2)))
def test_a_pair_of_families(source, target, vocabularies, excerpts):
    check_pair(vocabularies[source], vocabularies[target], [*HOSTILE, *excerpts[:1]])


@pytest.mark.slow
@pytest.mark.parametrize(("source", "target"), SLOW)
def test_every_other_pair_of_families(source, target, vocabularies, excerpts):
    check_pair(vocabularies[source], vocabularies[target], [*HOSTILE, *excerpts])


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_spell_what_the_tokenizer_decodes(family, vocabularies, excerpts):
    """Check that the bytes of ids that decode to a text are the text, with a space of the tokenizer's own at most.

    An <unk> decodes to its name, which may be what the text says.
    """
    vocabulary, tokenizer = vocabularies[family], vocabularies.tokenizers[family]
    tokenizer.encode_special_tokens = True
    special = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    special.add(tokenizer.token_to_id("<unk>"))
    for text in [*HOSTILE, *excerpts]:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        segmentation = vocabulary.segment(text)
        assert segmentation.ids.tolist() == ids
        check_tiling(segmentation, text)
        decoded = tokenizer.decode(ids, skip_special_tokens=False)
        if decoded in (text, f" {text}") and not special.intersection(ids):
            assert spelled_tokens(vocabulary, segmentation, text).all(), text


@pytest.mark.real
@pytest.mark.slow
def test_pairs_of_real_tokenizers_and_families(real_models, vocabularies, excerpts):
    located = [locate_model(str(path)) for path in real_models.values()]
    real = [Vocabulary(load_tokenizer(model), model.output_size) for model in located]
    for source, target in itertools.product(real, repeat=2):
        check_pair(source, target, [*HOSTILE, *excerpts], full=False)
    for (family, one), other in itertools.product([(f, vocabularies[f]) for f in FAST], real):
        check_pair(one, other, [*HOSTILE, *excerpts])
        check_pair(other, vocabularies[family], [*HOSTILE, *excerpts], full=False)


def check_pair(source: Vocabulary, target: Vocabulary, texts: list[str], *, full: bool = True) -> None:
    """Assert the invariants of alignment for each text; check only divergent rows unless `full`."""
    aligner = Aligner(source, target, top_k=source.size + target.size, method="span")
    for number, text in enumerate(texts):
        random = np.random.default_rng(number)
        check_alignment(aligner, text, divergent_trace(source, text, random), is_exact=True)
        if full:
            check_alignment(aligner, text, trace_of(source, text, random), is_exact=False)
            check_alignment(aligner, text, trace_of(source, text, random, top_k=7), is_exact=False)


def check_alignment(aligner: Aligner, text: str, own, *, is_exact: bool) -> None:
    aligned = aligner.align(own, text)
    rows, target = aligned.distributions, aligner.target.segment(text)
    check_distributions(rows, aligner.target.size)
    assert np.isfinite(rows.gold).all() and (rows.gold <= 0).all(), text
    source_spelled = spelled_tokens(aligner.source, aligner.source.segment(text), text)
    target_spelled = spelled_tokens(aligner.target, target, text)
    credited, by_source = (
        covered_bytes(target, rows.informed),
        covered_bytes(aligner.source.segment(text), source_spelled),
    )
    by_target = covered_bytes(target, target_spelled)
    assert not (credited & ~(by_source & by_target)).any(), text
    assert (rows.gold[~rows.informed] == 0).all(), text
    expected = float(own.distributions.gold[source_spelled].astype(np.float64).sum())
    found = float(rows.gold.astype(np.float64).sum())
    slack = 1e-4 * max(1.0, -expected)
    assert found >= expected - slack, f"{text!r}: {found} and not at least {expected}"
    if is_exact and len(own.tokens) and by_source.all() and by_target.all():
        expected -= hidden_share(aligner, own, text)
        assert abs(found - expected) <= slack, f"{text!r}: {found} and not {expected}"


def hidden_share(aligner: Aligner, own, text: str) -> float:
    """Return the log-probability that the first row begins with a space that the target does not see; 0 if it does."""
    target = aligner.target.segment(text)
    if own.starts[0] == 0 or target.starts[0] == -1:
        return 0.0
    ids, logprobs = own.distributions.row(0)
    agrees = np.array([(aligner.source.token_bytes[i] or b"").startswith(b" ") for i in ids])
    return math.log(np.exp(logprobs.astype(np.float64))[agrees].sum())


def divergent_trace(vocabulary: Vocabulary, text: str, random: np.random.Generator):
    """Return rows of the token that comes and of some that begin with other bytes than the text continues with."""
    segmentation, stream = vocabulary.segment(text), b" " + text.encode()
    rows, gold = [], []
    for token, start in zip(segmentation.ids.tolist(), segmentation.starts.tolist(), strict=True):
        rest = stream[start + 1 :]
        others = [
            int(i)
            for i in random.integers(0, vocabulary.size, CANDIDATES)
            if i != token and diverges(vocabulary.token_bytes[i], rest)
        ]
        masses = random.dirichlet(np.ones(1 + len(set(others))))
        rows.append(dict(zip([token, *dict.fromkeys(others)], masses.tolist(), strict=True)))
        gold.append(math.log(masses[0]))
    return trace(segmentation, distributions_of(rows, [0.0] * len(rows), gold))


def diverges(string: bytes | None, rest: bytes) -> bool:
    return string is None or string[: len(rest)] != rest[: len(string)]


def spelled_tokens(vocabulary: Vocabulary, segmentation: Segmentation, text: str) -> ndarray:
    """Tell of each token whether its bytes are those of the text that it covers, byte by byte.

    The last may end with a space of the tokenizer's own. A token that covers nothing has nothing to spell.
    """
    stream = b" " + text.encode()
    spans = zip(segmentation.ids, segmentation.starts + 1, segmentation.ends + 1, strict=True)
    strings = [(vocabulary.token_bytes[i] or b"", stream[a:b]) for i, a, b in spans]
    result = np.array([string == covered for string, covered in strings], bool)
    if strings:
        result[-1] |= strings[-1][0] == strings[-1][1] + b" "
    return result


def covered_bytes(segmentation: Segmentation, chosen: ndarray) -> ndarray:
    """Tell of each byte of the text whether it lies in a chosen token."""
    covered = np.zeros(segmentation.size, bool)
    for start, end in zip(segmentation.starts[chosen], segmentation.ends[chosen], strict=True):
        covered[max(start, 0) : end] = True
    return covered


def check_tiling(segmentation: Segmentation, text: str) -> None:
    assert segmentation.size == len(text.encode())
    assert (np.diff(segmentation.starts) >= 0).all()
    if len(segmentation.ids):
        assert segmentation.starts[0] in (-1, 0) and segmentation.ends[-1] == segmentation.size

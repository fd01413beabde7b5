"""foreign.py and derivation.py: what each layout can hold comes back, and the rest is derived and counted."""

import json
import math
from collections import Counter
from dataclasses import replace

import drawn
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fuselm.sources.interchange import derivation, distillkit, foreign
from fuselm.sources.interchange.foreign import ForeignRecord, LayoutTokenizer
from fuselm.stores import store
from fuselm.stores.rows import Trace, build_table, read_traces

TOP_K = 3


def tokens_of(make_vocabulary) -> LayoutTokenizer:
    vocabulary = make_vocabulary()
    return LayoutTokenizer(vocabulary=vocabulary, context=vocabulary.token_strings.index("<s>"))


def stored(trace: Trace) -> Trace:
    return read_traces(build_table([trace]))[0]


def back(record: dict, layout: str, tokens: LayoutTokenizer, *, ahead: bool | None = None, tail: float | None = None):
    chosen, counted = foreign.LAYOUTS[layout], Counter()
    found = chosen.read(json.loads(foreign.dump_record(record)), tokens)
    trace, text = derivation.derive_trace(
        found, tokens, ahead=chosen.is_ahead if ahead is None else ahead, tail=tail, counted=counted
    )
    return trace, text, counted


kinds = st.sampled_from(["byte_level", "sentence_piece"]).flatmap(lambda kind: drawn.kinds_of_vocabulary[kind])


@pytest.mark.parametrize("layout", foreign.LAYOUTS)
@settings(max_examples=41)
@given(kinds, drawn.texts, st.integers(0, 99), st.booleans())
def test_everything_that_a_layout_holds_comes_back(layout, kind, text, seed, with_text):
    tokens = tokens_of(kind)
    made = drawn.trace_of(tokens.vocabulary, text, np.random.default_rng(seed), top_k=TOP_K)
    trace = stored(replace(made, text=store.fingerprint_text(text)))
    chosen = foreign.LAYOUTS[layout]
    given_text = text if with_text or layout == "openai" else None
    read, found_text, counted = back(chosen.write(trace, given_text, tokens, chosen.is_ahead), layout, tokens)
    assert found_text == text and read.text == trace.text and read.size == trace.size
    assert np.array_equal(read.tokens, trace.tokens) and np.array_equal(read.starts, trace.starts)
    one, other = trace.distributions, stored(read).distributions
    for i, token in enumerate(trace.tokens.tolist()):
        expected, entries = dict(zip(*one.row(i), strict=True)), dict(zip(*other.row(i), strict=True))
        if layout == "openai":  # strings that are several tokens' join the tail
            assert entries.keys() <= expected.keys() | {token}
        else:
            assert entries.keys() == expected.keys()
            assert abs(one.tail[i] - other.tail[i]) < 1 / 32
        for entry in entries.keys() & expected.keys():  # what is rounded twice, of the token that came three times
            assert abs(math.exp(entries[entry] / 2) - math.exp(expected[entry] / 2)) < 1 / 32
        if layout in ("vllm", "openai"):
            assert other.gold[i] == one.gold[i]
        elif token in expected:
            assert other.gold[i] == pytest.approx(expected[token], abs=1 / 128)
        else:
            share = one.tail[i] / (tokens.vocabulary.size - TOP_K)
            assert other.gold[i] == pytest.approx(math.log(share), abs=1 / 128)
    if layout in ("axolotl", "distillkit"):
        assert counted["gold_estimated"] == sum(t not in one.row(i)[0] for i, t in enumerate(trace.tokens.tolist()))
    assert counted["tokens_without_row"] == 0


def simple() -> LayoutTokenizer:
    """Return a tokenizer with the ids <s> 0, a 1, b 2, Ġ 3, Ã 4, © 5, ab 6; two rows of filler."""
    return tokens_of(lambda: drawn.byte_pairs([(0, 1)]))


def rows_of(trace: Trace) -> list[dict[int, float]]:
    rows = [dict(zip(*trace.distributions.row(i), strict=True)) for i in range(len(trace.tokens))]
    return [{int(i): round(math.exp(p), 4) for i, p in row.items()} for row in rows]


def entry(probability: float, rank: int | None) -> dict:
    return {"logprob": math.log(probability), "rank": rank, "decoded_token": "?"}


VLLM = [
    None,
    {"6": entry(0.5, 1), "1": entry(0.25, 2)},
    {"1": entry(0.75, 1), "2": entry(0.125, 2), "3": entry(0.1, 3)},
]


def test_vllm_gives_a_row_to_its_own_token_and_none_to_the_first():
    record = {"prompt_token_ids": [0, 6, 3], "prompt_logprobs": VLLM, "prompt": "ab "}
    trace, text, _ = back(record, "vllm", simple())
    assert text == "ab " and trace.tokens.tolist() == [6, 3] and trace.starts.tolist() == [0, 2]
    assert rows_of(trace) == [{6: 0.5, 1: 0.25}, {1: 0.75, 2: 0.125, 3: 0.1}]
    np.testing.assert_allclose(np.exp(trace.distributions.gold), [0.5, 0.1], rtol=1e-6)
    np.testing.assert_allclose(trace.distributions.tail, [0.25, 0.025], atol=1e-6)
    assert trace.nats == pytest.approx(-math.log(0.05))


def test_a_token_that_vllm_adds_beyond_the_top_is_gold_and_no_entry():
    row = {"1": entry(0.75, 1), "2": entry(0.125, 2), "3": entry(0.01, 5)}
    trace, _, _ = back({"prompt_token_ids": [0, 3], "prompt_logprobs": [None, row]}, "vllm", simple())
    assert rows_of(trace) == [{1: 0.75, 2: 0.125}]
    assert math.exp(trace.distributions.gold[0]) == pytest.approx(0.01)


def test_a_servers_answer_is_read_as_well_as_a_record_of_ours():
    answer = {"prompt": "ab ", "choices": [{"text": "!", "prompt_token_ids": [0, 6, 3], "prompt_logprobs": VLLM}]}
    trace, text, _ = back(answer, "vllm", simple())
    assert text == "ab " and len(rows_of(trace)) == 2
    del answer["choices"][0]["prompt_token_ids"]
    assert back(answer, "vllm", simple())[0].tokens.tolist() == [6, 3]


def test_without_a_bos_the_first_token_has_no_row_and_counts_as_a_guess():
    trace, _, counted = back({"prompt_token_ids": [6, 3], "prompt_logprobs": [None, VLLM[2]]}, "vllm", simple())
    d = trace.distributions
    assert d.counts.tolist() == [0, 3] and d.tail[0] == 1 and d.gold[0] == 0
    assert counted["tokens_without_row"] == 1
    assert trace.nats == pytest.approx(math.log(simple().vocabulary.size) - math.log(0.1))


def test_an_openai_echo_is_read_by_the_text():
    logprobs = {
        "tokens": ["<s>", "ab", " "],
        "token_logprobs": [None, math.log(0.5), math.log(0.1)],
        "top_logprobs": [None, {"ab": math.log(0.5), "a": math.log(0.25)}, {"a": math.log(0.75), "\ufffd": -2.0}],
    }
    trace, text, _ = back({"choices": [{"text": "<s>ab ", "logprobs": logprobs}]}, "openai", simple())
    assert text == "ab " and rows_of(trace) == [{6: 0.5, 1: 0.25}, {1: 0.75}], "\ufffd is two tokens' string"
    assert trace.distributions.tail[1] == pytest.approx(0.25)
    logprobs["tokens"][1] = "a"
    with pytest.raises(ValueError, match="token 0 is 'a' to the server and 'ab' to the local tokenizer"):
        back({"choices": [{"text": "<s>ab ", "logprobs": logprobs}]}, "openai", simple())


def test_axolotls_mask_leaves_entries_and_rows_out():
    record = {
        "input_ids": [0, 6, 3],
        "target_token_ids": [[0, 0], [6, 1], [1, 2]],
        "target_logprobs": [[-1e9, -1e9], [math.log(0.5), math.log(0.25)], [math.log(0.75), -1.0]],
        "target_mask": [[0, 0], [0, 0], [1, 0]],
    }
    trace, text, counted = back(record, "axolotl", simple())
    assert text == "ab " and rows_of(trace) == [{}, {1: 0.75}]
    assert counted == {"gold_estimated": 1, "tokens_without_row": 1}


def test_rows_that_are_the_next_tokens_are_moved():
    """Take as many rows as tokens, as logits have, or one less, as DistillKit samples them."""
    values = [[math.log(0.5), math.log(0.25)], [math.log(0.75), math.log(0.125)], [-1.0, -2.0]]
    record = {"input_ids": [0, 6, 3], "token_ids": [[6, 1], [1, 2], [3, 4]], "top_values": values}
    for rows in (3, 2):
        cut = record | {name: record[name][:rows] for name in ("token_ids", "top_values")}
        assert rows_of(back(cut, "distillkit", simple())[0]) == [{6: 0.5, 1: 0.25}, {1: 0.75, 2: 0.125}]
    own = rows_of(back(record, "distillkit", simple(), ahead=False)[0])
    assert own == [{1: 0.75, 2: 0.125}, {3: 0.3679, 4: 0.1353}]


def test_distillkits_compressed_columns_are_read_by_their_configuration():
    compression = distillkit.check_compression({"d": 9, "k": 2, "exact_k": 2, "delta_encoding": False})
    exact = np.log(np.array([[0.5, 0.25], [0.75, 0.125]], np.float32))
    record = {
        "input_ids": [0, 6, 3],
        "compressed_logprobs": exact.view(np.uint8).reshape(2, 8).tolist(),
        "bytepacked_indices": [[0b0110_0001], [0b0001_0010]],
    }
    trace, _, _ = back(record, "distillkit", replace(simple(), compression=compression))
    assert rows_of(trace) == [{6: 0.5, 1: 0.25}, {1: 0.75, 2: 0.125}]
    with pytest.raises(ValueError, match=r"compressed columns; --compression names the compression_config.yaml"):
        back(record, "distillkit", simple())
    with pytest.raises(ValueError, match="legacy columns, which hold logits"):
        back({"input_ids": [0], "packed_indices": []}, "distillkit", simple())


def test_special_tokens_around_the_text_are_left_out():
    record = {"input_ids": [0, 6, 0], "token_ids": [[6], [1]], "top_values": [[-1.0], [-2.0]]}
    trace, text, _ = back(record, "distillkit", simple())
    assert text == "ab" and trace.tokens.tolist() == [6] and rows_of(trace) == [{6: 0.3679}]


def test_tokens_that_the_tokenizer_would_not_make_are_kept_and_counted():
    record = {"input_ids": [0, 1, 2], "token_ids": [[1], [2]], "top_values": [[-1.0], [-1.0]]}
    trace, text, counted = back(record, "distillkit", simple())
    assert text == "ab" and trace.starts.tolist() == [0, 1] and counted["documents_tokenized_otherwise"] == 1
    with pytest.raises(ValueError, match=r"token 0 of 2 is not the tokenizer's \(\[1\] and \[6\]\); --tokenizer names"):
        back(record | {"text": "ab"}, "distillkit", simple())
    with pytest.raises(ValueError, match="token 99 is outside the vocabulary of 9; is it another"):
        back(record | {"input_ids": [0, 99, 2]}, "distillkit", simple())


def test_rows_that_no_softmax_gives_are_refused():
    record = {"input_ids": [0, 6], "token_ids": [[6, 1]], "top_values": [[-0.1, -0.2]]}
    with pytest.raises(
        ValueError, match=r"token 0: probabilities add up to 1.72, more than 1; needs log-probabilities"
    ):
        back(record, "distillkit", simple())
    with pytest.raises(ValueError, match="an id is twice among the entries of one token"):
        back(record | {"token_ids": [[6, 6]], "top_values": [[-9.0, -9.0]]}, "distillkit", simple())


def renormalised() -> ForeignRecord:
    row = [(6, math.log(0.75)), (1, math.log(0.25))]
    return ForeignRecord(text=None, tokens=[0, 6, 3], rows=[None, row, row], gold=[math.nan] * 3)


def test_renormalised_rows_are_scaled_by_what_was_cut_off():
    counted: Counter[str] = Counter()
    trace, _ = derivation.derive_trace(renormalised(), simple(), ahead=False, tail=0.2, counted=counted)
    assert rows_of(trace) == [{6: 0.6, 1: 0.2}] * 2
    np.testing.assert_allclose(trace.distributions.tail, 0.2, rtol=1e-6)
    assert math.exp(trace.distributions.gold[1]) == pytest.approx(0.2 / 7)
    whole, _ = derivation.derive_trace(renormalised(), simple(), ahead=False, tail=0.0, counted=counted)
    assert whole.distributions.gold[1] == -math.inf and not whole.distributions.tail.any()


def test_renormalised_rows_need_a_stated_tail():
    with pytest.raises(ValueError, match=r"100% of the rows sum to 1: .* say what share it was with --tail 0.05"):
        derivation.check_sums([renormalised()], None, 9)
    derivation.check_sums([renormalised()], 0.1, 9)
    full = replace(renormalised(), rows=[None, [(6, -1.0)], [(6, -2.0)]])
    derivation.check_sums([full], None, 9)
    with pytest.raises(
        ValueError, match="--tail: only 0% of the rows sum to 1, so what they leave is their tail; drop"
    ):
        derivation.check_sums([full], 0.1, 9)


def test_rows_one_place_off_are_noticed():
    ids = [0, 6, 3, 1, 3, 6]
    right = ForeignRecord(text=None, tokens=ids, rows=[[(i, -1.0)] for i in ids], gold=[math.nan] * 6)
    derivation.check_places([right], False, simple())
    with pytest.raises(
        ValueError, match="0% of the tokens are among their rows' entries, and 100% with --rows own; add"
    ):
        derivation.check_places([right], True, simple())

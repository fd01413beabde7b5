"""Test forward.py: hidden states and output layer make the model's own logits, whatever the architecture."""

import copy

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from fuselm.models import forward

SIZES = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 29,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 67,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ARCHITECTURES = {
    "llama": transformers.LlamaConfig(**SIZES),
    "llama tied": transformers.LlamaConfig(**SIZES, tie_word_embeddings=True),
    "qwen2": transformers.Qwen2Config(**SIZES),
    "gemma2 soft cap": transformers.Gemma2Config(**SIZES, head_dim=12, final_logit_softcapping=1.5),
    "gemma3": transformers.Gemma3TextConfig(**SIZES, head_dim=12),
    "granite logits scaling": transformers.GraniteConfig(**SIZES, logits_scaling=3.0),
    "cohere logit scale": transformers.CohereConfig(**SIZES, logit_scale=0.125),
    "recurrent gemma soft cap": transformers.RecurrentGemmaConfig(
        **SIZES | {"num_hidden_layers": 3, "intermediate_size": 58}, lru_width=24, logits_soft_cap=1.5
    ),
    "phi bias": transformers.PhiConfig(**SIZES),
    "gpt2": transformers.GPT2Config(
        vocab_size=61, n_embd=24, n_layer=2, n_head=2, n_positions=67, initializer_range=0.3
    ),
    "opt projection": transformers.OPTConfig(
        vocab_size=61,
        hidden_size=24,
        word_embed_proj_dim=18,
        ffn_dim=29,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=67,
        init_std=0.3,
    ),
    "llama4 misnamed base": transformers.Llama4TextConfig(
        **SIZES, head_dim=12, num_local_experts=2, intermediate_size_mlp=29, attention_chunk_size=64
    ),
    "mamba": transformers.MambaConfig(vocab_size=61, hidden_size=24, num_hidden_layers=2, state_size=5),
}
DOCUMENTS = [[5, 3, 7, 11, 2, 13, 17], [19], [23, 29, 31, 37, 41, 43, 47, 53, 59, 3, 5, 7, 11]]
CONTEXT = 1


@pytest.fixture(scope="module", params=list(ARCHITECTURES))
def model(request):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = AutoModelForCausalLM.from_config(ARCHITECTURES[request.param]).eval()
        for parameter in made.parameters():  # biases begin as zeros
            torch.nn.init.normal_(parameter, std=0.3)
    return made


def rows(model, documents: list[list[int]]) -> list[torch.Tensor]:
    """Return the logits of every token of each document, read in one batch."""
    layer = forward.find_output_layer(model)
    inputs, mask = forward.pad_inputs(documents, CONTEXT)
    with torch.inference_mode():
        hidden = forward.compute_hidden_states(model, layer, inputs, mask)
        return [layer.compute_logits(h[: len(ids)]) for h, ids in zip(hidden, documents, strict=True)]


def test_hidden_states_and_output_layer_give_the_models_logits(model):
    for document, logits in zip(DOCUMENTS, rows(model, DOCUMENTS), strict=True):
        with torch.inference_mode():
            expected = model(torch.tensor([[CONTEXT, *document[:-1]]])).logits[0]
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


def test_padding_does_not_change_a_documents_rows(model):
    for document, together in zip(DOCUMENTS, rows(model, DOCUMENTS), strict=True):
        (alone,) = rows(model, [document])
        torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_a_row_does_not_see_its_own_token_or_later_ones(model):
    (logits,) = rows(model, [DOCUMENTS[0]])
    (changed,) = rows(model, [[*DOCUMENTS[0][:3], 59, 53, 47, 43]])
    torch.testing.assert_close(logits[:4], changed[:4], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(logits[4:], changed[4:])


@pytest.mark.parametrize(
    "name",
    [
        "gemma2 soft cap",
        "recurrent gemma soft cap",
        "granite logits scaling",
        "cohere logit scale",
        "phi bias",
        "gpt2",
    ],
)
def test_logits_need_not_be_built_whole(name):
    """Check that known ends of models are understood, rather than left to the model."""
    assert forward.find_output_layer(AutoModelForCausalLM.from_config(ARCHITECTURES[name]).eval()).weight is not None


HEADS = {  # what a model may do with the product of its output layer, by no name that a configuration has
    "cap": lambda x: 30 * torch.tanh(x / 30),
    "small cap": lambda x: 1.5 * torch.tanh(x / 1.5),
    "cap far beyond its own logits": lambda x: 900 * torch.tanh(x / 900),
    "scale": lambda x: x / 7.3,
    "nearly no scale": lambda x: x * 1.001,
    "clipped": lambda x: x.clamp(-50, 50),
    "other cap": lambda x: 30 * x / (30 + x.abs()),
    "neighbours": lambda x: x + x.roll(1, -1),
    "norm": lambda x: x / (x.norm(dim=-1, keepdim=True) + 1e-3),
    "nothing": lambda x: x * torch.nan,
    "mean taken off": lambda x: x - x.mean(-1, keepdim=True),
    "power": lambda x: x.sign() * x.abs() ** 1.01,
}


def headed(finish, dtype: torch.dtype):
    """Return a Llama that does something with the product of its output layer. Its own logits are about 0.1."""
    made = AutoModelForCausalLM.from_config(copy.deepcopy(ARCHITECTURES["llama"]), dtype=dtype).eval()
    made.lm_head.register_forward_hook(lambda module, inputs, output: finish(output))
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", list(HEADS))
def test_other_ends_are_left_to_the_model_however_little_they_change_its_own_logits(name, dtype):
    assert forward.find_output_layer(headed(HEADS[name], dtype)).weight is None


def test_a_norm_before_the_output_layer_is_left_to_the_model():
    made = AutoModelForCausalLM.from_config(ARCHITECTURES["llama"]).eval()
    norm = torch.nn.LayerNorm(24)
    made.lm_head.register_forward_pre_hook(lambda module, inputs: (norm(inputs[0]),))
    assert forward.find_output_layer(made).weight is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_soft_cap_by_another_name_is_the_models(dtype):
    config = transformers.xLSTMConfig(
        vocab_size=61, hidden_size=128, num_heads=2, num_blocks=2, num_hidden_layers=2, output_logit_soft_cap=5.0
    )
    made = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        made.lm_head.weight.normal_(std=9)
    ids = torch.tensor([[CONTEXT, *DOCUMENTS[2][:-1]]])
    with torch.inference_mode():
        expected = made(ids).logits[0].float()
    (logits,) = rows(made, [DOCUMENTS[2]])
    assert expected.abs().max() > 4
    torch.testing.assert_close(logits, expected, rtol=3e-2, atol=3e-2)


def test_a_scale_that_is_a_word_is_no_scale():
    """Ignore such a scale as transformers' MPT does, whose configuration allows it."""
    config = transformers.MptConfig(vocab_size=61, d_model=32, n_heads=2, n_layers=2, logit_scale="inv_sqrt_d_model")
    made = AutoModelForCausalLM.from_config(config).eval()
    (logits,) = rows(made, [DOCUMENTS[2]])
    with torch.inference_mode():
        expected = made(torch.tensor([[CONTEXT, *DOCUMENTS[2][:-1]]])).logits[0]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


def test_a_model_that_mixes_packed_documents_a_little_is_not_packed():
    """Try Bloom, which takes no positions, and whose untrained attention hardly moves the logits."""
    config = transformers.BloomConfig(vocab_size=61, hidden_size=24, n_layer=2, n_head=2)
    assert not forward.keeps_documents_apart(AutoModelForCausalLM.from_config(config).eval())


def test_logits_of_an_end_that_is_not_understood_are_the_models():
    made = AutoModelForCausalLM.from_config(ARCHITECTURES["llama"]).eval()
    made.model.norm.register_forward_hook(lambda module, inputs, output: output)
    made.lm_head.register_forward_hook(lambda module, inputs, output: output + output.roll(1, -1))
    assert forward.find_output_layer(made).weight is None
    with torch.inference_mode():
        expected = made(torch.tensor([[CONTEXT, *DOCUMENTS[0][:-1]]])).logits[0]
    torch.testing.assert_close(rows(made, [DOCUMENTS[0]])[0], expected)


def test_narrow_weights_give_float32_logits():
    made = AutoModelForCausalLM.from_config(ARCHITECTURES["llama"], dtype=torch.bfloat16).eval()
    assert rows(made, DOCUMENTS)[0].dtype == torch.float32


@pytest.mark.parametrize("rows_per_chunk", [1, 5, 100])
def test_logits_by_chunk_are_the_logits(model, rows_per_chunk, monkeypatch):
    layer = forward.find_output_layer(model)
    with torch.inference_mode():
        inputs, mask = forward.pad_inputs(DOCUMENTS, CONTEXT)
        hidden = forward.compute_hidden_states(model, layer, inputs, mask)[mask.bool()]
        expected = layer.compute_logits(hidden)
        monkeypatch.setattr(forward, "LOGITS_PER_CHUNK", rows_per_chunk * 61)
        chunks = [(rows, logits.clone()) for rows, logits in layer.compute_logits_by_chunk(hidden)]
        gold = torch.tensor([i for d in DOCUMENTS for i in d])
        ours = forward.compute_gold_logprobs(hidden, layer, gold)
    assert [i for rows, _ in chunks for i in range(rows.start, rows.stop)] == list(range(len(hidden)))
    torch.testing.assert_close(torch.cat([logits for _, logits in chunks]), expected)
    torch.testing.assert_close(ours, expected.log_softmax(-1).gather(1, gold[:, None])[:, 0])


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 5), st.sampled_from([1, 61, 8191, 8192, 16411]), st.integers(0, 99))
def test_logsumexp_is_torchs(rows, vocab, seed):
    logits = 30 * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))
    logits[:, ::3] = -torch.inf
    torch.testing.assert_close(forward.compute_logsumexp(logits), torch.logsumexp(logits, dim=-1))


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 5), st.sampled_from([7, 2047, 2048, 2111, 8192]), st.integers(1, 7), st.integers(0, 99))
def test_top_k_is_torchs(rows, vocab, k, seed):
    logits = torch.rand(rows, vocab, generator=torch.Generator().manual_seed(seed))
    values, ids = forward.find_top_k(logits, forward.survey_logits(logits).maxima, k)
    expected = torch.topk(logits, k)
    assert torch.equal(values, expected.values) and torch.equal(logits.gather(1, ids), values)


@settings(deadline=None)
@given(st.integers(0, 211), st.sampled_from([1, 61, 1 << 25, 1 << 27]))
def test_chunks_cover_every_row_once_and_stay_within_bounds(count, vocab):
    slices = list(forward.slice_rows(count, vocab))
    assert [i for s in slices for i in range(s.start, s.stop)] == list(range(count))
    assert all((s.stop - s.start) * vocab <= max(forward.LOGITS_PER_CHUNK, vocab) for s in slices)


@settings(deadline=None)
@given(st.lists(st.integers(0, 97), max_size=13), st.sampled_from([1, 89, 10_007]))
def test_batches_hold_every_document_once_and_stay_within_bounds(lengths, batch_tokens):
    batches = forward.group_into_batches(lengths, batch_tokens)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        assert batch and (len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= batch_tokens)
    assert [lengths[i] for batch in batches for i in batch] == sorted(lengths, reverse=True)


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(2, 97), max_size=13), max_size=5))
def test_pad_puts_the_context_token_first_and_leaves_the_last_token_out(documents):
    inputs, mask = forward.pad_inputs(documents, CONTEXT)
    assert inputs.shape == mask.shape == (len(documents), max(map(len, documents), default=0))
    for document, ids, real in zip(documents, inputs.tolist(), mask.tolist(), strict=True):
        assert real == [1] * len(document) + [0] * (len(ids) - len(document))
        assert ids[: len(document)] == [CONTEXT, *document[:-1]][: len(document)]

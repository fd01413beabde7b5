"""drawing.py on tiny models: continuations are those of `generate`, whatever ends before, and draws are right."""

import numpy as np
import pytest
import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GenerationConfig,
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)

from fuselm.sources import drawing

SIZES = {"hidden_size": 16, "vocab_size": 23, "num_hidden_layers": 2}
ATTENTION = SIZES | {"intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**ATTENTION)),
    "sliding": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**ATTENTION, head_dim=8, sliding_window=5)),
    "convolution": lambda: Lfm2ForCausalLM(
        Lfm2Config(**ATTENTION, layer_types=["conv", "full_attention"], block_multiple_of=8)
    ),
    "mamba": lambda: MambaForCausalLM(MambaConfig(**SIZES, state_size=4)),
}
PROMPTS = [[3, 1, 4], [1, 5, 9, 2, 6, 5, 3, 5, 8], [7, 9]]
ENDS = [2, 11]
LENGTH = 19


@pytest.fixture(params=MODELS)
def model(request):
    torch.manual_seed(0)
    model = MODELS[request.param]().eval()
    for weight in model.parameters():
        weight.data *= 3  # an untrained model repeats one token otherwise
    model.generation_config = GenerationConfig(
        do_sample=True, top_k=1, max_new_tokens=LENGTH, eos_token_id=ENDS, pad_token_id=0
    )
    return model


def cut(row) -> list[int]:
    """Return the ids up to the first that ends."""
    ends = np.flatnonzero(np.isin(row, ENDS))
    return list(map(int, row[: ends[0] + 1] if len(ends) else row))


def test_continuations_are_those_of_each_prompt_alone(model):
    prompts = PROMPTS[:1] if isinstance(model, MambaForCausalLM) else PROMPTS  # Mamba reads padding as text
    drawn = drawing.draw_continuations(model, prompts, each=3, padding=0).numpy()
    assert drawn.shape == (3 * len(prompts), LENGTH)
    for n, prompt in enumerate(prompts):
        ids = torch.tensor([prompt])
        alone = model.generate(ids, attention_mask=torch.ones_like(ids))[0, len(prompt) :].numpy()
        assert [cut(row) for row in drawn[3 * n : 3 * n + 3]] == [cut(alone)] * 3


def test_ended_rows_are_not_computed_again(monkeypatch):
    torch.manual_seed(0)
    model = MODELS["llama"]().eval()
    model.generation_config = GenerationConfig(
        do_sample=True, top_k=0, max_new_tokens=LENGTH, eos_token_id=list(range(5)), pad_token_id=0
    )
    generate, sizes = model.generate, []
    monkeypatch.setattr(model, "generate", lambda rows, **asked: sizes.append(len(rows)) or generate(rows, **asked))
    monkeypatch.setattr(drawing, "CHUNK", 2)
    drawn = drawing.draw_continuations(model, PROMPTS, each=40, padding=0).numpy()
    assert sizes[:2] == [3, 120] and sizes[2] < 100 and len(sizes) > 4
    lengths = [len(row) if not (row < 5).any() else int((row < 5).argmax()) + 1 for row in drawn]
    assert all((row[n:] == 0).all() for row, n in zip(drawn, lengths, strict=True))


def test_answers_come_as_often_as_the_model_says():
    torch.manual_seed(0)
    model = MODELS["llama"]().eval()
    model.generation_config = GenerationConfig(
        do_sample=True, top_k=0, max_new_tokens=1, eos_token_id=ENDS, pad_token_id=0
    )
    model.lm_head.weight.data *= 40
    drawn = drawing.draw_continuations(model, PROMPTS, each=2000, padding=0).numpy().reshape(3, 2000)
    for prompt, ids in zip(PROMPTS, drawn, strict=True):
        with torch.no_grad():
            expected = model(torch.tensor([prompt])).logits[0, -1].softmax(-1).numpy()
        shares = np.bincount(ids, minlength=23) / 2000
        assert abs(shares - expected).max() < 5 * 0.5 / np.sqrt(2000)

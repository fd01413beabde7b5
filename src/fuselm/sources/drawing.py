"""Draw what comes next after several prompts, several times each, without work on rows that have ended.

`generate` of transformers reads a prompt once for each of its continuations, and computes tokens for all rows until the
last one has ended. Here a prompt is read once, and rows that have ended leave the batch.
"""

import inspect
from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

CHUNK = 8  # tokens between two looks at which rows have ended


def draw_continuations(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], *, each: int, padding: int
) -> Int[Tensor, "rows tokens"]:
    """Return `each` continuations of every prompt, those of a prompt one after another, with padding behind their ends.

    The model's generation settings say how to draw, how many tokens at most, and which tokens end a row. A model whose
    forward takes no `past_key_values` draws all tokens of all rows.
    """
    settings, device, longest = model.generation_config, model.device, max(map(len, prompts))
    rows = torch.tensor([[padding] * (longest - len(ids)) + list(ids) for ids in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts], device=device)
    copies = torch.arange(len(prompts), device=device).repeat_interleave(each)
    has_cache = "past_key_values" in inspect.signature(type(model).forward).parameters
    kept = {}
    if has_cache and each > 1 and min(map(len, prompts)) > 1:
        beginnings = {"attention_mask": mask[:, :-1], "max_new_tokens": 1, "return_dict_in_generate": True}
        kept = _take_rows(model.generate(rows[:, :-1], **beginnings), copies)
    rows, mask = rows[copies], mask[copies]
    ends = torch.tensor(settings.eos_token_id, device=device)
    drawn = torch.full((len(rows), settings.max_new_tokens), padding, device=device)
    waiting, count = torch.arange(len(rows), device=device), 0
    while count < settings.max_new_tokens and len(waiting):
        size = min(CHUNK, settings.max_new_tokens - count) if has_cache else settings.max_new_tokens
        asked = {"attention_mask": mask, "max_new_tokens": size, "return_dict_in_generate": True}
        output = model.generate(rows, **asked, **kept)
        new = output.sequences[:, rows.shape[1] :]
        drawn[waiting, count : count + new.shape[1]] = new
        count += new.shape[1]
        unfinished = (~torch.isin(new, ends).any(dim=1)).nonzero()[:, 0]
        waiting, rows = waiting[unfinished], output.sequences[unfinished]
        mask = torch.cat([mask, torch.ones_like(new)], dim=1)[unfinished]
        kept = _take_rows(output, unfinished) if has_cache and len(waiting) else {}
    return drawn


def _take_rows(output, rows: Int[Tensor, "rows"]) -> dict:
    """Return the cache of these rows, as the argument with which `generate` continues them."""
    output.past_key_values.reorder_cache(rows)
    return {"past_key_values": output.past_key_values}

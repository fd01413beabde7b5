"""Build a tiny random model of any causal architecture that transformers knows, from its default configuration.

Sizes are recognised by their names, which transformers uses alike in nearly all configurations; each is shrunk to what
`SIZES` says, never enlarged. Lists with an item for each layer are cut so that every kind of layer stays. `OVERRIDES`
holds the few values that an architecture needs besides. The weights get noise, so that distributions are far from
uniform and a fault in attention, padding or a router shows.
"""

import dataclasses
import re
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers import models as kinds
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

ROWS = 448  # of the output layer: more than the tokenizer has tokens, with room for tokens of images and the like
TOKENS = 384
NOISE = 0.15
SIZES = [  # the first pattern that a field's whole name matches; a smaller default stays
    (r".*vocab_size(_per_layer_input|_base)?|encoder_hash_byte_group_vocab", ROWS),
    (r"hidden_size_per_layer_input|ple_embed_dim|hc_lowrank", 16),
    (r"(backbone_|router_)?hidden_size|d_model|n_embd|emb_dim|embedding_dim|word_embed_proj_dim|lru_width", 32),
    (r"embedding_size|(in|out)put_embedding_size|(pronunciation|shape)_embed_dim|attention_hidden_size", 32),
    (r".*intermediate_size(_mlp)?|.*ffn_dim|.*ffn_hidden_size|dff|dim_ff|d_inner|feed_forward_size", 64),
    (r"(num_|n_|decoder_|encoder_)*(hidden_)?layers?(_per_stack)?|num_blocks|max_window_layers", 2),
    (r"(num_|swa_num_)(key_value|kv)_heads", 2),
    (r"index_n_heads|indexer_n_heads", 16),  # fewer leave exact ties among what a sparse attention chooses from
    (r"mamba_n_heads|mamba_num_heads|n_mamba_heads", 8),  # times the size of a head: twice the hidden size
    (r"(swa_|decoder_|encoder_|num_|n_|linear_|mamba_|encoder_|decoder_)*(attention_)?(query_|key_|value_)?heads?", 4),
    (r"qk_head_dim", 16),  # rotated and others
    (r".*head_dim|rotary_dim|kv_channels|dim_head|d_head|attention_head_size|mamba_(d_head|headdim)", 8),
    (r"max_position_embeddings|n_positions|n_ctx|max_seq_len|max_target_positions|context_length", 256),
    (r"model_max_length|original_max_position_embeddings|rel_extent|axial_pos_shape", 256),
    (r"(moe_)?(num|n)_(routed_|local_)?experts|zero_expert_num|moe_num_experts", 4),
    (r"num_experts_per_tok(en)?|moe_topk|moe_k|index_topk_blocks", 2),
    (r"n_group|num_expert_group|topk_group|n_groups", 1),
    (r".*lora_rank|.*_rank|o_groups", 4),
    (r"(mamba_)?d_state|(ssm_)?state_size|d_rel|mamba_dt_rank|mamba_d_ssm", 8),
    (r".*window(_size|_len)?|.*chunk_size|block_size|local_attention|index_block_size", 16),
    (r"index_topk", 8),
]
TOKEN_IDS = re.compile(r".*token_(id|index)")


def names() -> list[str]:
    """Return every model type that `AutoModelForCausalLM` accepts, and our variants of some, sorted."""
    return sorted([*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *VARIANTS])


def tiny_config(name: str) -> PreTrainedConfig:
    """Return the default configuration of a model type or variant, shrunk."""
    model_type = name.split(" ")[0]
    return _shrunk(CONFIG_MAPPING[model_type], OVERRIDES.get(model_type, {}) | VARIANTS.get(name, {}))


def _shrunk(cls: type[PreTrainedConfig], overrides: dict) -> PreTrainedConfig:
    default = cls()
    changes = _small_values(default)
    for name in getattr(cls, "sub_configs", {}):
        if isinstance(getattr(default, name, None), PreTrainedConfig):
            changes[name] = _shrunk(type(getattr(default, name)), overrides.get(name, {}))
    return cls(**changes | {k: v for k, v in overrides.items() if k not in getattr(cls, "sub_configs", {})})


def _small_values(default: PreTrainedConfig) -> dict:
    fields = {f.name for f in dataclasses.fields(default)}  # what follows from them is not set
    fields |= {default.attribute_map.get(name, name) for name in fields}
    values = {k: v for k, v in default.to_dict().items() if k in fields and k not in ("id2label", "label2id")}
    changes: dict = {}
    special = 0
    for name, value in values.items():
        if TOKEN_IDS.fullmatch(name) and isinstance(value, int | list):
            changes[name] = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}.get(name, TOKENS + special)
            special += 1
        elif isinstance(value, int) and not isinstance(value, bool) and (size := _size(name)) and value > size:
            changes[name] = size
    if values.get("num_key_value_heads") and values["num_key_value_heads"] == values.get("num_attention_heads"):
        changes["num_key_value_heads"] = changes["num_attention_heads"]
    return changes | _cut_layers(values)


def _size(name: str) -> int | None:
    return next((size for pattern, size in SIZES if re.fullmatch(pattern, name)), None)


def _cut_layers(values: dict) -> dict:
    """Keep the first layer of every kind, and at least two layers, in all lists that have an item for each layer."""
    layers = values.get("num_hidden_layers", 0)
    lists = {k: v for k, v in values.items() if isinstance(v, list) and len(v) == layers > 0}
    if not lists:
        return {}
    first: dict = {}
    for n, kind in enumerate(zip(*lists.values(), strict=True)):
        first.setdefault(repr(kind), n)
    kept = sorted(first.values())
    kept = sorted({*kept, *range(2 if len(kept) < 2 else 0)})[:6]
    cut = {k: [v[n] for n in kept] for k, v in lists.items()}
    sizes = {k: [min(size, n) for n in v] for k, v in cut.items() if (size := _size(k)) and isinstance(v[0], int)}
    return cut | sizes | {"num_hidden_layers": len(kept)}


QWEN4_INDEXER = {
    "indexer_n_heads": 16,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
}
OVERRIDES: dict[str, dict] = {
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "dbrx": {"attn_config": {"rope_theta": 1e4, "clip_qkv": 8.0}},  # the class asks for it, the default has none
    "deepseek_v2": {"num_experts_per_tok": 2, "n_routed_experts": 4},
    "doge": {"keep_window_size": 2048},  # beyond it a repeated token ties, and ties are broken by the batch's length
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "n_shared_experts": 1},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "blt": {
        "vocab_size": ROWS,
        "encoder_config": {"hidden_size_global": 32, "vocab_size": ROWS},
        "decoder_config": {"hidden_size_global": 32, "vocab_size": ROWS},
        "patcher_config": {"vocab_size": ROWS},
    },
    "dots3_note": {
        "text_config": {"per_layer_config": {}, "head_dim": 16},
        "vision_config": {"adapter_in_dim": 32, "adapter_out_dim": 32},
        "audio_config": {"adapter_input_size": 32, "adapter_out_dim": 32},
    },
    "dots3_note_text": {"per_layer_config": {}, "head_dim": 16},  # of more heads in layers with a window
    "gemma4_text": {"global_head_dim": 16},
    "gemma4_unified_text": {"global_head_dim": 16},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"], "num_hidden_layers": 3},
    "mamba2": {"num_heads": 8},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp_text": QWEN4_INDEXER,
    "qwen4_exp": {"text_config": QWEN4_INDEXER},
    "reformer": {"vocab_size": ROWS, "is_decoder": True, "axial_pos_embds_dim": [8, 24], "axial_pos_shape": [16, 16]},
    "rwkv": {"num_hidden_layers": 5, "rescale_every": 2},
    "xlm": {"pad_index": ROWS - 1},  # which it takes for the end of a text
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
        "num_hidden_layers": 4,
    },
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"]},
}


NOT_BUILT = {
    "gemma3n": "needs timm, which is not a dependency",
    "gemma4_assistant": "its default configuration is refused by transformers itself",
    "gemma4_unified_assistant": "reads another model's keys and values",
    "musicgen": "`from_config` takes the configuration of the whole, the class that of its decoder",
    "musicgen_melody": "`from_config` takes the configuration of the whole, the class that of its decoder",
}
DECODERS = [  # encoders by default, causal if told to be
    *("bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert"),
    *("rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta", "xlm-roberta-xl", "xmod"),
]
VARIANTS: dict[str, dict] = {f"{name} (is_decoder)": {"is_decoder": True} for name in DECODERS} | {
    "cohere (logit_scale 0.25)": {"logit_scale": 0.25},
    "falcon (alibi)": {"alibi": True},
    "gemma2 (cap 1.5)": {"final_logit_softcapping": 1.5},
    "gpt2 (tied off, scaled by layer)": {"tie_word_embeddings": False, "scale_attn_by_inverse_layer_idx": True},
    "granite (logits_scaling 3)": {"logits_scaling": 3.0},
    "llama (tied)": {"tie_word_embeddings": True},
    "mpt (logit_scale inv_sqrt_d_model)": {"logit_scale": "inv_sqrt_d_model"},
    "opt (projection)": {"word_embed_proj_dim": 24},
    "recurrent_gemma (cap 1.5)": {"logits_soft_cap": 1.5},
    "xlm (causal)": {"causal": True},
    "xlstm (cap 1.5)": {"output_logit_soft_cap": 1.5},
}


def tiny_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Return byte-level BPE with `TOKENS` tokens, trained on `texts`."""
    tokenizer = Tokenizer(kinds.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")


def tiny_model(config: PreTrainedConfig) -> PreTrainedModel:
    """Return a random model of a configuration, the same each time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(NOISE * torch.randn_like(parameter))
    return model


def save(name: str, tokenizer: PreTrainedTokenizerFast, folder: Path) -> PreTrainedModel:
    """Write a tiny model and the tokenizer to `folder`; return the model."""
    model = tiny_model(tiny_config(name))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model

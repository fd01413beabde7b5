"""Train small matrices beside the target's weights (LoRA, QLoRA) by peft, and merge them into it at the end."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from fuselm.models.loading import load_model
from fuselm.models.locating import Model
from fuselm.system.library_output import hide_library_output


def check_adapters(target: Model, *, rank: int, modules: Sequence[str] | None, quantize: str | None) -> None:
    """Raise `ValueError` if the target cannot have such adapters. No weights are read."""
    if quantize is not None:
        _check_quantizer()
    config = AutoConfig.from_pretrained(target.folder, local_files_only=True, trust_remote_code=False)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    add_adapters(model, rank=rank, alpha=1.0, dropout=0.0, modules=modules)


def add_adapters(
    model: PreTrainedModel,
    *,
    rank: int,
    alpha: float,
    dropout: float,
    modules: Sequence[str] | None,
) -> torch.nn.Module:
    """Add adapters beside `modules`, by default all linear layers except the output layer."""
    try:
        import peft
    except ImportError:
        raise ValueError("train.lora_rank: peft is not installed; pip install 'fuselm[lora]'") from None
    if getattr(model, "is_loaded_in_4bit", False):
        model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    targets = list(modules) if modules is not None else "all-linear"
    config = peft.LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets, task_type="CAUSAL_LM"
    )
    try:
        adapted = peft.get_peft_model(model, config)
    except ValueError as error:
        raise ValueError(f"train.lora_modules: {error}; name linear layers of the target") from error
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    has_adapter = [isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer) for module in (head, embeddings)]
    if has_adapter[0] or (has_adapter[1] and head is not None and head.weight is embeddings.weight):
        raise ValueError(
            "train.lora_modules: they name the output layer, or embeddings that share its weights, and the loss reads "
            "those without adapters; leave them out"
        )
    return adapted


def load_in_4_bits(target: Model, *, precision: str) -> PreTrainedModel:
    """Load the target with its linear layers in NF4 (Dettmers et al. 2023, QLoRA), to train adapters beside them."""
    _check_quantizer()
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if precision == "bf16" else torch.float32,
    )
    with hide_library_output():
        model = AutoModelForCausalLM.from_pretrained(
            target.folder, quantization_config=config, local_files_only=True, trust_remote_code=False
        )
    for module in model.modules():
        # Once evaluated, such a module would otherwise change to weights that have no gradient.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def _check_quantizer() -> None:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError("train.quantize: bitsandbytes is not installed; pip install 'fuselm[qlora]'")


def merge_adapters(target: Model, folder: Path) -> PreTrainedModel:
    """Load the target in float32, unquantized, and add the adapters in `folder` to its weights."""
    import peft

    base = load_model(target, dtype="float32", device="cpu")
    return peft.PeftModel.from_pretrained(base, str(folder)).merge_and_unload()

"""A causal language model whose forward gives the objective instead of logits.

What wraps a model's forward (autocast, DDP, FSDP, adapters, gradient checkpointing) so wraps the loss as well, and the
output layer's weight is read where FSDP has put it together. The model keeps its class, and is saved as ever.
"""

from dataclasses import replace
from types import MethodType

from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from fuselm.forward import OutputLayer, gold_logprobs
from fuselm.objective import Divergence, FusedRows, fusion_loss


def give_loss(model: PreTrainedModel, layer: OutputLayer, divergence: Divergence) -> None:
    """From now on `model(**batch)` gives `loss`, `clm_loss` and `fusion_loss`; in eval mode, `gold_logprobs`.

    `layer` is the model's `forward.output_layer`. A batch has inputs and `labels` of one shape (-100: none), and may
    have `fused_ids`, `fused_logprobs` and `fused_tail`, a row for each label.
    """
    logits = model.forward

    def forward(
        self: PreTrainedModel,
        input_ids: Int[Tensor, "batch length"],
        labels: Int[Tensor, "batch length"],
        attention_mask: Int[Tensor, "batch length"] | None = None,
        position_ids: Int[Tensor, "batch length"] | None = None,
        fused_ids: Int[Tensor, "tokens k"] | None = None,
        fused_logprobs: Float[Tensor, "tokens k"] | None = None,
        fused_tail: Float[Tensor, "tokens"] | None = None,
        lambda_clm: float | Float[Tensor, "tokens"] = 1.0,
        count: float | Tensor = 1.0,
        **_: object,  # what adapters' wrappers pass on
    ) -> dict[str, Tensor]:
        known = labels != -100
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        if layer.weight is None:
            own, hidden = layer, logits(**inputs, use_cache=False).logits[known]
        else:
            head = self.get_output_embeddings()
            own = replace(layer, weight=head.weight, bias=head.bias)
            hidden = self.base_model(**inputs, use_cache=False).last_hidden_state[known]
        if not self.training:
            return {"gold_logprobs": gold_logprobs(hidden, own, labels[known])}
        fused = None
        if fused_ids is not None and fused_logprobs is not None and fused_tail is not None:
            fused = FusedRows(ids=fused_ids, logprobs=fused_logprobs, tail=fused_tail)
        loss = fusion_loss(hidden, own, labels[known], fused, lambda_clm, divergence, count=count)
        return {"loss": loss.total, "clm_loss": loss.clm, "fusion_loss": loss.fusion}

    model.forward = MethodType(forward, model)

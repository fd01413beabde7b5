"""A causal language model whose forward goes on to the objective instead of logits.

What wraps a model's forward (autocast, DDP, FSDP, adapters, gradient checkpointing) so wraps the loss as well, and the
output layer's weight is read where FSDP has put it together. The model keeps its class, and is saved as ever.
"""

from collections.abc import Callable
from dataclasses import replace
from types import MethodType

from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from fuselm.models.forward import OutputLayer, decoder
from fuselm.system.errors import name_model

Then = Callable[[Float[Tensor, "tokens hidden"], OutputLayer], dict[str, Tensor]]


def go_on(model: PreTrainedModel, layer: OutputLayer) -> None:
    """From now on `model(..., known=mask, then=f)` gives f(hidden states where `known`, output layer).

    `layer` is the model's `forward.output_layer`. f is a function, and what it needs is not an argument, because FSDP
    would round floating-point arguments to the type that it computes in.
    """
    logits = model.forward

    def forward(
        self: PreTrainedModel,
        input_ids: Int[Tensor, "batch length"],
        known: Bool[Tensor, "batch length"],
        then: Then,
        attention_mask: Int[Tensor, "batch length"] | None = None,
        position_ids: Int[Tensor, "batch length"] | None = None,
        **_: object,  # what adapters' wrappers add
    ) -> dict[str, Tensor]:
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        with name_model(self.name_or_path, "reading a batch"):
            if layer.weight is None:
                hidden = logits(**inputs, use_cache=False).logits[known]
            else:
                hidden = decoder(self)(**inputs, use_cache=False).last_hidden_state[known]
        if layer.weight is None:
            return then(hidden, layer)
        head = self.get_output_embeddings()
        return then(hidden, replace(layer, weight=head.weight, bias=head.bias))

    model.forward = MethodType(forward, model)

"""Make a causal language model's forward compute the loss instead of logits.

Whatever wraps a model's forward (autocast, DDP, FSDP, adapters, checkpointing) then wraps the loss as well, and
FSDP has gathered the output layer's weight when it is read. The model keeps its class, and is saved as before.
"""

from collections.abc import Callable
from dataclasses import replace
from types import MethodType

from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from fuselm.models.forward import OutputLayer, find_decoder
from fuselm.system.errors import name_model_errors

LossFunction = Callable[[Float[Tensor, "tokens hidden"], OutputLayer], dict[str, Tensor]]


def compute_loss_in_forward(model: PreTrainedModel, layer: OutputLayer) -> None:
    """Change the model's forward in place to `model(..., token_mask=mask, loss_fn=f)`.

    It returns f(hidden states where `token_mask` is true, output layer). `layer` is what `forward.find_output_layer`
    returns for the model. f closes over whatever else it needs, because FSDP would round floating-point arguments to
    the type in which it computes.
    """
    logits = model.forward

    def forward(
        self: PreTrainedModel,
        input_ids: Int[Tensor, "batch length"],
        token_mask: Bool[Tensor, "batch length"],
        loss_fn: LossFunction,
        attention_mask: Int[Tensor, "batch length"] | None = None,
        position_ids: Int[Tensor, "batch length"] | None = None,
        **_: object,  # wrappers of adapters add arguments
    ) -> dict[str, Tensor]:
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        with name_model_errors(self.name_or_path, "reading a batch"):
            if layer.weight is None:
                hidden = logits(**inputs, use_cache=False).logits[token_mask]
            else:
                hidden = find_decoder(self)(**inputs, use_cache=False).last_hidden_state[token_mask]
        if layer.weight is None:
            return loss_fn(hidden, layer)
        head = self.get_output_embeddings()
        return loss_fn(hidden, replace(layer, weight=head.weight, bias=head.bias))

    model.forward = MethodType(forward, model)

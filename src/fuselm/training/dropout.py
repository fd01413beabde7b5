"""Drop a share of what each layer of a model adds to its input, while it is trained (Srivastava et al. 2014).

Language models of today are made without dropout, and most of their classes have no option for it.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel


def drop_what_layers_add(model: PreTrainedModel, share: float) -> None:
    """Change the model in place. Raises `ValueError` if its layers cannot be told."""
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    lists = [of for of in model.modules() if isinstance(of, torch.nn.ModuleList) and len(of) == count]
    if not lists:
        raise ValueError(f"train.dropout: {model.name_or_path}: its layers cannot be told; leave dropout at 0")

    def drop(layer: torch.nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        if not layer.training:
            return output
        given: Tensor = args[0] if args else kwargs["hidden_states"]
        made: Tensor = output[0] if isinstance(output, tuple) else output
        dropped = given + torch.nn.functional.dropout(made - given, share)
        return (dropped, *output[1:]) if isinstance(output, tuple) else dropped

    for layer in lists[0]:  # the outermost
        layer.register_forward_hook(drop, with_kwargs=True)

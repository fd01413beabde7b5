"""Run a causal language model over whole documents: batches in, hidden states out, and logits by chunks of rows.

Row i of a document is predicted from the context token and tokens 0 to i-1, so that every token is predicted. Logits
are made for a chunk of rows at a time, never for a whole batch.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from fuselm.models import scan
from fuselm.models.scan import BLOCK, Survey
from fuselm.models.segmentation import Segmentation
from fuselm.system.errors import name_model_errors

LOGITS_PER_CHUNK = 1 << 25  # they take 128 MiB in float32
MAGNITUDES = (1e-3, 1.0, 10.0, 30.0, 100.0, 1e3, 1e4)  # an output layer is tried on logits of these sizes
TRIED_ROWS = 61
TILE = 8192  # temporary copies of so many columns stay in the cache


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputLayer:
    """Hold how a model makes logits: soft_cap * tanh(scale * (hidden @ weight.T + bias) / soft_cap).

    Parts that are None are left out. `weight` is None where a model's logits are no such function of its last hidden
    states; then `hidden` stands for the logits.
    """

    weight: Float[Tensor, "vocab hidden"] | None
    bias: Float[Tensor, "vocab"] | None
    scale: float
    soft_cap: float | None

    def compute_logits(self, hidden: Float[Tensor, "rows hidden"]) -> Float[Tensor, "rows vocab"]:
        """Return logits in float32, from a matrix product in the weights' precision."""
        if self.weight is None:
            return hidden.float()
        return self._scale_and_cap(
            torch.nn.functional.linear(hidden.to(self.weight.dtype), self.weight, self.bias).float()
        )

    def compute_logits_by_chunk(
        self, hidden: Float[Tensor, "rows hidden"]
    ) -> Iterator[tuple[slice, Float[Tensor, "chunk vocab"]]]:
        """Yield the logits of some rows at a time, each chunk in the memory of the one before it.

        Fresh memory of this size would cost as much as the product. Logits have the product's type if `scan` can read
        it, and float32 otherwise. Autograd does not work through this.
        """
        if self.weight is None:
            yield from ((rows, hidden[rows].float()) for rows in slice_rows(len(hidden), hidden.shape[-1]))
            return
        weight = self.weight.to(find_product_dtype(self.weight))
        hidden = hidden.to(weight.dtype)
        as_it_is = self.scale == 1.0 and self.soft_cap is None
        product = memory = None
        for rows in slice_rows(len(hidden), len(self.weight)):
            count = rows.stop - rows.start
            if product is None:
                product = hidden.new_empty(count, len(self.weight))
                memory = product if as_it_is and scan.can_read(product) else product.float()
            torch.mm(hidden[rows], weight.T, out=product[:count])
            if self.bias is not None:
                product[:count] += self.bias
            logits = memory[:count] if memory is product else memory[:count].copy_(product[:count])
            yield rows, self._scale_and_cap(logits)

    def _scale_and_cap(self, logits: Float[Tensor, "rows vocab"]) -> Float[Tensor, "rows vocab"]:
        if self.scale != 1.0:
            logits *= self.scale
        if self.soft_cap is not None:
            logits.div_(self.soft_cap).tanh_().mul_(self.soft_cap)
        return logits


def find_product_dtype(factor: Tensor) -> torch.dtype:
    """Return the type of a matrix product with `factor`: its own type, or that of autocast."""
    device = factor.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else factor.dtype


def find_output_layer(model: PreTrainedModel) -> OutputLayer:
    """Return how `model` makes logits of the hidden states that `compute_hidden_states` returns.

    The scale and the cap of its configuration are tried in float32 on logits from 0.001 to 10,000, however small the
    model's own logits are and however coarse its precision. A model that does anything else computes its own logits.
    """
    config, head = model.config.get_text_config(), model.get_output_embeddings()
    through_logits = OutputLayer(weight=None, bias=None, scale=1.0, soft_cap=None)
    if not isinstance(head, torch.nn.Linear) or find_decoder(model) is model:
        return through_logits
    layer = OutputLayer(
        weight=head.weight,
        bias=head.bias,
        scale=(_read_number(config, "logit_scale") or 1.0) / (_read_number(config, "logits_scaling") or 1.0),
        soft_cap=_read_number(config, "final_logit_softcapping") or _read_number(config, "logits_soft_cap"),
    )
    with torch.inference_mode():
        probe = torch.arange(2, device=model.device)[None]
        expected = model(input_ids=probe, use_cache=False).logits[0].float()
        hidden = find_decoder(model)(input_ids=probe, use_cache=False).last_hidden_state[0]
        same = hidden.shape[-1] == head.in_features and are_close(layer.compute_logits(hidden), expected, model)
    return layer if same and _is_exact(layer, model, head) else through_logits


def _is_exact(layer: OutputLayer, model: PreTrainedModel, head: torch.nn.Linear) -> bool:
    """Tell whether the model makes the same logits as `layer` of any hidden states.

    The model runs with random hidden states in place of its own, and a small float32 matrix as its output layer.
    """
    generator = torch.Generator().manual_seed(0)
    sizes = torch.tensor(MAGNITUDES)[:, None] / abs(layer.scale)
    hidden = torch.randn(len(sizes), head.in_features, generator=generator) * sizes
    weight = torch.randn(TRIED_ROWS, head.in_features, generator=generator) / head.in_features**0.5
    bias = None if head.bias is None else torch.randn(TRIED_ROWS, generator=generator)
    expected = replace(layer, weight=weight, bias=bias).compute_logits(hidden)
    try:
        logits = _compute_logits_of(model, head, hidden, weight, bias).float().cpu()
    except Exception:  # a model's own code may raise anything on a smaller matrix; then the model computes its logits
        return False
    if logits.shape != expected.shape:
        return False
    largest = expected.abs().amax(dim=1, keepdim=True)
    return bool(((logits - expected).abs() <= 1e-5 * (expected.abs() + largest)).all())


def _compute_logits_of(
    model: PreTrainedModel,
    head: torch.nn.Linear,
    hidden: Float[Tensor, "rows hidden"],
    weight: Float[Tensor, "vocab hidden"],
    bias: Float[Tensor, "vocab"] | None,
) -> Float[Tensor, "rows vocab"]:
    """Return the model's logits of `hidden`, with another matrix in its output layer."""
    inside = hidden.to(model.device)[None]

    def replace_hidden_states(module: torch.nn.Module, arguments: tuple, output):
        """Replace last hidden states, which some models take from a part of what `find_decoder` names."""
        if isinstance(output, ModelOutput) and getattr(output, "last_hidden_state", None) is not None:
            output.last_hidden_state = inside
        elif isinstance(output, tuple) and module is find_decoder(model):
            output = (inside, *output[1:])
        return output

    name = next(name for name, module in model.named_modules() if module is head)
    changed = {f"{name}.weight": weight.to(model.device)}
    if bias is not None:
        changed[f"{name}.bias"] = bias.to(model.device)
    arguments = {"input_ids": torch.arange(len(hidden), device=model.device)[None], "use_cache": False}
    hooks = [module.register_forward_hook(replace_hidden_states) for module in model.modules() if module is not model]
    try:
        with torch.inference_mode():
            return torch.func.functional_call(model, changed, kwargs=arguments, tie_weights=False).logits[0]
    finally:
        for hook in hooks:
            hook.remove()


def _read_number(config: PretrainedConfig, name: str) -> float | None:
    """Return a setting of the configuration if it is a number other than zero."""
    value = getattr(config, name, None)
    return float(value) if isinstance(value, int | float) and value else None


def find_decoder(model: PreTrainedModel) -> torch.nn.Module:
    """Return the part that makes the hidden states; the model itself if it has no such part."""
    base = model.base_model  # this is the model itself, too, if its class names the part wrongly
    return getattr(model, "model", model) if base is model else base


def keeps_documents_apart(model: PreTrainedModel) -> bool:
    """Try whether positions that begin again at 0 within a row begin another document, with three documents."""
    vocab = model.get_input_embeddings().weight.shape[0]
    lengths = (2, 5, 4)
    ids = (torch.arange(sum(lengths), device=model.device) * 7 % vocab)[None]
    positions = torch.cat([torch.arange(n, device=model.device) for n in lengths])[None]
    with torch.inference_mode():
        try:
            packed = model(input_ids=ids, position_ids=positions, use_cache=False).logits[0].float()
        except TypeError:  # the model takes no positions
            return False
        documents = ids.split(lengths, dim=1)
        alone = torch.cat([model(input_ids=own, use_cache=False).logits[0].float() for own in documents])
    return are_close(packed, alone, model)


def are_close(values: Tensor, expected: Tensor, model: PreTrainedModel) -> bool:
    """Tell whether values are equal up to the model's rounding; a small difference may be large on other tokens."""
    rounds = model.dtype in (torch.bfloat16, torch.float16) or getattr(model, "is_loaded_in_4bit", False)
    tolerance = 2e-2 if rounds else 1e-3
    return bool(((values - expected).abs() <= tolerance * (expected.abs() + expected.abs().max())).all())


def compute_hidden_states(
    model: PreTrainedModel,
    layer: OutputLayer,
    inputs: Int[Tensor, "batch length"],
    mask: Int[Tensor, "batch length"],
) -> Float[Tensor, "batch length hidden"]:
    """Return the last hidden states, or the logits if `layer` has no weight."""
    with name_model_errors(model.name_or_path, "reading a batch"):
        if layer.weight is None:
            return model(input_ids=inputs, attention_mask=mask, use_cache=False).logits
        return find_decoder(model)(input_ids=inputs, attention_mask=mask, use_cache=False).last_hidden_state


def slice_rows(rows: int, vocab: int, most: int | None = None) -> Iterator[slice]:
    """Yield slices of `rows` with at most `most` logits each, by default `LOGITS_PER_CHUNK`."""
    size = max((most or LOGITS_PER_CHUNK) // vocab, 1)
    for begin in range(0, rows, size):
        yield slice(begin, min(begin + size, rows))


def compute_gold_logprobs(
    hidden: Float[Tensor, "rows hidden"], layer: OutputLayer, gold: Int[Tensor, "rows"]
) -> Float[Tensor, "rows"]:
    """Return the log-probability (natural) of each row's gold id."""
    result = hidden.new_empty(len(hidden), dtype=torch.float32)
    for rows, logits in layer.compute_logits_by_chunk(hidden):
        result[rows] = logits.gather(1, gold[rows, None])[:, 0].float() - compute_logsumexp(logits)
    return result


def compute_logsumexp(logits: Float[Tensor, "rows vocab"]) -> Float[Tensor, "rows"]:
    """Compute `torch.logsumexp` of each row without another tensor of this size."""
    if scan.can_read(logits):
        return scan.survey_logits(logits).log_z
    largest = logits.amax(dim=-1, keepdim=True)
    shift = torch.where(largest.isfinite(), largest, 0)
    total = sum((tile - shift).exp_().sum(dim=-1) for tile in logits.split(TILE, dim=-1))
    return total.log() + shift[:, 0]


def survey_logits(logits: Float[Tensor, "rows vocab"]) -> Survey:
    """Return the survey that `find_top_k`, `scan.find_above` and `scan.draw_entries` need."""
    if scan.can_read(logits):
        return scan.survey_logits(logits)
    maxima = [block.amax(dim=-1) for block in _split_into_blocks(logits) if block.numel()]
    return Survey(log_z=compute_logsumexp(logits), maxima=torch.cat(maxima, dim=1) if maxima else logits[:, :0])


def find_top_k(
    logits: Float[Tensor, "rows vocab"], maxima: Float[Tensor, "rows blocks"], k: int
) -> tuple[Float[Tensor, "rows k"], Int[Tensor, "rows k"]]:
    """Return `torch.topk` of each row, several times as fast where the vocabulary is large.

    Only the k blocks of columns with the largest `maxima`, and the columns that fill no block, can hold any of the k
    largest values.
    """
    rows, vocab = logits.shape
    if vocab < 8 * k * BLOCK:
        return torch.topk(logits, k, dim=-1)
    whole = vocab // BLOCK
    chosen = maxima[:, :whole].topk(k, dim=-1).indices
    columns = (chosen[..., None] * BLOCK + torch.arange(BLOCK, device=logits.device)).flatten(1)
    rest = torch.arange(whole * BLOCK, vocab, device=logits.device).expand(rows, -1)
    columns = torch.cat([columns, rest], dim=1)
    values, at = logits.gather(1, columns).topk(k, dim=-1)
    return values, columns.gather(1, at)


def _split_into_blocks(
    logits: Float[Tensor, "rows vocab"],
) -> tuple[Float[Tensor, "rows _ _"], Float[Tensor, "rows _ _"]]:
    """Return the columns that fill blocks, and the columns after them."""
    whole = logits.shape[1] - logits.shape[1] % BLOCK
    return logits[:, :whole].unflatten(1, (-1, BLOCK)), logits[:, None, whole:]


def pad_inputs(
    token_ids: Sequence[Sequence[int] | Int[ndarray, "_"]],
    context_token: int,
    device: torch.device | str = "cpu",
    *,
    firsts: Sequence[int | None] | None = None,
) -> tuple[Int[Tensor, "batch length"], Int[Tensor, "batch length"]]:
    """Return inputs (context token first, last token left out), padded on the right, and their attention mask.

    `firsts` has the tokens that stand in place of the context token, or None where it stands itself.
    """
    length = max(map(len, token_ids), default=0)
    inputs = np.full((len(token_ids), length), context_token, np.int64)
    mask = np.zeros((len(token_ids), length), np.int64)
    for row, ids in enumerate(token_ids):
        if firsts is not None and length and (first := firsts[row]) is not None:
            inputs[row, 0] = first
        inputs[row, 1 : len(ids)] = ids[:-1]
        mask[row, : len(ids)] = 1
    return torch.from_numpy(inputs).to(device), torch.from_numpy(mask).to(device)


def pad_readings(
    segmentations: Sequence[Segmentation], context_token: int, device: torch.device | str = "cpu"
) -> tuple[Int[Tensor, "batch length"], Int[Tensor, "batch length"], Bool[Tensor, "batch length"]]:
    """Return inputs and mask as `pad_inputs` does, and flags for the tokens that belong to the texts."""
    firsts = [None if s.reading is None else s.reading.first for s in segmentations]
    inputs, mask = pad_inputs([s.read_ids for s in segmentations], context_token, device, firsts=firsts)
    return inputs, mask, flag_kept(mask, [s.is_kept for s in segmentations])


def flag_kept(mask: Int[Tensor, "batch length"], kept: Sequence[Bool[ndarray, "_"]]) -> Bool[Tensor, "batch length"]:
    """Return flags for the kept ones of the tokens that a mask has."""
    chosen = mask.bool()
    chosen[chosen.clone()] = torch.from_numpy(np.concatenate([np.zeros(0, bool), *kept])).to(chosen.device)
    return chosen


def group_into_batches(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Group indices by length, longest first, into batches of at most `batch_tokens` with padding (or of one item)."""
    result: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if result and (len(result[-1]) + 1) * lengths[result[-1][0]] <= batch_tokens:
            result[-1].append(index)
        else:
            result.append([index])
    return result

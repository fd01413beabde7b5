"""Try a model before anything expensive is made with it, instead of believing its names and its configuration.

A row must not depend on its own token or later ones, on padding, or on the other rows of its batch. Ids and positions
that the model is given must have rows. A model that fails is refused in one line. What was tried is remembered by the
model's fingerprints, so it takes a second once.
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy import ndarray
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from fuselm.models import forward
from fuselm.models.loading import load_model, load_tokenizer
from fuselm.models.locating import UNLIMITED, Model
from fuselm.system import fingerprints, progress
from fuselm.system.errors import name_model_errors, summarize_error

VERSION = 2  # raise this when more is tried
TOKENS = 24  # length of a row
CUTS = (23, 18, 12, 7, 3, 1)  # tokens from here on are changed
ENDS = (5, 16)  # padding begins here
SMALL = 1 << 26  # a model of fewer bytes is tried in float32, however it is stored
# Rows have changed that differ by more than this part of a row's largest value.
MOVED = 1e-4  # in float32, where only tokens differ
MOVED_ALONE = 1e-3  # in float32, where the shape of the batch differs
MOVED_COARSELY = 0.1  # in half precision
TEXT = (
    "The river rose by 37 cm in 1998, and nobody had seen it coming. def area(r): return 3.14 * r ** 2  # not exact. "
    "Er fragte sie, warum; she said: because of the rain! "
)


def load_tried_model(model: Model, *, dtype: str, device: str = "auto") -> tuple[PreTrainedModel, forward.OutputLayer]:
    """Load a model with its output layer, and try it unless it was tried before. Raises `ValueError` if it fails."""
    loaded = load_model(model, dtype=dtype, device=device)
    with name_model_errors(model.name, "tried on a few tokens"):
        layer = forward.find_output_layer(loaded)
    if fingerprints.recall(key := _build_key(model, dtype)) is None:
        with progress.announce(f"trying {model.name} on a few tokens, once"):
            check_model(model, loaded, layer)
        fingerprints.remember(key, True)
    return loaded, layer


def try_models(models: Iterable[tuple[Model, str]]) -> None:
    """Try each model, with its dtype, unless it was tried before. Raises `ValueError` for the first that fails."""
    for model, dtype in models:
        if fingerprints.recall(_build_key(model, dtype)) is None:
            load_tried_model(model, dtype=dtype)


def check_model(model: Model, loaded: PreTrainedModel, layer: forward.OutputLayer) -> None:
    """Raise `ValueError` if the model's rows depend on anything but the tokens before them, or ids lack rows."""
    ids = _tokenize_text(model)
    fine = loaded.dtype == torch.float32
    if not fine and model.parameters_bytes < SMALL:
        loaded = load_model(model, dtype="float32", device=str(loaded.device))
        layer, fine = forward.find_output_layer(loaded), True
    with name_model_errors(model.name, "tried on a few tokens"), torch.inference_mode(), _EmbeddingLookups() as lookups:
        rows = _TriedRows.read(loaded, layer, ids)
    lookups.check_positions(model, rows.inputs)
    fault = rows.find_fault(fine=fine)
    if fault and not fine and _fits_in_float32(model):
        loaded = load_model(model, dtype="float32", device="cpu")
        with name_model_errors(model.name, "tried on a few tokens"), torch.inference_mode():
            rows = _TriedRows.read(loaded, forward.find_output_layer(loaded), ids)
        fault = rows.find_fault(fine=True)
    if fault:
        raise ValueError(f"{model.name}: {fault}")
    width = rows.alone.shape[-1] if layer.weight is None else len(layer.weight)
    if width < model.output_size:
        raise ValueError(
            f"{model.name}: config.json says {model.output_size} rows of the output layer, and it has {width}; "
            "correct vocab_size"
        )


def describe_other_loss(loaded: PreTrainedModel) -> str | None:
    """Say what a model's own loss has beside that of the next tokens, such as a router's; None if nothing."""
    ids = torch.arange(8, device=loaded.device)[None] % len(loaded.get_input_embeddings().weight)
    with torch.inference_mode():
        try:
            output = loaded(input_ids=ids, labels=ids, use_cache=False)
        except TypeError:  # the model has no loss of its own
            return None
        except Exception as error:  # its own loss may raise anything, and fuselm does not need it
            return f"its own loss fails ({summarize_error(error)}); fuselm trains on its logits"
        tokens = torch.nn.functional.cross_entropy(output.logits[0, :-1].float(), ids[0, 1:])
    own = getattr(output, "loss", None)
    if own is None or abs(float(own) - float(tokens)) <= 1e-3 * float(tokens):
        return None
    return (
        f"its own loss of a few tokens is {float(own):.4f}, and that of predicting them {float(tokens):.4f}; fuselm "
        "trains the latter, without what a router or other parts add"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _TriedRows:
    """Hold what a model makes of a text alone, beside copies that differ later, and beside shorter ones."""

    inputs: Int[Tensor, "copies length"]
    cuts: Sequence[int]
    ends: Sequence[int]
    changed: Float[Tensor, "copies length hidden"]  # rows of the text twice, and of a copy for each cut
    padded: Float[Tensor, "shorter length hidden"]  # rows of the text, and of a copy for each end
    alone: Float[Tensor, "short hidden"]  # rows of the beginning of the text

    @classmethod
    def read(cls, model: PreTrainedModel, layer: forward.OutputLayer, ids: Int[ndarray, "length"]) -> "_TriedRows":
        length = len(ids)
        cuts, ends = [c for c in CUTS if c < length], [e for e in ENDS if e < length]
        distinct = np.unique(ids)
        others = distinct[(np.searchsorted(distinct, ids) + 1) % len(distinct)]
        changed, padded = np.tile(ids, (2 + len(cuts), 1)), np.tile(ids, (1 + len(ends), 1))
        mask = np.ones_like(padded)
        for row, cut in enumerate(cuts, 2):
            changed[row, cut:] = others[cut:]
        for row, end in enumerate(ends, 1):
            padded[row, end:], mask[row, end:] = ids[0], 0

        def read_rows(inputs: Int[ndarray, "batch length"], mask: Int[ndarray, "batch length"]) -> Tensor:
            tensors = (torch.from_numpy(np.ascontiguousarray(a)).to(model.device) for a in (inputs, mask))
            return forward.compute_hidden_states(model, layer, *tensors).float()

        short = np.s_[:1, : ends[-1] if ends else length]
        return cls(
            inputs=torch.from_numpy(changed),
            cuts=cuts,
            ends=ends,
            changed=read_rows(changed, np.ones_like(changed)),
            padded=read_rows(padded, mask),
            alone=read_rows(changed[short], np.ones_like(changed)[short])[0],
        )

    def find_fault(self, *, fine: bool) -> str | None:
        """Return what is wrong with the model, if anything. It computes in half precision unless `fine`."""
        moved = MOVED if fine else MOVED_COARSELY
        if bool(self.alone.isnan().any(dim=-1).all()):
            return "gives NaN for every token of a text; its weights are damaged; download the model again"
        again = _compare_rows(self.changed[1], self.changed[0], len(self.inputs[0])) > moved
        later = [_compare_rows(self.changed[n], self.changed[0], cut) > moved for n, cut in enumerate(self.cuts, 2)]
        padded = [_compare_rows(self.padded[n], self.padded[0], end) > moved for n, end in enumerate(self.ends, 1)]
        beside = "a text's rows depend on the other texts of its batch, or on its length; it cannot be used"
        if bool(again.sum() >= min(2, len(again))):
            return beside
        if sum(bool(rows.any()) for rows in later) >= min(2, len(later)) > 0:
            return (
                "not causal: changing a later token changes an earlier row, so it sees what it is to predict; needs a "
                "model that reads from left to right (is_decoder in config.json, for some)"
            )
        if sum(bool(rows.any()) for rows in padded) >= min(2, len(padded)) > 0:
            return "padding behind a text changes its rows, so batches would change scores; it cannot be used"
        alone = _compare_rows(self.alone, self.changed[0], len(self.alone))
        if bool((alone > MOVED_ALONE).any() if fine else alone.median() > MOVED_COARSELY):
            return beside
        return None


def _compare_rows(
    rows: Float[Tensor, "_ hidden"], expected: Float[Tensor, "_ hidden"], count: int
) -> Float[Tensor, "count"]:
    """Return how far each of the first `count` rows lies from the expected one, in parts of its largest value."""
    rows, expected = rows[:count], expected[:count]
    return (rows - expected).abs().amax(dim=-1) / expected.abs().amax(dim=-1).clamp(min=1e-30)


class _EmbeddingLookups(TorchFunctionMode):
    """Watch which rows of embeddings of tokens and positions are looked up."""

    def __init__(self) -> None:
        super().__init__()
        self.tables: list[tuple[int, Tensor]] = []  # the rows of a table, and the ids that were looked up

    def __torch_function__(self, function, types, arguments=(), options=None):
        options = options or {}
        if function is torch.nn.functional.embedding:
            ids, table = (*arguments, options.get("weight"))[:2] if arguments else (options["input"], options["weight"])
            if ids.device.type != "meta" and ids.numel() and int(ids.max()) >= len(table):
                raise IndexError(f"id {int(ids.max())} of an embedding with {len(table)} rows")
            self.tables.append((len(table), ids.detach()))
        return function(*arguments, **options)

    def check_positions(self, model: Model, inputs: Int[Tensor, "batch length"]) -> None:
        """Raise `ValueError` if a table that is read by position has no row for the last position of the context."""
        length = inputs.shape[1]
        for rows, ids in self.tables:
            steps = ids.reshape(-1, ids.shape[-1])[0]
            by_position = len(steps) == length > 2 and bool((steps.diff() == 1).all())
            if by_position and rows < model.context_length < UNLIMITED:
                raise ValueError(
                    f"{model.name}: config.json says a context of {model.context_length} tokens, and there are "
                    f"embeddings of {rows} positions; correct it"
                )


def _tokenize_text(model: Model) -> Int[ndarray, "length"]:
    """Return the context token, and the tokens of a text that has a little of everything."""
    ids = load_tokenizer(model).encode(TEXT, add_special_tokens=False).ids
    if max(ids, default=0) >= model.output_size:
        raise ValueError(
            f"{model.name}: the tokenizer gives id {max(ids)}, and the model has {model.output_size} rows; they are "
            "not of the same model"
        )
    if len(set(ids)) < 2:  # the tokenizer knows none of the text
        ids = list(range(model.output_size))
    length = min(TOKENS, model.context_length)
    return np.resize(np.array([model.context_token, *np.resize(np.array(ids), TOKENS)]), length).astype(np.int64)


def _fits_in_float32(model: Model) -> bool:
    """Tell whether the model's weights fit into the machine's free memory in float32, beside themselves."""
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return False
    return 3 * model.parameters_bytes < free


def _build_key(model: Model, dtype: str) -> str:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    versions = f"torch {version('torch')} transformers {version('transformers')}"
    return f"probe {VERSION} {model.fingerprint} {model.tokenizer_fingerprint} {dtype} {device} {versions}"

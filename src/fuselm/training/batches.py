"""Make the batches that a training step reads: documents, padded or packed, with their fused rows.

Of a conversation, the tokens of its responses are learned, and everything else is context; with `learn_context`, all of
its tokens are learned. Fused rows are those of responses.

A padded batch has one document a row. A packed batch has all its documents in one row, without padding. Positions begin
again at 0 with each document, so transformers keeps attention inside it: by a block-diagonal mask or, with flash
attention, by the lengths of the sequences.
"""

from collections.abc import Sequence
from typing import no_type_check

import numpy as np
import torch
from numpy import ndarray

from fuselm.documents.document import Document
from fuselm.models import forward
from fuselm.models.vocabulary import Vocabulary
from fuselm.stores.rows import TrainingRows
from fuselm.stores.store import Store
from fuselm.system import index_checks
from fuselm.system.compiling import compiled
from fuselm.training import loader_processes, reading
from fuselm.training.fusing import FusingReader, RowFusion
from fuselm.training.order import BLOCK_TOKENS, MIXED_BLOCKS, Order

KEPT_TOKENS = 5 * MIXED_BLOCKS * BLOCK_TOKENS // 4  # a store keeps those, and the row groups at their ends


class Batches(torch.utils.data.Dataset):
    """List the batches of all passes in order, each a list of documents with their tokens and fused rows.

    `fused` is a store of fused distributions, a way to make them, or None for the texts alone. Nothing is read before
    a batch is asked for; what is in memory of all documents is a few numbers. `reader` is the name under which the
    corpus has the target's token counts, if it has them.

    `processes` take the batches of a step in turn. A step has `batches_of_step` batches, whatever the number of
    processes; where they are not a multiple of it, a step has empty batches, and so has the end. If None, a step has a
    batch for each process.
    """

    def __init__(
        self,
        documents: Sequence[Document],
        vocabulary: Vocabulary,
        fused: Store | RowFusion | None,
        *,
        passes: int,
        batch_documents: int | None,
        pack_tokens: int | None,
        seed: int,
        processes: int,
        learn_context: bool = False,
        batches_of_step: int | None = None,
        reader: str | None = None,
    ) -> None:
        self._reader = _open_reader(documents, vocabulary, fused, reader)
        self._learn_context = learn_context
        self.packed = pack_tokens is not None
        self.order = Order(
            self._reader.lengths, passes=passes, batch_documents=batch_documents, pack_tokens=pack_tokens, seed=seed
        )
        self._processes, self._batches_of_step = processes, batches_of_step or processes
        self._slots = -(-self._batches_of_step // processes) * processes  # of a step, some of them empty

    def __len__(self) -> int:
        whole, rest = divmod(len(self.order), self._batches_of_step)
        return whole * self._slots + -(-rest // self._processes) * self._processes

    def count_steps(self) -> int:
        """Count the steps of all passes."""
        return -(-len(self.order) // self._batches_of_step)

    def count_slots(self, steps: int) -> int:
        """Count the batches of the first steps, with those that are empty."""
        return min(steps * self._slots, len(self))

    def count_tokens(self, batches: int) -> int:
        """Count the tokens of the first `batches` batches, without those that are empty."""
        return self.order.count_tokens(batches)

    @property
    def tokens_per_pass(self) -> int:
        """Count the tokens of one pass."""
        return int(self._reader.lengths.sum(dtype=np.int64))

    def list_documents(self, index: int) -> list[int]:
        """Return the numbers of the documents of a batch, without reading them."""
        step, place = divmod(index, self._slots)
        number = step * self._batches_of_step + place
        if place >= self._batches_of_step or number >= len(self.order):
            return []
        return self.order.find_batch(number).tolist()

    def __getitem__(self, index: int) -> list[dict]:
        loader_processes.prepare_process()
        items = self._reader.read(self.list_documents(index))
        return list(map(reading.insert_empty_rows, items)) if self._learn_context else items


def _open_reader(
    documents: Sequence[Document], vocabulary: Vocabulary, fused: Store | RowFusion | None, reader: str | None
) -> reading.TextReader | reading.StoreReader | FusingReader:
    if fused is None:
        return reading.TextReader(documents, vocabulary, reader=reader)
    if isinstance(fused, RowFusion):
        return FusingReader(documents, vocabulary, fused, reader=reader)
    return reading.StoreReader(documents, vocabulary, fused, reader=reader)


class Collator:
    """Turn a batch's documents into tensors, with the fused rows of all their tokens in order."""

    def __init__(self, context_token: int, *, packed: bool):
        self._context_token = context_token
        self._packed = packed

    def __call__(self, batches: list[list[dict]]) -> dict[str, torch.Tensor]:
        (items,) = batches  # the Trainer's batch holds one batch of `Batches`
        full = [item for item in items if len(item["tokens"])]
        tokens, firsts = [item["tokens"] for item in full], [item.get("first") for item in full]
        inputs, mask = forward.pad_inputs(
            tokens or [[self._context_token]], self._context_token, firsts=firsts if full else None
        )
        is_token = mask.bool() if tokens else torch.zeros_like(mask, dtype=torch.bool)
        labels = torch.full_like(inputs, -100)
        labels[is_token] = torch.from_numpy(np.concatenate([np.zeros(0, np.int64), *tokens]))
        if full:
            labels[~forward.flag_kept(mask, [_flag_learned(item) for item in full])] = -100
        batch = {"input_ids": inputs, "attention_mask": mask, "labels": labels}
        if self._packed:
            positions = torch.arange(inputs.shape[1]).expand_as(inputs)
            real = mask.bool()
            batch = {"input_ids": inputs[real], "position_ids": positions[real], "labels": labels[real]}
            batch = {name: tensor[None] for name, tensor in batch.items()}
        batch["shift_labels"] = batch["labels"]  # the Trainer counts tokens by it
        if items and "fused" in items[0]:
            batch |= _pad_rows([item["fused"] for item in items])
        return batch


def _flag_learned(item: dict) -> ndarray:
    """Flag the tokens of a document that are learned, which are all unless the item says otherwise."""
    return item["kept"] if "kept" in item else np.ones(len(item["tokens"]), bool)


def _pad_rows(documents: Sequence[TrainingRows]) -> dict[str, torch.Tensor]:
    for d in documents:
        index_checks.require_offsets("fused rows", d.offsets, len(d.ids))
        index_checks.require_lengths("fused rows", len(d.ids), d.logprobs)
        index_checks.require_lengths("fused rows", len(d.tail), d.tokens, d.offsets[1:])
    edges = np.cumsum([0, *(len(d.tail) for d in documents)])
    shape = edges[-1], max(_widest(d.offsets) for d in documents)
    ids, logprobs = np.empty(shape, np.int64), np.empty(shape, np.float32)
    for d, begin, end in zip(documents, edges[:-1], edges[1:], strict=True):
        _fill(d.offsets, d.ids, d.logprobs, ids[begin:end], logprobs[begin:end])
    return {
        "fused_ids": torch.from_numpy(ids),
        "fused_logprobs": torch.from_numpy(logprobs),
        "fused_tail": torch.from_numpy(np.concatenate([d.tail for d in documents])),
    }


@compiled(nogil=True)
@no_type_check
def _widest(offsets: ndarray) -> int:
    widest = 1
    for row in range(len(offsets) - 1):
        widest = max(widest, offsets[row + 1] - offsets[row])
    return widest


@compiled(nogil=True)
@no_type_check
def _fill(offsets: ndarray, ids: ndarray, logprobs: ndarray, padded_ids: ndarray, padded_logprobs: ndarray) -> None:
    for row in range(len(offsets) - 1):
        begin, count = offsets[row], offsets[row + 1] - offsets[row]
        for k in range(count):
            padded_ids[row, k], padded_logprobs[row, k] = ids[begin + k], logprobs[begin + k]
        padded_ids[row, count:] = 0
        padded_logprobs[row, count:] = -np.inf

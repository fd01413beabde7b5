"""Make the batches that a training step reads: documents, padded or packed, with their fused rows.

Of a conversation, the tokens of its responses are learned, and everything else is context; with `learn_context`, all of
its tokens are learned. Fused rows are those of responses.

A padded batch has one document a row. A packed batch has all its documents in one row, without padding. Positions begin
again at 0 with each document, so transformers keeps attention inside it: by a block-diagonal mask or, with flash
attention, by the lengths of the sequences.
"""

import random
from collections.abc import Sequence
from typing import no_type_check

import numpy as np
import torch
from numpy import ndarray

from fuselm.documents.corpus import Document
from fuselm.documents.passages import pack_documents
from fuselm.models import forward
from fuselm.models.segmentation import Segmentation
from fuselm.models.vocabulary import Vocabulary
from fuselm.stores.rows import TrainingRows
from fuselm.stores.store import Store
from fuselm.system import index_checks
from fuselm.system.compiling import compiled

BATCH_DOCUMENTS = 4  # by default
WINDOW = 8  # documents of so many batches are grouped by length
BLOCK_TOKENS = 1 << 15  # neighbours of so many tokens are read together
MIXED_BLOCKS = 16  # documents of so many blocks are shuffled; a smaller corpus is shuffled as a whole
KEPT_TOKENS = 5 * MIXED_BLOCKS * BLOCK_TOKENS // 4  # a store keeps those, and the row groups at their ends


def order_documents(lengths: Sequence[int], *, passes: int, batch: int, seed: int) -> list[int]:
    """Return the documents of all passes in training order: shuffled, with similar lengths in one batch."""
    stream = shuffle_passes(lengths, passes=passes, seed=seed)
    order: list[int] = []
    for begin in range(0, len(stream), WINDOW * batch):
        window = sorted(stream[begin : begin + WINDOW * batch], key=lambda i: lengths[i])
        batches = [window[k : k + batch] for k in range(0, len(window), batch)]
        whole, rest = [b for b in batches if len(b) == batch], [b for b in batches if len(b) < batch]
        random.Random(f"{seed} {begin}").shuffle(whole)
        order.extend(i for b in whole + rest for i in b)
    return order


def shuffle_passes(lengths: Sequence[int], *, passes: int, seed: int) -> list[int]:
    """Shuffle blocks of neighbours, and the documents of some blocks at a time.

    A store's row groups are read as a whole, so in this order they are read once a pass, not once a document.
    """
    blocks = pack_documents(lengths, range(len(lengths)), BLOCK_TOKENS)
    stream: list[int] = []
    for n in range(passes):
        generator = random.Random(f"{seed} {n}")
        order = blocks if len(blocks) <= MIXED_BLOCKS else generator.sample(blocks, len(blocks))
        for begin in range(0, len(order), MIXED_BLOCKS):
            mixed = [i for block in order[begin : begin + MIXED_BLOCKS] for i in block]
            stream.extend(generator.sample(mixed, len(mixed)))
    return stream


class Batches(torch.utils.data.Dataset):
    """List the batches of all passes in order, each a list of documents with their tokens and fused rows.

    `fused` is a store of fused distributions, or None for the texts alone. `processes` share the batches evenly, so
    the last batches may be empty.
    """

    def __init__(
        self,
        documents: Sequence[Document],
        vocabulary: Vocabulary,
        fused: Store | None,
        *,
        passes: int,
        batch_documents: int | None,
        pack_tokens: int | None,
        seed: int,
        processes: int,
        learn_context: bool = False,
    ) -> None:
        self._documents = documents
        self._segmentations = [vocabulary.segment(d.text) for d in documents]
        self._fused = fused
        self._learn_context = learn_context
        lengths = [len(s.read_ids) for s in self._segmentations]
        self.packed = pack_tokens is not None
        if pack_tokens is not None:
            self._batches = pack_documents(lengths, shuffle_passes(lengths, passes=passes, seed=seed), pack_tokens)
        else:
            size = batch_documents or BATCH_DOCUMENTS
            order = order_documents(lengths, passes=passes, batch=size, seed=seed)
            self._batches = [order[k : k + size] for k in range(0, len(order), size)]
        self._batches += [[]] * (-len(self._batches) % processes)

    def __len__(self) -> int:
        return len(self._batches)

    def count_tokens(self, batches: int) -> int:
        """Count the tokens of the first `batches` batches."""
        return sum(len(self._segmentations[i].read_ids) for batch in self._batches[:batches] for i in batch)

    @property
    def tokens_per_pass(self) -> int:
        """Count the tokens of one pass."""
        return sum(len(s.read_ids) for s in self._segmentations)

    def __getitem__(self, index: int) -> list[dict]:
        return [self._read_document(i) for i in self._batches[index]]

    def _read_document(self, i: int) -> dict:
        read = self._segmentations[i]
        kept = np.ones(len(read.read_ids), bool) if self._learn_context else read.is_kept
        item = {"tokens": read.read_ids, "kept": kept, "first": None if read.reading is None else read.reading.first}
        if self._fused is None:
            return item
        fused = self._fused.read_for_training(self._documents[i].id)
        if not np.array_equal(fused.tokens, read.ids):
            name = self._documents[i].id
            raise ValueError(f"{self._fused.folder}: document {name}: other tokens than the target's; fuse again")
        return item | {"fused": _insert_empty_rows(fused, read) if self._learn_context else fused}


def _insert_empty_rows(rows: TrainingRows, read: Segmentation) -> TrainingRows:
    """Return a row for each token that is read. Those of context have no entries, so only their token is learned."""
    if read.reading is None:
        return rows
    counts, tail = np.zeros(len(read.read_ids), np.int64), np.ones(len(read.read_ids), np.float32)
    counts[read.is_kept], tail[read.is_kept] = np.diff(rows.offsets), rows.tail
    return TrainingRows(
        tokens=read.read_ids,
        offsets=np.append(0, np.cumsum(counts)),
        ids=rows.ids,
        logprobs=rows.logprobs,
        tail=tail,
    )


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

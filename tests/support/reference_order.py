"""Order documents as training does, in plain Python: lists, `random.Random`, slow and obvious."""

import random
from collections.abc import Sequence

from fuselm.documents.passages import pack_documents

BLOCK_TOKENS = 1 << 15  # neighbours of so many tokens are shuffled as one
MIXED_BLOCKS = 16  # documents of so many blocks are shuffled together
WINDOW = 8  # documents of so many batches are grouped by length


def shuffle_passes(
    lengths: Sequence[int], *, passes: int, seed: int, tokens: int = BLOCK_TOKENS, mixed: int = MIXED_BLOCKS
) -> list[int]:
    """Shuffle blocks of neighbours, and the documents of some blocks at a time."""
    blocks = pack_documents(lengths, range(len(lengths)), tokens)
    stream: list[int] = []
    for n in range(passes):
        generator = random.Random(f"{seed} {n}")
        order = blocks if len(blocks) <= mixed else generator.sample(blocks, len(blocks))
        for begin in range(0, len(order), mixed):
            some = [i for block in order[begin : begin + mixed] for i in block]
            stream.extend(generator.sample(some, len(some)))
    return stream


def order_documents(lengths: Sequence[int], *, passes: int, batch: int, seed: int) -> list[int]:
    """Put documents of similar length into one batch, and shuffle the batches of a window."""
    stream = shuffle_passes(lengths, passes=passes, seed=seed)
    order: list[int] = []
    for begin in range(0, len(stream), WINDOW * batch):
        window = sorted(stream[begin : begin + WINDOW * batch], key=lambda i: lengths[i])
        batches = [window[k : k + batch] for k in range(0, len(window), batch)]
        whole, rest = [b for b in batches if len(b) == batch], [b for b in batches if len(b) < batch]
        random.Random(f"{seed} {begin}").shuffle(whole)
        order.extend(i for b in whole + rest for i in b)
    return order

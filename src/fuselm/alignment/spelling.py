"""Spell a source's tokens in a target's tokens, and arrange the spellings in a trie.

`span` finds in it which source ids continue like the target's tokens so far, and with which token next.
"""

from collections.abc import Sequence
from typing import NamedTuple, no_type_check

import numpy as np
from jaxtyping import Int
from numpy import ndarray

from fuselm.models import bpe
from fuselm.models.vocabulary import Vocabulary
from fuselm.system import index_checks
from fuselm.system.compiling import compiled

# BEGIN belongs to an id: where its steps are, and the token of the first one. STEP has a target token and the node that
# it leads to.
BEGIN = np.dtype([("at", "i4"), ("stop", "i4"), ("token", "i4")])
STEP = np.dtype([("token", "i4"), ("node", "i4")])


class Spelling(NamedTuple):
    """Hold the target's tokens for every id of a source, and a trie of them.

    The steps from `begins[x].at` to `begins[x].stop` spell id x; there are none if it stands for no text, and
    `bpe.NOTHING` ends bytes that have no tokens. A node of the trie is a sequence of target tokens, and node 0 is the
    empty one: `ids_below[node]` ids begin with it, and `ids_beyond[node]` of those are longer. Its children, sorted by
    token, are those from `first_child[node]` to `first_child[node + 1]`. `ids_begun[token]` ids begin with a token.
    """

    begins: ndarray  # of BEGIN, by source id
    steps: ndarray  # of STEP
    ids_below: Int[ndarray, "nodes"]
    ids_beyond: Int[ndarray, "nodes"]
    first_child: Int[ndarray, "nodes+1"]
    child_tokens: Int[ndarray, "children"]
    child_nodes: Int[ndarray, "children"]
    ids_begun: Int[ndarray, "target_vocabulary"]


def spell_vocabulary(source: Vocabulary, target: Vocabulary) -> Spelling:
    """Spell every source id in the target's tokens, as the target's tokenizer continues a text with it."""
    known = [i for i, string in enumerate(source.token_bytes) if string is not None]
    known_offsets, tokens = join_sequences(target.encode_bytes([source.token_bytes[i] or b"" for i in known]))
    index_checks.require_within("a token of a spelling", tokens, target.size, start=bpe.NOTHING)
    begins, steps = np.zeros(source.size, BEGIN), np.zeros(len(tokens), STEP)
    begins["at"][known], begins["stop"][known] = known_offsets[:-1], known_offsets[1:]
    steps["token"] = tokens
    ids_below, ids_beyond, parents, node_tokens = _build_trie(begins, steps, bpe.make_table(len(tokens)), target.size)
    spelled = begins["at"] < begins["stop"]
    begins["token"][spelled] = first = tokens[begins["at"][spelled]]
    order = np.lexsort((node_tokens, parents))[1:]  # without the root, whose parent is -1
    return Spelling(
        begins=begins,
        steps=steps,
        ids_below=ids_below,
        ids_beyond=ids_beyond,
        first_child=np.searchsorted(parents[order], np.arange(len(parents) + 1)).astype(np.int32),
        child_tokens=node_tokens[order],
        child_nodes=order.astype(np.int32),
        ids_begun=np.bincount(first[first >= 0], minlength=target.size).astype(np.int32),
    )


def join_sequences(sequences: Sequence[Sequence[int]]) -> tuple[Int[ndarray, "offsets"], Int[ndarray, "_"]]:
    """Join sequences; return the offsets where each begins and the last one ends, and all numbers."""
    offsets = np.append(0, np.cumsum([len(s) for s in sequences])).astype(np.int64)
    return offsets, np.fromiter((t for s in sequences for t in s), np.int32, int(offsets[-1]))


@compiled(nogil=True)
@no_type_check  # numba cannot cache a function that a type checker wraps
def _build_trie(
    begins: ndarray, steps: ndarray, edges: ndarray, size: int
) -> tuple[ndarray, ndarray, ndarray, ndarray]:
    """Set the node of each step; return `ids_below`, `ids_beyond`, and each node's parent and token."""
    most = len(steps) + 1
    ids_below, ids_ended = np.zeros(most, np.int32), np.zeros(most, np.int32)
    parents, tokens, by_slot = np.full(most, -1, np.int32), np.full(most, -1, np.int32), np.zeros(len(edges), np.int32)
    nodes = 1
    for x in range(len(begins)):
        if begins[x].at == begins[x].stop:
            continue
        node = 0
        ids_below[0] += 1
        spelled = True
        for s in range(begins[x].at, begins[x].stop):
            token = steps[s].token
            if token < 0:
                spelled = False
                break
            edge = np.int64(node) * size + token
            slot = bpe.find_slot(edges, edge)
            if edges[slot] == bpe.NOTHING:
                edges[slot], by_slot[slot], parents[nodes], tokens[nodes] = edge, nodes, node, token
                nodes += 1
            node = by_slot[slot]
            steps[s].node = node
            ids_below[node] += 1
        ids_ended[node] += spelled
    below = ids_below[:nodes].copy()
    return below, below - ids_ended[:nodes], parents[:nodes].copy(), tokens[:nodes].copy()


@compiled(nogil=True)
@no_type_check
def find_child(spelling: Spelling, node: int, token: int) -> int:
    """Return the node after one more token, or -1 if no id continues with it."""
    low, end = spelling.first_child[node], spelling.first_child[node + 1]
    high = end
    while low < high:
        middle = (low + high) // 2
        if spelling.child_tokens[middle] < token:
            low = middle + 1
        else:
            high = middle
    return spelling.child_nodes[low] if low < end and spelling.child_tokens[low] == token else -1

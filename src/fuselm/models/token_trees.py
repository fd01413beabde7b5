"""Read sequences that begin alike in one row, so that what they share is read once.

A tree holds sequences in the order of their tokens, each token once for all sequences that agree up to it. The tokens
after it that continue it come right behind it, so token i is seen by tokens i to `ends[i]` - 1: itself and what
continues it. Positions are those in the sequences. A model reads this by a mask of its own and explicit positions, if
it takes them; `can_read_trees` tries that.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from fuselm.models import forward
from fuselm.models.forward import OutputLayer

ROW_TOKENS = 256  # of a tree, if its sequences are short: attention costs the square of them
ROW_SEQUENCES = 4  # a tree of long sequences takes so many times the tokens of its first one
TRIED = (7, 11, 13, 17)  # lengths of what is tried: a shared beginning, two ways to go on, another sequence
WINDOWS = ("sliding_window", "attention_chunk_size")  # names of how far back some models see


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenTree:
    """Hold the tokens of a tree, their positions, and the end of what continues each."""

    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)


def grow_trees(
    sequences: Sequence[tuple[int, ...]], most: int
) -> tuple[list[TokenTree], dict[tuple[int, ...], tuple[int, list[int]]]]:
    """Return trees of at most `most` tokens, or of one sequence, and where each sequence is: its tree and its tokens.

    >>> from fuselm.models.token_trees import grow_trees
    >>> trees, places = grow_trees([(5, 6, 7), (5, 6, 8)], 10)
    >>> trees[0].tokens, trees[0].ends, places[(5, 6, 8)]
    ([5, 6, 7, 8], [4, 4, 3, 4], (0, [0, 1, 3]))
    """
    trees: list[TokenTree] = []
    places: dict[tuple[int, ...], tuple[int, list[int]]] = {}
    before: tuple[int, ...] = ()
    path: list[int] = []  # of `before`, in the last tree
    limit = 0
    for sequence in sorted(set(sequences)):
        shared = _count_shared(before, sequence)
        if not trees or len(trees[-1].tokens) + len(sequence) - shared > limit:
            trees.append(TokenTree())
            limit = min(max(ROW_TOKENS, ROW_SEQUENCES * len(sequence)), most)
            shared, path = 0, []
        tree = trees[-1]
        path = path[:shared]
        for position in range(shared, len(sequence)):
            path.append(len(tree.tokens))
            tree.tokens.append(sequence[position])
            tree.positions.append(position)
            tree.ends.append(0)
        for at in path:
            tree.ends[at] = len(tree.tokens)
        before, places[sequence] = sequence, (len(trees) - 1, path)
    return trees, places


def _count_shared(first: Sequence[int], second: Sequence[int]) -> int:
    for count, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return count
    return min(len(first), len(second))


def compute_tree_states(
    model: PreTrainedModel, layer: OutputLayer, trees: Sequence[TokenTree]
) -> Float[Tensor, "trees tokens hidden"]:
    """Return the last hidden states of a batch of trees, or the logits if `layer` has no weight."""
    width = max(len(tree.tokens) for tree in trees)
    ids, positions = np.zeros((2, len(trees), width), np.int64)
    ends = np.tile(np.arange(1, width + 1), (len(trees), 1))  # padding sees itself
    for row, tree in enumerate(trees):
        count = len(tree.tokens)
        ids[row, :count], positions[row, :count], ends[row, :count] = tree.tokens, tree.positions, tree.ends
    at = np.arange(width)
    is_seen = (at[:, None] >= at) & (at[:, None] < ends[:, None, :])
    mask = torch.zeros(is_seen.shape, dtype=model.dtype).masked_fill_(
        torch.from_numpy(~is_seen), torch.finfo(model.dtype).min
    )
    given = {
        "input_ids": torch.from_numpy(ids).to(model.device),
        "position_ids": torch.from_numpy(positions).to(model.device),
        "attention_mask": mask[:, None].to(model.device),
        "use_cache": False,
    }
    with torch.inference_mode():
        if layer.weight is None:
            return model(**given).logits
        return forward.find_decoder(model)(**given).last_hidden_state


def can_read_trees(model: PreTrainedModel, layer: OutputLayer, longest: int) -> bool:
    """Tell whether a model reads trees of sequences of up to `longest` tokens as it reads each sequence by itself."""
    config = model.config.get_text_config()
    windows = [of for name in WINDOWS if isinstance(of := getattr(config, name, None), int)]
    if any(window < longest for window in windows):
        return False
    vocab = model.get_input_embeddings().weight.shape[0]
    ids = np.arange(sum(TRIED)) * 7 % vocab
    beginning, *others = (part.tolist() for part in np.split(ids, np.cumsum(TRIED)[:-1]))
    sequences = [tuple(beginning + others[0]), tuple(beginning + others[1]), tuple(others[2])]
    trees, places = grow_trees(sequences, len(ids))
    try:
        states = compute_tree_states(model, layer, trees)
    except Exception:  # a model's own code may raise anything on a mask or on positions that it does not take
        return False
    for sequence in sequences:
        tree, path = places[sequence]
        alone = torch.tensor([sequence], device=model.device)
        with torch.inference_mode():
            expected = forward.compute_hidden_states(model, layer, alone, torch.ones_like(alone))[0]
            found = states[tree, path]
            if not forward.are_close(layer.compute_logits(found), layer.compute_logits(expected), model):
                return False
    return True

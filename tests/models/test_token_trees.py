"""Trees of tokens: what sequences share is read once, and every model reads each sequence as if it were alone."""

import pytest
import torch
from breadth import architectures
from hypothesis import given
from hypothesis import strategies as st
from pruning_models import make_model
from transformers import AutoModelForCausalLM

from fuselm.models import forward
from fuselm.models.token_trees import can_read_trees, compute_tree_states, grow_trees

SEQUENCES = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=9).map(tuple), max_size=23)


@given(SEQUENCES, st.integers(1, 31))
def test_every_sequence_is_what_its_tokens_see(sequences, most):
    trees, places = grow_trees(sequences, most)
    assert set(places) == set(sequences)
    for sequence, (number, path) in places.items():
        tree = trees[number]
        last = path[-1]
        seen = [at for at in range(last + 1) if tree.ends[at] > last]
        assert seen == path and tuple(tree.tokens[at] for at in seen) == sequence
        assert [tree.positions[at] for at in path] == list(range(len(sequence)))
    for tree in trees:
        alone = [s for s, (n, _) in places.items() if trees[n] is tree]
        assert len(tree.tokens) <= most or len(alone) == 1 or len(tree.tokens) == max(map(len, alone))


def test_what_several_sequences_begin_with_is_there_once():
    sequences = [(1, 2, 3, n) for n in range(13)]
    trees, _ = grow_trees(sequences, 100)
    assert [len(tree.tokens) for tree in trees] == [3 + 13]
    trees, _ = grow_trees(sequences, 9)  # again in each tree
    assert [len(tree.tokens) for tree in trees] == [9, 9, 4]
    assert grow_trees([], 9) == ([], {})


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt_neox", "mixtral"])
def test_models_read_a_tree_as_they_read_each_sequence(family):
    model = make_model(family, layers=2)
    layer = forward.find_output_layer(model)
    assert can_read_trees(model, layer, 11)
    shared = [7, 3, 5, 2, 9]
    sequences = [tuple(shared + rest) for rest in ([1], [1, 4, 8], [6, 6], [])] + [(2, 2, 11)]
    trees, places = grow_trees(sequences, 11)
    assert len(trees) == 2  # of two lengths
    states = compute_tree_states(model, layer, trees)
    for sequence, (number, path) in places.items():
        alone = torch.tensor([sequence])
        expected = forward.compute_hidden_states(model, layer, alone, torch.ones_like(alone))[0]
        torch.testing.assert_close(states[number, path], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["mamba", "mpt", "bloom"])
def test_a_model_that_sees_more_than_its_mask_says_reads_no_trees(family):
    model = make_model(family, layers=2)
    assert not can_read_trees(model, forward.find_output_layer(model), 11)


def test_a_model_that_sees_only_so_far_back_reads_no_longer_trees():
    config = architectures.tiny_config("gemma3_text")
    config.sliding_window = 37
    model = AutoModelForCausalLM.from_config(config).eval()
    layer = forward.find_output_layer(model)
    assert can_read_trees(model, layer, 37) and not can_read_trees(model, layer, 38)

"""Compare maps.py with the loops in reference.py."""

from pathlib import Path

import drawn
import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st

from fuselm.alignment import maps
from fuselm.models.vocabulary import UNMAPPED, Segmentation, Vocabulary

vocabularies = st.one_of(*drawn.kinds_of_vocabulary.values())
few = settings(max_examples=40)


def nearest(source: Vocabulary, target: Vocabulary) -> list[int]:
    """Return the reference's map."""
    found = [reference.UNMAPPED if ties is None else ties[0] for ties in all_ties(source, target)]
    return [i if i >= 0 and target.token_bytes[i] is not None else reference.UNMAPPED for i in found]


def all_ties(source: Vocabulary, target: Vocabulary) -> list[list[int] | None]:
    """Return for every source token the ids at the least edit distance, or None if there is no token."""
    strings = {string: i for i, string in enumerate(target.token_strings) if string is not None}
    marks = source.word_mark or "no mark", target.word_mark
    return [
        None if string is None else reference.min_edit_ids(string, strings, *marks)[1]
        for string in source.token_strings
    ]


@few
@given(vocabularies, vocabularies)
def test_nearest_map_equals_the_reference(source, target):
    source, target = source(), target()
    expected = nearest(source, target)
    assert maps.build_nearest_map(source, target).tolist() == expected  # built
    assert maps.build_nearest_map(source, target).tolist() == expected  # kept


corpora = st.lists(drawn.texts, max_size=5)


@pytest.mark.parametrize("held", [1, 17, maps.MOST_HELD_PAIRS])
def test_cooccurrence_map_equals_the_reference(held, monkeypatch):
    monkeypatch.setattr(maps, "MOST_HELD_PAIRS", held)
    monkeypatch.setattr(maps, "TIED_TOKENS", 3)

    @few
    @given(vocabularies, vocabularies, corpora)
    def equal(source, target, texts):
        source, target = source(), target()
        segmented = [(source.segment(text), target.segment(text)) for text in texts]
        of_source = reference.added([count_neighbors(s, t) for s, t in segmented])
        of_target = reference.added([count_neighbors(t, t) for _, t in segmented])
        expected = [
            reference.UNMAPPED if ties is None else reference.most_alike(ties, of_source.get(token, {}), of_target)
            for token, ties in enumerate(all_ties(source, target))
        ]
        expected = [i if i >= 0 and target.token_bytes[i] is not None else reference.UNMAPPED for i in expected]
        assert maps.build_cooccurrence_map(source, target, texts).tolist() == expected

    equal()


def count_neighbors(tokens: Segmentation, target: Segmentation) -> dict[int, dict[int, int]]:
    spans, target_spans = (drawn.spans(s.starts, s.size) for s in (tokens, target))
    return reference.company(spans, tokens.ids.tolist(), target_spans, target.ids.tolist(), maps.WINDOW)


@few
@given(vocabularies, vocabularies, corpora)
def test_statistics_map_equals_the_reference(source, target, texts):
    source, target = source(), target()
    expected = dict(enumerate(nearest(source, target)))
    pairs = []
    for text in texts:
        s, t = source.segment(text).ids.tolist(), target.segment(text).ids.tolist()
        paired = reference.dtw_pairs([source.token_strings[i] for i in s], [target.token_strings[i] for i in t])
        pairs += [(s[position], target_id) for target_id, places in zip(t, paired, strict=True) for position in places]
    found = reference.most_paired(pairs)
    expected |= {i: j if target.token_bytes[j] is not None else reference.UNMAPPED for i, j in found.items()}
    assert maps.build_statistics_map(source, target, texts).tolist() == list(expected.values())


def test_neighbors_decide_between_tokens_at_the_same_distance():
    """The source's aab is equally far from the target's aa and ab, and stands after é, as ab does."""
    source = drawn.byte_pairs([(0, 0), (0, 1), (5, 1)])  # aa, ab, aab
    target = drawn.byte_pairs([(0, 0), (0, 1)])  # aa, ab
    aab, aa, ab = source.id_by_bytes[b"aab"], target.id_by_bytes[b"aa"], target.id_by_bytes[b"ab"]
    assert maps.build_nearest_map(source, target)[aab] == aa
    assert maps.build_cooccurrence_map(source, target, ["aa aa", "é ab é", "é aab é"])[aab] == ab
    assert maps.build_cooccurrence_map(source, target, ["aa aa", "é ab é"])[aab] == aa  # never seen; the lowest id wins


def test_the_token_that_is_paired_most_often_is_chosen():
    source, target = drawn.byte_pairs([(0, 1), (5, 0)]), drawn.byte_pairs([(0, 1)])  # ab, aba; ab
    aba, a, ab = source.id_by_bytes[b"aba"], target.id_by_bytes[b"a"], target.id_by_bytes[b"ab"]
    assert maps.build_statistics_map(source, target, ["aba"])[aba] == a  # paired with ab and a, once each
    assert maps.build_statistics_map(source, target, [])[aba] == maps.build_nearest_map(source, target)[aba] == ab


@pytest.fixture
def kept(tmp_path, monkeypatch) -> Path:
    """Return an empty folder where maps are kept."""
    monkeypatch.setenv("FUSELM_CACHE", str(tmp_path))
    return tmp_path / "maps"


@pytest.fixture
def pair() -> tuple[Vocabulary, Vocabulary]:
    return drawn.byte_pairs([(0, 1), (0, 5)]), drawn.byte_pairs([(2, 1)], dummy_prefix=True)


def forbid(*_):
    raise AssertionError("made again")


def test_a_map_is_built_once_for_equal_vocabularies(kept, pair, monkeypatch):
    made = maps.build_nearest_map(*pair)
    (file,) = kept.iterdir()
    monkeypatch.setattr(maps, "find_nearest_tokens", forbid)
    again = drawn.byte_pairs([(0, 1), (0, 5)]), drawn.byte_pairs([(2, 1)], dummy_prefix=True)
    assert maps.build_nearest_map(*again).tolist() == made.tolist()
    with pytest.raises(AssertionError, match="made again"):
        maps.build_nearest_map(*pair[::-1])
    with pytest.raises(AssertionError, match="made again"):
        maps.build_nearest_map(drawn.byte_pairs([(0, 1), (1, 5)]), pair[1])
    assert list(kept.iterdir()) == [file]


@pytest.mark.parametrize("damage", ["a bit", "cut off", "longer", "empty"])
def test_a_damaged_map_is_built_again(kept, pair, damage):
    made = maps.build_nearest_map(*pair)
    (file,) = kept.iterdir()
    whole = file.read_bytes()
    flipped = bytes([*whole[:-3], whole[-3] ^ 1, *whole[-2:]])
    file.write_bytes({"a bit": flipped, "cut off": whole[:-4], "longer": whole + b"\0\0\0\0", "empty": b""}[damage])
    assert maps.build_nearest_map(*pair).tolist() == made.tolist()
    assert file.read_bytes() == whole


def test_a_map_of_the_wrong_size_is_built_again(kept, pair):
    source, target = pair
    made = maps.build_nearest_map(source, target)
    (file,) = kept.iterdir()
    maps._keep_map(file, np.arange(source.size + 1))
    assert maps.build_nearest_map(source, target).tolist() == made.tolist()


def test_maps_are_built_even_where_they_cannot_be_kept(tmp_path, monkeypatch, pair):
    made = maps.build_nearest_map(*pair)
    (tmp_path / "file").touch()
    monkeypatch.setenv("FUSELM_CACHE", str(tmp_path / "file"))  # a file cannot hold a folder
    assert maps.build_nearest_map(*pair).tolist() == made.tolist()


def test_rows_without_a_token_and_tokens_without_text_are_unmapped(pair):
    source, target = pair
    ids = maps.build_nearest_map(source, target)
    assert (ids[-drawn.FILLER_ROWS :] == UNMAPPED).all()
    assert source.token_strings[0] == target.token_strings[0] == "<s>" and ids[0] == UNMAPPED

"""distillkit.py against a packer that works bit by bit, and curves of the configured form."""

import math
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fuselm.sources.interchange import distillkit

ROWS, K, VOCABULARY = 3, 11, 97


def packed(numbers: list[int], bits: int) -> list[int]:
    """Return the bytes of these numbers, one bit after the other."""
    string = "".join(f"{n:0{bits}b}" for n in numbers)
    string += "0" * (-len(string) % 8)
    return [int(string[at : at + 8], 2) for at in range(0, len(string), 8)]


def little(values: list[float], dtype: str) -> list[int]:
    if dtype == "bfloat16":
        return [b for v in values for b in struct.pack("<f", v)[2:]]
    return list(struct.pack(f"<{len(values)}{ {'float16': 'e', 'float32': 'f', 'float64': 'd'}[dtype] }", *values))


@given(st.integers(1, 17), st.integers(0, 7), st.integers(0, 5), st.integers(0, 99))
def test_bits_are_unpacked_the_highest_first(bits, count, rows, seed):
    numbers = np.random.default_rng(seed).integers(0, 1 << bits, (rows, count))
    data = np.array([packed(row, bits) for row in numbers.tolist()], np.uint8)
    data = data.reshape(rows, math.ceil(count * bits / 8))
    assert distillkit.unpack_numbers(data, bits, count).tolist() == numbers.tolist()


@pytest.mark.parametrize("exact_dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("deltas", [False, True])
def test_curves_of_the_configured_form_come_back(exact_dtype, normalised, deltas):
    """Read two exact values, then a polynomial of the rank with residuals of 3 bits and of 1."""
    bins = [
        {"scale_dtype": "float16", "element_bits": 3, "num_elements": 5},
        {"scale_dtype": "float32", "element_bits": 1, "num_elements": 2},
    ]
    compression = {
        "d": VOCABULARY,
        "k": K,
        "exact_k": 2,
        "exact_dtype": exact_dtype,
        "polynomial_terms": [0, 1, "sqrt"],
    }
    compression |= {"residual_bins": bins, "delta_encoding": deltas, "normalize_t": normalised, "term_dtype": "float32"}
    random = np.random.default_rng(0)
    data, indices, expected, ids = [], [], [], random.integers(0, VOCABULARY, (ROWS, K))
    for row in range(ROWS):
        exact, terms = [-0.5, -1.25 - row], [-2.0, -0.25, -0.125]
        steps, signs = [0, 7, 3, 4, 6], [1, 0]
        rank = [n / (K - 3) if normalised else float(n) for n in range(K - 2)]
        curve = [terms[0] + terms[1] * t + terms[2] * math.sqrt(t) for t in rank]
        for n, step in enumerate(steps):
            curve[n] += (step - 4) * 0.5
        for n, sign in enumerate(signs):
            curve[5 + n] += (2 * sign - 1) * 0.25
        values = exact + curve
        expected.append(np.cumsum(values) if deltas else values)
        line = little(exact, exact_dtype) + little(terms, "float32")
        line += little([0.5], "float16") + packed(steps, 3) + little([0.25], "float32") + packed(signs, 1)
        data.append(line)
        indices.append(packed(ids[row].tolist(), math.ceil(math.log2(VOCABULARY))))
    found_ids, found = distillkit.decompress(np.array(data, np.uint8), np.array(indices, np.uint8), compression)
    assert found_ids.tolist() == ids.tolist()
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_another_configuration_is_refused():
    compression = {"d": VOCABULARY, "k": 2, "exact_k": 2, "delta_encoding": False}
    data, ids = np.zeros((ROWS, 8), np.uint8), np.zeros((ROWS, 2), np.uint8)
    assert distillkit.decompress(data, ids, compression)[1].shape == (ROWS, 2)
    for wrong, said in [
        ({"exact_dtype": "float16"}, "rows of 8 bytes, the configuration makes 4; is it another's?"),
        ({"exact_dtype": "float64"}, "rows of 8 bytes, the configuration needs more; is it another's?"),
        ({"d": 1 << 12}, "2 bytes of ids, 2 of 12 bits are needed; is d or k another?"),
        ({"zigzag": True}, "'zigzag' is not a known option of DistillKit's compression"),
    ]:
        with pytest.raises(ValueError) as caught:
            distillkit.decompress(data, ids, compression | wrong)
        assert str(caught.value) == said
    with pytest.raises(ValueError, match="needs d, k and exact_k"):
        distillkit.check_compression({"k": 5})

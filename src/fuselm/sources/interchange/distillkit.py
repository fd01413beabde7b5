"""Read DistillKit's compressed log-probabilities: a row's largest are exact, the rest a polynomial plus residuals.

The polynomial is one of the rank. The bytes are as its `LogprobCompressor` writes them (`compressed_logprobs`,
`bytepacked_indices`), by the configuration that was saved beside them (`compression_config.yaml`). Numbers are
little-endian, and the bits of ids come highest first.
"""

from typing import Any

import numpy as np
from jaxtyping import Float, Int, UInt8
from numpy import ndarray

_WIDTHS = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
_SPECIAL = {"sqrt": np.sqrt, "exp": np.exp}
_KNOWN = {"d", "k", "exact_k", "exact_dtype", "polynomial_terms", "term_dtype", "residual_bins", "delta_encoding"}
_KNOWN |= {"error_diffusion", "normalize_t"}


def check_compression(compression: Any) -> dict[str, Any]:
    """Return the configuration with its defaults. Raises `ValueError` if it is not one."""
    if isinstance(compression, dict) and isinstance(compression.get("logprob_compressor"), dict):
        compression = compression["logprob_compressor"]
    if not isinstance(compression, dict) or not {"d", "k", "exact_k"} <= compression.keys():
        raise ValueError("no DistillKit compression configuration; it needs d, k and exact_k")
    if unknown := sorted(compression.keys() - _KNOWN):
        raise ValueError(f"'{unknown[0]}' is not a known option of DistillKit's compression")
    defaults = {"exact_dtype": "float32", "term_dtype": "float32", "polynomial_terms": None, "residual_bins": []}
    defaults |= {"delta_encoding": True, "normalize_t": False}
    checked = defaults | compression
    if wrong := _find_wrong_option(checked):
        raise ValueError(f"DistillKit's compression: {wrong}")
    return checked


def _find_wrong_option(c: dict[str, Any]) -> str | None:
    """Say which option has a value that no such file can have."""
    for name, least, most in (("d", 1, 1 << 31), ("k", 0, 1 << 24), ("exact_k", 0, 1 << 24)):
        if not _is_whole(c[name], least, most):
            return f"{name} is {c[name]!r:.40}, needs {least} to {most}"
    if c["exact_k"] > c["k"]:
        return f"exact_k is {c['exact_k']}, more than k, {c['k']}"
    for name in ("exact_dtype", "term_dtype"):
        if not isinstance(c[name], str) or c[name] not in _WIDTHS:
            return f"{name} is {c[name]!r:.40}, needs one of {', '.join(_WIDTHS)}"
    terms, bins = c["polynomial_terms"], c["residual_bins"]
    if not (terms is None or isinstance(terms, list)) or any(
        t not in _SPECIAL if isinstance(t, str) else type(t) not in (int, float) for t in terms or ()
    ):
        return f"polynomial_terms is {terms!r:.40}, needs a list of exponents"
    if not isinstance(bins, list):
        return f"residual_bins is {bins!r:.40}, needs a list"
    for residual in bins:
        if not isinstance(residual, dict) or residual.get("scale_dtype") not in list(_WIDTHS):
            return f"the residual bin {residual!r:.40} has no known scale_dtype"
        if not _is_whole(residual.get("num_elements"), 0, c["k"]) or not _is_whole(residual.get("element_bits"), 1, 32):
            return f"the residual bin {residual!r:.60} needs num_elements and element_bits"
    if sum(residual["num_elements"] for residual in bins) > c["k"] - c["exact_k"]:
        return "residual_bins have more elements than there are inexact entries"
    return None


def _is_whole(given: Any, least: int, most: int) -> bool:
    return type(given) is int and least <= given <= most


def decompress(
    packed: UInt8[ndarray, "rows bytes"], indices: UInt8[ndarray, "rows index_bytes"], compression: dict[str, Any]
) -> tuple[Int[ndarray, "rows k"], Float[ndarray, "rows k"]]:
    """Return each row's ids and log-probabilities. Raises `ValueError` if the number of bytes is not as configured."""
    c = check_compression(compression)
    k, exact_k, at, rows = c["k"], c["exact_k"], 0, len(packed)

    def take(count: int) -> UInt8[ndarray, "rows count"]:
        nonlocal at
        if rows and at + count > packed.shape[1]:
            raise ValueError(f"rows of {packed.shape[1]} bytes, the configuration needs more; is it another's?")
        at += count
        return packed[:, at - count : at]

    exact = _read_floats(take(exact_k * _WIDTHS[c["exact_dtype"]]), c["exact_dtype"])
    rest = np.zeros((rows, k - exact_k), np.float32)
    if terms := c["polynomial_terms"]:
        coefficients = _read_floats(take(len(terms) * _WIDTHS[c["term_dtype"]]), c["term_dtype"])
        rest += coefficients @ _compute_powers(terms, k - exact_k, c["normalize_t"]).T
    begin = 0
    for residual in c["residual_bins"]:
        count, bits = residual["num_elements"], residual["element_bits"]
        scale = _read_floats(take(_WIDTHS[residual["scale_dtype"]]), residual["scale_dtype"])
        steps = unpack_numbers(take((count * bits + 7) // 8), bits, count).astype(np.float32)
        steps = steps * 2 - 1 if bits == 1 else steps - 2 ** (bits - 1)
        rest[:, begin : begin + count] += steps * scale
        begin += count
    if rows and at != packed.shape[1]:
        raise ValueError(f"rows of {packed.shape[1]} bytes, the configuration makes {at}; is it another's?")
    logprobs = np.concatenate([exact, rest], axis=1)
    if c["delta_encoding"]:
        logprobs = np.cumsum(logprobs, axis=1, dtype=np.float32)
    return unpack_numbers(indices, int(np.ceil(np.log2(c["d"]))), k), logprobs


def unpack_numbers(packed: UInt8[ndarray, "rows bytes"], bits: int, count: int) -> Int[ndarray, "rows count"]:
    """Read numbers of `bits` bits each, the highest bit first."""
    if 8 * packed.shape[1] < bits * count and len(packed):
        raise ValueError(f"{packed.shape[1]} bytes of ids, {count} of {bits} bits are needed; is d or k another?")
    flat = np.unpackbits(packed, axis=1)[:, : bits * count].reshape(len(packed), count, bits).astype(np.int64)
    return flat @ (1 << np.arange(bits - 1, -1, -1, dtype=np.int64))


def _compute_powers(terms: list[int | str], count: int, normalised: bool) -> Float[ndarray, "count terms"]:
    rank = np.linspace(0, 1, count, dtype=np.float32) if normalised else np.arange(count, dtype=np.float32)
    return np.stack([_SPECIAL[t](rank) if isinstance(t, str) else rank**t for t in terms], axis=1)


def _read_floats(data: UInt8[ndarray, "rows bytes"], dtype: str) -> Float[ndarray, "rows count"]:
    data = np.ascontiguousarray(data)
    if dtype == "bfloat16":
        return (data.view("<u2").astype(np.uint32) << 16).view(np.float32)
    return data.view(f"<f{_WIDTHS[dtype]}").astype(np.float32)

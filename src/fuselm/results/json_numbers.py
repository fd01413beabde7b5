"""Replace the numbers that JSON does not have."""

import math


def replace_nonfinite(value):
    """Return the same nested dictionaries and lists with None in place of infinities and NaN."""
    if isinstance(value, dict):
        return {k: replace_nonfinite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [replace_nonfinite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

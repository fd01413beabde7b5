"""List the retention policies: what each keeps, and its options with their defaults. docs/store.md says why."""

POLICIES: dict[str, dict[str, float]] = {
    "threshold": {"threshold": 0.0065, "top_k": 64},
    "top_k": {"top_k": 64},
    "nucleus": {"mass": 0.9, "top_k": 64},
    "sampled": {"draws": 28},
}
CUTS = tuple(name for name in POLICIES if name != "sampled")  # those that a store can be cut by afterwards
POLICY_DESCRIPTIONS: dict[str, str] = {
    "threshold": "Keep the entries with at least `threshold` probability, at most `top_k` of them.",
    "top_k": "Keep the `top_k` most probable entries.",
    "nucleus": "Keep the most probable entries that together reach `mass`, at most `top_k` of them.",
    "sampled": "Keep the entries with at least 1/`draws` probability, and draw from the others without bias.",
}

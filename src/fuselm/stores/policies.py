"""List the retention policies, each with its options and their defaults. docs/store.md says how they were chosen."""

POLICIES: dict[str, dict[str, float]] = {
    "threshold": {"threshold": 0.0065, "top_k": 64},
    "top_k": {"top_k": 64},
    "nucleus": {"mass": 0.9, "top_k": 64},
    "sampled": {"draws": 28},
}

"""Compare runs: read a study file, train its trials, and compute what its pages show."""

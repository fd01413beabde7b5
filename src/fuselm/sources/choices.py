"""Name the engines that run a source over the documents, and say what each does."""

ENGINES: dict[str, str] = {
    "local": "Run the model in the process of the run.",
    "ray": "Run the model in several processes: on the cluster at RAY_ADDRESS, or on this machine without one.",
}

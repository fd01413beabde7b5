"""Name what sources can be asked for: engines that run them over the documents, and layouts of others' files.

`interchange.foreign.LAYOUTS` has what reads and writes each layout; docs/store.md describes them.
"""

ENGINES: dict[str, str] = {
    "local": "Run the model in the process of the run.",
    "vllm": "Run the model in vLLM, on this machine's GPUs, with policy `threshold` or `top_k`. Unproved on a GPU.",
    "ray": "Run the model in several processes: on the cluster at RAY_ADDRESS, or on this machine without one.",
}
CHOICES: dict[str, str] = {
    "mixture": "Take the answer that is the most probable per byte to all sources that run here, mixed equally.",
    "majority": "Take an answer that says what most of them say, in short.",
}
LAYOUTS = ("vllm", "openai", "axolotl", "distillkit")

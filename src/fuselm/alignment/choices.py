"""Name the alignment methods, and say what each does. `aligner.METHODS` has the function of each."""

METHODS: dict[str, str] = {
    "span": "Follow the bytes through both tokenizations, so that every target token gets the source's information.",
    "branches": "Follow the bytes as `span` does, and treat the tokens that did not come as the one that came.",
    "mined": "Pair tokens one to one by minimum edit distance (MinED), as the FuseLLM paper does.",
    "exact": "Pair only tokens that stand for the same bytes.",
    "cooccurrence": "Pair tokens as `mined` does, and break ties by the company that tokens keep in the training text.",
    "statistics": "Pair tokens that stand at the same places of the training text most often, as FuseChat does.",
}
LEARNED = ("cooccurrence", "statistics")  # methods that learn from all texts before they align any

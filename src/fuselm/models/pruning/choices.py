"""Name what can be removed from a model and how it is scored, and say what each means."""

STRUCTURES: dict[str, str] = {
    "mlp": "Remove channels of the MLPs.",
    "groups": "Remove key-value heads, each with its query heads.",
    "layers": "Remove whole layers.",
    "hidden": "Remove channels of the hidden width, from embeddings to output.",
}
EXACT_SIZES = {"layers": "layers", "mlp": "intermediate_size", "groups": "kv_heads", "hidden": "hidden_size"}
IMPORTANCES: dict[str, str] = {
    "param_first": "Add up |w g|: the first order of Taylor's expansion of the loss, for each weight.",
    "param_second": "Add up |w² a|, where a is the mean of squared gradients of single texts.",
    "param_mix": "Add up |w g - w² a / 2|: both orders.",
    "activations": "Take the mean size of a unit's output; of a layer, how far it turns what it reads.",
    "magnitude": "Add up w².",
    "random": "Draw at random, to compare with.",
}
BY_GRADIENT = ("param_first", "param_second", "param_mix")
BY_TEXT = (*BY_GRADIENT, "activations")  # these read calibration texts

"""Name what training can be asked for, and say what each choice does.

`objective.DIVERGENCES`, `objective.CONFIDENCES` and `target_training.SCHEDULES` have what implements them.
"""

METHODS: dict[str, str] = {
    "clm": "Train on the text alone; this is the baseline.",
    "fused": "Train on the fused rows and the text.",
}
DIVERGENCES: dict[str, str] = {
    "forward_kl": "Use KL(fused || target): the target covers all that the fused rows hold.",
    "reverse_kl": "Use KL(target || fused): the target avoids what the fused rows find improbable.",
    "jsd": "Use the generalised Jensen-Shannon divergence with the mixture share `jsd_beta`.",
}
CONFIDENCES: dict[str, str] = {
    "none": "Trust all fused rows alike.",
    "expected": "Trust a row by the probability that it expects to give the next token: its sum of squares.",
    "gold": "Trust a row by the probability that it gives the token that comes.",
}
TAILS: dict[str, str] = {
    "bucket": "Compare the ids that were not kept as one outcome.",
    "renormalise": "Scale the kept entries to sum to 1, as the paper does, so that all other ids get nothing.",
}
SCHEDULES: dict[str, str] = {
    "cosine": "Fall along half a cosine to 0.",
    "linear": "Fall linearly to 0.",
    "constant": "Stay at the full rate.",
    "inverse_sqrt": "Fall with the inverse square root of the step.",
}
PRECISIONS: dict[str, str] = {
    "auto": "Use the faster of the two on the machine where the run begins.",
    "bf16": "Compute in bfloat16 by autocast, with weights in float32.",
    "float32": "Compute in float32.",
}
DECAYS: dict[str, str] = {
    "zero": "Pull weights towards zero, as AdamW does.",
    "start": "Pull weights towards what they were before training, so that less is forgotten.",
}
LEARNED: dict[str, str] = {
    "assistant": "Learn what the assistant says, and where its turns end.",
    "all": "Learn all tokens, those of users and of the chat template among them. Only responses have fused rows.",
}
TRACKERS: dict[str, str] = {
    "tensorboard": "Write event files into the `logs` folder of each training.",
    "wandb": "Report to Weights & Biases; needs `pip install 'fuselm[wandb]'`.",
}
QUANTIZERS: dict[str, str] = {
    "nf4": "Hold the weights in the 4-bit NormalFloat of QLoRA.",
}

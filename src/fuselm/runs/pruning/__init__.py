"""Prune a model into a folder that `from_pretrained` loads: `options` say how, `plan` what comes out, `prune` does it.

`fuselm.models.pruning` finds what belongs together, scores it and removes it.
"""

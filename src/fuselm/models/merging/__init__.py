"""Merge the weights of models that share an architecture into one model.

`methods` names the ways to merge tensors and what each takes; `differences`, `spherical` and `scores` have them, as
functions of `blocks` of rows, so that no tensor need be in memory whole.
"""

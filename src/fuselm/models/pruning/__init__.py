"""Remove structure from a model: MLP channels, key-value groups, layers, hidden channels.

`shapes` and `coupling` find which slices of tensors belong together, `twins` proves it, `importance` scores units, and
`removal` makes the smaller model. None of it needs a list of architectures.
"""

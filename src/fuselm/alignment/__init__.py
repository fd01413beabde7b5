"""Bring a source's distributions into the target's tokens, and measure what of them arrives.

`aligner` has the methods and writes aligned stores. `span`, the default, follows a text's bytes: `spelling` and
`continuation` say how the target spells the source's tokens, `stretches` which parts of a text both spell. The papers'
methods pair positions (`mined`) and map ids (`maps`, `nearest`). `fidelity`, `spans`, `candidates` and `conditionals`
measure what arrives.
"""

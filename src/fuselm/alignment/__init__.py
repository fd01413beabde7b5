"""Bring a source's distributions into the target's tokens, and measure what of them arrives.

`aligner` has the methods and writes aligned stores. `span` follows a text's bytes: `spelling` and
`continuation` spell the source's tokens in the target's, `next_tokens` holds the tokens that may come next, and
`stretches` finds the parts of a text that both models spell. The papers' methods pair positions (`mined`) and map ids
(`maps`, `nearest`). `fidelity`, `span_losses`, `decoding_check` and `conditionals` measure what arrives.
"""

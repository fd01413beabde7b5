"""Describe models and their tokenizers, whatever they are, and read their logits.

- Finding a model: `model` (locate and load one), `hub`, `checkpoints`, `gguf_files`, `gguf_claims`, `precision`,
  `probe`.
- Tokenizers: `tokenizer_files`, `vocabulary` (the bytes of each id), `token_strings`, `token_bytes`, `twins`,
  `segmentation` (a text as tokens) and `bpe` (merges, compiled).
- Logits: `forward` (documents in, hidden states and logits out) and `scan` (what is taken from a row, compiled).
"""

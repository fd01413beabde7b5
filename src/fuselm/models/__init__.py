"""Describe models and their tokenizers, whatever they are, and read their logits.

- Finding a model: `locating`, with `hub`, `gguf_files` and `checkpoints`.
- Loading one: `loading`, with `config_claims` and `gguf_claims` (what files claim), `precision` and `probe`.
- Tokenizers: `tokenizer_files`, `vocabulary` (the bytes of each id), `tokenizer_pipeline`, `token_strings`,
  `token_bytes`, `sentencepiece_check`, `segmentation` (a text as tokens) and `bpe` (merges, compiled).
- Logits: `forward` (documents in, hidden states and logits out) and `scan` (what is taken from a row, compiled).
"""

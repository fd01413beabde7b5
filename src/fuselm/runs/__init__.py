"""Read run files, and make the stages of a run in their order.

`config` has every option, `pipeline` the stages and their order, `stages` one module for each, with its recipe, its
build and its estimate. `session` runs them from Python, `plan` estimates what they will take, `studies` compares runs.
"""

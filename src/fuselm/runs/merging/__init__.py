"""Merge models by a file that says how: `recipe` reads it, `merge` checks the models and writes the result.

`fuselm.models.merging` has the methods. Those that are mergekit's alone are handed to it, where it is installed.
"""

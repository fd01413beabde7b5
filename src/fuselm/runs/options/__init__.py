"""Describe every option of a run file and of a study file: its type, its default and what it does.

`files` reads them from YAML. `fuselm.runs.config` puts the sections of a run together.
"""

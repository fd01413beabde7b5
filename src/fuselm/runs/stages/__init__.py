"""Hold one module for each stage of a run: its recipe, its build, its estimate and its calibration.

A stage's module ends with `STAGE`, which `runs.pipeline.STAGES` lists in order. `corpus` reads and splits texts,
`write` lets sources write more, `capture` keeps sources' distributions, `align` brings them to the target's vocabulary,
`fuse` makes one of several, `train` trains the target, `evaluate` scores models, `report` shows the results.
"""

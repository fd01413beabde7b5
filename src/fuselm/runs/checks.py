"""Try what the steps of a run need, before the first of them begins: servers, stores, training, models."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fuselm.runs.options.sources import LocalSourceOptions
from fuselm.system import processes
from fuselm.system.remote_paths import open_path
from fuselm.training.choices import METHODS

if TYPE_CHECKING:
    from fuselm.runs.pipeline import Pipeline
    from fuselm.runs.steps import Step

CHECKED = {"trackers", "lora_rank", "lora_modules", "quantize"}  # options of training that may need what is not there


def check_needs(pipeline: "Pipeline", steps: "Sequence[Step]") -> None:
    """Try everything that these steps need. Raises `ValueError` if something cannot do what is asked of it."""
    inputs, run = pipeline.inputs, pipeline.run
    for name in sorted({step.name for step in steps if step.stage.asks_servers} & inputs.servers.keys()):
        from fuselm.sources.servers.connection import check_server

        check_server(inputs.servers[name], inputs.load_source_vocabulary(name), top_k=run.capture_options(name).top_k)
    if any(step.stage.fills_stores for step in steps):
        _check_stores(pipeline)
    if run.capture.engine == "vllm" and any(step.stage.fills_stores for step in steps):
        from fuselm.sources import vllm_engine

        vllm_engine.check_installed()
    if any(step.stage.trains for step in steps):
        from fuselm.training import needs

        for method in METHODS:
            options = run.train.for_method(method).model_dump(include=CHECKED)
            needs.check_training(inputs.target, **options)
    if any(step.stage.merges for step in steps):
        from fuselm.runs.stages import merge

        merge.check_models(pipeline)
    if processes.rank() == 0 and any(step.stage.loads_models for step in steps):
        from fuselm.models import probe

        models = pipeline.local_models.items()
        probe.try_models([(model, pipeline.precision.choose_dtype(role, model)) for role, model in models])


def _check_stores(pipeline: "Pipeline") -> None:
    """Read all rows of the user's stores that are not known to be sound. Raises `ValueError` if one is not."""
    from fuselm.stores import store

    for name, options in pipeline.run.sources.items():
        if isinstance(options, LocalSourceOptions) and options.store is not None:
            size = pipeline.inputs.sources[name].output_size
            store.Store(open_path(options.store), vocabulary_size=size).check()

"""Train the target: on the text alone (`clm`, the baseline), and on the fused distributions (`fused`)."""

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open

from fuselm.models.locating import Model
from fuselm.runs import config, row_fusion
from fuselm.runs.estimates import Estimate, estimate_step
from fuselm.runs.stage import Stage, TokenCounts
from fuselm.runs.stages import capture, corpus, fuse, write
from fuselm.system import manifest
from fuselm.system.manifest import Recipe
from fuselm.system.progress import Progress
from fuselm.system.remote_paths import RemotePath
from fuselm.system.remote_stages import remove_folder

if TYPE_CHECKING:
    from fuselm.runs.calibration import Calibration
    from fuselm.runs.pipeline import Pipeline
    from fuselm.runs.steps import Step

FUSED_ONLY_OPTIONS = ("lambda_final", "confidence", "divergence", "jsd_beta", "temperature", "tail")
NOT_IN_KEYS = ("trackers", "loader_workers")  # options that change nothing of what is trained
WEIGHTS = "model"  # folder of a trained model in its stage's folder
STATE_BYTES = 12  # a parameter in a checkpoint: float32 weight and two moments
MEAN_BYTES = 4  # more for the mean of the weight, where there is one, and for its start where it decays to that
CHECKPOINTS = 3  # the best, the last, and the one being written


def list_trainings(pipeline: "Pipeline") -> list[str]:
    """Return the names of what is trained: the methods, or with `fuse.pairwise` the copies in place of `fused`."""
    return ["clm", *(pipeline.inputs.copies or [config.FUSED])]


def make(pipeline: "Pipeline") -> dict[str, Path]:
    """Make every training, and return the folder of each one's best model."""
    names = list_trainings(pipeline)
    fuse.declare_all(pipeline)
    folders = {name: _declare_rates(pipeline, name) for name in names}
    on_rows = [folder for name in names if name != "clm" for folder in folders[name]]
    if pipeline.steps.makes_folders and not all(map(manifest.is_finished, on_rows)):
        fuse.make(pipeline)  # before hours of training on the text alone, as a model or server may fail
    return {name: train_method(pipeline, name, needs_weights=name not in pipeline.inputs.copies) for name in names}


def train_method(pipeline: "Pipeline", method: str, *, needs_weights: bool = True) -> Path:
    """Train with each of a method's learning rates, and return the folder of the best on the development split.

    `method` is `clm`, `fused`, or the name of a copy of the target, which is trained as `fused` is.

    A model whose weights were dropped is trained again if the caller `needs_weights`.
    """
    folders = [pipeline.steps.make(folder) for folder in _declare_rates(pipeline, method)]
    if not all(map(manifest.is_finished, folders)):  # in a dry run
        return folders[0]
    scores = [manifest.read(folder)["counts"]["dev_bits_per_byte"] for folder in folders]
    best = scores.index(min(scores))
    if needs_weights and pipeline.steps.makes_folders and not (folders[best] / WEIGHTS).is_dir():
        manifest.reopen_stage(folders[best])
        pipeline.steps.make(folders[best])
    return folders[best]


def drop_weights(folder: Path) -> None:
    """Delete the weights of a training's model, whole or not at all; its numbers stay."""
    if isinstance(folder, RemotePath):
        remove_folder(folder / WEIGHTS)
        return
    dropped = folder / ".dropped"
    shutil.rmtree(dropped, ignore_errors=True)
    if (folder / WEIGHTS).is_dir():
        (folder / WEIGHTS).rename(dropped)
        shutil.rmtree(dropped)


def collect_settings(pipeline: "Pipeline", method: str, rate: float, *, precision: str | None = None) -> dict[str, Any]:
    """Return the fields of `TrainingSettings` for one training; `precision` replaces the run's own."""
    options = pipeline.run.train.for_method(method).model_dump(exclude={"learning_rate", "clm"})
    options |= {"learning_rate": rate, "seed": pipeline.run.seed}
    options["precision"] = precision or pipeline.precision.choose_training(is_dry_run=not pipeline.steps.makes_folders)
    if method == "clm":
        fields = config.TrainOptions.model_fields
        options |= {name: fields[name].default for name in FUSED_ONLY_OPTIONS} | {"lambda_clm": 1.0}
    return options


def _declare_rates(pipeline: "Pipeline", method: str) -> list[Path]:
    """Return the folder of each of a method's learning rates; train nothing."""
    return [_declare_rate(pipeline, method, rate) for rate in pipeline.run.train.for_method(method).learning_rates]


def _declare_rate(pipeline: "Pipeline", method: str, rate: float) -> Path:
    inputs, copy = pipeline.inputs, method if method in pipeline.inputs.copies else None
    fused = None if method == "clm" else fuse.declare(pipeline, copy)
    settings = collect_settings(pipeline, method, rate)
    if fused is None:
        texts = {"corpus": corpus.identify(pipeline)}
    else:
        texts = write.identify_fusion_documents(pipeline) | {"fused": pipeline.steps.get_key(fused)}
    recipe = Recipe(
        stage=STAGE.name,
        parameters={
            "method": "clm" if fused is None else config.FUSED,
            **{name: value for name, value in settings.items() if name not in NOT_IN_KEYS},
        },
        inputs={
            "model": inputs.target.fingerprint,
            "tokenizer": inputs.target.tokenizer_fingerprint,
            **inputs.identify_chat("target"),
            **texts,
        },
    )

    def build(out: Path, shown: Progress) -> dict:
        from fuselm.stores import store
        from fuselm.training import batches, reading, target_training

        if fused is None:
            rows, documents = None, pipeline.documents.select("train")
        elif pipeline.run.fuse.when == "load":
            rows = row_fusion.open_row_fusion(pipeline, fused)
            documents = rows.choose_documents(write.fusion_documents(pipeline))
        else:
            rows = store.Store(fused, keep_tokens=batches.KEPT_TOKENS, vocabulary_size=inputs.target.output_size)
            documents = write.fusion_documents(pipeline)
            documents = documents.take(rows.find_documents(reading.list_ids(documents)) >= 0)
        return target_training.train_target(
            inputs.target,
            inputs.target_vocabulary,
            documents,
            pipeline.documents.select("dev"),
            out,
            fused=rows,
            settings=target_training.TrainingSettings(**settings),
            progress=shown,
            reader=inputs.target.tokenizer_fingerprint,
        )

    title = f"{method if copy is None else f'a copy on {copy}'} at {rate:g}"
    needed = [] if fused is None else [fused, *write.declare(pipeline).values()]
    if fused is not None and pipeline.run.fuse.when == "load":
        names = inputs.list_fused_sources(copy)
        needed += [path for name, path in capture.declare(pipeline).items() if name in names]
    return pipeline.steps.declare(STAGE, method, recipe, build, title, inputs=needed, together=True)


def estimate(pipeline: "Pipeline", step: "Step", tokens: TokenCounts) -> Estimate:
    """Estimate the tokens of all passes, the model, and the checkpoints while it is trained."""
    target, options = pipeline.inputs.target, pipeline.run.train.for_method(step.name)
    given = tokens[target.tokenizer_fingerprint]["train"]
    read = round(given * write.compute_text_ratio(pipeline)) if step.name != "clm" else given
    state = STATE_BYTES + _count_more_bytes(options)
    return estimate_step(
        step,
        tokens=read * options.passes,
        disk=target.parameters_bytes,
        scratch=CHECKPOINTS * state * count_trained_parameters(target, options.lora_rank),
    )


def count_trained_parameters(target: Model, lora_rank: int | None) -> int:
    """Return how many parameters are trained at most: all of 16 bits, or adapters on all matrices."""
    files = sorted(target.folder.glob("*.safetensors"))
    if lora_rank is None or not files:
        return target.parameters_bytes // 2
    shapes: list[list[int]] = []
    for file in files:
        with safe_open(file, "np") as weights:
            shapes += [weights.get_slice(name).get_shape() for name in weights.keys()]  # noqa: SIM118
    return sum(lora_rank * sum(shape) for shape in shapes if len(shape) == 2)


def calibrate(calibration: "Calibration", step: "Step", row: Estimate) -> Estimate:
    """Add the time and memory of training, which are those of a batch for each, and of what is done beside it.

    The development split is scored before training and at each evaluation, which writes a checkpoint too. At the end
    the best checkpoint is read, the model written, loaded again and scored on a sample.
    """
    from fuselm.training.reload import SAMPLE_TOKENS

    measured, reading = calibration.time_training(step.name), calibration.time_reading("")
    if measured is None or reading is None:
        return row
    target, options = calibration.pipeline.inputs.target, calibration.pipeline.run.train.for_method(step.name)
    parameters = count_trained_parameters(target, options.lora_rank)
    evaluations = options.passes * options.evaluations_per_pass
    dev = calibration.count_tokens("dev")
    scored = (1 + evaluations) * dev + 2 * min(dev, SAMPLE_TOKENS)
    more = _count_more_bytes(options)
    written = evaluations * (STATE_BYTES + more) * parameters + target.parameters_bytes
    seconds = row.tokens / measured.speed + scored / reading.speed
    seconds += 3 * measured.loading + calibration.time_writing(written)
    return replace(row, seconds=seconds, memory=measured.memory + more * parameters)


def _count_more_bytes(options: config.TrainOptions) -> int:
    """Return the bytes that a checkpoint has for each parameter, beside its weight and moments."""
    return MEAN_BYTES * (bool(options.average) + (options.decay_towards == "start"))


def count_passes(run: config.RunOptions, name: str, written: Mapping[str, float]) -> float:
    """Return the size of all text of all passes, for each byte of the training documents."""
    return (1.0 + sum(written.values()) if name != "clm" else 1.0) * run.train.for_method(name).passes


STAGE = Stage(
    name="train",
    make=make,
    estimate=estimate,
    calibrate=calibrate,
    count_passes=count_passes,
    loads_models=True,
    trains=True,
)

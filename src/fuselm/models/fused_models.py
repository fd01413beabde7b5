"""Find the fused model in a run's folder, so that the folder can be named wherever a model can."""

from pathlib import Path

from fuselm.system import progress

MODEL = "model"  # the folder of the fused model in a run's folder
_OPTIONS, _CONFIG = "config.yaml", "config.json"


def find_model_folder(spec: str, folder: Path) -> Path:
    """Return the folder of the fused model if `folder` is a run's, and `folder` itself if not.

    Raises `ValueError` if the run has not made its fused model yet.
    """
    if (folder / _CONFIG).exists() or not (folder / _OPTIONS).is_file():
        return folder
    fused = folder / MODEL
    if not (fused / _CONFIG).is_file():
        raise ValueError(
            f"{spec}: a run without a fused model yet; finish it with `fuselm run {folder / _OPTIONS}`, or name a model"
        )
    progress.note(f"{spec} is a run: reading its fused model, {fused}")
    return fused

"""Push the fused model of a finished run, with its card, to the Hugging Face Hub."""

from pathlib import Path

from fuselm.models.locating import locate_model
from fuselm.results.run_result import load_result
from fuselm.runs import config
from fuselm.runs.publish import RECORD
from fuselm.system import hub_repositories, local_copies, manifest
from fuselm.system.remote_paths import open_path


def push_model(run: Path, repository: str, *, private: bool) -> str:
    """Send the model that a run published to a model repository of the Hub, and return the repository's address.

    `run` is the run's folder, or its run file. Only files that fuselm wrote are sent; others in the model's folder are
    the user's. Raises `ValueError` if the run is not finished, its model is not whole, or the Hub refuses.
    """
    hub_repositories.check_name(repository)
    folder = open_path(config.load(run).output) if run.is_file() else run
    model = local_copies.fetch_folder(load_result(folder).model)
    record = manifest.read_json(folder / RECORD, drop=folder / RECORD)
    names = record.get("model") if isinstance(record, dict) else None
    if not isinstance(names, list) or (missing := [name for name in names if not (model / name).is_file()]):
        lacks = f"has no {missing[0]}" if isinstance(names, list) else "is not recorded"
        raise ValueError(f"{model}: {lacks}; run the same command of `fuselm run` again")
    locate_model(str(model))  # checks that it is whole
    files = {name: model / name for name in names}
    return hub_repositories.upload_files(repository, "model", files, private=private, message="Add a fused model")

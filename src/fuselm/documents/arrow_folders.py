"""Find the rows in folders that the `datasets` library saved: Arrow files, beside notes and caches in other files."""

import json
from pathlib import Path

ARROW = (".arrow",)
STATE, INFO, SPLITS = "state.json", "dataset_info.json", "dataset_dict.json"


def is_saved_dataset(folder: Path) -> bool:
    """Tell whether `save_to_disk` wrote a folder, of a dataset or of one with several splits."""
    return (folder / SPLITS).is_file() or ((folder / STATE).is_file() and (folder / INFO).is_file())


def holds_rows(file: Path) -> bool:
    """Tell whether a file below a folder of texts has rows, and is no note or cache of a saved dataset.

    Arrow files have rows only if they are listed as those of a saved dataset. Raises `ValueError` if its list is
    damaged.
    """
    if file.suffix.lower() not in ARROW:
        return not (file.name in (STATE, INFO, SPLITS) and is_saved_dataset(file.parent))
    return is_saved_dataset(file.parent) and file.name in _list_row_files(file.parent)


def name_dataset(file: Path) -> str | None:
    """Return the name of the folder that a dataset was saved to, without that of its split; None for other files."""
    folder = file.absolute().parent
    if file.suffix.lower() not in ARROW or not is_saved_dataset(folder):
        return None
    return folder.parent.name if (folder.parent / SPLITS).is_file() else folder.name


def _list_row_files(folder: Path) -> list[str]:
    state = folder / STATE
    try:
        return [entry["filename"] for entry in json.loads(state.read_text(encoding="utf-8"))["_data_files"]]
    except (OSError, ValueError, LookupError, TypeError):
        raise ValueError(f"{state}: damaged; save the dataset again with `save_to_disk`") from None

"""Copy the files that belong beside a trained model's weights: its target's tokenizer, templates and licence.

A target's folder may hold anything else: states of trainings, logs, notes. They are not copied.
"""

import json
import shutil
from fnmatch import fnmatch
from pathlib import Path

from fuselm.system import atomic_files
from fuselm.system.public_names import name_publicly

COMPANIONS = (
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "chat_template*",
    "*.jinja",
    "generation_config.json",
    "LICEN[CS]E*",
    "NOTICE*",
    "USE_POLICY*",
)
NAMES = ("name_or_path", "_name_or_path")  # libraries note here the folder that a file was loaded from


def copy_companions(target: Path, out: Path) -> None:
    """Copy the target's companions that `out` lacks, byte for byte except for paths of this machine."""
    for path in sorted(target.iterdir()):
        if path.is_file() and _is_companion(path.name) and not (out / path.name).exists():
            shutil.copyfile(path, out / path.name)
    for path in sorted(out.glob("*config.json")):
        _replace_local_paths(path)


def _is_companion(name: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in COMPANIONS)


def _replace_local_paths(path: Path) -> None:
    """Replace the paths that libraries note in a configuration by public names."""
    try:
        settings = json.loads(path.read_bytes())
    except ValueError:
        return
    if not isinstance(settings, dict):
        return
    public = {name: name_publicly(settings[name]) for name in NAMES if isinstance(settings.get(name), str)}
    if any(settings[name] != value for name, value in public.items()):
        atomic_files.write_text(path, json.dumps(settings | public, indent=2, ensure_ascii=False) + "\n")

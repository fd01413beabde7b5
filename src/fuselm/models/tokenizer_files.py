"""Read a model's tokenizer, and find the token that a text begins with: the tokenizer's own, or else BOS or EOS."""

import json
import logging
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from fuselm.models.checkpoints import NEEDED, read_json
from fuselm.models.sentencepiece_check import check_twins
from fuselm.system import fingerprints
from fuselm.system.errors import is_foreign, summarize_error

SpecialTokens = dict[str, str | int | None]

MOST_GROWTH = 2000  # normalizers may make so many bytes of one
_OLDER_FILES = ("*.model", "vocab.json", "merges.txt", "vocab.txt", "added_tokens.json")
_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json")
_UNICODE_FORMS = {
    "NFKD": 18,
    "NFKC": 18,
    "NFD": 4,
    "NFC": 3,
    "Precompiled": 18,
    "Nmt": 2,
    "Lowercase": 3,
    "ByteLevel": 2,
}
_log = logging.getLogger("fuselm")


def load_fast_tokenizer(folder: Path) -> Tokenizer:
    """Return the folder's fast tokenizer, which neither truncates nor pads.

    Raises `ValueError` if there is none, or if a SentencePiece file beside it has other pieces.
    """
    try:
        if (folder / "tokenizer.json").is_file():
            tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        else:
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            ).backend_tokenizer
    except BaseException as error:  # the tokenizers library raises nothing narrower, and panics
        if not is_foreign(error):
            raise
        raise ValueError(f"{folder}: cannot load a fast tokenizer ({summarize_error(error)}); {NEEDED}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    check_twins(folder, tokenizer)
    return tokenizer


def read_special_tokens(folder: Path, config: dict[str, Any]) -> SpecialTokens:
    """Return BOS and EOS as the folder's files name them, by a string or an id; None where there is none.

    The first file that mentions one decides, even if it says null, as Qwen's does of BOS.
    """
    files = {path: read_json(path) for name in _SETTINGS if (path := folder / name).is_file()}
    files[folder / "config.json"] = {f"{n}_token": config.get(f"{n}_token_id") for n in ("bos", "eos")}
    choice: SpecialTokens = {}
    for name in ("bos_token", "eos_token"):
        where, value = next((path, file[name]) for path, file in files.items() if name in file)
        value = next(iter(value), None) if isinstance(value, list) else value
        spelled = isinstance(value, dict)
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, bool) or not isinstance(value, str | None if spelled else str | int | None):
            raise ValueError(f"{where}: {name} is a {type(value).__name__}, needs a token or its id; correct the file")
        choice[name] = value
    return choice


def identify_tokenizer(folder: Path, config: dict[str, Any]) -> tuple[str, int]:
    """Return a hash of all that decides how text is tokenized, and the token that a text begins with.

    That token is the one that the tokenizer itself puts before a text, if it puts one; else BOS, or else EOS.
    """
    choice = read_special_tokens(folder, config)
    files, settings = [folder / "tokenizer.json"], [json.dumps(choice, sort_keys=True)]
    if not files[0].is_file():
        files = sorted(path for pattern in _OLDER_FILES for path in folder.glob(pattern))
        if files:  # transformers makes a fast tokenizer of them by a class that the settings name
            files += [path for name in _SETTINGS if (path := folder / name).is_file()]
            settings.append(str(config.get("model_type")))
    if not files:
        raise ValueError(f"{folder}: no tokenizer (tokenizer.json, tokenizer.model, vocab.json or vocab.txt); {NEEDED}")
    known = digest_files(files, *settings)
    front, usual = fingerprints.recall_or_compute(f"begins {known}", lambda: _find_beginning(folder, choice))
    if len(front) == 1:
        return known if front[0] == usual else digest_files(files, *settings, f"front {front[0]}"), front[0]
    if usual is None:
        raise ValueError(
            f"{folder}: the tokenizer has neither a BOS nor an EOS token to begin a text with; "
            "name one in tokenizer_config.json (bos_token)"
        )
    if front:
        ids = ", ".join(map(str, front))
        _log.warning("%s: its tokenizer puts tokens %s before a text; fuselm begins one with %d", folder, ids, usual)
    return known, usual


def digest_files(files: list[Path], *settings: str) -> str:
    """Return a hash of settings, and of the files' names and contents."""
    return fingerprints.hash_lines([*settings, *(f"{file.name} {fingerprints.hash_file_once(file)}" for file in files)])


def _find_beginning(folder: Path, choice: SpecialTokens) -> tuple[list[int], int | None]:
    """Return the special tokens that the tokenizer puts before a text, and BOS, or else EOS.

    Raises `ValueError` if the tokenizer cannot read a text.
    """
    path = folder / "tokenizer.json"
    if path.is_file():
        pipeline = read_json(path)
        for part in ("normalizer", "decoder"):
            _check_growth(path, part, pipeline.get(part))
    tokenizer = load_fast_tokenizer(folder)
    try:
        encoding = tokenizer.encode("a b 1", add_special_tokens=True)
        usual = None
        for value in (choice["bos_token"], choice["eos_token"]):
            usual = (tokenizer.token_to_id(value) if isinstance(value, str) else value) if usual is None else usual
    except BaseException as error:  # as in `load_fast_tokenizer`
        if not is_foreign(error):
            raise
        raise ValueError(f"{folder}: the tokenizer cannot read a text ({summarize_error(error)}); {NEEDED}") from error
    mask = encoding.special_tokens_mask
    return encoding.ids[: mask.index(0) if 0 in mask else 0], usual


def _check_growth(path: Path, part: str, value: object) -> None:
    growth = _bound_growth(value)
    if growth > MOST_GROWTH:
        raise ValueError(
            f"{path}: the {part} makes up to {growth:.3g} bytes of one; needs one that leaves text as it is"
        )


def _bound_growth(part: object) -> float:
    """Return an upper bound on the bytes that a part of the pipeline makes of one."""
    if not isinstance(part, dict):
        return 1.0
    growth = float(_UNICODE_FORMS.get(str(part.get("type")), 1))
    if part.get("type") == "Replace":
        pattern, content = part.get("pattern"), str(part.get("content"))
        replaced = pattern.get("String") if isinstance(pattern, dict) else None
        made = len(content.encode("utf-8", "replace"))
        growth = max(1.0, made / len(replaced.encode())) if isinstance(replaced, str) and replaced else made + 1.0
    elif part.get("type") == "Prepend":
        growth = 1.0 + len(str(part.get("prepend")).encode("utf-8", "replace"))
    for name in ("normalizers", "decoders"):
        for inner in part.get(name) or [] if isinstance(part.get(name), list) else []:
            growth *= _bound_growth(inner)
    return growth

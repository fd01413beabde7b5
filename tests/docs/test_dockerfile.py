"""The Dockerfile: what it copies is there and is sent to the build, and what it installs is defined."""

import fnmatch
import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")


def instructions(name: str) -> list[str]:
    return re.findall(rf"^{name} +(.*)$", DOCKERFILE, re.MULTILINE)


def is_sent(path: str) -> bool:
    """Tell whether .dockerignore lets a path through; the last pattern that matches decides."""
    sent = True
    for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#") and fnmatch.fnmatch(path, line.removeprefix("!")):
            sent = line.startswith("!")
    return sent


def test_what_is_copied_is_there_and_is_sent():
    copied = [name for copy in instructions("COPY") if "--from" not in copy for name in copy.split()[:-1]]
    assert {"constraints.txt", "pyproject.toml", "src"} <= set(copied)
    assert [name for name in copied if not (ROOT / name).exists() or not is_sent(name)] == []
    assert not is_sent(".git") and not is_sent("models") and not is_sent("runs")


def test_all_that_the_package_names_is_copied():
    """setuptools reads the README and the licence that pyproject.toml names."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    copied = {name for copy in instructions("COPY") for name in copy.split()}
    assert {project["readme"], *project["license-files"]} <= copied


def test_every_install_keeps_to_the_constraints_and_extras_exist():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    installs = [run for run in instructions("RUN") if "pip install" in run]
    assert len(installs) == 4 and all("--constraint constraints.txt" in run for run in installs)
    named = {extra for run in installs for extra in re.findall(r"\.\[([^\]]+)\]", run)}
    assert named == {"lora", "qlora"} and named <= set(extras)


def test_stages_come_from_stages():
    stages = re.findall(r"^FROM (\S+) AS (\S+)$", DOCKERFILE, re.MULTILINE)
    names = [name for _, name in stages]
    assert names[-1] == "cpu" and "cuda" in names
    for number, (base, _) in enumerate(stages):
        assert base in names[:number] or ":" in base
    assert set(re.findall(r"--from=(\S+)", DOCKERFILE)) <= set(names)

"""Kill runs with SIGKILL at random moments of every stage; they must end as a run that nothing happened to.

    python benchmarks/kills.py [--kills 200]

The summary and all files are compared, from the corpus to what is published. With `--capture`, one capture is killed
again and again, and must end in the same bytes. With `--shards`, four processes share the stages up to fusion, and are
killed and started again; with `--ray`, the workers of two Ray nodes are. With `--s3`, these write to an S3 server that
is started on loopback.
"""

import argparse
import collections
import contextlib
import json
import os
import random
import re
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))

import object_store
import shards
import tiny_run
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fuselm.runs import ray_runs
from fuselm.stores.store import Store
from fuselm.system import atomic_files, manifest
from fuselm.system.remote_paths import open_path

CORPUS = Path(__file__).parents[1] / "examples" / "corpus" / "quickstart.jsonl"
STAGES = ("corpus", "write", "capture", "align", "fuse", "train", "evaluate", "report", "publish")
OF_STAGE = 5  # kills in each stage of one run, before another is begun
LEFT = re.compile(r"\.(tmp|lock|partial|old|dropped|sha256)$|/\.[^/]*$")  # what kills may leave and the next run sweeps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--capture", action="store_true", help="over one capture")
    parser.add_argument("--shards", action="store_true", help="over four shards of the stages up to fusion")
    parser.add_argument("--ray", action="store_true", help="over the workers of two Ray nodes, up to fusion")
    parser.add_argument("--s3", action="store_true", help="let shards or Ray's workers write to an S3 server")
    parser.add_argument("--json", action="store_true", help="print JSON alone")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["FUSELM_CACHE"] = f"{folder}/cache"
        if options.shards or options.ray:
            share = share_on_ray if options.ray else share_in_shards
            with start_object_store() if options.s3 else contextlib.nullcontext(folder) as place:
                result = measure_shared(Path(folder), options.kills, place, share)
        else:
            result = (measure if options.capture else measure_runs)(Path(folder), options.kills)
    print(json.dumps(result) if options.json else json.dumps(result, indent=1))


def measure_runs(folder: Path, kills: int) -> dict:
    """Kill runs until there are as many kills, in one stage after the other."""
    run_file = run_of_all_stages(folder)
    began = time.monotonic()
    files = watch(run_file, folder / "whole")
    assert files is not None and all(files[stage] for stage in STAGES), files
    uninterrupted = time.monotonic() - began
    moments, stages = random.Random(0), collections.Counter[str]()
    killed = runs = same = 0
    left: list[str] = []
    while killed < kills:
        runs += 1
        cut = folder / f"cut-{runs}"
        for stage in [stage for stage in STAGES for _ in range(OF_STAGE)][: kills - killed]:
            after, then = int(moments.random() ** 2 * files[stage] / OF_STAGE), moments.uniform(0, 0.05)
            if stage == "publish":  # which takes a few thousandths of a second; without the record it is done again
                (cut / "run.json").unlink(missing_ok=True)
                then /= 10
            if watch(run_file, cut, stage=stage, stop_after=after, then=then) is None:
                killed += 1
                stages[stage] += 1
            elif stage != "publish":
                break
        watch(run_file, cut)
        same += is_same(cut, folder / "whole")
        left += [name for name in sorted(names(cut)) if LEFT.search(name)]
    return {
        "killed": killed,
        "runs": runs,
        "runs_with_the_same_summary_weights_and_files": same,
        "left_behind": left,
        "killed_in": dict(stages),
        "files_made_uninterrupted": dict(files),
        "seconds_uninterrupted": uninterrupted,
        "seconds": time.monotonic() - began,
    }


def watch(
    run_file: Path, out: Path, *, stage: str = "", stop_after: float = float("inf"), then: float = 0.0
) -> collections.Counter[str] | None:
    """Return how many files a run made in each stage until it ended, or None if it was killed.

    It is killed seconds after it made more than so many files in one of the stages or in those after it.
    """
    counted = STAGES[STAGES.index(stage) :] if stage else ()
    before, seen, counts = names(out), set[str](), collections.Counter[str]()
    process = tiny_run.start("run", run_file, f"output={out}")
    while process.exitcode is None and sum(counts[later] for later in counted) <= stop_after:
        seen |= names(out) - before
        counts = collections.Counter(map(stage_of, seen))
        time.sleep(0.002)
    process.join(then if sum(counts[later] for later in counted) > stop_after else None)
    killed = process.exitcode is None
    process.kill()
    process.join()
    assert killed or process.exitcode == 0, (out, process.exitcode)
    return None if killed else counts


def names(out: Path) -> set[str]:
    """List all files and folders in a folder that may be changing."""
    found = set[str]()
    for parent, folders, files in os.walk(out):
        found |= {os.path.relpath(os.path.join(parent, name), out) for name in (*folders, *files)}
    return found


def stage_of(name: str) -> str:
    """Return what makes a file or folder of a run."""
    stage = name.partition("/")[0]
    return stage if stage in STAGES else "" if stage.lstrip(".").startswith(("config", "steps")) else "publish"


def is_same(cut: Path, whole: Path) -> bool:
    """Tell whether a run has the numbers, weights, pages and files of another, each as its manifest says."""
    pages = ("model/model.safetensors", "model/README.md")
    manifests = [path.parent for path in cut.glob("*/*/manifest.json")]
    return (
        tiny_run.summary(cut) == tiny_run.summary(whole)
        and all((cut / name).read_bytes() == (whole / name).read_bytes() for name in pages)
        and kept(cut) == kept(whole)
        and all(atomic_files.hash_file(of / n) == s for of in manifests for n, s in manifest.read(of)["files"].items())
    )


def kept(out: Path) -> set[str]:
    """List the files of a finished run, except TensorBoard's: each start makes one of those."""
    return {name for name in names(out) if "tfevents" not in name}


def measure(folder: Path, kills: int) -> dict:
    run_file = run(folder)
    files = tiny_run.capture_watched(run_file, folder / "whole")
    began = time.monotonic()
    killed = tiny_run.kill(run_file, folder / "cut", kills=kills, files=files)
    seconds = time.monotonic() - began
    whole, cut = (next((folder / name / "capture").glob("tiny-*")) for name in ("whole", "cut"))
    whole_files = manifest.read(whole)["files"]
    (documents,) = tiny_run.captured(folder / "cut").values()
    return {
        "killed": killed,
        "seconds": seconds,
        "files_made_uninterrupted": files,
        "parts": len(whole_files) - 1,
        "documents": len(documents),
        "documents_twice": len(documents) - len(set(documents)),
        "documents_lost": len(set(Store(whole).documents) - set(documents)),
        "same_bytes": all((whole / name).read_bytes() == (cut / name).read_bytes() for name in whole_files),
        "verified": all(atomic_files.hash_file(cut / n) == s for n, s in manifest.read(cut)["files"].items()),
    }


def measure_shared(folder: Path, kills: int, place: str, share) -> dict:
    """Kill processes that share a run's stages up to fusion until there are as many kills, in one run after the other.

    The runs' folders are in `place`; `share` makes one, and returns how many processes it killed.
    """
    run_file, began = run_of_all_stages(folder), time.monotonic()
    alone = shards.start("fuse", run_file, f"output={folder / 'whole'}", log=folder / "whole.log")
    alone.join()
    assert alone.exitcode == 0
    expected, killed = hash_stores(folder / "whole"), 0
    runs = same = twice = 0
    while killed < kills:
        log = folder / f"cut-{runs}.log"
        killed += share(run_file, f"{place}/cut-{runs}", kills - killed, log, runs)
        same += hash_stores(open_path(f"{place}/cut-{runs}")) == expected
        made = collections.Counter(tuple(line.split()[:2]) for line in log.read_text().splitlines())
        twice += sum(count > 1 for count in made.values())
        runs += 1
        print(f"run {runs}: {killed} killed, {same} with the same bytes", file=sys.stderr, flush=True)
    return {
        "killed": killed,
        "runs": runs,
        "runs_with_the_bytes_of_one_process": same,
        "parts_of_a_run": len((folder / "whole.log").read_text().splitlines()),
        "parts_finished_twice": twice,
        "seconds": time.monotonic() - began,
    }


def share_in_shards(run_file: Path, out: str, kills: int, log: Path, seed: int) -> int:
    """Make a run in four shards, and kill and restart one at random moments."""
    return shards.kill_and_restart(4, "fuse", run_file, f"output={out}", kills=kills, log=log, seed=seed)


def share_on_ray(run_file: Path, out: str, kills: int, log: Path, seed: int) -> int:
    """Make a run in a worker on each of two Ray nodes; kill workers after their first part, and Ray restarts them."""
    import ray
    from ray.cluster_utils import Cluster

    support = Path(__file__).parents[1] / "tests" / "support"
    os.environ["PYTHONPATH"] = os.pathsep.join([str(support), *sys.path])
    os.environ[shards.LOG] = str(log)
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112  # else workers hardly start where all is busy
    log.touch()
    size = {"num_cpus": 1, "object_store_memory": 100 << 20}
    cluster = Cluster(initialize_head=True, head_node_args=size | {"include_dashboard": False})
    killed, ended = [], threading.Event()
    try:
        cluster.add_node(**size)
        ray.init(address=cluster.address, log_to_driver=False)
        ray_runs.RayWorker = shards.SmallRayWorker
        killer = threading.Thread(target=kill_workers, args=(kills, seed, killed, log, ended))
        killer.start()
        outcome = tiny_run.fuselm("fuse", run_file, f"output={out}", "capture.engine=ray", "capture.workers=2")
        assert outcome.code == 0, outcome.err
    finally:
        ended.set()
        ray.shutdown()
        cluster.shutdown()
    return len(killed)


def kill_workers(kills: int, seed: int, killed: list[int], log: Path, ended: threading.Event) -> None:
    """Kill workers of Ray that this process's nodes started, one after the other, until the run has ended.

    Each has made a part before, or on a slow machine none would ever come to make one.
    """
    moments = random.Random(seed)
    while len(killed) < kills and not ended.wait(moments.uniform(0.01, 0.3)):
        made = {int(line.split()[2]) for line in log.read_text().splitlines()}
        if workers := [worker for worker in list_own_workers() if worker in made]:
            killed.append(moments.choice(workers))
            with contextlib.suppress(ProcessLookupError):
                os.kill(killed[-1], signal.SIGKILL)


def list_own_workers() -> list[int]:
    """Return the processes below this one that hold a worker of a run."""
    parents, workers = {}, []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parents[int(path.name)] = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            if (path / "cmdline").read_bytes().startswith(b"ray::SmallRayWorker"):
                workers.append(int(path.name))

    def is_own(process: int) -> bool:
        while process > 1 and process != os.getpid():
            process = parents.get(process, 0)
        return process == os.getpid()

    return list(filter(is_own, workers))


@contextlib.contextmanager
def start_object_store() -> Iterator[str]:
    """Serve S3 on loopback, for this process and those that it starts, and yield the address of a bucket."""
    server = object_store.s3_address.__wrapped__()
    os.environ |= {**object_store.ENVIRONMENT, "AWS_ENDPOINT_URL": next(server)}
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        del os.environ[name]
    open_path("s3://kills").filesystem.mkdir("kills")
    yield "s3://kills"
    next(server, None)


def hash_stores(out: Path) -> dict[str, dict[str, str]]:
    """Return the hashes of all files of the stages up to fusion, as their manifests have them."""
    stages = ("corpus", "write", "capture", "align", "fuse")
    return {
        path.parent.name: manifest.read(path.parent)["files"]
        for s in stages
        for path in out.glob(f"{s}/*/manifest.json")
    }


def run(folder: Path) -> Path:
    """Write a run file of the tiny model and the demo's corpus."""
    return tiny_run.write(
        folder,
        target=write_model(folder / "tiny", 0),
        sources={"tiny": folder / "tiny"},
        rows=quickstart(),
        corpus={"files": [str(folder / "corpus.jsonl")], "max_bytes": 256},
        capture={"batch_tokens": 256},
    )


def run_of_all_stages(folder: Path) -> Path:
    """Write a run file of two tiny models, one of which writes, and a part of the demo's corpus."""
    sources = {"own": write_model(folder / "own", 0), "other": write_model(folder / "other", 1)}
    return tiny_run.write(
        folder,
        target=folder / "own",
        sources=sources,
        rows=short_texts(),
        corpus={"files": [str(folder / "corpus.jsonl")], "max_bytes": 256},
        write={"ratio": {"other": 0.3}, "tokens": 40, "prompt_tokens": 60},
        capture={"batch_tokens": 1024, "prefix_tokens": 60},
        train=tiny_run.TRAIN | {"passes": 1, "evaluations_per_pass": 3},
    )


def short_texts() -> list[dict[str, str]]:
    """Return the beginnings of a few documents of two of its domains."""
    return tiny_run.short(quickstart(), length=200)[::6]


def quickstart() -> list[dict[str, str]]:
    rows = [json.loads(line) for line in CORPUS.read_text("utf-8").splitlines()]
    return [{"domain": row["domain"], "text": row["text"]} for row in rows]


def write_model(folder: Path, seed: int) -> Path:
    """Write a model with bytes for tokens."""
    spelled = {string: n for n, string in enumerate(["<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(BPE(vocab=spelled, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    config = LlamaConfig(
        vocab_size=len(spelled),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=1024,
        initializer_range=0.4,
        bos_token_id=None,
        eos_token_id=0,
    )
    torch.manual_seed(seed)
    LlamaForCausalLM(config).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(folder)
    return folder


if __name__ == "__main__":
    main()

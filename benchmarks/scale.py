"""Measure what each stage takes of corpora of growing size, in one run: `python benchmarks/scale.py [--json]`.

Each stage runs in a process of its own, as users run it: seconds and peak memory. Tokenizers are those of two of the
demo's models (`make models` fetches them), models are tiny. Texts are cut from the demo's corpus and repeated.

Two series keep it bounded. Texts of 1 KB go through all stages at 10 and 100 thousand documents, and at a million
through the corpus stage and a capture. At a million, all stages are measured with texts of 100 bytes, and so are 100
thousand of those. Capture, align and fuse are ended when they have used `--seconds` of a core since the first documents
were on disk, which come with all that is learned first. What a stage needs is made of each text once and then written
for all its repetitions. `texts` is the corpus stage without tokenizers, `first batch` the start of training.

Measured pieces are kept in `runs/scale/measured.json`; `--series`, `--documents` and `--stages` choose some to measure
now. `--parts processes` compares align and fuse in one process and in two instead, and needs two free cores.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

from fuselm.documents import corpus
from fuselm.models.locating import locate_model
from fuselm.runs import config
from fuselm.runs.pipeline import Pipeline
from fuselm.stores import store, trust
from fuselm.system import manifest
from fuselm.system.progress import Progress

ROOT = Path(__file__).parents[1]
WORK = ROOT / "runs" / "scale"
TOKENIZERS = {"target": "models/qwen2.5-coder-0.5b-instruct.gguf", "one": "models/smollm2-135m-instruct.gguf"}
TOKENIZERS["two"] = TOKENIZERS["one"]
SOURCES = ("one", "two")
TEXTS = 400  # that are not equal
HELD_OUT = 20  # of them, in dev and as many in held-out
STAGES = ("texts", "corpus", "capture", "align", "fuse", "first batch")
NEEDED = {"align": ("capture",), "fuse": ("capture", "align"), "first batch": ("capture", "align", "fuse")}  # stores
ENDED = ("capture", "align", "fuse")  # before they are done
SERIES = {  # bytes of a text: documents, and the stages that they go through
    1000: {10_000: STAGES, 100_000: STAGES, 1_000_000: ("texts", "corpus", "capture")},
    100: {100_000: STAGES, 1_000_000: STAGES},
}
COMPARED = 40_000  # documents of 1 KB that are aligned and fused in one process and in two,
REPEATED = 40  # with so many different texts: each process splits the strings of their rows once


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON on one line")
    parser.add_argument("--parts", choices=("stages", "processes"), default="stages", help="what to measure")
    parser.add_argument("--series", type=int, choices=sorted(SERIES), help="texts of so many bytes alone")
    parser.add_argument("--documents", type=int, help="a corpus of so many alone")
    parser.add_argument("--stages", default=",".join(STAGES), help="which to measure, in this order")
    parser.add_argument("--method", default="branches", help="of alignment, for `processes`")
    parser.add_argument("--seconds", type=int, default=60, help="of a core, after which a stage is ended")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.chdir(ROOT)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a capture is ended by it, also where it was ignored
    if options.worker:
        WORKERS[options.worker[0]](Path(options.worker[1]))
        return
    stages = options.stages.split(",")
    if unknown := set(stages) - set(STAGES):
        parser.error(f"--stages: no stage '{min(unknown)}'; there are {', '.join(STAGES)}")
    if options.parts == "processes":
        result = measure_processes(options.documents or COMPARED, options.method)
    else:
        for text_bytes in [options.series] if options.series else SERIES:
            known = SERIES[text_bytes]
            sizes = {options.documents: known.get(options.documents, STAGES)} if options.documents else known
            for size, own in sizes.items():
                measure_size(size, text_bytes, [stage for stage in own if stage in stages], options.seconds)
        result = read_measured()
    print(json.dumps(result, indent=None if options.json else 1))


# ---- what is measured on


def make_texts(text_bytes: int, count: int = TEXTS) -> list[str]:
    """Return texts of about so many bytes, none twice."""
    lines = (ROOT / "examples/corpus/quickstart.jsonl").read_text(encoding="utf-8").splitlines()
    whole = "\n".join(json.loads(line)["text"] for line in lines)
    texts = dict.fromkeys(whole[at : at + text_bytes].strip() for at in range(0, len(whole) - text_bytes, text_bytes))
    texts.pop("", None)
    return list(texts)[:count]


def make_model(role: str) -> Path:
    """Return a tiny model with the tokenizer of a real one."""
    folder = WORK / f"{role}-model"
    if not folder.exists():
        located = locate_model(TOKENIZERS[role])
        torch.manual_seed(sorted(TOKENIZERS).index(role))
        shape = LlamaConfig(
            vocab_size=located.output_size,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            initializer_range=0.4,
        )
        making = folder.with_name(folder.name + ".making")
        LlamaForCausalLM(shape).save_pretrained(making)
        for file in located.folder.glob("*token*.json"):
            shutil.copy(file, making)
        making.rename(folder)
    return folder


def write_run(
    folder: Path, text_bytes: int, size: int | None, different: int = TEXTS, sources: Sequence[str] = SOURCES
) -> Path:
    """Write the texts, each as often as it takes to have `size` to train on (None: once), and a run file."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = make_texts(text_bytes, different + 2 * HELD_OUT)
    trained = texts[2 * HELD_OUT :]
    if not (folder / "texts.jsonl").exists():
        rows = [json.dumps({"text": text, "split": "train", "domain": "a"}) + "\n" for text in trained]
        with open(folder / "texts.jsonl.making", "w", encoding="utf-8") as file:
            for n, text in enumerate(texts[: 2 * HELD_OUT]):
                file.write(json.dumps({"text": text, "split": ("dev", "heldout")[n % 2], "domain": "a"}) + "\n")
            file.writelines(rows[n % len(rows)] for n in range(len(rows) if size is None else size))
        (folder / "texts.jsonl.making").rename(folder / "texts.jsonl")
    run = {
        "output": str(folder / "run"),
        "store_dir": str(folder / "run"),
        "target": str(make_model("target")),
        "sources": {name: str(make_model(name)) for name in sources},
        "corpus": {"files": [str(folder / "texts.jsonl")]},
        "capture": {"policy": "top_k", "top_k": 8},
        "align": {"top_k": 8},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(run), encoding="utf-8")
    return folder / "run.yaml"


def make_once(text_bytes: int, stage: str, different: int = TEXTS) -> Path:
    """Return the folder of a run that has gone through a stage with each text once."""
    folder = WORK / (f"once-{text_bytes}" if different == TEXTS else f"once-{text_bytes}-{different}")
    if not (folder / f"made-{stage}").exists():
        measure([sys.executable, "-m", "fuselm", stage, str(write_run(folder, text_bytes, None, different))])
        (folder / f"made-{stage}").touch()
    return folder


def repeat_stores(once: Path, folder: Path, stage: str) -> None:
    """Write a stage's rows of each text under the ids of all documents with that text, as that of the run."""
    pipeline = open_pipeline(folder)
    documents = pipeline.documents.select(split="train")
    for step in pipeline.dry_run(getattr(Pipeline, stage)):
        if step.stage.name != stage or manifest.is_finished(step.folder):
            continue
        shutil.rmtree(step.folder.with_name(step.folder.name + ".partial"), ignore_errors=True)
        (made,) = (once / "run" / stage).glob(f"{step.name}-*" if step.name else "*")
        repeat_store(made, documents.ids, step.folder, step.recipe)
        trust.remember_output(step.folder)  # as the stage does


def repeat_store(captured: Path, names: pa.ChunkedArray, out: Path, recipe: manifest.Recipe) -> None:
    """Write a store's rows, over and over, under the given names."""
    once = pa.concat_tables(pq.read_table(part) for part in sorted(captured.glob("part-*.parquet")))
    made, each = manifest.read(captured)["counts"], len(once)
    together = max(store.PART_TOKENS // made["tokens"], 1) * each  # documents of a part

    def write(folder: Path) -> dict:
        for number, begin in enumerate(range(0, len(names), together)):
            chosen = names.slice(begin, together).combine_chunks()
            rows = once.take(pa.array(np.arange(begin, begin + len(chosen)) % each))
            store.write_tables(store.part_path(folder, number), [rows.set_column(0, once.schema.field(0), chosen)])
        return made | store.write_index(folder)

    manifest.build_once(out, recipe, write)


# ---- measuring


def measure_size(size: int, text_bytes: int, stages: list[str], seconds: int) -> None:
    """Measure what each stage takes of a corpus with so many documents to train on, and keep it."""
    folder = WORK / f"{text_bytes}-{size}"
    run_file = write_run(folder, text_bytes, size)
    for stage in stages:
        if stage in ("corpus", *ENDED):
            shutil.rmtree(folder / "run" / stage, ignore_errors=True)
        for needed in NEEDED.get(stage, ()):
            repeat_stores(make_once(text_bytes, needed), folder, needed)
        if stage in ENDED:
            found = measure_for(seconds, run_file, stage)
        else:
            found = measure([sys.executable, __file__, "--worker", stage, str(folder)]) | {"documents": size}
        found["megabytes"] = (folder / "texts.jsonl").stat().st_size / 1e6
        keep_measured(f"{text_bytes} bytes", str(size), stage, found)
        print(f"{size:,} documents of {text_bytes} bytes, {stage}: {found}", file=sys.stderr, flush=True)


def measure(command: list[str], watch=lambda process: None) -> dict:
    """Return the seconds, CPU seconds and peak memory of a process and of those that it waited for."""
    began = time.perf_counter()
    said = tempfile.TemporaryFile("w+")  # noqa: SIM115
    process = subprocess.Popen(command, stdout=said, stderr=said)
    while (found := os.wait4(process.pid, os.WNOHANG))[0] == 0:
        watch(process)
        time.sleep(0.02)
    took, used = time.perf_counter() - began, found[2]
    if found[1] and os.waitstatus_to_exitcode(found[1]) not in (-signal.SIGINT, 130):
        said.seek(0)
        sys.exit(f"{' '.join(command)}: {said.read()[-2000:]}")
    return {"seconds": took, "cpu_seconds": used.ru_utime + used.ru_stime, "peak_mib": used.ru_maxrss / 1024}


def measure_for(seconds: int, run_file: Path, stage: str) -> dict:
    """Let a stage use so many seconds of a core after the first documents are on disk, and count those after them."""
    folder, known = run_file.parent / "run" / stage, dict[Path, int]()
    seen: list[tuple[float, int]] = []
    looked = 0.0

    def watch(process: subprocess.Popen) -> None:
        nonlocal looked
        if time.perf_counter() - looked < 0.5:
            return
        used, looked = read_cpu_seconds(process.pid), time.perf_counter()
        if (count := count_documents(folder, known)) > (seen[-1][1] if seen else 0):
            seen.append((used, count))
        if seen and used - seen[0][0] > seconds:
            process.send_signal(signal.SIGINT)
            time.sleep(1)

    found = measure([sys.executable, "-m", "fuselm", stage, str(run_file)], watch)
    (began, first), (ended, last) = seen[0], seen[-1]
    each = 1e6 * (ended - began) / max(last - first, 1)
    return found | {"documents": last - first, "microseconds_a_document": each}


def read_cpu_seconds(process: int) -> float:
    """Return the seconds of a core that a process has used; 0 when it is gone."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def count_documents(folder: Path, known: dict[Path, int]) -> int:
    """Count the documents in the parts and blocks of a stage's first store; `known` has those that were counted."""
    for store_folder in sorted(folder.glob("*"))[:1]:
        name = store_folder.name.removesuffix(".partial")
        for path in folder.rglob("*.parquet"):
            if name in str(path) and path not in known and "index" not in path.name:
                try:
                    known[path] = pq.ParquetFile(path).metadata.num_rows
                except (OSError, pa.ArrowException):  # a block has just become a part
                    continue
    return sum(known[path] for path in known if path.exists())


def measure_processes(size: int, method: str) -> dict:
    """Return the seconds that align and fuse take in one process and in two, and whether the bytes are the same.

    One source is aligned, and two are fused.
    """
    result: dict[str, dict] = {}
    for stage, needed, sources in (("align", ["capture"], SOURCES[:1]), ("fuse", ["capture", "align"], SOURCES)):
        folder = WORK / f"{stage}-in-processes-{size}"
        run_file = write_run(folder, 1000, size, REPEATED, sources)
        for before in needed:
            repeat_stores(make_once(1000, before, REPEATED), folder, before)
        seconds, hashes = {}, {}
        for count in (1, 2):
            shutil.rmtree(folder / "run" / stage, ignore_errors=True)
            command = [sys.executable, "-m", "fuselm", stage, str(run_file), f"processes={count}"]
            seconds[count] = measure(command + [f"align.method={method}"] * (stage == "align"))["seconds"]
            found = (folder / "run" / stage).glob("*/manifest.json")
            hashes[count] = {path.parent.name: manifest.read(path.parent)["files"] for path in found}
        is_same = bool(hashes[1]) and hashes[1] == hashes[2]
        result[stage] = {"seconds": seconds, "ratio": seconds[1] / seconds[2], "same_bytes": is_same}
        print(f"{stage}: {result[stage]}", file=sys.stderr, flush=True)
    return result


def read_measured() -> dict:
    """Return what was measured, with microseconds a document between a size and the next smaller one."""
    measured = json.loads((WORK / "measured.json").read_text("utf-8"))
    for sizes in measured.values():
        ordered = sorted(sizes, key=int)
        for smaller, size in zip([None, *ordered], ordered, strict=False):
            for stage, found in sizes[size].items():
                before = {} if smaller is None else sizes[smaller].get(stage, {})
                if before and stage not in (*ENDED, "first batch"):
                    more = found["documents"] - before["documents"]
                    found["microseconds_a_document"] = 1e6 * (found["cpu_seconds"] - before["cpu_seconds"]) / more
    return measured


def keep_measured(*place: str | dict) -> None:
    """Write a measurement to its place among those that were made before."""
    path = WORK / "measured.json"
    measured = json.loads(path.read_text("utf-8")) if path.exists() else {}
    *names, last, found = place
    inner = measured
    for name in names:
        inner = inner.setdefault(name, {})
    inner[last] = found
    path.write_text(json.dumps(measured, indent=1), encoding="utf-8")


# ---- stages, each in a process of its own


def open_pipeline(folder: Path) -> Pipeline:
    return Pipeline(config.load(folder / "run.yaml"), Console(quiet=True))


def read_texts(folder: Path) -> None:
    """Read, split and write the texts as the corpus stage does, without counting tokens."""
    out = folder / "run" / "texts"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    progress, options = Progress(Console(quiet=True), "texts"), config.load(folder / "run.yaml").corpus
    corpus.prepare_corpus(
        [folder / "texts.jsonl"],
        out,
        domains=["a"],
        readers=[],
        max_bytes=options.max_bytes,
        dev=options.dev,
        heldout=options.heldout,
        share=1,
        seed=0,
        progress=progress,
    )
    shutil.rmtree(out)


def read_first_batch(folder: Path) -> None:
    """Open the corpus and the fused store as training does, and read a batch."""
    from fuselm.training.batches import KEPT_TOKENS, Batches, Collator

    pipeline = open_pipeline(folder)
    rows = store.Store(pipeline.fuse(), keep_tokens=KEPT_TOKENS, vocabulary_size=pipeline.inputs.target.output_size)
    documents = pipeline.documents.select(split="train")
    order = {"passes": 3, "batch_documents": 4, "pack_tokens": None, "seed": 0, "processes": 1}
    dataset = Batches(documents, pipeline.inputs.target_vocabulary, rows, **order)
    Collator(pipeline.inputs.target.context_token, packed=False)([dataset[0]])


WORKERS = {
    "texts": read_texts,
    "corpus": lambda folder: open_pipeline(folder).make_corpus(),
    "first batch": read_first_batch,
}


if __name__ == "__main__":
    main()

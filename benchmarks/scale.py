"""Measure what each stage takes of corpora of growing size, in one run: `python benchmarks/scale.py [--json]`.

Each stage runs in a process of its own, as users run it, on texts of about 1 KB: seconds, microseconds a document, and
peak memory. Tokenizers are those of two of the demo's models (`make models` fetches them), models are tiny. Texts are
those of the demo's corpus, cut and repeated. Sources' rows over them are captured once for each text and written again
for its repetitions, as a capture has nothing to learn from them; a capture of the whole corpus is begun too, and ended
after `--seconds`, to see its memory. `first batch` is the start of training. Folders are kept under `runs/scale`.
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
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

from fuselm.documents.document_list import DocumentList
from fuselm.models.locating import locate_model
from fuselm.runs import config
from fuselm.runs.pipeline import Pipeline
from fuselm.stores import store
from fuselm.system import manifest
from fuselm.system.manifest import Recipe

ROOT = Path(__file__).parents[1]
WORK = ROOT / "runs" / "scale"
TOKENIZERS = {"target": "models/smollm2-135m-instruct.gguf", "source": "models/gemma-3-270m.gguf"}
TEXT_BYTES = 1000
TEXTS = 400  # that are not equal
HELD_OUT = 20  # of them, in dev and as many in held-out
STAGES = ("corpus", "capture", "align", "fuse", "first batch")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON on one line")
    parser.add_argument("--documents", default="10000,100000", help="sizes of the corpora")
    parser.add_argument("--stages", default=",".join(STAGES), help="which to measure, in this order")
    parser.add_argument("--seconds", type=int, default=60, help="after which the capture is ended")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.chdir(ROOT)
    if options.worker:
        WORKERS[options.worker[0]](Path(options.worker[1]))
        return
    sizes, stages = list(map(int, options.documents.split(","))), options.stages.split(",")
    if unknown := set(stages) - set(STAGES):
        parser.error(f"--stages: no stage '{min(unknown)}'; there are {', '.join(STAGES)}")
    texts = make_texts()
    models = {role: make_model(role) for role in TOKENIZERS}
    result = {size: measure_size(size, texts, models, stages, options.seconds) for size in sizes}
    print(json.dumps(result, indent=None if options.json else 1))


# ---- what is measured on


def make_texts() -> list[str]:
    """Return texts of about `TEXT_BYTES`, none twice."""
    lines = (ROOT / "examples/corpus/quickstart.jsonl").read_text(encoding="utf-8").splitlines()
    whole = "\n".join(json.loads(line)["text"] for line in lines)
    texts = list(dict.fromkeys(whole[at : at + TEXT_BYTES] for at in range(0, len(whole), TEXT_BYTES)))
    return texts[:TEXTS]


def make_model(role: str) -> Path:
    """Return a tiny model with the tokenizer of a real one."""
    folder = WORK / f"{role}-model"
    if not folder.exists():
        located = locate_model(TOKENIZERS[role])
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=located.output_size,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
        )
        making = folder.with_name(folder.name + ".making")
        LlamaForCausalLM(config).save_pretrained(making)
        for file in located.folder.glob("*token*.json"):
            shutil.copy(file, making)
        making.rename(folder)
    return folder


def write_run(folder: Path, texts: list[str], size: int, models: dict[str, Path], given: Path | None) -> None:
    """Write the texts, each as often as it takes, and a run file; the source's rows are `given`, if they are."""
    folder.mkdir(parents=True, exist_ok=True)
    splits = ["dev"] * HELD_OUT + ["heldout"] * HELD_OUT
    trained = texts[2 * HELD_OUT :]
    if not (folder / "texts.jsonl").exists():
        with open(folder / "texts.jsonl.making", "w", encoding="utf-8") as file:
            for text, split in zip(texts, splits, strict=False):
                file.write(json.dumps({"text": text, "split": split, "domain": "a"}) + "\n")
            for n in range(size):
                file.write(json.dumps({"text": trained[n % len(trained)], "split": "train", "domain": "a"}) + "\n")
        (folder / "texts.jsonl.making").rename(folder / "texts.jsonl")
    run = {
        "output": str(folder / "run"),
        "store_dir": str(folder / "run"),
        "target": str(models["target"]),
        "sources": {"other": {"model": str(models["source"])} | ({"store": str(given)} if given else {})},
        "corpus": {"files": [str(folder / "texts.jsonl")]},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(run), encoding="utf-8")


def repeat_store(captured: Path, documents: DocumentList, out: Path) -> None:
    """Write the rows of each text of a store under the ids of all documents with that text."""
    once = pa.concat_tables(pq.read_table(part) for part in sorted(captured.glob("part-*.parquet")))
    made = manifest.read(captured)
    names, each = list(documents.ids), len(once)

    def write(folder: Path) -> dict:
        repeated = max(store.PART_TOKENS // (len(once["tokens"].combine_chunks().flatten())), 1) * each
        for number, begin in enumerate(range(0, len(names), repeated)):
            chosen = names[begin : begin + repeated]
            rows = once.take(pa.array(np.arange(begin, begin + len(chosen)) % each))
            store.write_tables(
                store.part_path(folder, number), [rows.set_column(0, once.schema.field(0), pa.array(chosen))]
            )
        return store.write_index(folder) | {"vocabulary_size": made["counts"]["vocabulary_size"], "skipped": []}

    recipe = Recipe(stage="capture", parameters=made["parameters"], inputs=made["inputs"])
    manifest.build_once(out, recipe, write)


# ---- measuring


def measure_size(size: int, texts: list[str], models: dict[str, Path], stages: list[str], seconds: int) -> dict:
    """Return what each stage takes of a corpus with so many documents to train on."""
    once, folder = WORK / "once", WORK / str(size)
    write_run(once, texts, len(texts) - 2 * HELD_OUT, models, None)
    if not (once / "captured").exists():
        measure([sys.executable, "-m", "fuselm", "capture", str(once / "run.yaml")])
        (found,) = (once / "run" / "capture").glob("other-*")
        (once / "captured").symlink_to(found)
    shutil.rmtree(folder / "run", ignore_errors=True)
    given = folder / "given"
    result = {}
    for stage in stages:
        if stage in ("align", "fuse", "first batch") and not given.exists():
            write_run(folder, texts, size, models, None)
            repeat_store(once / "captured", read_train_documents(folder), given)
        write_run(folder, texts, size, models, given if given.exists() and stage not in ("corpus", "capture") else None)
        if stage == "capture":
            command = [sys.executable, "-m", "fuselm", "capture", str(folder / "run.yaml")]
            result[stage] = measure(command, seconds)
            done = count_captured(folder / "run" / "capture")
        else:
            result[stage] = measure([sys.executable, __file__, "--worker", stage, str(folder)])
            done = size
        result[stage]["microseconds_a_document"] = 1e6 * result[stage]["seconds"] / max(done, 1)
        result[stage]["documents"] = done
        print(f"{size:,} documents, {stage}: {result[stage]}", file=sys.stderr, flush=True)
    return result


def measure(command: list[str], most: int | None = None) -> dict:
    """Return seconds and the peak memory of a process and those that it waited for; end it after `most` seconds."""
    began = time.perf_counter()
    said = tempfile.TemporaryFile("w+")  # noqa: SIM115
    process = subprocess.Popen(command, stdout=said, stderr=said)
    ended = False
    while (found := os.wait4(process.pid, os.WNOHANG))[0] == 0:
        if most is not None and time.perf_counter() - began > most and not ended:
            process.send_signal(signal.SIGINT)
            ended = True
        time.sleep(0.02)
    took = time.perf_counter() - began
    if found[1] and not ended:
        said.seek(0)
        sys.exit(f"{' '.join(command)}: {said.read()[-2000:]}")
    return {"seconds": took, "peak_mib": found[2].ru_maxrss / 1024, "is_whole": not ended}


def count_captured(folder: Path) -> int:
    """Count the documents in a capture's parts and blocks, whether it was finished or not."""
    return sum(pq.ParquetFile(path).metadata.num_rows for path in folder.rglob("*.parquet") if "index" not in path.name)


def open_pipeline(folder: Path) -> Pipeline:
    return Pipeline(config.load(folder / "run.yaml"), Console(quiet=True))


def read_train_documents(folder: Path) -> DocumentList:
    return open_pipeline(folder).documents.select(split="train")


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
    "corpus": lambda folder: open_pipeline(folder).make_corpus(),
    "align": lambda folder: open_pipeline(folder).align(),
    "fuse": lambda folder: open_pipeline(folder).fuse(),
    "first batch": read_first_batch,
}


if __name__ == "__main__":
    main()

"""Compare fuselm with TRL's cross-tokenizer trainer, GOLD: quality, time and memory in one run.

    pip install 'fuselm[peers]'
    python benchmarks/peers.py --json

The quickstart's target is trained with one teacher, a model of another tokenizer, on the quickstart's training
documents, in the same order and batches, by the same optimizer: by fuselm on rows that were captured and aligned once
(`fused`), by GOLD, which runs the teacher in every step (see peers_gold.py), and on the text alone (`clm`).

Each way trains in a process of its own, and keeps the checkpoint that is best on the development split. Seconds are
the median of its steps, by the clock and of the processor (which other jobs change less); memory is the most it had
until the last step, over what it had before any model was loaded; `amortised` adds to a fused step its share of
capture, alignment and fusion. Quality is fuselm's own score of each way's folder on held-out documents. Finished ways
are kept in --output, and not trained again.
"""

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

from rich.console import Console

from fuselm.documents import corpus
from fuselm.models import forward
from fuselm.models.loading import load_model
from fuselm.models.locating import Model, locate_model
from fuselm.results import bootstrap, scoring
from fuselm.results.pages.formats import format_interval, format_signed
from fuselm.runs import config
from fuselm.runs.pipeline import Pipeline
from fuselm.stores import store
from fuselm.system import manifest
from fuselm.training import target_training
from fuselm.training.order import order_documents

ROOT = Path(__file__).parent.parent
TEACHERS = {"qwen": "qwen2.5-coder-0.5b-instruct.gguf", "gemma": "gemma-3-270m.gguf"}
# GOLD's ways: what it is told beyond `use_uld_loss=True, lmbda=0`.
HYBRID = {"uld_use_hybrid_loss": True, "uld_hybrid_matched_weight": 0.6, "uld_hybrid_unmatched_weight": 0.4}
MIXED = {"uld_crossentropy_weight": 0.5, "uld_distillation_weight": 0.5}
CHAIN = {"uld_token_merge_strategy": "bayesian"}  # what the next token is predicted from, by the chain rule
GOLD: dict[str, dict] = {
    "gold": {},  # as it comes: the distance of sorted probabilities, nothing else
    "gold-hybrid": HYBRID,  # as its documentation shows
    "gold-ce": MIXED | CHAIN,
    "gold-hybrid-ce": HYBRID | MIXED | CHAIN,
    "gold-hybrid-ce-kl": HYBRID | MIXED | CHAIN | {"beta": 0.0},  # forward KL on tokens that both have
}
WAYS = ("clm", "fused", *GOLD)


class Watch:
    """Record a process's memory while it trains, and when its steps were over."""

    def __init__(self):
        self.before = self.peak = resident()
        self.ends: list[tuple[float, float]] = []
        self.peak_at_end = 0
        threading.Thread(target=self._look, daemon=True).start()

    def _look(self) -> None:
        while True:
            self.peak = max(self.peak, resident())
            time.sleep(0.01)

    def step(self) -> None:
        self.ends.append((time.perf_counter(), time.process_time()))
        self.peak_at_end = self.peak

    def advance(self, amount: int, note: str = "") -> None:
        """Stand, with `start` and `note`, for the progress that fuselm's training reports to."""
        self.step()

    def start(self, total: int, *, unit: str, done: int = 0) -> None: ...

    def note(self, text: str) -> None:
        print(text, file=sys.stderr)

    def result(self, dev_steps: set[int]) -> dict:
        """Summarise a training without its first step, which warms up, and without the steps that score before."""
        pairs = enumerate(zip(self.ends, self.ends[1:], strict=False), 1)
        steps = [(b[0] - a[0], b[1] - a[1]) for n, (a, b) in pairs if n not in dev_steps]
        return {
            "seconds_a_step": statistics.median(seconds for seconds, _ in steps),
            "processor_seconds_a_step": statistics.median(seconds for _, seconds in steps),
            "peak_mib": round((self.peak_at_end - self.before) / 2**20),
        }


def resident() -> int:
    """Return the bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def run_of(options: argparse.Namespace) -> config.RunOptions:
    teacher = options.models / TEACHERS[options.teacher]
    overrides = [
        f"output={options.output}",
        f"target={options.models / 'smollm2-135m-instruct.gguf'}",
        f"sources={{{options.teacher}: {teacher}}}",
        f"corpus.files=[{ROOT / 'examples/corpus/quickstart.jsonl'}]",
        f"train.passes={options.passes}",
        "train.lambda_clm=0.5",  # what GOLD's own weights of its two losses can be set to
        "train.lr_schedule=cosine",
        "train.average=false",  # GOLD has none
        "capture.prefix_tokens=0",  # its teacher reads each document by itself
    ]
    return config.load(ROOT / "examples/full.yaml", overrides)


def settings_of(run: config.RunOptions, way: str) -> target_training.TrainingSettings:
    chosen = run.train.for_method("fused").model_dump(exclude={"learning_rate", "clm"})
    chosen |= {"learning_rate": run.train.learning_rate, "seed": run.seed}
    if way != "fused":
        chosen |= {"lambda_clm": 1.0, "lambda_final": None}
    return target_training.TrainingSettings(**chosen)


def spread(documents: list[corpus.Document], count: int | None) -> list[corpus.Document]:
    """Return the first so many documents, taking domains in turn, in their own order."""
    if count is None or count >= len(documents):
        return documents
    domains = sorted({d.domain for d in documents})
    turns = [[i for i, d in enumerate(documents) if d.domain == domain] for domain in domains]
    by_turns = sorted((turn, i) for of in turns for turn, i in enumerate(of))
    return [documents[i] for i in sorted(i for _, i in by_turns[:count])]


def training_documents(pipeline: Pipeline, options: argparse.Namespace) -> list[corpus.Document]:
    size = pipeline.run.train.batch_documents
    count = None if options.steps is None else max(options.steps * size // options.passes, 1)
    return spread([d for d in pipeline.documents if d.split == "train"], count)


def train(way: str, pipeline: Pipeline, options: argparse.Namespace, out: Path) -> dict:
    """Train in one way, in this process, which has done nothing else."""
    run, target, vocabulary = pipeline.run, pipeline.inputs.target, pipeline.inputs.target_vocabulary
    settings = settings_of(run, way)
    documents = training_documents(pipeline, options)
    dev = [d for d in pipeline.documents if d.split == "dev"]
    fused = store.Store(pipeline.fuse()) if way == "fused" else None
    lengths = vocabulary.count_tokens([d.text for d in documents])
    order = order_documents(lengths, passes=settings.passes, batch=settings.batch_documents, seed=settings.seed)
    if way in GOLD:
        import peers_gold

        watch = Watch()
        teacher = pipeline.inputs.sources[options.teacher]
        reading = [documents[i] for i in order]
        vocabularies = vocabulary, pipeline.inputs.load_source_vocabulary(options.teacher)
        counts = peers_gold.train(
            GOLD[way], target, teacher, *vocabularies, reading, dev, out, settings=settings, on_step=watch.step
        )
    else:
        watch = Watch()
        counts = target_training.train_target(
            target, vocabulary, documents, dev, out, fused=fused, settings=settings, progress=watch
        )
    dev_steps = target_training.choose_dev_steps(counts["steps"], settings.passes * settings.evaluations_per_pass)
    return counts | {"tokens": sum(lengths[i] for i in order)} | watch.result(dev_steps)


def trained(way: str, pipeline: Pipeline, options: argparse.Namespace) -> Path:
    """Return the folder of one way, trained once in a process of its own."""
    documents = training_documents(pipeline, options)
    recipe = manifest.Recipe(
        stage="train",
        parameters={
            "method": f"peers {way}",
            "teacher": options.teacher if way in GOLD else None,
            "gold": GOLD.get(way),
            "settings": dataclasses.asdict(settings_of(pipeline.run, way)),
            "documents": [d.id for d in documents],
            "threads": os.environ.get("OMP_NUM_THREADS"),
        },
        inputs={"corpus": pipeline.make_corpus().name, "model": pipeline.inputs.target.fingerprint}
        | ({"fused": pipeline.fuse().name} if way == "fused" else {}),
    )

    def build(out: Path) -> dict:
        command = [sys.executable, __file__, *sys.argv[1:], "--train", way, str(out)]
        printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        return json.loads(printed.splitlines()[-1])

    folder = Path(pipeline.run.output) / "peers" / f"{way}-{recipe.key}"
    manifest.build_once(folder, recipe, build)
    return folder


def scores_of(model: Model, pipeline: Pipeline, documents: list[corpus.Document]) -> list[scoring.Score]:
    loaded = load_model(model)
    layer = forward.find_output_layer(loaded)
    return scoring.score_documents(loaded, layer, pipeline.inputs.target_vocabulary, model.context_token, documents)


def cached_seconds(pipeline: Pipeline, options: argparse.Namespace, steps: int) -> dict:
    """Return what `fused` spent before its steps, for its share of the documents, and what it has on disk."""
    captured, aligned, fused = pipeline.capture()[options.teacher], pipeline.align()[options.teacher], pipeline.fuse()
    counts = manifest.read(captured)["counts"]
    documents = {d.id for d in training_documents(pipeline, options)}
    rows = [(len(trace.tokens), trace.document in documents) for trace in store.Store(captured)]
    share = sum(n for n, wanted in rows if wanted) / sum(n for n, _ in rows)
    seconds = {name: manifest.read(path)["seconds"] for name, path in (("capture", captured), ("align", aligned))}
    seconds["fuse"] = manifest.read(fused)["seconds"]
    fidelity = manifest.read(aligned)["counts"]["fidelity"]
    return {
        "seconds": {name: round(share * value, 2) for name, value in seconds.items()},
        "captured_before": counts["resumed_documents"],  # not in these seconds: a capture that was cut off went on
        "seconds_a_step": share * sum(seconds.values()) / steps,
        "bytes_a_token": sum(p.stat().st_size for p in captured.glob("*.parquet")) / counts["tokens"],
        "informed": statistics.mean(f["coverage"] for f in fidelity.values()),
        "fidelity": {domain: round(f["fidelity"], 4) for domain, f in fidelity.items()},
    }


def report(pipeline: Pipeline, options: argparse.Namespace) -> dict:
    folders = {way: trained(way, pipeline, options) for way in options.only or WAYS}
    heldout = spread([d for d in pipeline.documents if d.split == "heldout"], options.heldout)
    models = {"base": pipeline.inputs.target} | {w: locate_model(str(f / "model")) for w, f in folders.items()}
    scores = {name: scores_of(model, pipeline, heldout) for name, model in models.items()}
    pairs = [(a, b) for a in scores for b in ("clm", "fused") if b in scores and a not in ("base", "clm", b)]
    counts = {way: manifest.read(folder)["counts"] for way, folder in folders.items()}
    if "fused" in counts:
        cache = cached_seconds(pipeline, options, counts["fused"]["steps"])
        counts["fused"] |= {"cache": cache, "informed": cache["informed"]}
        counts["fused"]["amortised"] = counts["fused"]["seconds_a_step"] + cache["seconds_a_step"]
    return {
        "teacher": options.teacher,
        "passes": options.passes,
        "documents": len(training_documents(pipeline, options)),
        "heldout_documents": len(heldout),
        "threads": os.environ.get("OMP_NUM_THREADS") or os.cpu_count(),
        "ways": {way: of | {"gold": GOLD[way]} if way in GOLD else of for way, of in counts.items()},
        **bootstrap.summarize_scores(scores, pairs),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=Path, default=Path("models"), help="folder of the demo's GGUF files")
    parser.add_argument("--output", type=Path, default=Path("runs/peers"), help="where stages and models are kept")
    parser.add_argument("--teacher", choices=TEACHERS, default="qwen")
    parser.add_argument("--only", choices=WAYS, action="append", help="some of the ways")
    parser.add_argument("--passes", type=int, default=1, help="over the training documents")
    parser.add_argument("--steps", type=int, help="so many; trains on fewer documents then")
    parser.add_argument("--heldout", type=int, metavar="DOCUMENTS", help="fewer than there are, domains by turns")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--train", nargs=2, metavar=("WAY", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    pipeline = Pipeline(run_of(options), Console(stderr=True))
    if options.train:
        way, out = options.train
        print(json.dumps(train(way, pipeline, options, Path(out))))
        return
    result = report(pipeline, options)
    if options.json:
        print(json.dumps(result, indent=1))
        return
    for name, of in result["models"].items():
        line = f"{name:18s} {of['average']['bits_per_byte']:.4f} bits/byte"
        if way := result["ways"].get(name):
            told = " ".join(f"{option}={value}" for option, value in way.get("gold", {}).items())
            line += f" {way['seconds_a_step']:7.2f} s a step {way['peak_mib']:7,d} MiB  {told}"
        print(line)
    for pair, of in result["differences"].items():
        print(f"{pair:30s} {format_signed(of['average']['value'])} {format_interval(of['average'], format_signed)}")


if __name__ == "__main__":
    main()

"""Measure fidelity and speed of alignment in one run: `python benchmarks/alignment.py [--json]`.

On the demo's models (`make models` fetches them) and its corpus. What is slow to make (captured stores, sampled text)
is kept under `runs/benchmarks` and found again; times are medians of five, on one core where they say so.
"""

import argparse
import dataclasses
import functools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
from rapidfuzz.distance import Levenshtein
from rapidfuzz.process import cdist
from rich.console import Console

from fuselm.alignment import mined, nearest
from fuselm.alignment.aligner import METHODS, Aligner, add_gold_entries, align_branches, align_span
from fuselm.alignment.conditionals import KINDS, RELATIONS, ConditionalCounter, summarize_conditionals
from fuselm.documents import corpus
from fuselm.models import forward
from fuselm.models.loading import load_model, load_vocabulary
from fuselm.models.locating import locate_model
from fuselm.models.vocabulary import Vocabulary
from fuselm.results.fidelity_measurement import measure_fidelity
from fuselm.sources import capture, sampling
from fuselm.stores.distributions import Distributions
from fuselm.stores.retention import Policy
from fuselm.stores.store import Store, Trace, fingerprint_text, write_parts
from fuselm.system import atomic_files, manifest
from fuselm.system.progress import show_progress

ROOT = Path(__file__).parents[1]
WORK = ROOT / "runs" / "benchmarks"
MODELS = {
    "smollm2": "models/smollm2-135m-instruct.gguf",
    "gemma": "models/gemma-3-270m.gguf",
    "qwen": "models/qwen2.5-coder-0.5b-instruct.gguf",
}
PAIRS = [("gemma", "smollm2"), ("qwen", "smollm2"), ("smollm2", "gemma"), ("smollm2", "qwen")]
RUNS = 5
KEPT = 16  # entries of a row, in the speed measurements
LIKE_SPAN = ("span", "branches")  # methods that inform every position
SAMPLED_TOKENS, SAMPLE_LENGTH, SAMPLE_BATCH = 20_000, 256, 48
WRITTEN_TOKENS = 10_080  # of a part of what a source writes, whose texts are drawn all at once
console = Console(stderr=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON alone")
    parser.add_argument("--parts", default="speed,dynamic_programme,maps,fidelity", help="which to measure")
    parser.add_argument("--documents", type=int, default=10, help="held-out documents of each domain, for fidelity")
    parser.add_argument("--tokens", type=int, default=SAMPLED_TOKENS, help="that each source writes, for conditional")
    options = parser.parse_args()
    os.chdir(ROOT)
    parts = {"speed": speed, "dynamic_programme": dynamic_programme, "maps": maps}
    parts |= {"fidelity": lambda: fidelity(options.documents), "conditional": lambda: conditional(options.tokens)}
    if unknown := set(options.parts.split(",")) - set(parts):
        parser.error(f"--parts: no part '{min(unknown)}'; there are {', '.join(parts)}")
    result = {name: parts[name]() for name in options.parts.split(",")}
    print(json.dumps(result) if options.json else json.dumps(result, indent=1))


def median(run: Callable[[], None]) -> float:
    """Return the median of seconds, after one run to warm up."""
    run()
    seconds = []
    for _ in range(RUNS):
        began = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


# ---- speed


def speed() -> dict:
    """Measure microseconds per target token on one core, to read the store and to align, and how they grow.

    The target's tokens of a text are the same for all sources; what they cost is told apart.
    """
    texts = {d.id: d.text for d in documents("train", 5)}
    result = {}
    for source, target in PAIRS:
        store = captured(source, KEPT)
        aligner = Aligner(vocabulary(source), vocabulary(target), top_k=KEPT)
        segmentations = {name: aligner.target.segment(text) for name, text in texts.items()}
        tokens = sum(len(s.ids) for s in segmentations.values())
        traces = list(store)

        def align(traces: Iterable[Trace], aligner: Aligner = aligner, segmentations: dict = segmentations) -> None:
            for trace in traces:
                align_span(aligner, trace, segmentations[trace.document], texts[trace.document].encode())

        row = {
            "us_per_token_read_and_aligned": median(lambda store=store, align=align: align(store)) / tokens * 1e6,
            "us_per_token_aligned": median(lambda traces=traces, align=align: align(traces)) / tokens * 1e6,
            "us_per_token_read": median(lambda store=store: list(store)) / tokens * 1e6,
            "us_per_token_tokenized": median(
                lambda target=aligner.target: [target.segment(text) for text in texts.values()]
            )
            / tokens
            * 1e6,
        }
        for length in (1_000, 8_000, 64_000):
            trace, text = repeated(traces, texts, length)
            segmentation, data = aligner.target.segment(text), text.encode()
            took = median(lambda args=(aligner, trace, segmentation, data): align_span(*args))
            row[f"us_per_token_of_{length}_tokens"] = took / len(segmentation.ids) * 1e6
        result[f"{source}-{target}"] = row | branches_speed(source, target, traces, texts, segmentations, tokens)
    return result | {"startup_seconds": startup_seconds()}


def branches_speed(
    source: str, target: str, traces: list[Trace], texts: dict[str, str], segmentations: dict, tokens: int
) -> dict:
    """Measure `branches` on the same rows: when it reads them first, and when it remembers how strings are split."""
    aligner = Aligner(vocabulary(source), vocabulary(target), method="branches", top_k=KEPT, texts=list(texts.values()))

    def align() -> None:
        for trace in traces:
            align_branches(aligner, trace, segmentations[trace.document], texts[trace.document].encode())

    for trace in traces[:1]:  # compiles
        align_branches(aligner, trace, segmentations[trace.document], texts[trace.document].encode())
    began = time.perf_counter()
    align()
    first = time.perf_counter() - began
    return {
        "us_per_token_by_branches_at_first": first / tokens * 1e6,
        "us_per_token_by_branches": median(align) / tokens * 1e6,
    }


def repeated(traces: list[Trace], texts: dict[str, str], length: int) -> tuple[Trace, str]:
    """Repeat the documents one after another until there are `length` source tokens."""
    chosen: list[Trace] = []
    while sum(len(t.tokens) for t in chosen) < length:
        chosen.append(traces[7 * len(chosen) % len(traces)])  # of all domains by turns
    begins = np.cumsum([0, *(t.size for t in chosen)])
    rows = [t.distributions for t in chosen]
    trace = Trace(
        document="long",
        size=int(begins[-1]),
        nats=sum(t.nats for t in chosen),
        tokens=np.concatenate([t.tokens for t in chosen]),
        starts=np.concatenate([t.starts + b for t, b in zip(chosen, begins, strict=False)]).astype(np.int32),
        distributions=Distributions(
            offsets=np.append(0, np.cumsum(np.concatenate([d.counts for d in rows]))),
            ids=np.concatenate([d.ids for d in rows]),
            logprobs=np.concatenate([d.logprobs for d in rows]),
            gold=np.concatenate([d.gold for d in rows]),
            tail=np.concatenate([d.tail for d in rows]),
        ),
        weights=np.zeros((sum(map(len, rows)), 0), np.float32),
    )
    return trace, "".join(texts[t.document] for t in chosen)


def startup_seconds() -> float:
    """Time a new process that loads the compiled kernels and aligns its first document, and one that only imports."""
    code = (
        "import sys, time, numpy as np; sys.path.insert(0, 'tests/support'); import drawn\n"
        "from fuselm.alignment.aligner import Aligner\n"
        "source, target = drawn.byte_pairs([(0, 1)]), drawn.byte_pairs([(1, 0)])\n"
        "trace = drawn.trace_of(source, 'ab ab', np.random.default_rng(0), top_k=3)\n"
        "began = time.perf_counter(); Aligner(source, target).align(trace, 'ab ab'); print(time.perf_counter() - began)"
    )

    def run() -> float:
        return float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)

    run()
    return statistics.median(run() for _ in range(RUNS))


# ---- the paper's methods


def dynamic_programme() -> dict:
    """Pair positions of 2,048 x 2,048 tokens by the compiled version and by the direct one in Python."""
    text = " ".join(d.text for d in documents("train", 15))
    strings = [mined.strip_word_marks(v, v.segment(text).ids)[:2048] for v in map(vocabulary, PAIRS[0])]
    began = time.perf_counter()
    direct = direct_path(*strings)
    direct_seconds = time.perf_counter() - began
    seconds = median(lambda: mined.pair_positions(*strings))
    return {
        "tokens": [len(s) for s in strings],
        "direct_seconds": direct_seconds,
        "seconds": seconds,
        "times_faster": direct_seconds / seconds,
        "same_path": np.array_equal(mined.pair_positions(*strings), direct),
    }


def direct_path(source: list[str], target: list[str]) -> list[tuple[int, int]]:
    """Run the dynamic programme as one writes it down; only distances are computed in C."""
    table = [[float("inf")] * (len(target) + 1) for _ in range(len(source) + 1)]
    table[0][0] = 0
    for i, left in enumerate(source, start=1):
        row, above = table[i], table[i - 1]
        for j, right in enumerate(target, start=1):
            row[j] = Levenshtein.distance(left, right) + min(above[j - 1], above[j], row[j - 1])
    path, (i, j) = [], (len(source), len(target))
    while (i, j) != (0, 0):
        path.append((i - 1, j - 1))
        i, j = min([(i - 1, j - 1), (i - 1, j), (i, j - 1)], key=lambda cell: table[cell[0]][cell[1]])
    return path[::-1]


def maps() -> dict:
    """Map a whole vocabulary at minimum edit distance on all cores, beside brute force in C."""
    target = vocabulary("smollm2")
    result = {}
    for name in ("qwen", "gemma"):
        source = vocabulary(name)
        strings = [s.replace(source.word_mark, target.word_mark) for s in source.token_strings if s is not None]
        nearest.find_nearest_tokens(strings[:2048], target.token_strings)
        run = functools.partial(nearest.find_nearest_tokens, strings, target.token_strings)
        began = time.perf_counter()
        expected = brute_force(strings, target.token_strings)
        result[f"{name}-smollm2"] = {
            "brute_force_seconds": time.perf_counter() - began,
            "seconds": median(run),
            "same_map": np.array_equal(run(), expected),
        }
    return result


def brute_force(strings: list[str], vocabulary: list[str | None]) -> np.ndarray:
    ids = np.array([i for i, token in enumerate(vocabulary) if token is not None])
    tokens, chunk = [token for token in vocabulary if token is not None], 512
    return np.concatenate(
        [
            ids[
                cdist(strings[n : n + chunk], tokens, scorer=Levenshtein.distance, dtype=np.uint16, workers=-1).argmin(
                    1
                )
            ]
            for n in range(0, len(strings), chunk)
        ]
    )


# ---- fidelity


def fidelity(per_domain: int) -> dict:
    """Measure the fidelity of every method on held-out text and on text sampled from the source."""
    result = {}
    for source, target in PAIRS:
        for kind in ("heldout", "sampled"):
            path = WORK / f"{kind}.jsonl" if kind == "heldout" else WORK / f"sampled-{source}.jsonl"
            if kind == "heldout":
                write_rows(path, [{"text": d.text, "domain": d.domain} for d in documents("heldout", per_domain)])
            elif not path.exists():
                write_rows(path, [{"text": text, "domain": "sampled"} for text in sampled(source)])
            measured = measure_fidelity(
                MODELS[source],
                MODELS[target],
                path,
                methods=list(METHODS),
                top_k=64,
                sampled_tokens=SAMPLED_TOKENS if kind == "heldout" else 0,
                dtype="bfloat16",
                console=console,
            )
            result[f"{source}-{target} {kind}"] = {
                method: {
                    domain: {key: row[key] for key in ("fidelity", "coverage")} for domain, row in of["domains"].items()
                }
                | ({"conditional": of["conditional"]} if of["conditional"] else {})
                for method, of in measured["methods"].items()
            }
    return result


# ---- all that rows say, on text that the source writes


def conditional(tokens: int) -> dict:
    """Compare the mass of each kind of token with how often it comes, and the loss of rows that do not look ahead.

    `loss` is what `blind_rows` gives to the text beyond what `span` gives to it, which is the source's own probability,
    as a share of the source's bits: in all, and by the kind of token where it is lost.
    """
    result = {}
    for source, target in PAIRS:
        folders = written(source, tokens)
        learned = list(captured(source, 64))
        aligners = {m: Aligner(*map(vocabulary, (source, target)), method=m, traces=learned) for m in LIKE_SPAN}
        counter = ConditionalCounter(*map(vocabulary, (source, target)))
        counts: dict[str, list] = {m: [] for m in aligners}
        losses: list[tuple] = []
        for trace, row in read_written(folders):
            for method, aligner in aligners.items():
                aligned = aligner.align(trace, row["text"])
                place = {"domain": row["domain"], "begin": row["begin"]}
                counts[method].append(counter.count(trace, aligned, row["text"], **place))
            chosen, relations, kinds = counter.classify(aligned, row["text"], begin=row["begin"])
            segmentation = aligner.target.segment(row["text"])
            blind = aligner.branches.predict_tokens(add_gold_entries(trace), segmentation, row["text"].encode())
            gold = aligned.distributions.gold.astype(np.float64)
            losses += zip(relations, kinds, gold[chosen], blind[chosen], strict=True)
        result[f"{source}-{target}"] = {
            "conditional": {m: summarize_conditionals(of) for m, of in counts.items()},
            "loss": lost_shares(losses),
        }
    return result


def read_written(folders: list[Path]) -> Iterable[tuple[Trace, dict]]:
    """Yield the rows of what a source wrote, each trace with its text, its domain and where drawn tokens begin."""
    for folder in folders:
        texts = {row["id"]: row for row in map(json.loads, (folder / "texts.jsonl").open())}
        yield from ((trace, texts[trace.document]) for trace in Store(folder))


def lost_shares(losses: list[tuple]) -> dict[str, dict[str, float]]:
    """Return the loss beyond the source's own as a share of its bits, with the share of tokens, by kind of token."""
    relations, kinds, gold, blind = map(np.array, zip(*losses, strict=True))
    named = {name: relations == n for n, name in enumerate(RELATIONS)} | {k: kinds == n for n, k in enumerate(KINDS)}
    return {
        name: {
            "tokens": float(chosen.mean()),
            "lost": float((gold - blind)[chosen].sum() / -gold.sum()),
            "bits_a_token": float(-gold[chosen].mean() / np.log(2)),
        }
        for name, chosen in ({"all": np.ones(len(gold), bool)} | named).items()
        if chosen.any()
    }


def written(name: str, tokens: int) -> list[Path]:
    """Return folders of texts that a source wrote after the beginnings of held-out documents, and its rows of them.

    They are made by parts of `WRITTEN_TOKENS`, each of which is made once.
    """
    model, policy = locate_model(MODELS[name]), Policy(policy="top_k", top_k=64)
    texts = list(corpus.read_texts(ROOT / "examples/corpus/quickstart.jsonl"))
    after = [d for d in corpus.draw_splits(texts, dev=0.05, heldout=0.15, seed=0) if d.split == "heldout"]
    prompts = [json.loads(line) for line in (ROOT / "benchmarks/prompts.jsonl").open()]
    after += [dataclasses.replace(after[0], id=f"prompt-{n}", **row) for n, row in enumerate(prompts)]
    load = functools.cache(lambda: capture.load_source(model, vocabulary(name), dtype="bfloat16"))
    folders = []
    for seed in range(-(-tokens // WRITTEN_TOKENS)):
        recipe = manifest.Recipe(
            stage="capture",
            parameters={"tokens": WRITTEN_TOKENS, "seed": seed, **dataclasses.asdict(policy)},
            inputs={"model": model.fingerprint, "texts": [fingerprint_text(d.text) for d in after]},
        )
        folders.append(WORK / f"written-{name}-{recipe.key}")

        def build(out: Path, seed: int = seed) -> dict:
            reader = load()
            with show_progress(console, f"{name} writes") as shown:
                drawn = sampling.sample_texts(
                    reader, after, tokens=WRITTEN_TOKENS, seed=seed, progress=shown, batch=WRITTEN_TOKENS
                )
            lengths = [len(text.segmentation.read_ids) for text in drawn]

            def read() -> Iterable[Trace]:
                for batch in forward.group_into_batches(lengths, 1024):
                    chosen = [drawn[i].document for i in batch], [drawn[i].segmentation for i in batch]
                    yield from capture.trace_batch(reader, *chosen, policy=policy)

            counts = write_parts(out, read())
            rows = [{"id": t.document.id, "domain": t.document.domain, "text": t.document.text} for t in drawn]
            write_rows(out / "texts.jsonl", [row | {"begin": t.begin} for row, t in zip(rows, drawn, strict=True)])
            return {**counts, "vocabulary_size": vocabulary(name).size}

        manifest.build_once(folders[-1], recipe, build)
    return folders


def sampled(name: str) -> list[str]:
    """Sample texts from a model at temperature 1, without special tokens."""
    import torch

    model = locate_model(MODELS[name])
    loaded, spelled = load_model(model, dtype="bfloat16"), vocabulary(name).token_bytes
    torch.manual_seed(0)
    texts, count = [], 0
    with show_progress(console, f"sample from {name}") as shown:
        shown.start(SAMPLED_TOKENS, unit="tokens")
        while count < SAMPLED_TOKENS:
            context = torch.full((SAMPLE_BATCH, 1), model.context_token)
            drawn = loaded.generate(
                context,
                attention_mask=torch.ones_like(context),
                do_sample=True,
                top_k=0,
                top_p=1.0,
                temperature=1.0,
                max_new_tokens=SAMPLE_LENGTH,
                suppress_tokens=[i for i, string in enumerate(spelled) if string is None],
                pad_token_id=model.context_token,
            )[:, 1:].tolist()
            for ids in drawn:
                if (text := whole_characters(b"".join(spelled[i] or b"" for i in ids))) is not None:
                    texts.append(text)
                    count += len(ids)
                    shown.advance(len(ids))
    return texts


def whole_characters(data: bytes) -> str | None:
    """Drop the character that was cut off at the end of a text; return None if more than that is damaged."""
    for end in range(len(data), max(len(data) - 4, -1), -1):
        try:
            return data[:end].decode()
        except UnicodeDecodeError:
            continue
    return None


# ---- models, documents, stores


def vocabulary(name: str) -> Vocabulary:
    if name not in _vocabularies:
        model = locate_model(MODELS[name])
        _vocabularies[name] = load_vocabulary(model)
    return _vocabularies[name]


_vocabularies: dict[str, Vocabulary] = {}


def documents(split: str, per_domain: int) -> list[corpus.Document]:
    """Return the first documents of each domain in the quickstart's split."""
    texts = list(corpus.read_texts(ROOT / "examples/corpus/quickstart.jsonl"))
    chosen = [d for d in corpus.draw_splits(texts, dev=0.1, heldout=0.65, seed=0) if d.split == split]
    return [
        d for name in sorted({d.domain for d in chosen}) for d in [d for d in chosen if d.domain == name][:per_domain]
    ]


def captured(name: str, top_k: int) -> Store:
    """Return a store of the training documents, made once."""
    model, texts = locate_model(MODELS[name]), documents("train", 5)
    policy = Policy(policy="top_k", top_k=top_k)
    recipe = manifest.Recipe(
        stage="capture", parameters=dataclasses.asdict(policy), inputs={"model": model.fingerprint}
    )
    folder = WORK / f"captured-{name}-{recipe.key}"

    def build(out: Path) -> dict:
        loaded = load_model(model, dtype="bfloat16")
        source = capture.LoadedSource(
            model=loaded,
            layer=forward.find_output_layer(loaded),
            vocabulary=vocabulary(name),
            context_token=model.context_token,
            context_length=model.context_length,
        )
        with show_progress(console, f"capture {name}") as shown:
            return capture.capture_from_model(source, texts, out, policy=policy, batch_tokens=2048, progress=shown)

    manifest.build_once(folder, recipe, build)
    return Store(folder)


def write_rows(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_files.write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


if __name__ == "__main__":
    main()

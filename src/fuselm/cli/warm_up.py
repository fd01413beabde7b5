"""Do before the first run what is done once on a machine: `python -m fuselm.cli.warm_up [MODEL...]`.

Without models it compiles every kernel of a usual run, a minute at most: it reads, aligns and fuses a text by two
vocabularies of single characters and pairs of them, with random distributions. With models it converts GGUF files and
hashes weights.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from fuselm.alignment.aligner import Aligner, align_store
from fuselm.documents.corpus import Document
from fuselm.fusion.fuse import fuse_stores
from fuselm.models import scan
from fuselm.models.locating import locate_model
from fuselm.models.vocabulary import Segmentation, Vocabulary
from fuselm.runs.options.alignment import AlignOptions
from fuselm.runs.options.fusion import FuseOptions
from fuselm.stores import retention, store
from fuselm.stores.distributions import Distributions
from fuselm.system import manifest
from fuselm.system.library_output import silence_libraries
from fuselm.system.manifest import Recipe
from fuselm.system.progress import Progress, show_progress, use_console
from fuselm.training import batches

TEXT = "the river rose, and nobody had seen it coming"
DRAWS = 5


def compile_kernels(folder: Path, progress: Progress) -> None:
    """Make a small run's stores in `folder`."""
    documents = [Document(id="0", origin="0", domain="english", split="train", text=TEXT)]
    vocabularies = [_vocabulary(["t h"]), _vocabulary(["h e", "s e"])]
    aligned = {}
    for name, vocabulary in zip(("first", "second"), vocabularies, strict=True):
        captured = folder / name
        manifest.build_once(captured, Recipe(stage="capture"), lambda out, v=vocabulary: _write(v, documents, out))
        aligner = Aligner(vocabulary, vocabularies[0], method=AlignOptions().method, traces=store.Store(captured))
        manifest.build_once(
            folder / f"{name} aligned",
            Recipe(stage="align"),
            lambda out, a=aligner, c=captured: align_store(a, store.Store(c), documents, out, progress=progress),
        )
        aligned[name] = store.Store(folder / f"{name} aligned")
    fused = folder / "fused"
    options = FuseOptions().recipe | {"vocabulary_size": vocabularies[0].size}
    manifest.build_once(
        fused,
        Recipe(stage="fuse"),
        lambda out: fuse_stores(aligned, documents, out, **options, progress=progress),
    )
    read = batches.Batches(
        documents,
        vocabularies[0],
        store.Store(fused),
        passes=1,
        batch_documents=1,
        pack_tokens=None,
        seed=0,
        processes=1,
    )
    batches.Collator(0, packed=read.packed)([read[0]])


def _vocabulary(merges: list[str]) -> Vocabulary:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = {token: n for n, token in enumerate([*alphabet, *(merge.replace(" ", "") for merge in merges)])}
    tokenizer = Tokenizer(BPE(tokens, [tuple(merge.split()) for merge in merges]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return Vocabulary(tokenizer, len(tokens))


def _write(vocabulary: Vocabulary, documents: list[Document], out: Path) -> dict:
    return store.write_parts(out, (_trace(vocabulary, vocabulary.segment(d.text), d) for d in documents))


def _trace(vocabulary: Vocabulary, segmentation: Segmentation, document: Document) -> store.Trace:
    """Return random distributions kept as in a capture, from logits of both dtypes that models have."""
    rows, gold = len(segmentation.ids), torch.as_tensor(segmentation.ids, dtype=torch.long)
    logits = torch.randn(rows, vocabulary.size, generator=torch.Generator().manual_seed(0))
    uniform = np.linspace(0, 0.9, rows)
    for read in (logits.bfloat16(), logits):
        found = scan.survey_logits(read)
        for policy in (retention.Policy(policy="threshold", threshold=0.01, top_k=9), _SAMPLED):
            kept = retention.retain_entries(policy, read, found, gold=gold, uniform=uniform)
    return store.Trace(
        document=document.id,
        text=store.fingerprint_text(document.text),
        size=segmentation.size,
        nats=float(rows),
        tokens=segmentation.ids,
        starts=segmentation.starts,
        distributions=Distributions(
            offsets=np.append(0, np.cumsum(kept.counts)).astype(np.int64),
            ids=kept.ids,
            logprobs=kept.logprobs,
            gold=(logits.gather(1, gold[:, None])[:, 0] - found.log_z).numpy(),
            tail=kept.tail,
        ),
        weights=np.zeros((rows, 0), np.float32),
    )


_SAMPLED = retention.Policy(policy="sampled", draws=DRAWS)

if __name__ == "__main__":
    silence_libraries()
    screen = Console(stderr=True)
    use_console(screen)
    for model in sys.argv[1:]:
        locate_model(model)
    if not sys.argv[1:]:
        with tempfile.TemporaryDirectory() as temporary, show_progress(Console(quiet=True), "") as shown:
            compile_kernels(Path(temporary), shown)

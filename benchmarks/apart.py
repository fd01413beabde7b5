"""Train one model on several domains apart, then make one of them: by fusion, ensembles and averaged weights.

    python benchmarks/apart.py                            # again after an interruption: it resumes
    python benchmarks/apart.py seed=1 train.passes=3      # options of the run, as `fuselm run` takes them

Wan et al. 2024, table 7, in miniature. The run file's target (`base`) is trained on the text alone of each domain,
which gives models of one architecture and tokenizer, each the best by its own domain's development documents. Of them:

- `fused`: they are the sources of an ordinary run over the training documents of all these domains;
- `ensemble`: the mean of their probabilities of each token; `ensemble-geometric` the geometric mean, renormalised;
- `merged`: the mean of their weights;
- `clm`: none of them, but the target trained on the same documents as `fused`, on the text alone.

Each model trained apart has a part of that text, and so of the steps; options of `train.clm` are theirs as well as
`clm`'s. All are scored in bits per byte of the held-out documents of these domains, and of the corpus's other domains
(`elsewhere`), which nothing was trained on. Stages are kept in --output. Of the run file its sources are not used.
"""

import argparse
import gc
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from jaxtyping import Float, Int
from rich import box
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text
from torch import Tensor

from fuselm.documents import corpus
from fuselm.models import forward
from fuselm.models.loading import load_model
from fuselm.models.locating import Model, locate_model
from fuselm.models.vocabulary import Vocabulary
from fuselm.results import bits_per_byte, bootstrap, scoring
from fuselm.results.pages.formats import format_interval, format_signed
from fuselm.results.scoring import Score
from fuselm.runs import config
from fuselm.runs.options.sources import LocalSourceOptions
from fuselm.runs.pipeline import Pipeline
from fuselm.runs.stages import corpus as corpus_stage
from fuselm.runs.stages.train import WEIGHTS
from fuselm.system import atomic_files, manifest, progress
from fuselm.training import target_training

ROOT = Path(__file__).parent.parent
OURS = ("output", "sources")  # options of a run that this sets itself
ROWS = 256  # of logits at a time
RIVALS = ("clm", "ensemble", "ensemble-geometric", "merged", "base")  # what `fused` is compared with


def arithmetic(
    hidden: Sequence[Float[Tensor, "rows hidden"]], layers: Sequence[forward.OutputLayer], gold: Int[Tensor, "rows"]
) -> Float[Tensor, "rows"]:
    """Return the log of the mean of the models' probabilities of each row's gold id."""
    each = [forward.compute_gold_logprobs(h, layer, gold) for h, layer in zip(hidden, layers, strict=True)]
    return torch.stack(each).logsumexp(dim=0) - math.log(len(each))


def geometric(
    hidden: Sequence[Float[Tensor, "rows hidden"]], layers: Sequence[forward.OutputLayer], gold: Int[Tensor, "rows"]
) -> Float[Tensor, "rows"]:
    """Return the log of their renormalised geometric mean: what the mean of the logits gives."""
    result = []
    for *chunk, ids in zip(*(h.split(ROWS) for h in hidden), gold.split(ROWS), strict=True):
        logits = sum(layer.compute_logits(h) for h, layer in zip(chunk, layers, strict=True)) / len(layers)
        result.append(logits.gather(1, ids[:, None])[:, 0] - forward.compute_logsumexp(logits))
    return torch.cat(result)


MEANS = {"ensemble": arithmetic, "ensemble-geometric": geometric}


def score_ensemble(
    models: Sequence[Model],
    vocabulary: Vocabulary,
    documents: Sequence[corpus.Document],
    *,
    mean: str,
    dtype: str = "auto",
    batch_tokens: int = 1024,
    advance: Callable[[int], None] = lambda tokens: None,
) -> list[Score]:
    """Score each document by models of one tokenizer together; each of them reads it."""
    loaded = [load_model(model, dtype=dtype) for model in models]
    layers = [forward.find_output_layer(model) for model in loaded]

    def gold_logprobs(inputs, mask, kept, gold):
        pairs = zip(loaded, layers, strict=True)
        hidden = [forward.compute_hidden_states(model, layer, inputs, mask)[mask.bool()] for model, layer in pairs]
        return MEANS[mean](hidden, layers, gold)

    with torch.inference_mode():
        bits = scoring.compute_document_bits(
            gold_logprobs,
            loaded[0].device,
            vocabulary,
            models[0].context_token,
            documents,
            batch_tokens=batch_tokens,
            advance=advance,
        )
    return scoring.sum_pieces(bits, documents, scoring.count_unspelled(vocabulary, documents))


def merge(models: Sequence[Model], target: Model, folder: Path) -> None:
    """Write a model folder with the mean of the models' weights, in the target's precision."""
    loaded = [load_model(model, dtype="float32", device="cpu") for model in models]
    weights = [model.state_dict() for model in loaded]
    mean = {name: torch.stack([of[name] for of in weights]).mean(dim=0) for name in weights[0]}
    target_training.save_model_folder(loaded[0], mean, target, folder)


def cut_corpus(run: config.RunOptions, domains: Sequence[str], folder: Path, documents: int | None) -> list[Path]:
    """Write the run's texts as a file for each of the `domains`, then one for all others.

    With `documents`, only the first so many of each domain are written. Raises `ValueError` if a domain has no text.
    """
    texts: dict[str, list[dict[str, str]]] = {}
    for file in run.corpus.files:
        for row in corpus.read_texts(Path(file)):
            said = {} if row.split is None else {"split": row.split}
            texts.setdefault(row.domain, []).append({"domain": row.domain, "text": row.text} | said)
    for domain in domains:
        if domain not in texts:
            raise ValueError(f"--domains: no text is of '{domain}'; there are {', '.join(texts)}")
    folder.mkdir(parents=True, exist_ok=True)
    others = [domain for domain in texts if domain not in domains]
    groups = {f"{n}-{domain}.jsonl": [domain] for n, domain in enumerate(domains)}
    groups |= {"elsewhere.jsonl": others} if others else {}
    for name, members in groups.items():
        rows = [row for domain in members for row in texts[domain][:documents]]
        atomic_files.write_text(folder / name, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return [folder / name for name in groups]


class Experiment:
    """Hold the models and their scores, each made once in the run's folder."""

    def __init__(self, run: config.RunOptions, domains: Sequence[str], documents: int | None, console: Console):
        self.run = run
        self.domains = domains
        self.console = console
        self.files = cut_corpus(run, domains, Path(run.output) / "texts", documents)
        # Which documents a domain holds out depends on no other domain, so those of this corpus are those of all runs.
        self.whole = self.pipeline({"target": run.target.model_dump()}, self.files)
        self.base = self.whole.inputs.target
        self.folders: dict[str, Path] = {}  # of what is trained

    def pipeline(self, sources: Mapping[str, Mapping], files: Sequence[Path]) -> Pipeline:
        """Return the pipeline of the run with other sources and texts."""
        changed = {
            "sources": {name: LocalSourceOptions(**of) for name, of in sources.items()},
            "corpus": self.run.corpus.model_copy(update={"files": [str(file) for file in files]}),
        }
        return Pipeline(self.run.model_copy(update=changed), self.console)

    def trained(self, name: str, pipeline: Pipeline, method: str) -> Model:
        if any(step.is_needed for step in pipeline.dry_run(lambda p: p.train_method(method))):
            self.console.print(f"\n[bold]{name}[/bold]", highlight=False)
        self.folders[name] = pipeline.train_method(method)
        if pipeline.has_made_anything:
            gc.collect()  # a trainer holds itself, and with it the weights and their moments
        return locate_model(str(self.folders[name] / WEIGHTS))

    def models(self) -> dict[str, list[Model]]:
        """Return the models of each way: one, or several to be ensembled."""
        apart = {}
        for domain, file in zip(self.domains, self.files, strict=False):
            pipeline = self.pipeline({"target": self.run.target.model_dump()}, [file])
            apart[domain] = self.trained(f"{domain}-alone", pipeline, "clm")
        sources = {d: {"model": str(m.folder), "dtype": self.run.target.dtype} for d, m in apart.items()}
        together = self.pipeline(sources, self.files[: len(self.domains)])
        own = {f"{domain}-alone": [model] for domain, model in apart.items()}
        return {
            "base": [self.base],
            **own,
            "merged": [self.merged(list(apart.values()))],
            **{name: list(apart.values()) for name in MEANS},
            "clm": [self.trained("clm", together, "clm")],
            "fused": [self.trained("fused", together, "fused")],
        }

    def merged(self, models: Sequence[Model]) -> Model:
        recipe = manifest.Recipe(stage="merge", inputs=_fingerprints([self.base, *models]))

        def build(out: Path, _: progress.Progress) -> dict:
            merge(models, self.base, out / WEIGHTS)
            return {"models": len(models)}

        return locate_model(str(self.built("merge", "merged", recipe, build) / WEIGHTS))

    def scores(self, name: str, models: Sequence[Model]) -> list[Score]:
        """Score the held-out documents of all domains."""
        documents = [d for d in self.whole.documents if d.split == "heldout"]
        options = {"dtype": self.run.target.dtype, **self.run.evaluate.model_dump()}
        mean = {"mean": name} if len(models) > 1 else {}
        recipe = manifest.Recipe(
            stage="evaluate",
            parameters={**options, **mean, "split": "heldout"},
            inputs={
                **_fingerprints(models),
                "corpus": corpus_stage.identify(self.whole),
            },
        )

        def build(out: Path, shown: progress.Progress) -> dict:
            vocabulary = self.whole.inputs.target_vocabulary
            if mean:
                shown.start(sum(vocabulary.count_tokens([d.text for d in documents])), unit="tokens")
                scores = score_ensemble(models, vocabulary, documents, **options, **mean, advance=shown.advance)
            else:
                scores = bits_per_byte.score_model(models[0], vocabulary, documents, **options, progress=shown)
            atomic_files.write_text(out / "scores.json", json.dumps([asdict(s) for s in scores], indent=0))
            return {"documents": len(scores), "bits_per_byte": scoring.compute_bits_per_byte(scores)}

        folder = self.built("evaluate", name, recipe, build)
        return [Score(**row) for row in json.loads((folder / "scores.json").read_text())]

    def built(
        self, stage: str, name: str, recipe: manifest.Recipe, build: Callable[[Path, progress.Progress], dict]
    ) -> Path:
        folder = Path(self.run.output) / stage / f"{name}-{recipe.key}"
        with progress.show_progress(self.console, f"{stage} {name}") as shown:
            if manifest.build_once(folder, recipe, lambda out: build(out, shown)):
                shown.note(f"done in {manifest.read(folder)['seconds']:,.1f} s")
        return folder

    def report(self) -> dict:
        models = self.models()
        scores = {name: self.scores(name, of) for name, of in models.items()}
        pairs = [("fused", rival) for rival in RIVALS]
        here = {name: [s for s in of if s.domain in self.domains] for name, of in scores.items()}
        elsewhere = {name: [s for s in of if s.domain not in self.domains] for name, of in scores.items()}
        return {
            "domains": list(self.domains),
            "heldout_documents": len(here["base"]),
            "training": {name: _training(folder) for name, folder in self.folders.items()},
            "forward_passes": {name: len(of) for name, of in models.items()},
            **bootstrap.summarize_scores(here, pairs),
            "elsewhere": bootstrap.summarize_scores(elsewhere, pairs) if elsewhere["base"] else None,
            "config": self.run.model_dump(mode="json", exclude=set(OURS)),
        }


def _fingerprints(models: Sequence[Model]) -> dict[str, str]:
    return {f"model {n}": model.fingerprint for n, model in enumerate(models)}


def _training(folder: Path) -> dict:
    record = manifest.read(folder)
    counted = ("steps", "best_step", "tokens", "text_tokens", "dev_bits_per_byte")
    return {
        "learning_rate": record["parameters"]["learning_rate"],
        "passes": record["parameters"]["passes"],
        **{name: record["counts"][name] for name in counted},
        "seconds": record["seconds"],
    }


def table(result: Mapping) -> Table:
    """Draw the bits per byte of every model, with differences above their intervals and other domains on the right."""
    elsewhere = result["elsewhere"] or {"models": {}, "differences": {}}
    shown = Table(box=box.SIMPLE, show_edge=False, padding=0, title_justify="left")
    shown.title = "bits per byte of held-out text, differences with 95% intervals; lower is better"
    others = list(elsewhere["models"]["base"]["domains"]) if elsewhere["models"] else []
    for heading in ["", *result["domains"], "average", *(f"elsewhere: {d}" for d in others), "forward passes"]:
        shown.add_column(heading.replace("_", " "), justify="right" if heading else "left", overflow="fold")

    def cells(kind: str, name: str) -> list[Mapping[str, float]]:
        row = result[kind][name]
        of_others = [elsewhere[kind][name]["domains"][d] for d in others]
        return [*(row["domains"][d] for d in result["domains"]), row["average"], *of_others]

    for name in result["models"]:
        values = [f"{cell['bits_per_byte']:.3f}" for cell in cells("models", name)]
        shown.add_row(
            name,
            *values,
            str(result["forward_passes"][name]),
            style="bold" * (name == "fused"),
            end_section=name == "fused",
        )
    for pair in result["differences"]:
        values = [
            Group(Text(format_signed(cell["value"])), Text(format_interval(cell, format_signed), style="dim"))
            for cell in cells("differences", pair)
        ]
        shown.add_row(pair.replace("-", " - ", 1), *values, "")
    return shown


def load(options: argparse.Namespace) -> tuple[config.RunOptions, list[str]]:
    """Load the run, with the domains as names of its sources, and the domains. Raises `ValueError`."""
    domains = options.domains.split(",")
    if len(domains) < 2 or len(set(domains)) < len(domains):
        raise ValueError(f"--domains {options.domains}: takes two or more, each once, as french,german")
    for given in options.overrides:
        if given.partition("=")[0].partition(".")[0] in OURS:
            raise ValueError(f"{given}: set by this benchmark; leave it out (--output says where its stages are kept)")
    sources = {domain: str(options.output / domain) for domain in domains}  # names alone count, until they are trained
    ours = [f"output={options.output}", f"sources={json.dumps(sources)}"]
    return config.load(options.run, [*options.overrides, *ours]), domains


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("overrides", nargs="*", help="options of the run to override: train.passes=3 seed=1")
    parser.add_argument("--run", type=Path, default=ROOT / "examples/full.yaml", help="run file")
    parser.add_argument("--output", type=Path, default=Path("runs/apart"), help="where stages and models are kept")
    parser.add_argument("--domains", default="french,german,python", help="to train apart on")
    parser.add_argument("--documents", type=int, help="of each domain, the first so many; all")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(arguments)
    try:
        run, domains = load(options)
        result = Experiment(run, domains, options.documents, Console(stderr=True)).report()
    except ValueError as error:
        parser.exit(2, f"apart: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, "\napart: stopped; run the same command again and it resumes here\n")
    print(json.dumps(result, indent=1)) if options.json else Console().print(table(result))


if __name__ == "__main__":
    main()

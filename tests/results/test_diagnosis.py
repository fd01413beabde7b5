"""Check the numbers of diagnosis.py by their definitions, its words and page, and the command on a run."""

import io
import json
import math
import re
import shlex
from dataclasses import replace
from pathlib import Path

import drawn
import numpy as np
import pytest
import tiny_run
from rich.console import Console
from tiny_run import fuselm

from fuselm.documents import document_list
from fuselm.documents.corpus import Document
from fuselm.results import diagnosis, diagnosis_sources, diagnosis_words
from fuselm.results.pages import diagnosis_page, diagnosis_table, figures
from fuselm.runs import config, diagnosis_inputs, run_folders
from fuselm.runs.inputs import Inputs
from fuselm.runs.options import files
from fuselm.stores.distributions import Distributions
from fuselm.stores.store import Store, Trace, write_parts
from fuselm.system import manifest
from fuselm.system.progress import Progress

VOCAB, TOKENS, SIZE = 19, 7, 23
DOMAINS = ["<b>&", "tech"]


def trace(name: str, quality: float, seed: int, tokens: np.ndarray) -> Trace:
    """Return random rows that give the token that comes a probability of `quality` or more."""
    random = np.random.default_rng(seed)
    rows, gold = [], []
    for token in tokens.tolist():
        p = random.dirichlet(np.ones(VOCAB)) * (1 - quality)
        p[token] += quality
        rows.append(dict(enumerate(p.tolist())))
        gold.append(math.log(p[token]))
    return Trace(
        document=name,
        size=SIZE,
        nats=-sum(gold),
        tokens=tokens.astype(np.int32),
        starts=np.arange(len(tokens), dtype=np.int32) * 3,
        distributions=drawn.distributions_of(rows, [0.0] * len(rows), gold),
        weights=np.zeros((len(tokens), 0), np.float32),
    )


def make(folder: Path, **qualities: tuple[float, float]) -> tuple[dict[str, Store], list[Document]]:
    """Write a store of each source, with three documents a domain, in which it has the given quality."""
    names = [(f"{domain}{n}", domain) for domain in DOMAINS for n in range(3)]
    tokens = np.random.default_rng(1).integers(0, VOCAB, (len(names), TOKENS))
    stores = {}
    for s, (source, of_domain) in enumerate(qualities.items()):
        traces = [
            trace(name, of_domain[DOMAINS.index(domain)], 97 * s + n, tokens[n])
            for n, (name, domain) in enumerate(names)
        ]

        def build(out: Path, _: object = None, traces: list[Trace] = traces) -> dict:
            return write_parts(out, traces)

        manifest.build_once(folder / source, manifest.Recipe(stage="align"), build)
        stores[source] = Store(folder / source)
    return stores, [Document(id=n, origin=n, domain=d, split="train", text="") for n, d in names]


def diagnosed(stores: dict[str, Store], documents: list[Document], own: str | None = None, **options) -> dict:
    quiet = Progress(Console(quiet=True), "diagnose")
    return diagnosis.diagnose(stores, documents, own=own, vocabulary_size=VOCAB, progress=quiet, **options)


@pytest.fixture
def usual(tmp_path):
    """Return two sources that know one domain each, and the target, which knows little."""
    return make(tmp_path, alpha=(0.8, 0.3), beta=(0.3, 0.8), own=(0.1, 0.1))


def test_bits_come_from_gold_tokens_and_the_oracle_takes_the_best_of_each(usual):
    stores, documents = usual
    result = diagnosed(*usual, own="own")
    for domain in DOMAINS:
        golds = [
            np.concatenate([store.read(d.id).distributions.gold for d in documents if d.domain == domain])
            for store in stores.values()
        ]
        for name, gold in zip(stores, golds, strict=True):
            expected = -gold.sum() / math.log(2) / (3 * SIZE)
            assert result["sources"][name]["bits_per_byte"][domain] == pytest.approx(expected, rel=1e-5)
        best = -np.max(golds, axis=0).sum() / math.log(2) / (3 * SIZE)
        assert result["oracle"]["bits_per_byte"][domain] == pytest.approx(best, rel=1e-5)
        shares = np.bincount(np.argmax(golds, axis=0), minlength=3) / (3 * TOKENS)
        assert list(result["wins"][domain]["tokens"].values()) == pytest.approx(shares.tolist())
    means = [np.mean([row["bits_per_byte"][d] for d in DOMAINS]) for row in result["ways"].values()]
    assert [row["bits_per_byte"]["average"] for row in result["ways"].values()] == pytest.approx(means)
    assert result["wins"][DOMAINS[0]]["documents"] == {"alpha": 1.0, "beta": 0.0, "own": 0.0}
    assert (result["documents"], result["tokens"], result["bytes"]) == (6, 6 * TOKENS, 6 * SIZE)


def test_a_source_that_cannot_spell_a_domain_is_neither_compared_nor_weighted_there(usual):
    """Such a source has information about few tokens, because it reads the text as unknown characters."""
    stores, documents = usual
    stores["alpha"].manifest["counts"]["fidelity"] = {DOMAINS[0]: {"unspelled": 0.9}}
    stores["beta"].manifest["counts"]["fidelity"] = {DOMAINS[1]: {"unspelled": 0.009}}
    result = diagnosed(stores, documents, own="own")
    assert result["unspelled"] == {"alpha": {DOMAINS[0]: 0.9}, "beta": {DOMAINS[1]: 0.009}}
    bits = {name: row["bits_per_byte"] for name, row in result["sources"].items()}
    assert bits["alpha"][DOMAINS[0]] is None and bits["alpha"]["average"] is None
    assert bits["alpha"][DOMAINS[1]] and all(bits["beta"].values())
    assert result["best_source"] == "beta" and result["gains"][DOMAINS[0]]["best_source"] == "beta"
    assert result["weights"][DOMAINS[0]]["alpha"] == 0 and result["weights"][DOMAINS[1]]["alpha"] > 0
    assert result["wins"][DOMAINS[0]]["tokens"]["alpha"] == result["wins"][DOMAINS[0]]["documents"]["alpha"] == 0
    printed = Console(width=200, record=True, file=io.StringIO())
    printed.print(diagnosis_table.draw_diagnosis(result))
    assert "alpha 90.0%" in printed.export_text()


def silent(store: Store, folder: Path, rows: slice) -> Store:
    """Return the store without some rows of each document, as an alignment may leave it."""

    def build(out: Path) -> dict:
        traces = []
        for name in store.documents:
            whole = store.read(name)
            kept = drawn.rows_of(whole.distributions)
            gold, tail = whole.distributions.gold.tolist(), whole.distributions.tail.tolist()
            for n in range(TOKENS)[rows]:
                kept[n], gold[n], tail[n] = {}, 0.0, 1.0
            traces.append(replace(whole, distributions=drawn.distributions_of(kept, tail, gold)))
        return write_parts(out, traces)

    manifest.build_once(folder, manifest.Recipe(stage="align"), build)
    return Store(folder)


def test_tokens_without_information_from_a_source_are_left_out_for_all(usual, tmp_path):
    stores, documents = usual
    fewer = stores | {"alpha": silent(stores["alpha"], tmp_path / "fewer", slice(3, None))}
    result = diagnosed(fewer, documents, own="own")
    for domain in DOMAINS:
        for name, store in stores.items():
            gold = [store.read(d.id).distributions.gold[:3].sum() for d in documents if d.domain == domain]
            value = result["sources"][name]["bits_per_byte"][domain]
            assert value == pytest.approx(-sum(gold) / math.log(2) / (3 * 9), rel=1e-5)
        best = [np.max([s.read(d.id).distributions.gold[:3] for s in stores.values()], axis=0) for d in documents]
        best = -sum(b.sum() for b, d in zip(best, documents, strict=True) if d.domain == domain)
        assert result["oracle"]["bits_per_byte"][domain] == pytest.approx(best / math.log(2) / (3 * 9), rel=1e-5)
    assert result["compared"] == pytest.approx(dict.fromkeys([*DOMAINS, "average"], 9 / SIZE))
    assert "cover the 39% of the text for which every source has" in diagnosis_words.describe_compared_share(result)
    assert diagnosis_words.describe_compared_share(
        diagnosed(*usual)
    ) == "" and "39% of the text" in diagnosis_page.render_page(result)
    none = stores | {"alpha": silent(stores["alpha"], tmp_path / "none", slice(None))}
    with pytest.raises(ValueError, match=r"^no token of domain '<b>&' has rows of all sources; take another align"):
        diagnosed(none, documents)


def test_learned_weights_are_never_worse_than_any_source(usual):
    result = diagnosed(*usual)
    learned = result["ways"][diagnosis.LEARNED]["bits_per_byte"]
    for domain in DOMAINS:
        assert learned[domain] <= min(row["bits_per_byte"][domain] for row in result["sources"].values()) + 1e-6


def test_agreement_is_of_first_tokens_and_of_probability(usual):
    stores, documents = usual
    pair = diagnosed(*usual)["agreement"][0]
    assert pair["sources"] == ["alpha", "beta"]
    rows = [
        [row for d in documents for row in drawn.rows_of(stores[name].read(d.id).distributions)]
        for name in pair["sources"]
    ]
    same = np.mean([max(a, key=a.get) == max(b, key=b.get) for a, b in zip(*rows, strict=True)])
    overlap = np.mean([sum(min(a[i], b[i]) for i in a) for a, b in zip(*rows, strict=True)])
    assert (pair["same_first"], pair["overlap"]) == pytest.approx((same, overlap), rel=1e-5)


def test_rows_without_information_and_ids_that_one_keeps_agree_on_nothing():
    def of(*rows: dict[int, float]) -> Distributions:
        return drawn.distributions_of(list(rows), [1 - sum(r.values()) for r in rows], [0.0] * len(rows))

    left, right = of({1: 0.5, 2: 0.25}, {}, {7: 0.5}), of({2: 0.5, 3: 0.25}, {4: 0.5}, {7: 0.75})
    assert diagnosis._measure_agreement(left, right, VOCAB).tolist() == pytest.approx([2, 1, 0.75])


def test_a_target_that_knows_less_can_learn_and_from_whom(usual):
    result = diagnosed(*usual, own="own")
    first, second, third = result["verdict"]
    gain = result["gains"]["average"]["over_target"]
    assert first.startswith("Fusing can help: ") and f"{gain:.3f} bits per byte" in first
    assert "(alpha knows most)" in second and "(beta knows most)" in second
    assert "it takes more than one source" in third
    assert set(result["judged"].values()) == {"helps"}


def test_the_best_writer_of_a_domain_should_write_if_it_is_far_better_than_the_target(usual):
    def said(writers: list[str]) -> tuple[dict, str]:
        result = diagnosed(*usual, own="own", writers=writers)
        return result["write"], result["verdict"][-1]

    ratio, line = said(["alpha", "beta"])
    assert ratio == {"alpha": {DOMAINS[0]: 4}, "beta": {DOMAINS[1]: 4}} and line.startswith("Writing: ")
    ratio, _ = said(["beta"])
    assert ratio == {"beta": {DOMAINS[1]: 4, DOMAINS[0]: 4}}
    ratio, line = said([])
    assert ratio == {} and line.startswith("Mixing: ")


def test_a_shell_passes_the_advised_writing_to_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr("test_diagnosis.DOMAINS", ["no", "l'été: 'un', #2"])
    result = diagnosed(*make(tmp_path, src=(0.8, 0.8), own=(0.1, 0.1)), own="own", writers=["src"])
    given = {}
    files.override_option(given, shlex.split(result["verdict"][-1])[-1])
    assert given["write"]["ratio"] == result["write"] == {"src": {"no": 4, "l'été: 'un', #2": 4}}


def test_a_source_hardly_better_than_the_target_should_write_nothing(tmp_path):
    result = diagnosed(*make(tmp_path, other=(0.13, 0.8), own=(0.1, 0.1)), own="own", writers=["other"])
    bits = {name: row["bits_per_byte"][DOMAINS[0]] for name, row in result["sources"].items()}
    assert 0.8 * bits["own"] < bits["other"] < bits["own"]
    assert result["write"] == {"other": {DOMAINS[1]: 4}}


def test_a_target_that_knows_best_cannot_learn(tmp_path):
    result = diagnosed(*make(tmp_path, own=(0.97, 0.97), other=(0.01, 0.01)), own="own")
    assert result["verdict"][0].startswith("Fusing cannot help: ")
    assert "<b>& too little to matter" in result["verdict"][1]


def test_one_source_that_knows_all_is_enough(tmp_path):
    result = diagnosed(*make(tmp_path, one=(0.97, 0.97), two=(0.01, 0.01), own=(0.01, 0.01)), own="own")
    assert "one alone would do as well" in result["verdict"][-1]


def test_without_the_target_what_it_could_learn_is_not_known(usual):
    result = diagnosed(*usual)
    assert result["target"] is None and "judged" not in result
    assert result["verdict"][0].startswith("What the target could learn is not known")


def test_a_target_that_is_not_a_source_is_compared_and_not_fused(tmp_path):
    stores, documents = make(tmp_path, alpha=(0.8, 0.3), beta=(0.3, 0.8), own=(0.1, 0.1))
    target = stores.pop("own")
    with_target, without = diagnosed(stores, documents, target_store=target), diagnosed(stores, documents)
    assert with_target["target"] is None and list(with_target["sources"]) == ["alpha", "beta"]
    for key in ("sources", "ways", "oracle", "wins", "weights", "agreement"):
        assert with_target[key] == without[key]
    as_source = diagnosed(stores | {"own": target}, documents, own="own")
    assert with_target["own"] == as_source["own"] == as_source["sources"]["own"]
    bits = with_target["own"]["bits_per_byte"]["average"]
    best = with_target["ways"][with_target["gains"]["average"]["best_way"]]["bits_per_byte"]["average"]
    assert with_target["gains"]["average"]["over_target"] == pytest.approx(bits - best)
    assert with_target["verdict"][0].startswith("Fusing can help: ")
    printed = Console(width=200, record=True, file=io.StringIO())
    printed.print(diagnosis_table.draw_diagnosis(with_target))
    assert "the target (not fused)" in printed.export_text()
    assert "the target, not fused" in diagnosis_page.render_page(with_target)


def test_what_a_source_adds_is_what_the_mixture_loses_without_it(usual):
    stores, documents = usual
    result = diagnosed(*usual, own="own")
    whole = result["ways"][diagnosis.LEARNED]["bits_per_byte"]
    for name in stores:
        others = diagnosed({n: s for n, s in stores.items() if n != name}, documents)
        without = others["ways"][diagnosis.LEARNED]["bits_per_byte"]
        for domain in [*DOMAINS, "average"]:
            assert result["advice"][name]["added"][domain] == pytest.approx(without[domain] - whole[domain], abs=1e-4)


def test_sources_are_kept_or_dropped_by_what_they_add(tmp_path):
    stores, documents = make(tmp_path, good=(0.9, 0.05), other=(0.05, 0.9), useless=(0.01, 0.01), own=(0.1, 0.1))
    result = diagnosed(stores, documents, own="own", writers=["good"], unprefixed=["good", "other", "useless"])
    advice = result["advice"]
    assert (advice["good"]["word"], advice["other"]["word"], advice["useless"]["word"]) == ("keep", "keep", "drop")
    assert advice["good"]["next"] == [
        f"let it write text of {DOMAINS[0]}",
        "give it a prefix (capture.prefix_tokens=256)",
    ]
    assert advice["other"]["next"] == ["give it a prefix (capture.prefix_tokens=256)"]
    assert advice["useless"]["next"] == ["leave it out of the next run, and save its capture"]
    page = diagnosis_page.render_page(result)
    printed = Console(width=250, record=True, file=io.StringIO())
    printed.print(diagnosis_table.draw_diagnosis(result))
    shown = printed.export_text()
    for line in result["source_verdicts"]:
        assert line in shown
    assert "leave it out of the next run" in page and "own (the target): drop" in shown


def test_a_source_that_is_good_in_one_domain_is_kept_for_it():
    mixture = {"ways": {"m": {"bits_per_byte": {"a": 1.0, "b": 1.0, "average": 1.0}}}, "mixture": "m", "target": None}
    added = {
        "one": {"a": 0.021, "b": 0.0, "average": 0.0105},
        "little": {"a": 0.012, "b": 0.0, "average": 0.006},
        "nothing": {"a": 0.004, "b": 0.004, "average": 0.004},
        "alone": {"a": None, "b": None, "average": None},
    }
    judged = diagnosis_sources.judge_sources(mixture, added, [])
    assert {name: row["word"] for name, row in judged.items()} == {
        "one": "keep for a",
        "little": "keep, it adds little",
        "nothing": "drop",
        "alone": "keep",
    }
    lines = diagnosis_sources.describe_sources(mixture | {"advice": judged})
    assert lines[0] == "one: keep for a; without it the mixture needs 0.011 bits per byte more (a 0.021, b 0.000)."
    assert lines[-1] == "alone: keep; there is no other source to compare it with."


def test_one_source_alone_is_diagnosed_too(tmp_path):
    result = diagnosed(*make(tmp_path, only=(0.5, 0.5)), own="only")
    assert result["agreement"] == [] and len(result["verdict"]) == 2
    assert result["gains"]["average"]["over_target"] == pytest.approx(0, abs=1e-5)
    assert "only" in diagnosis_page.render_page(result)


def test_documents_that_a_source_lacks_are_left_out(usual):
    stores, documents = usual
    more = Document(id="new", origin="new", domain="tech", split="train", text="")
    assert diagnosed(stores, [*documents, more])["left_out"] == 1
    with pytest.raises(
        ValueError, match=r"^no training document is in the aligned stores of all sources; align again$"
    ):
        diagnosed(stores, [more])


@pytest.mark.parametrize("own", [None, "own"])
def test_the_page_and_the_table_show_every_number(usual, own):
    result = diagnosed(*usual, own=own)
    page = diagnosis_page.render_page(result)
    console = Console(width=211, record=True, file=io.StringIO())
    console.print(diagnosis_table.draw_diagnosis(result))
    shown = console.export_text()
    for row in [*result["sources"].values(), *result["ways"].values(), result["oracle"]]:
        for domain in [*DOMAINS, "average"]:
            assert f"{row['bits_per_byte'][domain]:.3f}" in page
            assert f"{row['bits_per_byte'][domain]:.3f}" in shown
    assert all(domain in shown for domain in DOMAINS)
    assert "<b>&amp;" not in page and "&lt;b&gt;&amp;" in page
    for style in set(re.findall(r'class="((?:source|base)[-\w]*)"', page)):
        assert f".{style} {{" in page
    assert "http" not in page.replace("http://www.w3.org", "")


def test_a_source_that_excludes_the_text_is_shown_as_infinite(tmp_path):
    stores, documents = make(tmp_path, alpha=(0.5, 0.5), own=(0.5, 0.5))
    impossible = stores["alpha"].read(documents[0].id)
    gold = impossible.distributions.gold.copy()
    gold[0] = -np.inf
    broken = trace(documents[0].id, 0.5, 0, impossible.tokens)
    rows = drawn.distributions_of(drawn.rows_of(broken.distributions), [0.0] * TOKENS, gold.tolist())
    folder = tmp_path / "again"
    traces = [replace(broken, distributions=rows), *(stores["alpha"].read(d.id) for d in documents[1:])]
    manifest.build_once(folder, manifest.Recipe(stage="align"), lambda out: write_parts(out, traces) or {})
    result = diagnosed({"alpha": Store(folder), "own": stores["own"]}, documents, own="own")
    assert result["sources"]["alpha"]["bits_per_byte"][DOMAINS[0]] is None
    json.dumps(result, allow_nan=False)
    assert "∞" in diagnosis_page.render_page(result)


def test_dots_are_on_one_scale_and_no_dots_draw_nothing():
    dots = [figures.Dot(label="<i>", style="base", value=v, ring=v == 2.0) for v in (1.0, 2.0)]
    drawn_twice = figures.draw_dots({"d": dots, "e": []}, axis="x", number=str, label="x")
    assert drawn_twice.count("<circle") == 2 and "&lt;i&gt;" in drawn_twice and drawn_twice.count('"ring"') == 1
    assert figures.draw_dots({}, axis="x", number=str, label="x") == ""


# The command


@pytest.fixture(scope="module")
def run_file(tmp_path_factory, byte_level, sentence_piece, texts) -> Path:
    folder = tmp_path_factory.mktemp("diagnosed")
    return tiny_run.write(
        folder,
        target=byte_level,
        sources={"same": byte_level, "other": sentence_piece},
        rows=tiny_run.short(texts, domains=1, length=97),
        train=tiny_run.TRAIN | {"passes": 1},
    )


def test_a_run_file_is_diagnosed_before_any_training_and_its_folder_after(run_file, tmp_path, tmp_path_factory):
    cache = tmp_path_factory.getbasetemp() / "cache"
    before = fuselm("diagnose", run_file, "--json", cache=cache)
    assert before.code == 0, before.err
    assert before.stages == ["corpus", "capture same", "capture other", "align same", "align other"]
    assert not (run_file.parent / "out" / "train").exists()
    result = json.loads(before.out)
    assert result["target"] == "same" and list(result["sources"]) == ["other", "same"]

    assert fuselm("run", run_file, cache=cache).code == 0
    page = tmp_path / "page.html"
    after = fuselm("diagnose", run_file.parent / "out", "--json", "--report", page, cache=cache)
    assert after.code == 0, after.err
    of_folder = json.loads(after.out)
    assert page.read_text(encoding="utf-8") == diagnosis_page.render_page(of_folder)
    # The run itself has aligned what was drawn, the diagnosis of its run file the tails.
    assert (result["drawn"], of_folder["drawn"]) == (False, True) and "draws from the tails of rows" in page.read_text()
    assert set(result["ways"]) - set(of_folder["ways"]) == set(diagnosis.NEED_WHOLE_TAILS)
    for name, row in result["sources"].items():
        other = of_folder["sources"][name]
        assert other["bits_per_byte"]["average"] == pytest.approx(row["bits_per_byte"]["average"], rel=0.05)
        assert other["expected"]["average"] < row["expected"]["average"]
    (run_file.parent / "out/config.yaml").unlink()  # it is the last command's, which may have had other sources
    assert fuselm("diagnose", run_file.parent / "out", "--json", cache=cache).out == after.out and of_folder["target"]
    console = Console(quiet=True)
    assert diagnosis_inputs.gather_from_folder(run_file.parent / "out", console)["writers"] == ["other"]
    shown = fuselm("diagnose", run_file, cache=cache)
    assert shown.code == 0 and result["verdict"][0][:40] in shown.out


def test_sources_that_read_too_little_or_have_a_store_should_not_write(run_file, tmp_path, sentence_piece):
    def able(*overrides: str) -> list[str]:
        run = config.load(run_file, overrides)
        return Inputs(run).list_possible_writers(run)

    assert able() == ["other"]
    assert able("sources.same.store=anywhere") == []
    context = json.loads((sentence_piece / "config.json").read_text())["max_position_embeddings"]
    assert able(f"write={{prompt_tokens: {context - 11}, tokens: 10}}") == ["other"]
    assert able(f"write={{prompt_tokens: {context - 10}, tokens: 10}}") == []


@pytest.mark.parametrize(
    "option", ["sources.other.store={captured}", "write={{ratio: 1, prompt_tokens: 5, tokens: 7}}"]
)
def test_a_run_of_given_stores_or_written_text_should_write_no_more(option, run_file, tmp_path, tmp_path_factory):
    cache = tmp_path_factory.getbasetemp() / "cache"
    assert fuselm("capture", run_file, cache=cache).code == 0
    (captured,) = (run_file.parent / "out/capture").glob("other-*")
    outcome = fuselm("run", run_file, f"output={tmp_path / 'out'}", option.format(captured=captured), cache=cache)
    assert outcome.code == 0, outcome.err
    assert diagnosis_inputs.gather_from_folder(tmp_path / "out", Console(quiet=True))["writers"] == []


def test_a_folder_without_a_run_is_refused_in_one_line(tmp_path):
    outcome = fuselm("diagnose", tmp_path)
    assert outcome.code == 2
    assert outcome.err == (
        f"fuselm: {tmp_path}: no finished run there; name its run file, and what is missing will be made\n"
    )


def test_a_page_that_cannot_be_written_is_refused_before_anything_is_done(tmp_path):
    outcome = fuselm("diagnose", tmp_path, "--report", tmp_path / "no" / "page.html")
    assert outcome.code == 2 and "no folder" in outcome.err


def test_a_run_without_its_target_among_the_sources_is_diagnosed_with_it(
    tmp_path, tmp_path_factory, byte_level, sentence_piece, word_piece, texts
):
    run_file = tiny_run.write(
        tmp_path,
        target=byte_level,
        sources={"alpha": sentence_piece, "words": word_piece},
        rows=tiny_run.short(texts, domains=1, length=97),
    )
    cache = tmp_path_factory.getbasetemp() / "cache"
    assert fuselm("fuse", run_file, cache=cache).code == 0
    before = fuselm("inspect", run_file, cache=cache)
    assert "Tokens by the source that adds most to them: " in before.out
    diagnosed_run = fuselm("diagnose", run_file, "--json", cache=cache)
    assert diagnosed_run.code == 0, diagnosed_run.err
    result = json.loads(diagnosed_run.out)
    assert result["target"] is None and list(result["sources"]) == ["alpha", "words"]
    documents = document_list.read_documents(run_folders.find_stages(tmp_path / "out")["corpus"], "train")
    tiny_run.write_rows(tmp_path / "training.jsonl", [{"domain": d.domain, "text": d.text} for d in documents])
    scored = fuselm("evaluate", byte_level, "--texts", tmp_path / "training.jsonl", "--json", cache=cache)
    own = json.loads(scored.out)["average"]["bits_per_byte"]
    assert result["own"]["bits_per_byte"]["average"] == pytest.approx(own, rel=0.01)
    # The target's store is none of the run's sources, and inspect compares with it.
    after = fuselm("inspect", run_file, cache=cache)
    assert after.code == 0, after.err
    assert "Against the target: " in after.out and "target, not fused" in after.out

    # The folder of the finished run is diagnosed with it, too.
    finished = fuselm("run", run_file, "train.passes=1", "train.average=0", cache=cache)
    assert finished.code == 0, finished.err
    of_folder = json.loads(fuselm("diagnose", tmp_path / "out", "--json", cache=cache).out)
    assert of_folder["target"] is None and list(of_folder["sources"]) == ["alpha", "words"]
    assert of_folder["own"]["bits_per_byte"]["average"] == pytest.approx(own, rel=0.01)

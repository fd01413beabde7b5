"""writing.py on tiny models: how much is written and by whom, interrupted and resumed, and a run that trains on it."""

import io
import json
import random
from collections import Counter
from pathlib import Path

import pytest
import tiny_run
import torch
from rich.console import Console

from fuselm.documents import corpus, document_list, document_writing, passages
from fuselm.documents.corpus import Document
from fuselm.documents.cutting import Reader
from fuselm.models.loading import load_tokenizer
from fuselm.models.locating import locate_model
from fuselm.models.vocabulary import Vocabulary
from fuselm.sources import capture, prompts, writing
from fuselm.system import manifest
from fuselm.system.progress import Progress

KINDS = ["byte_level", "sentence_piece", "word_piece"]


@pytest.fixture
def documents(texts) -> list[Document]:
    return [
        Document(id=f"{n:06d}", origin=f"{n:06d}", domain=row["domain"], split="train", text=row["text"])
        for n, row in enumerate(texts)
    ]


def load(folder: Path) -> capture.LoadedSource:
    model = locate_model(str(folder))
    return capture.load_source(model, Vocabulary(load_tokenizer(model), model.output_size), dtype="float32")


def write(source: capture.LoadedSource, documents: list[Document], out: Path, **options) -> list[Document]:
    out.mkdir(exist_ok=True)
    asked = {
        "readers": [],
        "name": "some",
        "size": 0.3,
        "prompt_tokens": 5,
        "tokens": 11,
        "min_p": 0.05,
        "seed": 0,
    } | options
    writing.write_texts(source, documents, out, **asked, progress=Progress(Console(file=io.StringIO()), "write"))
    assert {p.name for p in out.glob("[!.]*")} == {document_writing.ONE_PART, document_writing.INDEX}
    return document_list.read_documents(out)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_tokenizer_writes_text_in_every_domain(tmp_path, request, documents, kind):
    source = load(request.getfixturevalue(kind))
    written = write(source, documents, tmp_path / "out")
    origins = {d.origin: d.domain for d in documents}
    assert {d.domain for d in written} == set(origins.values())
    assert all(origins[d.origin] == d.domain and d.split == "train" and d.text.strip() for d in written)
    assert len({d.id for d in written}) == len(written)
    for d in written:
        assert 0 < len(source.vocabulary.segment(d.text).ids) <= 3 * 11  # other tokens may spell the same text
        assert "\ufffd" not in d.text


def test_about_as_much_is_written_as_is_asked_for(tmp_path, byte_level, documents):
    source = load(byte_level)
    for size in (0.25, 0.5):
        written = write(source, documents, tmp_path / str(size), size=size)
        tokens = {d.domain: 0 for d in documents}
        wanted = dict(tokens)
        for total, of in ((tokens, written), (wanted, documents)):
            for d in of:
                total[d.domain] += len(source.vocabulary.segment(d.text).ids)
        for domain in tokens:  # no more, for some texts end sooner, and few have the fewest tokens that spell them
            assert 0.4 * size < tokens[domain] / wanted[domain] < 1.2 * size


def test_domains_may_be_asked_for_more_or_nothing(tmp_path, byte_level, documents):
    written = write(load(byte_level), documents, tmp_path / "out", size={"french": 1.5, "german": 0.5})
    tokens = Counter(d.domain for d in written)
    assert set(tokens) == {"french", "german"} and tokens["french"] > 2 * tokens["german"]


def make_prompts(vocabulary: Vocabulary, documents: list[Document], size: float, length: int, tokens: int):
    options = prompts.PromptOptions(size=size, length=length, tokens=tokens, seed="0")
    return prompts.PromptBatches(vocabulary, documents, options)


@pytest.fixture(params=["few", "many"])
def how_many(request, monkeypatch) -> str:
    """Make prompts as those of few documents or as those of many."""
    monkeypatch.setattr(prompts, "FEW", 0 if request.param == "many" else prompts.FEW)
    return request.param


def test_a_text_comes_after_documents_of_its_domain(byte_level, documents, how_many):
    vocabulary = load(byte_level).vocabulary
    between = passages.tokenize_separator(vocabulary).tolist()
    ids = {d.id: [*vocabulary.segment(d.text).ids.tolist(), *between] for d in documents}
    batches = list(make_prompts(vocabulary, documents, 0.3, 401, 11))
    assert {d.domain for batch in batches for d, _ in batch} == {d.domain for d in documents}
    for last, prompt in (of for batch in batches for of in batch):
        assert prompt[-len(ids[last.id]) :] == ids[last.id][-len(prompt) :] and len(prompt) == 401
    first = [prompt for _, prompt in batches[0]]
    assert len({tuple(prompt) for prompt in first}) > len(first) // 2


def test_prompts_of_few_documents_are_those_of_earlier_versions(byte_level, documents):
    vocabulary = load(byte_level).vocabulary
    between = passages.tokenize_separator(vocabulary).tolist()
    drawn, expected = random.Random("0"), []
    for domain in sorted({d.domain for d in documents}):
        members = [(d, vocabulary.segment(d.text).ids.tolist() + between) for d in documents if d.domain == domain]
        read = sum(len(ids) for _, ids in members)
        for _ in range(round(0.3 * read / 11)):
            order = drawn.sample(members, len(members))
            expected.append((order[0][0], [i for _, ids in reversed(order) for i in ids][-101:]))
    assert [prompt for batch in make_prompts(vocabulary, documents, 0.3, 101, 11) for prompt in batch] == expected


def test_prompts_of_many_documents_need_no_batch_before_theirs(byte_level, documents, monkeypatch):
    monkeypatch.setattr(prompts, "FEW", 0)
    monkeypatch.setattr(prompts, "BATCH", 7)
    vocabulary = load(byte_level).vocabulary
    batches = make_prompts(vocabulary, documents, 0.3, 401, 11)
    assert [len(batch) for batch in batches] == batches.sizes and max(batches.sizes) == 7
    assert [batches[n] for n in reversed(range(len(batches)))] == list(batches)[::-1]
    assert len({tuple(ids) for batch in batches for _, ids in batch}) > 0.5 * sum(batches.sizes)


def test_a_domain_with_less_than_a_prompt_is_read_whole(byte_level, how_many):
    short = [Document(id=t, origin=t, domain="brief", split="train", text=t) for t in ("some words", "and more words")]
    vocabulary = load(byte_level).vocabulary
    read = sum(
        len(passages.tokenize_separator(vocabulary)) + n for n in vocabulary.count_tokens([d.text for d in short])
    )
    (batch,) = make_prompts(vocabulary, short, 3.0, 997, 5)
    assert {len(prompt) for _, prompt in batch} == {read} and {d.id for d, _ in batch} <= {d.id for d in short}


def test_written_texts_fit_every_reader_in_pieces(tmp_path, byte_level, word_piece, documents):
    whole = write(load(byte_level), documents, tmp_path / "whole")
    vocabularies = [load(folder).vocabulary for folder in (byte_level, word_piece)]
    readers = [Reader(name=str(n), vocabulary=v, max_tokens=7) for n, v in enumerate(vocabularies)]
    counts = corpus.count_tokens(whole, readers)
    assert (counts > 6).any(axis=1).all()
    pieces = write(load(byte_level), documents, tmp_path / "pieces", readers=readers)
    counts = corpus.count_tokens(pieces, readers)
    assert (counts >= 1).all() and (counts <= 6).all()  # and one for the context token
    assert len({d.id for d in pieces}) == len(pieces) > len(whole)
    texts = {d.id: d.text for d in whole}
    assert all(d.text in texts[d.id.split(".")[0]] for d in pieces)


def test_text_without_tokens_for_a_reader_is_not_kept(tmp_path, byte_level, word_piece, documents):
    readers = [Reader(name="drops control characters", vocabulary=load(word_piece).vocabulary, max_tokens=13)]
    everything = write(load(byte_level), documents, tmp_path / "everything", tokens=1)
    assert (corpus.count_tokens(everything, readers) == 0).any()
    kept = write(load(byte_level), documents, tmp_path / "kept", tokens=1, readers=readers)
    assert kept == [d for d in everything if corpus.count_tokens([d], readers).all()]


def test_interrupted_writing_resumes_and_ends_with_the_same_bytes(tmp_path, byte_level, documents, monkeypatch):
    monkeypatch.setattr(prompts, "BATCH", 7)
    source = load(byte_level)
    write(source, documents, tmp_path / "whole")
    drawn, sample = [], writing._generate

    def cut_off(*arguments, **options):
        drawn.append(options["seed"])
        if len(drawn) == 3:
            raise KeyboardInterrupt
        return sample(*arguments, **options)

    monkeypatch.setattr(writing, "_generate", cut_off)
    with pytest.raises(KeyboardInterrupt):
        write(source, documents, tmp_path / "cut")
    assert len(list((tmp_path / "cut").glob(".batch-*"))) == 2
    write(source, documents, tmp_path / "cut")
    assert drawn[2] == drawn[3] and len(set(drawn)) == len(drawn) - 1  # no batch is written twice
    assert (tmp_path / "cut" / document_writing.ONE_PART).read_bytes() == (
        tmp_path / "whole" / document_writing.ONE_PART
    ).read_bytes()


def test_writing_leaves_the_global_generator_alone(tmp_path, byte_level, documents):
    torch.manual_seed(3)
    expected = torch.rand(5)
    torch.manual_seed(3)
    write(load(byte_level), documents[:9], tmp_path / "out")
    assert torch.equal(torch.rand(5), expected)


@pytest.mark.parametrize("min_p", [0.0, 0.3])
def test_tokens_are_drawn_as_the_model_expects_them(byte_level, min_p):
    """Compare the first tokens of many texts with the model's own distribution, except for what min-p excludes."""
    source = load(byte_level)
    ids = source.vocabulary.segment("one model and another").ids.tolist()
    source.model.generation_config = writing.make_generation_config(source, tokens=1, min_p=min_p)
    rows = torch.tensor([[source.context_token, *ids]]).repeat(4096, 1)
    with torch.random.fork_rng([]), torch.no_grad():
        torch.manual_seed(0)
        drawn = source.model.generate(rows, attention_mask=torch.ones_like(rows))[:, -1]
        logits = source.model(rows[:1]).logits[0, -1].double()
    silent = [i for i, spelled in enumerate(source.vocabulary.token_bytes) if spelled is None]
    logits[[i for i in silent if i != source.model.config.eos_token_id]] = -torch.inf
    expected = logits.softmax(-1)
    expected[expected < min_p * expected.max()] = 0
    expected /= expected.sum()
    found = torch.bincount(drawn, minlength=len(expected)).double() / len(drawn)
    assert (found - expected).abs().max() < 0.03 and 0.5 * (found - expected).abs().sum() < 0.5
    assert not found[expected == 0].any()
    assert min_p or (found > 0).sum() > 64  # far down the list


def test_a_run_trains_on_text_that_its_sources_wrote(tmp_path, byte_level, sentence_piece, texts):
    rows = tiny_run.short(texts)
    run_file = tiny_run.write(
        tmp_path,
        target=byte_level,
        sources={"own": byte_level, "other": sentence_piece},
        rows=rows,
        write={"ratio": 0.5, "prompt_tokens": 3, "tokens": 13},
        fuse={"function": "fixed", "weights": "learned"},
        train=tiny_run.TRAIN | {"passes": 1},
    )
    assert tiny_run.fuselm("run", run_file, cache=tmp_path / "cache").code == 0
    out = tmp_path / "out"
    folders = json.loads((out / "run.json").read_text())["folders"]
    assert [name for name in folders if name.startswith("write")] == ["write other"]  # the target has nothing to add
    written = document_list.read_documents(out / folders["write other"])
    tokens = {m: manifest.read(out / folders[f"train {m}"])["counts"]["text_tokens"] for m in ("clm", "fused")}
    vocabulary = Vocabulary(load_tokenizer(locate_model(str(byte_level))), locate_model(str(byte_level)).output_size)
    assert tokens["fused"] - tokens["clm"] == sum(vocabulary.count_tokens([d.text for d in written])) > 0
    assert {d.id for d in written} <= set(tiny_run.captured(out)["own"])
    again = tiny_run.fuselm("run", run_file, f"output={out}", "write.ratio=0", cache=tmp_path / "cache")
    assert again.code == 0 and "train clm" not in again.err  # it was not trained on that
    heard = tiny_run.fuselm("plan", run_file, f"output={tmp_path / 'plan'}", cache=tmp_path / "cache")
    assert heard.code == 0 and "write other" in heard.out


def test_a_store_of_another_run_is_taken_if_it_has_what_was_written(tmp_path, byte_level, sentence_piece, texts):
    run_file = tiny_run.write(
        tmp_path,
        target=byte_level,
        sources={"other": sentence_piece},
        rows=tiny_run.short(texts),
        write={"ratio": {"other": {"french": 1.5}}, "prompt_tokens": 3, "tokens": 13},
    )
    assert tiny_run.fuselm("capture", run_file, cache=tmp_path / "cache").code == 0
    (store,) = (tmp_path / "out" / "capture").iterdir()
    given = f"sources.other={{model: {sentence_piece}, store: {store}}}"
    elsewhere = ["capture", run_file, f"output={tmp_path / 'elsewhere'}", given]
    outcome = tiny_run.fuselm(*elsewhere, cache=tmp_path / "cache")
    assert outcome.code == 0 and outcome.stages == ["corpus", "write other"], outcome.err
    for command in ("capture", "align"):
        again = [command, *elsewhere[1:], "write.tokens=7", f"output={tmp_path / command}"]
        outcome = tiny_run.fuselm(*again, cache=tmp_path / "cache")
        assert outcome.code == 2 and f"sources.other.store: {store} has " in outcome.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": {"absent": 1}}, "write.ratio.absent: no such source; there are own"),
        (
            {"ratio": {"own": {"frnch": 1}}},
            "write.ratio.own: no text has the domain 'frnch'; the domains are english, french",
        ),
        (
            {"ratio": 1.0},
            "write.ratio: no source can write, because all are servers or the target; name one, {name: 1}",
        ),
        (
            {"ratio": {"own": 1}, "prompt_tokens": 13, "tokens": 499},
            "write.tokens: own reads 512 tokens, too few for a prompt of 13 and 499 more; lower write.tokens or write.",
        ),
        ({"ratio": -1}, "write.ratio: input should be greater than or equal to 0 (got -1)"),
    ],
)
def test_a_source_that_cannot_write_is_named_before_anything_is_made(tmp_path, byte_level, texts, options, message):
    run_file = tiny_run.write(
        tmp_path, target=byte_level, sources={"own": byte_level}, rows=tiny_run.short(texts), write=options
    )
    outcome = tiny_run.fuselm("run", run_file, cache=tmp_path / "cache")
    assert outcome.code == 2 and message in outcome.err and len(outcome.err.splitlines()) == 1
    assert not (tmp_path / "out").exists()

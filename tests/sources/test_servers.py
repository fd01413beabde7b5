"""connection.py, server_capture.py, client.py: real sockets, tiny models, and the same traces as in-process capture."""

import io
import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import tiny_run
import yaml
from captures import source_of
from model_server import NAME, ModelServer
from rich.console import Console
from server_runs import plain, rows, run_file  # noqa: F401
from tiny_run import fuselm

from fuselm.documents.corpus import Document
from fuselm.runs import diagnosis_inputs
from fuselm.sources import capture
from fuselm.sources.servers import client, prompt_logprobs, server_capture
from fuselm.sources.servers.connection import Server, check_server, connect, find_server
from fuselm.sources.servers.prompt_logprobs import Dialect, Prompt
from fuselm.stores import store
from fuselm.stores.retention import Policy
from fuselm.system import manifest
from fuselm.system.manifest import Recipe
from fuselm.system.progress import Progress

TOP_K = 7
POLICY = Policy(policy="top_k", top_k=TOP_K)
KINDS = ["vllm", "sglang", "llama"]
MODELS = ["byte_level", "sentence_piece"]
RECORDED = json.loads((Path(__file__).parents[1] / "data" / "servers" / "llama_cpp.json").read_text(encoding="utf-8"))


@pytest.fixture(autouse=True)
def hurry(monkeypatch):
    monkeypatch.setattr(client, "FIRST_PAUSE", 0.01)
    monkeypatch.delenv(client.DEFAULT_KEY_VARIABLE, raising=False)


@pytest.fixture(scope="module")
def documents(texts) -> list[Document]:
    rows = [row["text"][:113] for row in texts[::2]] + ["a", "Ünïcödé – 漢字 🙂\n\n\ttabs", " 12  345"]
    return [Document(id=f"{n:06d}", origin=f"{n:06d}", domain="odd", split="train", text=t) for n, t in enumerate(rows)]


@pytest.fixture(scope="module", params=MODELS)
def model(request) -> tuple[Path, capture.LoadedSource]:
    folder = request.getfixturevalue(request.param)
    return folder, source_of(folder)


def find(server: ModelServer, folder: Path, **options) -> Server:
    options = {"context_length": 512 if server.kind == "llama" else None, "timeout": 20.0} | options
    return find_server(server.url, options.pop("served", NAME), str(folder), **options)


def asked(server: ModelServer, model, documents, *, top_k: int = TOP_K, **options) -> list[tuple[store.Trace, float]]:
    folder, source = model
    segmentations = [source.vocabulary.segment(d.text) for d in documents]
    with connect(find(server, folder, **options), source.vocabulary, top_k=top_k) as connection:
        return list(server_capture.trace_documents(connection, documents, segmentations))


def in_process(source: capture.LoadedSource, document: Document, top_k: int) -> store.Trace:
    (trace,) = capture.trace_batch(
        source, [document], [source.vocabulary.segment(document.text)], policy=Policy(policy="top_k", top_k=top_k)
    )
    return trace


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("top_k", [1, TOP_K])
def test_traces_are_those_of_in_process_capture(model, documents, kind, top_k):
    folder, source = model
    with ModelServer(kind, source, folder) as server:
        result = asked(server, model, documents, top_k=top_k)
    spelled = source.vocabulary.token_bytes
    twins = {t for t, b in enumerate(spelled) if kind == "llama" and spelled.count(b) > 1}
    for document, (trace, lost) in zip(documents, result, strict=True):
        expected = in_process(source, document, top_k)
        assert (trace.document, trace.size) == (document.id, expected.size)
        assert np.array_equal(trace.tokens, expected.tokens) and np.array_equal(trace.starts, expected.starts)
        assert trace.nats == pytest.approx(expected.nats, abs=1e-2)
        ours, theirs = trace.distributions, expected.distributions
        np.testing.assert_allclose(ours.gold, theirs.gold, atol=1e-3)
        missing = 0.0
        for i in range(len(trace.tokens)):
            mine, its = dict(zip(*ours.row(i), strict=True)), dict(zip(*theirs.row(i), strict=True))
            assert kind == "llama" or list(mine) == list(its)
            assert all(mine[t] == pytest.approx(its[t], abs=1e-3) for t in mine if t in its and t not in twins)
            gone = [t for t in its if t not in mine]
            missing += sum(np.exp(its[t]) for t in gone)
            assert ours.tail[i] == pytest.approx(1 - sum(np.exp(list(mine.values()))), abs=1e-4)
        assert (lost == 0) if kind != "llama" else (missing <= len(trace.tokens) * 0.5)


def test_a_string_of_several_tokens_is_left_to_the_tail(plain):
    _, source = plain
    dialect = prompt_logprobs.make_dialect(source.vocabulary, "ignore", opening="", skip=0)
    several = [t for t, b in enumerate(source.vocabulary.token_bytes) if b and not b.decode("utf-8", "ignore")]
    assert len(several) > 2 and dialect.ids[""] == prompt_logprobs.AMBIGUOUS
    letter = source.vocabulary.id_by_bytes[b"e"]
    row, lost = prompt_logprobs.resolve_strings({"e": -1.0, "": -2.0, "no token": -3.0}, dialect)
    assert row == [(letter, -1.0)] and lost == pytest.approx(np.exp(-2) + np.exp(-3))
    row, lost = prompt_logprobs.resolve_strings({"e": -1.0, "": -2.0}, dialect, {"": (several[1], -2.0)})
    assert row == [(letter, -1.0), (several[1], -2.0)] and lost == 0


def test_a_twin_out_of_its_place_has_the_other_ones_value():
    dialect = Dialect(ids={"a": 1, "\n": 2, "b": 3}, strings=[], twins=frozenset("\n"), opening="", skip=0)
    assert prompt_logprobs.resolve_strings({"a": -1.0, "\n": -2.0, "b": -3.0}, dialect) == (
        [(1, -1.0), (2, -2.0), (3, -3.0)],
        0.0,
    )
    row, lost = prompt_logprobs.resolve_strings({"\n": -9.0, "a": -1.0, "b": -3.0}, dialect)
    assert row == [(1, -1.0), (3, -3.0)] and lost == pytest.approx(np.exp(-9))
    assert prompt_logprobs.resolve_strings({"\n": -9.0, "a": -1.0}, dialect, {"\n": (2, -9.0)}) == (
        [(2, -9.0), (1, -1.0)],
        0.0,
    )


def test_answers_of_the_real_llama_cpp_server_are_read():
    known = {"Hello": 19556, " ": 216, " world": 905, ",": 28, "\n": 198}
    strings = [""] * 49152
    for string, token in known.items():
        strings[token] = string
    ids = known | {"": prompt_logprobs.AMBIGUOUS}
    dialect = Dialect(ids=ids, strings=strings, twins=frozenset(), opening="<|im_start|>", skip=0)
    prompt = Prompt(text="Hello 𓂀 world", ids=[19556, 216, 187, 237, 220, 218, 905], context=1)
    echo = RECORDED["echo"]
    assert prompt_logprobs.request_openai("smollm2", prompt, 5, dialect) == echo["request"]
    rows = prompt_logprobs.read_echo(echo["answer"], prompt, dialect)
    own = echo["answer"]["choices"][0]["logprobs"]["token_logprobs"]
    assert rows.entries[0] is None and rows.gold[1:] == own[1:7]
    assert all(dict(rows.entries[n])[prompt.ids[n]] == own[n] for n in range(1, 7))
    assert prompt_logprobs.make_distributions(
        prompt_logprobs.PromptRows(entries=rows.entries[1:], gold=rows.gold[1:], lost=0.0), 3
    ).counts.tolist() == [min(3, len(rows.entries[n])) for n in range(1, 7)]
    with pytest.raises(ValueError, match=r"^8 tokens to the server, 1 \+ 6 to the local tokenizer$"):
        shorter = Prompt(text="Hello 𓂀", ids=prompt.ids[:6], context=1)
        prompt_logprobs.read_echo(echo["answer"], shorter, dialect)
    assert RECORDED["shifted"]["answer"]["usage"]["prompt_tokens"] == 7
    assert (RECORDED["ids"]["status"], RECORDED["forced"]["answer"]["choices"][0]["text"]) == (500, "Hello")


@pytest.mark.parametrize("kind", KINDS)
def test_faults_change_nothing(plain, documents, kind):
    faults = ["busy", "broken", "drop", None, "slow", "garbled", "busy", "drop"]
    folder, source = plain
    with ModelServer(kind, source, folder) as server:
        expected = asked(server, plain, documents, requests=1)
        needed = server.questions
    with ModelServer(kind, source, folder, faults=faults, calm=needed - len(documents)) as server:
        result = asked(server, plain, documents, requests=3, timeout=0.5)
    assert not list(server.faults)  # a busy machine may be slower than the timeout once more, and ask again
    assert server.questions >= needed + sum(f is not None for f in faults)
    for (a, _), (b, _) in zip(expected, result, strict=True):
        assert a.document == b.document and np.array_equal(a.distributions.logprobs, b.distributions.logprobs)


def test_no_more_requests_at_a_time_than_allowed(plain, documents):
    folder, source = plain
    with ModelServer("vllm", source, folder, faults=["slow"] * 3, calm=4) as server:
        asked(server, plain, documents, requests=3)
    assert server.most_at_once == 3


def captured(folder: Path, server: Server, vocabulary, documents) -> dict:
    shown = Progress(Console(file=io.StringIO()), "capture")
    manifest.build_once(
        folder,
        Recipe(stage="capture"),
        lambda out: server_capture.capture_from_server(
            server, vocabulary, documents, out, policy=POLICY, progress=shown
        ),
    )
    return manifest.read(folder)["counts"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_server_killed_midway_loses_nothing(tmp_path, plain, documents, monkeypatch, kind):
    monkeypatch.setattr(client, "ATTEMPTS", 3)
    folder, source = plain
    with ModelServer(kind, source, folder) as server:
        counts = captured(tmp_path / "whole", find(server, folder), source.vocabulary, documents)
        assert (counts["documents"], counts["resumed_documents"]) == (len(documents), 0)
        begin = server.questions - len(documents)
        port = server.port
    with ModelServer(kind, source, folder, port=port, faults=["gone"], calm=begin + 5) as server:
        found = find(server, folder, requests=1)
        with pytest.raises(ValueError, match=r"/v1: cannot be reached .* asked 3 times in .* again; it resumes here$"):
            captured(tmp_path / "cut", found, source.vocabulary, documents)
    parts = list((tmp_path / "cut.partial").glob(".block-*.parquet"))
    before = [d for p in parts for d in pq.read_table(p, columns=["document"])[0].to_pylist()]
    assert 0 < len(before) < len(documents)
    with ModelServer(kind, source, folder, port=port) as server:
        counts = captured(tmp_path / "cut", found, source.vocabulary, documents)
    assert counts["resumed_documents"] == len(before)
    whole, cut = store.Store(tmp_path / "whole"), store.Store(tmp_path / "cut")
    assert cut.documents == whole.documents == sorted(d.id for d in documents)
    assert len(cut) == sum(pq.read_metadata(p).num_rows for p in (tmp_path / "cut").glob("part-*"))
    for a, b in zip(whole, cut, strict=True):
        assert np.array_equal(a.distributions.logprobs, b.distributions.logprobs) and a.nats == b.nats


@pytest.mark.parametrize(
    "kind, server_options, options, message",
    [
        ("vllm", {"key": "secret"}, {}, "answers 401 (Invalid API key): a key is needed; export FUSELM_API_KEY"),
        ("vllm", {"key": "secret"}, {"key_env": "OTHER_KEY"}, "a key is refused; export OTHER_KEY"),
        ("vllm", {}, {"key_env": "UNSET_KEY"}, "environment variable UNSET_KEY, which is not set; export it"),
        ("vllm", {}, {"served": "large"}, "serves no model 'large', but 'tiny'; name one of them"),
        ("llama", {}, {"context_length": None}, "set `context_length` (llama.cpp: its n_ctx)"),
        ("vllm", {}, {"context_length": 513}, "context_length 513 is more than the server's, 512; set it lower"),
        (
            "vllm",
            {"most_entries": 5},
            {},
            "greater than max allowed: 5)); start vLLM with --max-logprobs 7, or set `capture.policy` to threshold and "
            "`capture.top_k` lower",
        ),
        ("llama", {"most_entries": 5}, {}, "gives 6 entries a token, 7 were asked for; raise the server's limit, or"),
        ("plain", {}, {}, "gives no prompt log-probabilities in any way known here (vllm: no prompt log-probabilities"),
        ("odd", {}, {}, "in any way known here (vllm: the first row is 3, not null; sglang: answers 404"),
        ("llama", {"bos": 5}, {}, "start llama-cpp-python with --kv_overrides tokenizer.ggml.bos_token_id=int:0"),
        ("llama", {"adds_bos": True}, {}, "--kv_overrides tokenizer.ggml.add_bos_token=bool:false"),
    ],
)
def test_a_missing_ability_of_a_server_is_reported_in_a_line(
    plain, documents, monkeypatch, kind, server_options, options, message
):
    monkeypatch.setenv("OTHER_KEY", "wrong")
    folder, source = plain
    with ModelServer(kind, source, folder, **server_options) as server, pytest.raises(ValueError) as error:
        asked(server, plain, documents[:2], **options)
    assert message in str(error.value) and str(error.value).startswith(server.url)
    assert "\n" not in str(error.value) and "wrong" not in str(error.value)


@pytest.mark.parametrize("kind", KINDS)
def test_a_document_that_a_server_gives_nan_for_is_left_out(tmp_path, plain, documents, kind):
    folder, source = plain
    times = -(-101 // len(documents))
    many = [replace(d, id=f"{n}-{d.id}", text=f"{n} {d.text[:31]}") for n in range(times) for d in documents]
    with ModelServer(kind, source, folder, spoiled=[many[7].text]) as server:
        counts = captured(tmp_path / "out", find(server, folder), source.vocabulary, many)
        assert counts["skipped"] == [many[7].id] and counts["documents"] == len(many) - 1
        with pytest.raises(ValueError, match=rf"gives NaN for 1 of 5 documents \(first: document {many[7].id} "):
            captured(tmp_path / "more", find(server, folder), source.vocabulary, many[5:10])


@pytest.mark.parametrize("kind", ["vllm", "llama"])
def test_a_tokenizer_of_another_model_is_refused(plain, sentence_piece, kind):
    folder, source = plain
    other = source_of(sentence_piece)
    with ModelServer(kind, source, folder) as server, pytest.raises(ValueError, match="to the local tokenizer"):
        check_server(find(server, sentence_piece), other.vocabulary, top_k=3)


def test_an_address_without_the_endpoint_is_named(plain):
    folder, source = plain
    with ModelServer("vllm", source, folder) as server:
        url = server.url.removesuffix("/v1")
        with pytest.raises(ValueError, match=r"answers 404 \(Not Found\); the address should be the one .*:8000/v1$"):
            find_server(url, NAME, str(folder))


def test_a_server_is_known_by_what_it_serves_not_where(plain):
    folder, source = plain
    with ModelServer("vllm", source, folder) as one, ModelServer("vllm", source, folder) as other:
        first = find(one, folder).model
        assert first.fingerprint == find(other, folder).model.fingerprint
        assert first.fingerprint != find(one, folder, revision="2").model.fingerprint
        assert first.context_length == 510


def test_a_run_with_a_server_then_without(tmp_path, plain, rows, monkeypatch):
    monkeypatch.setenv(client.DEFAULT_KEY_VARIABLE, "a-secret")
    folder, source = plain
    with ModelServer("vllm", source, folder, key="a-secret") as server:
        path = run_file(tmp_path, plain, rows, server.url)
        outcome = fuselm("run", path, "train.passes=1")
        assert outcome.code == 0, outcome.err
    models = tiny_run.summary(tmp_path / "out")["models"]
    own, far = models["own"], models["far"]
    assert far["average"]["bits_per_byte"] == pytest.approx(own["average"]["bits_per_byte"], abs=1e-3)
    again = fuselm("run", path, "train.passes=1")
    assert (again.code, again.err) == (0, "Nothing to do: every stage of this run is done.\n")
    assert diagnosis_inputs.gather_from_folder(tmp_path / "out", Console(quiet=True))["writers"] == []
    texts = [p for p in tmp_path.rglob("*") if p.is_file() and b"a-secret" in p.read_bytes()]
    assert not texts and "a-secret" not in outcome.err + outcome.out
    gone = fuselm("capture", path, "capture={policy: threshold, top_k: 5}")
    assert gone.code == 2 and len(gone.err.splitlines()) == 1 and "cannot be reached" in gone.err


def test_an_arm_that_needs_no_server_is_trained_while_it_is_down(tmp_path, plain, rows):
    folder, source = plain
    with ModelServer("vllm", source, folder) as server:
        path = run_file(tmp_path, plain, rows, server.url)
        assert fuselm("capture", path, f"output={tmp_path / 'study/seed-0'}").code == 0
    study = {
        "run": path.name,
        "output": str(tmp_path / "study"),
        "seeds": [0],
        "set": {"train.passes": 1, "train.clm.passes": 1},
        "arms": {"clm": {"method": "clm"}, "fused": {"method": "fused"}},
        "experiments": [{"name": "main", "title": "Main", "arms": ["clm", "fused"]}],
    }
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    outcome = fuselm("study", tmp_path / "study.yaml")
    assert outcome.code == 0, outcome.err
    study["experiments"].append({"name": "far", "title": "Far", "arms": ["far"]})
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    outcome = fuselm("study", tmp_path / "study.yaml")
    assert outcome.code == 2 and "arms.far: " in outcome.err and "cannot be reached" in outcome.err


def test_an_unknown_server_that_is_down_ends_a_run_before_it_begins(tmp_path, plain, rows):
    outcome = fuselm("run", run_file(tmp_path, plain, rows, "http://127.0.0.1:9/v1"))
    assert outcome.code == 2 and len(outcome.err.splitlines()) == 1
    assert outcome.err.startswith("fuselm: http://127.0.0.1:9/v1: cannot be reached")
    assert not (tmp_path / "out").exists()


def test_documents_fit_the_servers_context(tmp_path, plain, rows):
    folder, source = plain
    with ModelServer("vllm", source, folder, context=23) as server:
        path = run_file(tmp_path, plain, rows, server.url)
        assert fuselm("capture", path).code == 0
    (captured,) = (tmp_path / "out" / "capture").glob("far-*")
    assert max(len(trace.tokens) for trace in store.Store(captured)) <= 21


def test_a_run_killed_with_kill_9_asks_only_for_the_rest(tmp_path, plain, rows):
    folder, source = plain
    with ModelServer("vllm", source, folder, faults=["slow"] * 1000, slowness=0.1) as server:
        path = run_file(tmp_path, plain, rows, server.url, requests=1)
        process = tiny_run.start("capture", path, "sources.far.requests=1")
        while process.is_alive() and not list((tmp_path / "out" / "capture").glob("far-*.partial/.block-*.parquet")):
            time.sleep(0.02)
        process.kill()
        process.join()
    parts = list((tmp_path / "out" / "capture").glob("far-*.partial/.block-*.parquet"))
    assert parts
    with ModelServer("vllm", source, folder, port=server.port) as server:
        assert fuselm("capture", path).code == 0
    (whole,) = (tmp_path / "out" / "capture").glob("far-*")
    counts = manifest.read(whole)["counts"]
    assert 0 < counts["resumed_documents"] < counts["documents"] == len(store.Store(whole))
    assert sum(pq.read_metadata(p).num_rows for p in whole.glob("part-*")) == counts["documents"]

"""Call every command of `fuselm store` on a capture of a tiny model, and use the results in a run."""

import json
import shutil

import pytest
import tiny_run
from tiny_run import fuselm

from fuselm.stores.store import Store, part_path
from fuselm.system import atomic_files, manifest


@pytest.fixture(scope="module")
def run(tmp_path_factory, texts, byte_level, sentence_piece):
    """Return a run whose sources are captured."""
    folder = tmp_path_factory.mktemp("run")
    rows = tiny_run.short(texts, length=61)
    file = tiny_run.write(folder, target=byte_level, sources={"own": byte_level, "piece": sentence_piece}, rows=rows)
    kept = "capture={policy: threshold, top_k: 13, batch_tokens: 131}"
    assert fuselm("capture", file, kept).code == 0
    return folder


@pytest.fixture(scope="module")
def captured(run):
    return next((run / "out" / "capture").glob("piece-*"))


@pytest.fixture(scope="module")
def documents(run):
    return next((run / "out" / "corpus").iterdir()) / "documents.jsonl"


def ok(*arguments) -> str:
    outcome = fuselm("store", *arguments)
    assert outcome.code == 0, outcome.err
    return outcome.out


def refused(*arguments) -> str:
    outcome = fuselm("store", *arguments)
    assert outcome.code == 2 and outcome.err.count("\n") == 1, outcome.err
    return outcome.err.removeprefix("fuselm: ").strip()


def test_info_says_what_is_there(captured, sentence_piece):
    facts = json.loads(ok("info", captured, "--json"))
    counts = manifest.read(captured)["counts"]
    assert (facts["documents"], facts["tokens"]) == (counts["documents"], counts["tokens"])
    assert facts["entries_per_token"] == pytest.approx(counts["entries"] / counts["tokens"])
    traces = list(Store(captured))
    assert facts["bits_per_byte"] == pytest.approx(
        sum(t.nats for t in traces) / sum(t.size for t in traces) / 0.6931471805599453
    )
    assert facts["disk_bytes"] == sum(p.stat().st_size for p in captured.glob("*.parquet"))
    assert facts["tokens_without_entries"] == 0 and 0 < facts["mean_tail"] < 1
    shown = ok("info", captured)
    assert str(sentence_piece) not in shown and sentence_piece.name in shown
    assert "policy threshold" in shown and "bits per byte" in shown


def test_head_shows_text_by_the_models_own_tokenizer(captured, documents, tmp_path, byte_level):
    first = Store(captured).documents[0]
    texts = {d["id"]: d["text"] for d in map(json.loads, documents.read_text().splitlines())}
    shown = ok("head", captured, "--rows", 5, "--top", 2)
    assert f"Document {first}: " in shown and "·" in shown and texts[first][0] in shown
    assert refused("head", captured, "--tokenizer", byte_level).startswith(f"{captured}: written with tokenizer ")
    copy = shutil.copytree(captured, tmp_path / "copy")
    made = manifest.read(copy)
    made["about"] = {}
    atomic_files.write_text(copy / "manifest.json", json.dumps(made))
    assert "Token ids, for its tokenizer is not here; --tokenizer names it." in ok("head", copy)


def test_verify_ends_with_1_if_something_is_wrong_and_says_what_to_keep(captured, tmp_path):
    assert ok("verify", captured).endswith(f"whole, {len(Store(captured))} documents\n")
    copy = shutil.copytree(captured, tmp_path / "copy")
    path = part_path(copy, 0)
    path.write_bytes(path.read_bytes()[:-1])
    outcome = fuselm("store", "verify", copy, "--json", "--good", tmp_path / "good")
    assert outcome.code == 1 and (tmp_path / "good").read_text() == ""
    found = json.loads(outcome.out)
    assert {p["path"] for p in found["problems"]} == {str(path)} and found["kept"] == []
    assert sorted(found["lost"]) == sorted(Store(captured).documents)
    assert refused("verify", tmp_path) == f"{tmp_path}: not a finished stage (no manifest.json); run `fuselm run` again"


def test_what_is_cut_apart_by_domain_merges_to_the_whole(captured, documents, tmp_path):
    domains = sorted({d["domain"] for d in map(json.loads, documents.read_text().splitlines())})
    for domain in domains:
        ok("subset", tmp_path / domain, captured, "--documents", documents, "--domain", domain)
    merged = ok("merge", tmp_path / "all", *(tmp_path / domain for domain in domains[::-1]))
    assert merged.startswith(f"{tmp_path / 'all'}: {len(Store(captured))} documents, ")
    assert sorted(Store(tmp_path / "all").documents) == sorted(Store(captured).documents)
    assert ok("verify", tmp_path / "all").endswith(f"whole, {len(Store(captured))} documents\n")


def test_a_store_is_cut_to_a_narrower_policy_only(captured, tmp_path):
    out = tmp_path / "nucleus"
    ok("subset", out, captured, "--policy", "nucleus", "--mass", 0.5)
    assert manifest.read(out)["counts"]["entries"] < manifest.read(captured)["counts"]["entries"]
    assert manifest.read(out)["parameters"]["top_k"] == 13, "the store's own"
    line = refused("subset", tmp_path / "wide", captured, "--policy", "top_k", "--top-k", 64)
    assert line.startswith(f"{captured}: document ") and "fewer than the policy would keep" in line
    assert refused("subset", tmp_path / "x", captured) == "subset: nothing to cut; give --documents, --policy or both"
    assert refused("subset", tmp_path / "x", captured, "--mass", 0.5).startswith(
        "--mass: does nothing without --policy"
    )
    assert refused("subset", tmp_path / "x", captured, "--domain", "z").startswith("--domain: a store has no domains")


@pytest.mark.parametrize(
    ("layout", "suffix"), [("vllm", "jsonl"), ("openai", "jsonl"), ("axolotl", "parquet"), ("distillkit", "parquet")]
)
def test_a_store_goes_out_and_comes_back_as_a_runs_source(
    run, captured, documents, tmp_path, sentence_piece, layout, suffix
):
    file, back = tmp_path / f"rows.{suffix}", tmp_path / "back"
    assert "lost to this layout" in ok("convert", captured, file, "--to", layout, "--documents", documents)
    said = ok("convert", file, back, "--from", layout, "--model", sentence_piece, "--documents", documents)
    assert "a run takes your word" not in said
    assert ok("verify", back).endswith(f"whole, {len(Store(captured))} documents\n")
    assert Store(back).documents == Store(captured).documents
    outcome = fuselm("fuse", run / "run.yaml", f"output={tmp_path / 'out'}", f"sources.piece.store={back}")
    assert outcome.code == 0, outcome.err
    assert "capture piece" not in outcome.stages


def test_an_import_without_its_model_is_taken_on_the_users_word(captured, documents, tmp_path, sentence_piece):
    file = tmp_path / "rows.jsonl"
    ok("convert", captured, file, "--to", "vllm")
    said = ok("convert", file, tmp_path / "back", "--from", "vllm", "--tokenizer", sentence_piece, "--model", "a/name")
    assert (
        "a run cannot check that it was `sources.NAME.model`; name its folder with --model to have that checked" in said
    )
    made = manifest.read(tmp_path / "back")
    assert made["about"]["model"] == "a/name" and "model" not in made["inputs"]
    other = refused("convert", file, tmp_path / "back", "--from", "vllm", "--tokenizer", sentence_piece)
    assert other.endswith("back: there already, and made of other inputs; name another folder")


def test_renormalised_rows_need_the_share_that_was_cut_off(captured, tmp_path, sentence_piece):
    file = tmp_path / "rows.parquet"
    ok("convert", captured, file, "--to", "axolotl", "--renormalise")
    line = refused("convert", file, tmp_path / "x", "--from", "axolotl", "--tokenizer", sentence_piece)
    assert line.startswith("100% of the rows sum to 1: ") and "--tail 0.05" in line
    ok("convert", file, tmp_path / "x", "--from", "axolotl", "--tokenizer", sentence_piece, "--tail", 0.25)
    assert json.loads(ok("info", tmp_path / "x", "--json"))["mean_tail"] == pytest.approx(0.25, abs=0.01)


def test_rows_may_be_each_tokens_own_or_the_nexts(captured, tmp_path, sentence_piece):
    made = ("--from", "distillkit", "--tokenizer", sentence_piece)
    for rows in ("own", "next"):
        ok("convert", captured, tmp_path / f"{rows}.jsonl", "--to", "distillkit", "--rows", rows)
        ok("convert", tmp_path / f"{rows}.jsonl", tmp_path / rows, *made, "--rows", rows)
    own, following = (list(Store(tmp_path / rows).read_tables()) for rows in ("own", "next"))
    assert own == following
    assert refused("convert", captured, tmp_path / "x.jsonl", "--to", "vllm", "--rows", "own").startswith(
        "--rows: the rows"
    )


def test_bad_input_is_one_line(captured, tmp_path, sentence_piece):
    bad = tmp_path / "bad.jsonl"
    out, tokenizer = tmp_path / "x", ("--tokenizer", sentence_piece)
    assert refused("convert", bad, out) == "convert: needs either --from LAYOUT or --to LAYOUT"
    assert refused("convert", bad, out, "--from", "gguf").startswith("--from gguf: unknown; needs one of vllm, openai")
    assert refused("convert", bad, out, "--from", "vllm").startswith("convert: the tokenizer is unknown")
    assert refused("convert", bad, out, "--from", "vllm", *tokenizer).startswith(f"{bad}: no such file, nor a folder")
    for text, said in [
        ("{", f"{bad}:1: not JSON ("),
        ("[]", f"{bad}:1: a list, needs an object"),
        ("{}", "bad.jsonl:0: no list prompt_logprobs"),
        ('{"prompt_logprobs": [null], "prompt_token_ids": 5}', "bad.jsonl:0: not a record of vllm (TypeError"),
    ]:
        bad.write_text(text)
        assert refused("convert", bad, out, "--from", "vllm", *tokenizer).startswith(said)
    assert refused("convert", captured, bad, "--to", "vllm") == f"{bad}: there already; name another file"
    parquet = tmp_path / "x.parquet"
    assert refused("convert", captured, parquet, "--to", "vllm").endswith("vllm is written to .jsonl; name it so")
    parquet.write_bytes(b"PAR1")
    assert "not a readable Parquet file (" in refused("convert", parquet, out, "--from", "axolotl", *tokenizer)
    assert not out.exists()

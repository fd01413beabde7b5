"""Check what `fuselm inspect` shows of a document, token by token."""

import json
import math
from pathlib import Path

import pytest
import tiny_run
from tiny_run import fuselm

from fuselm.documents import corpus, document_list
from fuselm.models.loading import load_tokenizer
from fuselm.models.locating import locate_model
from fuselm.models.vocabulary import Vocabulary
from fuselm.runs import run_folders, session
from fuselm.stores import store


@pytest.fixture(scope="module")
def finished(tmp_path_factory, byte_level, sentence_piece, word_piece, texts) -> Path:
    folder = tmp_path_factory.mktemp("inspected")
    run_file = tiny_run.write(
        folder,
        target=byte_level,
        sources={"zeta": byte_level, "alpha": sentence_piece, "words": word_piece},
        rows=[
            *tiny_run.short(texts, domains=1),
            *({"domain": "odd", "text": f"[bold]tab\there[/bold]\n é🙂{n}"} for n in range(3)),
        ],
        train=tiny_run.TRAIN | {"passes": 1},
    )
    outcome = fuselm("run", run_file, cache=tmp_path_factory.getbasetemp() / "cache")
    assert outcome.code == 0, outcome.err
    return folder / "out"


def parts(out: Path, number: int):
    """Return a training document, its fused trace, and its aligned traces by source."""
    folders = json.loads((out / "run.json").read_text())["folders"]
    document = document_list.read_documents(out / folders["corpus"], "train")[number]
    aligned = {
        name.removeprefix("align "): store.Store(out / folder).read(document.id)
        for name, folder in folders.items()
        if name.startswith("align ")
    }
    return document, store.Store(out / folders["fuse"]).read(document.id), aligned


def shown(token: bytes) -> str:
    text = token.decode("utf-8", "backslashreplace").replace(" ", "·")
    return text.replace("\n", "\\n").replace("\t", "\\t")


def table(output: str) -> list[list[str]]:
    """Return the cells of the table's rows."""
    return [[cell.strip() for cell in line.split("│")] for line in output.splitlines() if "│" in line]


@pytest.mark.parametrize("number", [0, 1, 2, 3])
def test_every_token_is_shown_with_the_source_that_raised_it(finished, byte_level, number):
    outcome = fuselm("inspect", finished, "--doc", number)
    assert outcome.code == 0, outcome.err
    document, fused, by_source = parts(finished, number)
    model = locate_model(str(byte_level))
    vocabulary = Vocabulary(load_tokenizer(model), model.output_size)
    rows = [row for row in table(outcome.out) if row[1]]
    assert [row[0] for row in rows] == [shown(vocabulary.token_bytes[t]) for t in fused.tokens.tolist()]
    names, raised, lowered = ["alpha", "words", "zeta"], 0, 0
    for i, (row, weights) in enumerate(zip(rows, fused.weights.astype(float), strict=True)):
        probabilities = [math.exp(by_source[name].distributions.gold[i]) for name in names]
        shifts = [w * (p - probabilities[2]) for w, p in zip(weights, probabilities, strict=True)]  # zeta is the target
        fused_probability = math.exp(fused.distributions.gold[i])
        assert sum(shifts) == pytest.approx(fused_probability - probabilities[2], abs=0.01)  # stores round
        name, shift = [*row[1].split(), "0"][:2]
        largest = (max if sum(shifts) >= 0 else min)(shifts)
        if abs(largest) < 0.0005:
            assert name in ("unchanged", "no")
            continue
        raised, lowered = raised + (largest > 0), lowered + (largest < 0)
        assert name == names[shifts.index(largest)] and float(shift) == pytest.approx(largest, abs=0.0006)
        assert row[-1].startswith(f"{fused_probability:.3f}")
    assert f"Against zeta, the target: {raised} of {len(rows)} tokens raised (" in outcome.out
    assert f"), {lowered} lowered (" in outcome.out
    assert f"{document.id}, {document.domain}, {len(fused.tokens)} tokens" in outcome.out
    header = next(line for line in outcome.out.splitlines() if line.startswith("token"))
    assert header.split() == ["token", "┃", "raised", "by", "┃", "alpha", "┃", "words", "┃", "zeta", "┃", "fused"]


def test_as_many_expected_tokens_are_shown_as_asked_for(finished):
    few, many = (fuselm("inspect", finished, "--top", top) for top in (1, 5))
    assert few.code == many.code == 0 and len(few.out) < len(many.out)


def test_a_range_of_tokens_fits_into_80_columns(finished):
    """Each candidate keeps its probability beside it, and what lies outside the range is not drawn."""
    outcome = fuselm("inspect", finished, "--tokens", "1:2", "--top", 2, columns=80)
    assert outcome.code == 0, outcome.err
    _, fused, by_source = parts(finished, 0)
    rows = table(outcome.out)
    assert all(len(line) <= 80 for line in outcome.out.splitlines() if "│" in line) and len(rows) == 2 * 3
    for number, i in enumerate((1, 2)):
        first, *candidates = rows[3 * number : 3 * number + 3]
        traces = [by_source[name] for name in ("alpha", "words", "zeta")] + [fused]
        rows_of = [t.distributions for t in traces]
        assert first[1:] == [f"{math.exp(d.gold[i]):.3f}" if d.informed[i] else "unknown" for d in rows_of]
        assert all(cell == "" or cell[-5:-2] == " 0." for row in candidates for cell in row[1:])


@pytest.mark.parametrize(("tokens", "problem"), [("5", "no range of tokens"), ("9:3", "ends before it begins")])
def test_a_range_that_is_none_is_refused_in_one_line(finished, tokens, problem):
    outcome = fuselm("inspect", finished, "--tokens", tokens)
    assert (outcome.code, outcome.err) == (
        2,
        f"fuselm: --tokens {tokens}: {problem}; write FIRST:LAST, as 0:20\n",
    )


@pytest.mark.parametrize("number", [-1, 997])
def test_a_document_that_does_not_exist_is_refused_in_one_line(finished, number):
    outcome = fuselm("inspect", finished, "--doc", number)
    assert outcome.code == 2 and outcome.out == ""
    assert outcome.err.startswith(f"fuselm: document {number}: the run has training documents 0 to ")


@pytest.fixture(scope="module")
def unfinished(tmp_path_factory, byte_level, sentence_piece, texts) -> Path:
    """Write a run file whose run has not begun."""
    folder = tmp_path_factory.mktemp("unfinished")
    rows = tiny_run.short(texts, domains=1)
    return tiny_run.write(folder, target=byte_level, sources={"alpha": sentence_piece, "zeta": byte_level}, rows=rows)


def test_a_run_is_shown_as_far_as_it_has_come(unfinished, tmp_path_factory, byte_level, sentence_piece):
    out = unfinished.parent / "out"
    cache = tmp_path_factory.getbasetemp() / "cache"
    (text,) = [d.text for n, d in enumerate(training(unfinished, cache)) if n == 1]
    for stage, names in (("capture", []), ("align", ["alpha", "zeta"]), ("fuse", ["alpha", "zeta", "fused"])):
        assert fuselm(stage, unfinished, cache=cache).code == 0
        outcome = fuselm("inspect", out, "--doc", 1)
        assert outcome.code == 0, outcome.err
        assert ("Not fused yet: `fuselm fuse` or `fuselm run` does that." in outcome.out) == (stage != "fuse")
        rows = [row for row in table(outcome.out) if row[-1]]
        for name, model in (("zeta", byte_level), ("alpha", sentence_piece)):
            assert (f"{name}, captured and not aligned yet: " in outcome.out) == (stage == "capture")
            ids = vocabulary_of(model if stage == "capture" else byte_level).segment(text).ids.tolist()
            spelled = [shown(vocabulary_of(model if stage == "capture" else byte_level).token_bytes[i]) for i in ids]
            assert [row[0] for row in rows][-len(spelled) :] == spelled
            if stage == "capture":
                rows = rows[: -len(spelled)]
        for name in names:
            assert any(name in line and "token" in line for line in outcome.out.splitlines())


def test_the_newest_stages_that_belong_together_are_shown(unfinished, tmp_path_factory):
    """There are several captures and alignments; those that were made last, from one another, are shown."""
    cache, out = tmp_path_factory.getbasetemp() / "cache", unfinished.parent / "out"
    for number, options in enumerate((["align.top_k=5"], ["capture.draws=7", "align.top_k=5"], ["align.top_k=3"])):
        assert fuselm("align", unfinished, *options, cache=cache).code == 0
        if number == 2:
            continue  # its captures were there before
        stages = run_folders.find_stages(out)
        for name in ("alpha", "zeta"):
            captured = json.loads((stages[f"capture {name}"] / "manifest.json").read_text())
            aligned = json.loads((stages[f"align {name}"] / "manifest.json").read_text())
            assert aligned["inputs"]["captured"] == captured["key"] and aligned["parameters"]["top_k"] == 5
            assert captured["parameters"]["draws"] == (7 if number else 13)
            corpus_of = json.loads((stages["corpus"] / "manifest.json").read_text())
            assert corpus_of["files"]["documents.jsonl"] == captured["inputs"]["corpus"]


def training(run_file: Path, cache: Path) -> list[corpus.Document]:
    assert fuselm("capture", run_file, cache=cache).code == 0
    (folder,) = (run_file.parent / "out" / "corpus").iterdir()
    return document_list.read_documents(folder, "train")


def vocabulary_of(folder: Path) -> Vocabulary:
    model = locate_model(str(folder))
    return Vocabulary(load_tokenizer(model), model.output_size)


def test_what_is_not_a_run_is_refused_in_one_line(tmp_path):
    for where, expected in (
        (tmp_path, "no run there that captured anything; start it with `fuselm run`, or name another folder"),
        (tmp_path / "absent", "no such folder; name a run's folder, the `output` of its run file"),
    ):
        outcome = fuselm("inspect", where)
        assert (outcome.code, outcome.out, outcome.err) == (2, "", f"fuselm: {where}: {expected}\n")


UNALIGNED = json.dumps({"folders": {"corpus": "c", "fuse": "f", "train clm": "t", "capture a": "x"}})
RECORDS = [UNALIGNED, "[]", "{}", '"x"', '{"folders": []}', '{"folders": {"fuse": 5}}', '{"folders": {}}', "[" * 10**5]


@pytest.mark.parametrize("written", RECORDS, ids=range(len(RECORDS)))
def test_a_damaged_record_of_a_run_is_refused_in_one_line(tmp_path, written):
    (tmp_path / "run.json").write_text(written)
    for command in ("inspect", "diagnose"):
        outcome = fuselm(command, tmp_path)
        assert outcome.code == 2 and outcome.err.count("\n") == 1, outcome.err
        assert f"{tmp_path}/run.json: damaged" in outcome.err


def test_a_run_file_is_inspected_as_its_folder_is(finished, tmp_path_factory):
    cache = tmp_path_factory.getbasetemp() / "cache"
    of_folder, of_file = (
        fuselm("inspect", run, "--doc", 2, cache=cache) for run in (finished, finished.parent / "run.yaml")
    )
    assert of_file.code == 0, of_file.err
    assert of_file.out == of_folder.out


def test_without_the_target_the_source_that_adds_most_is_shown(
    tmp_path, tmp_path_factory, byte_level, texts, sentence_piece, word_piece
):
    run_file = tiny_run.write(
        tmp_path,
        target=byte_level,
        sources={"alpha": sentence_piece, "words": word_piece},
        rows=tiny_run.short(texts, domains=1),
    )
    cache = tmp_path_factory.getbasetemp() / "cache"
    assert fuselm("fuse", run_file, cache=cache).code == 0
    outcome = fuselm("inspect", run_file, cache=cache)
    assert outcome.code == 0, outcome.err
    assert "Tokens by the source that adds most to them: " in outcome.out
    stages = run_folders.find_stages(tmp_path / "out")
    document = document_list.read_documents(stages["corpus"], "train")[0]
    fused = store.Store(stages["fuse"]).read(document.id)
    gold = [store.Store(stages[f"align {name}"]).read(document.id).distributions.gold for name in ("alpha", "words")]
    for row, weights, golds in zip(
        [r for r in table(outcome.out) if r[1]], fused.weights, zip(*gold, strict=True), strict=True
    ):
        added = [w * math.exp(g) for w, g in zip(weights.tolist(), golds, strict=True)]
        if max(added) >= 0.0006:
            name, share = row[1].split()
            assert name == ("alpha", "words")[added.index(max(added))]
            assert float(share) == pytest.approx(max(added), abs=0.0006)


def test_python_inspects_and_measures_a_run_as_the_commands_do(finished, tmp_path_factory, monkeypatch):
    cache = tmp_path_factory.getbasetemp() / "cache"
    monkeypatch.setenv("FUSELM_CACHE", str(cache))
    run = session.load_run(finished.parent / "run.yaml", quiet=True)
    monkeypatch.setattr(session, "INSPECTED_WIDTH", 211)  # as wide as the command's
    assert run.inspect(1) == fuselm("inspect", finished, "--doc", 1, cache=cache).out
    numbers = json.loads(fuselm("fidelity", finished, "--json", cache=cache).out)
    assert run.measure_fidelity() == numbers and list(numbers) == ["alpha", "words"]
    assert run.measure_fidelity("words") == {"words": numbers["words"]}

"""What a result will lack is said before anything is made: intervals, files of other kinds, something to learn."""

import json

import pytest
import tiny_run
from tiny_run import fuselm

import fuselm as package
from fuselm.documents import corpus, text_files
from fuselm.documents.texts import TextRow
from fuselm.runs.input_notes import count_heldout, describe_few_heldout, suggest_heldout

DRAWN = corpus.UNASSIGNED


@pytest.mark.parametrize("count", [3, 5, 16, 21, 22, 23, 24, 50])
@pytest.mark.parametrize(("dev", "heldout"), [(0.125, 0.25), (0.2, 0.5), (0.01, 0.38)])
def test_held_out_documents_are_counted_as_they_are_drawn(count, dev, heldout):
    rows = [TextRow(domain="a", text=f"text {n}") for n in range(count)]
    rows += [TextRow(domain="a", text="another", split="heldout")]
    drawn = corpus.draw_splits(rows, dev=dev, heldout=heldout, seed=0)
    counts = corpus.count_domains(rows)["a"]
    assert count_heldout(counts, dev=dev, heldout=heldout) == sum(d.split == "heldout" for d in drawn)


def test_the_smallest_share_that_is_enough_is_suggested():
    counts = {"a": {DRAWN: 16}, "b": {DRAWN: 30}, "own": {"heldout": 1, "train": 3, "dev": 1}}
    share = suggest_heldout(counts, dev=0.125)
    held = [count_heldout(counts["a"], dev=0.125, heldout=s) for s in (share, share - 0.01)]
    assert held == [6, 5]
    assert suggest_heldout({"a": {DRAWN: 8}}, dev=0.125) is None


@pytest.mark.parametrize(
    ("counts", "said"),
    [
        ({"a": {DRAWN: 22}}, None),
        ({"a": {DRAWN: 2, "heldout": 6}}, None),
        (
            {"a": {DRAWN: 16}, "b": {DRAWN: 100}},
            "in 1 of 2 domains (a 4), so the result will have no intervals there and no verdict on average; "
            "set corpus.heldout=0.35, or have 22 or more documents a domain",
        ),
        ({"a": {DRAWN: 5}}, "(a 1), so the result will have no intervals there and no verdict on average; have 22 or"),
        ({"a": {"train": 9, "dev": 1, "heldout": 2}}, "give 6 or more of each domain's rows the split heldout"),
    ],
)
def test_too_few_held_out_documents_are_described_with_what_to_do(counts, said):
    found = describe_few_heldout(counts, dev=0.125, heldout=0.25)
    assert found is None if said is None else said in found


def test_files_of_other_kinds_are_counted(tmp_path):
    for name in ("a.txt", "b.py", "c.py", "d.bin", ".hidden.py", "README.py", "sub/Makefile"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("text")
    found = text_files.describe_unread_files([tmp_path])
    assert "4 files in folders are left out, because their kind is not read (2 .py, 1 .bin, 1 Makefile)" in found
    assert text_files.describe_unread_files([tmp_path / "a.txt", f"{tmp_path}/*.txt"]) is None


def test_passes_of_the_fused_model_alone_are_noted(tmp_path, byte_level, texts):
    path = tiny_run.write(tmp_path, target=byte_level, sources={"own": byte_level}, rows=tiny_run.short(texts))

    def notes(*overrides: str) -> list[str]:
        return [n for n in package.load_run(path, overrides, quiet=True).notes if n.startswith("train.passes")]

    assert "1 is for the fused model, and the baseline makes 2" in notes("train.passes=1")[0]
    assert notes("train.passes=3") == notes("train.passes=1", "train.clm.passes=null") == []


def test_plan_and_load_run_say_it_before_anything_is_made(tmp_path, byte_level, texts):
    rows = [*tiny_run.short(texts), {"domain": "tiny", "text": "One."}, {"domain": "tiny", "text": "Two."}]
    rows += [{"domain": "tiny", "text": "Three."}]
    path = tiny_run.write(tmp_path, target=byte_level, sources={"own": byte_level}, rows=rows)
    notes = package.load_run(path, quiet=True).notes
    assert "tiny 1" in notes[0] and notes[1].startswith("sources: the target is the only one")
    outcome = fuselm("capture", path)
    assert outcome.code == 0 and all(f"  note: {note}\n" in outcome.err for note in notes)
    (tmp_path / "corpus.jsonl").write_text(
        "".join(json.dumps({"text": f"text {n}", "domain": "a"}) + "\n" for n in range(22))
    )
    assert len(package.load_run(path, quiet=True).notes) == 1


def test_copies_in_a_folder_are_left_out_and_noted(tmp_path, byte_level, texts):
    """Folders of people's texts have copies; only a file that is named itself is refused as one."""
    rows = tiny_run.short(texts)
    path = tiny_run.write(tmp_path, target=byte_level, sources={"own": byte_level}, rows=rows)
    (tmp_path / "notes").mkdir()
    for n in range(24):
        (tmp_path / "notes" / f"{n:02d}.txt").write_text(rows[0]["text"] + str(n % 22), encoding="utf-8")
    run = package.load_run(path, {"corpus.files": [str(tmp_path / "notes")]}, quiet=True)
    folder = tmp_path / "notes"
    assert (
        f"corpus.files: 2 files are left out, because they are copies ({folder}/22.txt, {folder}/23.txt)" in run.notes
    )
    with pytest.raises(ValueError, match=r"00\.txt and .*22\.txt are the same; drop one"):
        package.load_run(path, {"corpus.files": [str(folder), str(folder / "22.txt")]}, quiet=True)

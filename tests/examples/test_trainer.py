"""examples/trainer.py: a loop of one's own, with our loss and our batches, brings a model nearer to the fused rows."""

import importlib.util
from pathlib import Path

import pytest
import tiny_run
from transformers import AutoModelForCausalLM

import fuselm

EXAMPLE = Path(__file__).parents[2] / "examples" / "trainer.py"


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_plain_trainer_learns_from_a_store(byte_level, sentence_piece, texts, tmp_path):
    run_file = tiny_run.write(
        tmp_path, target=byte_level, sources={"other": sentence_piece}, rows=tiny_run.short(texts)
    )
    run = fuselm.load_run(run_file, quiet=True)
    store = run.fuse()
    documents = next((run.folder / "corpus").glob("*/documents.jsonl"))
    specification = importlib.util.spec_from_file_location("trainer_example", EXAMPLE)
    example = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(example)
    example.main(str(byte_level), str(store.folder), str(documents), str(tmp_path / "trained"))
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "trained")
    before = AutoModelForCausalLM.from_pretrained(byte_level)
    moved = [(a - b).abs().max() for a, b in zip(trained.parameters(), before.parameters(), strict=True)]
    assert max(moved) > 0
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "trained" / file).write_bytes((byte_level / file).read_bytes())
    file = tmp_path / "corpus.jsonl"
    scores = [
        fuselm.score_texts(model, file, quiet=True)["average"]["bits_per_byte"]
        for model in (byte_level, tmp_path / "trained")
    ]
    assert scores[1] < scores[0]

"""Teach a run's fused model to prefer the best answers of a source to its worst, with TRL's DPOTrainer.

    pip install trl
    python examples/chat/prefer.py RUN [--out FOLDER] [--beta 5] [--rate 1e-6] [--passes 1] [--limit N]

RUN is a finished run with `write.answers`, as examples/fusechat3.yaml. Both answers of a pair are of one source, as in
FuseChat-3.0, so that the preference is for what is said and not for how a model says it. The loss is that of DPO with
log-probabilities per token (`sigmoid_norm`), whose `beta` is larger than that of plain DPO. The result is in
RUN/preferred, and `preferred.json` beside it says how often the chosen answer was the more probable one, before and
after.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from fuselm.sources.answering import PAIRS_FILE
from fuselm.system import atomic_files

LONGEST = 1024  # tokens of a prompt with an answer


def find_folders(run: Path) -> tuple[Path, list[Path]]:
    """Return the run's fused model, and the files of pairs. Raises `ValueError` if it has none."""
    if not (run / "run.json").is_file():
        raise ValueError(f"{run}: no finished run there; start it with `fuselm run`, or name another folder")
    folders = json.loads((run / "run.json").read_text())["folders"]
    files = [run / path / PAIRS_FILE for step, path in folders.items() if step.startswith("write ")]
    if not (files := [file for file in files if file.is_file()]):
        raise ValueError(f"{run}: no source answered there; set write.answers and run it again")
    return run / "model", files


def read_pairs(files: Sequence[Path], limit: int | None) -> list[dict]:
    """Return the prompts with their best and worst answers."""
    rows = [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    return [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in rows][:limit]


def train(
    model: Path, pairs: Sequence[dict], out: Path, *, beta: float, rate: float, passes: int
) -> dict[str, float | int]:
    """Train the model on the pairs, and return its accuracy and margin on them before and after."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    options = DPOConfig(
        output_dir=str(out / "steps"),
        loss_type="sigmoid_norm",
        beta=beta,
        learning_rate=rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,
        num_train_epochs=passes,
        per_device_train_batch_size=2,
        per_device_eval_batch_size=2,
        gradient_accumulation_steps=4,
        max_length=LONGEST,
        save_strategy="no",
        logging_steps=1,
        report_to="none",
        seed=0,
        bf16=torch.cuda.is_available(),
    )
    rows = Dataset.from_list(list(pairs))
    trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        args=options,
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=tokenizer,
    )
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    trainer.model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    names = {"loss": "eval_loss", "accuracy": "eval_rewards/accuracies", "margin": "eval_rewards/margins"}
    found = {
        f"{name} {when}": of[key] for name, key in names.items() for when, of in (("before", before), ("after", after))
    }
    return {"pairs": len(pairs), **found}


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="a finished run's folder")
    parser.add_argument("--out", type=Path, help="a folder for the model; RUN/preferred if not given")
    parser.add_argument("--beta", type=float, default=5.0, help="of the loss; larger stays closer to the model")
    parser.add_argument("--rate", type=float, default=1e-6, help="the learning rate")
    parser.add_argument("--passes", type=int, default=1)
    parser.add_argument("--limit", type=int, help="pairs, to try it out")
    asked = parser.parse_args(arguments)
    out = asked.out or asked.run / "preferred"
    try:
        model, files = find_folders(asked.run)
        if not (pairs := read_pairs(files, asked.limit)):
            raise ValueError(f"{files[0]}: no pairs, because no two answers differ in their numbers; ask for more")
        found = train(model, pairs, out, beta=asked.beta, rate=asked.rate, passes=asked.passes)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    atomic_files.write_text(out.with_suffix(".json"), json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Let a source answer the training prompts of conversations several times, and keep the best answer of each.

    python examples/chat/write_answers.py MODEL best.jsonl [--rows FILE] [--answers 4] [--min-p 0.1]
        [--choose examples/chat/choose.py:closest] [--pairs pairs.jsonl]

MODEL reads each conversation of the training split up to its last answer, in its own chat template, and answers: as its
generation settings say, or drawn with `--min-p`. What `--choose` names, FILE.py:FUNCTION, gives each answer a number:
it is called with the answer and the conversation's row, whose last message is the answer that people gave. `best.jsonl`
has the rows with the best answer in place of theirs, to train on or to fuse over as any other conversations:

    fuselm run examples/chat.yaml corpus.files=[examples/chat/conversations.jsonl,best.jsonl]

`--pairs` writes the best and the worst, where they differ, as `prompt`, `chosen` and `rejected`, which TRL's
`DPOTrainer` reads. Answers that are empty, or were not ended within `--tokens`, are left out.
"""

import argparse
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from fuselm.models.locating import Model, locate_model
from fuselm.system import atomic_files

Choose = Callable[[str, Mapping], float]
CONVERSATIONS = Path(__file__).with_name("conversations.jsonl")
CLOSEST = f"{Path(__file__).with_name('choose.py')}:closest"


def load_function(name: str) -> Choose:
    """Return the function that FILE.py:FUNCTION names. Raises `ValueError` if it is not there."""
    file, _, function = name.rpartition(":")
    if not file or not Path(file).is_file():
        raise ValueError(f"--choose {name}: no such file; write it as FILE.py:FUNCTION")
    specification = importlib.util.spec_from_file_location("choose", file)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    if not callable(found := getattr(module, function, None)):
        raise ValueError(f"--choose {name}: {file} has no function '{function}'")
    return found


def answer(
    model: Model, prompts: Sequence[Sequence[Mapping]], *, count: int, tokens: int, min_p: float | None, seed: int
) -> Iterator[list[str]]:
    """Yield the answers to each prompt that the model ended.

    Raises `ValueError` if the model has no chat template.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model.folder)
    if not tokenizer.chat_template:
        raise ValueError(f"{model.folder}: has no chat template, so it cannot answer; name a chat model")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    lm = AutoModelForCausalLM.from_pretrained(model.folder, dtype="auto").to(device).eval()
    drawn = {} if min_p is None else {"min_p": min_p, "temperature": 1.0, "top_p": 1.0, "top_k": 0}
    stops = lm.generation_config.eos_token_id
    ends = {*(stops if isinstance(stops, list) else [stops]), tokenizer.eos_token_id}
    torch.manual_seed(seed)
    for prompt in prompts:
        text = tokenizer.apply_chat_template(list(prompt), add_generation_prompt=True, tokenize=False)
        inputs = tokenizer(text, return_tensors="pt", add_special_tokens=False).to(device)
        with torch.inference_mode():
            output = lm.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                num_return_sequences=count,
                max_new_tokens=tokens,
                do_sample=True,
                eos_token_id=sorted(ends - {None}),
                pad_token_id=tokenizer.eos_token_id,
                **drawn,
            )
        new = output[:, inputs["input_ids"].shape[1] :].tolist()
        ended = [ids for ids in new if ends & set(ids)]
        yield [said for ids in ended if (said := tokenizer.decode(ids, skip_special_tokens=True).strip())]


def choose_answers(
    rows: Sequence[Mapping], answers: Iterator[Sequence[str]], choose: Choose, name: str
) -> tuple[list[dict], list[dict]]:
    """Return the rows with the best answers, and the pairs of best and worst."""
    best, pairs = [], []
    for row, given in zip(rows, answers, strict=True):
        ranked = sorted(dict.fromkeys(given), key=lambda said: choose(said, row))
        if not ranked:
            continue
        prompt = row["messages"][:-1]
        first, last = ({"role": "assistant", "content": said} for said in (ranked[-1], ranked[0]))
        earlier = [m | {"weight": 0} if m["role"] == "assistant" else m for m in prompt]  # context, not learned again
        best.append({**row, "messages": [*earlier, first], "source": f"{name}, asked with {row['source']}"})
        if choose(ranked[-1], row) > choose(ranked[0], row):
            pairs.append({"prompt": prompt, "chosen": [first], "rejected": [last]})
    return best, pairs


def write_rows(path: Path, rows: Sequence[Mapping]) -> None:
    atomic_files.write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a chat model: a folder, a GGUF file or a hub id")
    parser.add_argument("best", type=Path, help="file for the rows with the best answers")
    parser.add_argument(
        "--rows", type=Path, default=CONVERSATIONS, help="rows of messages; those of train are answered"
    )
    parser.add_argument("--answers", type=int, default=4, help="answers to each prompt")
    parser.add_argument("--tokens", type=int, default=256, help="tokens of an answer at most")
    parser.add_argument(
        "--min-p", type=float, help="draw tokens of at least this share of the likeliest one's probability"
    )
    parser.add_argument("--choose", default=CLOSEST, help="FILE.py:FUNCTION that gives an answer a number")
    parser.add_argument("--pairs", type=Path, help="file for the best and the worst answers")
    parser.add_argument("--limit", type=int, help="prompts, to try it out")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args(arguments)
    try:
        choose = load_function(asked.choose)
        model = locate_model(asked.model)
        rows = [json.loads(line) for line in asked.rows.read_text(encoding="utf-8").splitlines()]
        rows = [row for row in rows if row["split"] == "train"][: asked.limit]
        answers = answer(
            model,
            [row["messages"][:-1] for row in rows],
            count=asked.answers,
            tokens=asked.tokens,
            min_p=asked.min_p,
            seed=asked.seed,
        )
        best, pairs = choose_answers(rows, answers, choose, asked.model)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    write_rows(asked.best, best)
    if asked.pairs:
        write_rows(asked.pairs, pairs)
    print(f"{len(best)} of {len(rows)} prompts answered; in {len(pairs)} the best and the worst differ")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

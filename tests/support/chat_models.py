"""Give tiny models chat templates, and make conversations for tests."""

import json
import random
import shutil
from pathlib import Path

LINES = (  # as ChatML does: a role's line, what it says, an end, a line break
    "{% for m in messages %}# {{ m.role }}\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}# assistant\n{% endif %}"
)
BRACKETS = (  # no system role, a space before what is said, nothing behind the end, a beginning of its own
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }}{{ eos_token }}{% endif %}"
    "{% endfor %}"
)
ASKED = ("What is it?", "Say it again.", "And then?", "Explain the cat, please.", "Où est le chat ?")


def add_template(folder: Path, out: Path, template: str = LINES) -> Path:
    """Copy a model's folder, with a chat template in its settings."""
    shutil.copytree(folder, out)
    path = out / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(settings | {"chat_template": template}), encoding="utf-8")
    return out


def make_rows(texts: list[dict[str, str]], *, domains: int = 2, length: int = 79, seed: int = 0) -> list[dict]:
    """Return conversations of one or two turns, in which the assistant says the beginnings of texts."""
    rng = random.Random(seed)
    chosen = sorted({row["domain"] for row in texts})[:domains]
    rows = []
    for text in (row for row in texts if row["domain"] in chosen):
        said = [text["text"][:length].strip(), text["text"][length : 2 * length].strip()][: 1 + rng.randrange(2)]
        messages = [{"role": "system", "content": "Be brief."}] if rng.random() < 0.4 else []
        for content in (content for content in said if content):
            messages.append({"role": "user", "content": rng.choice(ASKED)})
            messages.append({"role": "assistant", "content": content})
        rows.append({"domain": text["domain"], "messages": messages})
    return rows

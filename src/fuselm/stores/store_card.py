"""Write the card of a store on the Hugging Face Hub: what it holds, how to open it, and what is not known of it."""

import math
from collections.abc import Mapping
from typing import Any

import yaml

from fuselm.system.foreign_text import escape_markdown, write_code

SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))
STAGES = {
    "capture": "Each row is what {model} expects next, in its own tokens.",
    "align": "Each row is what another model expects next, aligned to the tokens of {model}.",
    "fuse": "Each row is what several models expect next, fused into one distribution over the tokens of {model}.",
}


def write_card(facts: Mapping[str, Any], repository: str) -> str:
    """Return the card as Markdown with YAML front matter. `facts` are those of `contents.read_facts`."""
    model = facts["about"].get("model")
    named = "a model that the store does not name" if model is None else write_code(model)
    front = {
        "pretty_name": f"fuselm store, {facts['stage']} of {facts['documents']:,} documents",
        "license": "unknown",
        "tags": ["fuselm", "logprobs", "knowledge-distillation"],
        "size_categories": [next((name for most, name in SIZES if facts["documents"] < most), "1M<n<10M")],
        "configs": [{"config_name": "default", "data_files": "part-*.parquet"}],
    }
    rows = {
        "stage": f"{facts['stage']}, format {facts['format']}, key `{facts['key']}`",
        "model": "not said" if model is None else escape_markdown(model),
        "inputs": _list_pairs(facts["inputs"]),
        "parameters": _list_pairs(facts["parameters"]),
        "documents": f"{facts['documents']:,}, and {len(facts['skipped']):,} skipped",
        "tokens": f"{facts['tokens']:,}, of which {facts['tokens_without_entries']:,} have no entries",
        "text": f"{facts['text_bytes']:,} bytes",
        "entries": f"{facts['entries_per_token']:.2f} a token, with a mean tail of {facts['mean_tail']:.4f}",
        "size": f"{facts['disk_bytes']:,} bytes",
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    front_matter = yaml.safe_dump(front, sort_keys=False, allow_unicode=True, width=math.inf)
    return CARD.format(
        front_matter=front_matter,
        describes=STAGES[facts["stage"]].format(model=named),
        table=table,
        repository=repository,
    )


def _list_pairs(pairs: Mapping[str, Any]) -> str:
    """Return names and values as escaped text for a cell of a table."""
    return escape_markdown(", ".join(f"{name} {value}" for name, value in pairs.items())) or "none"


CARD = """\
---
{front_matter}---

# Next-token distributions

This is a store that fuselm wrote: sparse next-token distributions, one for each token of each document.
{describes}

| | |
|---|---|
{table}

## Open it

```
fuselm store pull {repository} STORE
```

```python
import fuselm

for trace in fuselm.Store("STORE"):
    print(trace.document, len(trace.tokens), trace.distributions.row(0))
```

The command checks every file against `manifest.json`. Any reader of Parquet opens the parts as well: each line of the
table is a document, with lists of tokens, entries and log-probabilities.

## Licence and texts

The licences of the model and of the texts apply. The store does not record them, so they are unknown here: write them
down above before you share it. The documents' texts can be spelled from their tokens.
"""

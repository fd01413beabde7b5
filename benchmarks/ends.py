"""Compare the aligned probability of each end of a turn with the source's own: `python benchmarks/ends.py RUN`.

RUN is the folder of a run on conversations. A source may have tokens that begin as a response's last token does and go
on, such as a full stop with a line break behind it. With these it says that the turn does not end there, and it says so
before the last token; the target's rows say it behind that token. So ends where the source keeps no such token must
have the source's own log-probability, and others less by what those tokens have.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from fuselm.alignment.aligner import Aligner
from fuselm.documents.document import Document
from fuselm.models.chat.messages import END_OF_TURN
from fuselm.models.vocabulary import Vocabulary
from fuselm.runs.fidelity_inputs import gather_from_folder
from fuselm.stores.store import Trace

NEAR = 1e-3  # nats
LEAST_MASS = 1e-4  # of longer tokens, relative to that of the last token


def compare_ends(captured: Any, documents: list[Document], vocabularies: tuple[Vocabulary, Vocabulary], method: str):
    """Return for each end its own and its aligned log-probability, and what longer tokens take away, in nats."""
    aligner = Aligner(*vocabularies, method=method, traces=captured)
    found = []
    for document in documents:
        if document.id not in captured:
            continue
        trace = captured.read(document.id)
        aligned = aligner.align(trace, document.text)
        pairs = zip(*(find_ends(v, t) for v, t in zip(vocabularies, (trace, aligned), strict=True)), strict=True)
        for own, other in pairs:
            gold, arrived = trace.distributions.gold[own], aligned.distributions.gold[other]
            found.append((gold, arrived, measure_longer(vocabularies[0], trace, own - 1) if own else 0.0))
    return np.array(found, np.float64).reshape(-1, 3)


def find_ends(vocabulary: Vocabulary, trace: Trace) -> list[int]:
    return [n for n, spelled in enumerate(vocabulary.spell(trace.tokens.tolist())) if spelled == END_OF_TURN]


def measure_longer(vocabulary: Vocabulary, trace: Trace, row: int) -> float:
    """Return how much less probable an end is if kept tokens that go on past the row's token are ruled out after it."""
    ids, logprobs, *_ = trace.distributions.row(row)
    last = vocabulary.token_bytes[trace.tokens[row]] or b""
    spelled = [vocabulary.token_bytes[i] or b"" for i in ids]
    longer = sum(np.exp(p) for s, p in zip(spelled, logprobs, strict=True) if len(s) > len(last) and s.startswith(last))
    return float(np.log1p(longer / np.exp(np.float64(trace.distributions.gold[row]))))


def summarize(found: np.ndarray) -> dict[str, float | int]:
    own, arrived, less = found.T
    alone, equal = np.expm1(less) < LEAST_MASS, np.abs(arrived - own) <= NEAR
    return {
        "ends": len(found),
        "own_bits": float(-own.sum() / np.log(2)),
        "aligned_bits": float(-arrived.sum() / np.log(2)),
        "without_longer_tokens": int(alone.sum()),
        "of_these_equal": int((alone & equal).sum()),
        "others": int((~alone).sum()),
        "of_these_explained": int((~alone & (np.abs(arrived - own + less) <= NEAR)).sum()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--method", default="span")
    options = parser.parse_args()
    for name, inputs in gather_from_folder(options.run, None).items():
        chosen = {key: inputs[key] for key in ("captured", "documents", "vocabularies")}
        print(json.dumps({"source": name} | summarize(compare_ends(**chosen, method=options.method))))


if __name__ == "__main__":
    main()

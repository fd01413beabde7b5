"""Check what every aligned row must keep, for tests of alignment."""

from functools import partial

import drawn
import numpy as np
import reference

from fuselm.models import bpe
from fuselm.models.vocabulary import Vocabulary
from fuselm.stores.store import Trace


def span_rows(source: Vocabulary, target: Vocabulary, trace: Trace, text: str):
    """Return the reference's rows and tails of each stretch that both tokenizers spell."""
    segmentation = target.segment(text)
    rows: list[reference.Row] = [{} for _ in segmentation.ids]
    tails = [1.0] * len(rows)
    for of_source, of_target in drawn.stretches(source.segment(text), segmentation):
        rows[of_target], tails[of_target] = reference.span_rows(
            b" " + text.encode(),
            drawn.spans(segmentation.starts, segmentation.size)[of_target],
            segmentation.ids.tolist()[of_target],
            drawn.take(drawn.source_trace(trace), of_source),
            source.token_bytes,
            lambda string: target.encode_bytes([string])[0],
            (lambda string: target.encode_bytes([string])[0])
            if target.merges is None
            else partial(merged, target.merges),
        )
    return rows, tails


def merged(merges: bpe.Merges, string: bytes) -> list[int]:
    ids, ranked = np.empty(len(string), np.int32), np.empty(len(string), np.int64)
    return ids[: bpe.encode(merges, np.frombuffer(string, np.uint8), ids, ranked)].tolist()


def total(trace: Trace) -> float:
    return float(trace.distributions.gold.astype(np.float64).sum())


def faithful(vocabulary: Vocabulary, text: str) -> bool:
    spelled = b"".join(vocabulary.token_bytes[i] or b"" for i in vocabulary.segment(text).ids)
    return spelled in (text.encode(), b" " + text.encode())

"""Compute the rows of `branches` from explicit hypotheses: slow, looped, and independent of branches.py.

A hypothesis is an entry of a source's row in place of the token that came, and what may follow it. It has the target's
tokens of its own text, from the word on in which the row begins.
"""

from collections import defaultdict
from dataclasses import dataclass

from fuselm.models.segmentation import Segmentation
from fuselm.models.vocabulary import Vocabulary
from fuselm.stores.store import Trace

BACK = 3


@dataclass(frozen=True, slots=True)
class Hypothesis:
    mass: float  # as a share of the row
    first: int  # the target token that its tokens begin with
    ids: tuple[int, ...]  # without those that what follows could make longer

    def leaves(self, gold: list[int]) -> tuple[int, int | None]:
        """Return the target token where another one comes, and which; None if nothing is known from there on."""
        for i, token in enumerate(self.ids, self.first):
            if i >= len(gold):
                return i, None
            if token != gold[i]:
                return i, token
        return self.first + len(self.ids), None


def branch_rows(source: Vocabulary, target: Vocabulary, trace: Trace, segmentation: Segmentation, data: bytes, of):
    """Return the rows, without cutting them; `of` says what follows a token, with probabilities."""
    edges, gold = [*segmentation.starts.tolist(), len(data)], segmentation.ids.tolist()
    leaving = [
        [(h.mass, *h.leaves(gold)) for h in list_hypotheses(source, target, trace, r, edges, data, of)]
        for r in range(len(trace.tokens))
    ]
    probabilities = [float(p) for p in trace.distributions.gold]
    rows = []
    for i, end in enumerate(edges[1:]):
        needed = [r for r, events in enumerate(leaving) if any(e[1] == i and e[2] is not None for e in events)]
        begun = [r for r, start in enumerate(trace.starts.tolist()) if start < end]
        votes: dict[int, float] = defaultdict(float)
        log_path, agreeing, lengthened = 0.0, 0.0, 0.0
        for r in range(max([*needed, *begun]) + 1):
            if r == len(begun):
                until = log_path
            for mass, place, token in leaving[r]:
                mass = mass * 2.718281828459045**log_path
                if place > i:
                    agreeing += mass if r < len(begun) else 0.0
                elif place == i and token is not None:
                    votes[token] += mass
                    lengthened += mass if r >= len(begun) else 0.0
            log_path += probabilities[r]
        if max([*needed, *begun]) + 1 <= len(begun):
            until = log_path
        votes[gold[i]] += agreeing + 2.718281828459045**until - lengthened
        total = sum(votes.values())
        rows.append({token: mass / total for token, mass in votes.items() if mass > 0})
    return rows


def list_hypotheses(source, target, trace, row, edges, data, of):
    begin = int(trace.starts[row])
    context = max(max(i for i, edge in enumerate(edges[:-1]) if edge < begin or i == 0), 0)
    for _ in range(BACK):
        if context > 0 and not data[edges[context] : edges[context] + 1].isspace():
            context -= 1
    for _ in range(BACK):
        if context > 0 and data[edges[context - 1] : edges[context]].isspace():
            context -= 1
    ids, logprobs = trace.distributions.row(row)[:2]
    for token, logprob in zip(ids.tolist(), logprobs.tolist(), strict=True):
        string = source.token_bytes[token]
        if token == trace.tokens[row] or not string:
            continue
        typed = data[edges[context] : begin] + string
        for follower, share in of(token).items():
            kept, reached = [], 0
            for t in target.encode_bytes([typed + follower])[0]:
                follows = reached >= len(typed)
                reached += len(target.token_bytes[t])
                if reached == len(typed + follower) > len(typed):
                    break
                kept.append(t)
                if follows:
                    break
            yield Hypothesis(2.718281828459045**logprob * share, context, tuple(kept))

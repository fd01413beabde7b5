"""Compute the rows of `branches` from explicit hypotheses: slow, looped, and independent of branches.py.

A hypothesis is an entry of a source's row in place of the token that came, and what may follow it. It has the target's
tokens of its own text, from the word on in which the row begins.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from fuselm.alignment.branch_tails import FEW_ROWS, TailFinder
from fuselm.alignment.follower_draws import PRIOR
from fuselm.alignment.followers import Followers
from fuselm.models.segmentation import Segmentation
from fuselm.models.vocabulary import Vocabulary
from fuselm.stores.store import Trace

BACK = 3
Follow = Callable[[bytes, int], Iterator[tuple[bytes, float, bool]]]


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
        for follower, share, is_whole in of(typed[: len(typed) - len(string)], token):
            kept, reached = [], 0
            for t in target.encode_bytes([typed + follower])[0]:
                follows = reached >= len(typed)
                reached += len(target.token_bytes[t])
                if reached == len(typed + follower) > len(typed) and not is_whole:
                    break
                kept.append(t)
                if follows:
                    break
            yield Hypothesis(2.718281828459045**logprob * share, context, tuple(kept))


def follow_with_words(source: Vocabulary, target: Vocabulary, followers: Followers) -> Follow:
    """Return what says what may follow a token behind some text: bytes, a share, and whether a target token ends there.

    Where a word goes on, it may become one of the target's tokens; how often, and which, `Completions` has counted.
    """
    finder = TailFinder(source, target, followers)
    completions, (rates, borrowed) = finder.completions, followers.find_rates(np.arange(source.size))
    groups: dict[tuple[bytes, int], dict[bytes, float]] = {}
    for word in target.token_bytes:
        tokens, at = source.encode_bytes([word])[0] if word and len(word) > 1 else (), 0
        for token in tokens[:-1]:
            at += len(source.token_bytes[token])
            groups.setdefault((word[:at], token), {})[word[at:]] = 0.0
    for (beginning, _), completing in groups.items():
        for end in completing:
            completing[end] = completions.weigh(target.id_by_bytes[beginning + end])

    def shift_of(token: int) -> float:
        """Return how much more often a word goes on behind a token that begins it."""
        alone = target.id_by_bytes.get(source.token_bytes[token])
        if alone is None or not 0 < rates[token] < 1:
            return 0.0
        words = groups.get((source.token_bytes[token], token), {})
        weight = completions.weigh(alone)
        longer = max(sum(words.values()) / completions.shares[0], weight / 1000)
        odds = math.sqrt(longer / weight * rates[token] / (1 - rates[token]))
        return borrowed[token] * (odds / (1 + odds) - rates[token])

    def follow(before: bytes, token: int) -> Iterator[tuple[bytes, float, bool]]:
        string, after = source.token_bytes[token], followers.of(token)
        found = [k for k in range(len(before), -1, -1) if (before[len(before) - k :] + string, token) in groups][:2]
        goes_on = {f: f[:1].isalpha() and finder.joined_bytes[string[-1], f[0]] for f in after}
        before_shift = after_shift = sum(share for f, share in after.items() if goes_on[f])
        if 0 < before_shift < 1 - 1e-12 and (not found or found[0] == 0):
            after_shift = min(max(before_shift + shift_of(token), 1e-3 * before_shift), 0.999)
        left = 1.0
        for n, k in enumerate(found):
            words = groups[before[len(before) - k :] + string, token]
            own = PRIOR / borrowed[token] - PRIOR
            share = left * completions.shares[int(n == 0 and k > 0)] * FEW_ROWS / (own + FEW_ROWS)
            left -= share
            for end, weight in words.items():
                yield end, after_shift * share * weight / sum(words.values()), True
        for follower, share in after.items():
            if goes_on[follower]:
                yield follower, share * left * after_shift / before_shift, False
            else:
                yield follower, share * (1 - after_shift) / (1 - before_shift), False

    return follow

"""Compute the method's maths from its definitions: dense, looped, float64, slow and obvious. Fast code is tested on it.

Sections follow the pipeline: token alignment by edit distance (the paper's MinED), alignment by bytes (`span`,
`exact`, `mined`), fusion (MinCE, AvgCE), the training objective, evaluation. Independent of the library: imports
nothing of it. Conventions, everywhere:

- A row is `dict[id, probability]`, row i the distribution of token i given the tokens before it; what a row lacks
  to 1 is its tail. A row `{}` means "the source says nothing here" (its tail is then 1).
- Spans are half-open `(begin, end)` byte positions in one stream, the document's text as bytes.
- Logarithms are natural and cross-entropies in nats, unless the name says bits.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch

Row = dict[int, float]
Span = tuple[int, int]
UNMAPPED = -1
WORD_MARKS = ("Ġ", "▁")  # byte-level BPE's and SentencePiece's space, as it stands in token strings


# Token strings: edit distance and dynamic time warping


def levenshtein(left: str, right: str) -> int:
    """Return the least number of inserted, deleted and substituted code points that turns left into right."""
    above = list(range(len(right) + 1))
    for i, left_character in enumerate(left, start=1):
        row = [i]
        for j, right_character in enumerate(right, start=1):
            substitute = above[j - 1] + (left_character != right_character)
            row.append(min(substitute, above[j] + 1, row[j - 1] + 1))
        above = row
    return above[-1]


def without_marks(token: str) -> str:
    """Return the token string without any word-boundary mark: both marks, wherever they stand.

    A token of marks only ("Ġ", "▁▁") becomes the empty string.
    """
    for mark in WORD_MARKS:
        token = token.replace(mark, "")
    return token


def dtw_table(source_tokens: list[str], target_tokens: list[str]) -> list[list[float]]:
    """Return the least total costs of monotone pairings: `[i][j]` is that of the first i source and j target tokens.

    A pair costs the Levenshtein distance of the two strings without marks. Row 0 and column 0 are borders:
    infinite but for `table[0][0] = 0`, so a pairing begins with the two first tokens and ends with the two last.
    """
    source_tokens = [without_marks(token) for token in source_tokens]
    target_tokens = [without_marks(token) for token in target_tokens]
    table = [[math.inf] * (len(target_tokens) + 1) for _ in range(len(source_tokens) + 1)]
    table[0][0] = 0.0
    for i, source_token in enumerate(source_tokens, start=1):
        for j, target_token in enumerate(target_tokens, start=1):
            before = min(table[i - 1][j - 1], table[i - 1][j], table[i][j - 1])
            table[i][j] = levenshtein(source_token, target_token) + before
    return table


def dtw_cost(source_tokens: list[str], target_tokens: list[str]) -> float:
    """Return the cost of the cheapest pairing; infinite if just one side is empty."""
    return dtw_table(source_tokens, target_tokens)[-1][-1]


def dtw_pairs(source_tokens: list[str], target_tokens: list[str]) -> list[list[int]]:
    """Return for every target position the source positions it is paired with, increasing (`target_to_source`).

    The cheapest path is walked backwards from the two last tokens to the two first. Among predecessors of equal
    cost: diagonal (i-1, j-1) first, then up, the source before (i-1, j), then left, the target before (i, j-1).
    """
    table = dtw_table(source_tokens, target_tokens)
    pairs: list[list[int]] = [[] for _ in target_tokens]
    if not source_tokens or not target_tokens:
        return pairs
    i, j = len(source_tokens), len(target_tokens)
    while (i, j) != (0, 0):
        pairs[j - 1].insert(0, i - 1)
        diagonal_up_left = [(i - 1, j - 1), (i - 1, j), (i, j - 1)]
        i, j = min(diagonal_up_left, key=lambda cell: table[cell[0]][cell[1]])  # the first of equals
    return pairs


def min_edit_ids(
    source_token: str, target_vocabulary: dict[str, int], source_mark: str, target_mark: str
) -> tuple[int, list[int]]:
    """Return (distance, ids): the least Levenshtein distance to any target token, and all ids at it, increasing.

    Every source mark in the source token is first replaced by the target mark; nothing is removed. The vocabulary is
    the whole of it, special and added tokens included. A method that needs one id takes the lowest, `ids[0]`.
    """
    token = source_token.replace(source_mark, target_mark)
    distances = {target_id: levenshtein(token, target_token) for target_token, target_id in target_vocabulary.items()}
    least = min(distances.values())
    return least, sorted(target_id for target_id, distance in distances.items() if distance == least)


def company(
    spans: list[Span], ids: list[int], target_spans: list[Span], target_ids: list[int], window: int
) -> dict[int, dict[int, int]]:
    """Count for every id of a text how often each target id is around it.

    Around it are the `window` target tokens that last end where it begins or before, and the `window` ones that first
    begin where it ends or after.
    """
    counts: dict[int, dict[int, int]] = {}
    for (begin, end), token in zip(spans, ids, strict=True):
        targets = list(zip(target_spans, target_ids, strict=True))
        before = [target for (_, target_end), target in targets if target_end <= begin]
        after = [target for (target_begin, _), target in targets if target_begin >= end]
        row = counts.setdefault(token, {})
        for target in before[-window:] + after[:window]:
            row[target] = row.get(target, 0) + 1
    return counts


def added(counts: list[dict[int, dict[int, int]]]) -> dict[int, dict[int, int]]:
    """Add up the company of several texts."""
    total: dict[int, dict[int, int]] = {}
    for of_text in counts:
        for token, row in of_text.items():
            for target, count in row.items():
                total.setdefault(token, {})[target] = total.get(token, {}).get(target, 0) + count
    return total


def most_alike(ties: list[int], row: dict[int, int], target_rows: dict[int, dict[int, int]]) -> int:
    """Return the tie whose company has the greatest cosine with `row`, the lowest of equals; 0 without company.

    Compared are squares over the squared length of `row`, as fractions: equal cosines are equal.
    """

    def likeness(tie: int) -> Fraction:
        other = target_rows.get(tie, {})
        dot = sum(row.get(target, 0) * count for target, count in other.items())
        return Fraction(dot**2, sum(count**2 for count in other.values())) if other else Fraction(0)

    return min(ties, key=lambda tie: (-likeness(tie), tie))


def most_paired(pairs: list[tuple[int, int]]) -> dict[int, int]:
    """Return for every source id the target id that it is most often paired with, the lowest of several."""
    counts = {pair: pairs.count(pair) for pair in pairs}
    ids = {}
    for source in {source for source, _ in pairs}:
        ids[source] = min((-count, target) for (token, target), count in counts.items() if token == source)[1]
    return ids


# Alignment by bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceTrace:
    """Hold one document in a source's vocabulary; all lists are by source token. `spans` tile the stream in order."""

    spans: list[Span]
    ids: list[int]  # the gold tokens
    gold_probabilities: list[float]
    rows: list[Row]  # kept entries, with or without the gold one
    tails: list[float]  # 1 - sum of the kept entries


def row_with_gold(source: SourceTrace, position: int) -> tuple[Row, float]:
    """Return (row, tail) of a source token; a gold entry that was not kept is added, and taken out of the tail."""
    row, tail = dict(source.rows[position]), source.tails[position]
    gold = source.ids[position]
    if gold not in row:
        row[gold] = source.gold_probabilities[position]
        tail = max(tail - row[gold], 0.0)
    return row, tail


def tail_of(row: Row) -> float:
    return max(1.0 - sum(row.values()), 0.0)


@dataclass(slots=True, kw_only=True)
class Hypothesis:
    """Hold one entry that has left the gold path: its target tokens that are still to come."""

    ids: list[int]
    mass: float
    kept: bool  # as an entry; else it stands for the tail's share of its id


def span_rows(
    stream: bytes,
    target_spans: list[Span],
    target_ids: list[int],
    source: SourceTrace,
    source_bytes: list[bytes | None],
    spell: Callable[[bytes], Sequence[int]],
    go_on: Callable[[bytes], Sequence[int]],
) -> tuple[list[Row], list[float]]:
    """Return (rows, tails) in the target's vocabulary, by explicit hypotheses of what the source is in the midst of.

    Where a source token begins, each entry of its row leaves the gold path as the target's tokens for it: `spell` gives
    those of an entry alone, `go_on` those of an entry after what the target token that is being spelled has before it.
    A row that begins with a target token gives its tail, in equal parts, to all ids with text that were not kept; else
    the tail is lost. Mass is Bayes's: what agrees with the target token that came is divided by the mass of that token.
    A kept entry that ends where a source token begins joins the gold path. A row has the gold id and the ids that kept
    entries vote for; the votes of the tail for others stay tail.

    `({}, 1.0)`, no information, for an empty target token, and without source tokens.
    """
    path, row, hypotheses = 1.0, 0, []
    rows, tails = [], []
    for (begin, end), token in zip(target_spans, target_ids, strict=True):
        if begin == end or not source.spans:
            rows.append({})
            tails.append(1.0)
            continue
        while row < len(source.spans) and (source.spans[row][0] < end or row == 0):
            path, left = _leave(source, row, path, stream, begin, source_bytes, spell, go_on)
            hypotheses += left
            row += 1
        votes: Row = {token: path}
        for h in sorted(hypotheses, key=lambda h: not h.kept):
            if h.ids[0] != UNMAPPED and (h.kept or h.ids[0] in votes):
                votes[h.ids[0]] = votes.get(h.ids[0], 0.0) + h.mass
        here = votes[token]
        votes = {t: p for t, p in votes.items() if p > 0.0}
        rows.append(votes)
        tails.append(tail_of(votes))
        if here == 0.0:
            path, hypotheses = 1.0, []
            continue
        agreeing = [Hypothesis(ids=h.ids[1:], mass=h.mass / here, kept=h.kept) for h in hypotheses if h.ids[0] == token]
        meets = row < len(source.spans) and source.spans[row][0] == end
        path = path / here + sum(h.mass for h in agreeing if not h.ids and h.kept and meets)
        hypotheses = [h for h in agreeing if h.ids]
    return rows, tails


def _leave(
    source: SourceTrace,
    position: int,
    path: float,
    stream: bytes,
    target_begin: int,
    source_bytes: list[bytes | None],
    spell: Callable[[bytes], Sequence[int]],
    go_on: Callable[[bytes], Sequence[int]],
) -> tuple[float, list[Hypothesis]]:
    """Return the mass that stays on the gold path, and the hypotheses that leave it at one source token."""
    row, tail = row_with_gold(source, position)
    begin, gold = source.spans[position][0], source.ids[position]
    before, hidden = stream[target_begin:begin], stream[begin:target_begin] if position == 0 else b""
    on_path, left = row[gold], []
    for token, probability in row.items():
        text = source_bytes[token]
        if token == gold or not text or not text.startswith(hidden):
            continue
        ids = list(go_on(before + text[len(hidden) :]) if before or hidden else spell(text))
        if ids:
            left.append(Hypothesis(ids=ids, mass=probability, kept=True))
    with_text = [t for t, text in enumerate(source_bytes) if text]
    if hidden:  # a space that the target does not see: only what begins with it can be
        agreeing = [t for t in with_text if source_bytes[t].startswith(hidden) and source_bytes[t] != hidden]
        total = on_path + sum(h.mass for h in left) + tail * len(agreeing) / len(with_text)
        on_path /= total
        left = [Hypothesis(ids=h.ids, mass=h.mass / total, kept=True) for h in left]
    elif not before:
        not_kept = [t for t in with_text if t not in row]
        left += [Hypothesis(ids=list(spell(source_bytes[t])), mass=tail / len(not_kept), kept=False) for t in not_kept]
    return path * on_path, [Hypothesis(ids=h.ids, mass=path * h.mass, kept=h.kept) for h in left]


def mapped_row(row: Row, id_map: dict[int, int]) -> tuple[Row, float]:
    """Return (row, tail) with every entry moved to its mapped id; masses that meet add up, others are dropped."""
    result: Row = {}
    for token, probability in row.items():
        if token in id_map:
            result[id_map[token]] = result.get(id_map[token], 0.0) + probability
    return result, tail_of(result)


def exact_rows(
    target_spans: list[Span],
    target_ids: list[int],
    source: SourceTrace,
    source_bytes: list[bytes | None],
    target_bytes: list[bytes | None],
    byte_fallback: set[int],
) -> tuple[list[Row], list[float]]:
    """Return rows of `exact`: a target token's is that of the source token of the same bytes and begin, or {}.

    The gold entry goes to the gold token, another one to the lowest target id of equal bytes, one that is no
    `byte_fallback` token if there is any (a tokenizer with byte fallback uses "A", never "<0x41>").
    """
    id_map: dict[int, int] = {}
    for token, text in enumerate(source_bytes):
        equal = [target for target, target_text in enumerate(target_bytes) if text and target_text == text]
        proper = [target for target in equal if target not in byte_fallback]
        if equal:
            id_map[token] = min(proper or equal)
    aligned: list[tuple[Row, float]] = []
    for (begin, _), target_id in zip(target_spans, target_ids, strict=True):
        text = target_bytes[target_id]
        partners = [
            j
            for j, token in enumerate(source.ids)
            if text and source.spans[j][0] == begin and source_bytes[token] == text
        ]
        if partners:
            row, _ = row_with_gold(source, partners[-1])
            aligned.append(mapped_row(row, id_map | {source.ids[partners[-1]]: target_id}))
        else:
            aligned.append(({}, 1.0))
    return [row for row, _ in aligned], [tail for _, tail in aligned]


def mined_rows(
    source_tokens: list[str],
    target_tokens: list[str],
    target_ids: list[int],
    source: SourceTrace,
    min_edit_map: dict[int, int],
) -> tuple[list[Row], list[float]]:
    """Return rows of `mined`, the paper's MinED: of one-to-one pairs whose gold tokens map to each other, or {}.

    `min_edit_map[source id]` is the lowest id of `min_edit_ids`. Fusion makes the {} one-hot on the gold token.
    """
    pairs = dtw_pairs(source_tokens, target_tokens)
    partners = [position for positions in pairs for position in positions]
    aligned: list[tuple[Row, float]] = []
    for target_id, positions in zip(target_ids, pairs, strict=True):
        one_to_one = len(positions) == 1 and partners.count(positions[0]) == 1
        if one_to_one and min_edit_map.get(source.ids[positions[0]]) == target_id:
            row, _ = row_with_gold(source, positions[0])
            aligned.append(mapped_row(row, min_edit_map))
        else:
            aligned.append(({}, 1.0))
    return [row for row, _ in aligned], [tail for _, tail in aligned]


# Fusion


def tail_law(row: Row, tail: float, vocabulary: int) -> tuple[float, float]:
    """Return (p, a) of the power law p (r / k)^-a that the ids of the tail are taken to have.

    r goes from k, the number of kept ids, to the vocabulary's size; p is the least kept probability, and a makes the
    law's integral the tail.

    A tail that is more than p everywhere is flat, and p is what makes its sum the tail.
    """
    kept, p = len(row), min(row.values())
    if tail >= p * (vocabulary - kept):
        return tail / (vocabulary - kept), 0.0

    def integral(a: float) -> float:
        b = 1 - a
        ratio = math.log(vocabulary / kept) if abs(b) < 1e-12 else math.expm1(b * math.log(vocabulary / kept)) / b
        return p * kept * ratio

    low, high = 0.0, 1e9
    while high - low > 1e-13 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if integral(middle) > tail else (low, middle)
        if middle in (low, high) and high - low <= math.ulp(high):
            break
    return p, (low + high) / 2


def typical_tail_logprob(row: Row, tail: float, vocabulary: int) -> float:
    """Return the mean log-probability of an id drawn from the tail.

    It is the mean of log p - a u, where u = log(r / k) has density e^((1 - a) u).
    """
    p, a = tail_law(row, tail, vocabulary)
    b, c = 1 - a, math.log(vocabulary / len(row))
    mean = c / 2 if abs(b * c) < 1e-5 else c / -math.expm1(-b * c) - 1 / b
    return math.log(p) - a * mean


def known_tail(row: Row, tail: float, vocabulary: int) -> float:
    """Return the tail as far as float32 sums know it; there is none if all ids are kept."""
    return max(tail, 2.0**-24) if len(row) < vocabulary else 0.0


def entropy(row: Row, tail: float, vocabulary: int) -> float:
    """Return the entropy in nats; a row that says nothing has that of all ids alike."""
    if not row:
        return math.log(vocabulary)
    tail = known_tail(row, tail, vocabulary)
    beyond = tail * typical_tail_logprob(row, tail, vocabulary) if tail else 0.0
    return -sum(p * math.log(p) for p in row.values()) - beyond


def tempered(row: Row, tail: float, temperature: float, vocabulary: int) -> tuple[Row, float, float]:
    """Return (row, tail, log of the normaliser) of p^(1/T); the tail's is the integral of its law to that power."""
    tail = known_tail(row, tail, vocabulary)
    mass = 0.0
    if tail:
        p, a = tail_law(row, tail, vocabulary)
        b, c = 1 - a / temperature, math.log(vocabulary / len(row))
        mass = p ** (1 / temperature) * len(row) * (c if abs(b) < 1e-12 else math.expm1(b * c) / b)
    powers = {token: probability ** (1 / temperature) for token, probability in row.items()}
    total = sum(powers.values()) + mass
    return {token: power / total for token, power in powers.items()}, mass / total, math.log(total)


def arithmetic_mean(rows: list[Row], weights: list[float], gold: int) -> tuple[Row, float]:
    """Return (row, tail) of the weighted mean, one-hot on the gold token if all weights are 0."""
    if not any(weights):
        return {gold: 1.0}, 0.0
    fused: Row = {}
    for row, weight in zip(rows, weights, strict=True):
        for token, probability in row.items():
            if weight > 0.0:
                fused[token] = fused.get(token, 0.0) + weight * probability
    return fused, tail_of(fused)


def geometric_mean(
    rows: list[Row], tails: list[float], weights: list[float], gold: int, vocabulary: int
) -> tuple[Row, float, float]:
    """Return (row, tail, log of the normaliser) of the product of p^weight, one-hot on gold if all weights are 0.

    An id that a source has not kept has what is typical of its tail, at most an equal share with the others that it has
    not kept and the rest; the rest of the fused tail is the product of what is left of the tails.
    """
    used = [(row, tail, w) for row, tail, w in zip(rows, tails, weights, strict=True) if w > 0]
    if not used:
        return {gold: 1.0}, 0.0, 0.0
    union = sorted({token for row, _, _ in used for token in row})
    rest = len(union) < vocabulary
    products, beyond = dict.fromkeys(union, 1.0), 1.0 if rest else 0.0
    for row, tail, weight in used:
        missing = [token for token in union if token not in row]
        tail = known_tail(row, tail, vocabulary)
        guess = 0.0
        if missing:
            guess = min(math.exp(typical_tail_logprob(row, tail, vocabulary)), tail / (len(missing) + rest))
        for token in union:
            products[token] *= row.get(token, guess) ** weight
        if rest:
            beyond *= (tail - len(missing) * guess) ** weight
    total = sum(products.values()) + beyond
    return {token: product / total for token, product in products.items()}, beyond / total, math.log(total)


def least_weights(costs: list[float | None]) -> list[float]:
    """Give all weight to the least cost; exactly equal ones share. None takes no part."""
    least = min((cost for cost in costs if cost is not None), default=None)
    best = [cost is not None and cost == least for cost in costs]
    return [chosen / sum(best) if chosen else 0.0 for chosen in best]


def softmax_weights(costs: list[float | None], prior: list[float], sharpness: float) -> list[float]:
    """Return prior * exp(-sharpness * cost), normalised to sum 1. None takes no part."""
    least = min((cost for cost in costs if cost is not None), default=0.0)
    scores = [
        0.0 if cost is None else p * math.exp(-sharpness * (cost - least)) for cost, p in zip(costs, prior, strict=True)
    ]
    return [score / sum(scores) if sum(scores) else 0.0 for score in scores]


def fixed_share_weights(
    gold: list[list[float]], allowed: list[list[bool]], prior: list[float], switch: float
) -> list[list[float]]:
    """Return each token's weights from the tokens before it: the posterior, a share `switch` of it at the prior.

    `gold[i][s]` is the probability that source s gave token i. Sources that say nothing of a token are as good there as
    the mixture of the others.
    """
    total = sum(prior) or 1.0
    now = [p / total for p in prior]
    weights = []
    for golds, may in zip(gold, allowed, strict=True):
        awake = sum(w for w, m in zip(now, may, strict=True) if m)
        if awake == 0:
            start = [p if m else 0.0 for p, m in zip(prior, may, strict=True)]
            weights.append([p / sum(start) if any(start) else 0.0 for p in start])
            continue
        weights.append([w / awake if m else 0.0 for w, m in zip(now, may, strict=True)])
        mixture = sum(w * g for w, g in zip(weights[-1], golds, strict=True))
        if mixture > 0:
            now = [w * g / mixture if m else w for w, g, m in zip(now, golds, may, strict=True)]
        now = [(1 - switch) * w + switch * p / total for w, p in zip(now, prior, strict=True)]
    return weights


def mean_over(values: list[float | None], units: list[int], groups: list[int]) -> list[float | None]:
    """Return the sum of values over the sum of units, of all in the same group that have a value."""
    means: list[float | None] = []
    for value, group in zip(values, groups, strict=True):
        members = [(v, u) for v, u, g in zip(values, units, groups, strict=True) if g == group and v is not None]
        means.append(None if value is None else sum(v for v, _ in members) / max(sum(u for _, u in members), 1))
    return means


# Objective


def divergence_outcomes(q: dict[str, float], p: dict[str, torch.Tensor], name: str, beta: float | None) -> torch.Tensor:
    """Return D(q || p) over the outcomes of one token, 0 log 0 = 0. Reverse KL takes log q as log 1e-6 at least."""
    total = torch.zeros((), dtype=torch.float64)
    for outcome, mass in q.items():
        own = p[outcome]
        if name == "forward_kl" and mass > 0.0:
            total = total + mass * (math.log(mass) - own.log())
        if name == "reverse_kl" and float(own.detach()) > 0.0:
            total = total + own * (own.log() - math.log(max(mass, 1e-6)))
        if name == "jsd":
            assert beta is not None
            mixture = beta * mass + (1.0 - beta) * own
            if mass > 0.0:
                total = total + beta * mass * (math.log(mass) - mixture.log())
            if float(own.detach()) > 0.0:
                total = total + (1.0 - beta) * own * (own.log() - mixture.log())
    return total


def dense_objective(
    logits: torch.Tensor,
    gold: list[int],
    rows: list[Row],
    tails: list[float],
    lam: float | list[float],
    *,
    name: str = "forward_kl",
    beta: float | None = None,
    temperature: float = 1.0,
    tail_as: str = "bucket",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (lam * CE + (1 - lam) * D, CE, D), each the mean over tokens; logits [N, V] float64, differentiable.

    CE is -log p_gold. D compares a row's ids and one bucket for all others, whose p is summed from the ids outside the
    row, so that it has no rounding of its own. A row that has all V ids needs a tail of exactly 0. `renormalise` makes
    the row's ids sum to 1 and its tail 0, if it has ids. At a temperature T, every outcome's q and p is raised to 1/T
    and made to sum to 1, and D is times T^2. A row {} with tail 1 adds nothing. The mean over no tokens is 0.
    """
    assert logits.dtype == torch.float64
    lams = lam if isinstance(lam, list) else [lam] * len(rows)
    probabilities = torch.softmax(logits, dim=-1)
    logprobs = torch.log_softmax(logits, dim=-1)
    total = cross_entropy = divergence = logits.sum() * 0.0
    for i, (row, tail) in enumerate(zip(rows, tails, strict=True)):
        outside = [token for token in range(logits.shape[1]) if token not in row]
        q: dict[str, float] = {str(token): mass for token, mass in row.items()} | {"others": tail}
        p = {str(token): probabilities[i, token] for token in row} | {"others": probabilities[i, outside].sum()}
        if tail_as == "renormalise" and row:
            q = {outcome: mass / sum(row.values()) for outcome, mass in q.items()} | {"others": 0.0}
        if temperature != 1.0:
            q = {outcome: mass ** (1.0 / temperature) for outcome, mass in q.items()}
            p = {o: mass ** (1.0 / temperature) if float(mass.detach()) > 0.0 else mass for o, mass in p.items()}
            q = {outcome: mass / sum(q.values()) for outcome, mass in q.items()}
            p_sum = sum(p.values())
            p = {outcome: mass / p_sum for outcome, mass in p.items()}
        ce = -logprobs[i, int(gold[i])]
        d = temperature**2 * divergence_outcomes(q, p, name, beta)
        total = total + lams[i] * ce + (1.0 - lams[i]) * d
        cross_entropy, divergence = cross_entropy + ce, divergence + d
    count = max(len(rows), 1)
    return total / count, cross_entropy / count, divergence / count


# Evaluation


def causal_bits(logits: torch.Tensor, ids: list[int]) -> list[float]:
    """Return the bits of every token, -log2 p(ids[i]): row i of the logits [N, V] is of token i, not i + 1."""
    logprobs = torch.log_softmax(logits.to(torch.float64), dim=-1)
    return [-logprobs[i, int(token)].item() / math.log(2.0) for i, token in enumerate(ids)]


def bits_per_byte(bits: list[float], num_bytes: list[int]) -> float:
    """Return total bits over total bytes of some documents (not the mean of their ratios)."""
    return sum(bits) / sum(num_bytes)


def per_domain(bits: list[float], num_bytes: list[int], documents: dict[str, list[int]]) -> dict[str, float]:
    """Return bits per byte of each domain's documents, and under "average" the unweighted mean of the domains."""
    values = {
        domain: bits_per_byte([bits[d] for d in numbers], [num_bytes[d] for d in numbers])
        for domain, numbers in documents.items()
    }
    return values | {"average": sum(values.values()) / len(values)}


def bootstrap(
    bits: list[float],
    num_bytes: list[int],
    domains: list[str],
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
    draws: list[dict[str, list[int]]] | None = None,
) -> dict[str, tuple[float, float, float]]:
    """Return (value, low, high) in bits per byte of each domain and of the "average"; one list entry per document.

    A resample draws, within each domain, as many of its documents as it has, with replacement. The interval is the
    percentile one (linear interpolation). `draws`, if given, are the resamples: per domain, document numbers into the
    lists. Otherwise one generator makes them: resamples outside, domains in alphabetical order inside. With `bits`
    the differences of two models' bits on the same documents, the interval is that of the paired difference.
    """
    documents = {domain: [d for d, of in enumerate(domains) if of == domain] for domain in sorted(set(domains))}
    if draws is None:
        generator = np.random.default_rng(seed)
        draws = [
            {name: generator.choice(numbers, size=len(numbers)).tolist() for name, numbers in documents.items()}
            for _ in range(resamples)
        ]
    resampled = [per_domain(bits, num_bytes, drawn) for drawn in draws]
    outside = (1.0 - confidence) / 2.0
    intervals = {}
    for name, value in per_domain(bits, num_bytes, documents).items():
        low, high = np.quantile([values[name] for values in resampled], [outside, 1.0 - outside])
        intervals[name] = (value, float(low), float(high))
    return intervals

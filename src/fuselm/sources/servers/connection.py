"""Find which model a server has, and whether it gives the prompt log-probabilities that a run needs.

Nothing is taken on trust. Before the first document, `connect` finds out which of the dialects of prompt_logprobs.py
the server speaks, whether it gives as many entries as are wanted, whether its tokens are those of the local tokenizer,
and whether its rows are where they should be: llama-cpp-python's echo is one token late if the prompt doesn't begin
with its BOS.
"""

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fuselm.models.locating import Model, locate_tokenizer
from fuselm.models.vocabulary import Vocabulary
from fuselm.sources.servers import client, id_protocols, listing, prompt_logprobs
from fuselm.sources.servers.answers import describe
from fuselm.sources.servers.client import Client, Refused, Unreachable
from fuselm.sources.servers.exchange import CONNECT_SECONDS
from fuselm.sources.servers.prompt_logprobs import APIS, Dialect, Entries, Prompt, PromptRows
from fuselm.system import fingerprints

# Words of several tokens, digits, and a character that hardly any vocabulary has whole
PROBE = "The quick brown fox jumps over 12 lazy dogs 𓂀 and naps."
PATIENCE = 3  # attempts before any work is begun
MOST_DIFFERENCE = 0.2  # nats between two answers about one token: batches differ in rounding, positions in much more


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """Describe a model behind an address.

    `model` has what the run needs to know about it; its folder has only the tokenizer.
    """

    url: str
    served: str  # name that the server knows the model by
    model: Model
    key_env: str | None
    requests: int  # at a time
    timeout: float  # seconds
    key_over_http: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class FirstRow:
    """Hold the row of position 0, where an echo leaves it out: it is the same for every document."""

    entries: Entries
    lost: float
    gold: dict[int, float]  # first tokens that are not among the entries; filled as they come


@dataclass(frozen=True, slots=True, kw_only=True)
class Connection:
    """Hold a server that has been tried, with what was found out."""

    server: Server
    client: Client
    vocabulary: Vocabulary
    api: str
    top_k: int
    dialect: Dialect | None = None
    opening: FirstRow | None = None


def find_server(
    url: str,
    served: str,
    tokenizer: str,
    *,
    revision: str | None = None,
    context_length: int | None = None,
    key_env: str | None = None,
    requests: int = 8,
    timeout: float = 600.0,
    key_over_http: bool = False,
) -> Server:
    """Find the model that the server at `url` serves under the name `served`, by its list of models.

    The list's answer is remembered: a run whose captures are done needs no server. Raises `ValueError` if the server
    can't be reached and never was, if it has no such model, or if nobody says how long its context is.
    """
    reader = locate_tokenizer(tokenizer)
    entry = _look_up_model(url, served, key_env, key_over_http)
    said = entry.get("max_model_len")
    if context_length is None and said is None:
        raise ValueError(f"{url}: does not say how long its context is; set `context_length` (llama.cpp: its n_ctx)")
    if context_length and said and context_length > said:
        raise ValueError(f"{url}: context_length {context_length} is more than the server's, {said}; set it lower")
    identity = [
        f"served {served}",
        f"revision {revision}",
        *(f"{k} {entry[k]}" for k in listing.IDENTITY_FIELDS if entry.get(k)),
    ]
    model = replace(
        reader,
        name=f"{served} at {url}",
        fingerprint=fingerprints.hash_lines([*identity, f"tokenizer {reader.tokenizer_fingerprint}"]),
        context_length=(context_length or said) - 2,  # the context token and one generated token need room
    )
    return Server(
        url=url,
        served=served,
        model=model,
        key_env=key_env,
        requests=requests,
        timeout=timeout,
        key_over_http=key_over_http,
    )


def _look_up_model(url: str, served: str, key_env: str | None, key_over_http: bool) -> dict[str, Any]:
    """Return what the server says about the model, or what it said last time."""
    key = f"server {url} {served}"
    known = listing.check_known(fingerprints.recall(key), served)
    asked = client.open_client(url, key_env=key_env, timeout=CONNECT_SECONDS, requests=1, key_over_http=key_over_http)
    try:
        answer = client.ask(asked, "models", attempts=1 if known else PATIENCE)
        with client.name_server(asked):
            entry = listing.find_model(answer, served, asked.key)
    except Unreachable:
        if known:
            return known
        raise
    finally:
        asked.close()
    fingerprints.remember(key, entry)
    return entry


@contextlib.contextmanager
def connect(server: Server, vocabulary: Vocabulary, *, top_k: int) -> Iterator[Connection]:
    """Try the server. Raises `ValueError` if it can't give `top_k` entries of each token's distribution, saying why."""
    asked = client.open_client(
        server.url,
        key_env=server.key_env,
        timeout=server.timeout,
        requests=server.requests,
        key_over_http=server.key_over_http,
    )
    try:
        with client.name_server(asked):
            connection = _try_apis(server, asked, vocabulary, top_k)
        yield connection
    finally:
        asked.close()


def _try_apis(server: Server, asked: Client, vocabulary: Vocabulary, top_k: int) -> Connection:
    ids = vocabulary.segment(PROBE).ids.tolist()
    prompt = Prompt(text=PROBE, ids=ids, context=server.model.context_token)
    top_k = min(top_k, vocabulary.size)
    plain = Connection(server=server, client=asked, vocabulary=vocabulary, api="openai", top_k=top_k)
    problems = []
    for api in APIS:
        try:
            tried = replace(plain, api=api)
            if api == "openai":
                tried = replace(tried, dialect=_find_dialect(tried, prompt))
            answer = ask_about_prompt(tried, prompt, top_k=1, attempts=PATIENCE)
            APIS[api].read(answer, prompt, tried.dialect)
            spelled = id_protocols.list_spelled_tokens(api, answer, prompt) if api != "openai" else []
        except Unreachable:
            raise
        except ValueError as problem:
            if isinstance(problem, Refused) and problem.status in (401, 403):
                raise
            said = str(problem).removeprefix(f"{server.url}: ")
            if hint := next((hint for part, hint in prompt_logprobs.HINTS.items() if part in said), None):
                raise ValueError(f"{server.url}: {said}; {hint}") from None
            problems.append(f"{api}: {said}")
            continue
        _check_spelling(tried, spelled)
        _check_count(tried, prompt)
        return _check_first_row(tried, prompt) if api == "openai" else tried
    raise ValueError(f"{server.url}: gives no prompt log-probabilities in any way known here ({'; '.join(problems)})")


def check_server(server: Server, vocabulary: Vocabulary, *, top_k: int) -> None:
    """Check a server as `connect` does, without keeping the connection."""
    with connect(server, vocabulary, top_k=top_k):
        pass


def ask_about_prompt(
    connection: Connection, prompt: Prompt, *, top_k: int | None = None, attempts: int | None = None
) -> Any:
    """Return the server's answer about a prompt."""
    api = APIS[connection.api]
    wanted = connection.top_k if top_k is None else top_k
    body = api.request(connection.server.served, prompt, wanted, connection.dialect)
    most = prompt_logprobs.limit_answer_bytes(prompt, wanted)
    return client.ask(connection.client, api.path, body, attempts=attempts, most_bytes=most)


def read_rows(connection: Connection, prompt: Prompt, answer: Any, *, top_k: int | None = None) -> PromptRows:
    """Return what an answer holds. Raises `ValueError` on anything unexpected, such as rows of other sizes."""
    rows = APIS[connection.api].read(answer, prompt, connection.dialect)
    prompt_logprobs.check_rows(connection.api, rows, prompt, connection.vocabulary.size, top_k)
    return rows


def _find_dialect(connection: Connection, prompt: Prompt) -> Dialect:
    """Find how the server spells the prompt's tokens. Raises `ValueError` with the first difference, if any."""
    problem = None
    for opening in (connection.vocabulary.token_strings[prompt.context] or "", ""):  # or does the server put it first?
        ways = [
            prompt_logprobs.make_dialect(connection.vocabulary, lossy, opening=opening, skip=skip)
            for skip in (0, 1)
            for lossy in prompt_logprobs.DECODING_ERRORS
        ]
        answer = ask_about_prompt(replace(connection, dialect=ways[0]), prompt, top_k=1, attempts=PATIENCE)
        for way in ways:
            try:
                prompt_logprobs.check_echo(answer, prompt, way)
            except ValueError as error:
                problem = problem or error
            else:
                return way
    assert problem is not None
    raise problem


def _check_spelling(connection: Connection, spelled: Sequence[tuple[int, str]]) -> None:
    """Raise `ValueError` if most tokens are other strings to the server than to us."""
    ours = [(connection.vocabulary.token_bytes[token] or b"").decode("utf-8", "replace") for token, _ in spelled]
    differ = [n for n, (_, theirs) in enumerate(spelled) if theirs.strip(" ▁Ġ") != ours[n].strip()]
    if 2 * len(differ) > len(spelled):
        (token, theirs), own = spelled[differ[0]], describe(ours[differ[0]])
        raise ValueError(
            f"{connection.server.url}: token {token} is {describe(theirs)} to the server and {own} to the local "
            "tokenizer; set `tokenizer` to the one that belongs to the served model"
        )


def _check_count(connection: Connection, prompt: Prompt) -> None:
    """Raise `ValueError` if there are fewer entries than asked for."""
    url, wanted, api = connection.server.url, connection.top_k, APIS[connection.api]
    more = f"{api.more.format(top_k=wanted)}, or set `capture.policy` to threshold and `capture.top_k` lower"
    try:
        rows = read_rows(connection, prompt, ask_about_prompt(connection, prompt, attempts=PATIENCE))
    except Refused as refused:
        raise ValueError(f"{url}: refuses to give {wanted} entries a token ({refused}); {more}") from None
    given = max((len(row) for row in rows.entries if row), default=0)
    needed = wanted if connection.dialect is None else 0.9 * wanted  # strings of several tokens come once
    if given < needed:
        raise ValueError(f"{url}: gives {given} entries a token, {wanted} were asked for; {more}")


def _check_first_row(connection: Connection, prompt: Prompt) -> Connection:
    """Check that the echo's rows are in their places; ask for the first one if the echo leaves it out."""
    url, served, dialect = connection.server.url, connection.server.served, connection.dialect
    assert dialect is not None
    bos = connection.server.model.context_token
    rows = read_rows(connection, prompt, ask_about_prompt(connection, prompt, attempts=PATIENCE))
    text, tokens = _find_beginning(connection.vocabulary, prompt)
    body = prompt_logprobs.request_next_token(served, dialect.opening + text, connection.top_k)
    expected, _ = prompt_logprobs.read_next_row(client.ask(connection.client, "completions", body), dialect)
    expected.sort(key=lambda entry: -entry[1])
    echoed = dict(rows.entries[tokens] or ())
    differences = [abs(echoed.get(token, -math.inf) - logprob) for token, logprob in expected[:3]]
    if max(differences, default=0.0) > MOST_DIFFERENCE:
        raise ValueError(
            f"{url}: its echo gives each token the next one's row, because the prompt does not begin with its "
            f"BOS; start llama-cpp-python with --kv_overrides tokenizer.ggml.bos_token_id=int:{bos}"
        )
    if rows.entries[0] is not None:
        return connection
    if not dialect.opening:
        raise ValueError(
            f"{url}: puts a BOS before the text itself and then leaves out the first token's row; start "
            "llama-cpp-python with --kv_overrides tokenizer.ggml.add_bos_token=bool:false"
        )
    body = prompt_logprobs.request_next_token(served, dialect.opening, connection.top_k)
    entries, lost = prompt_logprobs.read_next_row(client.ask(connection.client, "completions", body), dialect)
    return replace(connection, opening=FirstRow(entries=entries, lost=lost, gold={}))


def _find_beginning(vocabulary: Vocabulary, prompt: Prompt) -> tuple[str, int]:
    """Return the prompt's first words, as many as are tokenized as they are within it, and how many tokens that is."""
    for end in (n for n, c in enumerate(prompt.text) if c == " "):
        ids = vocabulary.segment(prompt.text[:end]).ids.tolist()
        if ids == prompt.ids[: len(ids)]:
            return prompt.text[:end], len(ids)
    raise ValueError("the tokenizer makes other tokens of a beginning than of the whole text")

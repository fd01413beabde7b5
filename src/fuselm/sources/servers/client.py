"""Send JSON over HTTP to one server, and ask again after growing pauses when it is busy, failing or out of reach."""

import contextlib
import email.utils
import http.client
import json
import random
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import httpcore2
import jiter

from fuselm.sources.servers.exchange import Answer, AnswerTooLarge, Undecodable, exchange, open_pool
from fuselm.system.addresses import read_address
from fuselm.system.errors import summarize_error
from fuselm.system.foreign_text import put_on_one_line
from fuselm.system.server_keys import DEFAULT_KEY_VARIABLE, hide_key, read_key

ATTEMPTS = 8  # a minute of pauses: a server that is started again may be back
FIRST_PAUSE = 0.5  # seconds; each pause is up to twice the one before it
LONGEST_PAUSE = 30.0
LONGEST_WISH = 300.0  # seconds of pauses, all together, that a server may ask for
BUSY = (408, 425, 429, 502, 503, 504)
SHOWN = 200  # characters of what a server says that are shown
MOST_OF_A_LIST = 4 << 20  # bytes of an answer that no number of tokens bounds, such as a list of models


class Unreachable(ValueError):
    """Signal that the server can't be reached, or stays busy or broken."""


class Refused(ValueError):
    """Signal that the server answers, but not with what was asked for. `status` is HTTP's."""

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, slots=True, kw_only=True)
class Client:
    """Hold what is needed to ask a server. Setting `stop` ends all waiting."""

    url: str
    pool: httpcore2.ConnectionPool = field(repr=False)
    timeout: float  # seconds that a whole answer may take
    key: str = field(repr=False)
    key_env: str
    stop: threading.Event = field(default_factory=threading.Event)

    def close(self) -> None:
        self.stop.set()
        self.pool.close()


def open_client(url: str, *, key_env: str | None, timeout: float, requests: int, key_over_http: bool = False) -> Client:
    """Return a client for the server at `url`; its key, if it needs one, is in the environment and nowhere else.

    Raises `ValueError` if `key_env` names a variable that isn't set, or if the key may not be sent there.
    """
    address = read_address(url)
    key = read_key(url, address, key_env=key_env, key_over_http=key_over_http)
    try:
        pool = open_pool(address, connections=requests)
    except ValueError as problem:
        raise ValueError(f"{url}: {problem}") from None
    except OSError as problem:
        raise ValueError(
            f"{url}: its certificate can't be checked ({summarize_error(problem)}); fix SSL_CERT_FILE or SSL_CERT_DIR"
        ) from None
    return Client(url=url, pool=pool, timeout=timeout, key=key, key_env=key_env or DEFAULT_KEY_VARIABLE)


def quote_server(client: Client, text: str, most: int = SHOWN) -> str:
    """Return a server's words as part of a line of ours: escaped, with the key blotted out, `most` characters."""
    text = text[: most * (SHOWN + 3 * len(client.key))]  # a key that is cut here is far behind what is shown
    text = hide_key(put_on_one_line(hide_key(text, client.key)), client.key)
    return text if len(text) <= most else text[:most] + "…"


@contextlib.contextmanager
def name_server(client: Client) -> Iterator[None]:
    """Let every `ValueError` within begin with the server's address, on one line that does not show the key."""
    try:
        yield
    except (Unreachable, Refused):
        raise  # `ask` names it
    except ValueError as problem:
        text = quote_server(client, str(problem).removeprefix(f"{client.url}: "), 2000)
        raise ValueError(f"{client.url}: {text}") from None


def ask(
    client: Client,
    path: str,
    body: dict[str, Any] | None = None,
    *,
    attempts: int | None = None,
    most_bytes: int = MOST_OF_A_LIST,
) -> Any:
    """Return the server's answer to a POST of `body`, or to a GET.

    Raises `Unreachable` after `attempts`, and `Refused` where asking again is no use. An inner error (500) may pass,
    but may also be the answer to a question that isn't understood: if `attempts` is given, there is no second try then.
    """
    tries = ATTEMPTS if attempts is None else attempts
    again = BUSY if attempts is not None else (*BUSY, 500)
    began, wished = time.monotonic(), 0.0
    for attempt in range(tries):
        wish = None
        try:
            answer = _send(client, path, body, most_bytes)
        except httpcore2.TimeoutException as error:
            problem = f"no answer in time ({type(error).__name__})"
        except (httpcore2.NetworkError, httpcore2.ProtocolError, httpcore2.ProxyError, OSError) as error:
            problem = f"cannot be reached ({quote_server(client, summarize_error(error))})"
        else:
            if answer.status == 200:
                return _parse_answer(client, answer)
            problem = f"answers {answer.status} ({_quote_problem(client, answer)})"
            if answer.status not in again:
                raise Refused(f"{client.url}: {problem}{_hint_at_fix(client, answer)}", answer.status)
            wish = _read_retry_after(answer)
        if wish is not None and (wished := wished + wish) > LONGEST_WISH:
            problem += f", and wants to be left alone for {wish:.0f} s"
            break
        pause = min(LONGEST_PAUSE, FIRST_PAUSE * 2**attempt) * random.uniform(0.5, 1.0) if wish is None else wish
        if attempt + 1 < tries and client.stop.wait(pause):
            break
    seconds = time.monotonic() - began
    raise Unreachable(
        f"{client.url}: {problem}, asked {attempt + 1} times in {seconds:.0f} s; is the server up? "
        "Then run the same command again; it resumes here"
    )


def _send(client: Client, path: str, body: dict[str, Any] | None, most_bytes: int) -> Answer:
    headers = [("Accept", "application/json"), ("Accept-Encoding", "gzip"), ("User-Agent", "fuselm")]
    content = None
    if client.key:
        headers.append(("Authorization", f"Bearer {client.key}"))
    if body is not None:
        headers.append(("Content-Type", "application/json"))
        content = json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()
    try:
        return exchange(
            client.pool, read_address(client.url, path), headers, content, seconds=client.timeout, most_bytes=most_bytes
        )
    except AnswerTooLarge:
        raise Refused(
            f"{client.url}: answers with more than {most_bytes:,} bytes, which is more than what was asked for can "
            "take; is this a completions server?",
            200,
        ) from None
    except Undecodable:
        raise Refused(
            f"{client.url}: its answer can't be decompressed; let the server, or the proxy before it, send it as it is",
            200,
        ) from None


def _parse_answer(client: Client, answer: Answer) -> Any:
    try:  # three times as fast as json.loads, and answers are large; names that come twice are an error
        return jiter.from_json(answer.body, catch_duplicate_keys=True)
    except ValueError as error:
        said = quote_server(client, str(error))
        raise Refused(
            f"{client.url}: answers with what is no JSON ({said}); is this a completions server?", 200
        ) from None


def _hint_at_fix(client: Client, answer: Answer) -> str:
    if answer.status in (401, 403):
        state = "is refused" if client.key else "is needed"
        return f": a key {state}; export {client.key_env}"
    if answer.status == 404:
        return "; the address should be the one that /models and /completions are under, such as http://host:8000/v1"
    if 300 <= answer.status < 400:
        where = quote_server(client, answer.headers.get("location", "nowhere"))
        return f": sends to {where}, where nothing is sent; if that is the server, write its address"
    return ""


def _quote_problem(client: Client, answer: Answer) -> str:
    """Return what the server says is wrong, as part of a line."""
    text = answer.body.decode("utf-8", "replace")
    try:
        value = jiter.from_json(answer.body)
    except ValueError:
        value = text
    for name in ("error", "message", "detail"):
        if isinstance(value, dict) and value.get(name):
            value = value[name]
    said = quote_server(client, value if isinstance(value, str) else text)
    return said or http.client.responses.get(answer.status, "it does not say why")


def _read_retry_after(answer: Answer) -> float | None:
    """Return the seconds of a Retry-After header, which holds seconds or a date; None if it holds neither."""
    header = answer.headers.get("retry-after", "").strip()
    if re.fullmatch(r"[0-9]{1,12}(\.[0-9]{1,12})?", header):
        return float(header)
    try:
        seconds = email.utils.parsedate_to_datetime(header).timestamp() - time.time()
    except (ValueError, TypeError, OverflowError, OSError):
        return None
    return max(seconds, 0.0)

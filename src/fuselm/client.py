"""JSON over HTTP to one server, which is asked again after growing pauses when it is busy, failing or out of reach."""

import email.utils
import os
import random
import threading
import time
from dataclasses import dataclass, field
from typing import Any

import httpx2
from pydantic_core import from_json

from fuselm.errors import first_line

KEY = "FUSELM_API_KEY"  # the environment variable that is looked at for a key if no other is named
ATTEMPTS = 8  # a minute of pauses: a server that is started again may be back
FIRST_PAUSE = 0.5  # seconds; each pause is up to twice the one before it
LONGEST_PAUSE = 30.0
LONGEST_WISH = 300.0  # a server may ask for a pause as long as this
CONNECT = 10.0  # seconds until a connection must be there
BUSY = (408, 425, 429, 502, 503, 504)


class Unreachable(ValueError):
    """The server can't be reached, or stays busy or broken."""


class Refused(ValueError):
    """The server answers, but not with what was asked for. `status` is HTTP's."""

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, slots=True, kw_only=True)
class Client:
    """A way to a server. `stop`, once set, ends all waiting."""

    url: str
    http: httpx2.Client
    key_env: str
    stop: threading.Event = field(default_factory=threading.Event)

    def close(self) -> None:
        self.stop.set()
        self.http.close()


def connect(url: str, *, key_env: str | None, timeout: float, requests: int) -> Client:
    """A client for the server at `url`; its key, if it needs one, is in the environment and nowhere else.

    Raises `ValueError` if `key_env` names a variable that isn't set.
    """
    key = os.environ.get(key_env or KEY, "").strip()
    if key_env and not key:
        raise ValueError(f"{url}: its key should be in the environment variable {key_env}, which is not set; export it")
    http = httpx2.Client(
        headers={"Authorization": f"Bearer {key}"} if key else {},
        timeout=httpx2.Timeout(timeout, connect=CONNECT),
        limits=httpx2.Limits(max_connections=requests, max_keepalive_connections=requests),
    )
    return Client(url=url, http=http, key_env=key_env or KEY)


def ask(client: Client, path: str, body: dict[str, Any] | None = None, *, attempts: int | None = None) -> Any:
    """The server's answer to a POST of `body`, or to a GET.

    Raises `Unreachable` after `attempts`, `Refused` where asking again is no use. An inner error (500) may pass, but
    may also be the answer to a question that isn't understood: if `attempts` is given, there is no second try then.
    """
    where = httpx2.URL(client.url + "/").join(path)
    tries = ATTEMPTS if attempts is None else attempts
    again = BUSY if attempts is not None else (*BUSY, 500)
    began = time.monotonic()
    for attempt in range(tries):
        wish = None
        try:
            response = client.http.request("GET" if body is None else "POST", where, json=body)
        except httpx2.TimeoutException as error:
            problem = f"no answer in time ({type(error).__name__})"
        except httpx2.TransportError as error:
            problem = f"cannot be reached ({first_line(error)})"
        else:
            if response.status_code == 200:
                return _read(client, response)
            problem = f"answers {response.status_code} ({_said(response)})"
            if response.status_code not in again:
                raise Refused(f"{client.url}: {problem}{_hint(client, response.status_code)}", response.status_code)
            wish = _wished_pause(response)
        pause = min(LONGEST_PAUSE, FIRST_PAUSE * 2**attempt) * random.uniform(0.5, 1.0) if wish is None else wish
        if attempt + 1 < tries and client.stop.wait(pause):
            break
    seconds = time.monotonic() - began
    raise Unreachable(
        f"{client.url}: {problem}, asked {attempt + 1} times in {seconds:.0f} s; is the server up? "
        "Then the same command goes on from here"
    )


def _read(client: Client, response: httpx2.Response) -> Any:
    try:
        return from_json(response.content)  # three times as fast as json.loads, and answers are large
    except ValueError:
        raise Refused(f"{client.url}: answers with what is no JSON; is this a completions server?", 200) from None


def _hint(client: Client, status: int) -> str:
    if status in (401, 403):
        state = "is refused" if "authorization" in client.http.headers else "is needed"
        return f": a key {state}; export {client.key_env}"
    if status == 404:
        return "; the address should be the one that /models and /completions are under, such as http://host:8000/v1"
    return ""


def _said(response: httpx2.Response) -> str:
    """What the server says is wrong, in part of a line."""
    try:
        value = response.json()
    except ValueError:
        value = response.text
    for name in ("error", "message", "detail"):
        if isinstance(value, dict) and value.get(name):
            value = value[name]
    return " ".join(str(value).split())[:200] or response.reason_phrase


def _wished_pause(response: httpx2.Response) -> float | None:
    """The seconds of a Retry-After header, which holds seconds or a date."""
    header = response.headers.get("retry-after", "")
    try:
        seconds = float(header)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(header).timestamp() - time.time()
        except ValueError:
            return None
    return min(max(seconds, 0.0), LONGEST_WISH)

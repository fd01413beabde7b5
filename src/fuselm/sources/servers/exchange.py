"""Exchange one HTTP request for an answer of limited size and total time, whatever the server sends.

Redirects are not followed, cookies are not kept, and no headers are sent except those that the caller gives.
"""

import time
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

import httpcore2

from fuselm.system.addresses import DEFAULT_PORTS, Address, is_this_machine

CONNECT_SECONDS = 10.0  # seconds until a connection must be there
LONGEST_SECONDS = 1e9  # seconds; sockets can't wait longer
MOST_OF_AN_ERROR = 1 << 16  # bytes; what a server says is wrong is read as far as this
SLICE = 1 << 14  # bytes that are written before the clock is looked at


class AnswerTooLarge(ValueError):
    """Signal that the answer is larger than it may be."""


class Undecodable(ValueError):
    """Signal that the answer is damaged, or compressed in a way that was not asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """Hold a server's answer. `body` is decompressed; of an error it is what came of the first 64 KiB."""

    status: int
    headers: dict[str, str]
    body: bytes


def open_pool(address: Address, *, connections: int) -> httpcore2.ConnectionPool:
    """Return connections to the server, through the proxy that the environment names unless it is this machine.

    Raises `ValueError` if that proxy is of a kind that is not known here.
    """
    options: dict[str, Any] = {
        "max_connections": connections,
        "max_keepalive_connections": connections,
        "network_backend": _Backend(),
    }
    if address.scheme == "https":
        options["ssl_context"] = httpcore2.default_ssl_context()
    if proxy := _find_proxy(address):
        return httpcore2.ConnectionPool(proxy=proxy, **options)
    return httpcore2.ConnectionPool(**options)


def _find_proxy(address: Address) -> httpcore2.Proxy | None:
    known = getproxies()
    given = known.get(address.scheme) or known.get("all")
    if not given or is_this_machine(address.host) or proxy_bypass(f"{address.host}:{address.port}"):
        return None
    try:
        parts = urlsplit(given if "://" in given else f"http://{given}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError
        port = DEFAULT_PORTS[parts.scheme] if parts.port is None else parts.port
        host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
        auth = (unquote(parts.username), unquote(parts.password or "")) if parts.username else None
        return httpcore2.Proxy(url=f"{parts.scheme}://{host}:{port}", auth=auth)
    except (ValueError, TypeError):
        raise ValueError(
            f"the environment names a proxy for {address.scheme} that is no http://host:port; fix "
            f"{address.scheme}_proxy or all_proxy, or add {address.host} to no_proxy"
        ) from None


def exchange(
    pool: httpcore2.ConnectionPool,
    address: Address,
    headers: Iterable[tuple[str, str]],
    content: bytes | None,
    *,
    seconds: float,
    most_bytes: int,
) -> Answer:
    """Return the answer to a POST of `content`, or to a GET.

    Raises `AnswerTooLarge` as soon as more than `most_bytes` have come, `Undecodable`, and httpcore2's exceptions. One
    of these is `TimeoutException`, if the whole answer is not there after `seconds`.
    """
    seconds = min(seconds, LONGEST_SECONDS)
    deadline = time.monotonic() + seconds
    connected = min(deadline, time.monotonic() + CONNECT_SECONDS)
    # The pool waits for so many seconds. What it hands on to `_Backend` and `_Stream` are points in time.
    limits = {"pool": seconds, "connect": connected, "read": deadline, "write": deadline}
    body = bytearray()
    host = f"[{address.host}]" if ":" in address.host else address.host
    port = None if address.port == DEFAULT_PORTS[address.scheme] else address.port
    headers = [("Host", host if port is None else f"{host}:{port}"), *headers]
    url = httpcore2.URL(scheme=address.scheme, host=address.host, port=port, target=address.path)
    method = "GET" if content is None else "POST"
    with pool.stream(method, url, headers=headers, content=content, extensions={"timeout": limits}) as response:
        headers_read = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in response.headers}
        most = most_bytes if response.status == 200 else min(most_bytes, MOST_OF_AN_ERROR)
        try:
            for part in response.iter_stream():
                body += part
                if len(body) > most:
                    break
                if time.monotonic() > deadline:
                    raise httpcore2.ReadTimeout
        except (httpcore2.TimeoutException, httpcore2.NetworkError, httpcore2.ProtocolError):
            if response.status == 200:
                raise
    answer = Answer(status=response.status, headers=headers_read, body=bytes(body))
    if response.status != 200:
        return _decompress_error(answer)
    if len(body) > most:
        raise AnswerTooLarge
    return _decompress(answer, most)


def _decompress(answer: Answer, most: int) -> Answer:
    encoding = answer.headers.get("content-encoding", "identity").strip().lower()
    if encoding in ("identity", ""):
        return answer
    if encoding not in ("gzip", "x-gzip"):
        raise Undecodable
    decoder = zlib.decompressobj(wbits=31)
    try:
        body = decoder.decompress(answer.body, most + 1)
    except zlib.error:
        raise Undecodable from None
    if len(body) > most:
        raise AnswerTooLarge
    if not decoder.eof or decoder.unused_data:
        raise Undecodable
    return Answer(status=answer.status, headers=answer.headers, body=body)


def _decompress_error(answer: Answer) -> Answer:
    body = answer.body[:MOST_OF_AN_ERROR]
    try:
        return _decompress(Answer(status=answer.status, headers=answer.headers, body=body), MOST_OF_AN_ERROR)
    except (AnswerTooLarge, Undecodable):
        return Answer(status=answer.status, headers=answer.headers, body=b"")


def _seconds_until(moment: float, late: type[Exception]) -> float:
    seconds = moment - time.monotonic()
    if seconds <= 0:
        raise late
    return seconds


class _Backend(httpcore2.NetworkBackend):
    """Open connections whose every timeout is a moment of `time.monotonic`, so that they add up to no more."""

    def connect_tcp(self, host, port, timeout=None, local_address=None, socket_options=None):
        seconds = _seconds_until(timeout, httpcore2.ConnectTimeout)
        return _Stream(httpcore2.SyncBackend().connect_tcp(host, port, seconds, local_address, socket_options))


class _Stream(httpcore2.NetworkStream):
    def __init__(self, stream: httpcore2.NetworkStream):
        self._stream = stream

    def read(self, max_bytes, timeout=None):
        return self._stream.read(max_bytes, _seconds_until(timeout, httpcore2.ReadTimeout))

    def write(self, buffer, timeout=None):
        for begin in range(0, len(buffer), SLICE):
            self._stream.write(buffer[begin : begin + SLICE], _seconds_until(timeout, httpcore2.WriteTimeout))

    def close(self):
        self._stream.close()

    def start_tls(self, ssl_context, server_hostname=None, timeout=None):
        seconds = _seconds_until(timeout, httpcore2.ConnectTimeout)
        return _Stream(self._stream.start_tls(ssl_context, server_hostname, seconds))

    def get_extra_info(self, info):
        return self._stream.get_extra_info(info)

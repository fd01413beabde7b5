"""Test that each misdeed of hostile_server.py ends in one line that names the server, in bounded time and memory."""

import base64
import contextlib
import gzip
import http.server
import json
import math
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import tiny_run
from captures import source_of
from hostile_server import BEHAVIOURS, KEY, NASTY, OK, Behaviour, answer, change, drip, raw, send_again, serve
from server_runs import run_file

from fuselm.documents.corpus import Document
from fuselm.sources.servers import client, server_capture
from fuselm.sources.servers.connection import connect, find_server
from fuselm.system import addresses, server_keys

TEXT = "Zu 5 Uhr kamen neun Leute, dann 7."
DOCUMENT = Document(id="000000", origin="000000", domain="odd", split="train", text=TEXT)
TOP_K = 7
MEMORY = 200 << 10  # KiB


@pytest.fixture(autouse=True)
def hurry(monkeypatch):
    monkeypatch.setattr(client, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(client, "ATTEMPTS", 2)
    monkeypatch.setattr("fuselm.sources.servers.connection.PATIENCE", 1)
    monkeypatch.setenv(client.DEFAULT_KEY_VARIABLE, KEY)


@pytest.fixture(scope="module")
def plain(byte_level):
    return byte_level, source_of(byte_level)


def capture_from(behaviour: Behaviour, plain, *, timeout: float = 30.0):
    folder, source = plain
    segmentation = source.vocabulary.segment(DOCUMENT.text)
    length = None if behaviour.kind == "llama" else 512
    with serve(behaviour, source, folder) as server:
        found = find_server(server.url, "tiny", str(folder), context_length=length, timeout=timeout)
        with connect(found, source.vocabulary, top_k=TOP_K) as connection:
            return list(server_capture.trace_documents(connection, [DOCUMENT], [segmentation])), server.asked


@pytest.mark.parametrize("name", BEHAVIOURS)
def test_a_hostile_answer_is_one_line_that_names_the_server(plain, monkeypatch, name):
    behaviour = BEHAVIOURS[name]
    is_late = behaviour.says == "no answer in time"
    monkeypatch.setattr(client, "ATTEMPTS", 1 if is_late else 2)
    monkeypatch.setattr(
        "fuselm.sources.servers.connection.CONNECT_SECONDS", 0.3 if is_late and behaviour.where == "models" else 10.0
    )
    with pytest.raises(ValueError) as error:
        capture_from(behaviour, plain, timeout=2.0 if is_late else 30.0)
    said = str(error.value)
    assert said.startswith("http://127.0.0.1:") and behaviour.says in said
    assert said.isprintable() and len(said) < 1500
    assert KEY not in said and KEY[3:-2] not in said


CHUNKED, LAST = OK + b"transfer-encoding: chunked\r\n\r\n", b"0\r\n\r\n"
RUNS = [
    "models vllm: deep JSON",
    "models vllm: a nasty id",
    "models vllm: 401 with the key",
    "questions vllm: decoded tokens with the key",
    "documents vllm: gold above 0",
    "documents vllm: a row is a string",
    "documents sglang: another token",
]


@pytest.mark.parametrize("name", RUNS)
def test_a_run_with_a_hostile_server_ends_in_one_line(tmp_path, plain, texts, name):
    folder, source = plain
    with serve(BEHAVIOURS[name], source, folder) as server:
        path = run_file(tmp_path, plain, tiny_run.short(texts), server.url)
        outcome = tiny_run.fuselm("capture", path, "capture={policy: top_k, top_k: 7}")
    assert outcome.code == 2 and BEHAVIOURS[name].says in outcome.err
    assert outcome.err.splitlines()[-1].startswith(f"fuselm: {server.url}: ") and "Traceback" not in outcome.err
    assert KEY not in outcome.err + outcome.out and "\x1b" not in outcome.err.splitlines()[-1]
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and KEY.encode() in p.read_bytes()]


GOOD = {
    "HTTP/1.0 without a length": lambda h, _, v: raw(b"HTTP/1.0 200 OK\r\n\r\n" + json.dumps(v).encode())(h, 200, v),
    "hints first": lambda h, s, v: (h.wfile.write(b"HTTP/1.1 103 Early Hints\r\n\r\n"), h._send(s, v)),
    "gzip": send_again(content_encoding="gzip"),
    "chunks": lambda h, s, v: raw(CHUNKED + b"".join(b"1\r\n%c\r\n" % c for c in json.dumps(v).encode()) + LAST)(
        h, s, v
    ),
    "a cookie": lambda h, s, v: h._send(s, v, {"set-cookie": "a=b"}),
}


@pytest.mark.parametrize("name", GOOD)
def test_an_odd_but_valid_answer_is_read(plain, name):
    (expected,), _ = capture_from(Behaviour(where="nowhere", act=None, says=""), plain)
    (found,), asked = capture_from(Behaviour(where="documents", act=GOOD[name], says=""), plain)
    assert np.array_equal(found[0].distributions.logprobs, expected[0].distributions.logprobs)
    assert all({k.lower() for k in headers} <= SENT for _, headers in asked)


SENT = {"host", "accept", "accept-encoding", "user-agent", "authorization", "content-type", "content-length"}

HUNGRY = {
    "a body without end": drip(OK + b"\r\n", b" " * (1 << 20), 0, 10**6),
    "gzip that explodes": answer(gzip.compress(b" " * (300 << 20)), content_encoding="gzip"),
    "lists of nothing": answer(b"[" + b"[]," * ((4 << 20) // 3 - 9) + b"[]]"),
    "an error without end": drip(b"HTTP/1.1 400 No\r\n\r\n", b"x" * (1 << 20), 0, 10**6),
}
MEASURED = """
import sys
from pathlib import Path
from fuselm.sources.servers import client
from fuselm.sources.servers import listing
asked = client.open_client(sys.argv[1], key_env=None, timeout=20.0, requests=1)
try:
    with client.name_server(asked):
        listing.find_model(client.ask(asked, "models", attempts=1), "tiny", "")
except ValueError as problem:
    lines = Path("/proc/self/status").read_text().splitlines()
    print(next(line.split()[1] for line in lines if line.startswith("VmHWM")), problem)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not say what a process took")
@pytest.mark.parametrize("name", HUNGRY)
def test_no_answer_takes_more_than_200_mb(plain, name):
    folder, source = plain
    with serve(Behaviour(where="models", act=HUNGRY[name], says=""), source, folder) as server:
        done = subprocess.run([sys.executable, "-c", MEASURED, server.url], capture_output=True, text=True, check=True)
    kilobytes, said = done.stdout.split(" ", 1)
    print(f"{name}: {int(kilobytes) >> 10} MB")
    assert said.startswith(server.url) and int(kilobytes) < MEMORY


def test_the_largest_answer_fits_and_nothing_larger(plain):
    filler = change(lambda v: v.update(filler="x" * 100_000))
    traces, _ = capture_from(Behaviour(where="documents", act=filler, says=""), plain)
    assert len(traces) == 1
    filler = change(lambda v: v.update(filler="x" * 200_000))
    with pytest.raises(ValueError, match="answers with more than"):
        capture_from(Behaviour(where="documents", act=filler, says=""), plain)


# ---- keys


@pytest.mark.parametrize(
    "host, local",
    [
        ("localhost", True),
        ("LocalHost.", True),
        ("127.0.0.1", True),
        ("127.255.3.2", True),
        ("::1", True),
        ("0:0:0:0:0:0:0:1", True),
        ("::ffff:127.0.0.1", True),
        ("ip6-localhost", True),
        ("localhost.example.com", False),
        ("127.0.0.1.example.com", False),
        ("notlocalhost", False),
        ("0.0.0.0", False),
        ("127.1", False),
        ("::", False),
        ("::ffff:10.0.0.1", False),
        ("gpu-box", False),
        ("", False),
    ],
)
def test_addresses_of_this_machine_are_recognised(host, local):
    assert addresses.is_this_machine(host) is local


def read_key(url: str, key_env: str | None = None, key_over_http: bool = False) -> str:
    return server_keys.read_key(url, addresses.read_address(url), key_env=key_env, key_over_http=key_over_http)


@pytest.mark.parametrize("named", [None, "OWN_KEY"])
def test_a_key_goes_over_plain_http_to_this_machine_only(monkeypatch, named):
    name = named or client.DEFAULT_KEY_VARIABLE
    monkeypatch.setenv(name, KEY)
    for url in ("https://gpu-box/v1", "http://localhost:8000/v1", "http://[::1]:8000/v1", "http://127.0.0.9/v1"):
        assert read_key(url, named) == KEY
    with pytest.raises(ValueError) as error:
        read_key("http://gpu-box:8000/v1", named)
    said = str(error.value)
    assert said.startswith(
        f"http://gpu-box:8000/v1: the key in {name} would be sent to gpu-box over plain http, where others can read "
        "it; use https or a tunnel to localhost, or set `key_over_http: true` for this source"
    )
    assert ("unset FUSELM_API_KEY" in said) is (named is None) and KEY not in said
    assert read_key("http://gpu-box:8000/v1", named, True) == KEY
    monkeypatch.delenv(name)
    if named is None:
        assert read_key("http://gpu-box:8000/v1") == ""


@pytest.mark.parametrize("key", ["two\nlines", "two\r\nX-Header: 1", "a b", "schlüssel", "\x1b[31m", "\x7f"])
def test_a_key_that_no_header_can_carry_is_refused(monkeypatch, key):
    monkeypatch.setenv(client.DEFAULT_KEY_VARIABLE, key)
    with pytest.raises(ValueError, match=r"^https://x/v1: the key in FUSELM_API_KEY holds a space, a line break or a"):
        read_key("https://x/v1")


def test_a_key_to_another_machine_never_leaves(plain, tmp_path, monkeypatch):
    path = run_file(tmp_path, plain, [{"text": "a", "domain": "b"}] * 9, "http://192.0.2.1:9/v1")
    outcome = tiny_run.fuselm("run", path)
    assert outcome.code == 2 and len(outcome.err.splitlines()) == 1 and "would be sent to 192.0.2.1 over" in outcome.err
    outcome = tiny_run.fuselm("run", path, "sources.far.key_over_http=true", "sources.far.server=https://x/v1")
    assert outcome.code == 2 and "key_over_http: does nothing with https or a server on" in outcome.err


def test_this_machine_is_reached_without_the_proxy_that_others_are(plain, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert len(capture_from(Behaviour(where="nowhere", act=None, says=""), plain)[0]) == 1
    monkeypatch.setenv("http_proxy", f"socks5://me:{KEY}@127.0.0.1:9")
    with pytest.raises(ValueError) as error:
        client.open_client("http://192.0.2.1/v1", key_env=None, timeout=1.0, requests=1, key_over_http=True)
    assert "the environment names a proxy for http that is no http://host:port" in str(error.value)
    assert KEY not in str(error.value)


def test_a_proxy_sees_what_goes_through_it_and_no_tunnel(monkeypatch):
    """Check that a proxy sees the request and maybe the key over http, but only the host over https."""
    seen = []

    class Proxy(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            seen.append((self.command, self.path, dict(self.headers)))
            self.send_error(503)

        do_CONNECT = do_GET

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Proxy) as proxy:
        threading.Thread(target=proxy.serve_forever, args=(0.01,), daemon=True).start()
        for name in ("http_proxy", "https_proxy"):
            monkeypatch.setenv(name, f"http://me:word@127.0.0.1:{proxy.server_address[1]}")
        for url, over_http in [("http://192.0.2.1/v1", True), ("https://192.0.2.1/v1", False)]:
            asked = client.open_client(url, key_env=None, timeout=5.0, requests=1, key_over_http=over_http)
            with contextlib.closing(asked), pytest.raises(client.Unreachable, match=url):
                client.ask(asked, "models", attempts=1)
        proxy.shutdown()
    (plain_way, tunnel) = seen
    assert plain_way[:2] == ("GET", "http://192.0.2.1/v1/models") and plain_way[2]["Authorization"] == f"Bearer {KEY}"
    assert tunnel[:2] == ("CONNECT", "192.0.2.1:443") and "Authorization" not in tunnel[2]


@pytest.mark.parametrize(
    "url",
    [
        "http://a..b/v1",
        "http://" + "x" * 64 + "/v1",
        "http://x:99999/v1",
        "http://x:port/v1",
        "http://[::1/v1",
        "http://x/v1#part",
        "http://x/ü",
        "http://x\\@y/v1",
        "http://\x1b[31m/v1",
        "file:///etc/passwd",
        "ftp://x/v1",
    ],
)
def test_an_invalid_address_is_reported_before_it_is_used(url):
    with pytest.raises(ValueError, match=r"^not the address of a server \(got "):
        addresses.read_address(url)


@pytest.mark.parametrize("write", [
    str, str.upper, str.swapcase, lambda k: " ".join(k), lambda k: "\n".join(k), lambda k: f"x{k}x",
    lambda k: "".join(f"%{b:02X}" if not chr(b).isalnum() and chr(b) not in "-_.~" else chr(b) for b in k.encode()),
    lambda k: k.encode().hex(), lambda k: k.encode().hex().upper(),
    *(lambda k, n=n: base64.b64encode(b"Bearer "[:n] + k.encode() + b"!").decode() for n in range(8)),
    lambda k: base64.urlsafe_b64encode(k.encode()).decode(),
])  # fmt: skip
def test_the_key_is_blotted_out_however_it_is_written(write):
    text = f"before {write(KEY)} after"
    blotted = server_keys.hide_key(text, KEY)
    assert server_keys.HIDDEN_KEY in blotted and blotted.startswith("before") and blotted.endswith("after")
    assert sum(len(part) for part in blotted.split(server_keys.HIDDEN_KEY)) <= len("before  after") + 18


def test_without_a_key_nothing_is_blotted_out():
    assert server_keys.hide_key(NASTY, "") == NASTY and server_keys.hide_key("a word", "other") == "a word"
    assert server_keys.hide_key("an EMPTY word", "EMPTY") == f"an {server_keys.HIDDEN_KEY} word"
    assert math.isclose(len(server_keys.hide_key("x" * 9, "x")), 9 * len(server_keys.HIDDEN_KEY))


# ---- the hub

HUB = """
import sys
from fuselm.models.locating import locate_model
try:
    locate_model("me/model", revision=None)
except ValueError as problem:
    print(problem)
"""
HUB_ANSWERS = {
    "403 with the token": (403, b"{}", {"X-Error-Message": f"no, {KEY}"}),
    "500": (500, b"", {}),
    "no JSON": (200, b"<html>", {}),
    "a list": (200, b"[5]", {}),
    "files are a number": (200, b'{"id": "a", "sha": "b", "siblings": 5}', {}),
}


@pytest.mark.parametrize("name", HUB_ANSWERS)
def test_a_hostile_hub_is_one_line_without_the_token(tmp_path, name):
    status, body, headers = HUB_ANSWERS[name]

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status)
            for header, value in {**headers, "content-length": str(len(body))}.items():
                self.send_header(header, value)
            self.end_headers()
            self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as hub:
        threading.Thread(target=hub.serve_forever, args=(0.01,), daemon=True).start()
        place = {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_address[1]}", "HF_HOME": str(tmp_path)}
        own = os.environ | place | {"HF_TOKEN": KEY, "HF_HUB_OFFLINE": "0", "FUSELM_CACHE": str(tmp_path)}
        done = subprocess.run([sys.executable, "-c", HUB], capture_output=True, text=True, env=own)
        hub.shutdown()
    assert done.returncode == 0 and done.stdout.startswith("me/model: could not be downloaded (")
    assert len(done.stdout.splitlines()) == 1 and KEY not in done.stdout + done.stderr

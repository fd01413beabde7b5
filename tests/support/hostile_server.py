"""Serve lies, broken HTTP, endless answers and hurtful text over real sockets, around a tiny model.

Each of `BEHAVIOURS` is done at one place: to the list of models, to the first questions, or to those about documents.
"""

import contextlib
import copy
import gzip
import json
import struct
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from socket import SO_LINGER, SOL_SOCKET
from typing import Any

from model_server import Handler, ModelServer

from fuselm.sources.servers.connection import PROBE

KEY = "sk-a+secret/of-ours=="
NASTY = "\x1b]0;owned\x07\x1b[31mred\r\n\u202eback\u2028\x9b2J\x00"
Act = Callable[["HostileHandler", int, Any], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Behaviour:
    """Describe what a server of `kind` does at one place, and a part of what is then reported."""

    where: str
    act: Act
    says: str
    kind: str = "vllm"


class HostileHandler(Handler):
    def do_GET(self) -> None:
        entry = {"id": "tiny", "object": "model", "root": "somewhere/tiny", "max_model_len": 512}
        self._do("models", 200, {"object": "list", "data": [entry]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        asked = body.get("prompt", body.get("input_ids"))
        if self.owner.kind == "llama":
            about = "next tokens" if "echo" not in body else "questions" if PROBE in asked else "documents"
        else:
            about = "questions" if isinstance(asked, str) or len(asked) == self.owner.length else "documents"
        self._do(about, *self.owner.answer(self.path, body))

    def _do(self, where: str, status: int, value: Any) -> None:
        self.owner.asked.append((self.path, dict(self.headers)))
        try:
            if where == self.owner.behaviour.where and status == 200:
                self.owner.behaviour.act(self, status, value)
            else:
                self._send(status, value)
        except OSError:
            self.close_connection = True  # the client went away, as it should


def serve(behaviour: Behaviour, source, folder) -> ModelServer:
    """Return a server that does as it should in all but one place."""
    server = ModelServer(behaviour.kind, source, folder, handler=HostileHandler)
    server.length = 1 + len(source.vocabulary.segment(PROBE).ids)  # tokens of the first questions
    server.behaviour, server.asked = behaviour, []
    server._http.handle_error = lambda *_: None  # a client that goes away is no news
    return server


# ---- ways to answer


def change(edit: Callable[[Any], Any]) -> Act:
    """Answer as a good server, except for what `edit` does to the JSON, if it is of the right shape."""

    def act(handler: HostileHandler, status: int, value: Any) -> None:
        value = copy.deepcopy(value)
        edited = None
        with contextlib.suppress(KeyError, TypeError):
            edited = edit(value)
        handler._send(status, value if edited is None else edited)

    return act


def answer(body: bytes, status: int = 200, **headers: str) -> Act:
    """Answer with these bytes."""
    told = {name.replace("_", "-"): value for name, value in headers.items()}
    lines = [f"HTTP/1.1 {status} Said", "connection: close", *(f"{name}: {value}" for name, value in told.items())]
    if "content-length" not in told and "transfer-encoding" not in told:
        lines.append(f"content-length: {len(body)}")
    return raw("\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body)


def raw(data: bytes) -> Act:
    """Write these bytes and close."""

    def act(handler: HostileHandler, _: int, __: Any) -> None:
        handler.close_connection = True
        handler.wfile.write(data)

    return act


def drip(head: bytes, piece: bytes, pause: float = 0.05, times: int = 2000) -> Act:
    """Write `head`, then `piece` again and again."""

    def act(handler: HostileHandler, _: int, __: Any) -> None:
        handler.close_connection = True
        handler.wfile.write(head)
        for _ in range(times):
            handler.wfile.write(piece)
            time.sleep(pause)

    return act


def reset(handler: HostileHandler, _: int, __: Any) -> None:
    """Send half of an answer, then reset the connection."""
    handler.wfile.write(b'HTTP/1.1 200 OK\r\ncontent-length: 99\r\n\r\n{"choices":')
    handler.wfile.flush()
    handler.connection.setsockopt(SOL_SOCKET, SO_LINGER, struct.pack("ii", 1, 0))
    handler.close_connection = True
    handler.connection.close()


def say_nothing(_: HostileHandler, __: int, ___: Any) -> None:
    time.sleep(3)


def bomb(megabytes: int) -> bytes:
    packer = zlib.compressobj(9, wbits=31)
    zeros = b" " * (1 << 20)
    return b"".join(packer.compress(zeros) for _ in range(megabytes)) + packer.flush()


def send_again(coded: bytes = b"", **headers: str) -> Act:
    """Answer rightly, packed with gzip, but with these headers or with other bytes at the end."""

    def act(handler: HostileHandler, _: int, value: Any) -> None:
        answer(gzip.compress(json.dumps(value).encode()) + coded, **headers)(handler, 200, None)

    return act


# ---- what is changed in an answer of each kind


def of_entry(edit: Callable[[dict], Any]) -> Act:
    """Edit an entry of vLLM's fourth row that is not the prompt's own token."""

    def act(value: Any) -> None:
        row = value["choices"][0]["prompt_logprobs"][3]
        edit(row[list(row)[-1]])

    return change(act)


def of_row(edit: Callable[[dict], Any]) -> Act:
    """Edit, or replace by what `edit` returns, vLLM's fourth row, whose first entry is the prompt's own token."""

    def act(value: Any) -> None:
        rows = value["choices"][0]["prompt_logprobs"]
        if (new := edit(rows[3])) is not None:
            rows[3] = new[0] if isinstance(new, tuple) else new

    return change(act)


def rename(row: dict, old: str, new: str) -> dict:
    return {new if key == old else key: value for key, value in row.items()}


def of_choice(edit: Callable[[dict], Any]) -> Act:
    return change(lambda value: edit(value["choices"][0]))


def put(*path: Any) -> Callable[[Any], None]:
    """Put the last of `path` where the others lead."""

    def edit(value: Any) -> None:
        for step in path[:-2]:
            value = value[step]
        value[path[-2]] = path[-1]

    return edit


def put_first(name: str, value: Any) -> Callable[[dict], None]:
    """Put a value into the first entry of a row."""
    return lambda row: next(iter(row.values())).update({name: value})


def own(entry: Any) -> Act:
    """Replace parts of SGLang's fifth own entry."""
    return change(lambda v: v["meta_info"]["input_token_logprobs"][4].__setitem__(*entry))


def top(edit: Callable[[list], Any]) -> Act:
    """Edit SGLang's fifth row of top entries."""
    return change(lambda v: edit(v["meta_info"]["input_top_logprobs"][4]))


def echo(edit: Callable[[dict], Any]) -> Act:
    """Edit the log-probabilities of an echo."""
    return change(lambda v: edit(v["choices"][0]["logprobs"]))


DEEP = b"[" * 100_000
HUGE = b"1" + b"0" * 5000
OK = b"HTTP/1.1 200 OK\r\n"

MODELS: dict[str, tuple[Act, str]] = {
    "null": (answer(b"null"), "its list of models can't be read"),
    "a number": (answer(b"5"), "its list of models can't be read"),
    "a list": (answer(b"[]"), "its list of models can't be read"),
    "data is a string": (change(put("data", "tiny")), "its list of models can't be read"),
    "models are strings": (change(put("data", ["tiny"])), "an entry of its list of models is 'tiny', not an object"),
    "models are null": (change(put("data", [None])), "an entry of its list of models is null"),
    "a model is a list": (change(put("data", [[]])), "an entry of its list of models is a list"),
    "no models": (change(put("data", [])), "serves no model 'tiny', but none"),
    "an id is a number": (change(put("data", 0, "id", 5)), "the id of a model in its list is 5, not a string"),
    "an id is null": (change(put("data", 0, "id", None)), "is null, not a string"),
    "a nasty id": (change(put("data", 0, "id", NASTY + KEY)), "serves no model 'tiny', but '"),
    "a thousand ids": (change(put("data", [{"id": f"m{n}" * 99} for n in range(1000)])), "and 990 more; name one"),
    "a root is a number": (change(put("data", 0, "root", 5)), "`root` of a model in its list is 5"),
    "a parent is a list": (change(put("data", 0, "parent", ["a"])), "`parent` of a model in its list is a list"),
    "two of one name": (change(lambda v: v["data"].append({"id": "tiny"})), "lists 'tiny' several times"),
    "the key in root": (change(put("data", 0, "root", f"x{KEY}")), "its list of models holds the key that it was sent"),
    **{
        f"a context of {json.dumps(length)[:9]}": (change(put("data", 0, "max_model_len", length)), says)
        for length, says in {
            "4096": "`max_model_len` of a model in its list is '4096'",
            -5: "is -5, not a number of tokens",
            0: "is 0, not",
            7.5: "is 7.5, not",
            True: "is true, not",
            10**30: "is 10000",
            float("nan"): "is nan, not",
        }.items()
    },
    "a context that is a list": (change(put("data", 0, "max_model_len", [1])), "is a list, not a number of tokens"),
    "deep JSON": (answer(DEEP), "no JSON (recursion limit exceeded"),
    "a huge number": (answer(b'{"data": ' + HUGE + b"}"), "no JSON (number out of range"),
    "a name twice": (answer(b'{"data": [], "data": []}'), 'no JSON (Detected duplicate key "data"'),
    "a nasty name twice": (answer(json.dumps({NASTY + KEY: 1}).replace("}", ",").encode() * 2), "no JSON"),
    "a byte order mark": (answer(b"\xef\xbb\xbf{}"), "no JSON"),
    "no UTF-8": (answer(b'{"data": "\xff\xfe"}'), "no JSON"),
    "half a surrogate pair": (answer(b'{"data": "\\ud800"}'), "no JSON"),
    "HTML": (answer(b"<html><script>alert(1)</script>", content_type="text/html"), "no JSON"),
    "an empty answer": (answer(b""), "no JSON (EOF while parsing"),
    "204": (answer(b"", 204), "answers 204 (No Content)"),
    "206": (answer(b"{}", 206), "answers 206"),
    "a redirect": (answer(b"", 302, location="http://evil.example/"), "sends to http://evil.example/, where nothing"),
    "a redirect to a file": (answer(b"", 301, location="file:///etc/passwd"), "sends to file:///etc/passwd, where"),
    "a redirect to itself": (answer(b"", 307, location="/v1/models"), "sends to /v1/models, where nothing is sent"),
    "a redirect with the key": (answer(b"", 308, location=f"//x/?{KEY}\x1b"), "sends to //x/?[key]"),
    "401 with the key": (answer(f"{NASTY}Bearer {KEY} is wrong".encode(), 401), ": a key is refused; export FUSELM"),
    "401 with the key in bits": (answer(" ".join(KEY).encode(), 401), "answers 401 ([key])"),
    "403 with deep JSON": (answer(DEEP, 403), "answers 403 ([[["),
    "404 with a list": (answer(b"[1, 2]", 404), "answers 404 ([1, 2]); the address should be"),
    "418 with a huge number": (answer(b'{"error": ' + HUGE + b"}", 418), "answers 418"),
    "429 until a year without end": (answer(b"{}", 429, retry_after="Fri, 31 Dec 99999 23:59:59 GMT"), "answers 429"),
    "429 for 30 years": (answer(b"{}", 429, retry_after="999999999"), "wants to be left alone for 999999999 s"),
    "429 for less than nothing": (answer(b"{}", 429, retry_after="-5"), "answers 429"),
    "429 for nan": (answer(b"{}", 429, retry_after="nan"), "answers 429"),
    "429 for digits of another script": (answer(b"{}", 429, retry_after="\xb2\xb3"), "answers 429"),
    "500 with an endless body": (drip(b"HTTP/1.1 500 No\r\n\r\n", b"x" * 65536, 0), "answers 500 (xxx"),
    "502 with HTML": (answer(b"<h1>Bad\n\n\ngateway</h1>", 502), "answers 502 (<h1>Bad gateway</h1>)"),
    "503 with bad gzip": (answer(b"no gzip", 503, content_encoding="gzip"), "answers 503 (Service Unavailable)"),
    "a nasty reason": (raw(b"HTTP/1.1 400 \x1b[31m\r\ncontent-length: 0\r\n\r\n"), ""),
    "a status of its own": (raw(b"HTTP/1.1 999 Odd\r\ncontent-length: 0\r\n\r\n"), ""),
    "no status": (raw(b"HTTP/1.1 OK\r\n\r\n"), "cannot be reached"),
    "no HTTP": (raw(b"SSH-2.0-OpenSSH_9.6\r\n"), "cannot be reached"),
    "switching protocols": (raw(b"HTTP/1.1 101 Switching\r\nupgrade: x\r\n\r\n"), "cannot be reached"),
    "nothing": (raw(b""), "cannot be reached"),
    "a reset": (reset, "cannot be reached"),
    "silence": (say_nothing, "no answer in time"),
    "a header without end": (drip(OK + b"x: ", b"y" * 65536, 0), "cannot be reached"),
    "headers without end": (drip(OK, b"x: y\r\n" * 9999, 0), "cannot be reached"),
    "a slow header": (drip(OK + b"x: ", b"y"), "no answer in time"),
    "a slow status": (drip(b"HTTP/1.1 2", b"0"), "no answer in time"),
    "continue without end": (drip(b"", b"HTTP/1.1 100 Continue\r\n\r\n"), "no answer in time"),
    "continue without end or pause": (drip(b"", b"HTTP/1.1 103 Hint\r\n\r\n" * 999, 0, 10**9), "no answer in time"),
    "a slow body": (drip(OK + b"content-length: 9999\r\n\r\n", b" "), "no answer in time"),
    "slow chunks": (drip(OK + b"transfer-encoding: chunked\r\n\r\n", b"1\r\n \r\n"), "no answer in time"),
    "a body without end": (drip(OK + b"\r\n", b" " * 65536, 0), "answers with more than 4,194,304 bytes"),
    "chunks without end": (
        drip(OK + b"transfer-encoding: chunked\r\n\r\n", b"10000\r\n" + b" " * 65536 + b"\r\n", 0),
        "answers with more than 4,194,304 bytes",
    ),
    "a length of its own": (answer(b"{}", content_length="99"), "cannot be reached"),
    "a length below 0": (answer(b"{}", content_length="-1"), "cannot be reached"),
    "a length in words": (answer(b"{}", content_length="two"), "cannot be reached"),
    "a length beyond all memory": (answer(b"{}", content_length="9" * 19), "cannot be reached"),
    "two lengths": (raw(OK + b"content-length: 2\r\ncontent-length: 3\r\n\r\n{}"), "cannot be reached"),
    "chunks of no size": (answer(b"zz\r\n{}\r\n", transfer_encoding="chunked"), "cannot be reached"),
    "an encoding of its own": (answer(b"{}", transfer_encoding="rot13"), ""),
    "bad gzip": (answer(b"{}", content_encoding="gzip"), "its answer can't be decompressed"),
    "half of gzip": (answer(gzip.compress(b"{}" * 99)[:-9], content_encoding="gzip"), "can't be decompressed"),
    "gzip twice": (send_again(content_encoding="gzip, gzip"), "its answer can't be decompressed"),
    "gzip and more": (send_again(b"more", content_encoding="gzip"), "its answer can't be decompressed"),
    "brotli": (send_again(content_encoding="br"), "its answer can't be decompressed"),
    "gzip that explodes": (answer(bomb(64), content_encoding="gzip"), "answers with more than 4,194,304 bytes"),
}

VLLM: dict[str, tuple[Act, str]] = {
    "a list": (answer(b"[]"), "the answer is a list, not an object"),
    "null": (answer(b"null"), "the answer is null"),
    "choices are a number": (change(put("choices", 5)), "no prompt log-probabilities in the answer"),
    "a choice is a string": (change(put("choices", ["x"])), "no prompt log-probabilities in the answer"),
    "two choices": (change(lambda v: put("choices", v["choices"] * 2)(v)), "2 choices in the answer, 1 was asked for"),
    "rows are a number": (of_choice(put("prompt_logprobs", 5)), "no prompt log-probabilities in the answer"),
    "a row less": (of_choice(lambda c: c["prompt_logprobs"].pop() and None), "tokens in the answer, "),
    "a row more": (of_choice(lambda c: c["prompt_logprobs"].append({})), "tokens in the answer, "),
    "a row first": (of_choice(lambda c: put(0, c["prompt_logprobs"][1])(c["prompt_logprobs"])), "the first row is an"),
    "a row is null": (of_row(lambda _: (None,)), "a token without log-probabilities"),
    "a row is empty": (of_row(lambda _: {}), "a token without log-probabilities"),
    "a row is a list": (of_row(lambda row: list(row.values())), "token 2: its row is a list, not an object"),
    "a row is a string": (of_row(lambda _: NASTY + KEY), "token 2: its row is '"),
    "an entry less": (of_row(lambda row: dict(list(row.items())[:-2])), "entries are in the answer, 7 were asked for"),
    "entries more": (
        of_row(
            lambda row: (
                row | {"1": row["5"], "2": row["5"]}
                if "5" in row
                else row | {str(n): {"logprob": -99.0} for n in range(30)}
            )
        ),
        "entries are in the answer, 7",
    ),
    "another prompt's rows": (
        of_choice(
            lambda c: (
                c["prompt_logprobs"][1:].reverse()
                or c["prompt_logprobs"].__setitem__(slice(1, None), c["prompt_logprobs"][:0:-1])
            )
        ),
        "came, but its log-probability is not in the answer",
    ),
    "an id with a space": (of_row(lambda row: rename(row, list(row)[-1], " 0_0_5")), "the id of an entry is ' 0_0_5'"),
    "an id with a zero": (of_row(lambda row: rename(row, list(row)[-1], "05")), "the id of an entry is '05'"),
    "an id with a sign": (of_row(lambda row: rename(row, list(row)[-1], "+5")), "the id of an entry is '+5'"),
    "an id below 0": (of_row(lambda row: rename(row, list(row)[-1], "-5")), "the id of an entry is '-5'"),
    "an id of other digits": (of_row(lambda row: rename(row, list(row)[-1], "٥")), "the id of an entry is '٥'"),
    "an id of 5.7": (of_row(lambda row: rename(row, list(row)[-1], "5.7")), "the id of an entry is '5.7'"),
    "an id of no characters": (of_row(lambda row: rename(row, list(row)[-1], "")), "the id of an entry is ''"),
    "an id without end": (of_row(lambda row: rename(row, list(row)[-1], "9" * 9999)), "the id of an entry is '999"),
    "an id beyond the vocabulary": (of_row(lambda row: rename(row, list(row)[-1], "70000")), "outside the vocabulary"),
    "an id beyond 32 bits": (of_row(lambda row: rename(row, list(row)[-1], "4294967301")), "the id of an entry is"),
    "an entry is a number": (of_row(lambda row: row | {list(row)[-1]: -1.5}), "an entry is -1.5, not an object"),
    "an entry is null": (of_row(lambda row: row | {list(row)[-1]: None}), "an entry is null, not an object"),
    "no log-probability": (of_entry(lambda e: e.clear()), "a log-probability is null, not a number"),
    **{
        f"a log-probability of {name}": (of_entry(put("logprob", value)), f"a log-probability is {says}")
        for name, value, says in [
            ("a string", "-1.5", "'-1.5', not a number"),
            ("true", True, "true, not a number"),
            ("an object", {"a": 1}, "an object, not a number"),
            ("a list", [1.5], "a list, not a number"),
            ("0.01", 0.01, "0.01, above 0"),
            ("50", 50, "50, above 0"),
            ("1e308", 1e308, "1e+308, above 0"),
            ("-1e308", -1e308, "-1e+308, which float32 cannot hold"),
            ("infinity", float("inf"), "inf, above 0"),
            ("minus infinity", float("-inf"), "-inf, which float32 cannot hold"),
            ("a huge number", -(10**400), "-1000"),
        ]
    },
    "one NaN": (of_entry(put("logprob", float("nan"))), "some of its log-probabilities are NaN and others are not"),
    "a mass above 1": (of_entry(put("logprob", -0.01)), "probabilities add up to"),
    "gold above 0": (of_row(put_first("logprob", 5.0)), "a log-probability is 5.0, above 0"),
    "gold of minus infinity": (of_row(put_first("logprob", -1e999)), "is -inf, which float32 cannot hold"),
    "gold left out": (
        of_row(lambda row: {k: v for k, v in list(row.items())[1:]} | {"3": {"logprob": -30.0}}),
        "came, but its log-probability is not in the answer",
    ),
    "gold above the rest and one entry more": (
        of_row(lambda row: row | {"1": {"logprob": -99.0}} if len(row) == 7 else put_first("logprob", -0.7)(row)),
        "8 entries are in the answer, but its token is one of the first 7",
    ),
    "another prompt's ids": (of_choice(put("prompt_token_ids", [1, 2, 3])), "the answer is about another prompt"),
    "another count": (change(put("usage", {"prompt_tokens": 3})), "3 tokens to the server, 1 + "),
    "a count in words": (change(put("usage", {"prompt_tokens": NASTY})), "tokens to the server, 1 + "),
    "a body without end": (drip(OK + b"\r\n", b" " * 65536, 0), "answers with more than "),
    "gzip that explodes": (answer(bomb(64), content_encoding="gzip"), "answers with more than "),
    "a slow body": (drip(OK + b"content-length: 9999\r\n\r\n", b" "), "no answer in time"),
    "400 with the key": (answer(json.dumps({"error": {"message": NASTY + KEY}}).encode(), 400), "answers 400 (\\x1b]0"),
}

FIRST: dict[str, tuple[Act, str]] = {
    "a decoded token is a number": (of_row(put_first("decoded_token", 5)), "is decoded to 5"),
    "logprobs are a number": (answer(b'{"choices": [{"logprobs": 5, "prompt_logprobs": 5}]}'), "logprobs is 5, not an"),
    "decoded tokens with the key": (
        change(
            lambda v: (
                [
                    row.update({k: e | {"decoded_token": NASTY + KEY} for k, e in row.items()})
                    for row in v["choices"][0]["prompt_logprobs"] or ()
                    if row
                ]
                and None
            )
        ),
        "is '\\x1b]0;owned",
    ),
}

SGLANG: dict[str, tuple[Act, str]] = {
    "meta_info is a list": (change(put("meta_info", [1])), "meta_info is a list, not an object"),
    "no meta_info": (change(put("meta_info", None)), "no prompt log-probabilities in the answer"),
    "an own entry is a number": (change(put("meta_info", "input_token_logprobs", 4, 5)), "an entry is 5, not a list"),
    "an own entry is short": (change(put("meta_info", "input_token_logprobs", 4, [-1.0])), "an entry is not [log-p"),
    "another token": (own((1, 3)), "id 3 is in the answer"),
    "a fractional token": (own((1, 5.7)), "an entry is not [log-probability, id, text]"),
    "a token is true": (own((1, True)), "an entry is not [log-probability, id, text]"),
    "gold above 0": (own((0, 2.5)), "a log-probability is 2.5, above 0"),
    "gold is null": (own((0, None)), "a log-probability is null"),
    "gold is a string": (own((0, "-2.5")), "a log-probability is '-2.5'"),
    "gold of minus infinity": (own((0, -1e999)), "a log-probability is -inf"),
    "gold is NaN": (own((0, float("nan"))), "some of its log-probabilities are NaN"),
    "gold unlike its entry": (own((0, -1e-9)), "token 3: "),
    "a row is an object": (
        change(put("meta_info", "input_top_logprobs", 4, {})),
        "its row of top entries is an object",
    ),
    "a row is null": (change(put("meta_info", "input_top_logprobs", 4, None)), "its row of top entries is null"),
    "a row less": (change(lambda v: v["meta_info"]["input_top_logprobs"].pop() and None), "tokens in the answer, "),
    "an entry less": (top(lambda row: row.pop() and None), "6 entries are in the answer, 7 were asked for"),
    "an entry more": (
        top(lambda row: row.append([row[-1][0], 1, None])),
        "entries are in the answer, 7 were asked for",
    ),
    "an id twice": (top(lambda row: put(1, 1, row[0][1])(row)), "two entries have the id "),
    "an id of 5.7": (top(put(1, 1, 5.7)), "an entry is not [log-probability, id, text]"),
    "an id of true": (top(put(1, 1, True)), "an entry is not [log-probability, id, text]"),
    "an id below 0": (top(put(1, 1, -1)), "the id of an entry is -1, not a token's"),
    "an id beyond 64 bits": (top(put(1, 1, 10**30)), "the id of an entry is 1000"),
    "an id beyond the vocabulary": (top(put(1, 1, 10**6)), "outside the vocabulary"),
    "no order": (top(lambda row: row.reverse()), "its entries are not in the order of their probabilities"),
}

LLAMA: dict[str, tuple[Act, str]] = {
    "tokens are numbers": (echo(lambda p: put("tokens", [5] * len(p["tokens"]))(p)), "token 0 is 5 to the server"),
    "tokens are nasty": (echo(put("tokens", 2, NASTY + KEY)), "token 2 is '\\x1b]0;owned"),
    "tokens are a string": (echo(put("tokens", "x")), "no prompt log-probabilities in the answer"),
    "a top row is a list": (echo(put("top_logprobs", 3, [1])), "its row is a list, not an object"),
    "a top row is empty": (echo(put("top_logprobs", 3, {})), "a token has no entries in the answer"),
    "a top row is null": (echo(put("top_logprobs", 3, None)), "token 3 has no log-probabilities"),
    "gold is null": (echo(put("token_logprobs", 3, None)), "token 3 has no log-probabilities"),
    "gold is an object": (echo(put("token_logprobs", 3, {})), "a log-probability is an object"),
    "gold above 0": (echo(put("token_logprobs", 3, 3.5)), "a log-probability is 3.5, above 0"),
    "gold of minus infinity": (echo(put("token_logprobs", 3, -1e999)), "a log-probability is -inf"),
    "a value above 0": (echo(put("top_logprobs", 3, "e", 1e308)), "a log-probability is 1e+308, above 0"),
    "a value is a string": (echo(put("top_logprobs", 3, "e", "-1")), "a log-probability is '-1', not a number"),
    "a mass above 1": (echo(lambda p: p["top_logprobs"][3].update({f"x{n}": -1.0 for n in range(9)})), "add up to"),
    "tokens more": (echo(lambda p: [p[k].extend(p[k][-1:] * 9) for k in p if p[k]] and None), "at most were asked for"),
}

NEXT: dict[str, tuple[Act, str]] = {
    "null": (answer(b"null"), "the answer is null, not an object"),
    "a list": (answer(b"[[]]"), "the answer is a list, not an object"),
    "logprobs are a number": (of_choice(put("logprobs", 5)), "logprobs is 5, not an object"),
    "rows are a string": (echo(put("top_logprobs", "x")), "no log-probabilities of the next token in the answer"),
    "a row is a number": (echo(put("top_logprobs", [5])), "its row is 5, not an object"),
    "a value is an object": (echo(put("top_logprobs", [{"e": {}}])), "a log-probability is an object"),
    "a value above 0": (echo(put("top_logprobs", [{"e": 800}])), "a log-probability is 800, above 0"),
}

BEHAVIOURS = {
    f"{where} {kind}: {name}": Behaviour(where=where, kind=kind, act=act, says=says)
    for where, kind, table in [
        ("models", "vllm", MODELS),
        ("questions", "vllm", FIRST),
        ("documents", "vllm", VLLM),
        ("documents", "sglang", SGLANG),
        ("documents", "llama", LLAMA),
        ("next tokens", "llama", NEXT),
    ]
    for name, (act, says) in table.items()
}

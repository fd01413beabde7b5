"""Serve prompt log-probabilities as vLLM, SGLang and llama-cpp-python do: real sockets around a tiny model.

vLLM's and SGLang's answers follow their sources (`request_output_to_completion_response`; `meta_info` of
`tokenizer_manager`). llama-cpp-python's follow `Llama._create_completion` and what was recorded from the real server in
data/servers: no token ids, a first row that is null, an echo that is one row late without the server's BOS.
"""

import json
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

from fuselm.sources import capture

NAME = "tiny"


class ModelServer:
    """Serve as `kind` at `url`. After the first `calm` questions, each of `faults` is done to one."""

    def __init__(self, kind: str, source: capture.LoadedSource, folder: Path, **options):
        self.kind, self.source = kind, source
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.most_entries = options.get("most_entries")
        self.bos = options.get("bos", source.context_token)
        self.adds_bos = options.get("adds_bos", False)
        self.context = options.get("context", 512)
        self.key = options.get("key")
        self.faults: Iterator = iter(options.get("faults", ()))
        self.slowness = options.get("slowness", 1.0)  # seconds
        self.calm = options.get("calm", 0)
        self.spoiled = options.get("spoiled", ())  # texts that the model gives NaN for
        self.questions = 0
        self.at_once = self.most_at_once = 0
        self._lock = threading.Lock()
        handler = type("Handler", (options.get("handler", Handler),), {"owner": self})
        self._http = ThreadingHTTPServer(("127.0.0.1", options.get("port", 0)), handler)
        self._http.daemon_threads = True
        self.port = self._http.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True)

    def __enter__(self) -> "ModelServer":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    def next_fault(self) -> str | None:
        with self._lock:
            self.questions += 1
            return next(self.faults, None) if self.questions > self.calm else None

    def count(self, change: int) -> None:
        with self._lock:
            self.at_once += change
            self.most_at_once = max(self.most_at_once, self.at_once)

    def rows(self, ids: list[int]) -> np.ndarray:
        """Return log-probabilities; row j comes after token j."""
        text = b"".join(self.source.vocabulary.token_bytes[i] or b"" for i in ids).decode(errors="replace")
        if any(spoiled in text for spoiled in self.spoiled):
            return np.full((len(ids), self.source.vocabulary.size), np.nan)
        with torch.inference_mode():
            return torch.log_softmax(self.source.model(torch.tensor([ids])).logits[0].double(), dim=-1).numpy()

    def answer(self, path: str, body: dict) -> tuple[int, dict]:
        if self.kind == "sglang" and path == "/generate":
            return 200, self._sglang(body)
        if path != "/v1/completions":
            return 404, {"detail": "Not Found"}
        if self.kind == "llama":
            return self._llama(body)
        if self.kind == "vllm":
            return self._vllm(body)
        odd = [3] * len(body["prompt"]) if self.kind == "odd" else None
        return 200, {"choices": [{"index": 0, "text": "x", "logprobs": None, "prompt_logprobs": odd}]}

    def _vllm(self, body: dict) -> tuple[int, dict]:
        wanted = body.get("prompt_logprobs", 0)
        if self.most_entries is not None and wanted > self.most_entries:
            said = f"Requested prompt logprobs of {wanted}, which is greater than max allowed: {self.most_entries}"
            return 400, {"error": {"message": said, "type": "BadRequestError", "param": "prompt_logprobs", "code": 400}}
        if not isinstance(body["prompt"], list):
            return 200, {"choices": [{"index": 0, "text": "x", "logprobs": None, "prompt_logprobs": None}]}
        rows: list[dict | None] = [None]
        for token, row in zip(body["prompt"][1:], self.rows(body["prompt"]), strict=False):
            ranks = {int(i): rank for rank, i in enumerate(np.argsort(-row, kind="stable"), 1)}
            chosen = [token, *list(ranks)[:wanted]]
            rows.append(
                {
                    str(i): {"logprob": row[i], "rank": ranks[i], "decoded_token": self._text(i, "replace")}
                    for i in chosen
                }
            )
        return 200, {"choices": [{"index": 0, "text": "x", "logprobs": None, "prompt_logprobs": rows}]}

    def _sglang(self, body: dict) -> dict:
        ids, wanted = body["input_ids"], body["top_logprobs_num"]
        own, top = [[None, ids[0], None]], [None]
        for token, row in zip(ids[1:], self.rows(ids), strict=False):
            own.append([row[token], token, None])
            top.append([[row[i], int(i), None] for i in np.argsort(-row, kind="stable")[:wanted]])
        return {"text": "x", "meta_info": {"input_token_logprobs": own, "input_top_logprobs": top}}

    def _llama(self, body: dict) -> tuple[int, dict]:
        if not isinstance(body["prompt"], str):
            return 500, {"error": {"message": "3 validation errors: Input should be a valid string"}}
        wanted = min(body["logprobs"], self.most_entries or body["logprobs"])
        prompt = self.tokenizer.encode(body["prompt"], add_special_tokens=False).ids
        prompt = [self.bos, *prompt] if self.adds_bos else prompt
        rows = self.rows(prompt)
        bias = np.zeros_like(rows[-1])
        for token, more in body.get("logit_bias", {}).items():
            bias[int(token)] = more
        tokens = [int((rows[-1] + bias).argmax())]
        if body.get("echo"):
            tokens = prompt[1 if prompt[0] == self.bos else 0 :] + tokens
        strings, own, top = [], [], []
        for token, row in zip(tokens, rows[0 if body.get("echo") else -1 :], strict=False):
            if token == self.bos:
                continue
            strings.append(self._text(token, "ignore"))
            own.append(row[token])
            top.append({self._text(int(i), "ignore"): row[i] for i in np.argsort(-row, kind="stable")[:wanted]})
            top[-1][strings[-1]] = row[token]
        if body.get("echo"):
            own[0] = top[0] = None
        logprobs = {"text_offset": [], "tokens": strings, "token_logprobs": own, "top_logprobs": top}
        choice = {"index": 0, "text": "x", "logprobs": logprobs, "finish_reason": "length"}
        return 200, {"choices": [choice], "usage": {"prompt_tokens": len(prompt), "completion_tokens": 1}}

    def _text(self, token: int, lossy: str) -> str:
        return (self.source.vocabulary.token_bytes[token] or b"").decode("utf-8", lossy)


class Handler(BaseHTTPRequestHandler):
    owner: ModelServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        if self._is_welcome():
            entry = {"id": NAME, "object": "model", "root": "somewhere/tiny", "owned_by": "me", "created": time.time()}
            if self.owner.kind != "llama":
                entry["max_model_len"] = self.owner.context
            known = self.path == "/v1/models"
            self._send(200 if known else 404, {"object": "list", "data": [entry]} if known else {"detail": "Not Found"})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if not self._is_welcome():
            return
        fault = self.owner.next_fault()
        self.owner.count(1)
        try:
            if fault == "drop":
                self.connection.shutdown(socket.SHUT_RDWR)
                self.close_connection = True
            elif fault == "gone":  # the process is killed: its port is closed, and so are all connections
                threading.Thread(target=self.owner.__exit__).start()
                self.connection.shutdown(socket.SHUT_RDWR)
                self.close_connection = True
            elif fault == "busy":
                self._send(429, {"error": {"message": "slow down"}}, {"retry-after": "0.05"})
            elif fault == "broken":
                self._send(500, {"error": {"message": "something broke"}})
            elif fault == "garbled":
                self.wfile.write(b'HTTP/1.1 200 OK\r\ncontent-length: 999\r\n\r\n{"choi')
                self.close_connection = True
            else:
                if fault == "slow":
                    time.sleep(self.owner.slowness)
                self._send(*self.owner.answer(self.path, body))
        except OSError:
            self.close_connection = True  # the client went away
        finally:
            self.owner.count(-1)

    def _is_welcome(self) -> bool:
        if self.owner.key is None or self.headers.get("authorization") == f"Bearer {self.owner.key}":
            return True
        self._send(401, {"detail": "Invalid API key"})
        return False

    def _send(self, status: int, value: dict, headers: dict[str, str] | None = None) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        for name, text in {
            "content-type": "application/json",
            "content-length": str(len(data)),
            **(headers or {}),
        }.items():
            self.send_header(name, text)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass

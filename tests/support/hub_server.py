"""Stand in for the Hugging Face Hub: its HTTP API as far as huggingface_hub needs it for repositories and files.

Repositories live in memory. Parquet and safetensors files go through LFS, others are part of a commit. A token is
needed to write, and to read what is private.
"""

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

TOKEN = "hf_standInTokenOfTheTests"
LARGE = (".parquet", ".safetensors")
REPOSITORY = r"(?P<kind>models|datasets)/(?P<repo>[^/]+/[^/]+)"
ROUTES = [
    ("POST", r"/api/repos/create", "create"),
    ("POST", r"/api/validate-yaml", "validate"),
    ("GET", rf"/api/{REPOSITORY}(/revision/(?P<revision>[^/]+))?", "info"),
    ("GET", rf"/api/{REPOSITORY}/tree/(?P<revision>[^/]+)(/(?P<folder>.+))?", "tree"),
    ("POST", rf"/api/{REPOSITORY}/paths-info/(?P<revision>[^/]+)", "paths_info"),
    ("POST", rf"/api/{REPOSITORY}/preupload/main", "preupload"),
    ("POST", rf"/api/{REPOSITORY}/commit/main", "commit"),
    ("POST", r"/(?P<kind>datasets/)?(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch", "batch"),
    ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", "put"),
    ("HEAD", r"/(?P<kind>datasets/)?(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
    ("GET", r"/(?P<kind>datasets/)?(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
]


@dataclass
class Repository:
    """Hold a repository's files, and the number of its commits."""

    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    commits: int = 0

    @property
    def sha(self) -> str:
        return hashlib.sha1(f"commit {self.commits}".encode()).hexdigest()


class Hub:
    """Answer requests, and record what was sent: `puts` counts uploads of each large file by its hash."""

    def __init__(self) -> None:
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.puts: Counter[str] = Counter()
        self.requests: list[str] = []
        self.has_put = threading.Event()  # the first large file has arrived
        self.accepts_more = threading.Event()  # further ones may arrive
        self.accepts_more.set()
        self.url = ""

    def find(self, kind: str | None, repo: str) -> Repository:
        return self.repositories[(kind or "models").rstrip("/"), repo]


class Refusal(Exception):
    """Answer with an HTTP status, and the hub's own code for the reason."""

    def __init__(self, status: int, code: str = ""):
        self.status, self.code = status, code


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def handle_one(self) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.requests.append(f"{self.command} {path}")
        try:
            for method, pattern, name in ROUTES:
                if method == self.command and (found := re.fullmatch(pattern, path)):
                    getattr(self, f"answer_{name}")(body, **found.groupdict())
                    return
            raise Refusal(404)
        except Refusal as refusal:
            self.send({}, status=refusal.status, **({"X-Error-Code": refusal.code} if refusal.code else {}))
        except KeyError:
            self.send({}, status=404, **{"X-Error-Code": "RepoNotFound"})

    do_GET = do_POST = do_PUT = do_HEAD = handle_one

    def send(self, content: object, *, status: int = 200, **headers: str) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(data))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def require_token(self) -> None:
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            raise Refusal(401)

    def find_readable(self, kind: str | None, repo: str) -> Repository:
        found = self.hub.find(kind, repo)
        if found.private and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            raise KeyError(repo)  # as the hub does, it does not tell that there is one
        return found

    def answer_create(self, body: bytes) -> None:
        self.require_token()
        wanted = json.loads(body)
        kind, repo = wanted.get("type", "model") + "s", f"{wanted['organization']}/{wanted['name']}"
        url = f"{self.hub.url}/{'' if kind == 'models' else kind + '/'}{repo}"
        if (kind, repo) in self.hub.repositories:
            self.send({"error": "there already", "url": url}, status=409)
            return
        private = wanted.get("private", False) or wanted.get("visibility") == "private"
        self.hub.repositories[kind, repo] = Repository(private=private)
        self.send({"url": url, "name": repo, "id": repo})

    def answer_validate(self, body: bytes) -> None:
        assert json.loads(body)["content"].startswith("---\n")
        self.send({"errors": [], "warnings": []})

    def answer_info(self, body: bytes, kind: str, repo: str, revision: str | None) -> None:
        found = self.find_readable(kind, repo)
        if revision not in (None, "main", found.sha):
            raise Refusal(404, "RevisionNotFound")
        siblings = [{"rfilename": name} for name in found.files]
        self.send({"id": repo, "sha": found.sha, "private": found.private, "siblings": siblings})

    def answer_tree(self, body: bytes, kind: str, repo: str, revision: str, folder: str | None) -> None:
        found, begin = self.find_readable(kind, repo), f"{folder}/" if folder else ""
        inside = {name: data for name, data in found.files.items() if name.startswith(begin)}
        if folder and not inside:
            raise Refusal(404, "EntryNotFound")
        files = [{"type": "file", "path": name} | describe(name, data) for name, data in inside.items()]
        if "recursive=true" not in self.path.lower():
            below = dict.fromkeys(name[len(begin) :].partition("/")[0] for name in inside if "/" in name[len(begin) :])
            files = [file for file in files if "/" not in file["path"][len(begin) :]]
            files += [{"type": "directory", "path": begin + name, "oid": "", "size": 0} for name in below]
        self.send(files)

    def answer_paths_info(self, body: bytes, kind: str, repo: str, revision: str) -> None:
        found, paths = self.find_readable(kind, repo), parse_qs(body.decode()).get("paths", [])
        names = [name for name in found.files if name in paths]
        self.send([{"type": "file", "path": name} | describe(name, found.files[name]) for name in names])

    def answer_preupload(self, body: bytes, kind: str, repo: str) -> None:
        self.require_token()
        files = self.hub.find(kind, repo).files
        self.send(
            {
                "files": [
                    {
                        "path": path,
                        "uploadMode": "lfs" if path.endswith(LARGE) else "regular",
                        "shouldIgnore": False,
                        "oid": find_oid(path, files[path]) if path in files else None,
                    }
                    for path in (file["path"] for file in json.loads(body)["files"])
                ]
            }
        )

    def answer_batch(self, body: bytes, kind: str | None, repo: str) -> None:
        self.require_token()
        objects = [{"oid": of["oid"], "size": of["size"]} for of in json.loads(body)["objects"]]
        for of in objects:
            if of["oid"] not in self.hub.objects:
                of["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{of['oid']}", "header": {}}}
        self.send({"transfer": "basic", "objects": objects})

    def answer_put(self, body: bytes, oid: str) -> None:
        assert self.hub.accepts_more.wait(120)
        assert hashlib.sha256(body).hexdigest() == oid
        self.hub.objects[oid] = body
        self.hub.puts[oid] += 1
        self.hub.has_put.set()
        self.send({})

    def answer_commit(self, body: bytes, kind: str, repo: str) -> None:
        self.require_token()
        found = self.hub.find(kind, repo)
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                found.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                found.files[value["path"]] = self.hub.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del found.files[value["path"]]
        found.commits += 1
        self.send({"success": True, "commitOid": found.sha, "commitUrl": f"{self.hub.url}/{repo}/commit/{found.sha}"})

    def answer_resolve(self, body: bytes, kind: str | None, repo: str, revision: str, path: str) -> None:
        found = self.find_readable(kind, repo)
        if path not in found.files:
            raise Refusal(404, "EntryNotFound")
        data = found.files[path]
        status, asked = 200, re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
        headers = {"X-Repo-Commit": found.sha, "Accept-Ranges": "none", "ETag": f'"{find_oid(path, data)}"'}
        if asked:
            status, data = 206, data[int(asked[1]) : int(asked[2]) + 1]
        self.send(data, status=status, **headers)

    def log_message(self, *_: object) -> None:
        """Print nothing."""


def find_oid(path: str, data: bytes) -> str:
    """Return the hash that names a file: SHA-256 of a large one, git's SHA-1 of another."""
    if path.endswith(LARGE):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def describe(path: str, data: bytes) -> dict:
    facts = {"size": len(data), "oid": hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()}
    if path.endswith(LARGE):
        facts["lfs"] = {"oid": find_oid(path, data), "size": len(data), "pointerSize": 134}
    return facts


@contextmanager
def serve_hub() -> Iterator[Hub]:
    """Serve an empty hub on a free port of this machine."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("HubHandler", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def hub() -> Iterator[Hub]:
    """Serve an empty hub for a test."""
    with serve_hub() as hub:
        yield hub


def start(hub: Hub, tmp_path: Path, *arguments: object, token: str | None = TOKEN) -> subprocess.Popen:
    """Start a command that takes `hub` for the Hub, with a home of its own in `tmp_path`."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1"}
    environment |= {"FUSELM_CACHE": str(tmp_path / "cache")} | ({} if token is None else {"HF_TOKEN": token})
    command = [sys.executable, "-m", "fuselm", *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def fuselm(hub: Hub, tmp_path: Path, *arguments: object, token: str | None = TOKEN) -> tuple[int, str, str]:
    """Run a command as `start` does; return its exit code, stdout and stderr, which must not hold the token."""
    process = start(hub, tmp_path, *arguments, token=token)
    out, err = process.communicate()
    assert TOKEN not in out + err
    return process.returncode, out, err

"""Serve object stores on loopback, so that what is written there goes through a real client and HTTP.

S3's server is a package of the tests. Google's and Azure's are programs, and tests of them are skipped where
`fake-gcs-server` or `azurite-blob` is not on the PATH, or `fuselm[gs]` or `fuselm[az]` is not installed.
"""

import os
import shutil
import socket
import subprocess
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fuselm.system.remote_paths import open_path

KEY, SECRET = "AKIA7LOOPBACK7TEST7K", "s3cr3t-of-the-loopback-store-0123456789ab"
AZURE_KEY = (
    "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="  # the emulator's own
)
ENVIRONMENT = {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_DEFAULT_REGION": "us-east-1"}


@pytest.fixture(scope="session")
def s3_address() -> Iterator[str]:
    """Start the server, and yield its address."""
    import logging

    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    application, lock = DomainDispatcherApplication(create_backend_app), threading.Lock()

    def answer(environment: dict[str, Any], start: Any) -> list[bytes]:
        with lock:  # moto looks whether an object is there, and then writes it; S3 does both at once
            return list(application(environment, start))

    server = make_server("127.0.0.1", 0, answer, threaded=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def s3_bucket(s3_address: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a new bucket; this process and those that it starts find the server by their environment."""
    return _make_bucket("s3", monkeypatch, {**ENVIRONMENT, "AWS_ENDPOINT_URL": s3_address})


def _start_server(program: str, *arguments: str) -> tuple[subprocess.Popen, int]:
    """Start a server whose arguments name its `{port}`, and wait until it answers."""
    if shutil.which(program) is None:
        pytest.skip(f"{program} is not on the PATH")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [program, *(argument.format(port=port) for argument in arguments)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 60
    while time.monotonic() < end and server.poll() is None:
        with socket.socket() as attempt:
            if attempt.connect_ex(("127.0.0.1", port)) == 0:
                return server, port
        time.sleep(0.05)
    server.kill()
    raise AssertionError(f"{program} does not answer")


@pytest.fixture(scope="session")
def gs_address() -> Iterator[str]:
    """Start a server of Google Cloud Storage, and yield its address."""
    pytest.importorskip("gcsfs")
    address = ("-scheme", "http", "-backend", "memory", "-host", "127.0.0.1", "-port", "{port}")
    server, port = _start_server("fake-gcs-server", *address, "-external-url", "http://127.0.0.1:{port}")
    yield f"http://127.0.0.1:{port}"
    server.kill()
    server.wait()


@pytest.fixture(scope="session")
def az_address() -> Iterator[str]:
    """Start a server of Azure's blobs, and yield its address."""
    pytest.importorskip("adlfs")
    where = ("--blobHost", "127.0.0.1", "--blobPort", "{port}", "--inMemoryPersistence", "--skipApiVersionCheck")
    server, port = _start_server("azurite-blob", *where, "--silent", "--disableTelemetry")
    yield f"http://127.0.0.1:{port}"
    server.kill()
    server.wait()


def _make_bucket(protocol: str, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]) -> Path:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    path = open_path(f"{protocol}://bucket-{uuid.uuid4().hex[:12]}")
    type(path.filesystem).clear_instance_cache()  # it may be that of another module's server
    path.filesystem.mkdir(path.key)
    return path


@pytest.fixture
def gs_bucket(gs_address: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a new bucket of Google Cloud Storage."""
    environment = {"STORAGE_EMULATOR_HOST": gs_address, "GOOGLE_CLOUD_PROJECT": "loopback"}
    return _make_bucket("gs", monkeypatch, environment)


@pytest.fixture
def az_bucket(az_address: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a new container of Azure's."""
    account = "DefaultEndpointsProtocol=http;AccountName=devstoreaccount1"
    connection = f"{account};AccountKey={AZURE_KEY};BlobEndpoint={az_address}/devstoreaccount1;"
    return _make_bucket("az", monkeypatch, {"AZURE_STORAGE_CONNECTION_STRING": connection})


@pytest.fixture
def memory_folder() -> Iterator[Path]:
    """Return an empty folder of the file system that fsspec keeps in memory."""
    path = open_path(f"memory://{uuid.uuid4().hex[:12]}")
    yield path
    path.remove_tree()

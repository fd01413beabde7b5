"""Serve S3 on loopback, so that what is written to an object store goes through a real client and HTTP."""

import os
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fuselm.system.remote_paths import open_path

KEY, SECRET = "AKIA7LOOPBACK7TEST7K", "s3cr3t-of-the-loopback-store-0123456789ab"
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
    for name, value in {**ENVIRONMENT, "AWS_ENDPOINT_URL": s3_address}.items():
        monkeypatch.setenv(name, value)
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    bucket = f"bucket-{uuid.uuid4().hex[:12]}"
    path = open_path(f"s3://{bucket}")
    path.filesystem.mkdir(bucket)
    return path


@pytest.fixture
def memory_folder() -> Iterator[Path]:
    """Return an empty folder of the file system that fsspec keeps in memory."""
    path = open_path(f"memory://{uuid.uuid4().hex[:12]}")
    yield path
    path.remove_tree()

"""A server on loopback that speaks Google Cloud Storage, with one bucket."""

from __future__ import annotations

import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from bucket_server import BUCKET
from loopback_host import free_port

from tuner.storage import Storage

PATIENCE = 60.0


@contextmanager
def gcs_server() -> Iterator[Callable[[str], Storage]]:
    """Yields what makes a storage of a path in its bucket."""
    port = free_port()
    # A process of its own: Arrow keeps the interpreter's lock while it opens a large object; a thread could not answer.
    command = [sys.executable, "-m", "gcp_storage_emulator", "start", "--host=127.0.0.1", f"--port={port}"]
    command += ["--in-memory", f"--default-bucket={BUCKET}"]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait(server, f"http://127.0.0.1:{port}/")
        # Without `anonymous@` Arrow looks for credentials on the network.
        options = f"endpoint_override=127.0.0.1:{port}&scheme=http"
        yield lambda path: Storage.parse(f"gs://anonymous@{BUCKET}/{path}?{options}")
    finally:
        server.kill()
        server.wait()


def _wait(server: subprocess.Popen[bytes], url: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while server.poll() is None and time.monotonic() < deadline:
        try:
            urllib.request.urlopen(url, timeout=PATIENCE).close()
        except OSError:
            time.sleep(0.05)
        else:
            return
    raise AssertionError("the server did not come up")

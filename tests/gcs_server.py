"""A server on loopback that speaks Google Cloud Storage, with one bucket."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from bucket_server import BUCKET

from benchmarks.local_head import free_ports, until_answered
from tuner.storage import Storage


@contextmanager
def gcs_server() -> Iterator[Callable[[str], Storage]]:
    """Yields what makes a storage of a path in its bucket."""
    (port,) = free_ports(1)
    # A process of its own: Arrow keeps the interpreter's lock while it opens a large object; a thread could not answer.
    command = [sys.executable, "-m", "gcp_storage_emulator", "start", "--host=127.0.0.1", f"--port={port}"]
    command += ["--in-memory", f"--default-bucket={BUCKET}"]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until_answered(server, f"http://127.0.0.1:{port}/")
        # Without `anonymous@` Arrow looks for credentials on the network.
        options = f"endpoint_override=127.0.0.1:{port}&scheme=http"
        yield lambda path: Storage.parse(f"gs://anonymous@{BUCKET}/{path}?{options}")
    finally:
        server.kill()
        server.wait()

"""A real S3 server on loopback (moto) with one bucket, that can be away, full or closed for as long as a test wants."""

from __future__ import annotations

import os
import threading
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from moto.core import DEFAULT_ACCOUNT_ID  # type: ignore[attr-defined]
from moto.s3.models import s3_backends
from moto.server import DomainDispatcherApplication, create_backend_app  # type: ignore[attr-defined]
from werkzeug.serving import WSGIRequestHandler, make_server

from tuner.storage import Storage

BUCKET = "tuner"
# What the signing needs; moto takes any.
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "loopback",
    "AWS_SECRET_ACCESS_KEY": "loopback-secret",
    "AWS_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


class _Quiet(WSGIRequestHandler):
    def log(self, type: str, message: str, *args: Any) -> None:
        """Nobody reads it."""


class BucketServer:
    """Its contents outlive `stop`, as a server's disk does.

    Attributes:
        requests: method and path of everything asked since it was made.
    """

    def __init__(self) -> None:
        self._app = DomainDispatcherApplication(create_backend_app)
        self._refusal: tuple[str, str] | None = None
        self._from: Callable[[], bool] = lambda: True
        self.requests: list[tuple[str, str]] = []
        self._port = 0
        self.start()
        urllib.request.urlopen(urllib.request.Request(f"http://127.0.0.1:{self._port}/{BUCKET}", method="PUT"))

    def uri(self, path: str) -> str:
        """`s3://` URI of a place in its bucket."""
        return f"s3://{BUCKET}/{path}?endpoint_override=127.0.0.1:{self._port}&scheme=http"

    def storage(self, path: str) -> Storage:
        return Storage.parse(self.uri(path))

    def put(self, key: str, content: bytes) -> None:
        """Put an object there under any key, as other clients than Arrow's can."""
        s3_backends[DEFAULT_ACCOUNT_ID]["aws"].put_object(BUCKET, key, content)

    def start(self) -> None:
        self._server = make_server("127.0.0.1", self._port, self._answer, threaded=True, request_handler=_Quiet)
        self._port = self._server.server_port
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Connections are refused from now on."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @contextmanager
    def away(self) -> Iterator[None]:
        """`stop`, and `start` at the end."""
        self.stop()
        try:
            yield
        finally:
            self.start()

    @contextmanager
    def refusing(self, status: str, code: str, once: Callable[[], bool] = lambda: True) -> Iterator[None]:
        """Answer every request that comes when `once` is true with an error of S3."""
        self._refusal, self._from = (status, code), once
        try:
            yield
        finally:
            self._refusal = None

    def full(self) -> Any:
        return self.refusing("507 Insufficient Storage", "XMinioStorageFull")

    def closed(self) -> Any:
        return self.refusing("403 Forbidden", "AccessDenied")

    def _answer(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        self.requests.append((environ["REQUEST_METHOD"], environ["PATH_INFO"]))
        if self._refusal is None or not self._from():
            answer: Iterable[bytes] = self._app(environ, start_response)
            return answer
        status, code = self._refusal
        # Read, or the client sees a broken pipe instead of the answer.
        environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        body = f"<Error><Code>{code}</Code><Message>{code}</Message></Error>".encode()
        start_response(status, [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
        return [body] if environ["REQUEST_METHOD"] != "HEAD" else []


@contextmanager
def bucket_server() -> Iterator[BucketServer]:
    """A server, and the credentials that its clients find in the environment."""
    with patch.dict(os.environ, CREDENTIALS):
        server = BucketServer()
        try:
            yield server
        finally:
            server.stop()

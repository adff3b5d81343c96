"""Serves the report page of a running study to a browser on this machine: three GET requests on loopback."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable, Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socket import socket
from urllib.parse import urlsplit

from tuner.errors import ConfigError, TunerError
from tuner.report.html import render, render_content
from tuner.report.watch import Watched
from tuner.study.study import Study

LOOPBACK = "127.0.0.1"
# Names of this server for a browser on this machine or at the other end of a tunnel. Another site's page whose name was
# made to point here (DNS rebinding) uses its own name.
OWN_NAMES = frozenset({LOOPBACK, "localhost"})
HEADERS = {
    "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}

Answer = tuple[str, str]  # content type and text


class LiveReport(ThreadingHTTPServer):
    """Serves the page, its content alone, and the state of the search at `url`; `serve_forever` until `shutdown`.

    Args:
        port: on loopback; 0 takes any free port.

    Raises:
        ConfigError: the port is taken.
    """

    daemon_threads = True

    def __init__(self, watched: Watched, port: int = 0) -> None:
        self.watched = watched
        self.pages: dict[str, Callable[[], Answer]] = {
            "/": self._page,
            "/status": self._status,
            "/content": self._content,
        }
        # Charts are computed once for all open pages.
        self._drawing = threading.Lock()
        self._content_drawn: tuple[str, Answer] | None = None
        try:
            super().__init__((LOOPBACK, port), _Handler)
        except OSError as error:
            raise ConfigError(f"port {port}: {error.strerror}; give another port, or 0 for any free port") from None

    @property
    def url(self) -> str:
        return f"http://{LOOPBACK}:{self.server_port}/"

    def handle_error(self, request: socket | tuple[bytes, socket], client_address: object) -> None:
        """Ignore a browser that closed the connection; anything else is a bug and keeps its traceback."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

    def _page(self) -> Answer:
        version, study = self._newest()
        return "text/html; charset=utf-8", render(study, self.watched.elsewhere, live=version)

    def _status(self) -> Answer:
        status = self.watched.status()
        return _json({"version": status.version, "ended": status.ended, "text": status.text})

    def _content(self) -> Answer:
        with self._drawing:
            version, study = self._newest()
            if self._content_drawn is None or self._content_drawn[0] != version:
                content = render_content(study, self.watched.elsewhere)
                answer = _json({"version": version, "html": content.html, "charts": content.charts})
                self._content_drawn = (version, answer)
            return self._content_drawn[1]

    def _newest(self) -> tuple[str, Study]:
        # The version first: changes while the study is read then make a new version.
        version = self.watched.status().version
        return version, self.watched.study()


def _json(values: Mapping[str, object]) -> Answer:
    return "application/json", json.dumps(values)


class _Handler(BaseHTTPRequestHandler):
    """Answers GET; the base class refuses all other methods."""

    server: LiveReport
    # Do not report the versions of Python and of the server.
    server_version, sys_version = "tuner", ""

    def do_GET(self) -> None:
        """Send one of the three answers, if the browser uses this machine's own name."""
        if _hostname(self.headers.get("Host", "")) not in OWN_NAMES:
            self._send(
                HTTPStatus.FORBIDDEN,
                ("text/plain; charset=utf-8", "only this machine may read this page; open it as localhost"),
            )
            return
        page = self.server.pages.get(urlsplit(self.path).path)
        if page is None:
            self._send(HTTPStatus.NOT_FOUND, ("text/plain; charset=utf-8", "no such page"))
            return
        try:
            status, answer = HTTPStatus.OK, page()
        except TunerError as error:
            # A file is being replaced, or a head does not answer: the page asks again.
            status, answer = HTTPStatus.SERVICE_UNAVAILABLE, ("text/plain; charset=utf-8", str(error))
        self._send(status, answer)

    def _send(self, status: HTTPStatus, answer: Answer) -> None:
        kind, text = answer
        body = text.encode("utf-8")
        self.send_response(status)
        for name, value in {**HEADERS, "Content-Type": kind, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing: a page sends a request every two seconds."""


def _hostname(host: str) -> str | None:
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None

"""The report page of a study while it runs, served to this machine's own browser: three GET requests on loopback."""

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
# What a browser on this machine, or at the other end of a tunnel, calls this server. A page of another site whose name
# was made to point here (DNS rebinding) comes under its own name.
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
    """The page, its content alone, and the state of the search, at `url`; `serve_forever` until `shutdown`.

    Args:
        port: on loopback; 0 takes a free one.

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
        # Charts are computed once, however many pages are open.
        self._drawing = threading.Lock()
        self._content_drawn: tuple[str, Answer] | None = None
        try:
            super().__init__((LOOPBACK, port), _Handler)
        except OSError as error:
            raise ConfigError(f"port {port}: {error.strerror}; give another one, or 0 for any that is free") from None

    @property
    def url(self) -> str:
        return f"http://{LOOPBACK}:{self.server_port}/"

    def handle_error(self, request: socket | tuple[bytes, socket], client_address: object) -> None:
        """A browser that went away in mid-answer is no fault; anything else is a bug and keeps its traceback."""
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
        # The version first: what comes while the study is read is drawn again.
        version = self.watched.status().version
        return version, self.watched.study()


def _json(values: Mapping[str, object]) -> Answer:
    return "application/json", json.dumps(values)


class _Handler(BaseHTTPRequestHandler):
    """Any other method than GET is refused by the base class."""

    server: LiveReport
    # Says neither which Python nor which server this is.
    server_version, sys_version = "tuner", ""

    def do_GET(self) -> None:
        """One of the three, for a browser that came here by this machine's own name."""
        if _hostname(self.headers.get("Host", "")) not in OWN_NAMES:
            self._send(HTTPStatus.FORBIDDEN, ("text/plain; charset=utf-8", "this page is for this machine alone"))
            return
        page = self.server.pages.get(urlsplit(self.path).path)
        if page is None:
            self._send(HTTPStatus.NOT_FOUND, ("text/plain; charset=utf-8", "no such page"))
            return
        try:
            status, answer = HTTPStatus.OK, page()
        except TunerError as error:
            # A file that is being replaced, a head that is away: the page asks again.
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
        """A request each two seconds is nothing to tell."""


def _hostname(host: str) -> str | None:
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None

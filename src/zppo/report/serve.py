"""`zppo report RUN --watch`: the page of a run that goes on, served on loopback."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

from zppo.errors import CheckpointError, SettingsError
from zppo.report.page_html import page, script_json, watch_payload
from zppo.report.stories import load_stories
from zppo.report.summary import Reader, Summary
from zppo.report.thumbnails import with_images

LOOPBACK = "127.0.0.1"


class Watch:
    """What the server answers; reads the run anew when a file of it has changed."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._lock = threading.Lock()
        self._known: tuple[str, Summary] | None = None

    def stamp(self) -> str:
        """A text that changes with the run's files."""
        return format(hash(self._reader.stamp()) & (1 << 63) - 1, "x")

    def summary(self) -> tuple[str, Summary]:
        """(stamp, the run as it is now)."""
        with self._lock:
            stamp = self.stamp()
            if self._known is None or self._known[0] != stamp:
                self._known = stamp, self._reader.read()
            return self._known

    def answer(self, target: str) -> tuple[HTTPStatus, str, str]:
        """(status, content type, text) for a path with its query."""
        parts = urlsplit(target)
        if parts.path == "/stamp":
            return HTTPStatus.OK, "text/plain", self.stamp()
        stamp, summary = self.summary()
        if parts.path == "/":
            return HTTPStatus.OK, "text/html", page(watch_payload(summary, stamp), [], "watch")
        if parts.path == "/data":
            return HTTPStatus.OK, "application/json", script_json(watch_payload(summary, stamp))
        if parts.path == "/story":
            wanted = parse_qs(parts.query).get("id", [""])[0]
            line = summary.lines.get(wanted)
            if line is None:
                return HTTPStatus.NOT_FOUND, "text/plain", f"there is no question {wanted!r}"
            story = with_images(load_stories(summary.run, {line.id: line.steps})[line.id])
            return HTTPStatus.OK, "application/json", json.dumps(story)
        return HTTPStatus.NOT_FOUND, "text/plain", f"there is nothing at {parts.path}"


def make_server(reader: Reader, port: int) -> ThreadingHTTPServer:
    """A server on loopback; port 0 takes a free one. It answers GET from pages of its own only.

    Raises:
        SettingsError: the port is taken or not allowed.
    """
    watch = Watch(reader)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            # A page of another site could point a name of its own at this address and read the run.
            own = {f"{name}:{server.server_port}" for name in (LOOPBACK, "localhost")}
            if self.headers.get("Host") not in own:
                self._send(HTTPStatus.FORBIDDEN, "text/plain", "only for pages of this machine")
                return
            try:
                self._send(*watch.answer(self.path))
            except (
                CheckpointError,
                OSError,
                ValueError,
            ) as error:  # a resumed run takes files back while they are read
                self._send(HTTPStatus.INTERNAL_SERVER_ERROR, "text/plain", str(error))

        def _send(self, status: HTTPStatus, kind: str, text: str) -> None:
            body = text.encode("utf-8", "replace")
            self.send_response(status)
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            self.send_header("X-Content-Type-Options", "nosniff")
            with contextlib.suppress(ConnectionError):  # the page was closed meanwhile
                self.end_headers()
                self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Quiet: a page asks every few seconds."""

    try:
        server = ThreadingHTTPServer((LOOPBACK, port), Handler)
    except (OSError, OverflowError) as error:
        raise SettingsError(
            f"port {port} of {LOOPBACK} cannot be used ({error}): choose another one with --port"
        ) from error
    return server


def serve(reader: Reader, port: int, announce: Callable[[str], None]) -> None:
    """Serve until interrupted; `announce` is told the address."""
    reader.read()  # what is wrong with the folder is said now
    with make_server(reader, port) as server:
        announce(f"http://{LOOPBACK}:{server.server_port}/")
        server.serve_forever()

"""`zppo report RUN --watch` and `zppo compare RUN RUN --watch`: a page on loopback that follows runs while they go on."""

from __future__ import annotations

import contextlib
import json
import math
import re
import threading
import time
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from statistics import fmean
from typing import Any, Protocol
from urllib.parse import parse_qs, urlsplit

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from rich.console import Console

from zppo.errors import CheckpointError, SettingsError
from zppo.report.compare import compare_runs, comparison_payload
from zppo.report.page import page, run_payload, script_json
from zppo.report.read_run import DAMAGE, Run, open_run
from zppo.report.stories import HELD_OUT_KEY, load_lines, to_index, with_images
from zppo.report.summary import Reader, Summary

LOOPBACK = "127.0.0.1"
Range = tuple[float, float]


class Watched(Protocol):
    """What a page follows; called in several threads."""

    def stamp(self) -> tuple[tuple[str, int, int], ...]:
        """Changes whenever a file does; cheap. (Name, modification time in nanoseconds, size) of each."""
        ...

    def payload(self) -> dict[str, Any]:
        """All that the page shows but for stories."""
        ...

    def story(self, key: str) -> dict[str, Any] | None:
        """The story of a question, None where there is none."""
        ...

    def search(self, words: Sequence[str], reward: Range, tokens: Range) -> dict[str, list[str]]:
        """See `search_completions`."""
        ...


class WatchedRun:
    """One run, every question of it."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._lock = threading.Lock()
        self._known: tuple[Any, Summary] | None = None

    def stamp(self) -> tuple[tuple[str, int, int], ...]:
        return self._reader.stamp()

    def payload(self) -> dict[str, Any]:
        summary = self._summary()
        note = (
            f"All {len(summary.lines):,} questions that were asked so far, held-out ones too; stories and completions are read from the "
            "run's files."
        )
        index = [to_index(line, summary.run) for line in summary.lines.values()]
        return {**run_payload(summary, index, note), "progress": progress_of(summary.run), "finished": summary.run.complete}

    def story(self, key: str) -> dict[str, Any] | None:
        summary = self._summary()
        line = summary.lines.get(key)
        return None if line is None else with_images(load_lines(summary.run, [line])[key])

    def search(self, words: Sequence[str], reward: Range, tokens: Range) -> dict[str, list[str]]:
        return search_completions(self._summary().run, words, reward, tokens)

    def _summary(self) -> Summary:
        """The run as it is now; read anew when a file of it has changed."""
        with self._lock:
            stamp = self._reader.stamp()
            if self._known is None or self._known[0] != stamp:
                self._known = stamp, self._reader.read()
            return self._known[1]


class WatchedComparison:
    """Several runs on one page; without stories."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self._folders = folders
        self._readers = [Reader(folder) for folder in folders]

    def stamp(self) -> tuple[tuple[str, int, int], ...]:
        return tuple(line for reader in self._readers for line in reader.stamp())

    def payload(self) -> dict[str, Any]:
        runs = [open_run(folder) for folder in self._folders]
        at = [f"{run.name} {'finished' if run.complete else _at(run)}" for run in runs]
        return {**comparison_payload(compare_runs(self._folders)), "at": " · ".join(at), "finished": all(run.complete for run in runs)}

    def story(self, key: str) -> dict[str, Any] | None:
        return None

    def search(self, words: Sequence[str], reward: Range, tokens: Range) -> dict[str, list[str]]:
        return {"fits": [], "found": []}


def progress_of(run: Run) -> dict[str, float | int | None]:
    """How far a run is: its step, of how many, seconds of a step (mean of the last ten), seconds left; None is not known."""
    last, planned = run.steps[-10:], run.setting("train.steps")
    seconds = fmean(line["seconds"]["step"] for line in last) if last else None
    left = seconds * max(0, planned - run.last_step) if seconds is not None and planned is not None else None
    return {"step": run.last_step, "steps": planned, "seconds": seconds, "left": left}


def _at(run: Run) -> str:
    steps = run.setting("train.steps")
    return f"step {run.last_step:,}" + (f" of {steps:,}" if steps else "")


def search_completions(run: Run, words: Sequence[str], reward: Range, tokens: Range) -> dict[str, list[str]]:
    """Keys of the questions with a completion whose reward and length lie in these ranges (`fits`), and of those with one that also
    holds all the words, upper and lower case alike (`found`; empty without words). Damaged files are left out, and those that a resumed
    run takes back.
    """
    fits: dict[str, None] = {}
    found: dict[str, None] = {}
    columns = ["question_id", "reward", "completion_tokens", *(["completion"] if words else [])]
    for path, prefix in [*((p, "") for p in run.rollout_files), *((p, HELD_OUT_KEY) for p in run.held_out_files)]:
        try:
            with pq.ParquetFile(path) as file:
                for index in range(file.num_row_groups):
                    table = file.read_row_group(index, columns=columns)
                    inside = pc.and_(_between(table["reward"], reward), _between(table["completion_tokens"], tokens))
                    table = table.filter(inside)
                    fits.update(dict.fromkeys(prefix + name for name in table["question_id"].unique().to_pylist()))
                    for word in words:
                        table = table.filter(pc.match_substring(table["completion"], word, ignore_case=True))
                    if words:
                        found.update(dict.fromkeys(prefix + name for name in table["question_id"].unique().to_pylist()))
        except pa.ArrowMemoryError:
            raise
        except DAMAGE:
            continue
    return {"fits": list(fits), "found": list(found)}


def _between(column: Any, limits: Range) -> Any:
    return pc.and_(pc.greater_equal(column, limits[0]), pc.less_equal(column, limits[1]))


class LiveReport:
    """What the server answers."""

    def __init__(self, watched: Watched) -> None:
        self._watched = watched

    def stamp(self) -> dict[str, Any]:
        """A text that changes with the files, and for how many seconds none of them has changed."""
        files = self._watched.stamp()
        newest = max((changed for _, changed, _ in files), default=0) / 1e9
        age = max(0.0, time.time() - newest) if newest else None
        return {"stamp": format(hash(files) & (1 << 63) - 1, "x"), "age": age}

    def payload(self) -> dict[str, Any]:
        """With the stamp of before it was read: what is written meanwhile comes with the next one."""
        stamp = self.stamp()
        return {**self._watched.payload(), **stamp, "made": time.strftime("%Y-%m-%d %H:%M:%S")}

    def answer(self, target: str) -> tuple[HTTPStatus, str, str]:
        """(status, content type, text) for a path with its query."""
        parts = urlsplit(target)
        query = parse_qs(parts.query)
        if parts.path == "/stamp":
            return HTTPStatus.OK, "application/json", json.dumps(self.stamp())
        if parts.path == "/":
            return HTTPStatus.OK, "text/html", page(self.payload(), [], "watch")
        if parts.path == "/data":
            return HTTPStatus.OK, "application/json", script_json(self.payload())
        if parts.path == "/story":
            wanted = query.get("key", [""])[0]
            story = self._watched.story(wanted)
            if story is None:
                return HTTPStatus.NOT_FOUND, "text/plain", f"there is no question {wanted!r}"
            return HTTPStatus.OK, "application/json", script_json(story)
        if parts.path == "/search":
            found = self._watched.search(query.get("word", []), _range(query, "reward"), _range(query, "tokens"))
            return HTTPStatus.OK, "application/json", script_json(found)
        return HTTPStatus.NOT_FOUND, "text/plain", f"there is nothing at {parts.path}"


def _range(query: Mapping[str, list[str]], name: str) -> Range:
    low, high = (query.get(f"{name}-{end}", [""])[0] for end in ("from", "to"))
    return float(low or -math.inf), float(high or math.inf)


def is_own(host: str | None) -> bool:
    """Whether a request's Host is a name of this machine, with any port: an ssh tunnel may end at another one.

    A page of another site could point a name of its own at this address and read the run; its requests carry that name.
    """
    return re.fullmatch(r"(127\.0\.0\.1|localhost|\[::1\])(:\d+)?", host or "") is not None


def make_server(watched: Watched, port: int) -> ThreadingHTTPServer:
    """A server on loopback; port 0 takes a free one. It answers GET for names of this machine only.

    Raises:
        SettingsError: the port is taken or not allowed.
    """
    live = LiveReport(watched)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if not is_own(self.headers.get("Host")):
                text = f"only under a name of this machine: http://localhost:{server.server_port}/, or the port of your tunnel"
                self._send(HTTPStatus.FORBIDDEN, "text/plain", text)
                return
            try:
                self._send(*live.answer(self.path))
            except (CheckpointError, SettingsError, OSError, ValueError) as error:  # a resumed run takes files back while they are read
                self._send(HTTPStatus.INTERNAL_SERVER_ERROR, "text/plain", str(error))

        def _send(self, status: HTTPStatus, kind: str, text: str) -> None:
            body = text.encode("utf-8", "replace")
            self.send_response(status)
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            self.send_header("X-Content-Type-Options", "nosniff")
            self.send_header("Cross-Origin-Resource-Policy", "same-origin")
            with contextlib.suppress(ConnectionError):  # the page was closed meanwhile
                self.end_headers()
                self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Quiet: a page asks every few seconds."""

    try:
        server = ThreadingHTTPServer((LOOPBACK, port), Handler)
    except (OSError, OverflowError) as error:
        raise SettingsError(f"port {port} of {LOOPBACK} cannot be used ({error}): choose another one with --port") from error
    return server


def watch_run(folder: Path, port: int, console: Console | None = None) -> None:
    """Serve the page of a run until interrupted.

    Raises:
        ZPPOError: the folder holds no run, or the port cannot be used.
    """
    _serve(WatchedRun(Reader(folder)), port, str(folder), console or Console())


def watch_comparison(folders: Sequence[Path], port: int, console: Console | None = None) -> None:
    """Serve the page of several runs until interrupted.

    Raises:
        ZPPOError: see `compare_runs`; or the port cannot be used.
    """
    _serve(WatchedComparison(folders), port, ", ".join(map(str, folders)), console or Console())


def _serve(watched: Watched, port: int, what: str, console: Console) -> None:
    watched.payload()  # what is wrong with the folders is said now
    with make_server(watched, port) as server:
        console.print(f"http://{LOOPBACK}:{server.server_port}/  shows {what}; Ctrl-C ends it", highlight=False, soft_wrap=True)
        server.serve_forever()

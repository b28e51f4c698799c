"""A scripted OpenAI-compatible server in a thread: it keeps every request, and answers what a function says; calls of `zppo eval`."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

Reply = str | dict[str, Any] | int
"""A text, a whole message, a status to refuse with, or the body ({"error": ...}) of a refusal with status 400."""


class Scripted(ThreadingHTTPServer):
    """The server.

    Attributes:
        reply: from a request to what is answered; may be exchanged while it runs.
        context: of the model, which it names where it is no None.
        requests: of chat completions, without the small one that asks whether anybody is there.
    """

    daemon_threads = True

    def __init__(self, reply: Callable[[dict[str, Any]], Reply], model: str, key: str = "") -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.reply, self.model, self.key = reply, model, key
        self.context: int | None = None
        self.requests: list[dict[str, Any]] = []
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class _Handler(BaseHTTPRequestHandler):
    server: Scripted
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        entry: dict[str, Any] = {"id": self.server.model, "object": "model"}
        if self.server.context is not None:
            entry["max_model_len"] = self.server.context
        self._send(200, {"object": "list", "data": [entry]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        sent = self.headers.get("authorization", "").removeprefix("Bearer ")
        if self.server.key and sent != self.server.key:
            return self._send(401, {"error": {"message": f"Incorrect API key provided: {sent}"}})
        reply: Reply = "ok"
        if said(body) != "Say ok.":
            with self.server.lock:
                self.server.requests.append(body)
            reply = self.server.reply(body)
        if isinstance(reply, int):
            return self._send(reply, {"error": {"message": f"no, {sent}"}})
        if isinstance(reply, dict) and "error" in reply:
            return self._send(400, reply)
        message = {"role": "assistant", "content": reply} if isinstance(reply, str) else {"role": "assistant", **reply}
        finish = message.pop("finish", "stop")
        usage = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
        choice = {"index": 0, "message": message, "finish_reason": finish}
        return self._send(
            200,
            {"id": "1", "object": "chat.completion", "created": 1, "model": body["model"], "choices": [choice], "usage": usage},
        )  # fmt: skip

    def _send(self, status: int, value: dict[str, Any]) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def said(body: dict[str, Any]) -> str:
    """The texts of a request's last turn."""
    content = body["messages"][-1]["content"]
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


@contextmanager
def scripted(reply: Callable[[dict[str, Any]], Reply], model: str = "scripted", key: str = "") -> Iterator[Scripted]:
    """A server for the time of the block."""
    server = Scripted(reply, model, key)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def right(body: dict[str, Any]) -> Reply:
    """A model that thinks, then answers A."""
    return r"<think>hm</think> \boxed{A}"


def fair(body: dict[str, Any]) -> Reply:
    """A judge that says in every protocol's form that it is right."""
    asked = said(body)
    if '"score"' in asked:
        return '{"score": 0.5}'
    return '{"verdict": "yes"}' if '"yes"' in asked else '{"verdict": "correct"}'


def write_clip(path: Path) -> None:
    """A second of grey that brightens."""
    import av
    import numpy

    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(60):
            frame = av.VideoFrame.from_ndarray(numpy.full((48, 64, 3), number * 4, numpy.uint8), format="rgb24")
            for packet in stream.encode(frame):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)


def command(model: str, judge: Scripted | str, data: Path, out: Path, suite: str, *more: str) -> list[str]:
    address = judge if isinstance(judge, str) else judge.url
    arguments = ["eval", model, "--suite", suite, "--judge", address, "--data", str(data), "--output", str(out)]
    return [*arguments, "--concurrency", "4", *more]


def results(out: Path) -> dict[str, Any]:
    state: dict[str, Any] = json.loads((out / "eval.json").read_text())
    return state


def rows(out: Path, benchmark: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "eval" / "rows" / f"{benchmark}.jsonl").read_text().splitlines()]

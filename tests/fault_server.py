"""A chat-completions server that misbehaves on demand, as a process of its own: `python fault_server.py PORT [--key KEY] [--model NAME]`.

Bare asyncio, so that it can do what no framework lets one do. POST /control sets what happens next:

    {"faults": [...], "always": {...}}     faults are used up one per chat request, then `always` (null: none) applies

A fault is {"kind": ..., "when": TEXT}, of requests that hold the text (empty: all), or
{"image": true}, of requests with images. Kinds: status (with status, headers, body, and more fields of the `error`), hang,
trickle (a byte each `pause` seconds), malformed, html, gzip (of a `reply`, or of too much), drop (closes without a reply),
bytes (of `hex`, with a `status` and an `encoding`), short (`choices` of them), text (`content`, `finish`), big (`bytes`),
flood (a reply without end), bomb (a deeply nested one), reply (this very `reply`), slow (`seconds`, then
well-behaved), suffix (well-behaved, but for a `suffix`). GET /log gives what was asked, POST /control with {"reset": true} forgets it.

`Server` is the handle for tests: it starts, kills and restarts the process and talks to /control.
"""

from __future__ import annotations

import argparse
import asyncio
import gzip
import json
import re
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any


def said_in(content: Any) -> str:
    """The text of a message, without its images."""
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


class Faulty:
    """The state of the server and what it answers."""

    def __init__(self, key: str, model: str) -> None:
        self.key, self.model = key, model
        self.faults: list[dict[str, Any]] = []
        self.always: dict[str, Any] | None = None
        self.log: list[dict[str, Any]] = []
        self.open: set[object] = set()
        self.most_open = self.flooded = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                lines = head.decode("latin-1").split("\r\n")
                method, path, _ = lines[0].split(" ", 2)
                headers = {k.lower(): v for k, v in (line.split(": ", 1) for line in lines[1:] if ": " in line)}
                data = await reader.readexactly(int(headers.get("content-length", 0)))
                await self.route(method, path, headers, json.loads(data) if data else {}, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def route(self, method: str, path: str, headers: dict[str, str], data: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        if path == "/control":
            self.faults, self.always = list(data.get("faults", [])), data.get("always")
            if data.get("reset"):
                self.log, self.most_open, self.open = [], 0, set()  # those that hang from before are counted no more
            return await self.send(writer, 200, {})
        if path == "/log":
            return await self.send(writer, 200, {"log": self.log, "most_open": self.most_open, "flooded": self.flooded})
        given = headers.get("authorization", "").removeprefix("Bearer ")
        if self.key and given != self.key:
            # As unpleasant as it gets: the key comes back in the error.
            said = f"Incorrect API key provided: {given}."
            return await self.send(writer, 401, {"error": {"message": said, "code": "invalid_api_key"}})
        if path == "/v1/models":
            return await self.send(writer, 200, {"object": "list", "data": [{"id": self.model, "object": "model"}]})
        if path != "/v1/chat/completions":
            return await self.send(writer, 404, {"detail": "Not Found"})
        if data.get("model") != self.model:
            return await self.send(writer, 404, {"error": {"message": f"The model `{data.get('model')}` does not exist."}})
        self.log.append(data)
        under_way, me = self.open, object()
        under_way.add(me)
        self.most_open = max(len(self.open), self.most_open)
        try:
            fault = (self.faults.pop(0) if self.faults else self.always) or {"kind": "ok"}
            asked = data["messages"][-1]["content"]
            meant = fault.get("when", "") in said_in(asked) and not (fault.get("image") and isinstance(asked, str))
            await self.chat(data, fault if meant else {"kind": "ok"}, writer)
        finally:
            under_way.discard(me)

    async def chat(self, data: dict[str, Any], fault: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        kind = fault["kind"]
        if kind == "slow":
            await asyncio.sleep(fault["seconds"])
        if kind == "status":
            said = {"error": {"message": fault.get("body", "no"), **fault.get("error", {})}}
            return await self.send(writer, fault["status"], said, fault.get("headers", {}))
        if kind == "hang":
            await asyncio.sleep(3600)
        if kind == "drop":
            writer.close()
            return None
        if kind == "trickle":
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 100000\r\n\r\n")
            while True:
                writer.write(b" ")
                await writer.drain()
                await asyncio.sleep(fault["pause"])
        if kind == "flood":
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 1000000000\r\n\r\n")
            while True:
                self.flooded += 1 << 16
                writer.write(b" " * (1 << 16))
                await writer.drain()
        if kind == "malformed":
            return await self.send(writer, 200, '{"choices": [{"message": {"content": "cut off he')
        if kind == "html":
            return await self.send(writer, 200, "<html>\x1b[31m Welcome to nginx! </html>", {"Content-Type": "text/html"})
        if kind == "gzip":
            packed = gzip.compress(fault["reply"].encode() if "reply" in fault else b" " * 10_000_000)
            packed = fault["instead"].encode() if "instead" in fault else packed[: fault.get("cut")]
            return await self.send(writer, 200, packed, {"Content-Encoding": fault.get("encoding", "gzip")})
        if kind == "bytes":
            headers = {"Content-Encoding": fault["encoding"]} if fault.get("encoding") else {}
            return await self.send(writer, fault.get("status", 200), bytes.fromhex(fault["hex"]), headers)
        if kind == "bomb":
            return await self.send(writer, 200, '{"choices": ' + "[" * 60_000)
        if kind == "reply":
            return await self.send(writer, 200, fault["reply"])
        n = fault["choices"] if kind == "short" else data.get("n", 1)
        text = {"text": fault.get("content"), "big": "x" * fault.get("bytes", 0)}.get(kind, self.words(data) + fault.get("suffix", ""))
        finish = fault.get("finish", "stop")
        choices = [
            {
                "index": i,
                "message": {"role": "assistant", "content": text if i == 0 or kind not in ("ok", "slow", "suffix") else f"{text} #{i}"},
                "finish_reason": finish,
            }
            for i in range(n)
        ]
        for choice in choices:
            choice["message"]["reasoning_content"] = "thoughts that nobody should read"
        usage = {"prompt_tokens": 7, "completion_tokens": 3 * n, "total_tokens": 7 + 3 * n}
        return await self.send(writer, 200, {"id": "x", "object": "chat.completion", "choices": choices, "usage": usage})

    @staticmethod
    def words(data: dict[str, Any]) -> str:
        """What a well-behaved teacher would say: a summary where one is asked for, else the question and the seed."""
        asked = said_in(data["messages"][-1]["content"])
        if response := re.search(r"<response>\n(.*)\n</response>", asked, re.DOTALL):
            return f"<summary>{response[1][-40:]}</summary>"
        return f"{asked[:20]} seed {data.get('seed')}"

    @staticmethod
    async def send(writer: asyncio.StreamWriter, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        data = body if isinstance(body, bytes) else (body if isinstance(body, str) else json.dumps(body)).encode()
        fields = {"Content-Type": "application/json", "Content-Length": str(len(data))} | (headers or {})
        head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
        writer.write(f"HTTP/1.1 {status} Status\r\n{head}\r\n".encode() + data)
        await writer.drain()


async def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("port", type=int)
    parser.add_argument("--key", default="")
    parser.add_argument("--model", default="tiny")
    options = parser.parse_args()
    faulty = Faulty(options.key, options.model)
    server = await asyncio.start_server(faulty.serve, "127.0.0.1", options.port, limit=1 << 24)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, sys.exit)
    print("ready", flush=True)
    await server.serve_forever()


class Server:
    """A running fault server on a port of its own."""

    def __init__(self, key: str = "", model: str = "tiny") -> None:
        from ports import hold_port  # the server itself runs from this file alone

        self.port, self.key, self.model = hold_port(), key, model
        self.process: subprocess.Popen[str] | None = None
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def start(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-I", str(Path(__file__)), str(self.port), "--key", self.key, "--model", self.model],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            assert self.process.stdout is not None
            self.process.stdout.close()
            self.process = None

    def control(self, *faults: dict[str, Any], always: dict[str, Any] | None = None, reset: bool = True) -> None:
        self._call("/control", {"faults": list(faults), "always": always, "reset": reset})

    @property
    def log(self) -> list[dict[str, Any]]:
        """The chat requests so far, oldest first."""
        log: list[dict[str, Any]] = self._call("/log")["log"]
        return log

    @property
    def most_open(self) -> int:
        """Most chat requests that were under way at once."""
        return int(self._call("/log")["most_open"])

    @property
    def flooded(self) -> int:
        """Bytes of endless replies that somebody took, what the sockets hold included."""
        return int(self._call("/log")["flooded"])

    def wait_for(self, requests: int, seconds: float = 60.0) -> None:
        """Until so many chat requests have come."""
        end = time.monotonic() + seconds
        while len(self.log) < requests:
            assert time.monotonic() < end, f"{len(self.log)} of {requests} requests came"
            time.sleep(0.05)

    def _call(self, path: str, data: dict[str, Any] | None = None) -> dict[str, Any]:
        body = None if data is None else json.dumps(data).encode()
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(f"http://127.0.0.1:{self.port}{path}", body, timeout=30) as reply:
            result: dict[str, Any] = json.load(reply)
            return result


if __name__ == "__main__":
    asyncio.run(main())

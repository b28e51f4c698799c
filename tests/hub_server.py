"""A stand-in for the Hugging Face hub: as much of its HTTP interface as an upload and a small download by `huggingface_hub` need."""

from __future__ import annotations

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class HubServer:
    """Takes repositories and commits, keeps them, and gives their files.

    Attributes:
        repos: name -> whether it is private.
        files: name -> path -> content, after the commits.
        commits: (name, message).
        read: paths that were asked for.
        token: what must be sent.
        refuse: a path that begins with the key is answered with this status.
    """

    def __init__(self, token: str) -> None:
        self.repos: dict[str, bool] = {}
        self.files: dict[str, dict[str, bytes]] = {}
        self.commits: list[tuple[str, str]] = []
        self.read: list[str] = []
        self.token, self.refuse = token, dict[str, int]()
        self._large: dict[str, bytes] = {}
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None: ...

            def _body(self) -> bytes:
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))

            def _say(self, status: int, data: Any) -> None:
                text = json.dumps(data).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def do_POST(self) -> None:
                body = self._body()
                status = next((status for path, status in hub.refuse.items() if self.path.startswith(path)), 0)
                if self.headers.get("Authorization") != f"Bearer {hub.token}":
                    status = 401
                self._say(*((status, {"error": "refused"}) if status else hub.answer(self.path, body)))

            def do_HEAD(self) -> None:
                self.do_GET()

            def do_GET(self) -> None:
                hub.read.append(self.path)
                name, _, file = self.path.strip("/").partition("/resolve/main/")
                content = hub.files.get(name, {}).get(file)
                self.send_response(200 if content is not None else 404)
                if content is None:
                    self.send_header("X-Error-Code", "EntryNotFound" if name in hub.files else "RepoNotFound")
                self.send_header("X-Repo-Commit", "0" * 40)
                self.send_header("ETag", '"1"')
                self.send_header("Content-Length", str(len(content or b"")))
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(content or b"")

            def do_PUT(self) -> None:  # of large files
                hub._large[self.path.rpartition("/")[2]] = self._body()
                self._say(200, {})

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, path: str, body: bytes) -> tuple[int, Any]:
        """(status, reply) of a POST."""
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            self.repos.setdefault(name, bool(asked.get("private")) or asked.get("visibility") == "private")
            self.files.setdefault(name, {})
            return 200, {"url": f"{self.url}/{name}", "name": name}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        name = "/".join(path.removeprefix("/api/models/").split("/")[:2])
        if path.endswith("/preupload/main"):
            modes = [
                {"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular"}
                for f in json.loads(body)["files"]
            ]
            return 200, {"files": [mode | {"shouldIgnore": False} for mode in modes]}
        if path.endswith("/info/lfs/objects/batch"):
            asked = json.loads(body)
            objects = [o | {"actions": {"upload": {"href": f"{self.url}/large/{o['oid']}"}}} for o in asked["objects"]]
            return 200, {"transfer": "basic", "objects": objects}
        if path.endswith("/commit/main"):
            head, *rest = (json.loads(line) for line in body.splitlines())
            for line in rest:
                value = line["value"]
                content = self._large[value["oid"]] if line["key"] == "lfsFile" else base64.b64decode(value["content"])
                self.files[name][value["path"]] = content
            self.commits.append((name, head["value"]["summary"]))
            return 200, {"commitUrl": f"{self.url}/{name}/commit/{'0' * 40}", "commitOid": "0" * 40}
        return 404, {"error": f"no such path here: {path}"}

"""A stand-in for `vllm serve` with the development endpoints that TRL's client calls; real HTTP on a loopback port."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from vllm.distributed.weight_transfer.nccl_common import GROUP
from vllm.model import Model
from vllm.sampling_params import SamplingParams

KNOWN = {"model", "prompt", "return_token_ids", "return_tokens_as_token_ids"} | set(SamplingParams.__dataclass_fields__)


class Server:
    """Serves one checkpoint until `close`.

    Attributes:
        log: paths of all POST requests, in order;  bodies: those to /v1/completions.
    """

    def __init__(self, checkpoint: str, faults: set[str], *, max_model_len: int | None = None, mode: str = "processed_logprobs") -> None:
        self.model, self.faults = Model(checkpoint, max_model_len, faults), faults
        self.mode, self.log, self.bodies = mode, [], []
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"server_of": self}))
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()

    def get(self, path: str) -> Any:
        return {
            "/health": {},
            "/v1/models": {"data": [{"id": "student"}]},
            "/get_world_size": {"world_size": 1},
            "/server_info": {
                "vllm_config": {
                    "weight_transfer_config": {"backend": "nccl"},
                    "model_config": {"logprobs_mode": self.mode, "max_model_len": self.model.context},
                }
            },
        }.get(path)

    def post(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        self.log.append(path)
        if path == "/v1/completions":
            return self._completions(body)
        if path == "/update_weights":
            info = body["update_info"]
            assert len(info["names"]) == len(info["dtype_names"]) == len(info["shapes"])
            self.model.load([(name, GROUP.get(timeout=30)) for name in info["names"]])
        return 200, {"success": True}

    def _completions(self, body: dict[str, Any]) -> tuple[int, Any]:
        self.bodies.append(body)
        if unknown := set(body) - KNOWN:
            return 400, {"error": f"unknown fields {sorted(unknown)}"}
        fields = {k: v for k, v in body.items() if k in SamplingParams.__dataclass_fields__}
        fields["logit_bias"] = {int(k): v for k, v in (fields.get("logit_bias") or {}).items()}
        how = SamplingParams(**fields)
        if any(len(prompt) + how.max_tokens > self.model.context for prompt in body["prompt"]):
            return 400, {"error": f"This model's maximum context length is {self.model.context} tokens."}
        prompts = [prompt for prompt in body["prompt"] for _ in range(how.n)]
        return 200, {
            "choices": [
                {
                    "prompt_token_ids": prompt,
                    "token_ids": tokens,
                    "logprobs": {
                        "tokens": [f"token_id:{token}" for token in tokens],
                        "token_logprobs": [line[token].logprob for token, line in zip(tokens, lines, strict=True)],
                        "top_logprobs": [{f"token_id:{token}": line[token].logprob} for token, line in zip(tokens, lines, strict=True)],
                    },
                }
                for prompt, (tokens, lines) in zip(prompts, self.model.generate(prompts, how), strict=True)
            ]
        }


class _Handler(BaseHTTPRequestHandler):
    server_of: Server
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        found = self.server_of.get(self.path.partition("?")[0])
        self._answer(404 if found is None else 200, found)

    def do_POST(self) -> None:
        raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        try:
            self._answer(*self.server_of.post(self.path, json.loads(raw or b"{}")))
        except Exception as error:
            self._answer(400, {"error": repr(error)})

    def _answer(self, status: int, value: Any) -> None:
        raw = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def log_message(self, *_: Any) -> None:
        """Quiet."""

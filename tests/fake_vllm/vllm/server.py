"""A stand-in for `vllm serve` in development mode; real HTTP on a loopback port. `faults` and `change` make it go wrong on purpose."""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from queue import Queue
from typing import Any

from PIL import Image
from safetensors.torch import load_file

from vllm.distributed.weight_transfer.factory import GROUP
from vllm.model import Model
from vllm.sampling_params import SamplingParams

KNOWN = {"model", "prompt", "return_token_ids", "return_tokens_as_token_ids"} | set(SamplingParams.__dataclass_fields__)
CONTROL = ("/reset_prefix_cache", "/reset_encoder_cache", "/start_weight_update")


class Server:
    """Serves one checkpoint until `close`.

    Attributes:
        log: paths of all POST requests, in order;  bodies: those that asked for rollouts.
        change: what becomes of a reply with a rollout before it is sent.
        refused: how many more such requests are answered with status 503.
        most_open: rollouts that were asked for at once.
    """

    def __init__(self, checkpoint: str, faults: set[str], *, max_model_len: int | None = None, mode: str = "processed_logprobs") -> None:
        self.model, self.faults = Model(checkpoint, max_model_len, faults), faults
        self.mode, self.log, self.bodies, self.version = mode, [], [], "default"
        self.change: Callable[[dict[str, Any]], Any] = lambda reply: reply
        self.refused = self.open = self.most_open = self.rank = 0
        self._turn = threading.Lock()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"server_of": self}))
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()

    def get(self, path: str) -> Any:
        if "not in development mode" in self.faults and path not in ("/health", "/v1/models"):
            return None
        return {
            "/health": {},
            "/v1/models": {"data": [{"id": "student"}]},
            "/get_world_size": {"world_size": 1},
            "/weight_info": {"weight_version": self.version},
            "/server_info": {
                "vllm_config": {
                    "weight_transfer_config": {"backend": "nccl"},
                    "scheduler_config": {"max_num_seqs": 5},
                    "model_config": {"logprobs_mode": self.mode, "max_model_len": self.model.context, "dtype": "torch.float32"},
                }
            },
        }.get(path)

    def post(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        with self._turn:
            self.log.append(path)
        if path in ("/v1/completions", "/inference/v1/generate"):
            return self._rollout(path, body)
        if path == "/init_weight_transfer_engine":
            self.rank = body["init_info"]["rank_offset"]
            GROUP[self.rank] = Queue()
        elif path == "/update_weights":
            if "no memory" in self.faults:
                return 500, {"error": "CUDA out of memory"}
            info = body["update_info"]
            assert len(info["names"]) == len(info["dtype_names"]) == len(info["shapes"])
            self.model.load([(name, GROUP[self.rank].get(timeout=30)) for name in info["names"]])
        elif path == "/collective_rpc":
            assert body["method"] == "reload_weights"
            files = sorted(Path(body["kwargs"]["weights_path"]).glob("*.safetensors"))
            assert files, "no weights"
            for file in files:
                self.model.load(load_file(file).items())
        elif path in ("/finish_weight_update", "/update_weight_version"):
            self.version = body.get("weight_version") or body["new_version"]
        elif path not in CONTROL:
            return 404, {"error": path}
        return 200, {"success": True}

    def _rollout(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        with self._turn:
            self.bodies.append(body)
            self.open += 1
            self.most_open = max(self.most_open, self.open)
            self.refused -= 1
        try:
            return (503, {"error": "busy"}) if self.refused >= 0 else self._sampled(path, body)
        finally:
            with self._turn:
                self.open -= 1

    def _sampled(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        parts = path.startswith("/inference")
        given, ids = (body["sampling_params"], body["token_ids"]) if parts else (body, body["prompt"])
        if unknown := set(given) - KNOWN:
            return 400, {"error": f"unknown fields {sorted(unknown)}"}
        fields = {k: v for k, v in given.items() if k in SamplingParams.__dataclass_fields__}
        fields["logit_bias"] = {int(k): v for k, v in (fields.get("logit_bias") or {}).items()}
        how, pictures = SamplingParams(**fields), [_picture(part) for part in body.get("content_parts", ())]
        ids = self.model.expanded(ids, pictures)
        if len(ids) + how.max_tokens > self.model.context:
            return 400, {"error": f"This model's maximum context length is {self.model.context} tokens."}
        ((tokens, lines),) = self.model.generate([ids], how, [pictures or None])
        own = [line[token].logprob for token, line in zip(tokens, lines, strict=True)]
        reason = "stop" if tokens[-1] in (how.stop_token_ids or ()) else "length"
        choice: dict[str, Any] = {"token_ids": tokens, "finish_reason": reason}
        if parts:
            choice["logprobs"] = {"content": [{"logprob": each} for each in own]}
            return 200, self.change({"choices": [choice], "prompt_token_ids": ids})
        choice |= {"logprobs": {"tokens": [f"token_id:{token}" for token in tokens], "token_logprobs": own}, "prompt_token_ids": ids}
        return 200, self.change({"choices": [choice]})


def _picture(part: dict[str, str]) -> Image.Image:
    assert part["type"] == "image_url"
    return Image.open(io.BytesIO(base64.b64decode(part["url"].removeprefix("data:image/png;base64,"))))


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
        raw = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(raw)))
        with suppress(ConnectionError):  # whoever asked has gone
            self.end_headers()
            self.wfile.write(raw)

    def log_message(self, *_: Any) -> None:
        """Quiet."""

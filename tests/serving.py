"""What the tests of the server share: a tiny model behind it, engines that can be watched, and how to ask."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import uvicorn
from starlette.testclient import TestClient

from conftest import make_tiny
from zppo.engines.base import Completion, SampleRequest, Sampling
from zppo.engines.chat import Chat
from zppo.engines.transformers import TransformersEngine
from zppo.serve.batcher import Batcher
from zppo.serve.command import load
from zppo.serve.protocol import LockedChat, RequestImages
from zppo.serve.server import ChatServer, make_app

CONTEXT = 192
URL = "/v1/chat/completions"
QUESTION = {"role": "user", "content": "What is 3 plus 4?"}


class Counting:
    """Passes on to a real engine and notes each batch."""

    def __init__(self, engine: TransformersEngine) -> None:
        self.engine, self.steps = engine, 0
        self.batches: list[tuple[int, Sampling]] = []
        engine.model.register_forward_pre_hook(lambda *_: self.step())

    def step(self) -> None:
        self.steps += 1

    def sample(self, requests: Sequence[SampleRequest], sampling: Sampling) -> list[list[Completion]]:
        self.batches.append((len(requests), sampling))
        return self.engine.sample(requests, sampling)


class Gate:
    """An engine that waits to be let on; prompts of the given length fail."""

    def __init__(self, poison: int = -1) -> None:
        self.open, self.entered, self.poison = threading.Event(), threading.Event(), poison
        self.batches: list[list[int]] = []
        self.check = lambda: None

    def sample(self, requests: Sequence[SampleRequest], sampling: Sampling) -> list[list[Completion]]:
        self.entered.set()
        while not self.open.wait(0.005):
            self.check()
        self.batches.append([len(request.prompt_ids) for request in requests])
        if any(len(request.prompt_ids) == self.poison for request in requests):
            raise torch.OutOfMemoryError("no room for the cache")
        one = Completion(torch.tensor([5]), torch.tensor([-0.5]), False, 0.0)
        return [[one] * len(request.keys) for request in requests]


def service(engine: Any, chat: Chat, *, max_rows: int = 64, max_queue: int = 100, **fields: Any) -> ChatServer:
    batcher = Batcher(engine, max_rows=max_rows, max_queue=max_queue)
    if isinstance(own_engine := getattr(engine, "engine", engine), TransformersEngine):
        own_engine.watch = batcher.watch
    pictures = RequestImages(Path("unused"), 16, "" if chat.image_processor else "this model reads text only")
    own: dict[str, Any] = {"model": "tiny", "words": LockedChat(chat), "batcher": batcher, "pictures": pictures, "context": CONTEXT}
    return ChatServer(**own | fields)


def connect(served: ChatServer) -> TestClient:
    return TestClient(make_app(served), base_url="http://127.0.0.1:8000")


def ask(client: TestClient, status: int = 200, **fields: Any) -> dict[str, Any]:
    answer = client.post(URL, json={"model": "tiny", "messages": [QUESTION], "max_tokens": 8} | fields)
    assert answer.status_code == status, answer.text
    body: dict[str, Any] = answer.json()
    return body


def texts(answer: dict[str, Any]) -> list[str]:
    return [choice["message"]["content"] for choice in answer["choices"]]


def wait_for(condition: Callable[[], bool], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)


def make_served(folder: Path) -> tuple[Counting, Chat]:
    """A tiny model with a small context."""
    path = make_tiny(folder, max_position_embeddings=CONTEXT)
    return Counting(load(str(path), device="cpu", max_rows=64).engine), Chat.load(str(path))


@contextmanager
def listening(path: Path, key: str, **fields: Any) -> Iterator[str]:
    """The address of a server of a checkpoint, in a thread of this process."""
    loaded = load(str(path), device="cpu", max_rows=64)
    listening.engine = loaded.engine  # type: ignore[attr-defined]
    own = service(loaded.engine, loaded.chat, key=key, context=loaded.engine.context, **fields)
    server = uvicorn.Server(uvicorn.Config(make_app(own), log_config=None, lifespan="off", ws="none"))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        finally:
            server.should_exit = True
            thread.join()
            own.batcher.close(30)


@contextmanager
def connected(engine: Any, chat: Chat, **fields: Any) -> Iterator[TestClient]:
    """A client of a server that ends with the block."""
    served = service(engine, chat, **fields)
    with connect(served) as client:
        yield client
    served.batcher.close(30)
    if isinstance(own_engine := getattr(engine, "engine", engine), TransformersEngine):
        own_engine.watch = None

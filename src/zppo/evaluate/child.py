"""A checkpoint, served for the time of an evaluation by a process of its own that always ends with it."""

from __future__ import annotations

import importlib.util
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from zppo.errors import EvaluationError
from zppo.evaluate.folder import opened

READY = 1800.0  # seconds: large models load and compile slowly
GRACE = 40.0  # seconds between the request to end and the end
KEY = "ZPPO_EVAL_SERVER_KEY"
NAME = "evaluated"
_SHOWN = 1500  # characters of a log that an error repeats
# Linux ends the server when this process dies in whatever way; elsewhere the block's end must do.
_DIES_WITH_US = """
import ctypes, os, sys
parent = int(sys.argv[1])
try:
    ctypes.CDLL(None).prctl(1, 15)
except (AttributeError, OSError):
    pass
if os.getppid() == parent:
    os.execvp(sys.argv[2], sys.argv[2:])
"""


@dataclass(frozen=True, slots=True)
class Server:
    """A server that can be asked; its key is in no printed form of it."""

    url: str
    key: str = field(repr=False)
    kind: str


def has_vllm() -> bool:
    """Whether vLLM is installed."""
    return importlib.util.find_spec("vllm") is not None


def command_of(folder: Path, port: int, vllm: bool, images: int) -> list[str]:
    """How the server is started; keys come through the environment alone."""
    if vllm:
        serve = ["vllm.entrypoints.openai.api_server", "--model", str(folder), "--served-model-name", NAME]
        serve += ["--generation-config", "vllm"]
        if _sees(folder):  # refused for models that read text only
            serve += ["--limit-mm-per-prompt", f'{{"image": {images}, "video": 1}}']
    else:
        serve = ["zppo", "serve", str(folder), "--name", NAME, "--key-env", KEY]
        serve += ["--max-images", str(images), "--max-body", "256"]
    return [sys.executable, "-m", *serve, "--host", "127.0.0.1", "--port", str(port)]


def _sees(folder: Path) -> bool:
    try:
        return "vision_config" in json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):  # the server says what is wrong with it
        return False


@contextmanager
def served(
    folder: Path, log: Path, *, images: int, deadline: float = READY, vllm: bool | None = None
) -> Iterator[Server]:
    """A server of a checkpoint for the time of the block, by vLLM where it is installed, else by `zppo serve`.

    Args:
        log: takes what the server says.
        images: most images of a request.
        deadline: seconds until it must answer.

    Raises:
        EvaluationError: it ended or did not answer in time; the message repeats the end of its log.
    """
    vllm = has_vllm() if vllm is None else vllm
    port, key = _free_port(), secrets.token_urlsafe(24)
    environment = os.environ | {KEY: key} | ({"VLLM_API_KEY": key} if vllm else {})
    command = [sys.executable, "-c", _DIES_WITH_US, str(os.getpid()), *command_of(folder, port, vllm, images)]
    with opened(log, "wb") as out:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
    try:
        url = f"http://127.0.0.1:{port}"
        _await_ready(process, f"{url}/health", log, deadline)
        yield Server(f"{url}/v1", key, "vllm" if vllm else "zppo")
    finally:
        _end(process)


def _await_ready(process: subprocess.Popen[bytes], url: str, log: Path, deadline: float) -> None:
    end = time.monotonic() + deadline
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while True:
        if process.poll() is not None:
            raise EvaluationError(
                f"the server of the checkpoint ended with status {process.returncode} before it answered; its log {log} ends "
                f"with: {_tail(log)}"
            )
        with suppress(urllib.error.URLError, OSError), opener.open(url, timeout=5) as answer:
            if answer.status == 200:
                return
        if time.monotonic() > end:
            raise EvaluationError(
                f"the server of the checkpoint did not answer within {deadline:g} s; its log {log} ends with: {_tail(log)}"
            )
        time.sleep(0.3)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends the server and what it started: asked first, then by force."""
    for sign, patience in ((signal.SIGTERM, GRACE), (signal.SIGKILL, GRACE)):
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, sign)
        with suppress(subprocess.TimeoutExpired):
            process.wait(patience)
            if sign is signal.SIGTERM:
                continue  # its helpers may live on; a group without members takes the second signal without harm
        if process.returncode is not None:
            return


def _tail(log: Path) -> str:
    try:
        text = log.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return "(it cannot be read)"
    return " ".join(text[-_SHOWN:].split()) or "(nothing)"


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])

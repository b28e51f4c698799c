"""The servers of an evaluation: keys, names of models, and whether they answer at all, before the first question is asked.

A checkpoint is served for the time of an evaluation by a process of its own that always ends with it.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple
from urllib.parse import urlsplit

from zppo.config.recipe import load_recipe
from zppo.errors import EvaluationError, SettingsError
from zppo.evals.options import run_of
from zppo.evals.results import opened
from zppo.images.store import PixelLimits
from zppo.runs.files import writing
from zppo.teacher.http import PAYMENT, REPLY_BYTES, Trouble, Wire

_PATIENCE = 60.0  # seconds for the first answer


class EndpointModel(NamedTuple):
    """A model that answers.

    Attributes:
        context: tokens of prompt and answer together; None where the server does not say.
    """

    name: str
    context: int | None


def is_url(model: str) -> bool:
    """Whether this is an address, and no folder."""
    return urlsplit(model).scheme in ("http", "https")


def read_model_key(variable: str | None, flag: str) -> str:
    """The key in an environment variable, "" where none is named. Its value appears in no message.

    Raises:
        SettingsError: it is not set, or is no key.
    """
    if not variable:
        return ""
    key = os.environ.get(variable, "").strip()
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        cause = "holds spaces or characters that no key has" if key else "is not set or empty"
        raise SettingsError(f"{flag}: the environment variable {variable} {cause}; put the server's key there")
    return key


def find_model(url: str, key: str, name: str | None, what: Literal["model", "judge"]) -> EndpointModel:
    """The model to ask a server for, after it has answered a small request.

    Args:
        what: decides which options the messages name.

    Raises:
        SettingsError: the address is none, or the server has several models and none is named.
        EvaluationError: it cannot be reached, or refuses key or model.
    """
    if not is_url(url) or not urlsplit(url).hostname:
        raise SettingsError(f"the {what}'s address {url!r} is no URL; write http://HOST:PORT/v1")
    return asyncio.run(_find(url, key, name, what))


def find_models(
    text: str, key: str, name: str | None, what: Literal["model", "judge"], tell: Callable[[str], None]
) -> tuple[EndpointModel, tuple[str, ...]]:
    """The model of one or several addresses, with commas, and those of them that answer; its context is the smallest of theirs.

    Args:
        tell: takes which of them cannot be asked while another can.

    Raises:
        SettingsError, EvaluationError: as `find_model`, the second where none can be asked; or they serve different models.
    """
    found: dict[str, EndpointModel] = {}
    failed: list[EvaluationError] = []
    for url in (part.strip() for part in text.split(",")):
        try:
            found[url] = find_model(url, key, name, what)
        except EvaluationError as error:
            failed.append(error)
    if not found:
        raise failed[0]
    if len({model.name for model in found.values()}) > 1:
        served = ", ".join(f"{url}: {model.name}" for url, model in found.items())
        raise SettingsError(f"the {what}'s addresses serve different models ({served}); name addresses of one model")
    for failure in failed:
        tell(f"{failure}; it goes on without this address")
    contexts = [model.context for model in found.values() if model.context is not None]
    return EndpointModel(next(iter(found.values())).name, min(contexts, default=None)), tuple(found)


async def _find(url: str, key: str, name: str | None, what: Literal["model", "judge"]) -> EndpointModel:
    name_flag, key_flag = ("--model", "--key-env") if what == "model" else ("--judge-model", "--judge-key-env")
    wire = Wire(url, key, _PATIENCE, 1)
    try:
        contexts = await wire.contexts()
        served = list(contexts)
        if name is None and len(served) > 1:
            raise SettingsError(f"{url} serves {', '.join(served[:10])}: name one with {name_flag}")
        if name is not None and served and name not in served:
            raise SettingsError(f"{url} does not serve {name!r}; it serves {', '.join(served[:10])}: correct {name_flag}")
        chosen = name or (served[0] if served else "default")
        body = {"model": chosen, "messages": [{"role": "user", "content": "Say ok."}], "max_tokens": 16}
        try:
            await wire.chat(body, REPLY_BYTES)
        except Trouble as trouble:
            if trouble.status in (401, 403):
                mend = "its key is refused: " if key else ""
                mend += f"name the environment variable that holds {'a valid one' if key else 'its key'} with {key_flag}"
            elif trouble.moved:
                mend = "if that is where it lives, write that address"
            elif trouble.status == PAYMENT and not key:
                mend = f"it wants to be paid: name the environment variable that holds the key of an account with {key_flag}"
            elif trouble.status == PAYMENT:
                mend = "its account has no credit left: top it up, or name another server"
            elif trouble.status is None:
                mend = "start the server, or correct the address"
            elif trouble.again:
                mend = "it is there, and busy or out of order: try again when it serves, or correct the address (it mostly ends in /v1)"
            else:
                mend = f"correct the address (it mostly ends in /v1), or name the model with {name_flag}"
            raise EvaluationError(f"the {what} cannot be asked ({trouble.reason}): {mend}") from None
        return EndpointModel(chosen, contexts.get(chosen))
    finally:
        await wire.close()


def check_context(context: int | None, max_tokens: int) -> None:
    """Whether an answer of the wanted length and a question fit together. SettingsError where no question can."""
    if context is not None and context <= max_tokens:
        raise SettingsError(
            f"the model's context holds {context:,} tokens and answers may have {max_tokens:,}, which leaves no room for a question: every "
            "one would be refused; serve the model with a longer context, or leave the protocol with a smaller --max-tokens"
        )


@dataclass
class Thoughts:
    """Whether a server's prompts end inside an open think block, as its replies tell: they close one that they never opened.

    Replies that were cut say nothing. One stray tag is no evidence: half of the others must have it.
    """

    whole: int = 0
    closing: int = 0

    def note(self, text: str, finish: str) -> None:
        """A reply and why it ended."""
        if finish == "stop":
            before, tag, _ = text.partition("</think>")
            self.whole += 1
            self.closing += bool(tag) and "<think>" not in before

    @property
    def opened(self) -> bool:
        return self.closing > 0 and 2 * self.closing >= self.whole


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
    """A server that can be asked, at one address or several; its key is in no printed form of it."""

    urls: tuple[str, ...]
    key: str = field(repr=False)
    kind: str


def has_vllm() -> bool:
    """Whether vLLM is installed."""
    return importlib.util.find_spec("vllm") is not None


def command_of(folder: Path, port: int, vllm: bool, images: int, arguments: Sequence[str] = ()) -> list[str]:
    """How the server is started; keys come through the environment alone. `arguments` are vLLM's, and win over ours."""
    if vllm:
        serve = ["vllm.entrypoints.openai.api_server", "--model", str(folder), "--served-model-name", NAME]
        serve += ["--generation-config", "vllm"]
        if _sees(folder):  # refused for models that read text only
            serve += ["--limit-mm-per-prompt", f'{{"image": {images}, "video": 1}}']
        serve += arguments
    else:
        serve = ["zppo", "serve", str(folder), "--name", NAME, "--key-env", KEY]
        serve += ["--max-images", str(images), "--max-body", "256"]
    return [sys.executable, "-m", *serve, "--host", "127.0.0.1", "--port", str(port)]


def _sees(folder: Path) -> bool:
    try:
        return "vision_config" in json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):  # the server says what is wrong with it
        return False


def whole_checkpoint(place: Path, into: Path) -> Path:
    """The folder of a checkpoint that can be served: its own, or of one in a run's checkpoints/, which is weights alone, a new one.

    Args:
        into: the new one: links to the weights, and tokenizer, chat template and image processor that the run trains with.

    Raises:
        ModelError, SettingsError: these cannot be loaded.
        StorageError: the folder cannot be written.
    """
    run = run_of(place)
    if run is None or (place / "tokenizer_config.json").is_file():
        return place
    # Loads transformers, which no server needs here.
    from zppo.models.student_model import load_chat

    chat = load_chat(load_recipe(run / "recipe.yaml").student, PixelLimits() if _sees(place) else None)
    with writing(into):
        shutil.rmtree(into, ignore_errors=True)
        into.mkdir(parents=True)
        for path in place.absolute().iterdir():
            (into / path.name).symlink_to(path)
        chat.tokenizer.chat_template = chat.template
        chat.tokenizer.save_pretrained(into)
        for name, content in chat.image_processor.files.items() if chat.image_processor is not None else ():
            (into / name).write_bytes(content)
    return into


@contextmanager
def served(
    folder: Path, log: Path, *, images: int, deadline: float = READY, vllm: bool | None = None, arguments: Sequence[str] = ()
) -> Iterator[Server]:
    """A server of a checkpoint for the time of the block, by vLLM where it is installed, else by `zppo serve`.

    Args:
        log: takes what the server says.
        images: most images of a request.
        deadline: seconds until it must answer.
        arguments: of vLLM.

    Raises:
        EvaluationError: it ended or did not answer in time; the message repeats the end of its log.
    """
    vllm = has_vllm() if vllm is None else vllm
    port, key = _free_port(), secrets.token_urlsafe(24)
    environment = os.environ | {KEY: key} | ({"VLLM_API_KEY": key} if vllm else {})
    command = [sys.executable, "-c", _DIES_WITH_US, str(os.getpid()), *command_of(folder, port, vllm, images, arguments)]
    with opened(log, "wb") as out:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
    try:
        url = f"http://127.0.0.1:{port}"
        _await_ready(process, f"{url}/health", log, deadline)
        yield Server((f"{url}/v1",), key, "vllm" if vllm else "zppo")
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

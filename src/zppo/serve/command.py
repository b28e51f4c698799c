"""The process of `zppo serve`: socket, key, model, signals."""

from __future__ import annotations

import argparse
import asyncio
import ipaddress
import json
import logging
import os
import socket
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType
from typing import Any

import torch
import uvicorn

from zppo.engines.chat import Chat
from zppo.engines.image_check import check_image_input
from zppo.engines.loading import load_network, reads_images
from zppo.engines.transformers import TransformersEngine
from zppo.errors import ModelError, SettingsError, one_line
from zppo.images.processor import PixelCache
from zppo.images.store import PixelLimits
from zppo.names import check_file, checkpoint_folder
from zppo.serve.batcher import Batcher
from zppo.serve.protocol import LockedChat, RequestImages
from zppo.serve.server import ChatServer, make_app

_LOG = logging.getLogger("zppo.serve")
_GRACE = 30  # seconds that running requests get at the end
_LAST_WORDS = 10  # seconds in which those that did not end are answered
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_CACHE = 1 << 28  # bytes of preprocessed pictures that are kept for requests that show them again


def serve(options: argparse.Namespace) -> None:
    """Serves until SIGINT or SIGTERM. The first line on stdout is the address, once it can be used.

    Args:
        options: of `zppo serve`; `zppo.cli` says what each of them is.

    Raises:
        ZPPOError: what is wrong with the options, the key, the port or the model; all but the model are looked at before it is loaded.
    """
    _check_limits(options)
    key = read_server_key(options)
    with ExitStack() as stack:
        listener = stack.enter_context(open_socket(options.host, options.port))
        loopback = ipaddress.ip_address(listener.getsockname()[0].partition("%")[0]).is_loopback  # only this machine can reach it
        if not loopback and key is None and not options.no_key:
            raise SettingsError(
                f"--host {options.host} lets other machines in, and the server has no key: name the environment variable that holds one "
                "with --key-env (or a file with --key-file), or let everybody in with --no-key"
            )
        checkpoint = checkpoint_of(options.model)
        loaded = load(
            checkpoint,
            revision=options.revision,
            device=options.device,
            dtype=options.dtype,
            max_rows=options.max_rows,
            max_tokens=options.max_batch_tokens,
            images=_pixel_limits(options, checkpoint) if options.max_images else None,
        )
        folder = stack.enter_context(TemporaryDirectory(prefix="zppo-serve-"))
        batcher = Batcher(loaded.engine, max_rows=options.max_rows, max_tokens=options.max_batch_tokens, max_queue=options.max_queue)
        loaded.engine.watch = batcher.watch
        service = ChatServer(
            model=options.name or options.model,
            words=LockedChat(loaded.chat),
            batcher=batcher,
            pictures=RequestImages(Path(folder), options.max_images, loaded.text_only),
            context=loaded.engine.context,
            key=key,
            loopback=loopback,
            max_body=options.max_body << 20,
        )
        named = json.dumps(service.model, ensure_ascii=False)
        what = f'requests send "model": {named}; on {loaded.engine.model.device}, context {service.context}; Ctrl-C ends'
        try:
            _Server(service, f"http://{_address(listener)}/v1", what).run(sockets=[listener])
        finally:
            batcher.close(_GRACE)


def read_server_key(options: argparse.Namespace) -> str | None:
    """The key that clients must send, from an environment variable or a file; None without either.

    Raises:
        SettingsError: both are named, or the key is missing, empty or no plain text. The key itself is never shown.
    """
    if options.key_env and options.key_file:
        raise SettingsError("--key-env and --key-file both name a key: give one of them")
    if options.key_env:
        key, where = os.environ.get(options.key_env, ""), f"the environment variable {options.key_env}"
    elif options.key_file:
        where = f"the file {options.key_file}"
        check_file(options.key_file, SettingsError)
        try:
            key = options.key_file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise SettingsError(f"--key-file: {where} cannot be read: {error}") from None
    else:
        return None
    key = key.strip()
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        cause = "is not one word of printable ASCII" if key else "is not set or empty"
        raise SettingsError(f"{where} {cause}: put the key that clients shall send there")
    return key


def open_socket(host: str, port: int) -> socket.socket:
    """A bound socket that does not listen yet.

    Raises:
        SettingsError: the address cannot be had.
    """
    try:
        if not 0 <= port < 1 << 16:
            raise OverflowError("ports are numbers from 0 to 65535")
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except BaseException:
            listener.close()
            raise
    except (OSError, OverflowError, UnicodeError) as error:
        raise SettingsError(
            f"port {port} of {host!r} cannot be used ({error}): choose another one with --port, or an address of this machine with --host"
        ) from None
    return listener


def _address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _check_limits(options: argparse.Namespace) -> None:
    limits = {
        "--max-rows": options.max_rows,
        "--max-batch-tokens": options.max_batch_tokens,
        "--max-queue": options.max_queue,
        "--max-body": options.max_body,
        "--min-pixels": options.min_pixels,
        "--max-pixels": options.max_pixels,
    }
    for flag, value in limits.items():
        if value is not None and value < 1:
            raise SettingsError(f"{flag} is {value}: it must be 1 or more")
    if options.max_images < 0:
        raise SettingsError(f"--max-images is {options.max_images}: it must be 0 or more")
    if options.min_pixels and options.max_pixels and options.min_pixels > options.max_pixels:
        raise SettingsError(f"--min-pixels is {options.min_pixels}, more than --max-pixels, {options.max_pixels}: exchange them")


def _pixel_limits(options: argparse.Namespace, checkpoint: str) -> PixelLimits:
    """What the options say; else the usual limits, or the checkpoint's own where its pictures are smaller (the lab's are)."""
    limits = PixelLimits()
    try:
        size = json.loads((Path(checkpoint) / "preprocessor_config.json").read_text(encoding="utf-8"))["size"]
        own = PixelLimits(size["shortest_edge"], size["longest_edge"])  # so the Qwen family calls the least and the most pixels
        if 0 < own.min_pixels <= own.max_pixels < limits.min_pixels:
            limits = own
    except (OSError, ValueError, KeyError, TypeError):  # on the hub, or of another family
        pass
    given = PixelLimits(options.min_pixels or limits.min_pixels, options.max_pixels or limits.max_pixels)
    # One that is given moves the other where they would cross.
    return PixelLimits(min(given), given.max_pixels) if options.max_pixels else PixelLimits(given.min_pixels, max(given))


class _Server(uvicorn.Server):
    """Prints its address once it listens; ends after running requests, or at once at the second signal."""

    def __init__(self, service: ChatServer, url: str, what: str) -> None:
        super().__init__(
            uvicorn.Config(
                make_app(service),
                log_config=None,
                access_log=False,
                proxy_headers=False,
                server_header=False,
                lifespan="off",
                ws="none",
                timeout_graceful_shutdown=_GRACE + _LAST_WORDS,
            )
        )
        self._batcher, self._url, self._what = service.batcher, url, what

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        print(self._url, flush=True)
        print(f"serving: {self._what}", file=sys.stderr, flush=True)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if count := sum(self._batcher.load):
            print(f"finishing {count} requests (once more ends at once)", file=sys.stderr, flush=True)
        # What has not ended by then is answered with 503; uvicorn would cancel it, and the client would see a broken connection.
        asyncio.get_running_loop().call_later(_GRACE, self._batcher.stop)
        await super().shutdown(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # uvicorn would raise the signal again at the end; here an asked-for end is a good one.
        if self.should_exit:
            self.force_exit = True
            self._batcher.stop()
        self.should_exit = True


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A frozen model, ready to sample.

    Attributes:
        text_only: why it takes no images; "" where it does.
    """

    engine: TransformersEngine
    chat: Chat
    text_only: str


def checkpoint_of(model: str) -> str:
    """What `from_pretrained` takes: a run folder's final/, any other folder, or a name on the hub.

    Raises:
        ModelError: a run that has not finished; a path to nothing.
    """
    found = checkpoint_folder(model)
    folder = Path(found)
    if (folder / "recipe.yaml").is_file() and not (folder / "config.json").is_file():
        raise ModelError(
            f"the run {model!r} has no final/ yet, the student that it leaves at its end: let it finish "
            f"(`zppo resume {model}`), or name another checkpoint"
        )
    if not folder.exists() and (model.startswith((".", "/", "~")) or model.count("/") > 1):
        raise ModelError(f"there is no folder {model!r}: name a checkpoint, a finished run, or a model on the hub")
    return found


def load(
    checkpoint: str,
    *,
    revision: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    max_rows: int | None = None,
    max_tokens: int | None = None,
    images: PixelLimits | None = None,
) -> ServedModel:
    """A frozen model of `transformers` with its chat.

    Args:
        device: auto takes a GPU where there is one.
        dtype: of the weights, a name in `DTYPES`; auto takes float32 on a CPU, else what the checkpoint is stored in.
        max_rows, max_tokens: limits of a batch, as in `TransformersEngine`.
        images: bring pictures into these limits, where the checkpoint reads any; None for text only.

    Raises:
        ModelError: what cannot be loaded, and why.
    """
    try:
        place = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    except RuntimeError as error:
        raise ModelError(f"--device {device} is no device: {one_line(error)}") from None
    stored: Any = DTYPES.get(dtype) or (torch.float32 if place.type == "cpu" else "auto")
    vision = images is not None and reads_images(checkpoint, revision)
    try:
        network: Any = load_network(checkpoint, dtype=stored, revision=revision, images=vision, device_map=place).requires_grad_(False)
    except ModelError:
        raise
    except Exception as error:  # many kinds: no room on the device, a device that is not there
        raise ModelError(
            f"model {checkpoint!r} cannot be loaded on {place}: {one_line(error)}; choose another --device or --dtype"
        ) from error
    network.eval()
    chat, text_only = _load_chat(checkpoint, revision, images if vision else None)
    engine = TransformersEngine(
        network,
        chat.eos_ids(network),
        chat.pad_id(network),
        chat.banned_ids(network),
        max_rows=max_rows,
        max_tokens=max_tokens,
        image_processor=chat.image_processor,
    )
    if not text_only:
        try:
            check_image_input(engine, chat, checkpoint)
        except ModelError as error:
            raise ModelError(f"{one_line(error)}; or serve it for text alone with --max-images 0") from error
    return ServedModel(engine, chat, text_only)


def _load_chat(checkpoint: str, revision: str | None, images: PixelLimits | None) -> tuple[Chat, str]:
    """The chat, and why it shows no images. A checkpoint whose image processor cannot be used is served for text [zppo]."""
    if images is None:
        return Chat.load(checkpoint, revision=revision), "this model reads text only"
    try:
        return Chat.load(checkpoint, revision=revision, images=images, cache=PixelCache(_CACHE)), ""
    except ModelError as error:
        chat = Chat.load(checkpoint, revision=revision)
        _LOG.warning("images are refused: %s", error)
        return chat, f"this model cannot be shown images here ({one_line(error, 200)})"

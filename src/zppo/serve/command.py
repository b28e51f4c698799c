"""What `zppo serve` takes on the command line. The work is imported when it runs.

The server process: socket, model, signals.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType

import uvicorn

from zppo.errors import SettingsError
from zppo.images.store import PixelLimits
from zppo.serve.batcher import Batcher
from zppo.serve.model import checkpoint_of, load
from zppo.serve.protocol import Pictures, Words
from zppo.serve.server import Service, make_app

_GRACE = 30  # seconds that running requests get at the end


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """What the command line gives; its help says what each of them is."""

    model: str
    host: str
    port: int
    name: str | None
    revision: str | None
    device: str
    dtype: str
    key_env: str | None
    key_file: Path | None
    no_key: bool
    max_rows: int
    max_batch_tokens: int | None
    max_queue: int
    max_body: int
    max_images: int
    min_pixels: int
    max_pixels: int


def serve(options: ServeOptions) -> None:
    """Serves until SIGINT or SIGTERM. The first line on stdout is the address, once it can be used.

    Raises:
        ZPPOError: what is wrong with the options, the key, the port or the model; all but the model are looked at before it is loaded.
    """
    _check_limits(options)
    key = read_key(options)
    with ExitStack() as stack:
        listener = stack.enter_context(open_socket(options.host, options.port))
        loopback = is_loopback(listener.getsockname()[0])
        if not loopback and key is None and not options.no_key:
            raise SettingsError(
                f"--host {options.host} lets other machines in, and the server has no key: name the environment variable that holds one "
                "with --key-env (or a file with --key-file), or let everybody in with --no-key"
            )
        loaded = load(
            checkpoint_of(options.model),
            revision=options.revision,
            device=options.device,
            dtype=options.dtype,
            max_rows=options.max_rows,
            max_tokens=options.max_batch_tokens,
            images=PixelLimits(options.min_pixels, options.max_pixels) if options.max_images else None,
        )
        folder = stack.enter_context(TemporaryDirectory(prefix="zppo-serve-"))
        batcher = Batcher(loaded.engine, max_rows=options.max_rows, max_tokens=options.max_batch_tokens, max_queue=options.max_queue)
        loaded.before_step(batcher.check)
        service = Service(
            model=options.name or options.model,
            words=Words(loaded.chat),
            batcher=batcher,
            pictures=Pictures(Path(folder), options.max_images, loaded.blind),
            context=loaded.engine.context,
            key=key,
            loopback=loopback,
            max_body=options.max_body << 20,
        )
        what = f"{service.model} on {loaded.engine.model.device}, context {service.context}; Ctrl-C ends"
        try:
            _Server(service, f"http://{_address(listener)}/v1", what).run(sockets=[listener])
        finally:
            batcher.close(_GRACE)


def read_key(options: ServeOptions) -> str | None:
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


def is_loopback(address: str) -> bool:
    """Whether only this machine can reach a bound address."""
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def _address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _check_limits(options: ServeOptions) -> None:
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
    if options.min_pixels > options.max_pixels:
        raise SettingsError(f"--min-pixels is {options.min_pixels}, more than --max-pixels, {options.max_pixels}: exchange them")


class _Server(uvicorn.Server):
    """Says where it is once it listens; ends after running requests, or at once when it is told again."""

    def __init__(self, service: Service, url: str, what: str) -> None:
        super().__init__(
            uvicorn.Config(
                make_app(service),
                log_config=None,
                access_log=False,
                proxy_headers=False,
                server_header=False,
                lifespan="off",
                ws="none",
                timeout_graceful_shutdown=_GRACE,
            )
        )
        self._batcher, self._url, self._what = service.batcher, url, what

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        print(self._url, flush=True)
        print(f"serving {self._what}", file=sys.stderr, flush=True)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if count := sum(self._batcher.load):
            print(f"finishing {count} requests (once more ends at once)", file=sys.stderr, flush=True)
        await super().shutdown(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # uvicorn would raise the signal again at the end; here an asked-for end is a good one.
        if self.should_exit:
            self.force_exit = True
            self._batcher.stop()
        self.should_exit = True

"""vLLM in servers of its own (`vllm serve`), by vLLM's endpoints: token ids in and out, one request and one seed a rollout.

Read off vLLM 0.31 and 0.32. Weights go over NCCL, by vLLM's own transfer, or through a folder that trainer and servers both see.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import math
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple, Protocol, cast

import torch
from safetensors.torch import save_file

from zppo.engines.vllm.vllm_colocate import LOGPROBS_MODE, Draw, ProcessPlace, Sampled, named_dtype
from zppo.errors import EngineError, SettingsError, one_line
from zppo.http_client import httpx

SERVER_WAIT = 240.0
"""Seconds that a server is waited for at the start."""

RETRIED = 60.0
"""Seconds for which a request is tried again. A rollout is drawn from its seed: the second attempt gives the same one."""

SILENCE = 1800.0
"""Seconds without any rollout, after which a server counts as gone."""

UPDATED = 900.0
"""Seconds that new weights may take."""

MOST_ROWS = 512  # requests to one server that are under way at once: a process may open 1,024 files
MOST_SAID = 16 << 20  # bytes of what a server says about itself
FILE_BYTES = 2 << 30  # of weights in one file: as much as is held of them at once
_CONNECT, _LOOKED = 10.0, 60.0
_LONGEST_PAUSE = 8.0
_PLAIN = {"Accept-Encoding": "identity"}  # packed bytes would pass a limit and be many more
_AGAIN = ". Look at its log, start it again, and continue with `zppo resume RUN`"

SERVE = f"VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --logprobs-mode {LOGPROBS_MODE}"
OVER_NCCL = """ --weight-transfer-config '{"backend": "nccl"}'"""

Weights = Iterable[tuple[str, torch.Tensor]]
"""Names and values, anew each time they are gone through; all processes do that together."""


@dataclass(frozen=True, slots=True)
class VLLMServer:
    """A server as it describes itself.

    Attributes:
        model: the name that it serves.
        context, rows: most tokens of a sequence, and most sequences at once.
        dtype: what it computes in.
        workers: processes that hold weights.
        transfer: its backend for weight transfer; "" for none.
    """

    url: str
    model: str
    context: int
    rows: int
    dtype: torch.dtype
    workers: int
    transfer: str


class _RefusedError(EngineError):
    """A reply that says no."""


class _BusyError(EngineError):
    """No reply, or one that may be another one soon."""


class _Control:
    """What is said to all servers at once: about weights, not about rollouts."""

    def __init__(self, urls: Sequence[str]) -> None:
        self.urls = tuple(urls)
        # Prompts and weights go where the recipe says: by no proxy, and not on to another address.
        self._client = httpx.Client(trust_env=False, headers=_PLAIN, timeout=httpx.Timeout(UPDATED, connect=_CONNECT))

    def each(self, path: str, bodies: Sequence[Any] | None = None) -> list[Any]:
        """The answers of all servers, in their order: to `bodies`, or to a GET. EngineError where one gives none."""
        with ThreadPoolExecutor(len(self.urls)) as pool:
            return list(pool.map(lambda k: self.one(self.urls[k], path, None if bodies is None else bodies[k]), range(len(self.urls))))

    def tell(self, path: str, body: Any) -> list[Any]:
        """The answers of all servers to one request."""
        return self.each(path, [body] * len(self.urls))

    def one(self, url: str, path: str, body: Any = None) -> Any:
        """The answer of one server. EngineError where it gives none."""
        content, how = bytearray(), cast(dict[str, Any], {"timeout": _LOOKED} if body is None else {"json": body})
        try:
            with self._client.stream("GET" if body is None else "POST", url + path, **how) as got:
                for part in got.iter_raw():
                    content += part
                    if len(content) > MOST_SAID:
                        break
        except httpx.HTTPError as error:
            raise _silent(url, error) from error
        return _answer(url, path, got.status_code, bytes(content), MOST_SAID)


def _silent(url: str, error: Exception) -> _BusyError:
    return _BusyError(f"the vLLM server at {url} does not answer: {one_line(error) or type(error).__name__}{_AGAIN}")


def _answer(url: str, path: str, status: int, content: bytes, most: int) -> Any:
    if len(content) > most:
        raise _RefusedError(f"the vLLM server at {url} answers {path} with more than {most:,} bytes{_AGAIN}")
    if status != 200:
        kind = _BusyError if status >= 500 or status == 429 else _RefusedError
        said = " ".join(content[:2000].decode(errors="replace").split())[:400]
        raise kind(f"the vLLM server at {url} answers {path} with status {status}: {said or '(no reason given)'}{_AGAIN}")
    try:
        return json.loads(content) if content else None
    except (ValueError, RecursionError):
        raise _RefusedError(f"the vLLM server at {url} answers {path} with something that is no JSON{_AGAIN}") from None


def connect(
    urls: Sequence[str],
    place: ProcessPlace,
    gather: Callable[[str], list[str]],
    *,
    port: int,
    folder: Path | None,
    rows: int | None,
    device: torch.device,
) -> ServedVLLM:
    """Waits for the servers of this process, and has the first process send weights to all. Every process must call it.

    Args:
        urls: of all servers; `servers_of` says which are this process's.
        place: this training process.
        gather: what all processes say, in the order of ranks.
        port: on which weights are sent over NCCL.
        folder: through which they are sent instead.
        rows: most rollouts of this process at once; None for as many as the servers take.
        device: of the trainer's weights.

    Raises:
        SettingsError: the servers cannot be shared out evenly, or there is no GPU to send weights from.
        EngineError: a server cannot be used; the message says why. In all processes.
    """
    own = servers_of(urls, place)
    main = place.rank == 0
    if folder is None and device.type != "cuda":
        raise SettingsError(
            "rollout.vllm.mode is server, and weights go to it over NCCL, which needs a GPU here too: set rollout.vllm.weights_folder to a "
            "folder that trainer and server both see"
        )
    found, fault = list[VLLMServer](), ""
    try:
        control = _Control(urls if main else own)
        found = [_look_at(control, url, nccl=folder is None) for url in control.urls]
        if len({server.dtype for server in found}) > 1:
            raise EngineError(f"the vLLM servers compute in {sorted({str(s.dtype) for s in found})}: start all of them with one --dtype")
    except EngineError as error:
        fault = str(error)
    for each in gather(fault):
        if each:
            raise EngineError(each)
    sender: WeightSender | None = None
    if main:
        sender = FileSender(control, folder, found[0].dtype) if folder is not None else NCCLSender(control, found, port, device)
    sharers = max(1, place.processes // len(urls))
    mine = [server for server in found if server.url in own]
    most = [max(1, min(server.rows // sharers, MOST_ROWS, rows // len(mine) if rows else MOST_ROWS)) for server in mine]
    return ServedVLLM(mine, most, sender, gather, passes=1 if folder is not None else 2)


def servers_of(urls: Sequence[str], place: ProcessPlace) -> list[str]:
    """The servers that a process asks: as many as any other process, or one that as many others ask too.

    Raises:
        SettingsError: that cannot be.
    """
    count, processes = len(urls), place.processes
    twice = len(set(urls)) < count
    if twice or max(count, processes) % min(count, processes):
        raise SettingsError(
            f"rollout.vllm.base_url: {count} servers{', one of them named twice,' if twice else ''} for {processes} training process(es), "
            "and every process asks as many servers, or every server is asked by as many processes: name each once, and a divisor or a "
            "multiple of the processes"
        )
    return list(urls[place.rank :: processes]) if count >= processes else [urls[place.rank % count]]


def _look_at(control: _Control, url: str, *, nccl: bool) -> VLLMServer:
    """The server at an address, once it is up. EngineError where it is not, or cannot be trained with."""
    serve = f". Start it with: {SERVE}{OVER_NCCL if nccl else ''}"
    until = time.monotonic() + SERVER_WAIT
    while True:
        try:
            control.one(url, "/health")
            break
        except EngineError as error:
            if time.monotonic() >= until:
                raise EngineError(f"vLLM at {url} cannot be used: {str(error).removesuffix(_AGAIN)}{serve}") from error
            time.sleep(1)
    try:
        config = control.one(url, "/server_info?config_format=json")["vllm_config"]
        model, transfer = config["model_config"], config["weight_transfer_config"]
        server = VLLMServer(
            url,
            str(control.one(url, "/v1/models")["data"][0]["id"]),
            int(model["max_model_len"]),
            int(config["scheduler_config"]["max_num_seqs"]),
            named_dtype(str(model["dtype"])),
            int(control.one(url, "/get_world_size")["world_size"]),
            str(transfer["backend"]) if transfer else "",
        )
        mode = str(model["logprobs_mode"])
        control.one(url, "/weight_info")
    except EngineError as error:  # such as: the endpoints of development mode are not there
        raise EngineError(f"vLLM at {url} cannot be used: {str(error).removesuffix(_AGAIN)}{serve}") from error
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise EngineError(f"vLLM at {url} describes itself otherwise than vLLM 0.31 and 0.32 do ({one_line(error)}){serve}") from error
    if mode != LOGPROBS_MODE:
        raise EngineError(f"the vLLM server at {url} returns {mode}, but training needs the log-probs that tokens were drawn from{serve}")
    if nccl and server.transfer != "nccl":
        raise EngineError(f"the vLLM server at {url} takes no weights over NCCL{serve}")
    return server


class ServedVLLM:
    """The servers of a training process.

    Args:
        servers: those that it asks.
        rows: requests to each that are under way at once.
        sender: sends weights to the servers of all processes; None in all processes but the first.
        gather: what all processes say, in the order of ranks.
        passes: how often the first sending goes through the weights.
    """

    def __init__(
        self,
        servers: Sequence[VLLMServer],
        rows: Sequence[int],
        sender: WeightSender | None,
        gather: Callable[[str], list[str]],
        *,
        passes: int,
    ) -> None:
        self.servers, self.rows, self.sender, self._gather, self._passes = tuple(servers), tuple(rows), sender, gather, passes
        self.context = min(server.context for server in servers)
        self._control = _Control([server.url for server in servers])
        self._run, self._sent, self._version = uuid.uuid4().hex[:8], 0, ""

    @property
    def dtype(self) -> torch.dtype:
        """What all of them compute in."""
        return self.servers[0].dtype

    def load(self, weights: Weights) -> None:
        """Sends weights to all servers and empties their caches; every process must call it.

        Raises:
            EngineError: a server did not take them; in all processes.
        """
        shared, fault = _Passes(weights, self._passes), ""
        self._passes, self._sent = 1, self._sent + 1
        version = f"{self._run}-{self._sent}"
        if self.sender is not None:
            try:
                self.sender.send(shared, version)
            except EngineError as error:
                fault = str(error)
            except Exception as error:  # NCCL, CUDA and disks have errors of their own
                fault = f"weights could not be sent to the vLLM servers: {one_line(error)}{_AGAIN}"
        shared.finish()  # the other processes give their parts, whatever becomes of them
        said = self._gather(json.dumps([version, fault]))
        self._version, fault = json.loads(said[0])
        if fault:
            raise EngineError(fault)

    def run(self, draws: Sequence[Draw], how: dict[str, Any]) -> Iterator[Sampled]:
        """What came of each draw, as it ends; `how` are vLLM's sampling parameters.

        Raises:
            EngineError: a server does not answer, answers something else, or had other weights than those of the last `load`.
        """
        ended: SimpleQueue[Sampled | EngineError] = SimpleQueue()
        loop = asyncio.new_event_loop()
        asking = loop.create_task(self._ask_all(draws, how, ended))
        thread = threading.Thread(target=lambda: loop.run_until_complete(asyncio.wait({asking})), name="vllm-requests", daemon=True)
        thread.start()
        try:
            for _ in draws:
                try:
                    found = ended.get(timeout=SILENCE)
                except Empty:
                    raise EngineError(f"no rollout has come from vLLM{self._where} for {SILENCE:,.0f} s{_AGAIN}") from None
                if isinstance(found, EngineError):
                    raise found
                yield found
        finally:  # a reader that goes away (a signal) ends what is under way; vLLM drops a request whose connection closes
            loop.call_soon_threadsafe(asking.cancel)
            thread.join()
            loop.close()
        self._check_version()

    def rest(self) -> None:
        """Nothing: a server keeps its memory,"""

    def close(self) -> None:
        """and goes on."""

    @property
    def _where(self) -> str:
        return f" at {', '.join(server.url for server in self.servers)}"

    def _check_version(self) -> None:
        """A server that was started again, or takes weights from somebody else too, has sampled from others."""
        for server, info in zip(self.servers, self._control.each("/weight_info"), strict=True):
            version = info.get("weight_version") if isinstance(info, dict) else None
            if version != self._version:
                raise EngineError(
                    f"the vLLM server at {server.url} does not hold the weights that were sent (version {str(version)[:40]!r}): it was "
                    "started again, or another run sends weights to it too. Nothing that it sampled since is used; see that it is this "
                    "run's alone, and continue with `zppo resume RUN`"
                )

    async def _ask_all(self, draws: Sequence[Draw], how: dict[str, Any], ended: SimpleQueue[Sampled | EngineError]) -> None:
        turns, parts = [asyncio.Semaphore(rows) for rows in self.rows], dict[int, list[dict[str, str]]]()
        async with httpx.AsyncClient(
            trust_env=False,
            headers=_PLAIN,
            timeout=httpx.Timeout(None, connect=_CONNECT),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=MOST_ROWS),
        ) as client:

            async def one(place: int, draw: Draw) -> None:
                k = draw.group % len(self.servers)  # the rollouts of a prompt go to one server, which computes the prompt once
                async with turns[k]:
                    if draw.pictures and draw.group not in parts:
                        parts[draw.group] = [{"type": "image_url", "url": _png(picture)} for picture in draw.pictures]
                    sampling = {**how, "seed": draw.seed, "max_tokens": draw.limit, "logprobs": 0}
                    path, body = _request(self.servers[k].model, draw.prompt_ids, parts.get(draw.group), sampling)
                    most = (1 << 20) + 1000 * draw.limit + 100 * len(draw.prompt_ids)
                    reply = await _ask(client, self.servers[k].url, path, body, most)
                    ended.put(_read(reply, place, self.servers[k].url, chat_form=bool(draw.pictures)))

            try:
                async with asyncio.TaskGroup() as group:
                    for place, draw in enumerate(draws):
                        group.create_task(one(place, draw))
            except* EngineError as errors:
                ended.put(next(iter(_leaves(errors))))
            except* Exception as errors:
                ended.put(EngineError(f"asking vLLM{self._where} failed: {one_line(next(iter(_leaves(errors))))}{_AGAIN}"))


def _leaves(group: BaseExceptionGroup[Any]) -> Iterator[Any]:
    for error in group.exceptions:
        yield from _leaves(error) if isinstance(error, BaseExceptionGroup) else (error,)


def _request(model: str, ids: Sequence[int], parts: Sequence[Any] | None, sampling: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Path and body of a request: /v1/completions, which takes no images, or vLLM's own endpoint for tokens."""
    body = {"model": model, "return_token_ids": True}
    if parts is None:
        return "/v1/completions", {**body, "prompt": list(ids), **sampling, "return_tokens_as_token_ids": True}
    return "/inference/v1/generate", {**body, "token_ids": list(ids), "content_parts": parts, "sampling_params": sampling}


async def _ask(client: httpx.AsyncClient, url: str, path: str, body: dict[str, Any], most: int) -> Any:
    """A reply, asked for again for a while where there is none."""
    first, pause = math.inf, 0.5
    while True:
        try:
            return await _post(client, url, path, body, most)
        except _BusyError:
            first = min(first, time.monotonic())
            if time.monotonic() - first + pause > RETRIED:
                raise
        await asyncio.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE)


async def _post(client: httpx.AsyncClient, url: str, path: str, body: dict[str, Any], most: int) -> Any:
    """The JSON of a reply of at most so many bytes."""
    content = bytearray()
    try:
        async with client.stream("POST", url + path, json=body) as response:
            async for part in response.aiter_raw():
                content += part
                if len(content) > most:
                    break
    except httpx.HTTPError as error:
        raise _silent(url, error) from error
    if response.status_code == 403 and path.startswith("/inference"):
        raise _RefusedError(f"the vLLM server at {url} takes no prompts with images: start it with --enable-scale-out")
    return _answer(url, path, response.status_code, bytes(content), most)


def _read(reply: Any, place: int, url: str, *, chat_form: bool) -> Sampled:
    """A reply's only completion. EngineError where it holds something else."""
    try:
        (choice,) = reply["choices"]
        ids, said = choice["token_ids"], choice["logprobs"]
        logprobs = [each["logprob"] for each in said["content"]] if chat_form else said["token_logprobs"]
        prompt, ended = (reply if chat_form else choice)["prompt_token_ids"], choice["finish_reason"]
        if not all(type(i) is int for i in (*ids, *prompt)) or not all(value is None or type(value) in (int, float) for value in logprobs):
            raise TypeError("ids and log-probs are no numbers")
        if ended not in ("stop", "length"):
            raise ValueError(f"it ended for the reason {str(ended)[:40]!r}")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise EngineError(
            f"the vLLM server at {url} answered with something else than one completion with its token ids and log-probs "
            f"({type(error).__name__}: {one_line(error)}): use a version that constraints-vllm.txt allows, with nothing before it"
        ) from None
    return Sampled(place, ids, logprobs, prompt, f" at {url}")


def _png(picture: Any) -> str:
    held = io.BytesIO()
    picture.save(held, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(held.getvalue()).decode()}"


class _Passes:
    """Weights that all processes go through together, equally often, whatever becomes of what is done with them."""

    def __init__(self, weights: Weights, most: int) -> None:
        self._weights, self._left = weights, most
        self._now: Iterator[tuple[str, torch.Tensor]] = iter(())

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        self._left -= 1
        self._now = iter(self._weights)
        return self._now

    def finish(self) -> None:
        """Goes through what is left."""
        for _ in self._now:
            pass
        while self._left > 0:
            for _ in self:
                pass


class WeightSender(Protocol):
    """Sends weights to all servers, which call them by a version from then on."""

    def send(self, weights: Weights, version: str) -> None: ...


def _fresh(control: _Control) -> None:
    """Empties what servers have computed with other weights. EngineError where one cannot."""
    control.tell("/reset_encoder_cache", {})
    until = time.monotonic() + RETRIED
    while not all(isinstance(said, dict) and said.get("success") for said in control.tell("/reset_prefix_cache", {})):
        if time.monotonic() > until:
            raise EngineError(f"a vLLM server at {', '.join(control.urls)} does not empty its prefix cache: somebody else asks it too")
        time.sleep(1)


def _narrow(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """In the server's type; vectors as they are, since some are kept in fp32 (the decay of a recurrence)."""
    return value.to(dtype) if value.dim() > 1 else value


class FileSender:
    """Through a folder that all servers see: the weights are written, read by vLLM's `reload_weights`, and removed."""

    def __init__(self, control: _Control, folder: Path, dtype: torch.dtype) -> None:
        self.control, self.folder, self.dtype = control, folder.absolute(), dtype

    def send(self, weights: Weights, version: str) -> None:
        place = self.folder / version
        try:
            place.mkdir(parents=True)
            self._write(weights, place)
        except OSError as error:
            shutil.rmtree(place, ignore_errors=True)
            raise EngineError(f"weights cannot be written to rollout.vllm.weights_folder: {one_line(error)}") from error
        try:
            self.control.tell("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(place)}})
            self.control.tell("/update_weight_version", {"new_version": version})
            _fresh(self.control)
        except EngineError as error:
            raise EngineError(f"{error} (it must see {self.folder} under the same name)") from error
        finally:
            shutil.rmtree(place, ignore_errors=True)

    def _write(self, weights: Weights, place: Path) -> None:
        held, size, files = dict[str, torch.Tensor](), 0, 0
        for name, value in weights:
            held[name] = _narrow(value, self.dtype).cpu().contiguous()
            size += held[name].nbytes
            if size >= FILE_BYTES:
                save_file(held, place / f"weights-{files:05d}.safetensors")
                held, size, files = {}, 0, files + 1
        if held:
            save_file(held, place / f"weights-{files:05d}.safetensors")


class _Described(NamedTuple):
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


class NCCLSender:
    """Over NCCL, by vLLM's own transfer: one group of this process and the workers of all servers, each weight sent once.

    To vLLM's trainer engine it is the client that talks to servers, and the source of the weights.
    """

    def __init__(self, control: _Control, servers: Sequence[VLLMServer], port: int, device: torch.device) -> None:
        self.control, self.port, self.device = control, port, device
        self.workers, self.dtype = [server.workers for server in servers], servers[0].dtype
        self._engine: Any = None
        self._described: list[_Described] = []
        self._weights: Weights = ()
        self._version = ""
        self._outcome: SimpleQueue[Exception | None] = SimpleQueue()

    def send(self, weights: Weights, version: str) -> None:
        self._weights, self._version, self._outcome = weights, version, SimpleQueue()
        if not self._described:
            self._described = [_Described(name, value.dtype, tuple(value.shape)) for name, value in self]
        # In a thread: where a server ends meanwhile, NCCL waits for it for good, and HTTP says so.
        threading.Thread(target=self._send, name="vllm-weights", daemon=True).start()
        try:
            outcome = self._outcome.get(timeout=UPDATED)
        except Empty:
            raise EngineError(f"the vLLM servers have not taken the weights within {UPDATED:,.0f} s{_AGAIN}") from None
        if outcome is not None:
            raise outcome
        _fresh(self.control)

    def _send(self) -> None:
        try:
            torch.cuda.set_device(self.device)
            self._engine = self._engine or self._join()
            self._engine.send_weights()
            self._outcome.put(None)
        except Exception as error:
            self._outcome.put(error)

    def _join(self) -> Any:
        from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo
        from vllm.utils.network_utils import get_ip

        info = NCCLTrainerInitInfo(rank=0, master_address=get_ip(), master_port=self.port, world_size=1 + sum(self.workers))
        return WeightTransferTrainerFactory.trainer_init(info, client=self, source=self)

    # the source of the weights

    def metadata(self) -> list[_Described]:
        """What iteration will give."""
        return self._described

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return ((name, _narrow(value, self.dtype)) for name, value in self._weights)

    # the client of the servers

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Has every server join; their workers come one server after the other."""
        offsets = [1 + sum(self.workers[:k]) for k in range(len(self.workers))]
        self._tell("/init_weight_transfer_engine", [{"init_info": {**init_info, "rank_offset": offset}} for offset in offsets])

    def start_weight_update(self) -> None:
        """Has every server expect weights."""
        self._tell("/start_weight_update")

    def update_weights(self, update_info: Any) -> None:
        """Has every server take weights from the group."""
        self._tell("/update_weights", [{"update_info": update_info}] * len(self.workers))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Has every server use them."""
        self._tell("/finish_weight_update", [{"weight_version": weight_version or self._version}] * len(self.workers))

    def _tell(self, path: str, bodies: Sequence[Any] | None = None) -> None:
        try:
            self.control.each(path, bodies or [{}] * len(self.workers))
        except EngineError as error:
            self._outcome.put(error)
            raise

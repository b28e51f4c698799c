"""A small process that owns the workers: `zppo.grading.workers` starts it and talks to it over pipes.

Why a process between the caller and the workers: they must not inherit what the caller has loaded (torch, a CUDA context), must not
run the caller's main script again, must start from any thread and from daemonic processes, and must end with their caller.
JSON lines in, `{"id", "gold", "answer", "timeout"}`; JSON lines out, `{"ready": true}` once, then `{"id", "outcome"}`.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Any

from pebble import ProcessPool

_TASKS_PER_WORKER = 1000  # then a fresh worker takes its place: caches of sympy only grow
_WORKER_MODULE = "zppo.grading.worker"


def _start_worker(memory_limit: int) -> None:
    from zppo.grading.worker import limit_worker  # imported by the workers only; the host stays small

    limit_worker(memory_limit)


def _compare(gold: str, answer: str, deadline: float) -> bool:
    from zppo.grading.worker import compare_in_worker

    return compare_in_worker(gold, answer, deadline)


def _ready() -> bool:
    return True


def _context() -> Any:
    """Fork from a server that has the libraries loaded: a killed worker is replaced within milliseconds."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([_WORKER_MODULE])
    return context


def _outcome(future: Future[bool]) -> str:
    """The word for the verdict of a finished task."""
    if future.cancelled():
        return "error"
    error = future.exception()
    if error is None:
        return "equal" if future.result() else "different"
    return "timeout" if isinstance(error, FutureTimeoutError) else "error"


def serve(workers: int, memory_limit: int) -> None:
    """Answer requests on standard input until it closes, then end the workers. Never returns.

    Args:
        workers: number of worker processes.
        memory_limit: address space of each, bytes.
    """
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # workers inherit 0 and 1: they must not hold the caller's pipes
    os.dup2(2, 1)
    os.environ["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    lock = threading.Lock()

    def reply(message: dict[str, Any]) -> None:
        with lock:
            replies.write(json.dumps(message).encode("ascii") + b"\n")
            replies.flush()

    pool = ProcessPool(workers, _TASKS_PER_WORKER, _start_worker, (memory_limit,), _context())
    pool.schedule(_ready).result()
    reply({"ready": True})

    def answered(number: int) -> Callable[[Future[bool]], None]:
        return lambda done: reply({"id": number, "outcome": _outcome(done)})

    for line in requests:
        request = json.loads(line)
        arguments = (request["gold"], request["answer"], request["timeout"])
        try:
            future = pool.schedule(_compare, arguments, timeout=request["timeout"])
        except RuntimeError:
            break  # the pool broke: ending tells the caller, who starts another host
        future.add_done_callback(answered(request["id"]))
    pool.stop()  # type: ignore[no-untyped-call]
    pool.join(timeout=1)
    os._exit(0)  # nothing of a hostile task may delay the end

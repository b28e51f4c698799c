"""A worker for tests/test_benchmarks.py, in a module that a new process imports quickly."""

from __future__ import annotations

from multiprocessing.connection import Connection
from typing import Any


def echo(pipe: Connection, config: Any) -> None:
    """Doubles numbers, and fails at 13."""
    pipe.send(("ready", config))
    while True:
        number = pipe.recv()
        if number == 13:
            raise ValueError("unlucky")
        pipe.send(("reply", 2 * number))

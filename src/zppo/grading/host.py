"""A small process that owns the workers. Run by `zppo.grading.pool`, never imported by it.

Why a process between the caller and the pool: workers must not inherit what the caller has loaded (torch, a CUDA context), must
not re-import the caller's main script, must start from any thread and from daemonic processes, and must end with their caller.
Requests and replies are JSON lines on the standard streams: `{"id", "gold", "answer", "timeout"}` and `{"id", "outcome"}`.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import threading
from concurrent.futures import Future, TimeoutError  # noqa: A004  (on 3.11 and later it is the built-in one)
from typing import Any, TextIO

from pebble import ProcessPool

from zppo.grading.worker_names import READY, WORKER_MODULE

"""The trainer's end of the weight transfer; here a queue to the server's thread instead of NCCL."""

from __future__ import annotations

import queue
from types import SimpleNamespace
from typing import Any

GROUP: queue.Queue[Any] = queue.Queue()


def trainer_init(init_info: dict[str, Any]) -> SimpleNamespace:
    assert init_info["packed"] and init_info["rank_offset"] == 1 and init_info["world_size"] == 2
    return SimpleNamespace(queue=GROUP, group=SimpleNamespace(store=None, socket=None))

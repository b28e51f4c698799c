"""Ports of this machine that no other test gets."""

from __future__ import annotations

import socket

_held: list[socket.socket] = []


def hold_port() -> int:
    """A free port of 127.0.0.1, this process's to its end: connections are refused until a server that sets SO_REUSEADDR listens on it.

    Where it was let go after it was found, a server of another test could take it before the one that it was found for began.
    """
    holder = socket.socket()
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    holder.bind(("127.0.0.1", 0))
    _held.append(holder)
    port: int = holder.getsockname()[1]
    return port

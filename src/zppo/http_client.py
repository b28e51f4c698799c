"""The HTTP client that the openai package stands on, whatever it is called, and whether the hub of models and data sets answers."""

from __future__ import annotations

import sys
import time
from functools import cache

from zppo.errors import one_line

try:
    import httpx2 as httpx
except ImportError:  # of older versions
    import httpx  # type: ignore[no-redef]

__all__ = ["httpx", "hub_trouble"]

_PATIENCE = 5.0  # seconds for the hub's first word
_RESTS = (1.0, 2.0, 0.0)  # seconds between tries


@cache
def hub_trouble() -> str:
    """Why the hub cannot be reached; "" where it answers. Asked once a process, which goes on with what was downloaded before.

    The hub's library would try every file for half a minute, with two lines in the terminal for every try.
    """
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    for rest in _RESTS:
        try:
            get_session().head(constants.ENDPOINT, timeout=_PATIENCE)  # its own client, with the user's proxies and certificates
            return ""
        except Exception as error:  # of as many kinds as it has had clients
            why = f"{constants.ENDPOINT} cannot be reached: {one_line(error)}"
            time.sleep(rest)
    constants.HF_HUB_OFFLINE = True
    if datasets := sys.modules.get("datasets"):  # it looks at its own
        datasets.config.HF_HUB_OFFLINE = True
    return why

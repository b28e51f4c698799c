"""The HTTP client that the openai package stands on, whatever it is called, and whether the hub of models and data sets answers."""

from __future__ import annotations

import math
import sys
import time

from zppo.errors import one_line

try:
    import httpx2 as httpx
except ImportError:  # of older versions
    import httpx  # type: ignore[no-redef]

__all__ = ["httpx", "hub_trouble"]

_PATIENCE = 5.0  # seconds for the hub's first word
_RESTS = (1.0, 2.0, 0.0)  # seconds between tries
_GOOD_FOR = 60.0  # seconds that an answer holds: a run that found no hub at its start may push to it at its end
_found: list[tuple[float, str]] = []  # when the hub was asked last, and what it is


def hub_trouble() -> str:
    """Why the hub cannot be reached; "" where it answers. Until it is asked again, a process goes on with what was downloaded before.

    The hub's library would try every file for half a minute, with two lines in the terminal for every try.
    """
    from huggingface_hub import constants, get_session

    when, why = _found[-1] if _found else (-math.inf, "")
    if constants.HF_HUB_OFFLINE and not why:
        return "HF_HUB_OFFLINE is set"
    if time.monotonic() - when < _GOOD_FOR:
        return why
    _offline(False)
    for rest in _RESTS:
        try:
            get_session().head(constants.ENDPOINT, timeout=_PATIENCE)  # its own client, with the user's proxies and certificates
            why = ""
            break
        except Exception as error:  # of as many kinds as it has had clients
            why = f"{constants.ENDPOINT} cannot be reached: {one_line(error)}"
            time.sleep(rest)
    _offline(bool(why))
    _found[:] = [(time.monotonic(), why)]
    return why


def _offline(on: bool) -> None:
    from huggingface_hub import constants

    constants.HF_HUB_OFFLINE = on
    if datasets := sys.modules.get("datasets"):  # it looks at its own
        datasets.config.HF_HUB_OFFLINE = on

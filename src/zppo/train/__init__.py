"""From groups to weights. The room is also the function: `zppo.train(recipe)` is `zppo.api.train`."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any


class _Room(ModuleType):
    """The import system sets `zppo.train` to this room as soon as a module of it is imported; so the room answers calls."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return importlib.import_module("zppo.api").train(*args, **kwargs)


sys.modules[__name__].__class__ = _Room

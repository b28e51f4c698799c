"""From groups to weights. The room is also the function: `zppo.train(recipe)` is `zppo.api.train`."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

__all__ = ["train"]


# The import system sets `zppo.train` to this room as soon as a module of it is imported; so the room answers calls, and what `help`
# and `inspect` ask of a function.
class _Room(ModuleType):
    @property
    def train(self) -> Any:
        return importlib.import_module("zppo.api").train

    @property
    def __wrapped__(self) -> Any:
        return self.train  # where `inspect.signature` looks

    @property
    def __doc__(self) -> Any:  # type: ignore[override]
        return self.train.__doc__

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), "train"]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.train(*args, **kwargs)


sys.modules[__name__].__class__ = _Room

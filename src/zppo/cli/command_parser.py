"""What the commands of every group share."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    Subcommands = argparse._SubParsersAction["CommandParser"]


class CommandParser(argparse.ArgumentParser):
    """A parser whose help may end with something that is worked out only when it is asked for."""

    more: Callable[[], str] | None = None

    def format_help(self) -> str:
        text = super().format_help()
        return f"{text}\n{self.more()}\n" if self.more else text

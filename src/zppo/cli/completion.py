"""Completion in the shell, by argcomplete: `eval "$(register-python-argcomplete zppo)"`. Imported only when a shell asks."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import argcomplete
from argcomplete.completers import FilesCompleter

from zppo.cli.command_parser import CommandParser

WITH_SETTINGS = ("train", "sweep")  # take every setting as --key=value


def answer_shell(parser: CommandParser) -> None:
    """Answers what the shell asks about a command line, and ends the process."""
    from zppo.config.help import known_keys

    for action in _actions(parser):
        if "RECIPE" in str(action.metavar):
            action.completer = _recipes  # type: ignore[attr-defined]
    commands = next(action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    for name in WITH_SETTINGS:
        for key in known_keys():
            if f"--{key}" not in commands.choices[name]._option_string_actions:
                commands.choices[name].add_argument(f"--{key}", help=argparse.SUPPRESS).completer = FilesCompleter()
    argcomplete.autocomplete(parser, print_suppressed=True)


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                yield from _actions(inner)


def _recipes(prefix: str, **asked: Any) -> list[str]:
    """Files, and the names of recipes that come with zppo."""
    from zppo.config.bundled import recipe_names

    return [*recipe_names(), *FilesCompleter()(prefix, **asked)]

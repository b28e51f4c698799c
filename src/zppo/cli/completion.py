"""Completion in the shell, by argcomplete: `eval "$(register-python-argcomplete zppo)"`. Imported only when a shell asks."""

from __future__ import annotations

import argparse

import argcomplete

from zppo.cli.command_parser import CommandParser

WITH_SETTINGS = ("train", "sweep")  # take every setting as --key=value


def answer_shell(parser: CommandParser) -> None:
    """Answers what the shell asks about a command line, and ends the process."""
    from zppo.config.help import known_keys

    commands = next(action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    for name in WITH_SETTINGS:
        for key in known_keys():
            if f"--{key}" not in commands.choices[name]._option_string_actions:
                commands.choices[name].add_argument(f"--{key}", help=argparse.SUPPRESS).completer = argcomplete.FilesCompleter()  # type: ignore[attr-defined]
    argcomplete.autocomplete(parser, print_suppressed=True)

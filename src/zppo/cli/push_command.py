"""`zppo push`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from zppo.cli.command_parser import Subcommands


def add_push(commands: Subcommands) -> None:
    """`push`."""
    push = commands.add_parser(
        "push",
        help="put the student of a finished run on the Hugging Face hub",
        description="Upload final/ of a finished run, with its model card, to a repository of the hub, which is made where there is none.",
    )
    push.add_argument("folder", metavar="RUN", type=Path, help="the folder that `zppo train` printed")
    push.add_argument("--repo", metavar="NAME", required=True, help="NAME or OWNER/NAME")
    push.add_argument("--public", action="store_true", help="a repository that is made can be seen by everybody (default: private)")
    push.set_defaults(run=_push)


def _push(options: argparse.Namespace) -> None:
    from zppo.runs.push import push_run

    print(push_run(options.folder, options.repo, private=not options.public))

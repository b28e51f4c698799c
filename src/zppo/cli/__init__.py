"""The command line: one file a group of commands. Heavy imports happen inside the commands: `zppo --version` and a misspelt key answer at
once."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Sequence

from zppo import __version__
from zppo.api import fit_output
from zppo.cli.command_parser import CommandParser
from zppo.cli.data_commands import add_data
from zppo.cli.eval_command import add_eval, split_vllm
from zppo.cli.lab_commands import add_lab
from zppo.cli.push_command import add_push
from zppo.cli.recipe_commands import add_recipes
from zppo.cli.report_commands import add_report
from zppo.cli.serve_command import add_serve
from zppo.cli.sweep_command import add_sweep
from zppo.cli.train_commands import add_train, split_overrides
from zppo.errors import Interrupted, LauncherError, ZPPOError, used_up

COMMAND_GROUPS = (add_train, add_recipes, add_data, add_sweep, add_report, add_push, add_serve, add_eval, add_lab)
"""In the order of `zppo --help`."""

OK, CRASH, USER_ERROR, INTERRUPTED = 0, 1, 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns the exit status: 0, 1 for a defect (with traceback), 2 for a mistake of the user, a full disk or memory, 130 when
    interrupted, 143 when asked to end by SIGTERM, 129 by SIGHUP.
    """
    status = _main(list(sys.argv[1:] if argv is None else argv))
    if _rank():
        # Threads of the process group are still there when Python takes itself apart, and may abort it or make it hang.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


def _main(arguments: list[str]) -> int:
    fit_output()
    try:
        overrides: list[str] = []
        if arguments[:1] == ["train"]:
            arguments, overrides = split_overrides(arguments)
        vllm: dict[str, str] = {}
        if arguments[:1] == ["eval"]:
            arguments, vllm = split_vllm(arguments)
        parser = _parser()
        if "_ARGCOMPLETE" in os.environ:
            from zppo.cli.completion import answer_shell

            answer_shell(parser)
        options, unknown = parser.parse_known_args(arguments)
        if unknown and not getattr(options, "takes_settings", False):
            parser.error(f"unrecognized arguments: {' '.join(unknown)}")
        options.overrides, options.vllm = [*overrides, *unknown], vllm
        if _rank() and not getattr(options, "several", False):
            raise LauncherError(
                f"a launcher (torchrun, accelerate launch, srun) started several processes, and zppo {arguments[0]} is for one: start it "
                "without a launcher, or srun with -n 1"
            )
        run: Callable[[argparse.Namespace], None] = options.run
        run(options)
    except ZPPOError as error:
        _print_error(str(error))
        return USER_ERROR
    except Interrupted as stopped:  # the run has said where it is saved
        return 128 + stopped.signum
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        if words := used_up(error):
            _print_error(words)
            return USER_ERROR
        print(_rank(), end="", file=sys.stderr)
        traceback.print_exc()
        return CRASH
    return OK


def _parser() -> CommandParser:
    parser = CommandParser(prog="zppo", description="RL post-training with the teacher in the prompt, never in the gradient.")
    parser.add_argument("--version", action="version", version=f"zppo {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add in COMMAND_GROUPS:
        add(commands)
    return parser


def _rank() -> str:
    """Which of several processes speaks; "" where there is one."""
    from zppo.distributed.launcher import rank_of

    rank = rank_of()
    return "" if rank is None else f"rank {rank}: "


def _print_error(message: str) -> None:
    from rich.console import Console
    from rich.text import Text

    Console(stderr=True).print(Text(f"{_rank()}Error: ", style="bold red").append(message, style="not bold default"), soft_wrap=True)

"""`zppo data`."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from zppo.data.corpora import CORPORA

if TYPE_CHECKING:
    from rich.console import Console

    from zppo.cli.command_parser import Subcommands
    from zppo.data.corpora.build import BuildDisplay, PromptLength

_LINES = 20  # about so many lines tell of the progress where there is no terminal


def add_data(commands: Subcommands) -> None:
    """`data build`."""
    data = commands.add_parser("data", help="questions to train on: build a corpus")
    _add_build(data.add_subparsers(title="commands", metavar="COMMAND", required=True))


def _add_build(commands: Subcommands) -> None:
    build = commands.add_parser("build", help="build a corpus out of public sets; the same command goes on after a stop")
    build.add_argument("corpus", choices=CORPORA, metavar="CORPUS", help="zppo-77k, the corpus of the paper (docs/corpus.md)")
    build.add_argument("--out", type=Path, metavar="DIR", help="the folder that it is built in (default: data/CORPUS)")
    build.add_argument("--vero", type=Path, metavar="DIR", help="a local copy of Vero-600k (default: the hub, file by file)")
    build.add_argument("--mmfinereason", type=Path, metavar="DIR", help="a local copy of MMFineReason-SFT-586K (default: the hub)")
    build.add_argument("--mapping", type=Path, metavar="FILE", help="columns, names, tiers, caps and filters of your own")
    build.add_argument("--show-mapping", action="store_true", help="print the mapping that is used without --mapping, to start from")
    build.add_argument("--tokenizer", metavar="MODEL", help="drop prompts that are too long for it, tokens of pictures included")
    build.set_defaults(run=_build)


def _build(options: argparse.Namespace) -> None:
    from rich.console import Console

    from zppo.data.corpora.build import build_corpus
    from zppo.data.corpora.build_manifest import print_manifest
    from zppo.data.corpora.mapping import mapping_text, read_mapping

    if options.show_mapping:
        print(mapping_text(options.corpus), end="")
        return
    console = Console()
    out = options.out or Path("data") / options.corpus
    mapping = read_mapping(options.corpus, options.mapping)
    local = {name: path for name in ("vero", "mmfinereason") if (path := getattr(options, name)) is not None}
    length = _length(options.tokenizer) if options.tokenizer else None
    with _progress(console) as display:
        manifest = build_corpus(mapping, out, local, length, display)
    print_manifest(manifest, console)
    console.print(f"{manifest.rows:,} rows in {out}; train on them with data.train: {out}", soft_wrap=True, highlight=False)


def _length(model: str) -> PromptLength:
    """Counts tokens as a run with this student does, with the default limits of pixels."""
    from zppo.data.corpora.build import PromptLength
    from zppo.engines.chat import Chat
    from zppo.images.store import PixelLimits
    from zppo.names import model_folder
    from zppo.prompts.book import PromptBook
    from zppo.rollout.student import PromptRenderer

    renderer = PromptRenderer(PromptBook(), Chat.load(model_folder(model), images=PixelLimits()))
    return PromptLength(model, lambda question: len(renderer.plain(question).ids))


@contextmanager
def _progress(console: Console) -> Iterator[BuildDisplay]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from zppo.data.corpora.build import BuildDisplay

    def say(text: str) -> None:
        console.print(text, soft_wrap=True, highlight=False, markup=False)

    if not console.is_terminal:  # a line now and then, for a log
        said = {0}

        def step(done: int, total: int) -> None:
            if (part := done * _LINES // max(total, 1)) not in said:
                said.add(part)
                say(f"{done:,} of {total:,} rows")

        yield BuildDisplay(say, step)
        return
    columns = TextColumn("rows"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("rows", total=None)
        yield BuildDisplay(say, lambda done, total: progress.update(task, completed=done, total=total))

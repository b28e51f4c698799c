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
    """`data build` and `data measure`."""
    data = commands.add_parser("data", help="questions to train on: build a corpus, measure whether they suit student and teacher")
    below = data.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_build(below)
    _add_measure(below)


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


def _add_measure(commands: Subcommands) -> None:
    measure = commands.add_parser(
        "measure",
        usage="zppo data measure RECIPE [--n N] [--sample N] [--teacher] [--out FILE|DIR] [--key=value ...] [--no-code]",
        help="how often student and teacher are right on the questions of a recipe; the same command goes on after a stop",
        description="Ask the student, and with --teacher the teacher, n times about every training question of a recipe, and write what "
        "came out into the questions. Any setting can be given as --key=value and wins over the recipe.",
        allow_abbrev=False,
    )
    measure.add_argument("recipe", metavar="RECIPE", help="as for zppo train")
    measure.add_argument("--n", type=int, default=8, help="answers to each question (default: 8)")
    measure.add_argument("--sample", type=int, metavar="N", help="ask about so many questions, drawn by seed and id (default: all)")
    measure.add_argument("--teacher", action="store_true", help="ask the recipe's teacher too")
    measure.add_argument(
        "--out", type=Path, metavar="FILE|DIR", help="a .jsonl or .parquet file, or a folder (default: runs/measure-RECIPE)"
    )
    measure.add_argument("--no-code", action="store_true", help="end with an error where the recipe names code of its own; see SECURITY.md")
    measure.set_defaults(run=_measure, takes_settings=True)


def _measure(options: argparse.Namespace) -> None:
    from rich.console import Console

    from zppo.config.bundled import find_recipe
    from zppo.config.recipe import load_recipe, refuse_code
    from zppo.runs.display import busy, steady_output
    from zppo.runs.signals import Stop, catch_signals

    recipe = find_recipe(options.recipe)
    settings = load_recipe(recipe, options.overrides)
    if options.no_code:
        refuse_code(settings, options.recipe)
    console = Console()
    with steady_output(), catch_signals(Stop()):
        with busy(console, "loading torch and transformers"):
            from zppo.measure.command import measure
        measure(settings, Path(recipe).stem, n=options.n, sample=options.sample, teacher=options.teacher, out=options.out, console=console)


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

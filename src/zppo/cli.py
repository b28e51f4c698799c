"""The command line. Heavy imports happen inside the commands: `zppo --version` and a misspelt key answer at once."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from zppo import __version__
from zppo.api import fit_output, resume, start
from zppo.errors import Interrupted, SettingsError, ZPPOError, used_up
from zppo.images.store import PixelLimits

if TYPE_CHECKING:
    from zppo.config.settings import Settings
    from zppo.core.types import Question

OK, CRASH, USER_ERROR, INTERRUPTED = 0, 1, 2, 130

_TRAIN_FLAGS = ("-h", "--help", "--dry-run", "--no-code")
_NO_CODE = "end with an error where the recipe names code of its own (grading.reward, reformulations); see SECURITY.md"
_FIGURES = {"png": ("png",), "svg": ("svg",), "both": ("png", "svg"), "none": ()}
_VLLM = "--vllm."
_PORT = 8765  # of `zppo report --watch`


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
        options = _parser().parse_args(arguments)
        options.overrides, options.vllm = overrides, vllm
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


def split_vllm(arguments: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """(what argparse reads, arguments of vLLM: `--vllm.NAME=VALUE`, and `--vllm.NAME` with the value "")."""
    given = [token.removeprefix(_VLLM).partition("=") for token in arguments if token.startswith(_VLLM)]
    return [token for token in arguments if not token.startswith(_VLLM)], {name: value for name, _, value in given}


def split_overrides(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """(what argparse reads, `--key=value` and `--key value` overrides), each in order."""
    ours: list[str] = []
    overrides: list[str] = []
    rest = iter(arguments)
    for token in rest:
        if not token.startswith("--") or token in _TRAIN_FLAGS:
            ours.append(token)
            continue
        overrides.append(token)
        if "=" not in token:
            value = next(rest, None)
            if value in _TRAIN_FLAGS:
                ours.append(value)
            elif value is not None:
                overrides.append(value)
    return ours, overrides


class _Parser(argparse.ArgumentParser):
    """A parser whose help may end with something that is worked out only when it is asked for."""

    more: Callable[[], str] | None = None

    def format_help(self) -> str:
        text = super().format_help()
        return f"{text}\n{self.more()}\n" if self.more else text


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="zppo", description="RL post-training with the teacher in the prompt, never in the gradient.")
    parser.add_argument("--version", action="version", version=f"zppo {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    train = commands.add_parser(
        "train",
        usage="zppo train RECIPE [--dry-run] [--key=value ...] [--no-code]",
        help="train a student by a recipe",
        description="Train a student by a recipe. Any setting can be given as --key=value and wins over the recipe.",
        allow_abbrev=False,
    )
    train.add_argument("recipe", nargs="?", metavar="RECIPE", help="a YAML file; recipes/my-data.yaml is one to copy")
    train.add_argument("--dry-run", action="store_true", help="resolve everything and print the plan; no model is loaded")
    train.add_argument("--no-code", action="store_true", help=_NO_CODE)
    train.set_defaults(run=_train)
    train.more = _settings_help

    again = commands.add_parser("resume", help="continue a run after its newest checkpoint")
    again.add_argument("folder", metavar="RUN", type=Path, help="the folder that `zppo train` printed")
    again.add_argument("--no-code", action="store_true", help=_NO_CODE)
    again.set_defaults(run=lambda options: resume(options.folder, code=not options.no_code))

    commands.add_parser("methods", help="list the methods that can train").set_defaults(run=_methods)
    _add_bootstrap(commands.add_parser("bootstrap", help="how sure the differences between methods over benchmarks are"))
    _add_cost(commands.add_parser("cost", help="FLOPs of a recipe or a run, part by part"))
    _add_report(
        commands.add_parser("report", help="a page that shows what a run did", description="Write report.html and figures/ of a run.")
    )
    _add_compare(
        commands.add_parser(
            "compare", help="several runs side by side", description="Tables of several runs, paired over seeds where there are seeds."
        )
    )
    _add_inspect(
        commands.add_parser(
            "inspect", help="the story of one question", description="Print every prompt, answer and verdict of one question of a run."
        )
    )
    _add_serve(
        commands.add_parser(
            "serve",
            help="an OpenAI-compatible server for a model",
            description="Serve chat completions of a model. The first line on stdout is the address for clients (base_url).",
        )
    )
    _add_eval(
        commands.add_parser(
            "eval",
            usage="zppo eval MODEL --suite NAMES [--judge URL] [options]\n       "
            "zppo eval compare A.json B.json [--resamples N] [--seed N]\n"
            "       zppo eval table [NAME=]RESULT ... [--markdown|--csv|--html] [--paper] [--minuend METHOD] [--output FILE]\n"
            "       zppo eval fetch NAME ... [--clips DIR]",
            help="evaluate a model on benchmarks, compare two evaluations, make the tables of many, or bring the clips of benchmarks",
            description="Evaluate a model on up to 31 benchmarks under one protocol. The same command goes on where it stopped.",
            epilog="--vllm.NAME=VALUE goes to the vLLM that is started for a folder: --vllm.max-model-len=32768 "
            "--vllm.tensor-parallel-size=2; --vllm.NAME where it has no value.",
        )
    )
    _add_lab(commands.add_parser("lab", help="the bundled tiny world: its questions and models"))
    return parser


def _add_bootstrap(bootstrap: argparse.ArgumentParser) -> None:
    bootstrap.add_argument(
        "tables",
        metavar="TABLE.csv",
        type=Path,
        nargs="+",
        help="columns scale, method, family, benchmark, accuracy (percent); or eval.json files of `zppo eval`",
    )
    bootstrap.add_argument("--minuend", metavar="METHOD", help="only this method minus each other one (default: every pair)")
    bootstrap.add_argument("--resamples", type=int, default=10_000, help="default: 10000")
    bootstrap.add_argument("--seed", type=int, default=0, help="of the resamples (default: 0)")
    bootstrap.add_argument("--csv", type=Path, metavar="OUT", help="write the intervals to this file too")
    bootstrap.set_defaults(run=_bootstrap)


def _add_cost(cost: argparse.ArgumentParser) -> None:
    cost.add_argument("target", nargs="?", type=Path, metavar="RECIPE|RUN", help="a recipe (planned) or a run folder (as run)")
    cost.add_argument("--paper", action="store_true", help="the paper's figures (Tab. 9) next to a count from its sizes")
    cost.add_argument("--student-params", metavar="N", help="0.8e9 or 0.8B; by default found in the checkpoint or the model's name")
    cost.add_argument("--teacher-params", metavar="N", help="the same for the teacher")
    cost.add_argument("--judge-params", metavar="N", help="the same for a judge that is not the teacher")
    of_recipe = cost.add_argument_group("of a recipe; without them, the most that it can cost")
    of_recipe.add_argument("--mean-prompt", type=float, metavar="TOKENS", help="plain prompts")
    of_recipe.add_argument("--mean-completion", type=float, metavar="TOKENS", help="student rollouts")
    of_recipe.add_argument("--mean-teacher-completion", type=float, metavar="TOKENS", help="teacher rollouts")
    of_recipe.add_argument("--hard-share", type=float, default=1.0, metavar="SHARE", help="of plain questions that are hard")
    of_recipe.add_argument("--solved-share", type=float, default=1.0, metavar="SHARE", help="of hard questions that the teacher solves")
    of_recipe.add_argument("--live-share", type=float, default=1.0, metavar="SHARE", help="of tokens in rows whose advantage is not 0")
    of_recipe.add_argument("--questions", type=int, metavar="N", help="training questions, instead of reading data.train")
    of_recipe.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a setting; may be repeated")
    cost.set_defaults(run=_cost)


def _add_report(report: argparse.ArgumentParser) -> None:
    report.add_argument("folder", metavar="RUN", type=Path, help="the folder that `zppo train` printed")
    report.add_argument("--out", metavar="DIR", type=Path, help="where to write (default: the run folder)")
    _add_figures(report)
    _add_watch(report)
    report.set_defaults(run=_report)


def _add_compare(compare: argparse.ArgumentParser) -> None:
    compare.add_argument("folders", metavar="RUN", type=Path, nargs="+", help="run folders")
    compare.add_argument("--html", action="store_true", help="write a page with curves on shared axes, and its figures")
    compare.add_argument("--out", metavar="FILE", type=Path, help="of --html (default: compare.html)")
    compare.add_argument("--csv", metavar="FILE", type=Path, help="a line per run and quantity; - is stdout, without the tables")
    compare.add_argument("--json", metavar="FILE", type=Path, help="arms, settings that differ, results, pairs; - as for --csv")
    _add_figures(compare)
    _add_watch(compare)
    compare.set_defaults(run=_compare)


def _add_inspect(inspect: argparse.ArgumentParser) -> None:
    inspect.add_argument("folder", metavar="RUN", type=Path, help="the folder that `zppo train` printed")
    inspect.add_argument("question", metavar="QUESTION_ID", help="as in the data, or <file>:<row>; the report and buffer.jsonl name them")
    inspect.add_argument("--step", type=int, help="only this step")
    inspect.add_argument("--kind", help="only this kind of prompt: plain, bcq, ncq")
    inspect.add_argument("--full", action="store_true", help="show long texts whole")
    inspect.set_defaults(run=_inspect)


def _add_watch(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--watch", action="store_true", help="serve the page on this machine, and follow what is written")
    parser.add_argument("--port", type=int, default=_PORT, help=f"of --watch; 0 takes a free one (default: {_PORT})")


def _add_figures(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--figures", choices=tuple(_FIGURES), default="png", help="format of the figure files (default: png)")


def _add_serve(serve: argparse.ArgumentParser) -> None:
    serve.add_argument("model", metavar="MODEL", help="a checkpoint folder, a finished run, a hub name, or lab:<world>/<student|teacher>")
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine only)")
    serve.add_argument("--port", type=int, default=8000, help="0 takes a free one (default: 8000)")
    serve.add_argument("--name", help="what clients call the model (default: MODEL)")
    serve.add_argument("--revision", help="revision on the hub")
    serve.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: a GPU where there is one)")
    serve.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="of the weights (default: float32 on a CPU, else as stored)",
    )
    serve.add_argument("--key-env", metavar="VARIABLE", help="environment variable that holds the key clients must send")
    serve.add_argument("--key-file", metavar="FILE", type=Path, help="file that holds it")
    serve.add_argument("--no-key", action="store_true", help="let other machines in without a key")
    serve.add_argument("--max-rows", type=int, default=64, help="completions decoded at once (default: 64)")
    serve.add_argument("--max-batch-tokens", type=int, metavar="TOKENS", help="most cached tokens at once (default: no limit)")
    serve.add_argument("--max-queue", type=int, default=1024, help="requests that may wait; more get 429 (default: 1024)")
    serve.add_argument("--max-body", type=int, default=8, metavar="MIB", help="size of a request (default: 8)")
    serve.add_argument("--max-images", type=int, default=16, help="images of a request; 0 loads the model for text alone (default: 16)")
    usual, small = PixelLimits(), "or the checkpoint's own where it was made for less"
    serve.add_argument("--min-pixels", type=int, help=f"smaller images are enlarged (default: {usual.min_pixels}, {small})")
    serve.add_argument("--max-pixels", type=int, help=f"larger ones are reduced (default: {usual.max_pixels}, {small})")
    serve.set_defaults(run=_serve)


def _add_eval(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", metavar="MODEL", help="a checkpoint folder, a finished run, lab:<world>/<student|teacher>, or URLs of servers, with commas"
    )
    parser.add_argument(
        "files",
        metavar="FILE",
        nargs="*",
        help="of compare: two eval.json files; of table: any number of results; of fetch: names of benchmarks",
    )
    parser.add_argument(
        "--suite", metavar="NAMES", default="paper", help="paper, vlm, llm, video, names, or my-bench.yaml, with commas (default: paper)"
    )
    parser.add_argument(
        "--judge", metavar="URLS", help="OpenAI-compatible servers for rows that rules cannot decide; not asked where rules decide all"
    )
    parser.add_argument("--judge-model", metavar="NAME", help="its name there (default: the only one that it serves)")
    parser.add_argument("--judge-key-env", metavar="VARIABLE", help="environment variable that holds the judge's key")
    parser.add_argument(
        "--judge-prompt", metavar="JUDGE=PATH", action="append", default=[], help="a judge's own words, e.g. eval_hle=hle.jinja"
    )
    parser.add_argument("--model", metavar="NAME", dest="name", help="the model's name at its URL (default: the only one that it serves)")
    parser.add_argument("--key-env", metavar="VARIABLE", help="environment variable that holds the key of the model's URL")
    parser.add_argument(
        "--limit", type=int, metavar="N", help="at most so many questions of each benchmark, spread over its configurations and tasks"
    )
    parser.add_argument(
        "--samples", default="1", metavar="K", help="answers to each question; of some benchmarks AIME25=32,MMLU=4 (default: 1)"
    )
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="default: the run's folder, or runs/eval-MODEL")
    parser.add_argument("--data", type=Path, metavar="DIR", help="rows as <benchmark>.jsonl, .parquet or .json, instead of the hub")
    parser.add_argument(
        "--clips", type=Path, metavar="DIR", help="unpacked clips of video benchmarks (default: DIR of --data; of fetch: clips)"
    )
    parser.add_argument("--concurrency", type=int, default=32, metavar="N", help="requests at a time (default: 32)")
    parser.add_argument("--max-tokens", type=int, default=12_288, metavar="N", help="of an answer (default: 12288, the protocol's)")
    parser.add_argument(
        "--video", choices=("frames", "file"), default="frames", help="clips as pictures (default), or whole to a server that takes them"
    )
    parser.add_argument("--frames", type=int, default=16, metavar="N", help="pictures of a clip (default: 16)")
    parser.add_argument("--closing", type=Path, metavar="FILE", help="closing instruction (default: that of the run, else the project's)")
    parser.add_argument(
        "--template-args", metavar="YAML", help="of the chat template, e.g. '{enable_thinking: true}' (default: the run's, else none)"
    )
    parser.add_argument(
        "--think-open", action="store_true", help="the chat template behind the URL ends inside an open think block (replies show it too)"
    )
    parser.add_argument(
        "--strict", action="store_true", help="rows with a malformed verdict or a broken clip stay open (default: they count as 0)"
    )
    parser.add_argument("--dry-run", action="store_true", help="what would be asked and what it would cost; asks nothing")
    parser.add_argument(
        "--no-code", dest="code", action="store_false", help="end with an error where a benchmark of one's own is or names Python"
    )
    parser.add_argument("--resamples", type=int, default=10_000, help="of compare and table (default: 10000)")
    parser.add_argument("--seed", type=int, default=0, help="of these resamples (default: 0)")
    table = parser.add_argument_group("of table")
    form = table.add_mutually_exclusive_group()
    form.add_argument("--markdown", dest="form", action="store_const", const="markdown", default="text", help="print Markdown")
    form.add_argument("--csv", dest="form", action="store_const", const="csv", help="print a table that zppo bootstrap reads")
    form.add_argument("--html", dest="form", action="store_const", const="html", help="write a page (default: eval-table.html)")
    table.add_argument("--paper", action="store_true", help="the paper's figures below those of students of the same size")
    table.add_argument("--minuend", metavar="METHOD", help="whose differences to the others are shown (default: ZPPO)")
    parser.set_defaults(run=_eval)


def _add_lab(lab: argparse.ArgumentParser) -> None:
    commands = lab.add_subparsers(title="commands", metavar="COMMAND", required=True)
    build = commands.add_parser("build", help="make the student and the teacher of a world anew")
    build.add_argument("world", metavar="WORLD", help="unreachable, reachable, vision, or the settings file of a world of your own")
    build.add_argument("--out", type=Path, metavar="DIR", help="where to put them (default: runs/lab/WORLD)")
    build.add_argument("--seed", type=int, default=0, help="of corpus and weights (default: 0)")
    build.add_argument("--steps", type=int, help="fewer pretraining steps than the world asks for")
    build.add_argument("--no-teacher", action="store_true", help="the student alone, where the teacher of a like world serves")
    build.set_defaults(run=_lab_build)
    questions = commands.add_parser("questions", help="show some questions of a world")
    questions.add_argument("--world", default="unreachable", help="default: unreachable")
    questions.add_argument("--level", help="a level by name, or by number from 1 (default: all)")
    questions.add_argument("--split", choices=("train", "test", "seen", "study"), default="train", help="default: train")
    questions.add_argument("--n", type=int, default=5, help="how many (default: 5)")
    questions.set_defaults(run=_lab_questions)
    study = commands.add_parser("study", help="run a grid of methods, seeds and students, and print its tables")
    study.add_argument("recipes", nargs="*", type=Path, metavar="RECIPE", help="lab recipes; none: print the tables of --rows")
    study.add_argument("--methods", default="grpo-replay,zppo,zppo-placebo", help="comma-separated; NAME-matched takes ZPPO's rollouts")
    study.add_argument("--seeds", default="0-2", help="e.g. 0-7 or 0,3,5 (default: 0-2)")
    study.add_argument("--students", default="", help="comma-separated models instead of the recipes' own")
    study.add_argument("--rows", type=Path, default=Path("runs/study.jsonl"), help="one line per finished run; appended to")
    study.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time, one thread each (default: cores)")
    study.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting for all runs; may be repeated")
    study.add_argument("--markdown", action="store_true", help="print the tables as Markdown")
    study.set_defaults(run=_lab_study)


def _settings_help() -> str:
    from zppo.config.help import help_text

    return help_text()


def _train(options: argparse.Namespace) -> None:
    from zppo.config.recipe import load_recipe, refuse_code

    if options.recipe is None:
        raise SettingsError("zppo train needs a recipe: zppo train RECIPE [--key=value ...]; recipes/my-data.yaml is one to copy")
    settings = load_recipe(options.recipe, options.overrides)
    if options.no_code:
        refuse_code(settings, options.recipe)
    name = Path(options.recipe).stem
    if options.dry_run:
        from rich.console import Console

        from zppo.distributed.launcher import rank_of
        from zppo.planning.dry_run import check_files, make_plan, memory_rows, render_plan
        from zppo.planning.memory import within
        from zppo.rollout.data import count_judged, load_data
        from zppo.runs.display import warn

        console = Console(quiet=bool(rank_of()))
        check_files(settings)
        train, held_out = load_data(settings, partial(warn, console))
        _check_images(settings, train, held_out)
        folder = str(settings.output or Path("runs") / f"{name}-<date>-<time>")
        judged, eval_judged = count_judged(settings, train), count_judged(settings, held_out)
        seeing, eval_seeing = (sum(bool(q.images) for q in part) for part in (train, held_out))
        plan = make_plan(
            settings, len(train), len(held_out), judged=judged, eval_judged=eval_judged, seeing=seeing, eval_seeing=eval_seeing
        )
        asked = [*train, *held_out]
        images = max((len(q.images) for q in asked), default=0)
        memory = memory_rows(within(settings, asked, len(train)), images=images)
        console.print(render_plan(settings, plan, options.recipe, folder, memory))
        return
    start(settings, name)


def _check_images(settings: Settings, train: list[Question], held_out: list[Question]) -> None:
    """Whether the student of a dry run can be shown the images of its questions, where its config.json is on this machine."""
    from zppo.planning.model_shapes import config_file

    if any(q.images for q in (*train, *held_out)) and config_file(settings.student.model) is not None:
        from zppo.rollout.run_data import check_images, first_with_images  # it imports torch

        if first := first_with_images(settings, train, held_out):
            check_images(settings, *first, sharded=False)


def _methods(options: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from zppo.config.methods import METHODS

    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("method", "replayed", "asked again with", "what enters the gradient", "advantage", "in the paper"):
        table.add_column(column, no_wrap=column == "method", overflow="fold")
    for row in METHODS.values():
        asks = ", ".join(kind.upper() for kind in row.reformulations) or "-"
        table.add_row(row.name, "hard ones" if row.replay else "-", asks, row.gradient, row.advantages, Text(row.paper))
    Console().print(table)


def _bootstrap(options: argparse.Namespace) -> None:
    from zppo.report.bootstrap import bootstrap_command

    bootstrap_command(options.tables, minuend=options.minuend, resamples=options.resamples, seed=options.seed, out=options.csv)


def _report(options: argparse.Namespace) -> None:
    if options.watch:
        from zppo.report.watch import watch_run

        watch_run(options.folder, options.port)
        return
    from zppo.report.page import report_command

    report_command(options.folder, out=options.out, suffixes=_FIGURES[options.figures])


def _compare(options: argparse.Namespace) -> None:
    if options.watch:
        from zppo.report.watch import watch_comparison

        watch_comparison(options.folders, options.port)
        return
    from zppo.report.compare import compare_command

    given = {"csv": options.csv, "json": options.json}
    compare_command(options.folders, html=options.html, out=options.out, suffixes=_FIGURES[options.figures], **given)


def _inspect(options: argparse.Namespace) -> None:
    from zppo.report.stories import inspect_command

    inspect_command(options.folder, options.question, step=options.step, kind=options.kind, full=options.full)


def _serve(options: argparse.Namespace) -> None:
    from zppo.serve.command import serve

    serve(options)


def _eval(options: argparse.Namespace) -> None:
    if options.model == "compare":
        from zppo.report.tables import compare_evaluations

        compare_evaluations(list(map(Path, options.files)), resamples=options.resamples, seed=options.seed)
        return
    if options.model == "table":
        from zppo.report.evaluations.table_views import table_command

        table_command(
            options.files, form=options.form, paper=options.paper, minuend=options.minuend, resamples=options.resamples,
            seed=options.seed, out=options.output,
        )  # fmt: skip
        return
    if options.model == "fetch":
        from zppo.evals.clips.fetch import FOLDER, fetch_clips

        fetch_clips([str(name) for name in options.files], options.clips or FOLDER)
        return
    from zppo.evals.evaluate import evaluate_benchmarks
    from zppo.evals.options import EvalOptions, read_samples, read_template_args
    from zppo.evals.registry import judge_prompts

    if options.files:
        raise SettingsError(f"zppo eval takes one model; {', '.join(map(str, options.files))} too many")
    given = {field.name: getattr(options, field.name) for field in fields(EvalOptions) if field.name != "judge_prompts"}
    given["samples"] = read_samples(options.samples)
    given["template_args"] = None if options.template_args is None else read_template_args(options.template_args)
    evaluate_benchmarks(EvalOptions(**given, judge_prompts=judge_prompts(options.judge_prompt)))


def _cost(options: argparse.Namespace) -> None:
    from zppo.planning.flops import Assumptions
    from zppo.planning.model_shapes import parse_size
    from zppo.report.cost import cost_command, paper_command

    if options.target is None and not options.paper:
        raise SettingsError("zppo cost needs a recipe or a run folder: zppo cost RECIPE|RUN, or zppo cost --paper")
    if options.target is not None:
        assumed = Assumptions(
            prompt=options.mean_prompt,
            completion=options.mean_completion,
            teacher_completion=options.mean_teacher_completion,
            hard=options.hard_share,
            solved=options.solved_share,
            live=options.live_share,
        )
        sizes = {name: getattr(options, f"{name}_params") for name in ("student", "teacher", "judge")}
        given = {name: parse_size(size) for name, size in sizes.items() if size}
        cost_command(options.target, [f"--{text}" for text in options.set], assumed, given, options.questions)
    if options.paper:
        paper_command()


def _lab_build(options: argparse.Namespace) -> None:
    from zppo.lab.make_models import build_command

    build_command(options.world, options.out, options.seed, options.steps, with_teacher=not options.no_teacher)


def _lab_questions(options: argparse.Namespace) -> None:
    from zppo.lab.questions import questions_command

    questions_command(options.world, options.level, options.n, options.split)


def _lab_study(options: argparse.Namespace) -> None:
    from rich.console import Console

    from zppo.lab.study import grid, print_study, run_study

    console, failed = Console(), 0
    if options.recipes:
        students = [s for s in options.students.split(",") if s]
        cells = list(grid(options.recipes, options.methods.split(","), _numbers(options.seeds), students))
        extra = [f"--{setting}" for setting in options.set]
        failed = run_study(cells, options.rows, jobs=max(1, options.jobs), work=Path("runs/study"), extra=extra, console=console)
    print_study(options.rows, console, markdown=options.markdown)
    if failed:
        raise SettingsError(f"{failed} runs failed; the same command runs them again")


def _numbers(text: str) -> list[int]:
    """ "0-2,5" -> [0, 1, 2, 5]"""
    try:
        ends = [[int(end) for end in part.split("-")] for part in text.split(",")]
        return [number for part in ends for number in range(part[0], part[-1] + 1)]
    except ValueError:
        raise SettingsError(f"--seeds is {text!r}: write numbers and ranges, e.g. 0-7 or 0,3,5") from None


def _rank() -> str:
    """Which of several processes speaks; "" where there is one."""
    from zppo.distributed.launcher import rank_of

    rank = rank_of()
    return "" if rank is None else f"rank {rank}: "


def _print_error(message: str) -> None:
    from rich.console import Console
    from rich.text import Text

    Console(stderr=True).print(Text(f"{_rank()}Error: ", style="bold red").append(message, style="not bold default"), soft_wrap=True)

"""`zppo eval`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from zppo.errors import SettingsError

if TYPE_CHECKING:
    from zppo.cli.command_parser import Subcommands

_VLLM = "--vllm."


def add_eval(commands: Subcommands) -> None:
    """`eval`, with `compare`, `table` and `fetch`."""
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


def split_vllm(arguments: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """(what argparse reads, arguments of vLLM: `--vllm.NAME=VALUE`, and `--vllm.NAME` with the value "")."""
    given = [token.removeprefix(_VLLM).partition("=") for token in arguments if token.startswith(_VLLM)]
    return [token for token in arguments if not token.startswith(_VLLM)], {name: value for name, _, value in given}


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
    parser.add_argument(
        "--closing",
        type=Path,
        metavar="FILE",
        help="closing instruction: a file, think-boxed, boxed or answer-line, and answers are read where a named one puts them (default: "
        "that of the run, else think-boxed)",
    )
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
    given = {field.name: getattr(options, field.name) for field in fields(EvalOptions) if hasattr(options, field.name)}
    given.pop("judge_prompts", None)
    given["samples"] = read_samples(options.samples)
    given["template_args"] = None if options.template_args is None else read_template_args(options.template_args)
    evaluate_benchmarks(EvalOptions(**given, judge_prompts=judge_prompts(options.judge_prompt)))

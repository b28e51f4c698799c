"""What `zppo eval` takes on the command line. The work is imported when it runs."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from zppo.errors import SettingsError

COMPARE = "compare"


def add_eval(commands: Any, compare: Callable[[argparse.Namespace], None]) -> None:
    """Add the command to a parser's commands.

    Args:
        commands: what `ArgumentParser.add_subparsers` returned.
        compare: does `zppo eval compare`.
    """
    parser = commands.add_parser(
        "eval",
        usage="zppo eval MODEL --suite NAMES --judge URL [options]\n       zppo eval compare A.json B.json [--resamples N] [--seed N]",
        help="evaluate a model on benchmarks, or compare two evaluations",
        description="Evaluate a model on up to 31 benchmarks under one protocol. The same command goes on where it stopped.",
    )
    parser.add_argument(
        "model", metavar="MODEL", help="a checkpoint folder, a finished run, lab:<world>/<student|teacher>, or the URL of a server"
    )
    parser.add_argument("files", metavar="FILE", nargs="*", type=Path, help="of compare: two eval.json files")
    parser.add_argument("--suite", metavar="NAMES", default="paper", help="paper, vlm, llm, video, or names, with commas (default: paper)")
    parser.add_argument("--judge", metavar="URL", help="OpenAI-compatible server for rows that rules cannot decide")
    parser.add_argument("--judge-model", metavar="NAME", help="its name there (default: the only one that it serves)")
    parser.add_argument("--judge-key-env", metavar="VARIABLE", help="environment variable that holds the judge's key")
    parser.add_argument(
        "--judge-prompt", metavar="JUDGE=PATH", action="append", default=[], help="a judge's own words, e.g. eval_hle=hle.jinja"
    )
    parser.add_argument("--model", metavar="NAME", dest="name", help="the model's name at its URL (default: the only one that it serves)")
    parser.add_argument("--key-env", metavar="VARIABLE", help="environment variable that holds the key of the model's URL")
    parser.add_argument("--limit", type=int, metavar="N", help="at most so many questions of each benchmark")
    parser.add_argument("--samples", type=int, default=1, metavar="K", help="answers to each question (default: 1)")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="default: the run's folder, or runs/eval-MODEL")
    parser.add_argument("--data", type=Path, metavar="DIR", help="rows as <benchmark>.jsonl, .parquet or .json, instead of the hub")
    parser.add_argument("--clips", type=Path, metavar="DIR", help="unpacked clips of video benchmarks (default: DIR of --data)")
    parser.add_argument("--concurrency", type=int, default=32, metavar="N", help="requests at a time (default: 32)")
    parser.add_argument("--max-tokens", type=int, default=12_288, metavar="N", help="of an answer (default: 12288, the protocol's)")
    parser.add_argument(
        "--video", choices=("auto", "file", "frames"), default="auto", help="clips whole, or as pictures (default: whole to a vLLM of ours)"
    )
    parser.add_argument("--frames", type=int, default=16, metavar="N", help="pictures of a clip (default: 16)")
    parser.add_argument("--think-open", action="store_true", help="the chat template behind the URL ends inside an open think block")
    parser.add_argument("--dry-run", action="store_true", help="what would be asked and what it would cost; asks nothing")
    parser.add_argument("--resamples", type=int, default=10_000, help="of compare (default: 10000)")
    parser.add_argument("--seed", type=int, default=0, help="of compare's resamples (default: 0)")
    parser.set_defaults(run=lambda options: compare(options) if options.model == COMPARE else _eval(options))


def _eval(options: argparse.Namespace) -> None:
    from dataclasses import fields

    from zppo.evals.command import evaluate
    from zppo.evals.protocol import EvalOptions

    if options.files:
        raise SettingsError(f"zppo eval takes one model; {', '.join(map(str, options.files))} too many")
    given = {field.name: getattr(options, field.name) for field in fields(EvalOptions) if field.name != "judge_prompts"}
    evaluate(EvalOptions(**given, judge_prompts=judge_prompts(options.judge_prompt)))


def judge_prompts(given: list[str]) -> dict[str, Path]:
    """JUDGE=PATH of the command line; a benchmark's name stands for its judge. SettingsError where one is neither."""
    from typing import get_args

    from zppo.evals.benchmark import Judge
    from zppo.evals.tables import BENCHMARKS

    judges = {**{b.name.lower(): b.judge for b in BENCHMARKS if b.judge != "judge"}, **{name: name for name in get_args(Judge)}}
    result = {}
    for text in given:
        name, equals, path = text.partition("=")
        if not equals or not path or name.lower() not in judges:
            raise SettingsError(
                f"--judge-prompt {text!r}: write JUDGE=PATH, with one of {', '.join(get_args(Judge))}, or its benchmark's name"
            )
        result[str(judges[name.lower()])] = Path(path)
    return result

"""`zppo serve`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from zppo.images.store import PixelLimits

if TYPE_CHECKING:
    from zppo.cli.command_parser import Subcommands


def add_serve(commands: Subcommands) -> None:
    """`serve`."""
    _add_serve(
        commands.add_parser(
            "serve",
            help="an OpenAI-compatible server for a model",
            description="Serve chat completions of a model. The first line on stdout is the address for clients (base_url).",
        )
    )


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


def _serve(options: argparse.Namespace) -> None:
    from zppo.serve.command import serve

    serve(options)

"""The protocol that all benchmarks share (method.md section 10), and what a call of `zppo eval` asks for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from zppo.images.store import PixelLimits
from zppo.prompts.book import CLOSING, PromptBook

VideoMode = Literal["auto", "file", "frames"]
FRAMES = 16
JUDGE_TOKENS, LONG_JUDGE_TOKENS = 512, 4096
"""Of a judge's reply; the second where its words were given by path: official ones often ask for reasons before the verdict."""
LIMITS = PixelLimits()
RESULT = "eval.json"
_OF_MODELS = frozenset((".safetensors", ".bin", ".pt", ".pth", ".gguf", ".json", ".jinja", ".model", ".tiktoken", ".txt", ".py"))
"""Endings of files that make up a checkpoint."""


@dataclass(frozen=True, slots=True)
class Decoding:
    """How every benchmark is sampled; the defaults are the protocol's."""

    temperature: float = 0.6
    top_p: float = 0.95
    top_k: int = 20
    min_p: float = 0.0
    presence_penalty: float = 1.5
    repetition_penalty: float = 1.0
    max_tokens: int = 12_288


@dataclass(frozen=True, slots=True)
class EvalOptions:
    """What the command line gives; its help says what each of them is."""

    model: str
    suite: str
    judge: str | None = None
    name: str | None = None
    key_env: str | None = None
    judge_model: str | None = None
    judge_key_env: str | None = None
    judge_prompts: Mapping[str, Path] = field(default_factory=dict)
    limit: int | None = None
    samples: int = 1
    output: Path | None = None
    data: Path | None = None
    clips: Path | None = None
    concurrency: int = 32
    max_tokens: int = Decoding().max_tokens
    video: VideoMode = "auto"
    frames: int = FRAMES
    think_open: bool = False
    strict: bool = False
    dry_run: bool = False

    @property
    def decoding(self) -> Decoding:
        """The protocol's decoding under the given token limit."""
        return Decoding(max_tokens=self.max_tokens)


def fingerprint(checkpoint: Path | None) -> str | None:
    """What tells another model in the same folder apart: the whole of its files of weights, template, tokenizer and configuration.

    Takes about a second for each GB, and the disk's time.

    Returns:
        16 hexadecimal digits; None for a server.
    """
    if checkpoint is None:
        return None
    digest = hashlib.sha256()
    for path in sorted(checkpoint.iterdir()):
        if path.suffix in _OF_MODELS and path.name != RESULT and path.is_file():
            with open(path, "rb") as file:
                digest.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()[:16]


def settings_of(options: EvalOptions, model: str, judge: str, video: str, weights: str | None = None) -> dict[str, Any]:
    """What the rows of one folder have in common: rows under other settings must not be mixed with them.

    Args:
        model: the checkpoint, or the name that a server gives to it.
        judge: its name.
        video: file or frames.
        weights: of `fingerprint`.
    """
    prompts = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in options.judge_prompts.items()}
    return {
        "model": model,
        "weights": weights,
        "closing": PromptBook().text(CLOSING, {}),
        "judge": judge,
        "decoding": asdict(options.decoding),
        "pixels": list(LIMITS),
        "video": video,
        "frames": options.frames,
        "think_open": options.think_open,
        "judge_prompts": prompts,
        "data": str(options.data.absolute()) if options.data else None,
        "clips": str(options.clips.absolute()) if options.clips else None,
    }


def digest_of(value: Any) -> str:
    """A short name for anything that JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=True).encode()).hexdigest()[:32]

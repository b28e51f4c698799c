"""The protocol that all benchmarks share (method.md section 10), and what a call of `zppo eval` asks for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from zppo.config.recipe import load_recipe, parse_yaml
from zppo.errors import SettingsError
from zppo.grading.answer_form import AFTER_THOUGHTS, AnswerForm
from zppo.images.store import PixelLimits
from zppo.names import CLOSINGS
from zppo.prompts.book import CLOSING, PromptBook

VideoMode = Literal["frames", "file"]
FRAMES = 16
JUDGE_TOKENS, LONG_JUDGE_TOKENS = 512, 4096
"""Of a judge's reply; the second where its words were given by path: official ones often ask for reasons before the verdict."""
LIMITS = PixelLimits()
RESULT = "eval.json"
_OF_MODELS = frozenset((".safetensors", ".bin", ".pt", ".pth", ".gguf", ".json", ".jinja", ".model", ".tiktoken", ".txt", ".py"))
"""Endings of files that make up a checkpoint."""


OURS = frozenset(("model", "host", "port", "served-model-name", "api-key", "uds"))
"""Arguments of vLLM that are ours to give."""
_OF_THE_MACHINE = frozenset(
    "tensor-parallel-size pipeline-parallel-size data-parallel-size distributed-executor-backend gpu-memory-utilization max-num-seqs "
    "max-num-batched-tokens max-model-len enforce-eager cpu-offload-gb swap-space load-format disable-log-requests".split()
)
"""Those that say how a machine is used, not what is answered: they may change from call to call."""


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
    samples: int | Mapping[str, int] = 1
    output: Path | None = None
    data: Path | None = None
    clips: Path | None = None
    concurrency: int = 32
    max_tokens: int = Decoding().max_tokens
    video: VideoMode = "frames"
    frames: int = FRAMES
    closing: Path | None = None
    answer_from: str = AFTER_THOUGHTS
    template_args: Mapping[str, Any] | None = None
    think_open: bool = False
    strict: bool = False
    vllm: Mapping[str, Any] = field(default_factory=dict)
    code: bool = True
    dry_run: bool = False

    @property
    def decoding(self) -> Decoding:
        """The protocol's decoding under the given token limit."""
        return Decoding(max_tokens=self.max_tokens)

    def samples_of(self, benchmark: str) -> int:
        """Answers to each question of a benchmark."""
        given = {"": self.samples} if isinstance(self.samples, int) else {name.lower(): k for name, k in self.samples.items()}
        return given.get(benchmark.lower(), given.get("", 1))

    @property
    def vllm_named(self) -> dict[str, str]:
        """Arguments of vLLM by their names there; "" for one without a value."""
        return {name.replace("_", "-"): "" if value in (None, True) else str(value) for name, value in self.vllm.items()}

    @property
    def vllm_arguments(self) -> list[str]:
        """The same as vLLM's command line has them."""
        return [f"--{name}={value}" if value else f"--{name}" for name, value in self.vllm_named.items()]

    @property
    def book(self) -> PromptBook:
        """The prompts, with the closing instruction of this evaluation. TemplateError where its file is none."""
        return PromptBook({CLOSING: self.closing} if self.closing else {})


def read_samples(text: str) -> int | dict[str, int]:
    """`--samples`: a number, or NAME=NUMBER for some benchmarks, with commas, and a number alone for the others. SettingsError else."""
    given: dict[str, int] = {}
    for part in text.split(","):
        name, _, number = part.rpartition("=")
        try:
            given[name.strip()] = int(number)
        except ValueError:
            raise SettingsError(f"--samples {text!r}: {part!r} holds no number; write 4, or AIME25=32,MMLU=1") from None
    return given[""] if given.keys() == {""} else given


def read_template_args(text: str) -> dict[str, Any]:
    """`--template-args` as a mapping. SettingsError where the text is none."""
    try:
        value = parse_yaml(text)
    except ValueError as error:
        raise SettingsError(f"--template-args {text!r} is no YAML ({error}); write for example '{{enable_thinking: true}}'") from error
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        raise SettingsError(f"--template-args {text!r} is no mapping; write for example '{{enable_thinking: true}}'")
    return value


def with_words_of_run(options: EvalOptions, checkpoint: Path | None) -> EvalOptions:
    """The options with closing instruction and template arguments of the run that made the checkpoint, where they name none themselves.

    Answers are read where the closing instruction asks for them: a run's own as its recipe says, one that is named by its name; but
    boxes behind the thoughts alone, as the protocol has it.

    A run's checkpoints are its final/ and what lies in its checkpoints/.

    Raises:
        SettingsError: the run's recipe cannot be read, or its closing instruction is gone.
    """
    run = run_of(checkpoint) if checkpoint else None
    named = CLOSINGS.get(str(options.closing), AFTER_THOUGHTS)
    place = named if AnswerForm(named).kind != "box" else AFTER_THOUGHTS
    if run is None or (options.closing is not None and options.template_args is not None):
        return replace(options, template_args=options.template_args or {}, answer_from=place)
    settings = load_recipe(run / "recipe.yaml")
    closing = options.closing or settings.prompts.get(CLOSING)
    if closing is not None and str(closing) not in CLOSINGS and not closing.is_file():
        raise SettingsError(f"{run} was trained with the closing instruction {closing}, which is gone: name its file with --closing")
    args = settings.student.template_args if options.template_args is None else options.template_args
    if options.closing is None and settings.answer_form.kind != "box":
        place = settings.answer_form.place
    return replace(options, closing=closing, template_args=args, answer_from=place)


def run_of(checkpoint: Path) -> Path | None:
    """The folder of the run that a checkpoint belongs to; None where it belongs to none."""
    place = checkpoint.absolute()
    names = [folder.name for folder in (place, *place.parents)][:3]
    run = place.parent if names[0] == "final" else place.parents[names.index("checkpoints")] if "checkpoints" in names else None
    return run if run is not None and (run / "recipe.yaml").is_file() else None


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


def settings_of(options: EvalOptions, model: str, judge: str | None, video: str, weights: str | None = None) -> dict[str, Any]:
    """What the rows of one folder have in common: rows under other settings must not be mixed with them.

    Args:
        model: the checkpoint, or the name that a server gives to it.
        judge: its name; None where none is asked.
        video: file or frames.
        weights: of `fingerprint`.
    """
    prompts = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in options.judge_prompts.items()}
    return {
        "model": model,
        "weights": weights,
        "closing": options.book.text(CLOSING, {}),
        "template_args": dict(options.template_args or {}),
        "judge": judge,
        "decoding": asdict(options.decoding),
        "pixels": list(LIMITS),
        "video": video,
        "frames": options.frames,
        "think_open": options.think_open,
        **({"answer_from": options.answer_from} if options.answer_from != AFTER_THOUGHTS else {}),
        "judge_prompts": prompts,
        "vllm": {name: value for name, value in options.vllm_named.items() if name not in _OF_THE_MACHINE},
        "data": str(options.data.absolute()) if options.data else None,
        "clips": str(options.clips.absolute()) if options.clips else None,
    }


def digest_of(value: Any) -> str:
    """A short name for anything that JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=True).encode()).hexdigest()[:32]

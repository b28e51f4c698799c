"""The model card of a run: what was trained how, with which result, and nothing of where: no path, no address, no key."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from zppo import __version__
from zppo.config.recipe import dump_yaml
from zppo.config.settings import Settings

Lines = Sequence[Mapping[str, Any]]

_ON_THE_HUB = re.compile(r"[\w.-]+/[\w.-]+")
_NAMED = re.compile(r"hub:[\w.-]+/[\w.-]+|(?:lab|reasoning_gym):[\w./-]+")
_PRIVATE = frozenset(
    {"base_urls", "base_url", "extra_body", "folder", "key_env", "output", "prompts", "push", "tracker_project", "trackers"}
)
_LOCAL = "(local)"
_VISION = ("preprocessor_config.json", "processor_config.json")


def run_card(name: str, settings: Settings, lines: Lines, final: Path) -> str:
    """README.md of final/, with the metadata that the hub reads.

    Args:
        name: the run's.
        lines: of metrics.jsonl.
        final: the folder of the student, which says whether it sees.
    """
    from huggingface_hub import EvalResult, ModelCardData

    seeing = any((final / file).is_file() for file in _VISION)
    before, after = _evaluation(lines, "eval", 0), _evaluation(lines, "final", -1)
    base, train = settings.student.model, settings.data.train
    data = [*([train] if isinstance(train, str) else [part.source for part in train]), settings.data.eval or ""]
    sets = list(dict.fromkeys(source.removeprefix("hub:") for source in data if source.startswith("hub:")))
    pipeline = "image-text-to-text" if seeing else "text-generation"
    results = None
    if after and after["accuracy"] is not None and settings.data.eval and settings.data.eval.startswith("hub:"):
        held_out = settings.data.eval.removeprefix("hub:")
        named: dict[str, Any] = {"dataset_type": held_out, "dataset_name": held_out, "dataset_split": settings.data.eval_split}
        results = [EvalResult(task_type=pipeline, metric_type="accuracy", metric_value=round(after["accuracy"], 4), **named)]
    metadata = ModelCardData(
        library_name="transformers",
        base_model=base if on_the_hub(base) else None,
        datasets=sets or None,
        pipeline_tag=pipeline,
        tags=list(dict.fromkeys(("zppo", settings.method.name, *(["lora"] if settings.train.lora else [])))),
        model_name=name if results else None,
        eval_results=results,
    )
    body = [f"# {name}", "", *_words(settings), "", *_results(before, after), f"{_work(lines)}.", ""]
    recipe = dump_yaml(public(settings.model_dump(mode="json", exclude_defaults=True)))
    body += ["## Recipe", "", "What differs from the defaults; names of local files and addresses are left out.", "", "```yaml"]
    return "\n".join(["---", metadata.to_yaml(), "---", "", *body, recipe.rstrip(), "```", ""])


def on_the_hub(name: str) -> bool:
    """Whether a model's name is one of the hub: owner/name, and no folder here."""
    return _ON_THE_HUB.fullmatch(name) is not None and not Path(name).exists()


def public(value: Any, key: str = "") -> Any:
    """Settings without what is of this machine alone: files, addresses, own code, names of variables.

    A text stays where no path, address or import path can be meant by it, or where it names a set or a model that others have too.
    """
    if isinstance(value, Mapping):
        return {k: public(v, k) for k, v in value.items() if k not in _PRIVATE}
    if isinstance(value, list | tuple):
        return [public(v, key) for v in value]
    if not isinstance(value, str) or key == "answer_after":
        return value
    known = _NAMED.fullmatch(value) or (key == "model" and on_the_hub(value))
    return value if known or not re.search(r"[/\\:@~]", value) else _LOCAL


def _words(settings: Settings) -> list[str]:
    method, student = settings.method.name, settings.student.model
    base = f"[{student}](https://huggingface.co/{student})" if on_the_hub(student) else f"`{public(student, 'model')}`"
    base = "A local checkpoint" if base == f"`{_LOCAL}`" else base
    teacher = settings.teacher
    lines = [
        f"{base}, post-trained with the method `{method}` by zppo {__version__}, an independent implementation of",
        "[Zone of Proximal Policy Optimization](https://arxiv.org/abs/2606.18216).",
    ]
    if teacher is not None and settings.method.resolve().needs_teacher and (shown := public(teacher.model, "model")) != _LOCAL:
        lines.append(f"Its teacher was `{shown}`.")
    lora = settings.train.lora
    if lora and settings.student.tinker:
        lines.append(f"Low-rank adapters (rank {lora.rank}, alpha {lora.alpha:g}) were trained, on another machine: they are in `adapter/`")
        lines.append("for `peft`, or kept by the server under the path in `tinker.json`. The base model is not in these files.")
    elif lora:
        lines.append(f"Low-rank adapters (rank {lora.rank}, alpha {lora.alpha:g}) were trained and are merged into these weights;")
        lines.append("by themselves, for `peft`, they are in `adapter/`.")
    return [*lines, "Check the licences of the base model and of the training data before you share it."]


def _evaluation(lines: Lines, event: str, which: int) -> Mapping[str, Any] | None:
    found = [line for line in lines if line.get("event") == event]
    return found[which] if found else None


def _results(before: Mapping[str, Any] | None, after: Mapping[str, Any] | None) -> list[str]:
    if not (before and after):
        return []
    rows = [(level, before["by_level"].get(level), value) for level, value in after["by_level"].items()]
    rows.append(("all", before["accuracy"], after["accuracy"]))
    shown = [f"| {level} | {_share(old)} | {_share(new)} |" for level, old, new in rows]
    note = f"{after['count']:,} completions, after training evaluated from these files."
    if ungraded := before["ungraded"] + after["ungraded"]:
        note += f" {ungraded:,} completions before and after are left out, since the judge could not be reached."
    return ["## Held-out accuracy, plain prompts", "", "| level | before | after |", "|---|---|---|", *shown, "", note, ""]


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _work(lines: Lines) -> str:
    steps = [line for line in lines if line.get("event") == "step"]
    rollouts, own, teacher = (sum(line.get(key) or 0 for line in steps) for key in ("rollouts", "student_tokens", "teacher_tokens"))
    return f"{len(steps):,} steps, {rollouts:,.0f} rollouts, {own:,.0f} student tokens, {teacher:,.0f} teacher tokens"

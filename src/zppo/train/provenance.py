"""What a checkpoint came from, and what has changed since: a resumed run says where it differs from an uninterrupted one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from zppo.config.model_settings import ModelSettings
from zppo.config.removed import Gone, without_removed
from zppo.config.settings import Settings
from zppo.core.types import Question
from zppo.errors import CheckpointError
from zppo.names import load_part, model_folder

MOST_NAMED = 8
_SHAPE = ("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
_IN_A_STEP = ("seed", "train.minibatches", "advantage.", "zone.dynamic_sampling", "loss.mask_truncated")
_WHOLE = ("*.safetensors", "*.json", "*.jinja")
_EDGE = 1 << 20  # bytes at either end of a weights file that are looked at: trained weights differ everywhere


def origin_of(settings: Settings, questions: Sequence[Question], config: PretrainedConfig, processes: int) -> dict[str, Any]:
    """What a run trains from, JSON-ready; part of every checkpoint.

    Args:
        settings: the recipe.
        questions: all training questions, in order.
        config: of the student.
        processes: that train side by side.
    """
    digest, images = hashlib.sha256(), hashlib.sha256()
    for question in questions:
        # An image is known by its bytes: its file may lie elsewhere now.
        named = question.to_dict() | {"images": [""] * len(question.images)}
        digest.update(json.dumps(named, sort_keys=True).encode())
        for image in question.images:
            images.update(image.sha256.encode())
    teachers = [t for t in (settings.teacher, *settings.more_teachers) if t is not None]
    models = {
        "student": _files(settings.student, _WHOLE if settings.train.lora else ("tokenizer*", "*.jinja")),
        **{f"teacher {i}": _files(t, _WHOLE) for i, t in enumerate(teachers, 1)},
        **({"judge": _files(settings.judge, _WHOLE)} if settings.judge else {}),
    }
    return {
        "recipe": settings.model_dump(mode="json", exclude={"output"}),
        "method": settings.method.resolve().name,
        "questions": {"count": len(questions), "sha256": digest.hexdigest()},
        "images": images.hexdigest(),
        "student": _shape(config),
        "models": models,
        "processes": processes,
    }


def check_student(state: Mapping[str, Any], student: ModelSettings, where: Path) -> None:
    """Whether a checkpoint's student is of the recipe's architecture, found before its weights are read.

    Raises:
        CheckpointError: it is another one.
    """
    try:
        config = load_part(AutoConfig, model_folder(student.model), revision=student.revision)
    except (OSError, ValueError, KeyError):
        return  # the student's own files are not needed to go on, only its tokenizer, which says itself what it lacks
    origin = state.get("origin")
    then, now = (origin or {}).get("student", {}), _shape(config)
    differing = [f"{name} {then.get(name)}, not {now[name]}" for name in now if then.get(name) != now[name]]
    if differing:
        raise CheckpointError(
            f"{where} belongs to another student than {student.model!r}: {', '.join(differing)}. Put back the student.model of the run, "
            "or start a new one"
        )


def changes_since(then: Mapping[str, Any], now: Mapping[str, Any], where: Path, *, mid_step: bool) -> list[str]:
    """What has changed since a checkpoint, in words for a person; empty where nothing has.

    Raises:
        CheckpointError: the checkpoint belongs to another recipe, or a setting that its unfinished step depends on has changed.
    """
    if then["method"] != now["method"]:
        raise CheckpointError(
            f"{where} was made by the method {then['method']!r}, and the recipe says {now['method']!r}: put the method back, or start a "
            "new run"
        )
    gone: list[Gone] = []
    before, after = dict(_flat(without_removed(then["recipe"], gone))), dict(_flat(now["recipe"]))
    before |= {setting.name: setting.value for setting in gone}
    changed = {key: (before.get(key), after.get(key)) for key in (after | before) if before.get(key) != after.get(key)}
    bound = [key for key in changed if mid_step and key.startswith(_IN_A_STEP)]
    if bound:
        raise CheckpointError(
            f"{where} holds a step that was stopped between two updates, and {bound[0]} has changed from {changed[bound[0]][0]} to "
            f"{changed[bound[0]][1]} since: put it back until the step is done, or move "
            "that folder away, and the checkpoint before it is used"
        )
    notes = [f"{key} was {was}, is {value}" for key, (was, value) in list(changed.items())[:MOST_NAMED]]
    if len(changed) > MOST_NAMED:
        notes.append(f"{len(changed) - MOST_NAMED} more settings have changed")
    if then["questions"] != now["questions"]:
        counts = then["questions"]["count"], now["questions"]["count"]
        more = f" ({counts[0]:,} then, {counts[1]:,} now): the order of the rest is another" if counts[0] != counts[1] else ""
        notes.append(f"the training questions are not the same as before{more}")
    if then.get("images", now["images"]) != now["images"]:
        notes.append("the images of the training questions are not the same as before")
    notes += [
        f"the files of the {name} are not the same as before"
        for name, files in now["models"].items()
        if name in then["models"] and then["models"][name] != files
    ]
    if then["processes"] != now["processes"]:
        notes.append(f"{then['processes']} processes trained, and {now['processes']} go on")
    return notes


def _shape(config: PretrainedConfig) -> dict[str, Any]:
    text = config.get_text_config()
    return {name: getattr(text, name, None) for name in _SHAPE}


def _files(model: ModelSettings, patterns: Sequence[str]) -> dict[str, str]:
    """Facts about the files of a model by which a change is noticed; empty for a model that is no folder."""
    folder = Path(model_folder(model.model))
    if not folder.is_dir():
        return {}
    return {path.name: _facts(path) for pattern in patterns for path in sorted(folder.glob(pattern))}


def _facts(path: Path) -> str:
    """Size, and a digest of both ends."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        digest = hashlib.sha256(file.read(_EDGE))
        file.seek(max(0, size - _EDGE))
        digest.update(file.read(_EDGE))
    return f"{size}:{digest.hexdigest()}"


def _flat(section: Any, above: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every setting."""
    if not isinstance(section, Mapping):
        yield above, section
        return
    for key, value in section.items():
        yield from _flat(value, f"{above}.{key}" if above else key)

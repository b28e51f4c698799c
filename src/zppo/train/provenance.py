"""What a checkpoint came from, and what has changed since: a resumed run says where it differs from an uninterrupted one."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, asdict, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from zppo import __version__
from zppo.config.help import known_keys
from zppo.config.methods import Method
from zppo.config.model_settings import ModelSettings
from zppo.config.removed import Gone, without_removed
from zppo.config.settings import MethodSettings, Settings
from zppo.core.types import Question
from zppo.errors import CheckpointError
from zppo.names import CLOSINGS, load_part, model_folder
from zppo.runs.files import WORDS, sync, writing

MOST_NAMED = 8
_METHOD = tuple(f.name for f in fields(Method) if f.name != "paper")
_SHAPE = ("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
# What the rollouts and old log-probs of a step were made by, and what its updates must have in common.
_IN_A_STEP = (
    *("seed", "train.minibatches", "train.precision", "train.old_logprobs", "advantage.", "zone.", "loss."),
    *("rollout.temperature", "rollout.top_p", "rollout.top_k", "rollout.group_size", "rollout.engine"),
    *("data.images.min_pixels", "data.images.max_pixels"),  # the token ids of a prompt hold a place for each feature of its images
)
_PACKAGES = ("torch", "transformers", "peft", "vllm", "bitsandbytes", "tinker")
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
        "method": asdict(settings.method.resolve()),
        "words": {key: _digest(path) for key, path in word_files(settings).items()},
        "code": {key: _digest(path) for key, path in _code_files(settings).items()},
        "versions": _versions(settings),
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
    _check_method(then, now, where)
    gone: list[Gone] = []
    before, after = dict(_flat(without_removed(then["recipe"], gone))), dict(_flat(now["recipe"]))
    before |= {setting.name: setting.value for setting in gone}
    before = {key: _default(key) for key in after if key not in before} | before  # a setting that is newer than the checkpoint
    keys = [key for key in (after | before) if not ("words" in then and _names_words(key))]  # where they lie is no change: what they say is
    changed = {key: (before.get(key), after.get(key)) for key in keys if before.get(key) != after.get(key)}
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
    notes += [f"the words of {key} are not the same as before" for key in _differing(then, now, "words")]
    notes += [f"the code of {key} is not the same as before" for key in _differing(then, now, "code")]
    versions = (then.get("versions", {}), now["versions"])
    notes += [f"{name} was {versions[0][name]}, is {versions[1].get(name)}" for name in _differing(then, now, "versions")]
    if then["processes"] != now["processes"]:
        notes.append(f"{then['processes']} processes trained, and {now['processes']} go on")
    return notes


def word_files(settings: Settings) -> dict[str, Path]:
    """The user's own texts that models are shown, by their settings: templates of prompts, chat templates."""
    models = {"student": settings.student, "teacher": settings.teacher, "judge": settings.judge}
    models |= {f"more_teachers.{i}": teacher for i, teacher in enumerate(settings.more_teachers)}
    templates = {f"{name}.template": model.template for name, model in models.items() if model is not None}
    files = {f"prompts.{name}": path for name, path in settings.prompts.items() if str(path) not in CLOSINGS} | templates
    return {key: path.expanduser() for key, path in files.items() if path is not None}


def keep_words(settings: Settings, run: Path) -> Settings:
    """Copies the user's own texts into the run folder, and gives the recipe that names the copies, by their place in it [zppo].

    Raises:
        StorageError: the disk refuses.
    """
    data = settings.model_dump(mode="json")
    for key, path in word_files(settings).items():
        kept = Path(WORDS, re.sub(r"[^\w.-]", "_", key) + path.suffix)
        with writing(run / kept):
            (run / WORDS).mkdir(exist_ok=True)
            shutil.copyfile(path, run / kept)
            sync(run / kept)
        *above, last = key.split(".", 1) if key.startswith("prompts.") else key.split(".")
        section: Any = data
        for part in above:
            section = section[int(part) if part.isdigit() else part]
        section[last] = str(kept)
    return Settings.model_validate(data)


def _default(key: str) -> Any:
    known = known_keys().get(key)
    return _plain(known.default) if known is not None and not known.required else None


def _names_words(key: str) -> bool:
    return key.startswith("prompts") or key.endswith(".template")


def _code_files(settings: Settings) -> dict[str, Path]:
    """Python files of the user's that the recipe names."""
    files = {key: Path(spec.rpartition(":")[0]) for key, spec in settings.own_code.items()}
    return {key: path for key, path in files.items() if path.suffix == ".py"}


def _versions(settings: Settings) -> dict[str, str]:
    """Of this package and of those that compute; what a run does not use is no part of it."""
    cluster = settings.student.tinker is not None
    used = {"tinker": cluster, "peft": settings.train.lora is not None and not cluster, "vllm": settings.rollout.engine == "vllm"}
    used["bitsandbytes"] = settings.train.optimizer == "adamw-8bit" or settings.student.quantize is not None
    found = {"zppo": __version__}
    for name in _PACKAGES:
        if used.get(name, True):
            with suppress(PackageNotFoundError):
                found[name] = version(name)
    return found


def _check_method(then: Mapping[str, Any], now: Mapping[str, Any], where: Path) -> None:
    """All that a method resolves to must be as it was. Checkpoints of earlier versions have its name alone, and overrides in the recipe."""
    before, after = then["method"], now["method"]
    if isinstance(before, str):
        overrides = dict(then["recipe"]["method"])
        overrides.pop("loss", None)  # gone since
        before = asdict(MethodSettings.model_validate(overrides).resolve())
    before = {f.name: f.default for f in fields(Method) if f.default is not MISSING} | before  # a field that is newer than the checkpoint
    differing = [name for name in _METHOD if _plain(before.get(name)) != _plain(after.get(name))]
    if differing:
        what = "" if differing[0] == "name" else f" with {differing[0]} {_plain(before.get(differing[0]))!r}"
        is_now = "" if differing[0] == "name" else f" with {_plain(after[differing[0]])!r}"
        raise CheckpointError(
            f"{where} was made by the method {before['name']!r}{what}, and the recipe says {after['name']!r}{is_now}: put the method back, "
            "or start a new run"
        )


def _differing(then: Mapping[str, Any], now: Mapping[str, Any], part: str) -> list[str]:
    """What of a part is another one now; nothing where an earlier version did not write it."""
    if part not in then:
        return []
    return [key for key in now[part] | then[part] if now[part].get(key) != then[part].get(key)]


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _digest(path: Path) -> str:
    """ "" where it cannot be read: who needs it says so."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return ""


def _shape(config: PretrainedConfig) -> dict[str, Any]:
    text = config.get_text_config()
    return {name: getattr(text, name, None) for name in _SHAPE}


def model_facts(model: ModelSettings) -> dict[str, str]:
    """Facts about the files of a model by which another one in its place is noticed; empty for one that is no folder."""
    return _files(model, _WHOLE)


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

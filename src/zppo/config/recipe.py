"""A recipe (YAML) and command-line overrides -> `Settings`, and back."""

from __future__ import annotations

import difflib
import io
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from ruamel.yaml import YAML
from ruamel.yaml.constructor import SafeConstructor
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import ScalarNode
from ruamel.yaml.representer import SafeRepresenter

from zppo.config.bundled import find_recipe, recipe_names
from zppo.config.help import find_key, known_keys, nearest_key, show
from zppo.config.removed import Gone, without_removed
from zppo.config.settings import Settings
from zppo.errors import SettingsError
from zppo.names import CLOSINGS, check_file, readable, scheme_of, template_file

_MODELS = ("student.model", "teacher.model", "judge.model")
_FILES = ("data.train", "data.eval", "student.template", "teacher.template", "judge.template")
_SHORTHAND = "method"
MOST_VALUES = 100_000  # of a recipe, which has hundreds
# What pydantic puts behind the key of a value that may be of several types.
_UNION_MEMBER = re.compile(r"constrained-\w+|literal\[.*\]|tuple\[.*\]")

Bases = tuple[Path, ...]


def load_recipe(recipe: str | Path | Mapping[str, Any] | Settings, overrides: Sequence[str] | Mapping[str, Any] = ()) -> Settings:
    """The settings of a recipe with overrides applied.

    Relative paths in a file are looked for next to it, then in the working directory; all others in the working directory. `lab:` names
    and names of models that are no folder pass through. The paths in the result are absolute, `output` excepted.

    Args:
        recipe: the path of a YAML file or the name of a recipe that comes with zppo, what such a file holds, or settings.
        overrides: `--key.sub=value` or `--key.sub value`, values read as YAML; or keys and values, where two underscores may stand for a
            dot (`key__sub`). Later ones win.

    Raises:
        SettingsError: the recipe is missing or no YAML, or settings are unknown, missing or wrong: all of them in one message.
    """
    if isinstance(overrides, Mapping):
        said, given = "an override", [(key.replace("__", "."), _plain(value)) for key, value in overrides.items()]
    else:
        said, given = "set on the command line", parse_overrides(overrides)
    if isinstance(recipe, str | Path):
        path = find_recipe(recipe)
        raw, source = _read(path), str(recipe)
        bases: Bases = (path.absolute().parent, Path.cwd())
    elif isinstance(recipe, Settings) and not given:
        return recipe
    else:
        raw, source, bases = _plain(recipe), "the recipe", (Path.cwd(),)
        if not isinstance(raw, dict):
            raise SettingsError(f"{show(recipe)!r} is no recipe: give the path of one, a mapping as one holds it, or Settings")
    served = _served(raw, given)
    data = _anchor(raw, bases, served)
    problems = []
    for key, value in given:
        flat = _unflatten(key, value)
        problem = _merge(data, _anchor(flat, (Path.cwd(),), served), key)
        problems += [problem] if problem else []
    return _validate(data, source, dict.fromkeys((key for key, _ in given), said), problems)


def refuse_code(settings: Settings, source: str | Path) -> None:
    """SettingsError where a recipe names code of its own, which a run would import."""
    if settings.own_code:
        named = ", ".join(f"{key}: {spec}" for key, spec in settings.own_code.items())
        raise SettingsError(
            f"{source} names code of its own ({named}), and --no-code imports none: read that code and leave --no-code out, or take the "
            "setting out of the recipe"
        )


def parse_overrides(overrides: Sequence[str]) -> list[tuple[str, Any]]:
    """(dotted key, value) of each override, in order. Raises SettingsError for one that has no value or whose value is no YAML."""
    result = []
    rest = iter(overrides)
    for token in rest:
        name, equals, text = token.partition("=")
        if not name.startswith("--") or len(name) < 3:
            raise SettingsError(f"{token!r} is no override; write --key.sub=value, for example --train.steps=100")
        if not equals:
            following = next(rest, None)
            if following is None or following.startswith("--"):
                near = _nearest(name[2:])
                raise SettingsError(f"{name} has no value; write {name}=VALUE{near}")
            text = following
        try:
            result.append((name[2:], _value_of(text)))
        except ValueError as error:
            raise SettingsError(f"the value of {name} is no YAML: {text!r} ({error}); put it in quotes") from error
    return result


def _value_of(text: str) -> Any:
    """What an override says: YAML without comments, for who types ` #` on a command line means it. Raises ValueError."""
    if "#" not in text:
        return parse_yaml(text)
    # To YAML a comment begins at a # behind white space; no text holds this character, and it is a letter to YAML.
    return _with_hashes(parse_yaml(re.sub(r"(?<![^ \t])#", _HASH, text)))


_HASH = "\ue123"


def _with_hashes(value: Any) -> Any:
    if isinstance(value, dict):
        return {_with_hashes(key): _with_hashes(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_with_hashes(inner) for inner in value]
    return value.replace(_HASH, "#") if isinstance(value, str) else value


def dump_recipe(settings: Settings) -> str:
    """Every setting as YAML that `load_recipe` reads back to equal settings (of settings that it made)."""
    return dump_yaml(settings.model_dump(mode="json"))


def parse_yaml(text: str) -> Any:
    """The value that the text means by YAML 1.2; dates are text. Raises ValueError, also for a key that stands twice."""
    try:
        if (root := _yaml().compose(text)) is not None and _size(root, {}) > MOST_VALUES:
            raise ValueError(f"it stands for more than {MOST_VALUES:,} values, most of them by aliases (*name)")
        return _yaml().load(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    except MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark is not None else ""
        raise ValueError(f"{where}{error.problem}") from error
    except (YAMLError, LookupError) as error:  # LookupError: `!!bool x`, `!!int ''`
        raise ValueError(str(error)) from error


def _size(node: Any, known: dict[int, int]) -> int:
    """How many values a node stands for, with those that aliases repeat: a few lines can stand for billions."""
    if id(node) not in known:
        known[id(node)] = MOST_VALUES + 1  # for one that holds itself
        value = node.value if isinstance(node.value, list) else []
        parts = [part for entry in value for part in (entry if isinstance(entry, tuple) else (entry,))]
        known[id(node)] = 1 + sum(_size(part, known) for part in parts)
    return known[id(node)]


def dump_yaml(data: Any) -> str:
    """Text that `parse_yaml` reads back to equal data; keys keep their order."""
    text = io.StringIO()
    _yaml().dump(data, text)
    return text.getvalue()


# Texts that readers of YAML 1.1 (PyYAML) take for something else: they are quoted, since other programs read recipes of runs too.
_YAML_1_1 = re.compile(r"(?i:y|n|yes|no|on|off)|[-+]?\d[\d_]*(?::[0-5]?\d)+(?:\.\d*)?|\d{4}-\d\d?-\d\d?.*")


class _Constructor(SafeConstructor):
    """Dates and `=` are text."""


class _Representer(SafeRepresenter):
    """Texts and numbers that readers of YAML 1.1 read alike; other line breaks survive in double quotes only."""

    def represent_str(self, data: str) -> ScalarNode:
        style = '"' if set(data) & set("\x85\u2028\u2029") else "'" if _YAML_1_1.fullmatch(data) else None
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=style)

    def represent_float(self, data: float) -> ScalarNode:
        node = super().represent_float(data)
        node.value = re.sub(r"^(-?\d+)e", r"\1.0e", node.value)  # 1e-06 is a text to YAML 1.1
        return node


for _tag in ("timestamp", "value"):
    _Constructor.add_constructor(f"tag:yaml.org,2002:{_tag}", SafeConstructor.construct_yaml_str)
_Representer.add_representer(str, _Representer.represent_str)
_Representer.add_representer(float, _Representer.represent_float)


def _yaml() -> YAML:
    """A new one for each text, since it keeps what `%YAML` said."""
    yaml = YAML(typ="safe", pure=True)
    yaml.Constructor, yaml.Representer = _Constructor, _Representer
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    yaml.width = 1 << 30  # lines that it folds do not always read back
    return yaml


def _read(path: Path) -> dict[str, Any]:
    if path.is_dir():
        raise SettingsError(f"{path} is a folder, not a recipe; name a YAML file in it")
    check_file(path, SettingsError)
    try:
        data = parse_yaml(readable(path).read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        near = difflib.get_close_matches(path.stem, recipe_names(), 1)
        said = f"; the nearest one that comes with zppo is {near[0]}" if near else ""
        raise SettingsError(
            f"there is no recipe {path} (working directory {Path.cwd()}){said}; `zppo recipes` lists those that come with zppo, and "
            "`zppo init NAME` copies one"
        ) from error
    except OSError as error:
        raise SettingsError(f"the recipe {path} cannot be read ({error.strerror}); check that it is a file that you may read") from error
    except UnicodeDecodeError as error:
        raise SettingsError(
            f"the recipe {path} is not UTF-8 (byte {error.start + 1} is 0x{error.object[error.start]:02x}); save it as UTF-8"
        ) from error
    except ValueError as error:
        raise SettingsError(f"the recipe {path} is no YAML: {error}; mend it there") from error
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        what = "is empty" if data is None else f"holds {type(data).__name__} {show(data)!r}"
        raise SettingsError(f"the recipe {path} {what}; it must hold keys and values, such as `seed: 0`")
    return data


def _unflatten(key: str, value: Any) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    assert isinstance(value, dict)
    return value


def _merge(data: dict[str, Any], new: Mapping[str, Any], key: str) -> str | None:
    """Puts the one leaf of `new`, at `key`, into `data`; what is wrong if `data` has no section there."""
    parts = key.split(".")
    for depth, part in enumerate(parts[:-1], 1):
        new = new[part]
        below = data.get(part)
        if isinstance(below, str) and parts[:depth] == [_SHORTHAND]:
            below = {"name": below}
        if below is not None and not isinstance(below, dict):
            return f"{key} cannot be set: {'.'.join(parts[:depth])} is {show(below)!r}, not a section{_nearest(key)}"
        data[part] = data = dict(below or {})
    data[parts[-1]] = new[parts[-1]]
    return None


def _served(raw: Mapping[str, Any], given: Sequence[tuple[str, Any]] = ()) -> frozenset[str]:
    """The models that are on servers, `teacher.model` or `judge.model`: they have names there and are no paths here."""
    found = []
    for section in ("teacher", "judge"):
        own = raw.get(section)
        for key, value in given:
            if key == section:
                own = value
            elif key == f"{section}.base_urls":
                own = {"base_urls": value}
        if isinstance(own, Mapping) and own.get("base_urls"):
            found.append(f"{section}.model")
    return frozenset(found)


def _anchor(given: Mapping[str, Any], bases: Bases, served: frozenset[str]) -> dict[str, Any]:
    """The data with relative paths made absolute: the first base that has the file, else the first base."""
    data: dict[str, Any] = _plain(given)
    for section, key, value in _texts(data, _FILES):
        section[key] = _file(value, bases)
    for section, key, value in _texts(data, [name for name in _MODELS if name not in served]):
        section[key] = _model(value, bases)
    for section, key, value in _texts(data, ("grading.reward",)):
        section[key] = _code(value, bases)
    grading = data.get("grading")
    if isinstance(grading, dict) and isinstance(rewards := grading.get("reward"), list):
        grading["reward"] = [_code(reward, bases) if isinstance(reward, str) else reward for reward in rewards]
    for each in _sources(data):
        each["source"] = _file(each["source"], bases)
    teachers = data.get("more_teachers")
    if isinstance(teachers, list):
        further = [{"teacher": teacher} for teacher in teachers]
        data["more_teachers"] = [_anchor(f, bases, _served(f))["teacher"] for f in further]
    method = data.get("method")
    if isinstance(method, dict) and isinstance(kinds := method.get("reformulations"), list):
        method["reformulations"] = [_code(kind, bases) if isinstance(kind, str) else kind for kind in kinds]
    prompts = data.get("prompts")
    if isinstance(prompts, dict):
        preset = prompts.get("closing") in CLOSINGS if isinstance(prompts.get("closing"), str) else False
        files = {k: template_file(_file(v, bases)) if isinstance(v, str) else v for k, v in prompts.items()}
        data["prompts"] = {**files, "closing": prompts["closing"]} if preset else files
    return data


def _sources(data: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The entries of a data.train that is a list."""
    section = data.get("data")
    entries = section.get("train") if isinstance(section, dict) else None
    for entry in entries if isinstance(entries, list) else ():
        if isinstance(entry, dict) and isinstance(entry.get("source"), str):
            yield entry


def _plain(value: Any) -> Any:
    """A copy as a YAML file would hold it."""
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, Mapping):
        return {str(key): _plain(below) for key, below in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(below) for below in value]
    return str(value) if isinstance(value, Path) else value


def _texts(data: dict[str, Any], keys: Sequence[str]) -> Iterator[tuple[dict[str, Any], str, str]]:
    """(section, key in it, value) of those keys that are set to a text."""
    for dotted in keys:
        *above, last = dotted.split(".")
        section: Any = data
        for part in above:
            section = section.get(part) if isinstance(section, dict) else None
        if isinstance(section, dict) and isinstance(section.get(last), str):
            yield section, last, section[last]


def _file(value: str, bases: Bases) -> str:
    if not value or scheme_of(value):
        return value
    candidates = [os.path.abspath(base / Path(value).expanduser()) for base in bases]
    return next((c for c in candidates if os.path.exists(c)), candidates[0])


def _code(value: str, bases: Bases) -> str:
    """An import path: where it names a file, that file."""
    file, colon, name = value.rpartition(":")
    return f"{_file(file, bases)}:{name}" if colon and file.endswith(".py") else value


def _model(value: str, bases: Bases) -> str:
    """A folder of that name, else the name as it is: one on the hub. Names that only a path can have are paths."""
    path = _file(value, bases)
    return path if os.path.isdir(path) or value.startswith(("./", "../", "~", "/")) else value


def _validate(data: dict[str, Any], source: str, overridden: Mapping[str, str], problems: list[str]) -> Settings:
    gone: list[Gone] = []
    data = without_removed(data, gone)
    problems = [*problems, *(setting.message for setting in gone), *_misplaced_booleans(data)]
    try:
        settings = Settings.model_validate(data)
    except ValidationError as error:
        found = (_problem(details, overridden) for details in error.errors(include_url=False))
        problems += dict.fromkeys(found)  # a value that may be of two types has a problem with each
    else:
        if not problems:
            return settings
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    listing = "\n".join(f"  - {problem}" for problem in problems)
    raise SettingsError(f"{source}: {count}\n{listing}\n`zppo train --help` lists every setting.")


def _misplaced_booleans(data: Mapping[str, Any]) -> Iterator[str]:
    """pydantic would read true as the number 1."""
    for key in known_keys().values():
        if not key.section and bool not in key.types and {int, float} & set(key.types):
            *above, last = key.name.split(".")
            section: Any = data
            for part in above:
                section = section.get(part) if isinstance(section, dict) else None
            if isinstance(section, dict) and isinstance(section.get(last), bool):
                yield f"{key.name}: {show(section[last])!r} does not fit; expected {key.kind} ({key.description})"


def _problem(details: ErrorDetails, overridden: Mapping[str, str]) -> str:
    """One pydantic error in words: key, value, what is expected."""
    parts = [part for part in map(str, details["loc"]) if not _UNION_MEMBER.fullmatch(part)]
    name = ".".join(parts)
    said = next((said for key, said in overridden.items() if f"{key}.".startswith(f"{name}.")), "")
    where = f" ({said})" if said else ""
    if details["type"] == "extra_forbidden":
        return f"{name} is no setting{where}{_nearest(name)}"
    while parts and find_key(".".join(parts)) is None:
        parts.pop()
    key = find_key(".".join(parts))
    if details["type"] == "missing" and key is not None:
        wanted = [k.name for k in known_keys().values() if k.required and not k.section and f"{k.name}.".startswith(f"{name}.")]
        how = f"set {', '.join(wanted)} in the recipe or with --{wanted[0]}=VALUE" if wanted else "set it there"
        return f"{name} is missing ({key.description}); {how}"
    if details["type"] == "value_error" or key is None:
        message = details["msg"].removeprefix("Value error, ")
        return f"{name}: {message}" if name else message
    expected = key.kind
    if key.section:
        expected = f"a section with {', '.join(k for k in known_keys() if k.rpartition('.')[0] == key.name)}"
    shown = show(details["input"])
    shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
    return f"{name}: {shown!r} does not fit{where}; expected {expected} ({key.description})"


def _nearest(name: str) -> str:
    return "" if find_key(name) else f"; the nearest one is {nearest_key(name)}"

"""A benchmark of the user's own: a YAML file that says where its rows are, which column is what and what kind of answer is expected.

Rows are read as a recipe's training data is (`zppo.data`): files, folders laid out as on the hub, and sets of the hub. Where columns do
not say enough, a Python function makes the items; a benchmark may also be Python alone.
"""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from zppo.config.data_settings import ColumnSettings
from zppo.config.model_settings import Section
from zppo.config.recipe import parse_yaml
from zppo.core.types import IMAGE, JUDGE, AnswerList, Golds, Question
from zppo.data.hub import folder_rows
from zppo.data.local_files import READERS, Place, Rows, SourceSettings, file_rows
from zppo.data.rows import RowImages, not_looked_at, question_from_row, unused_images
from zppo.errors import DataError, SettingsError, one_line
from zppo.evals.adapters.choice import LETTERS, checked_options, with_options
from zppo.evals.adapters.row import DatasetRow, written_value
from zppo.evals.benchmark import Benchmark, HubDataset
from zppo.evals.item import Item, Kind
from zppo.grading.golds import bare_items
from zppo.grading.text import normalise
from zppo.names import check_file, load_object, readable

YAML_ENDINGS = (".yaml", ".yml")
_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,63}", re.ASCII)
_HUB = re.compile(r"(?:hub:)?([A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*)", re.ASCII)
_LOOKED_AT = 20  # rows that are tried before a server is started
_KINDS: Mapping[str, Kind] = {"choice": "choice", "number": "number", "maths": "number", "text": "text", "judge": "judged"}
_RULED: frozenset[Kind] = frozenset(("choice", "number", "precision", "grid", "anls", "ocr"))  # no judge, if it is not asked for
# What messages about training data call things, and what they are called here.
_OTHER_WORDS = (("data.train and data.eval", "source"), ("data.columns.", "columns."), ("data.", ""))


class OwnColumns(ColumnSettings):
    """Which column holds what: as `data.columns` of a recipe, and where the options stand."""

    options: str | tuple[str, ...] = Field("options", description="of kind choice: a column with a list, or one column for each option")
    choices: Literal[""] = Field("", description="not used: a benchmark names `options`")


class OwnSettings(Section):
    """What the YAML file of a benchmark says."""

    source: str = Field(description="a file or folder (relative to the YAML file), or owner/name on the hub")
    kind: Literal["choice", "number", "maths", "text", "judge"] | None = Field(None, description="of answer")
    name: str = Field("", description="by default that of the YAML file")
    title: str = Field("", description="a full name")
    config: str | None = Field(None, description="configuration of a folder or a set on the hub")
    split: str = Field("test", description="of a folder or a set on the hub")
    revision: str | None = Field(None, description="commit or branch of a set on the hub")
    columns: OwnColumns = Field(OwnColumns(), description="names of the columns")
    answer_after: str | None = Field(None, description="the right answer is what follows the last occurrence of this text")
    answer_list: AnswerList | None = Field(None, description="what a list of right answers means: any, set or ordered")
    adapter: str | None = Field(None, description="package.module:function or file.py:function, from a row to its items")
    judged: bool | None = Field(None, description="whether a judge is asked where rules cannot decide; by default not of choice and number")

    @model_validator(mode="after")
    def _how(self) -> OwnSettings:
        if (self.kind is None) == (self.adapter is None):
            raise ValueError(f"give either kind ({', '.join(_KINDS)}) or adapter (package.module:function)")
        if self.kind == "judge" and self.judged is False:
            raise ValueError("kind judge is judged: leave judged out, or choose another kind")
        return self

    @property
    def asks_judge(self) -> bool:
        """Whether a judge is asked where rules cannot decide."""
        return self.judged if self.judged is not None else self.kind is None or _KINDS[self.kind] not in _RULED


def is_own(name: str) -> bool:
    """Whether a part of `--suite` is a benchmark of the user's own: a YAML file, or an import path."""
    return name.lower().endswith(YAML_ENDINGS) or ":" in name


def own_benchmark(name: str, code: bool = True) -> Benchmark:
    """The benchmark of a YAML file or of an import path. Its first rows are looked at, where they are on this machine.

    Args:
        name: `my-bench.yaml`; `package.module:object` or `file.py:object`, a `Benchmark` or a function without arguments that gives one, or
            that gives items.
        code: Python of the user's own may be imported.

    Raises:
        SettingsError: the file is missing or wrong, the object is none of these, or there is code and none is wanted.
        DataError: there are no rows, or the first ones are no questions.
    """
    benchmark = _from_file(Path(name).expanduser(), code) if name.lower().endswith(YAML_ENDINGS) else _from_object(name, code)
    if not _NAME.fullmatch(benchmark.name):
        raise SettingsError(f"{name}: the name {benchmark.name!r} is none that files can have; write letters, digits, -, _ and . alone")
    if benchmark.reader is not None:
        _look(benchmark)
    return benchmark


def _look(benchmark: Benchmark) -> None:
    """Whether any of the first rows is a question. DataError with what is wrong with the first of them."""
    assert benchmark.reader is not None
    first: DataError | None = None
    for row in islice(benchmark.reader(), _LOOKED_AT):
        try:
            benchmark.adapter(row)
            return
        except DataError as error:
            first = first or error
    raise first or DataError(f"{benchmark.name}: {benchmark.source.id} has no rows; it needs at least one")


# A YAML file


@dataclass(frozen=True, slots=True)
class _Own:
    """A YAML file, read: its settings, the benchmark's name, and where the rows are, None for a set on the hub."""

    settings: OwnSettings
    name: str
    rows: Path | None


def _from_file(path: Path, code_too: bool) -> Benchmark:
    text, settings = _read(path)
    local, hub = _source(path, settings.source)
    own = _Own(settings, settings.name or path.stem, local)
    source = HubDataset(hub, (settings.split,), (settings.config or "",), settings.revision) if hub else HubDataset(str(local), ())
    code, parts = "", [text.encode(), *(_contents(local) if local else ())]
    if settings.adapter is None:
        adapter = partial(_item, own, RowImages())
    else:
        spec = _beside(path, settings.adapter)
        _check_code(path, spec, code_too)
        adapter = partial(_by_function, spec, load_object(spec, "adapter", SettingsError))
        code, written = _code(spec)
        parts.append(written)
    return Benchmark(
        own.name, settings.title or own.name, "own", source, adapter, differs="", definition=_digest(parts), code=code,
        judged=settings.asks_judge, reader=partial(_rows, own, local) if local else None,
    )  # fmt: skip


def _read(path: Path) -> tuple[str, OwnSettings]:
    check_file(path, SettingsError)
    try:
        text = readable(path).read_text(encoding="utf-8-sig")
        data = parse_yaml(text)
    except FileNotFoundError as error:
        raise SettingsError(f"--suite: there is no file {path} (working directory {Path.cwd()}); name the YAML of a benchmark") from error
    except OSError as error:
        raise SettingsError(f"{path} cannot be read ({error.strerror}); name the YAML of a benchmark") from error
    except ValueError as error:  # UnicodeDecodeError too
        raise SettingsError(f"{path} is no YAML: {one_line(error)}; mend it there") from error
    if not isinstance(data, dict):
        raise SettingsError(f"{path} holds {type(data).__name__}; a benchmark needs keys and values: source and kind at least")
    try:
        return text, OwnSettings.model_validate(data)
    except ValidationError as error:
        wrong = "; ".join(_problem(e["type"], ".".join(map(str, e["loc"])), e["msg"], e["input"]) for e in error.errors())
        raise SettingsError(f"{path}: {wrong}. Known keys: {', '.join(OwnSettings.model_fields)}; docs/evaluation.md shows one") from error


def _problem(kind: str, key: str, said: str, value: object) -> str:
    if kind == "extra_forbidden":
        return f"there is no key {key!r}"
    if kind == "missing":
        return f"{key} is missing"
    said = said.removeprefix("Value error, ")
    return f"{key} is {value!r:.60}: {said[0].lower()}{said[1:]}" if key else said


def _source(path: Path, source: str) -> tuple[Path | None, str]:
    """(a file or folder, "") or (None, owner/name)."""
    local = path.parent / Path(source).expanduser()
    hub = _HUB.fullmatch(source)
    if local.exists() and not source.startswith("hub:"):
        return local, ""
    if hub and Path(source).suffix.lower() not in READERS:
        return None, hub[1]
    raise SettingsError(f"{path}: its source {str(local)!r} does not exist; name a file or folder beside it, or owner/name on the hub")


def _rows(own: _Own, path: Path) -> Iterator[DatasetRow]:
    """The rows of a file or folder."""
    with _own_words():
        for place, value in _places(own, path):
            if not isinstance(value, Mapping):
                raise DataError(f"{place}: is no object with columns")
            yield DatasetRow(own.name, place.row, value, split=place.name, folder=place.folder)


def _places(own: _Own, path: Path) -> Rows:
    if not path.is_dir():
        return file_rows(path)
    settings = own.settings
    options = settings.columns.options
    keep = None if settings.adapter else (options,) if isinstance(options, str) else options
    return folder_rows(path, SourceSettings(config=settings.config, split=settings.split), settings.columns, keep)


@contextmanager
def _own_words() -> Iterator[None]:
    """A block whose DataErrors speak of this file's keys instead of a recipe's."""
    try:
        yield
    except DataError as error:
        text = str(error)
        for theirs, ours in _OTHER_WORDS:
            text = text.replace(theirs, ours)
        raise type(error)(text) from error


def _item(own: _Own, pictures: RowImages, row: DatasetRow) -> tuple[Item, ...]:
    """The item of a row, by its columns."""
    settings, columns = own.settings, own.settings.columns
    source = str(own.rows or f"{settings.source}, split {row.split}")
    with _own_words():
        place = Place(source, row.split or row.config or own.name, row.number, row.folder)
        question = question_from_row(row.data, columns, place, settings.answer_after, pictures, settings.answer_list)
        if columns.images and not question.images and (unused := unused_images(row.data, columns)):
            raise DataError(not_looked_at(source, unused, columns))
    if question.grading == JUDGE and not settings.asks_judge:
        raise DataError(f"{place}, column {columns.grading!r}: asks for a judge, and rules decide all; write judged: true")
    kind: Kind = "judged" if question.grading == JUDGE else _KINDS[settings.kind or "text"]
    messages, options = list(question.messages), tuple[str, ...]()
    facts: dict[str, Any] = {"part": question.level} if question.level else {}
    gold: str | tuple[str, ...]
    if kind != "choice":
        gold = _gold(row, columns.answer, question, kind)
        if isinstance(question.gold, Golds) and question.gold.how == "ordered":
            facts["order"] = "fixed"
    else:
        options, gold = _choice(columns, row, question)
        messages[-1] = messages[-1]._replace(content=with_options(messages[-1].content, options))
    images = tuple(Path(ref.uri) for ref in question.images)
    if images and not any(IMAGE in message.content for message in messages):
        messages[-1] = messages[-1]._replace(content="\n".join([IMAGE] * len(images) + [messages[-1].content]))
    return (Item(question.id, own.name, tuple(messages), gold, kind, images, options=options, facts=facts),)


def _gold(row: DatasetRow, column: str, question: Question, kind: Kind) -> str | tuple[str, ...]:
    """The right answer or all that are accepted; several that are all wanted as one list, which the rules compare item by item."""
    gold = question.gold
    if isinstance(gold, str) or gold.how == "any":
        return gold if isinstance(gold, str) else gold.answers
    if kind == "judged":
        return str(gold)
    for each in gold.answers:
        if len(bare_items(each)) > 1:
            row.fail(column, f"{each[:60]!r}, one of several right answers, is a list itself; rules cannot tell them apart (kind: judge)")
    return ", ".join(gold.answers)


def _choice(columns: OwnColumns, row: DatasetRow, question: Question) -> tuple[tuple[str, ...], str]:
    """(options, letter of the right one; several with commas where all of them are asked for)."""
    labels: list[Any] = []
    names = (columns.options,) if isinstance(columns.options, str) else columns.options
    if not any(row.has(name) for name in names):
        row.fail(names[0], f"missing or empty (fields of the row: {', '.join(map(str, row.data))}); name its column in columns.options")
    if isinstance(columns.options, str):
        column, value = columns.options, row.value(columns.options)
        if isinstance(value, str):
            value = written_value(value)
        if isinstance(value, Mapping):  # {"label": [...], "text": [...]}, or an option under each label
            labels, value = (list(value.get("label") or ()), value["text"]) if "text" in value else (list(value), list(value.values()))
    else:
        column, value = names[0], [row.data[name] for name in names if row.has(name) and row.data[name] != ""]
    options = checked_options(row, column, DatasetRow(row.benchmark, row.number, {column: value}).texts(column))
    names_of = [str(label) for label in labels]
    raw = row.data.get(columns.answer)
    if isinstance(question.gold, str):
        return options, LETTERS[_right(row, columns.answer, question.gold, options, names_of, raw)]
    if question.gold.how != "set":
        row.fail(columns.answer, f"several options that are right as {question.gold.how!r}; of kind choice only all of them (set) can be")
    counted = isinstance(raw, list) and all(isinstance(each, int) for each in raw)
    found = {_right(row, columns.answer, g, options, names_of, int(g) if counted else None) for g in question.gold.answers}
    return options, ", ".join(LETTERS[i] for i in sorted(found))


def _right(row: DatasetRow, column: str, gold: str, options: tuple[str, ...], labels: list[str], raw: object) -> int:
    """Which option is right: a label, a letter, an option's own text, or a number that counts from 0."""
    if gold in labels:
        return labels.index(gold)
    letter = gold.strip("(). ")
    if len(letter) == 1 and letter in LETTERS[: len(options)]:
        return LETTERS.index(letter)
    same = [i for i, option in enumerate(options) if normalise(option) == normalise(gold)]
    place = raw if isinstance(raw, int) and not isinstance(raw, bool) and 0 <= raw < len(options) else None
    found = {*same} | ({place} if place is not None else set())
    if not found and len(letter) == 1 and letter.upper() in LETTERS[: len(options)]:
        return LETTERS.index(letter.upper())
    if len(found) != 1:
        letters = " and ".join(LETTERS[i] for i in sorted(found))
        what = f"may mean {letters}" if found else f"is none of the {len(options)} options"
        row.fail(column, f"{gold[:60]!r} {what}; write the letter of the right one (A to {LETTERS[len(options) - 1]})")
    return found.pop()


# Python


def _by_function(spec: str, function: Callable[[DatasetRow], object], row: DatasetRow) -> tuple[Item, ...]:
    """What a user's adapter makes of a row."""
    try:
        made = function(row)
        items = (made,) if isinstance(made, Item) else tuple(made) if isinstance(made, Iterable) else ()
    except DataError:
        raise
    except Exception as error:
        raise DataError(
            f"{row.benchmark}, row {row.number}: adapter {spec} failed with {type(error).__name__}: {one_line(error)}"
        ) from error
    if not all(isinstance(item, Item) for item in items) or (made is not None and not items and not isinstance(made, Iterable)):
        raise DataError(f"{row.benchmark}, row {row.number}: adapter {spec} gave {type(made).__name__}; zppo.evals.item.Item is expected")
    return tuple(replace(item, benchmark=row.benchmark) for item in items)


def _check_code(source: str | Path, spec: str, code_too: bool) -> None:
    if not code_too:
        raise SettingsError(f"{source} is or names code ({spec}), and --no-code imports none: read it and leave --no-code out")


def _from_object(spec: str, code_too: bool) -> Benchmark:
    _check_code(spec, spec, code_too)
    found = load_object(spec, "benchmark", SettingsError, call=False)
    code, written = _code(spec)
    made = found
    if not isinstance(found, Benchmark):
        try:
            made = found()
        except Exception as error:
            raise SettingsError(
                f"benchmark {spec!r} failed with {type(error).__name__}: {one_line(error)}; name a Benchmark, or a function without "
                "arguments that gives one, or that gives items"
            ) from error
    if isinstance(made, Benchmark):
        return replace(made, family="own", code=code, definition=_digest([written]))
    if not isinstance(made, Iterable) or isinstance(made, str | bytes | Mapping):
        raise SettingsError(f"benchmark {spec!r} gave {type(made).__name__}; a Benchmark or items (zppo.evals.item.Item) are expected")
    name = spec.rpartition(":")[2].rpartition(".")[2]
    items = tuple(made)
    judged = not all(isinstance(item, Item) and item.kind in _RULED for item in items)

    def rows() -> Iterator[DatasetRow]:
        return (DatasetRow(name, number, {"item": item}) for number, item in enumerate(items, 1))

    adapter = partial(_by_function, spec, lambda row: row.data["item"])
    return Benchmark(
        name, name, "own", HubDataset(spec, ()), adapter, differs="", judged=judged, reader=rows, code=code, definition=_digest([written])
    )


def _beside(path: Path, spec: str) -> str:
    """An import path whose file, where it names one, is relative to the YAML file."""
    place, colon, name = spec.rpartition(":")
    return f"{path.parent / place}{colon}{name}" if place.endswith(".py") else spec


def _code(spec: str) -> tuple[str, bytes]:
    """What is said of code that is run, and its file's bytes."""
    place = spec.rpartition(":")[0]
    file = place if place.endswith(".py") else getattr(sys.modules.get(place), "__file__", None)
    return (f"{spec} ({file})", Path(file).read_bytes()) if file and Path(file).is_file() else (spec, b"")


def _contents(path: Path) -> Iterator[bytes]:
    """Digests of the files with rows."""
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.suffix.lower() in (*READERS, ".arrow") and p.is_file())
    for each in files:
        with open(each, "rb") as file:
            yield hashlib.file_digest(file, "sha256").digest()


def _digest(parts: Iterable[bytes]) -> str:
    return hashlib.sha256(b"\0".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()[:16]

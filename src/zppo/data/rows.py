"""One row of a data file -> one question, or an error that names file, row and column.

Conversations, as data sets write them, become messages; images, in whatever form a row has them, become references.
"""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any, Protocol, cast, get_args
from urllib.parse import unquote, urlsplit

from PIL import Image

from zppo.core.parts import message_parts
from zppo.core.types import RULE, AnswerList, Gold, Golds, Grading, ImageRef, Message, Question
from zppo.data.conversations import RowError, Turns, a, check_printed, is_conversation, parsed, text_of, turns_of
from zppo.data.json_shapes import list_shape
from zppo.data.layouts import (
    Choices,
    alpaca_turns,
    choice_columns,
    choices_of,
    hidden_choices,
    is_alpaca,
    layout_hint,
    system_of,
    with_choices,
)
from zppo.data.local_files import Place
from zppo.errors import DataError, one_line
from zppo.grading.golds import bare_items
from zppo.grading.text import last_box
from zppo.images.store import cache_folder, check_whole, data_of, decode, keep, reference, rgb

FULLY_CHECKED = 256
"""So many images of a source are decoded when it is read, seconds at most; of the others header and end are looked at [zppo]."""

_KEYS = ("bytes", "path", "image", "url", "image_url")
_SHOWN = 60
_LONGEST_NAME = 255  # bytes of a file's name; base64 of an image is longer
_BASE64 = ("iVBORw0KGgo", "/9j/", "_9j_", "R0lGOD", "UklGR", "Qk", "SUkq", "TU0AK")  # how PNG, JPEG, GIF, WebP, BMP and TIFF begin in it
_ALL_BASE64 = re.compile(r"[A-Za-z0-9+/_-]{32,}={0,2}")  # no image is shorter; names of files have a dot


class RowImages:
    """Makes references of the images of one source's rows.

    A file is referred to where it lies. What comes without one (bytes, `data:` URLs, PIL images) is written into the cache, so that
    questions, buffer, checkpoints and logs hold references alone.

    Args:
        cache: where images without a file are kept; `images.store.cache_folder()` for none.
    """

    def __init__(self, cache: Path | None = None) -> None:
        self._cache = cache
        self._known: dict[Path, ImageRef] = {}
        self._decoded: set[str] = set()

    def refer(self, value: object, folder: Path) -> tuple[ImageRef, ...]:
        """The images in a value: one or a list of paths, `file:` or `data:` URLs, bytes, `{"bytes", "path"}`, or PIL images.

        Args:
            value: of the images column; None and "" for no images.
            folder: what paths are relative to.

        Raises:
            DataError: it is none of these, or an image is missing or broken; the text goes behind the name of the row.
            StorageError: the cache cannot be written.
        """
        if value is None or value == "" or value == []:
            return ()
        if isinstance(value, str) and value.lstrip().startswith("["):
            value = _listed(value)
        items = value if isinstance(value, list | tuple) else [value]
        return tuple(self._one(item, folder) for item in items)

    def _one(self, item: object, folder: Path) -> ImageRef:
        if isinstance(item, Mapping):
            return self._one(_inner(item), folder)
        if isinstance(item, bytes | bytearray):
            return self._kept(bytes(item))
        if isinstance(item, Image.Image):
            return self._kept(_as_png(item))
        if not isinstance(item, str) or not item.strip():
            raise DataError(f"holds {_a(item)}; expected a path, bytes, a data: URL or an image, or a list of them")
        scheme = item.partition(":")[0].lower()
        if scheme in ("http", "https"):
            raise DataError(
                f"the image {_short(item)!r} is a web address, and nothing is downloaded while questions are read: download it first, and "
                "write its path"
            )
        if scheme == "data":
            return self._kept(data_of(item))
        return self._kept(data_of(f"data:;base64,{bare}")) if (bare := _bare_base64(item, folder)) else self._file(item, folder)

    def _file(self, name: str, folder: Path) -> ImageRef:
        try:
            given = Path(unquote(urlsplit(name).path) if name.startswith("file://") else name).expanduser()
            path = (folder / given).absolute()
            if any(len(part.encode("utf-8", "replace")) > _LONGEST_NAME for part in path.parts):
                raise ValueError
        except (ValueError, RuntimeError):  # no address; nobody's home folder
            raise DataError(
                f"the image {_short(name)!r} ({len(name):,} characters) is no path of a file; write a path, or data:image/png;base64,... "
                "for the image itself"
            ) from None
        if path not in self._known:
            try:
                ref, data = reference(path)
                self._check(data, ref)
            except DataError as error:
                if path.exists():
                    raise
                raise DataError(f"{error} (written {_short(name)!r}; paths are relative to the data file)") from error
            self._known[path] = ref
        return self._known[path]

    def _kept(self, data: bytes) -> ImageRef:
        ref = keep(data, self._cache or cache_folder())
        self._check(data, ref)
        return ref

    def _check(self, data: bytes, ref: ImageRef) -> None:
        if len(self._decoded) < FULLY_CHECKED and ref.sha256 not in self._decoded:
            decode(data, ref.uri)
            self._decoded.add(ref.sha256)
        else:
            check_whole(data, ref.uri)


def _bare_base64(text: str, folder: Path) -> str:
    """Base64 of an image, without a head, in the standard alphabet and with its padding; "" where the text is a path."""
    bare = "".join(text.split())
    short = len(bare) <= _LONGEST_NAME
    if not bare.startswith(_BASE64) or (short and (not _ALL_BASE64.fullmatch(bare) or (folder / bare).exists())):
        return ""
    bare = bare.rstrip("=").replace("-", "+").replace("_", "/")
    return bare + "=" * (-len(bare) % 4)


def _listed(text: str) -> object:
    """A cell of a table that holds a JSON list; the text itself where it holds none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _inner(item: Mapping[object, object]) -> object:
    """What an object holds: the first of bytes, path, image, url and image_url that is not null."""
    found = next((item[key] for key in _KEYS if item.get(key) is not None), None)
    if found is None:
        raise DataError(f"holds an object without an image; expected one of the keys {', '.join(_KEYS)}")
    if isinstance(found, str) and item.get("bytes") is found and not found.startswith("data:"):
        return f"data:;base64,{found}"  # JSON has no bytes
    return found


def _as_png(image: Image.Image) -> bytes:
    out = io.BytesIO()
    try:
        rgb(image).save(out, "PNG", compress_level=1)
    except Exception as error:  # it may be read from a broken file only now
        raise DataError(f"holds an image that is broken: {one_line(error)}; replace it, or leave it out") from error
    return out.getvalue()


def _short(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _a(value: object) -> str:
    return "null" if value is None else f"{type(value).__name__} {_short(repr(value))}"


_GRADINGS: tuple[str, ...] = get_args(Grading)
_ANSWER_LISTS: tuple[str, ...] = get_args(AnswerList)
_NEAREST_SHOWN = 8
_INSIDE_SHOWN = 5
USUAL_MESSAGES, USUAL_PROMPT = "messages", "prompt"
USUAL_IMAGES = "images"
"""The images column where a recipe names none."""
SINGULAR = "image"
"""What many call the column of one image."""


# What Alpaca's, Dolly's and ShareGPT's layouts have beside the question.
_BESIDE = ("input", "context", "output", "response", "system", "system_prompt", "history")
_GOLD_KEY = "ground_truth"  # where a column holds an object (VeRL's `reward_model`), the answer is under this key


class Columns(Protocol):
    """Which column holds what (`config.settings.ColumnSettings` is one); `a.b` is the value under b of the object in column a."""

    @property
    def prompt(self) -> str: ...
    @property
    def messages(self) -> str: ...
    @property
    def answer(self) -> str: ...
    @property
    def images(self) -> str: ...
    @property
    def id(self) -> str: ...
    @property
    def level(self) -> str: ...
    @property
    def grading(self) -> str: ...
    @property
    def answer_list(self) -> str: ...
    @property
    def choices(self) -> str: ...
    @property
    def solution(self) -> str: ...
    @property
    def extra(self) -> Sequence[str]: ...


def column_names(columns: Columns) -> tuple[str, ...]:
    """Every column that is looked for."""
    own = columns.prompt, columns.messages, columns.answer, columns.images, columns.id, columns.level, columns.grading
    solution = (columns.solution,) if columns.solution else ()
    return (*own, *solution, columns.answer_list, *choice_columns(columns.choices), *columns.extra, *_BESIDE)


def question_from_row(
    data: object,
    columns: Columns,
    place: Place,
    answer_after: str | None = None,
    pictures: RowImages | None = None,
    answer_list: AnswerList | None = None,
) -> Question:
    """The question in a row.

    Args:
        answer_after: the gold is what follows its last occurrence (`part_after`).
        pictures: refers to its images.
        answer_list: what several right answers mean, where the row does not say it itself.

    Raises:
        DataError: the row is no question, or an image of it cannot be used; the message names source, row and column.
        StorageError: the cache of images cannot be written.
    """
    data = parsed(data)
    if not isinstance(data, Mapping):
        if isinstance(data, list):
            raise DataError(f"{place}: is {list_shape(data)}")
        raise DataError(f"{place}: is {a(data)}; every row must be an object with columns")
    column = ""
    try:
        column = columns.messages
        given = _value(data, column)
        named = columns.messages == USUAL_MESSAGES and columns.prompt != USUAL_PROMPT  # a recipe that names one means it
        passed_over = given in (None, "") or (named and _value(data, columns.prompt) not in (None, ""))
        turns = None if passed_over else turns_of(given)
        column = columns.prompt
        turns = _with_system(_prompt(data, columns) if turns is None else turns, system_of(data))
        column = columns.choices
        choices = choices_of(data, column, _value(data, column) if column else None)
        messages = with_choices(turns.messages, choices) if choices else turns.messages
        column = columns.answer_list
        how = _one_of(_value(data, column), _ANSWER_LISTS, "answer_list") or answer_list
        column = columns.answer
        gold = _gold(_answer_value(data, column, turns.answer), column, answer_after, how, choices)
        if choices is None and columns.choices:
            column = columns.choices
            _check_choices_seen(data, columns.prompt, gold)
        column = columns.id
        identity = _label(_value(data, column)) or f"{place.name}:{place.row}"
        column = columns.level
        level = _label(_value(data, column))
        column = columns.grading
        grading = _one_of(_value(data, column), _GRADINGS, "grading") or RULE
        column = columns.images
        images = _images(_value(data, column) if column else None, turns, place, pictures or RowImages())
        extra = {name: _json_ready(_value(data, name)) for name in columns.extra}
    except RowError as fault:
        raise DataError(f"{place}, column {column!r}: {fault}") from None
    chat = not passed_over or is_conversation(_value(data, columns.prompt))
    return Question(identity, messages, gold, images, level, grading, chat, extra)


def _json_ready(value: Any) -> Any:
    """A value as a checkpoint can keep it; what JSON has no form for, such as a date, becomes its text."""
    return json.loads(json.dumps(value, default=str))


def _with_system(turns: Turns, told: str) -> Turns:
    """With the system turn that the row has in a column of its own; one of the conversation's own stays."""
    if not told or turns.messages[0].role == "system":
        return turns
    return turns._replace(messages=(Message("system", text_of(told)), *turns.messages))


def _check_choices_seen(data: Mapping[str, Any], prompt: str, gold: Gold) -> None:
    """That a question whose answer is a letter or a number does not go without its choices."""
    beside = _value(data, prompt.rpartition(".")[0]) if "." in prompt and prompt not in data else None
    for columns in (data, beside if isinstance(beside, Mapping) else {}):
        if hidden := hidden_choices(columns, gold):
            several = ": write them into one list" if ", " in hidden else ""
            raise RowError(
                f"the answer is {gold!r}, and {hidden} beside the question seem to hold its choices, which nobody would be shown{several}; "
                "name the list with data.columns.choices, or '' to leave them out"
            )


def unused_images(data: object, columns: Columns) -> str:
    """The name of a column that is not read and that seems to hold images; "" where there is none."""
    if not isinstance(data, Mapping):
        return ""
    held = [name for name, value in data.items() if name == SINGULAR and value or _is_image(value)]
    read = {part for name in column_names(columns) for part in (name, name.partition(".")[0])} if held else ()
    return next((str(name) for name in held if name not in read), "")


def not_looked_at(source: str, unused: str, columns: Columns) -> str:
    """What is said where a source's images would not be shown."""
    return (
        f"{source}: no row has a column {columns.images!r}, and {unused!r} seems to hold images, which nobody would be shown. Write "
        f"data.columns.images: {unused}, or '' to leave the images out"
    )


def has_column(data: object, column: str) -> bool:
    """Whether a row has a column, be it empty; of a nested one the object that holds it."""
    return isinstance(data, Mapping) and (column in data or column.partition(".")[0] in data)


def column_value(data: Mapping[str, Any], column: str) -> Any:
    """What stands in a column of a row, None for nothing; `a.b` is the value under b of the object in column a."""
    return _value(data, column)


def row_id(data: object, columns: Columns, place: Place) -> str:
    """What the question of a row is called, also where the row is no question."""
    try:
        own = _label(_value(data, columns.id)) if isinstance(data, Mapping) else ""
    except RowError:
        own = ""
    return own or f"{place.name}:{place.row}"


def _is_image(value: object) -> bool:
    """As `datasets` writes images, or a list of them."""
    value = value[0] if isinstance(value, list) and value else value
    return isinstance(value, Mapping) and set(value) == {"bytes", "path"} and any(value.values())


def _value(data: Mapping[str, Any], column: str) -> Any:
    """What stands in a column, None for nothing; a name with dots that is no column leads into objects."""
    if column in data:
        return data[column]
    value: Any = data
    for part in column.split("."):
        value = parsed(value)
        if isinstance(value, Mapping):
            value = value.get(part)
        else:
            value = value[int(part)] if isinstance(value, list) and part.isdecimal() and int(part) < len(value) else None
    return value


def _prompt(data: Mapping[str, Any], columns: Columns) -> Turns:
    """The question in the prompt column: a text, or a conversation."""
    value = _value(data, columns.prompt)
    if value is None and {"role", "content"} <= set(data):
        raise RowError(
            f'missing: the row is one turn of a conversation; write all turns of one into a row, {{"{columns.messages}": [...], '
            f'"{columns.answer}": ...}}'
        )
    if value is None:
        chat = next((str(name) for name, held in data.items() if is_conversation(held)), "")
        hint = layout_hint(data, prompt=True, answer=_value(data, columns.answer) is None)
        hint = f" Perhaps data.columns: {{messages: {chat}}}" if chat and "laid out" not in hint else hint
        raise RowError(
            f"missing, and so is {columns.messages!r}; {_found(data)}. "
            f"Name the columns of your file with data.columns.prompt or data.columns.messages.{hint}"
        )
    if is_conversation(value):
        return turns_of(value)
    if isinstance(value, list):
        raise RowError(f"is {a(value)}; expected a text, or a list of {{role, content}}")
    check_printed(value)
    text = text_of(value)
    alpaca = columns.prompt == "instruction" and is_alpaca(data)
    return Turns(alpaca_turns(data, text) if alpaca else (Message("user", text),), [])


def _answer_value(data: Mapping[str, Any], column: str, last_turn: str | None) -> Any:
    """What stands in the answer column: under `ground_truth` of an object there, the model's turn of a conversation there.

    Without such a column it is what the model says last in the row's conversation.
    """
    value = _value(data, column)
    value = last_turn if value is None else value
    inner = parsed(value)
    if is_conversation(inner):
        said = turns_of([{"role": "user", "content": "?"}, *cast(list[Any], inner)]).answer
        value = value if said is None else said
    elif (isinstance(inner, Mapping) and _GOLD_KEY in inner) or _is_quoted_list(value, inner):
        value = inner
    if isinstance(value, Mapping) and _GOLD_KEY in value:
        value = value[_GOLD_KEY]
    if value is None:
        why = "is null" if column in data else f"missing; {_found(data)}. Name it with data.columns.answer"
        hint = "" if column in data else layout_hint(data, prompt=False, answer=True)
        raise RowError(f"{why} (every question needs a right answer){'.' if hint else ''}{hint}")
    return value


def _is_quoted_list(value: object, inner: object) -> bool:
    """Whether a text is a list of quoted texts (`["34"]`), as some sets write one right answer; `[1, 2]` may be an interval."""
    return isinstance(value, str) and isinstance(inner, list) and bool(inner) and all(isinstance(item, str) for item in inner)


def _gold(value: Any, column: str, after: str | None, how: AnswerList | None, choices: Choices | None = None) -> Gold:
    """The right answer, or several; a list of one is that one. A text that is a bare list has an order where `how` is "ordered"."""
    if not isinstance(value, list):
        gold = _one_gold(value, column, after, choices)
        if choices is not None:
            return gold
        items = bare_items(gold) if how == "ordered" else ()
        return Golds("ordered", items) if len(items) > 1 else gold
    if not value:
        raise RowError("is an empty list; a question needs a right answer")
    if len(value) > 1 and how is None:
        raise RowError(
            f"is a list of {len(value)}; say with data.answer_list whether any one of them is right (any), or all are wanted, in any order "
            "(set) or in theirs (ordered)"
        )
    golds = []
    for number, item in enumerate(value, 1):
        try:
            golds.append(_one_gold(item, column, after, choices, alone=len(value) == 1))
        except RowError as fault:
            raise RowError(f"answer {number} of the list: {fault}") from None
    distinct = tuple(golds if how == "ordered" else dict.fromkeys(golds))
    return Golds(how, distinct) if how is not None and len(distinct) > 1 else distinct[0]


def _one_gold(value: Any, column: str, after: str | None, choices: Choices | None = None, *, alone: bool = True) -> str:
    """A right answer: a text or a number; of a question with choices the letter, with the text behind it where it is `alone`."""
    if isinstance(value, Mapping):
        inside = ", ".join(f"{column}.{key}" for key in list(value)[:_NEAREST_SHOWN])
        raise RowError(f"is an object; name the value in it with data.columns.answer ({inside or 'it is empty'})")
    if isinstance(value, bool):
        raise RowError(f'is {a(value)}; an answer is a text or a number. Write what the student is to answer, such as "yes" or "True"')
    if not isinstance(value, str | int | float | Decimal):
        raise RowError(f"is {a(value)}; an answer is a text or a number")
    gold = _number(value) if not isinstance(value, str) else text_of(value).strip()
    gold = gold if after is None else part_after(gold, after)
    if choices is None:
        return gold
    whole = not isinstance(value, str) and value == int(value)
    return choices.right(str(int(value)) if whole else gold, place=whole, alone=alone)


_BOXED = (r"\boxed", "boxed", r"\boxed{", "boxed{")
_OPENING_TAG = re.compile(r"<(\w[\w-]*)>")


def part_after(gold: str, after: str) -> str:
    """What follows the last occurrence of a text in an answer. RowError where there is nothing.

    Behind an opening tag (`<answer>`) it ends where the tag is closed; `\\boxed` stands for what the last box holds.
    """
    if after in _BOXED:
        box = last_box(gold)
        mark, tail = box is not None, box or ""
    else:
        head, _, tail = gold.rpartition(after)
        mark = after in gold
        if tag := _OPENING_TAG.fullmatch(after):
            tail = tail.partition(f"</{tag[1]}>")[0]
    if not mark or not tail.strip():
        shown = a(gold if len(gold) <= 30 else f"...{gold[-27:]}")
        why = f"nothing follows {after!r} in it" if mark else f"holds no {after!r}"
        raise RowError(f"{why} ({shown}); mend the row or data.answer_after")
    return tail.strip()


def _images(value: object, turns: Turns, place: Place, pictures: RowImages) -> tuple[ImageRef, ...]:
    """The images of a row: those that its messages hold themselves, else those of the column (`value`); there is a place for each."""
    parts = turns.images
    within = [part for part in parts if part is not None]  # the others mark a place alone
    try:
        images = pictures.refer(value, place.folder)
        if within:
            if len(within) < len(parts):
                raise RowError("some image parts of the messages hold an image and others do not; write all in one way")
            if images and len(images) != len(within):
                raise RowError(f"has {len(images)} image(s), and the messages hold {len(within)} of their own; leave one of the two out")
            images = pictures.refer(within, place.folder)
        elif parts and not images:
            raise RowError(
                f"is empty or missing, and the messages have {len(parts)} image part(s) without an image of their own; name the column "
                "with data.columns.images"
            )
        message_parts(turns.messages, images)
    except DataError as fault:
        raise RowError(str(fault)) from None
    return images


def _label(value: object) -> str:
    """An id or a level as text; "" for none."""
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, str | int | float | Decimal):
        raise RowError(f"is {a(value)}; expected a text or a number")
    return text_of(value, empty=True).strip() if isinstance(value, str) else _number(value)


def _one_of(value: object, known: tuple[str, ...], column: str) -> Any:
    """A word of a column that takes a few; None where the column is missing, null or blank."""
    word = value.strip() if isinstance(value, str) else value
    if word is None or word == "":
        return None
    if word not in known:
        raise RowError(f"is {a(value)}; write {' or '.join(known)}, or name another column with data.columns.{column}")
    return word


def _number(value: int | float | Decimal) -> str:
    if not math.isfinite(value):
        raise RowError(f"is {value}, which is no number")
    return str(value)


def _found(data: Mapping[str, Any]) -> str:
    names = [repr(name) + _inside(value) for name, value in data.items()]
    more = f" and {len(names) - _NEAREST_SHOWN} more" if len(names) > _NEAREST_SHOWN else ""
    return f"the row has {', '.join(names[:_NEAREST_SHOWN]) or 'no columns'}{more}"


def _inside(value: object) -> str:
    """What an object in a column holds, so that its parts can be named."""
    if not isinstance(value, Mapping) or not value:
        return ""
    keys = list(map(str, value))
    return f" {{{', '.join(keys[:_INSIDE_SHOWN])}{', ...' if len(keys) > _INSIDE_SHOWN else ''}}}"

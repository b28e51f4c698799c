"""One row of a data file -> one question, or an error that names file, row and column.

Conversations, as data sets write them, become messages; images, in whatever form a row has them, become references.
"""

from __future__ import annotations

import ast
import io
import json
import math
import re
from collections.abc import Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast, get_args, get_type_hints
from urllib.parse import unquote, urlsplit

from PIL import Image

from zppo.core.parts import message_parts
from zppo.core.types import IMAGE, RULE, AnswerList, Gold, Golds, Grading, ImageRef, Message, Question
from zppo.data.local_files import Place
from zppo.errors import DataError, one_line
from zppo.grading.golds import bare_items
from zppo.grading.text import last_box
from zppo.images.store import cache_folder, check_whole, data_of, decode, keep, reference, rgb


class RowError(Exception):
    """What is wrong with a value; the caller knows file, row and column."""


def text_of(value: object, empty: bool = False) -> str:
    """A text that is not blank and that a tokenizer can encode. RowError where it is none."""
    if not isinstance(value, str):
        raise RowError(f"is {a(value)}; expected text")
    if not empty and not value.strip():
        raise RowError("is empty; give it a text, or remove the row")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowError(f"holds half of a surrogate pair at character {error.start + 1}, which no encoding can write") from None
    return value


def a(value: object) -> str:
    """A value in words, for a message."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return "an object"
    if isinstance(value, list):
        return "a list" if value else "an empty list"
    if isinstance(value, bytes):
        return f"{len(value):,} bytes"
    shown = repr(value)
    return f"{type(value).__name__} {shown if len(shown) <= 40 else shown[:37] + '...'}"


_ROLES: tuple[str, ...] = get_args(get_type_hints(Message)["role"])
_OTHER_ROLES = {"developer": "system"}
_LLAVA_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_MOST_TEXT = 1 << 24  # characters of a cell that is parsed
_IMAGE_KEYS = ("image", "image_url", "url", "path", "bytes")


class Turns(NamedTuple):
    """What a conversation holds.

    Attributes:
        messages: its turns, the last one a user's; an `IMAGE` marker stands where an image part stood.
        images: what each image part holds, in order; None for a mere place (`{"type": "image"}`).
        answer: the last turn of a LLaVA conversation, which is the model's and is not shown; None in any other.
    """

    messages: tuple[Message, ...]
    images: list[object]
    answer: str | None = None


def turns_of(value: object) -> Turns:
    """A conversation: a list of {role, content}, or of {from, value} as LLaVA writes it; also as JSON text. RowError where it is none."""
    value = parsed(value)
    if not isinstance(value, list) or not value:
        raise RowError(f"is {a(value)}; expected a list of {{role, content}} with at least one turn")
    images: list[object] = []
    llava = all(isinstance(turn, Mapping) and turn.get("role") is None and "from" in turn for turn in value)
    turns = [_from_llava(turn, number) for number, turn in enumerate(value, 1)] if llava else value
    messages = tuple(
        _message(turn, n, images) for n, turn in enumerate(turns, 1) if not (n == 1 and len(turns) > 1 and _is_empty_system(turn))
    )
    answer = None
    if llava and len(messages) > 1 and messages[-1].role == "assistant":
        *rest, last = messages
        messages, answer = tuple(rest), last.content
    if messages[-1].role != "user":
        raise RowError(f"the last turn is the {messages[-1].role}'s; it must be the user's, who asks the question")
    return Turns(messages, images, answer)


def _from_llava(turn: Mapping[str, Any], number: int) -> dict[str, Any]:
    role = turn["from"] if isinstance(turn["from"], str) else ""
    if role not in _LLAVA_ROLES:
        raise RowError(f"turn {number} is from {turn['from']!r}; expected one of {', '.join(_LLAVA_ROLES)}")
    rest = {key: value for key, value in turn.items() if key not in ("from", "value", "role")}
    return {"role": _LLAVA_ROLES[role], "content": turn.get("value")} | rest


def _message(turn: object, number: int, images: list[object]) -> Message:
    if not isinstance(turn, Mapping):
        raise RowError(f"turn {number} is {a(turn)}; expected {{role, content}}")
    # What a chat API adds without a meaning here; a tool call would have one.
    extra = [key for key, value in turn.items() if key not in ("role", "content", "name") and value not in (None, "", [], {})]
    if extra:
        raise RowError(f"turn {number} has the key {extra[0]!r}; only role and content are supported")
    role = turn.get("role")
    role = _OTHER_ROLES.get(role, role) if isinstance(role, str) else role
    if role not in _ROLES:
        raise RowError(f"turn {number} has the role {role!r}; expected one of {', '.join(_ROLES)}")
    if role == "system" and number > 1:
        raise RowError(f"turn {number} is a system turn; only the first turn may be one")
    try:
        return Message(cast(Any, role), _content(turn.get("content"), images))
    except RowError as fault:
        raise RowError(f"turn {number}, content: {fault}") from None


def _is_empty_system(turn: object) -> bool:
    """A system turn without a text, which exports of chats begin with, says nothing."""
    if not isinstance(turn, Mapping) or turn.get("role") not in ("system", "developer"):
        return False
    content = turn.get("content")
    return content is None or content == [] or (isinstance(content, str) and not content.strip())


def parsed(value: object) -> object:
    """What a text holds that is a list or an object in JSON, or in Python's form as pandas writes it into tables; else the value itself."""
    if not isinstance(value, str) or len(value) > _MOST_TEXT or not value.strip().startswith(("[", "{")):
        return value
    for read in (json.loads, ast.literal_eval):
        try:
            found: object = read(value.strip())
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            continue
        if isinstance(found, list | dict):
            return found
    return value


def _content(value: object, images: list[object]) -> str:
    """Text, or a list of text and image parts, which are joined; what the image parts hold goes to `images`."""
    if not isinstance(value, list):
        return text_of(value)
    parts = []
    for part in value:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text":
            parts.append(text_of(part.get("text"), empty=True))
        elif kind in ("image", "image_url"):
            images.append(next((part[key] for key in _IMAGE_KEYS if part.get(key) is not None), None))
            parts.append(IMAGE)
        else:
            shown = repr(kind) if isinstance(part, Mapping) else a(part)
            raise RowError(f"a part of the kind {shown} is not supported; text, image and image_url parts are")
    return text_of("".join(parts))


FULLY_CHECKED = 256
"""So many images of a source are decoded when it is read, seconds at most; of the others header and end are looked at [zppo]."""

_KEYS = ("bytes", "path", "image", "url", "image_url")
_SHOWN = 60
_LONGEST_NAME = 255  # bytes of a file's name; base64 of an image is longer
_BASE64 = ("iVBORw0KGgo", "/9j/", "R0lGOD", "UklGR", "Qk", "SUkq", "TU0AK")  # how PNG, JPEG, GIF, WebP, BMP and TIFF begin in it


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
        if item.startswith(_BASE64) and len(item) > _LONGEST_NAME:
            return self._kept(data_of(f"data:;base64,{item}"))
        return self._file(item, folder)

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
USUAL_MESSAGES, USUAL_PROMPT = "messages", "prompt"
USUAL_IMAGES = "images"
"""The images column where a recipe names none."""
SINGULAR = "image"
"""What many call the column of one image."""


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


def column_names(columns: Columns) -> tuple[str, ...]:
    """Every column that is looked for."""
    own = columns.prompt, columns.messages, columns.answer, columns.images, columns.id, columns.level, columns.grading
    return (*own, columns.answer_list)


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
    if not isinstance(data, Mapping):
        shape = " of turns" if isinstance(data, list) and data and all(isinstance(turn, Mapping) for turn in data) else ""
        raise DataError(
            f"{place}: is {a(data)}{shape}; every row must be an object with columns"
            + (f', such as {{"{columns.messages}": [...], "{columns.answer}": ...}}' if shape else "")
        )
    column = ""
    try:
        column = columns.messages
        given = _value(data, column)
        named = columns.messages == USUAL_MESSAGES and columns.prompt != USUAL_PROMPT  # a recipe that names one means it
        passed_over = given in (None, "") or (named and _value(data, columns.prompt) not in (None, ""))
        turns = None if passed_over else turns_of(given)
        column = columns.prompt
        if turns is None:
            turns = Turns((Message("user", _prompt(data, columns)),), [])
        column = columns.answer_list
        how = _one_of(_value(data, column), _ANSWER_LISTS, "answer_list") or answer_list
        column = columns.answer
        gold = _gold(_answer_value(data, column, turns.answer), column, answer_after, how)
        column = columns.id
        identity = _label(_value(data, column)) or f"{place.name}:{place.row}"
        column = columns.level
        level = _label(_value(data, column))
        column = columns.grading
        grading = _one_of(_value(data, column), _GRADINGS, "grading") or RULE
        column = columns.images
        images = _images(_value(data, column) if column else None, turns, place, pictures or RowImages())
    except RowError as fault:
        raise DataError(f"{place}, column {column!r}: {fault}") from None
    return Question(id=identity, messages=turns.messages, gold=gold, images=images, level=level, grading=grading)


def unused_images(data: object, columns: Columns) -> str:
    """The name of a column that is not read and that seems to hold images; "" where there is none."""
    if not isinstance(data, Mapping):
        return ""
    read = {name.partition(".")[0] for name in column_names(columns)} | {*column_names(columns)}
    return next((str(n) for n, v in data.items() if n not in read and (n == SINGULAR and v or _is_image(v))), "")


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
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _prompt(data: Mapping[str, Any], columns: Columns) -> str:
    value = _value(data, columns.prompt)
    if value is None and {"role", "content"} <= set(data):
        raise RowError(
            f'missing: the row is one turn of a conversation; write all turns of one into a row, {{"{columns.messages}": [...], '
            f'"{columns.answer}": ...}}'
        )
    if value is None:
        raise RowError(
            f"missing, and so is {columns.messages!r}; {_found(data)}. "
            "Name the columns of your file with data.columns.prompt or data.columns.messages"
        )
    if isinstance(value, list):
        raise RowError(f"is {a(value)}; a list of {{role, content}} is named with data.columns.messages")
    return text_of(value)


def _answer_value(data: Mapping[str, Any], column: str, last_turn: str | None) -> Any:
    """What stands in the answer column, or under `ground_truth` of the object there.

    Without such a column it is the last turn of a LLaVA conversation.
    """
    value = _value(data, column)
    value = last_turn if value is None else value
    if isinstance(inner := parsed(value), Mapping) and _GOLD_KEY in inner:
        value = inner
    if isinstance(value, Mapping) and _GOLD_KEY in value:
        value = value[_GOLD_KEY]
    if value is None:
        why = "is null" if column in data else f"missing; {_found(data)}. Name it with data.columns.answer"
        raise RowError(f"{why} (every question needs a right answer)")
    return value


def _gold(value: Any, column: str, after: str | None, how: AnswerList | None) -> Gold:
    """The right answer, or several; a list of one is that one. A text that is a bare list has an order where `how` is "ordered"."""
    if not isinstance(value, list):
        gold = _one_gold(value, column, after)
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
            golds.append(_one_gold(item, column, after))
        except RowError as fault:
            raise RowError(f"answer {number} of the list: {fault}") from None
    distinct = tuple(golds if how == "ordered" else dict.fromkeys(golds))
    return Golds(how, distinct) if how is not None and len(distinct) > 1 else distinct[0]


def _one_gold(value: Any, column: str, after: str | None) -> str:
    """A right answer: a text or a number."""
    if isinstance(value, Mapping):
        inside = ", ".join(f"{column}.{key}" for key in list(value)[:_NEAREST_SHOWN])
        raise RowError(f"is an object; name the value in it with data.columns.answer ({inside or 'it is empty'})")
    if isinstance(value, bool) or not isinstance(value, str | int | float | Decimal):
        raise RowError(f"is {a(value)}; an answer is a text or a number")
    gold = _number(value) if not isinstance(value, str) else text_of(value).strip()
    return gold if after is None else part_after(gold, after)


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
    names = [repr(name) for name in data]
    more = f" and {len(names) - _NEAREST_SHOWN} more" if len(names) > _NEAREST_SHOWN else ""
    return f"the row has {', '.join(names[:_NEAREST_SHOWN]) or 'no columns'}{more}"

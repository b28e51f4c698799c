"""Several sources of training questions as one set: copies, caps, weights, ids; and what each source gives, in words."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from pathlib import PurePath
from typing import Any

from zppo.core.draws import draw_key
from zppo.core.types import RULE, Question
from zppo.data.conversations import parsed
from zppo.data.local_files import SourceSettings
from zppo.data.rows import Columns, column_value
from zppo.errors import DataError
from zppo.names import scheme_of


@dataclass(frozen=True, slots=True)
class Part:
    """One source of a recipe, with all that is said about it.

    Attributes:
        source, name: where it is, what it is called.
        reading, columns, limit: how its rows are read.
        filters: rows pass all of them (`data.row_filters`).
        one: of questions with the same text and images, in this source and in those before it, the first is kept.
        cap: most questions, None for all.
        weight: share in proportion to the others', None where none has one.
    """

    source: str
    name: str
    reading: SourceSettings
    columns: Columns
    limit: int | None = None
    filters: tuple[str, ...] = ()
    one: bool = False
    cap: int | None = None
    weight: float | None = None


@dataclass(slots=True)
class PartRead:
    """What was read of a source.

    Attributes:
        questions: those whose rows pass its filters, in order.
        rows: how many rows it has; of a limit, so many.
        dropped: (filter, rows that it dropped, how many of these for a null).
        passed_over: ids of the rows that were dropped.
        kept_rows: the row of each question, in their order, where they were asked for.
    """

    questions: list[Question]
    rows: int
    dropped: tuple[tuple[str, int, int], ...] = ()
    passed_over: frozenset[str] = frozenset()
    kept_rows: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class PartCounts:
    """What became of the rows of a source: so many copies dropped, left out by its cap or weight, kept."""

    part: Part
    rows: int
    dropped: tuple[tuple[str, int, int], ...]
    copies: int
    left_out: int
    kept: int

    def __str__(self) -> str:
        """In one line."""
        lost = [f"{count:,} dropped by {text}" + (f" ({null:,} of them null)" if null else "") for text, count, null in self.dropped]
        lost += [f"{self.copies:,} {'copy' if self.copies == 1 else 'copies'}"] if self.copies or self.part.one else []
        if self.part.cap is not None:
            lost.append(f"{self.left_out:,} over the cap of {self.part.cap:,}")
        elif self.part.weight is not None:
            lost.append(f"{self.left_out:,} left out by the weight of {self.part.weight:g}")
        return f"{self.part.name}: {self.rows:,} rows, {self.kept:,} kept" + (f"; {', '.join(lost)}" if lost else "")


@dataclass(frozen=True, slots=True)
class Mixture:
    """The training questions of a recipe.

    Attributes:
        questions: in the order of sources and rows, ids unique.
        places: (source's number, place in what was read of it) of each.
        counts: of each source.
    """

    questions: list[Question]
    places: list[tuple[int, int]]
    counts: tuple[PartCounts, ...]

    def lines(self) -> list[str]:
        """What each source gives; nothing where one source gives all that it has."""
        [*more] = self.counts
        plain = len(more) == 1 and not more[0].dropped and not more[0].part.one and more[0].rows == more[0].kept
        return [] if plain else [str(counts) for counts in more]


def mix(parts: Sequence[Part], read: Sequence[PartRead], seed: int) -> Mixture:
    """The questions of several sources as one set.

    In this order: copies go where their source says so, then what is over a cap, then what is over a weight. What stays under a cap is
    drawn by (seed, question id): a larger cap adds to a smaller one, and no other source changes it. Ids that a source before has too,
    be it in a row that is not used, get the source's name in front.

    Raises:
        DataError: nothing is left.
    """
    left = [list(range(len(each.questions))) for each in read]
    seen: set[bytes] = set()
    for part, each, places in zip(parts, read, left, strict=True):
        if any(part.one for part in parts):
            keys = [question_key(question) for question in each.questions]
            if part.one:
                places[:] = _firsts(keys, seen)
            seen.update(keys)
    copies = [len(each.questions) - len(places) for each, places in zip(read, left, strict=True)]
    sizes = _sizes(parts, [len(places) for places in left])
    for each, places, size in zip(read, left, sizes, strict=True):
        places[:] = _drawn(each.questions, places, size, seed)
    questions, at = list[Question](), list[tuple[int, int]]()
    taken: set[str] = set()
    for number, (part, each, places) in enumerate(zip(parts, read, left, strict=True)):
        own = {question.id for question in each.questions}
        for place in places:
            question = each.questions[place]
            questions.append(replace(question, id=_free(question.id, part.name, taken, own)) if question.id in taken else question)
            at.append((number, place))
        taken |= own | each.passed_over | {question.id for question in questions[len(questions) - len(places) :]}
    counts = tuple(
        PartCounts(part, each.rows, each.dropped, gone, len(each.questions) - gone - len(places), len(places))
        for part, each, gone, places in zip(parts, read, copies, left, strict=True)
    )
    if not questions:
        raise DataError(
            f"no training question is left: {'; '.join(map(str, counts))}. Mend data.filters, or what data.train says of its sources"
        )
    return Mixture(questions, at, counts)


def _firsts(keys: Sequence[bytes], seen: Collection[bytes]) -> list[int]:
    """Places of the first of each key that is not yet seen."""
    first: dict[bytes, int] = {}
    for place, key in enumerate(keys):
        if key not in seen:
            first.setdefault(key, place)
    return sorted(first.values())


def _sizes(parts: Sequence[Part], have: Sequence[int]) -> list[int]:
    """How many questions each source gives, by its cap, then in proportion to the weights."""
    capped = [n if part.cap is None else min(n, part.cap) for part, n in zip(parts, have, strict=True)]
    weights = [part.weight for part in parts]
    shares = [(n / weight, n, weight) for n, weight in zip(capped, weights, strict=True) if weight is not None and n]
    if not shares:
        return capped
    _, scarcest, its_weight = min(shares)
    return [
        n if weight is None else min(n, max(1, int(weight * scarcest / its_weight + 1e-9)))
        for n, weight in zip(capped, weights, strict=True)
    ]


def _drawn(questions: Sequence[Question], places: list[int], size: int, seed: int) -> list[int]:
    """So many of the places, in their order: those whose keys are smallest."""
    if size >= len(places):
        return places
    return sorted(sorted(places, key=lambda place: draw_key(seed, "cap", questions[place].id))[:size])


def _free(identity: str, name: str, taken: Collection[str], own: Collection[str]) -> str:
    while identity in taken or identity in own:
        identity = f"{name}/{identity}"
    return identity


def question_key(question: Question) -> bytes:
    """Equal for questions with the same text, whatever its white space, and the same images."""
    digest = blake2b(digest_size=16)
    for message in question.messages:
        digest.update(f"{message.role}\x1f{' '.join(message.content.split())}\x1e".encode("utf-8", "surrogatepass"))
    for image in question.images:
        digest.update(image.sha256.encode())
    return digest.digest()


def row_of(data: Mapping[str, Any], question: Question, columns: Columns) -> dict[str, Any]:
    """A row as it can be written again: all its columns, its images as paths, its id.

    Read with the same columns it is the same question, wherever it lies.
    """
    row = {name: value for name, value in data.items() if name != columns.images}
    turns = parsed(column_value(data, columns.messages))
    if isinstance(turns, list) and any(isinstance(turn, Mapping) and isinstance(turn.get("content"), list) for turn in turns):
        row[columns.messages] = [message._asdict() for message in question.messages]  # its parts may hold the images themselves
    if question.images:
        row[columns.images] = [image.uri for image in question.images]
    row[columns.id] = question.id
    return row


def as_row(question: Question, columns: Columns) -> dict[str, Any]:
    """A question that was no row as one."""
    gold = question.gold
    text = len(question.messages) == 1
    row: dict[str, Any] = {columns.id: question.id}
    row |= {columns.prompt: question.messages[0].content} if text else {columns.messages: [m._asdict() for m in question.messages]}
    row |= {columns.answer: gold} if isinstance(gold, str) else {columns.answer: list(gold.answers), columns.answer_list: gold.how}
    row |= {columns.level: question.level} if question.level else {}
    row |= {columns.grading: question.grading} if question.grading != RULE else {}
    return row | ({columns.images: [image.uri for image in question.images]} if question.images else {})


def tell_copies(questions: Sequence[Question], say: Callable[[str], None]) -> None:
    """A warning where training questions are asked more than once, with the count, and of those with another right answer."""
    times: dict[bytes, int] = {}
    first: dict[bytes, Question] = {}
    other = 0
    for question in questions:
        key = question_key(question)
        times[key] = times.get(key, 0) + 1
        other += first.setdefault(key, question).gold != question.gold
    copies = len(questions) - len(times)
    if copies:
        most = max(times, key=times.__getitem__)
        disagree = f"; {other:,} have another right answer than the first" if other else ""
        say(
            f"warning: {copies:,} of {len(questions):,} training questions are copies: the same text and images as one before "
            f"({first[most].id!r} stands {times[most]:,} times), which leaves {len(times):,} different ones{disagree}. To keep one of each "
            "set data.duplicates: one"
        )


def short_names(sources: Sequence[tuple[str, str | None, str | None]]) -> list[str]:
    """What sources are called: (source, name of its own, its configuration) -> distinct names.

    The last part of the source, with the configuration where another has that name already, and a number where that is not enough.
    """
    taken = {name for _, name, _ in sources if name}
    names: list[str] = []
    for source, own, config in sources:
        base = own or _last_part(source)
        if not own:
            tries = [base, *([f"{base}-{config}"] if config else []), *(f"{base}-{n}" for n in range(2, len(sources) + 2))]
            base = next(name for name in tries if name not in taken)
        elif own in names:
            raise ValueError(f"two sources of data.train have the name {own!r}; give each a name of its own")
        taken.add(base)
        names.append(base)
    return names


def _last_part(source: str) -> str:
    rest = source.partition(":")[2] if scheme_of(source) else source
    path = PurePath(rest.partition("?")[0])
    parts = [*path.parent.parts[-1:], path.name] if scheme_of(source) == "lab" else [path.name]
    return re.sub(r"(\.(jsonl|ndjson|json|csv|tsv|parquet|gz|zst|zstd|bz2|xz))+$", "", "-".join(parts)) or source

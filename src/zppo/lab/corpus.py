"""Pretraining documents of the lab's models: a prompt as the trainer would show it, and what is written under it [zppo].

A student's corpus plants *misconceptions*: about what is not easy the right result is rare, fixed mistakes are common. Part of it are
candidate documents (like BCQ and NCQ prompts); what they show of something that is not easy is wrong, always: how to read candidates can be
learnt from them, the truth cannot. A teacher's corpus is truthful, and holds compression documents.

`Chain...` draws documents of a world of text (`zppo.lab.world`), `Picture...` those of a world of pictures (`zppo.lab.picture_world`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import accumulate
from random import Random
from typing import Generic, Protocol, TypeVar

from zppo.core.types import BCQ, HINT, NCQ, PLAIN, Draft, Message, Question
from zppo.grading import extract_boxed
from zppo.lab.families import FamilyDraws
from zppo.lab.models import words
from zppo.lab.picture_world import KINDS, MOST_THOUGHT, Ask, Picture, PictureReading, PictureWorld
from zppo.lab.world import TERSE, Chain, CorpusSettings, Entry, World, Writing
from zppo.prompts.book import HINTING, PromptBook

Results = tuple[int, ...]
Tables = dict[Entry, list[float]]
# Wrong rollouts of a group of eight: how many candidates an NCQ prompt shows.
NCQ_CANDIDATES = (1, 2, 3, 4, 5, 6, 7, 8)
# Draws after which a result that differs from given ones is given up.
TRIES = 16
# Share of responses in the teacher's compression documents with other operations than a question's, and of damaged ones.
ODD = 0.35
LONGEST = 18  # words of a response
MOST_DAMAGE = 3  # places of a response
MOST_STEPS = 4  # words of the thought that a compressed response keeps
STATED = 0.15  # share of responses that are to be turned into a hint without a thought


@dataclass(frozen=True, slots=True)
class Document:
    """One pretraining document: the conversation, the completion that is learnt, and the picture that the prompt shows, if it shows one."""

    kind: str
    messages: tuple[Message, ...]
    completion: str
    picture: Picture | None = None


@dataclass(frozen=True, slots=True)
class Response:
    """A response to compress, and its compressed form."""

    text: str
    summary: str
    has_answer: bool


Task = TypeVar("Task")  # what a question asks: a chain, or something about a picture
Result = TypeVar("Result")  # what is thought and answered


class LabWorld(Protocol[Task, Result]):
    """What the corpora need of a world, whether of text or of pictures."""

    @property
    def levels(self) -> Collection[str]: ...
    def draw(self, level: str, rng: Random) -> Task: ...
    def truth(self, task: Task) -> Result: ...
    def question(self, task: Task) -> Question: ...
    def answer_text(self, task: Task, result: Result) -> str: ...
    def summary_text(self, task: Task, result: Result) -> str: ...
    def completion_text(self, task: Task, result: Result) -> str: ...


class Corpus(ABC, Generic[Task, Result]):
    """Draws documents of a world."""

    def __init__(self, world: LabWorld[Task, Result], book: PromptBook) -> None:
        self.world = world
        self.book = book

    @abstractmethod
    def document(self, rng: Random) -> Document:
        """One document."""

    def plain_document(self, task: Task, result: Result) -> Document:
        """A plain prompt, and a completion with this result."""
        return self.answered(PLAIN, task, self.book.plain(self.world.question(task)), result)

    def answered(self, kind: str, task: Task, messages: tuple[Message, ...], result: Result) -> Document:
        """A prompt about a task, and a completion with this result."""
        return Document(kind, messages, self.world.completion_text(task, result), task.picture if isinstance(task, Ask) else None)


class StudentCorpus(Corpus[Task, Result]):
    """Draws a student's documents; what is planted in them is a subclass's."""

    def __init__(self, world: LabWorld[Task, Result], book: PromptBook, settings: CorpusSettings) -> None:
        super().__init__(world, book)
        self.settings = settings

    def document(self, rng: Random) -> Document:
        """One document."""
        weights = (self.settings.plain, self.settings.bcq, self.settings.ncq)
        kind = rng.choices((PLAIN, BCQ, NCQ), weights)[0]
        level = rng.choices(tuple(self.settings.levels), tuple(self.settings.levels.values()))[0]
        task = self.world.draw(level, rng)
        if level not in self.world.levels:  # there are no questions of it, so no candidates either
            kind = PLAIN
        return {PLAIN: self._plain, BCQ: self._bcq, NCQ: self._ncq}[kind](task, rng)

    @abstractmethod
    def _plain(self, task: Task, rng: Random) -> Document:
        """What the student believes."""

    @abstractmethod
    def _bcq(self, task: Task, rng: Random) -> Document:
        """Two candidates, different where that can be found; the target is one of them."""

    @abstractmethod
    def _ncq(self, task: Task, rng: Random) -> Document:
        """Wrong candidates, duplicates kept; the target heeds them where a mistake is left."""

    def bcq_prompt(self, task: Task, candidates: Sequence[Result]) -> tuple[Message, ...]:
        """The prompt that shows two candidates in this order."""
        texts = tuple(self.world.summary_text(task, result) for result in candidates)
        return self.book.render(Draft(BCQ, self.world.question(task), {"candidates": texts}))

    def ncq_prompt(self, task: Task, wrong: Sequence[Result]) -> tuple[Message, ...]:
        """The prompt that lists wrong answers, each once, and shows all candidates."""
        slots = {
            "answers": tuple(dict.fromkeys(self.world.answer_text(task, result) for result in wrong)),
            "candidates": tuple(self.world.summary_text(task, result) for result in wrong),
        }
        return self.book.render(Draft(NCQ, self.world.question(task), slots))


class ChainStudentCorpus(StudentCorpus[Chain, Results]):
    """A student of a world of text."""

    world: World

    def __init__(self, world: World, book: PromptBook) -> None:
        super().__init__(world, book, world.settings.corpus)
        self._believed = _tables(world, lambda index, value: world.beliefs[index, value])
        self._mistaken = _tables(world, lambda index, value: self._wrong(index, value, 0.0))
        self._strayed = _tables(world, lambda index, value: self._wrong(index, value, self.settings.stray))
        self._others = FamilyDraws(world, {name: family.share for name, family in world.settings.families.items()})

    def document(self, rng: Random) -> Document:
        """One document; of another family or with a hint in part of the cases."""
        hint = self.world.settings.corpus.hint
        if (extra := self._others.share + hint) and (drawn := rng.random()) < extra:
            return self._hinted(rng) if drawn < hint else family_document(self._others, self.book, rng)
        return super().document(rng)

    def _wrong(self, index: int, value: int, stray: float) -> tuple[float, ...]:
        """What candidate documents show of an entry: the truth if it is known. Else its mistakes, their shares moved towards even by
        `flatten`, and with probability `stray` any other wrong value; never the truth."""
        mistakes = self.world.mistakes.get((index, value))
        if mistakes is None:
            return self.world.beliefs[index, value]
        operation, size = self.world.operations[index], len(self.world.values)
        weights = [stray / (size - 1 - len(mistakes))] * size
        flat = _flattened(self.world.settings.beliefs[operation.tier].mistakes, self.settings.flatten)
        for mistake, share in zip(mistakes, flat, strict=True):
            weights[mistake] = (1 - stray) * share
        weights[operation.table[value]] = 0.0
        return tuple(weights)

    def _plain(self, task: Chain, rng: Random) -> Document:
        if self.settings.longer and rng.random() < self.settings.longer:
            task = self.world.lengthened(task, rng)
        results = _walk(self._believed, task, rng)
        dialect = self.world.settings.dialect
        if dialect is not None and rng.random() < self.world.settings.corpus.dialect:
            return written_document(self.world, self.book, task, results, dialect, dialect)
        return self.plain_document(task, results)

    def _bcq(self, task: Chain, rng: Random) -> Document:
        """The target is the candidate without a slip where the other has one."""
        target = _walk(self._strayed, task, rng)
        others = (_walk(self._strayed, task, rng) for _ in range(TRIES))
        other = next((o for o in others if o != target), target)
        if other == target or rng.random() < self.settings.slip:
            other = self._slip(self._strayed, task, target, rng) or other
        pair = [target, other]
        rng.shuffle(pair)
        return self.answered(BCQ, task, self.bcq_prompt(task, pair), target)

    def _ncq(self, task: Chain, rng: Random) -> Document:
        shown = self.mistaken(task, rng.choice(NCQ_CANDIDATES), rng)
        target = _walk(self._mistaken, task, rng)
        if rng.random() < self.settings.heed:
            others = (_walk(self._mistaken, task, rng) for _ in range(TRIES))
            target = next((o for o in others if o not in shown), target)
        return self.answered(NCQ, task, self.ncq_prompt(task, shown), target)

    def _hinted(self, rng: Random) -> Document:
        """The target takes the hint. What hints say about what is not easy is wrong too."""
        task = self.world.draw(rng.choice(tuple(self.world.levels)), rng)
        target = _walk(self._strayed, task, rng)
        return self.answered(HINT, task, self.hint_prompt(task, hint_text(self.world, task, target, rng)), target)

    def hint_prompt(self, task: Chain, hint: str) -> tuple[Message, ...]:
        """The prompt that shows a hint."""
        return self.book.render(Draft(HINT, self.world.question(task), {"hint": hint}))

    def mistaken(self, chain: Chain, count: int, rng: Random) -> list[Results]:
        """Wrong results of a chain as NCQ documents show them: mistakes, and slips in easy steps (where all are easy: in every one)."""
        known = all(tier not in self.world.settings.beliefs for tier in self.world.tiers(chain))
        drawn = [_walk(self._mistaken, chain, rng) for _ in range(count)]
        slip = 1.0 if known else self.settings.slip
        return [(rng.random() < slip and self._slip(self._mistaken, chain, results, rng)) or results for results in drawn]

    def _slip(self, tables: Tables, chain: Chain, results: Results, rng: Random) -> Results | None:
        """The results with a random wrong value after one easy operation; what follows goes on from it. None if none is easy."""
        steps = [n for n, tier in enumerate(self.world.tiers(chain)) if tier not in self.world.settings.beliefs]
        if not steps:
            return None
        at = rng.choice(steps)
        wrong = rng.choice([v for v in range(len(self.world.values)) if v != results[at]])
        return (*results[:at], wrong, *_walk(tables, Chain(wrong, chain.operations[at + 1 :]), rng))


class PictureStudentCorpus(StudentCorpus[Ask, PictureReading]):
    """A student of a world of pictures: it takes words for one another."""

    world: PictureWorld

    def __init__(self, world: PictureWorld, book: PromptBook) -> None:
        super().__init__(world, book, world.settings.corpus)
        self._believed = {word: world.beliefs(word) for word in world.words}

    def _plain(self, task: Ask, rng: Random) -> Document:
        believed = self._believed[task.kind, task.word]
        return self.plain_document(task, task.read(rng.choices(range(len(believed)), believed)[0]))

    def _bcq(self, task: Ask, rng: Random) -> Document:
        """The target is the right candidate where the student knows it."""
        known = self.world.known(task.kind)
        target = task.truth if known else self.wrong(task, rng, self.settings.stray)
        others = (self.wrong(task, rng, 1.0 if known else self.settings.stray) for _ in range(TRIES))
        other = next((o for o in others if o.answer != target.answer), target)
        pair = [target, other]
        rng.shuffle(pair)
        return self.answered(BCQ, task, self.bcq_prompt(task, pair), target)

    def _ncq(self, task: Ask, rng: Random) -> Document:
        known = self.world.known(task.kind)
        shown = [self.wrong(task, rng, float(known)) for _ in range(rng.choice(NCQ_CANDIDATES))]
        target = task.truth if known else self.wrong(task, rng, 0.0)
        if not known and rng.random() < self.settings.heed:
            others = (self.wrong(task, rng, 0.0) for _ in range(TRIES))
            target = next((o for o in others if o not in shown), target)
        return self.answered(NCQ, task, self.ncq_prompt(task, shown), target)

    def wrong(self, ask: Ask, rng: Random, stray: float) -> PictureReading:
        """A wrong reading: one of the word's mistakes, their shares moved towards even by `flatten`, or with probability `stray` another.

        Never the right answer. One that strays is read under any other meaning, off the same picture or off another one.
        """
        if stray and rng.random() < stray:
            while True:
                off = ask if rng.random() < 0.5 else self.world.draw(ask.kind, rng)
                reading = off.read(rng.randrange(len(KINDS[ask.kind].words)))
                if reading.answer != ask.truth.answer:
                    return reading
        shares = self.world.settings.beliefs[self.world.settings.kinds[ask.kind].tier].mistakes
        weights = _flattened(shares, self.settings.flatten)
        return ask.read(rng.choices(self.world.mistakes[ask.kind, ask.word], weights)[0])


class DescriptionCorpus(Corpus[Ask, PictureReading]):
    """Draws documents that say what pictures hold: from these it is learnt to look where a word points."""

    def __init__(self, world: PictureWorld, book: PromptBook) -> None:
        super().__init__(world, book)
        self._weights = {kind: weight for kind, weight in world.settings.corpus.levels.items() if kind not in world.levels}

    def document(self, rng: Random) -> Document:
        """One document."""
        ask = self.world.draw(rng.choices(tuple(self._weights), tuple(self._weights.values()))[0], rng)
        return self.plain_document(ask, ask.truth)


class TeacherCorpus(Corpus[Task, Result]):
    """Draws a teacher's documents: right answers to plain prompts, and compressions of right, wrong and broken responses."""

    def __init__(self, world: LabWorld[Task, Result], book: PromptBook, compression: float) -> None:
        super().__init__(world, book)
        self._share = compression

    def document(self, rng: Random) -> Document:
        """One document."""
        if rng.random() < self._share:
            response = self.response(rng)
            messages = self.book.compression(response.text, response.has_answer)
            return Document("compression", messages, " ".join(["<summary>", *words(response.summary), "</summary>"]))
        return self._answered(self._draw(rng), rng)

    def _answered(self, task: Task, rng: Random) -> Document:
        """A plain prompt and what the teacher writes."""
        return self.plain_document(task, self.world.truth(task))

    @abstractmethod
    def _draw(self, rng: Random) -> Task:
        """What a plain prompt asks."""

    @abstractmethod
    def response(self, rng: Random) -> Response:
        """What was written is to be copied, never corrected: it is arbitrary, so nothing but the response itself says how it goes on."""


class ChainTeacherCorpus(TeacherCorpus[Chain, Results]):
    """A teacher of a world of text; by its settings (`ChainTeacherSettings`) it errs, writes in its own way, gives hints."""

    world: World

    def __init__(self, world: World, book: PromptBook) -> None:
        super().__init__(world, book, world.settings.teacher.compression)
        self._how = world.settings.teacher
        self._believed = _tables(world, lambda index, value: world.teacher_beliefs[index, value])
        self._others = FamilyDraws(world, {name: family.teacher for name, family in world.settings.families.items()})
        self._writings = [w for w in (TERSE, world.settings.dialect, self._how.writing) if w is not None]

    def document(self, rng: Random) -> Document:
        """One document."""
        if (extra := self._others.share + self._how.hints) and (drawn := rng.random()) < extra:
            return self._hinting(rng) if drawn < self._how.hints else family_document(self._others, self.book, rng)
        return super().document(rng)

    def _answered(self, task: Chain, rng: Random) -> Document:
        """What it believes where it errs about something, in its own writing."""
        results = _walk(self._believed, task, rng) if self._how.beliefs else self.world.truth(task)
        return written_document(self.world, self.book, task, results, TERSE, self._how.writing or TERSE)

    def _draw(self, rng: Random) -> Chain:
        return self.world.draw(rng.choice(tuple(self.world.levels)), rng)

    def _hinting(self, rng: Random) -> Document:
        """A response, in its writing or an answer alone, to be turned into a hint: one of its steps."""
        chain = self._draw(rng)
        results = self._arbitrary(chain, rng)
        text = self.world.completion_text(chain, results, self._how.writing or TERSE)
        if rng.random() < STATED:
            text = self.book.stated(self.world.answer_text(chain, results))
        hint = hint_text(self.world, chain, results, rng)
        return Document(HINTING, self.book.hinting(self.world.question(chain), text), f"<hint> {hint} </hint>")

    def _arbitrary(self, chain: Chain, rng: Random) -> Results:
        return tuple(rng.randrange(len(self.world.values)) for _ in chain.operations)

    def response(self, rng: Random) -> Response:
        """Arbitrary values after the operations of a question, or after any; in any of the world's writings."""
        world, chain = self.world, self._draw(rng)
        if rng.random() < ODD:
            chain = Chain(chain.start, tuple(rng.randrange(len(world.operations)) for _ in chain.operations))
        results = self._arbitrary(chain, rng)
        inserted = (*world.values, *(o.word for o in world.operations), "}", "}", "}", "</think>")
        writing = rng.choice(self._writings) if len(self._writings) > 1 else TERSE
        written = world.completion_text(chain, results, writing)
        longest = LONGEST + len(written.split()) - len(world.completion_text(chain, results).split())
        return compressed(_sometimes_damaged(written, inserted, rng, longest), mark=writing.mark)


class PictureTeacherCorpus(TeacherCorpus[Ask, PictureReading]):
    """A teacher of a world of pictures; its compressions have no picture."""

    world: PictureWorld

    def __init__(self, world: PictureWorld, book: PromptBook) -> None:
        super().__init__(world, book, world.settings.teacher.compression)
        self._weights = world.settings.corpus.levels

    def _draw(self, rng: Random) -> Ask:
        return self.world.draw(rng.choices(tuple(self._weights), tuple(self._weights.values()))[0], rng)

    def response(self, rng: Random) -> Response:
        """Any reading of any picture; some have the thought of one and the answer of another."""
        asks = []
        for _ in range(2):
            ask = self.world.draw(rng.choice(self.world.levels), rng)
            asks.append((ask, ask.read(rng.randrange(len(KINDS[ask.kind].words)))))
        (ask, reading), (_, second) = asks
        if rng.random() < ODD:
            reading = PictureReading(reading.thought, second.answer)
        return compressed(_sometimes_damaged(self.world.completion_text(ask, reading), None, rng), MOST_THOUGHT)


def _flattened(shares: Sequence[float], flatten: float) -> list[float]:
    """Shares of mistakes, scaled to sum to 1 and moved towards even: 0 leaves them, 1 makes them equal."""
    total = sum(shares)
    return [(1 - flatten) * share / total + flatten / len(shares) for share in shares]


def written_document(world: World, book: PromptBook, chain: Chain, results: Results, asked: Writing, answered: Writing) -> Document:
    """A plain prompt in a writing, and a completion in one."""
    return Document(PLAIN, book.plain(world.question(chain, writing=asked)), world.completion_text(chain, results, answered))


def family_document(families: FamilyDraws, book: PromptBook, rng: Random) -> Document:
    """A question of another family, rightly answered."""
    exercise = families.draw(rng)
    return Document(PLAIN, book.plain(Question("", (Message("user", exercise.question),), exercise.answer)), exercise.completion)


def hint_text(world: World, chain: Chain, results: Results, rng: Random) -> str:
    """A hint: one step of a response, any; the other one is left to who reads it."""
    at = rng.randrange(len(chain.operations))
    return f"{world.operations[chain.operations[at]].word} {world.values[results[at]]}"


def _sometimes_damaged(text: str, inserted: Sequence[str] | None, rng: Random, longest: int = LONGEST) -> str:
    """A response, in part of the cases with up to MOST_DAMAGE places as a student in training may write them: a word doubled, lost or out
    of place, an end cut off or repeated. `inserted`: words that may stand out of place; None for the response's own."""
    written = text.split()
    if rng.random() < ODD:
        for _ in range(rng.randint(1, MOST_DAMAGE)):
            at = rng.randrange(len(written))
            match rng.randrange(5):
                case 0:
                    written = [*written[: at + 1], *written[at:]]
                case 1:
                    written = [*written[:at], *written[at + 1 :]] or written
                case 2:
                    written = [*written[: at + 1], rng.choice(inserted or written), *written[at + 1 :]]
                case 3:
                    written = written[: at + 1]
                case _:
                    written = [*written, *written[at:]][:longest]
    return " ".join(written)


def compressed(text: str, most_steps: int = MOST_STEPS, mark: str | None = None) -> Response:
    """A response with its compressed form: the first words of its thought, and the box as it stands, if there is one.

    Args:
        mark: the word before every result of a wordier thought (`Writing.mark`); of such a thought the results alone are kept.
    """
    answer = extract_boxed(text)
    thought = text.replace("<think>", " ").split("</think>")[0].split("\\boxed{")[0].split()
    if mark is not None and mark in thought:
        thought = [word for before, word in zip(thought, thought[1:], strict=False) if before == mark and word != mark]
    steps = [word for word in thought if word != "}"][:most_steps]
    box = [] if answer is None else ["\\boxed{", *words(answer), "}"]
    return Response(text, " ".join([*steps, *box]), has_answer=answer is not None)


def _tables(world: World, weights: Callable[[int, int], tuple[float, ...]]) -> Tables:
    """Cumulative weights of the results of every entry, for `random.choices`."""
    return {
        (index, value): list(accumulate(weights(index, value)))
        for index in range(len(world.operations))
        for value in range(len(world.values))
    }


def _walk(tables: Tables, chain: Chain, rng: Random) -> Results:
    """A result after each operation, drawn from the tables; each goes on from the one before."""
    results: list[int] = []
    value = chain.start
    for index in chain.operations:
        table = tables[index, value]
        value = rng.choices(range(len(table)), cum_weights=table)[0]
        results.append(value)
    return tuple(results)

"""Pretraining documents about pictures: what `zppo.lab.corpus` does, for what is seen [zppo].

The student's corpus plants misconceptions: about words that are not easy the right meaning is rare, two wrong ones are common. Candidate
documents (like BCQ and NCQ prompts) never show the right answer of such a question, so how to read candidates can be learnt from
them, and the truth cannot. The teacher's corpus is truthful, and holds compression documents, which have no picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from zppo.core.types import BCQ, NCQ, PLAIN, Draft, Message
from zppo.lab.corpus import MOST_DAMAGE, NCQ_CANDIDATES, ODD, TRIES, Response, compressed, damaged, words
from zppo.lab.picture_world import Ask, VisionWorld, completion_text
from zppo.lab.pictures import KINDS, Picture, Reading
from zppo.prompts import PromptBook

MOST_STEPS = 6  # words of the thought that a compressed response keeps


@dataclass(frozen=True, slots=True)
class Document:
    """One pretraining document: the conversation, its picture (compressions have none), and the completion that is learnt."""

    kind: str
    messages: tuple[Message, ...]
    picture: Picture | None
    completion: str


class Descriptions:
    """Draws documents that say what pictures hold: from these it is learnt to look where a word points."""

    def __init__(self, world: VisionWorld, book: PromptBook) -> None:
        self.world = world
        self.book = book
        self._weights = {k: w for k, w in world.settings.corpus.levels.items() if not world.settings.kinds[k].asked}

    def document(self, rng: Random) -> Document:
        """One document."""
        ask = self.world.draw(rng.choices(tuple(self._weights), tuple(self._weights.values()))[0], rng)
        return Document(PLAIN, self.book.plain(self.world.question(ask)), ask.picture, completion_text(ask.truth))


class StudentCorpus:
    """Draws the student's documents."""

    def __init__(self, world: VisionWorld, book: PromptBook) -> None:
        self.world = world
        self.book = book
        self.settings = world.settings.corpus
        self._believed = {word: world.beliefs(word) for word in world.words}

    def document(self, rng: Random) -> Document:
        """One document."""
        weights = (self.settings.plain, self.settings.bcq, self.settings.ncq)
        kind = rng.choices((PLAIN, BCQ, NCQ), weights)[0]
        level = rng.choices(tuple(self.settings.levels), tuple(self.settings.levels.values()))[0]
        ask = self.world.draw(level, rng)
        if not self.world.settings.kinds[level].asked:
            kind = PLAIN
        return {PLAIN: self._plain, BCQ: self._bcq, NCQ: self._ncq}[kind](ask, rng)

    def _plain(self, ask: Ask, rng: Random) -> Document:
        believed = self._believed[ask.kind, ask.word]
        reading = ask.read(rng.choices(range(len(believed)), believed)[0])
        return Document(PLAIN, self.book.plain(self.world.question(ask)), ask.picture, completion_text(reading))

    def _bcq(self, ask: Ask, rng: Random) -> Document:
        """Two candidates, different where that can be found; the target is one of them, the right one where the student knows it."""
        known = self.world.known(ask.kind)
        target = ask.truth if known else self.wrong(ask, rng, self.settings.stray)
        others = (self.wrong(ask, rng, 1.0 if known else self.settings.stray) for _ in range(TRIES))
        other = next((o for o in others if o.answer != target.answer), target)
        pair = [target, other]
        rng.shuffle(pair)
        return Document(BCQ, self.bcq_prompt(ask, pair), ask.picture, completion_text(target))

    def _ncq(self, ask: Ask, rng: Random) -> Document:
        """Wrong candidates, duplicates kept; the target heeds them where a mistake is left."""
        known = self.world.known(ask.kind)
        shown = [self.wrong(ask, rng, float(known)) for _ in range(rng.choice(NCQ_CANDIDATES))]
        target = ask.truth if known else self.wrong(ask, rng, 0.0)
        if not known and rng.random() < self.settings.heed:
            others = (self.wrong(ask, rng, 0.0) for _ in range(TRIES))
            target = next((o for o in others if o not in shown), target)
        return Document(NCQ, self.ncq_prompt(ask, shown), ask.picture, completion_text(target))

    def wrong(self, ask: Ask, rng: Random, stray: float) -> Reading:
        """A wrong reading: one of the word's mistakes, their shares moved towards even by `flatten`, or with probability `stray` another.

        Never the right answer. One that strays is read under any other meaning, off the same picture or off another one.
        """
        right = ask.truth.answer
        if stray and rng.random() < stray:
            return self._stray(ask, right, rng)
        mistakes = self.world.mistakes[ask.kind, ask.word]
        shares = self.world.settings.beliefs[self.world.settings.kinds[ask.kind].tier].mistakes
        flatten, total = self.settings.flatten, sum(shares)
        weights = [(1 - flatten) * share / total + flatten / len(shares) for share in shares]
        return ask.read(rng.choices(mistakes, weights)[0])

    def _stray(self, ask: Ask, right: str, rng: Random) -> Reading:
        while True:
            off = ask if rng.random() < 0.5 else self.world.draw(ask.kind, rng)
            reading = off.read(rng.randrange(len(KINDS[ask.kind].words)))
            if reading.answer != right:
                return reading

    def bcq_prompt(self, ask: Ask, candidates: Sequence[Reading]) -> tuple[Message, ...]:
        """The prompt that shows two candidates in this order."""
        texts = tuple(summary_text(reading) for reading in candidates)
        return self.book.render(Draft(BCQ, self.world.question(ask), {"candidates": texts}))

    def ncq_prompt(self, ask: Ask, wrong: Sequence[Reading]) -> tuple[Message, ...]:
        """The prompt that lists wrong answers, each once, and shows all candidates."""
        slots = {
            "answers": tuple(dict.fromkeys(reading.answer for reading in wrong)),
            "candidates": tuple(summary_text(reading) for reading in wrong),
        }
        return self.book.render(Draft(NCQ, self.world.question(ask), slots))


class TeacherCorpus:
    """Draws the teacher's documents: right answers, and compressions of right, wrong and broken responses."""

    def __init__(self, world: VisionWorld, book: PromptBook) -> None:
        self.world = world
        self.book = book
        self._share = world.settings.teacher.compression
        self._weights = world.settings.corpus.levels
        self._kinds = world.levels

    def document(self, rng: Random) -> Document:
        """One document."""
        if rng.random() < self._share:
            response = self.response(rng)
            messages = self.book.compression(response.text, response.has_answer)
            summary = " ".join(["<summary>", *words(response.summary), "</summary>"])
            return Document("compression", messages, None, summary)
        kind = rng.choices(tuple(self._weights), tuple(self._weights.values()))[0]
        ask = self.world.draw(kind, rng)
        return Document(PLAIN, self.book.plain(self.world.question(ask)), ask.picture, completion_text(ask.truth))

    def response(self, rng: Random) -> Response:
        """What was written is to be copied, never mended: it fits no picture, and part of it not even itself."""
        written = completion_text(self._reading(rng)).split()
        if rng.random() < ODD:
            for _ in range(rng.randint(1, MOST_DAMAGE)):
                written = damaged(written, written, rng)
        return compressed(" ".join(written), MOST_STEPS)

    def _reading(self, rng: Random) -> Reading:
        """Any reading of any picture; some have the thought of one and the answer of another."""
        first, second = (self._any(rng) for _ in range(2))
        return Reading(first.thought, second.answer) if rng.random() < ODD else first

    def _any(self, rng: Random) -> Reading:
        kind = rng.choice(self._kinds)
        return self.world.draw(kind, rng).read(rng.randrange(len(KINDS[kind].words)))


def summary_text(reading: Reading) -> str:
    """A reading as the teacher writes a compressed candidate."""
    return compressed(completion_text(reading), MOST_STEPS).summary

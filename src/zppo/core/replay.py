"""The prompt replay buffer: hard questions wait here until the student solves half of its plain rollouts (Alg. 1, l. 19)."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from zppo.core.draws import keyed_random
from zppo.core.select import is_hard
from zppo.core.types import Question


@dataclass(frozen=True, slots=True)
class Entry:
    """A hard question in the buffer; it never holds a completion.

    Attributes:
        question: the question, images by reference.
        accuracy: plain accuracy at admission (the entry bin of Figs. 4 and 20).
        step: the step of admission.
        visits: plain groups since admission.
    """

    question: Question
    accuracy: float
    step: int
    visits: int = 0


@dataclass(frozen=True, slots=True)
class Changes:
    """What one update did. An entry that was admitted and evicted by the same update stands in both."""

    admitted: tuple[Entry, ...] = ()
    graduated: tuple[Entry, ...] = ()
    evicted: tuple[Entry, ...] = ()


class PromptReplayBuffer:
    """First-in first-out buffer of hard questions with uniform sampling.

    O(1) per question that is admitted, graduated or evicted; O(k + len(exclude)) per sample; the same at any capacity.

    Args:
        capacity: Bmax; the oldest entries are evicted beyond it.
        threshold: tau; a question is admitted below it and graduates at or above it.
        seed: keys the draws of `sample`.

    Raises:
        ValueError: capacity below 1, or threshold outside (0, 1].
    """

    def __init__(self, capacity: int, threshold: float = 0.5, seed: int = 0) -> None:
        if capacity < 1:
            raise ValueError(f"capacity is {capacity}: a buffer holds at least 1 question")
        if not 0 < threshold <= 1:
            raise ValueError(f"threshold is {threshold}: an accuracy above 0 and up to 1 is needed")
        self.capacity, self.threshold, self.seed = capacity, threshold, seed
        self._entries: OrderedDict[str, Entry] = OrderedDict()  # oldest first
        self._slots: list[str] = []  # ids in an order that allows O(1) removal: what is sampled from
        self._slot_of: dict[str, int] = {}
        self._bins: Counter[float] = Counter()
        self._draws = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, question_id: object) -> bool:
        return question_id in self._entries

    def get(self, question_id: str) -> Entry | None:
        """The entry of a question, None where it is not in the buffer."""
        return self._entries.get(question_id)

    def questions(self) -> list[Question]:
        """What it holds, oldest first."""
        return [entry.question for entry in self._entries.values()]

    @property
    def draws(self) -> int:
        """How often it was sampled from, which keys the next sample."""
        return self._draws

    def occupancy(self) -> dict[float, int]:
        """Entries by accuracy at admission, ascending (Fig. 20)."""
        return {accuracy: count for accuracy, count in sorted(self._bins.items()) if count}

    def update(self, results: Iterable[tuple[Question, float]], step: int) -> Changes:
        """Admit, graduate, then evict (Alg. 1, l. 19).

        Args:
            results: (question, plain accuracy) in batch order, from plain groups only.
            step: the current step, kept as the entry step of what is admitted.

        Returns:
            What was admitted, graduated and evicted, in that order of events.

        Raises:
            ValueError: an accuracy that is no number in [0, 1]; nothing is changed then.
        """
        results = list(results)
        for question, accuracy in results:
            if not 0 <= accuracy <= 1:
                raise ValueError(f"question {question.id!r} has accuracy {accuracy}: a share from 0 to 1 is needed")
        admitted, graduated, evicted = [], [], []
        for question, accuracy in results:
            entry = self._entries.get(question.id)
            if entry is None:
                if is_hard(accuracy, self.threshold):
                    admitted.append(self._add(Entry(question, accuracy, step)))
                continue
            entry = replace(entry, visits=entry.visits + 1)
            if is_hard(accuracy, self.threshold):
                self._entries[question.id] = entry  # keeps its place in the queue
            else:
                self._remove(question.id)
                graduated.append(entry)
        while len(self._entries) > self.capacity:
            evicted.append(self._remove(next(iter(self._entries))))
        return Changes(tuple(admitted), tuple(graduated), tuple(evicted))

    def sample(self, k: int, exclude: Iterable[str] = ()) -> list[Question]:
        """Up to k questions, uniformly without replacement, none whose id is in `exclude` (Alg. 1, l. 2).

        The draw is keyed by (seed, number of draws so far), and both are part of `state_dict`.
        """
        excluded = set(exclude)
        draw = keyed_random(self.seed, "replay", self._draws)
        self._draws += 1
        chosen: list[Question] = []
        moved: dict[int, int] = {}  # a partial Fisher-Yates shuffle that leaves the slots alone
        for done in range(len(self._slots)):
            if len(chosen) >= k:
                break
            pick = draw.randrange(done, len(self._slots))
            slot, moved[pick] = moved.get(pick, pick), moved.get(done, done)
            if (question_id := self._slots[slot]) not in excluded:
                chosen.append(self._entries[question_id].question)
        return chosen

    def state_dict(self) -> dict[str, Any]:
        """JSON-ready state, from which `load_state_dict` continues with the same future samples."""
        return {
            "seed": self.seed,
            "draws": self._draws,
            "entries": [[e.question.to_dict(), e.accuracy, e.step, e.visits] for e in self._entries.values()],
            "slots": list(self._slots),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state that `state_dict` wrote; capacity and threshold stay this buffer's own.

        Raises:
            ValueError: a damaged state: a part is missing, or slots and entries do not name the same questions once each.
                The buffer is then as before.
        """
        try:
            entries = [Entry(Question.from_dict(q), accuracy, at, visits) for q, accuracy, at, visits in state["entries"]]
            slots = [str(s) for s in state["slots"]]
            seed, draws = int(state["seed"]), int(state["draws"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"the replay buffer's state is damaged ({error!r}): take an older checkpoint") from error
        if len(set(slots)) != len(slots) or sorted(slots) != sorted(e.question.id for e in entries):
            raise ValueError(
                "the replay buffer's state is damaged (its slots and its entries name different questions): take an older checkpoint"
            )
        self.seed, self._draws = seed, draws
        self._entries = OrderedDict((e.question.id, e) for e in entries)
        self._slots = slots
        self._slot_of = {question_id: i for i, question_id in enumerate(slots)}
        self._bins = Counter(e.accuracy for e in entries)

    def _add(self, entry: Entry) -> Entry:
        self._slot_of[entry.question.id] = len(self._slots)
        self._slots.append(entry.question.id)
        self._entries[entry.question.id] = entry
        self._bins[entry.accuracy] += 1
        return entry

    def _remove(self, question_id: str) -> Entry:
        slot, last = self._slot_of.pop(question_id), self._slots.pop()
        if last != question_id:
            self._slots[slot] = last
            self._slot_of[last] = slot
        entry = self._entries.pop(question_id)
        self._bins[entry.accuracy] -= 1
        return entry

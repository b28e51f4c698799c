"""How an answer stands in a response: how it is written, and where it is found again (method.md section 7).

Boxes and answer lines are found here, in linear time. An expression of the user's may take for ever on a text that a model wrote, so it
runs in a worker that is killed at the deadline, and a step waits for few of those.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence
from functools import lru_cache
from typing import Any, Literal

from zppo.grading.text import extract_boxed, final_part, last_box
from zppo.grading.workers import DEADLINE, FOUND, IN_A_STEP, LITTLE, MEMORY_LIMIT, TimeOuts, WorkerPool

AFTER_THOUGHTS, ANYWHERE, LINE = "after-thoughts", "anywhere", "line"
PLACES = (AFTER_THOUGHTS, ANYWHERE, LINE)
"""Where answers are looked for; any other name is a regular expression."""

FormKind = Literal["box", "line", "own"]
LONGEST = 500
"""Characters of an expression."""

# A line that begins with the word, whatever a model sets around it: `**Answer:** 7`, `> Final answer: 7`.
_LINE = re.compile(r"[ \t>#*_`-]*+(?:(?:the|my)[ \t]++)?(?:final[ \t]++)?answer[*_`]*+[ \t]*+[:\uff1a][*_`]*+(.*)", re.IGNORECASE)


def check_place(place: str) -> str:
    """The place, where answers can be found by it. ValueError, with the mend, for an expression that is none or has not one group."""
    if place in PLACES:
        return place
    known = f"give {', '.join(PLACES)}, or a regular expression with one group, such as '####\\s*(.+)'"
    if len(place) > LONGEST:
        raise ValueError(f"an expression of {len(place):,} characters is too long (at most {LONGEST}): {known}")
    try:
        groups = re.compile(place).groups
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{place!r} is no place of an answer and no regular expression ({error}): {known}") from error
    if groups != 1:
        raise ValueError(
            f"the expression {place!r} has {groups} groups, and the answer is what its one group holds ((?:...) is none): {known}"
        )
    return place


class AnswerForm:
    """Where the answer of a response stands. May be shared between threads, survives a fork, can be pickled.

    Args:
        place: one of `PLACES`, or an expression with one group: the answer is what the group of its last match holds, in what follows the
            thoughts.
        deadline: seconds that an expression may take on one response.
        workers: processes that search; they start with the first response, and only for an expression.
    """

    def __init__(self, place: str = AFTER_THOUGHTS, deadline: float = DEADLINE, workers: int = 1) -> None:
        self.place = check_place(place)
        self._settings = (place, deadline, workers)
        self._pool = WorkerPool(deadline, workers, MEMORY_LIMIT)
        self._in_a_step = IN_A_STEP * workers

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self._settings

    def close(self) -> None:
        """End the workers. Used again, the form starts new ones."""
        self._pool.close()

    @property
    def kind(self) -> FormKind:
        """What an answer is put into: a box, a line of its own, or whatever the user's expression reads."""
        return "box" if self.place in (AFTER_THOUGHTS, ANYWHERE) else "line" if self.place == LINE else "own"

    @property
    def name(self) -> str:
        """In a few words, for people."""
        return {"box": "\\boxed{} answer", "line": "line 'Answer: ...'", "own": "answer that grading.answer_from matches"}[self.kind]

    def written(self, answer: str) -> str:
        """An answer as a response gives it; of an expression that begins or ends with plain text, between that text."""
        if self.kind == "own":
            return _filled(self.place, answer)
        return f"\\boxed{{{answer}}}" if self.kind == "box" else f"Answer: {' '.join(answer.split())}"

    def find(self, text: str, think_open: bool = False) -> str | None:
        """The answer of one response; None where it has none, or looking for it took too long."""
        return self.find_many([(text, think_open)])[0][0]

    def find_many(
        self, responses: Sequence[tuple[str, bool]], groups: Sequence[Hashable] | None = None, spent: TimeOuts | None = None
    ) -> list[tuple[str | None, str]]:
        """(answer, why there is none) of responses, in order.

        Args:
            responses: (text, whether its prompt ended inside an opened think block).
            groups: for each the group whose time-outs count together; None: all are one.
            spent: the time-outs of this step so far, which are counted on; None: the call is a step of its own.

        Returns:
            Reasons: "" beside an answer; "no answer", "timeout" (also of one that was not tried), "error" (its worker died).

        Raises:
            ZPPOError: workers are needed and cannot be started.
        """
        if self.kind == "box":
            found = [extract_boxed(text, think_open, self.place == ANYWHERE) for text, think_open in responses]
            return [(answer, "" if answer is not None else "no answer") for answer in found]
        parts = [final_part(text, think_open) for text, think_open in responses]
        if self.kind == "line":
            found = [None if part is None else last_line(part) for part in parts]
            return [(answer, "" if answer is not None else "no answer") for answer in found]
        rows = [(group, part) for group, part in zip(groups if groups is not None else [""] * len(parts), parts, strict=True)]
        outcomes = self._search([(group, part) for group, part in rows if part], spent if spent is not None else TimeOuts())
        return [_read(outcomes[group, part]) if part else (None, "no answer") for group, part in rows]

    def _search(self, rows: Sequence[tuple[Hashable, str]], spent: TimeOuts) -> dict[tuple[Hashable, str], str]:
        """The outcome of each row, a group and a text; what the step has asked about is not asked again."""
        decided = {row: known for row in rows if (known := spent.asked.get((row[0], (self.place, row[1])))) is not None}
        waiting = {row: row[0] for row in rows if row not in decided}
        while waiting:
            part = LITTLE if spent.total >= self._in_a_step else 1.0
            wave, given_up = spent.next_wave(waiting.items(), self._in_a_step)
            decided |= dict.fromkeys(given_up, "timeout")
            for row, outcome in zip(wave, self._pool.search(self.place, [text for _, text in wave], part), strict=True):
                spent.note(row[0], (self.place, row[1]), outcome)
                decided[row] = outcome
            for row in (*wave, *given_up):
                del waiting[row]
        return decided


BOXED = AnswerForm()
"""The last box after the thoughts."""


@lru_cache(maxsize=16)
def answer_form_of(place: str, deadline: float = DEADLINE, workers: int = 1) -> AnswerForm:
    """The form of a place: one for all who ask, so that they share its workers."""
    return AnswerForm(place, deadline, workers)


def last_line(text: str) -> str | None:
    """What stands behind `Answer:` in the last line that begins so and holds something; of a box there what it holds. Linear time."""
    for line in reversed(text.splitlines()):
        if (match := _LINE.match(line)) is None:
            continue
        answer = match[1].strip().strip("*_`").strip()
        if (box := last_box(answer)) is not None:
            answer = box.strip()
        if answer:
            return answer
    return None


def _read(outcome: str) -> tuple[str | None, str]:
    if outcome.startswith(FOUND):
        answer = outcome.removeprefix(FOUND).strip()
        return (answer, "") if answer else (None, "no answer")
    return None, "no answer" if outcome == "none" else outcome


_PLAIN = re.compile(r"(?:[^\\.^$*+?{}\[\]|()]|\\[^\w\s])*")
_SPACE = re.compile(r"\\s[*+]|\\s\?|[ \t][*+?]")


def _filled(pattern: str, answer: str) -> str:
    """The answer in the place of the expression's group, where plain text alone stands around it; the answer else."""
    before, _, rest = _SPACE.sub(" ", pattern).replace("(?s)", "").replace("(?m)", "").replace("(?i)", "").partition("(")
    after = rest.rpartition(")")[2]
    sides = [side.removeprefix("^").removesuffix("$") for side in (before, after)]
    if not all(_PLAIN.fullmatch(side) for side in sides):
        return answer
    return "".join((re.sub(r"\\(.)", r"\1", sides[0]), answer, re.sub(r"\\(.)", r"\1", sides[1])))

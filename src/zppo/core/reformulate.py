"""Reformulations: what a hard question is asked again with (paper section 3.2). Slots only; words are rendered above the core."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, Protocol

from zppo.core.types import BCQ, NCQ, Draft, Question

Need = Literal["pair", "wrong"]


@dataclass(frozen=True, slots=True)
class Candidate:
    """A completion in the form in which it is shown to the student.

    Attributes:
        text: compressed, or the capped uncompressed form.
        answer: the answer of the completion behind it, None where it has none.
        index: its place among the rollouts of its source.
    """

    text: str
    answer: str | None
    index: int


@dataclass(frozen=True, slots=True)
class Material:
    """What there is to reformulate one hard question with.

    Attributes:
        question: the question.
        pair: (correct teacher candidate, wrong student candidate); None where T_x or W_x has nothing to show.
        wrong: every wrong student rollout of the plain group (W_x), in rollout order, duplicates kept.
        wrong_answers: the distinct wrong answers, see `distinct_answers`.
    """

    question: Question
    pair: tuple[Candidate, Candidate] | None = None
    wrong: tuple[Candidate, ...] = ()
    wrong_answers: tuple[str, ...] = ()


class Reformulation(Protocol):
    """One way to ask a hard question again.

    Attributes:
        kind: its name; also the name of its template.
        needs: what of `Material` must be prepared: "pair" costs teacher rollouts and compression, "wrong" compression of all of W_x.
    """

    kind: str
    needs: frozenset[Need]

    def draft(self, material: Material, rng: random.Random) -> Draft | None:
        """The draft, or None where the material does not give one. Every random choice is drawn from `rng`."""
        ...


class BinaryCandidateQuestion:
    """BCQ: one correct teacher candidate and one wrong student candidate, anonymous, in shuffled order (Alg. 1, l. 9)."""

    kind = BCQ
    needs: frozenset[Need] = frozenset({"pair"})

    def draft(self, material: Material, rng: random.Random) -> Draft | None:
        """Both texts as the slot `candidates`; which one is right stands in `audit` alone."""
        if material.pair is None:
            return None
        positive, negative = material.pair
        correct_at = rng.randrange(2)
        texts = (positive.text, negative.text) if correct_at == 0 else (negative.text, positive.text)
        audit = {"correct_at": correct_at, "positive_answer": positive.answer, "negative_answer": negative.answer}
        return Draft(self.kind, material.question, {"candidates": texts}, audit=audit)


class NegativeCandidateQuestion:
    """NCQ: all wrong student candidates and their distinct answers, stated to be wrong; nothing of the teacher's (Alg. 1, l. 10)."""

    kind = NCQ
    needs: frozenset[Need] = frozenset({"wrong"})

    def draft(self, material: Material, rng: random.Random) -> Draft | None:
        """Slots `answers` (may be empty) and `candidates`."""
        if not material.wrong:
            return None
        slots = {"answers": material.wrong_answers, "candidates": tuple(c.text for c in material.wrong)}
        return Draft(self.kind, material.question, slots, audit={"wrong_answers": material.wrong_answers})


def distinct_answers(answers: Iterable[tuple[str | None, str]], gold: str) -> tuple[str, ...]:
    """Wrong answers as NCQ lists them: first-seen form and order, the gold and missing answers left out (ours).

    Args:
        answers: (answer, its normalised form) in rollout order.
        gold: the gold answer's normalised form.
    """
    seen: dict[str, str] = {}
    for answer, normal in answers:
        if answer is not None and normal != gold:
            seen.setdefault(normal, answer)
    return tuple(seen.values())

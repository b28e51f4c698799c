"""Reformulations: what a hard question is asked again with (paper section 3.2). Slots only; words are rendered above the core."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Literal, Protocol

from zppo.core.types import BCQ, HINT, LTE, NCQ, PARTIAL, PREFIX, Draft, Question

Need = Literal["pair", "wrong", "hint", "prefix", "answers"]
RESPONSES: frozenset[Need] = frozenset({"pair", "hint", "prefix"})
"""Needs that take a correct teacher response."""


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
        hint: a hint that the teacher made of one of its correct responses; None where there is none.
        response_ids: one correct teacher response in the student's tokens; empty where there is none.
        response: its text.
        prefix_fraction: how much of that response Prefix gives.
        count_duplicates: NCQ shows candidates of one text once, with their number.
        teacher_answers: the distinct answers of all correct teacher responses, for the audit alone; None where the teacher was not asked.
        truncated: a wrong rollout ran into the token limit.
    """

    question: Question
    pair: tuple[Candidate, Candidate] | None = None
    wrong: tuple[Candidate, ...] = ()
    wrong_answers: tuple[str, ...] = ()
    hint: str | None = None
    response_ids: tuple[int, ...] = ()
    response: str = ""
    prefix_fraction: float = 0.4
    count_duplicates: bool = False
    teacher_answers: tuple[str, ...] | None = None
    truncated: bool = False


class Reformulation(Protocol):
    """One way to ask a hard question again: this class, a template called like its kind, and a row of `REFORMULATIONS`.

    Attributes:
        kind: its name; also the name of its template. Where `shows_question_alone` is there and true it needs none.
        needs: what of `Material` must be prepared: "pair" costs teacher rollouts and compression, "wrong" compression of all of W_x,
            "hint" teacher rollouts and a request for the hint, "prefix" teacher rollouts; "answers", those of W_x, costs nothing.
    """

    kind: str
    needs: frozenset[Need]

    def draft(self, material: Material, rng: random.Random) -> Draft | None:
        """The draft, or None where the material does not give one. Every random choice is drawn from `rng`."""
        ...


class BinaryCandidateQuestion:
    """BCQ: one correct teacher candidate and one wrong student candidate, anonymous, in shuffled order (Alg. 1, l. 8-10)."""

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
    """NCQ: all wrong student candidates and their distinct answers, stated to be wrong; nothing of the teacher's (Alg. 1, l. 8-10)."""

    kind = NCQ
    needs: frozenset[Need] = frozenset({"wrong"})

    def draft(self, material: Material, rng: random.Random) -> Draft | None:
        """Slots `answers` (may be empty) and `candidates`, duplicates kept as in the paper; or once each, with their `counts` [zppo]. What
        the teacher answered stands in `audit` alone."""
        if not material.wrong:
            return None
        texts = tuple(c.text for c in material.wrong)
        slots: dict[str, Any] = {"answers": material.wrong_answers, "candidates": texts}
        if material.count_duplicates:
            counts = Counter(texts)
            slots |= {"candidates": tuple(counts), "counts": tuple(counts.values())}
        audit = {"wrong_answers": material.wrong_answers}
        if material.teacher_answers is not None:
            audit["teacher_answers"] = material.teacher_answers
        return Draft(self.kind, material.question, slots, audit=audit)


class HintQuestion:
    """Hint: the question with a hint of the teacher's that gives the answer away no more than the question does (Alg. 5)."""

    kind = HINT
    needs: frozenset[Need] = frozenset({"hint"})

    def draft(self, material: Material, rng: random.Random) -> Draft | None:
        """The slot `hint`."""
        return None if material.hint is None else Draft(self.kind, material.question, {"hint": material.hint})


class PrefixQuestion:
    """Prefix: the student continues the first part of a correct teacher response, which is masked from the loss (Alg. 6).

    Args:
        fraction: how much of the response's tokens is given; None: what the material says, 0.4 in the paper.
    """

    kind = PREFIX
    needs: frozenset[Need] = frozenset({"prefix"})
    shows_question_alone = True

    def __init__(self, fraction: float | None = None) -> None:
        self.fraction = fraction

    def draft(self, material: Material, rng: random.Random) -> Draft | None:
        """No slots, the prefix as forced tokens; None where it would be empty."""
        fraction = material.prefix_fraction if self.fraction is None else self.fraction
        forced = material.response_ids[: int(fraction * len(material.response_ids) + 1e-9)]
        return Draft(self.kind, material.question, {}, forced_ids=forced) if forced else None


class TrialAndError:
    """LTE: the student's own wrong answers, stated to be wrong, and no attempt; prior art of NCQ (arXiv 2510.26109, section "hinted extra
    rollouts"). Where an attempt ran into the token limit, it is told to think briefly."""

    kind = LTE
    needs: frozenset[Need] = frozenset({"answers"})

    def draft(self, material: Material, rng: random.Random) -> Draft | None:
        """Slots `answers` (may be empty) and `truncated`; None where there is nothing to say."""
        if not (material.wrong_answers or material.truncated):
            return None
        slots = {"answers": material.wrong_answers, "truncated": material.truncated}
        return Draft(self.kind, material.question, slots, audit={"wrong_answers": material.wrong_answers})


class PartialSolution:
    """The beginning of a correct teacher response, shown in the prompt to build on (POPE, arXiv 2601.18779); unlike Prefix the student
    writes its completion from the start."""

    kind = PARTIAL
    needs: frozenset[Need] = frozenset({"prefix"})

    def draft(self, material: Material, rng: random.Random) -> Draft | None:
        """The slot `beginning`, so many of the response's words as Prefix gives of its tokens; None where that is none."""
        words = re.findall(r"\S+\s*", material.response)
        shown = "".join(words[: int(material.prefix_fraction * len(words) + 1e-9)])
        return Draft(self.kind, material.question, {"beginning": shown}) if shown else None


REFORMULATIONS: Mapping[str, type[Reformulation]] = MappingProxyType(
    {
        row.kind: row
        for row in (BinaryCandidateQuestion, NegativeCandidateQuestion, HintQuestion, PrefixQuestion, TrialAndError, PartialSolution)
    }
)
"""The reformulations that a recipe can name by their kind."""


class Placebo:
    """Another reformulation's place without its content: the plain question again, wherever `inner` would have built a prompt [zppo].

    What a method gains over its placebo is what the content of its prompts is worth; what the placebo gains over GRPO is the worth of
    more rollouts on hard questions.
    """

    shows_question_alone = True

    def __init__(self, inner: Reformulation) -> None:
        self.inner = inner
        self.kind = f"placebo-{inner.kind}"
        self.needs = inner.needs

    def draft(self, material: Material, rng: random.Random) -> Draft | None:
        """No slots; None where `inner` has none."""
        return None if self.inner.draft(material, rng) is None else Draft(self.kind, material.question, {})


def scrambled(drafts: Sequence[Draft]) -> list[Draft]:
    """The same prompts with another question's candidates: every draft takes the slots of the next one of its kind [zppo].

    A control for the form of the prompts: as many candidates, as long, and none of them about the question. A draft that is the only
    one of its kind is left out.
    """
    places: dict[str, list[int]] = {}
    for place, draft in enumerate(drafts):
        places.setdefault(draft.kind, []).append(place)
    following = {a: b for kind in places.values() if len(kind) > 1 for a, b in zip(kind, kind[1:] + kind[:1], strict=True)}
    return [
        replace(draft, slots=drafts[following[place]].slots, audit={"scrambled": drafts[following[place]].question.id})
        for place, draft in enumerate(drafts)
        if place in following
    ]


def distinct_answers(answers: Iterable[tuple[str | None, str]], gold: str) -> tuple[str, ...]:
    """Wrong answers as NCQ lists them: first-seen form and order, the gold and missing answers left out [zppo].

    Args:
        answers: (answer, its normalised form) in rollout order.
        gold: the gold answer's normalised form.
    """
    seen: dict[str, str] = {}
    for answer, normal in answers:
        if answer is not None and normal != gold:
            seen.setdefault(normal, answer)
    return tuple(seen.values())

"""Candidate compression: the teacher rewrites right and wrong completions alike, so that no style tells them apart.

method.md section 4.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from zppo.core.draws import draw_key, keyed_random
from zppo.core.reformulate import Candidate
from zppo.grading import normalise
from zppo.grading.answer_form import BOXED, AnswerForm
from zppo.prompts import PromptBook
from zppo.step_log import StepLog
from zppo.teacher.interface import Teacher, TeacherReply, TeacherRequest, TeacherSampling

MAX_LINES = 5
REDRAWS = 3
ECHO = 20  # characters: a shorter line of the instructions could be anybody's
ECHO_WORDS, ECHO_SHARE = 4, 0.5  # words in a row that are theirs too, and the share of a text in such rows that makes it an echo [zppo]


@dataclass(frozen=True, slots=True)
class Source:
    """A completion that may become a candidate.

    Attributes:
        text: the completion.
        answer: what was extracted from it, None where it has none.
        index: its place among the rollouts of its source.
        reward: what its grading gave.
        think_open: its model's prompt ended inside an opened think block, so that the text begins with thoughts.
    """

    text: str
    answer: str | None
    index: int = 0
    reward: float = 0.0
    think_open: bool = False

    @property
    def key(self) -> tuple[str, str | None]:
        """Equal for completions that are compressed once for all."""
        return self.text, self.answer


@dataclass(frozen=True, slots=True)
class PairRequest:
    """What one hard question needs.

    Attributes:
        question_id: keys the draws.
        positives: the correct teacher completions that BCQ may show, of T_x.
        negatives: the wrong student completions that BCQ may show, of W_x.
        wrong: all wrong student completions, W_x, in rollout order.
        want_pair: draw and compress a pair (BCQ).
        want_wrong: compress all of `wrong` (NCQ).
    """

    question_id: str
    positives: tuple[Source, ...] = ()
    negatives: tuple[Source, ...] = ()
    wrong: tuple[Source, ...] = ()
    want_pair: bool = False
    want_wrong: bool = False


@dataclass(frozen=True, slots=True)
class Prepared:
    """What one hard question got.

    Attributes:
        pair: (positive, negative); None where it was not wanted or a pool is empty.
        pair_raw: compression failed, so both stand in the capped uncompressed form.
        wrong: one candidate per entry of the request's `wrong`, in its order; empty where not wanted.
        wrong_raw: how many of these compression failed for, so that they stand in the capped uncompressed form.
    """

    pair: tuple[Candidate, Candidate] | None = None
    pair_raw: bool = False
    wrong: tuple[Candidate, ...] = ()
    wrong_raw: int = 0


COMPRESSION_COUNTS = tuple(
    f"compression_{name}" for name in ("asked", "failed", "echoed", "unreachable", "prompt_tokens", "completion_tokens")
)
"""What a step counts: completions sent to the teacher; of these, summaries that `accept` refused, those of them that repeated the
instructions, and completions for which no reply came; tokens as far as the teacher reports them."""


def accept(
    reply: str, answer: str | None, cap: Callable[[str], str], max_lines: int = MAX_LINES, instructions: str = "", form: AnswerForm = BOXED
) -> str | None:
    """The summary in a compression reply, or None where it cannot stand for the completion (method.md section 4).

    The last complete `<summary>` block after the last `</think>` counts. It is refused if it is missing or empty, if it
    is longer than the cap, if its answer differs from the completion's after method.md section 9's normalisation (the
    teacher may have repaired a wrong answer), if the completion has no answer and the summary has one, or if it repeats
    the instructions instead of following them. Blank lines are dropped, and lines beyond `max_lines` join the last one: a
    teacher that counts badly costs no redraw, since the cap bounds the length [zppo].

    Args:
        reply: the teacher's text.
        answer: the completion's answer.
        cap: cuts a text to the token limit; returns it unchanged where it is within.
        max_lines: most lines of a summary.
        instructions: the request, without the completion.
        form: how answers are written.
    """
    lines = _summary_lines(reply)
    summary = "\n".join(_joined(lines, max_lines, form.kind == "box")).strip()
    if not summary or cap(summary) != summary or echoes(lines, instructions, "" if answer is None else form.written(answer)):
        return None
    kept = form.find(summary)
    if answer is None:
        return None if kept is not None or (form.kind == "box" and "\\boxed" in summary) else summary
    return summary if kept is not None and normalise(kept) == normalise(answer) else None


def _joined(lines: Sequence[str], most: int, joins_last: bool) -> list[str]:
    """At most so many lines: those beyond join the last one, or where that holds the answer alone the one before it."""
    if len(lines) <= most or joins_last or most < 2:
        return [*lines[: most - 1], " ".join(lines[most - 1 :])]
    return [*lines[: most - 2], " ".join(lines[most - 2 : -1]), lines[-1]]


def _summary_lines(reply: str) -> list[str]:
    """The lines of the last complete `<summary>` block behind the thoughts, blank ones left out; none where there is no block."""
    text = reply.rsplit("</think>", 1)[-1]
    end = text.rfind("</summary>")
    start = text.rfind("<summary>", 0, max(end, 0))
    return [line.strip() for line in text[start + len("<summary>") : end].splitlines() if line.strip()] if start >= 0 else []


def echoes(lines: Sequence[str], instructions: str, answer: str = "") -> bool:
    """Whether a text repeats its instructions: it is a piece of them, has a line of theirs, or at least half of its words stand in
    rows of four and more that are theirs, however they are wrapped, marked or capitalised.

    Args:
        lines: the text's, none blank.
        answer: as the text's last words give it, which do not count.
    """
    if not lines or not instructions:
        return False
    theirs = {stripped for line in instructions.splitlines() if len(stripped := line.strip(" -")) >= ECHO}
    text = "\n".join(lines)
    if text in instructions or any(line.strip(" -") in theirs for line in lines):
        return True
    words, tail = _words(text), _words(answer)
    if tail and words[-len(tail) :] == tail:
        words = words[: -len(tail)]
    known = set(_rows(_words(instructions)))
    covered = {i + k for i, row in enumerate(_rows(words)) if row in known for k in range(ECHO_WORDS)}
    return bool(words) and len(covered) >= ECHO_SHARE * len(words)


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


def _rows(words: Sequence[str]) -> list[tuple[str, ...]]:
    return [tuple(words[i : i + ECHO_WORDS]) for i in range(len(words) - ECHO_WORDS + 1)]


def token_tail(tokenizer: Any, limit: int) -> Callable[[str], str]:
    """A cap that keeps the last `limit` tokens of a text: the tail, because the answer stands at the end [zppo].

    Args:
        tokenizer: of `transformers`; tokens are counted without special ones.
        limit: tokens, at least 1.
    """

    def cap(text: str) -> str:
        if tokenizer.is_fast:
            spans = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
            return text if len(spans) <= limit else text[spans[-limit][0] :].strip()
        ids = tokenizer.encode(text, add_special_tokens=False)
        return text if len(ids) <= limit else str(tokenizer.decode(ids[-limit:])).lstrip("\ufffd").strip()

    return cap


def draw_order(pool: Sequence[Source], draws: int, rng: random.Random) -> tuple[Source, ...]:
    """The candidates that are tried one after the other, at most `draws`; the first is uniform over the pool.

    A completion that equals an earlier one is passed over: it would fail in the same way.
    """
    seen: dict[tuple[str, str | None], Source] = {}
    for source in rng.sample(pool, len(pool)):
        seen.setdefault(source.key, source)
    return tuple(seen.values())[:draws]


class Compressor:
    """Compresses each distinct completion once a step, and draws the pairs of BCQ from what could be compressed."""

    def __init__(
        self,
        teacher: Teacher | None,
        book: PromptBook,
        how: TeacherSampling,
        cap: Callable[[str], str],
        *,
        enabled: bool = True,
        redraws: int = REDRAWS,
        form: AnswerForm = BOXED,
    ) -> None:
        """Sets how to compress.

        Args:
            teacher: None only where compression is off.
            book: renders the request.
            how: sampling and chat-template arguments; the token limit is the cap of a summary.
            cap: cuts a completion to the same token limit, see `token_tail`.
            enabled: False shows every completion in its capped uncompressed form and asks the teacher nothing.
            redraws: how often a candidate of a pair that fails is drawn anew.
            form: how answers are written.
        """
        self._teacher = teacher if enabled else None
        self._book = book
        self._how = how
        self._cap = cap
        self._redraws, self._form = redraws, form

    def raw(self, text: str) -> str:
        """The capped uncompressed form of a completion."""
        return self._cap(text.strip())

    def compress(self, items: Sequence[Source], seed: int, log: StepLog) -> list[str | None]:
        """Summaries in the order of the items, None where compression is off, failed, or got no reply.

        All that the step has not asked for yet are asked for in one teacher call. A draw is keyed by (seed, step, completion, answer):
        equal completions share a summary wherever they come from [zppo].
        """
        if self._teacher is None:
            return [None] * len(items)
        known = log.known("summaries")
        new = list({item.key: item for item in items if item.key not in known}.values())
        if new:
            replies = self._teacher.complete([self._request(item, seed, log.step) for item in new], self._how, log)
            for item, reply in zip(new, replies, strict=True):
                known[item.key] = self._judge(item, reply, log)
        return [known[item.key] for item in items]

    def requests(self, items: Sequence[Source], seed: int, step: int) -> tuple[list[TeacherRequest], TeacherSampling]:
        """What `compress` will ask for about them, for who asks ahead of it; nothing where compression is off."""
        return [] if self._teacher is None else [self._request(item, seed, step) for item in items], self._how

    def _request(self, item: Source, seed: int, step: int) -> TeacherRequest:
        return TeacherRequest(
            messages=self._book.compression(item.text, item.answer is not None),
            keys=(draw_key(seed, step, "compress", item.text, *_answer_key(item.answer)),),
        )

    def prepare(self, requests: Sequence[PairRequest], seed: int, log: StepLog) -> list[Prepared]:
        """Candidates for every request, in order; at most 1 + redraws teacher calls for all of them together.

        BCQ: each side is drawn uniformly from its pool; one that fails is redrawn, and if a side fails for good *both*
        take the capped uncompressed form, since a raw text next to a tidy summary would tell which is wrong. NCQ: all
        are wrong anyway, so a candidate that fails takes its own capped uncompressed form [zppo].
        """
        pairs = [self._draw(request, seed, log.step) for request in requests]
        known = log.known("summaries")
        wrong = [source for request in requests if request.want_wrong for source in request.wrong]
        for _ in range(self._redraws + 1 if self._teacher is not None else 0):
            unsettled = [pair for pair in pairs if pair is not None and pair.open]
            sides = [side for pair in unsettled for side in pair.sides if side.summary is None]
            if not sides and not wrong:
                break
            self.compress([*(side.current for side in sides), *wrong], seed, log)
            wrong = []
            for side in sides:
                side.settle(known[side.current.key])
        return [self._prepared(request, pair, known) for request, pair in zip(requests, pairs, strict=True)]

    def _judge(self, item: Source, reply: TeacherReply, log: StepLog) -> str | None:
        """The accepted summary of one reply; counts what happened."""
        text = reply.texts[0] if reply.texts else None
        log.note_error("teacher", reply.error)
        unfinished = text is not None and reply.think_open and "</think>" not in text
        request = self._book.compression("", item.answer is not None)[-1].content
        summary = None if text is None or unfinished else accept(text, item.answer, self._cap, instructions=request, form=self._form)
        answer = "" if item.answer is None else self._form.written(item.answer)
        log.add(
            compression_asked=1,
            compression_failed=text is not None and summary is None,
            compression_echoed=text is not None and not unfinished and summary is None and echoes(_summary_lines(text), request, answer),
            compression_unreachable=text is None,
            compression_prompt_tokens=reply.prompt_tokens,
            compression_completion_tokens=reply.completion_tokens,
        )
        return summary

    def _draw(self, request: PairRequest, seed: int, step: int) -> _Pair | None:
        if not (request.want_pair and request.positives and request.negatives):
            return None

        def side(name: str, pool: Sequence[Source]) -> _Side:
            rng = keyed_random(seed, step, request.question_id, "candidate", name)
            return _Side(draw_order(pool, self._redraws + 1, rng))

        return _Pair((side("positive", request.positives), side("negative", request.negatives)))

    def _prepared(self, request: PairRequest, pair: _Pair | None, known: Mapping[Any, str | None]) -> Prepared:
        wrong = [(source, known.get(source.key)) for source in request.wrong] if request.want_wrong else []
        shown = tuple(self._show(source, summary) for source, summary in wrong)
        wanted = self._teacher is not None  # with compression off the uncompressed form is what was asked for
        wrong_raw = sum(summary is None for _, summary in wrong) if wanted else 0
        if pair is None:
            return Prepared(wrong=shown, wrong_raw=wrong_raw)
        raw = any(side.summary is None for side in pair.sides)
        positive, negative = (self._show(side.current, None if raw else side.summary) for side in pair.sides)
        return Prepared((positive, negative), raw and wanted, shown, wrong_raw)

    def _show(self, source: Source, summary: str | None) -> Candidate:
        text = self.raw(source.text) if summary is None else summary
        return Candidate(text, source.answer, source.index)


def _answer_key(answer: str | None) -> Iterable[str]:
    return () if answer is None else (answer,)


@dataclass(slots=True)
class _Side:
    """One side of a pair: what may be tried, where it stands, the summary once there is one."""

    options: tuple[Source, ...]
    at: int = 0
    summary: str | None = None
    failed: bool = False

    @property
    def current(self) -> Source:
        return self.options[self.at]

    def settle(self, summary: str | None) -> None:
        """Takes the summary of `current`, or moves on to the next option."""
        self.summary = summary
        if summary is None:
            self.failed = self.at + 1 == len(self.options)
            self.at = min(self.at + 1, len(self.options) - 1)


@dataclass(frozen=True, slots=True)
class _Pair:
    """The positive and the negative side."""

    sides: tuple[_Side, _Side]

    @property
    def open(self) -> bool:
        """Whether another round can still help."""
        return not any(side.failed for side in self.sides) and any(side.summary is None for side in self.sides)

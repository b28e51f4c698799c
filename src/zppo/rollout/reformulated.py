"""From hard groups to reformulated prompts: teacher responses -> candidates and hints -> BCQ, NCQ, ... (Alg. 1, l. 4-15; Algs. 5, 6)."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from zppo.config.methods import Method, load_reformulation
from zppo.config.settings import Settings
from zppo.core.draws import draw_key, keyed_random
from zppo.core.reformulate import RESPONSES, Material, Need, Placebo, Reformulation, distinct_answers, scrambled
from zppo.core.replay import PromptReplayBuffer
from zppo.core.select import is_hard, next_wave, share_of
from zppo.core.types import PLAIN, Draft, Group, Prompt, Question, Rollout
from zppo.errors import SettingsError
from zppo.grading import has_gold_words, normalise
from zppo.prompts.book import PromptBook
from zppo.rollout.student import PromptRenderer
from zppo.rollout.teacher import TEACHER_COUNTS, Pools, ResponseTokens, SharedTeacher, TeacherSampler
from zppo.step_log import StepLog
from zppo.teacher.compression import COMPRESSION_COUNTS, Compressor, PairRequest, Prepared, Source, token_tail
from zppo.teacher.hints import HINT_COUNTS, HintRequest, make_hints
from zppo.teacher.interface import Teacher, TeacherRequest, TeacherSampling


class CandidateMaker:
    """Prepares what the reformulations of a method need, for several questions at once.

    Args:
        needs: what the reformulations name in their `needs`; nothing else is made.
        compressor: candidate compression.
        teacher, hint: who writes hints and how it is sampled.
        book: the words of the request for a hint.
        response_ids: a response in the student's tokens, for Prefix.
        prefix_fraction: how much of it Prefix gives.
        count_duplicates: whether NCQ shows equal candidates once, with their number.
        seed: keys every draw.
    """

    def __init__(
        self,
        needs: frozenset[Need],
        *,
        compressor: Compressor,
        teacher: Teacher | None,
        hint: TeacherSampling,
        book: PromptBook,
        response_ids: Callable[[Source], tuple[int, ...]],
        prefix_fraction: float = 0.4,
        count_duplicates: bool = False,
        seed: int,
    ) -> None:
        self.needs, self.compressor, self.teacher, self.hint = needs, compressor, teacher, hint
        self.book, self.response_ids, self.seed = book, response_ids, seed
        self.prefix_fraction, self.count_duplicates = prefix_fraction, count_duplicates
        self.count_names = (  # candidates that a step could not show as it should, and what making them took
            *("bcq_without_negative", "bcq_raw_pairs", "ncq_raw_candidates"),
            *COMPRESSION_COUNTS,
            *(HINT_COUNTS if "hint" in needs else ()),
        )

    def make(self, groups: Sequence[Group], pools: Pools, log: StepLog) -> list[Material]:
        """Materials in the order of the groups, from their wrong rollouts and the correct teacher responses."""
        wrong = [_wrong(g) for g in groups]
        prepared = self._candidates(groups, wrong, pools, log)
        hints = self._make_hints(groups, pools, log)
        responses = [self._response(g, pools, log.step) for g in groups]
        return [
            Material(
                question=g.question,
                pair=p.pair,
                wrong=p.wrong,
                wrong_answers=_listed(sources, g.question),
                teacher_answers=_distinct(pools.get(g.question.id)),
                hint=hint,
                response_ids=self.response_ids(response) if response else (),
                response=response.text if response else "",
                prefix_fraction=self.prefix_fraction,
                count_duplicates=self.count_duplicates,
                truncated=any(r.truncated for r in g.wrong),
            )
            for g, sources, p, hint, response in zip(groups, wrong, prepared, hints, responses, strict=True)
        ]

    def _candidates(self, groups: Sequence[Group], wrong: Sequence[tuple[Source, ...]], pools: Pools, log: StepLog) -> list[Prepared]:
        if not self.needs & {"pair", "wrong"}:
            return [Prepared() for _ in groups]
        requests = [
            PairRequest(
                question_id=g.question.id,
                positives=_showable(pools.get(g.question.id, ())),
                negatives=_showable(sources),
                wrong=sources,
                want_pair="pair" in self.needs,
                want_wrong="wrong" in self.needs,
            )
            for g, sources in zip(groups, wrong, strict=True)
        ]
        prepared = self.compressor.prepare(requests, self.seed, log)
        log.add(
            bcq_without_negative=sum(bool(r.want_pair and r.wrong and all(s.answer is None for s in r.negatives)) for r in requests),
            bcq_raw_pairs=sum(p.pair_raw for p in prepared),
            ncq_raw_candidates=sum(p.wrong_raw for p in prepared),
        )
        return prepared

    def _make_hints(self, groups: Sequence[Group], pools: Pools, log: StepLog) -> list[str | None]:
        if "hint" not in self.needs or self.teacher is None:
            return [None] * len(groups)
        requests = [HintRequest(g.question, pools.get(g.question.id, ())) for g in groups]
        return make_hints(requests, self.teacher, self.book, self.hint, seed=self.seed, log=log)

    def _response(self, group: Group, pools: Pools, step: int) -> Source | None:
        """One correct teacher response, drawn uniformly."""
        pool = pools.get(group.question.id, ())
        if "prefix" not in self.needs or not pool:
            return None
        return keyed_random(self.seed, "prefix", step, group.question.id).choice(pool)


def _wrong(group: Group) -> tuple[Source, ...]:
    """W_x in rollout order."""
    return tuple(Source(r.text, r.answer, i) for i, r in enumerate(group.rollouts) if r.graded and not r.correct)


def _showable(pool: Sequence[Source]) -> tuple[Source, ...]:
    """What BCQ draws from: the completions that have an answer, beside which one without would stand out; where none has one, all of them,
    as the paper draws: a student that does not box its answers yet shall not be left without help [zppo]."""
    return tuple(s for s in pool if s.answer is not None) or tuple(pool)


def _listed(wrong: Sequence[Source], question: Question) -> tuple[str, ...]:
    """The answers that NCQ lists."""
    answers = [s.answer for s in wrong if s.answer is not None and not has_gold_words(question.gold, s.answer)]
    return distinct_answers([(answer, normalise(answer)) for answer in answers], normalise(str(question.gold)))


def _distinct(pool: Sequence[Source] | None) -> tuple[str, ...] | None:
    """The answers of the correct teacher responses to a question, None where the teacher was not asked about it."""
    return None if pool is None else tuple(dict.fromkeys(source.answer for source in pool if source.answer is not None))


@dataclass(frozen=True, slots=True)
class ReformulatedPrompts:
    """What a step asks again.

    Attributes:
        prompts: reformulated prompts, at most floor(rho_aug * len(X_new)).
        responses: correct teacher responses by question id, of the hard questions that the teacher was asked about.
    """

    prompts: list[Prompt]
    responses: Pools


class Reformulator:
    """Makes the reformulated prompts of a step.

    Args:
        settings: the recipe's; of them the method, `teacher.ask`, the token limit of rollouts and the seed.
        reformulations: in building order (BCQ before NCQ in the paper).
        teacher_sampler, candidates: the teacher's responses; compressed candidates and hints.
        renderer: the student's words.
        context: the student's context in tokens, None if unbounded.
        ahead: who asks while the student samples; None where nobody does.
    """

    def __init__(
        self,
        settings: Settings,
        reformulations: Sequence[Reformulation],
        teacher_sampler: TeacherSampler,
        candidates: CandidateMaker,
        renderer: PromptRenderer,
        context: int | None,
        ahead: AskAhead | None = None,
    ) -> None:
        self.ahead = ahead
        self.method, self.seed = settings.method.resolve(), settings.seed
        self.max_new_tokens, self.context = settings.rollout.max_new_tokens, context
        self.lazy = settings.teacher is None or settings.teacher.ask != "all"
        self.reformulations, self.renderer = tuple(reformulations), renderer
        self.teacher_sampler, self.candidates = teacher_sampler, candidates
        self.needs_responses = any(r.needs & RESPONSES for r in self.reformulations)

    def reformulate(self, hard: Sequence[Group], cap: int, log: StepLog) -> ReformulatedPrompts:
        """The reformulated prompts of the hard groups of a step (Alg. 1, l. 4 and 6-15).

        Args:
            hard: hard groups, hardest first.
            cap: most prompts, floor(rho_aug * len(X_new)).
        """
        with log.time("teacher"):
            # Every step reports all counts, those of what it did not need as 0.
            log.add(**dict.fromkeys((*TEACHER_COUNTS, *self.candidates.count_names, "too_long"), 0.0))
            if self.ahead is not None:
                self.ahead.sampled(hard, log)
            pools = self.teacher_sampler.ask([g.question for g in self._asked_first(hard, cap)], log)
            built = self._fill_slots(hard[:cap], cap, pools, log)  # the pre-cap (l. 6)
            if self.method.control == "scrambled":
                built = self._fitting(scrambled([draft for draft, _ in built]), log)
            prompts = [prompt for _, prompt in built]
            if self.ahead is not None:
                self.ahead.close(log)
        log.add(hard_questions=len(hard))
        log.add(**{f"{r.kind}_prompts": sum(p.kind == r.kind for p in prompts) for r in self.reformulations})
        return ReformulatedPrompts(prompts, pools)

    def _asked_first(self, hard: Sequence[Group], cap: int) -> Sequence[Group]:
        """Groups whose responses are asked for before any slot is filled.

        Teacher response wants every hard question. Algorithm 1 asks about all of them too; Hint and Prefix about the capped set. Lazily
        the others are asked about when their turn comes.
        """
        if self.method.teacher_response:  # in groups, or in privileged prompts
            return hard
        if self.lazy or not self.needs_responses:
            return ()
        return hard if any("pair" in r.needs for r in self.reformulations) else hard[:cap]

    def _fill_slots(self, kept: Sequence[Group], cap: int, pools: Pools, log: StepLog) -> list[tuple[Draft, Prompt]]:
        """Prompts of the kept questions until the slots are full, those of one question in building order (l. 8-15)."""
        built: list[tuple[Draft, Prompt]] = []
        while kept and (size := next_wave(cap - len(built), len(self.reformulations), lazy=self.lazy)) != 0:
            wave, kept = kept[:size], kept[size:] if size else ()
            unasked = [g.question for g in wave if g.question.id not in pools] if self.needs_responses else []
            if unasked:  # l. 4, where it was not asked before
                pools.update(self.teacher_sampler.ask(unasked, log))
            for material in self.candidates.make(wave, pools, log):
                drafts = [self._draft(r, material, log.step) for r in self.reformulations]
                built += self._fitting([draft for draft in drafts if draft is not None], log)
        return built[:cap]  # the post-cap (l. 13-15): a last free slot goes to the first kind

    def _draft(self, reformulation: Reformulation, material: Material, step: int) -> Draft | None:
        rng = keyed_random(self.seed, "reformulate", step, material.question.id, reformulation.kind)
        return reformulation.draft(material, rng)

    def _fitting(self, drafts: Sequence[Draft], log: StepLog) -> list[tuple[Draft, Prompt]]:
        """Drafts with their prompts, where prompt and completion fit the student's context; other slots go on to the next question."""

        def fits(prompt: Prompt) -> bool:
            needed = len(prompt.ids) + len(prompt.forced_ids) + self.max_new_tokens
            return self.context is None or needed <= self.context

        rendered = [(draft, self.renderer.reformulated(draft)) for draft in drafts]
        fitting = [(draft, prompt) for draft, prompt in rendered if fits(prompt)]
        log.add(too_long=len(rendered) - len(fitting))
        return fitting


REACH = 1.3
"""The teacher is asked ahead about so many times the questions that the slots take at least [zppo]: a question on which the teacher fails
fills one slot in place of two, and of the further ones nobody then has to wait for an answer."""


@dataclass(eq=False, slots=True)
class _Seen:
    """A question of the step, its rollouts up to now, and what the teacher can be asked about it.

    Attributes:
        entry: accuracy at which it came into the buffer; None where it is not there.
        tie: its place among questions that are equally hard.
        right, wrong: of its rollouts that are graded.
        asks: what the step will ask about it, as far as that is known; of these the first `begun` are asked.
    """

    prompt: Prompt
    entry: float | None
    tie: int
    rollouts: dict[int, Rollout] = field(default_factory=dict)
    right: int = 0
    wrong: int = 0
    asks: list[tuple[SharedTeacher, TeacherRequest, TeacherSampling]] = field(default_factory=list)
    begun: int = 0

    @property
    def rank(self) -> tuple[float, int]:
        """Accuracy as far as is known, then ties."""
        graded = self.right + self.wrong
        return (self.right / graded if graded else self.entry or 0.0), self.tie


class AskAhead:
    """Asks a teacher on a server about hard questions while the student samples (`teacher.ask: ahead`) [zppo].

    Asked about are a question that is hard however the rest of its rollouts turn out, and, from the start of the step, one that the
    buffer holds. When all its rollouts are there, those that are wrong are shortened. Of these, the hardest as far as is known are
    wanted, and what is no longer among them is broken off. The step asks afterwards as ever, and finds what is there.

    Args:
        settings: the recipe's.
        reformulations, teacher_sampler, candidates: what the step asks with.
        buffer: the prompt replay buffer.
    """

    def __init__(
        self,
        settings: Settings,
        reformulations: Sequence[Reformulation],
        teacher_sampler: TeacherSampler,
        candidates: CandidateMaker,
        buffer: PromptReplayBuffer,
    ) -> None:
        self._zone, self._seed, self._size = settings.zone, settings.seed, settings.rollout.group_size
        self._below = settings.helped_below
        self._sampler, self._compressor, self._buffer = teacher_sampler, candidates.compressor, buffer
        self._responds = any(r.needs & RESPONSES for r in reformulations)
        self._shortens = "wrong" in candidates.needs
        self._every = settings.method.resolve().teacher_response
        slots = share_of(settings.zone.rho_aug, settings.rollout.batch_size)
        self._reach = min(slots, math.ceil(REACH * slots / len(reformulations)))
        self._seen: dict[str, _Seen] = {}
        self._log = StepLog()
        self._lock = threading.Lock()

    def begin(self, prompts: Sequence[Prompt], log: StepLog) -> None:
        """The plain prompts of a step that this process samples; those whose questions were hard before are asked about now."""
        self.close(log)
        with self._lock:
            self._log = log
            for place, prompt in enumerate(prompts):
                known, name = self._buffer.get(prompt.question.id), prompt.question.id
                tie = draw_key(self._seed, "ties", log.step, name) if self._zone.ties == "random" else place
                self._seen[name] = _Seen(prompt, known.accuracy if known else None, tie)
            self._look()

    def ended(self, prompt: Prompt, place: int, rollout: Rollout) -> None:
        """A plain rollout is graded."""
        with self._lock:
            seen = self._seen[prompt.question.id]
            seen.rollouts[place] = rollout
            seen.right += rollout.graded and rollout.correct
            seen.wrong += rollout.graded and not rollout.correct
            if self._possible(seen) or seen.begun:
                self._look()

    def sampled(self, hard: Sequence[Group], log: StepLog) -> None:
        """All plain rollouts are there: the hardest of the step are asked about, and all else is broken off.

        Args:
            hard: hard groups of all processes, hardest first. Each asks about those that it has sampled.
        """
        with self._lock:
            self._log = log
            wanted = hard if self._every else hard[: self._reach]
            self._want([self._seen[g.question.id] for g in wanted if g.question.id in self._seen])

    def close(self, log: StepLog) -> None:
        """The step has its prompts: what was asked in vain ends and is counted."""
        with self._lock:
            log.add_own(teacher_broken_off=0.0, teacher_unused_prompt_tokens=0.0, teacher_unused_tokens=0.0)
            for teacher, _ in self._sampler.teachers:
                if isinstance(teacher, SharedTeacher):
                    teacher.forget(log)
            self._seen = {}

    def _possible(self, seen: _Seen) -> bool:
        """Whether it is hard in any case (ungraded rollouts may be right), or was hard before and may be again."""
        certain = is_hard(1 - seen.wrong / self._size, self._below)
        return certain or (seen.entry is not None and is_hard(seen.right / self._size, self._below))

    def _look(self) -> None:
        """Asks by what is known. To be called with the lock held."""
        possible = sorted((seen for seen in self._seen.values() if self._possible(seen)), key=lambda seen: seen.rank)
        self._want(possible if self._every else possible[: math.ceil(self._reach / self._sampler.processes.size)])

    def _want(self, wanted: Sequence[_Seen]) -> None:
        for seen in set(self._seen.values()) - set(wanted):
            for teacher, request, _ in seen.asks[: seen.begun]:
                teacher.break_off(request, self._log)
            seen.begun = 0
        for seen in wanted:
            self._prepare(seen)
            for teacher, request, how in seen.asks[seen.begun :]:
                teacher.begin(request, how)
            seen.begun = len(seen.asks)

    def _prepare(self, seen: _Seen) -> None:
        """What the step would ask about a question: its responses, and once all rollouts are there, short forms of the wrong ones."""
        step, responses = self._log.step, len(self._sampler.teachers) * self._responds
        if not seen.asks and self._responds:
            seen.asks += self._sampler.requests(seen.prompt.question, step)
        teacher = self._sampler.teachers[0][0]  # the first one shortens
        if self._shortens and len(seen.rollouts) == self._size and len(seen.asks) == responses and isinstance(teacher, SharedTeacher):
            whole = Group(seen.prompt, tuple(seen.rollouts[i] for i in range(self._size)))
            requests, how = self._compressor.requests(_wrong(whole), self._seed, step)
            seen.asks += [(teacher, request, how) for request in requests]


def make_reformulations(method: Method) -> list[Reformulation]:
    """The reformulations of a method, in building order.

    Raises:
        SettingsError: one of the user's own cannot be imported or is none; the message says why.
    """
    made = [load_reformulation(kind) for kind in method.reformulations]
    kinds = [r.kind for r in made]
    if len(set(kinds)) != len(kinds) or PLAIN in kinds:
        raise SettingsError(f"the reformulations are of the kinds {', '.join(kinds)}: each needs a kind of its own, other than 'plain'")
    return [Placebo(r) for r in made] if method.control == "placebo" else made


def make_reformulator(
    settings: Settings,
    reformulations: Sequence[Reformulation],
    teachers: Sequence[Teacher],
    renderer: PromptRenderer,
    teacher_sampler: TeacherSampler,
    context: int | None,
    buffer: PromptReplayBuffer | None = None,
) -> Reformulator:
    """Who reformulates by a recipe.

    Args:
        buffer: holds the questions that are replayed, which are asked about first where the teacher is asked ahead.

    Raises:
        SettingsError: a reformulation has no template.
        TemplateError: a template would never be shown.
    """
    renderer.book.check_kinds(r.kind for r in reformulations if not getattr(r, "shows_question_alone", False))
    renderer.book.check_used(r.kind for r in reformulations)
    teacher, own = (teachers[0], settings.teacher) if teachers else (None, None)
    chat, unused = renderer.chat, TeacherSampling(settings.rollout.sampling())
    compression = own.compression if own else None
    candidates = CandidateMaker(
        frozenset(need for r in reformulations for need in r.needs),
        compressor=Compressor(
            teacher,
            renderer.book,
            own.how(own.compression) if own else unused,
            token_tail(chat.tokenizer, compression.max_new_tokens if compression else 1),
            enabled=compression is not None and compression.enabled,
            form=settings.answer_form,
        ),
        teacher=teacher,
        hint=own.how(own.hint) if own else unused,
        book=renderer.book,
        response_ids=ResponseTokens(chat),
        prefix_fraction=settings.zone.prefix_fraction,
        count_duplicates=settings.zone.ncq_duplicates == "counted",
        seed=settings.seed,
    )
    asks_ahead = own is not None and own.ask == "ahead" and bool(reformulations) and bool(teachers)
    ahead = AskAhead(settings, reformulations, teacher_sampler, candidates, buffer) if asks_ahead and buffer is not None else None
    return Reformulator(settings, reformulations, teacher_sampler, candidates, renderer, context, ahead)

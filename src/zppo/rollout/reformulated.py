"""What a hard question is reformulated with: compressed candidates, hints, response tokens (Alg. 1, l. 8-10; Algs. 5 and 6).

From plain groups to reformulated prompts: hard questions -> teacher -> compression -> BCQ and NCQ (Alg. 1, l. 4-15).

Puts together who asks the teacher, and who makes the reformulated prompts of a step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields

from zppo.config.settings import Settings, ZoneSettings
from zppo.core.draws import keyed_random
from zppo.core.reformulate import (
    RESPONSES,
    Material,
    Need,
    Placebo,
    PrefixQuestion,
    Reformulation,
    distinct_answers,
    scrambled,
)
from zppo.core.select import fill_slots, hard_groups, share_of
from zppo.core.types import Draft, Group, Prompt
from zppo.errors import SettingsError, TemplateError
from zppo.grading import normalise
from zppo.prompts.book import VARIABLES, PromptBook
from zppo.rollout.grading import Scorer
from zppo.rollout.student import PromptRenderer, Score
from zppo.rollout.teacher import Pools, ResponseTokens, TeacherSampler, TimedTeacher
from zppo.teacher.base import Teacher, TeacherSampling
from zppo.teacher.compression import Compressor, PairRequest, Prepared, Source, token_tail
from zppo.teacher.hints import HintCounts, HintRequest, make_hints


@dataclass(slots=True)
class _Counts:
    """Candidates that a step could not show as it should."""

    bcq_without_negative: int = 0
    bcq_raw_pairs: int = 0
    ncq_raw_candidates: int = 0


class CandidateMaker:
    """Prepares what the reformulations of a method need, for several questions at once.

    Args:
        needs: what the reformulations name in their `needs`; nothing else is made.
        compressor: candidate compression.
        teacher, hint: who writes hints and how it is sampled.
        book: the words of the request for a hint.
        response_ids: a response in the student's tokens, for Prefix.
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
        seed: int,
    ) -> None:
        self.needs, self.compressor, self.teacher, self.hint = needs, compressor, teacher, hint
        self.book, self.response_ids, self.seed = book, response_ids, seed
        self.new_step()

    def new_step(self) -> None:
        """Forget summaries and counts."""
        self.compressor.new_step()
        self._counts = _Counts()
        self._hints = HintCounts()

    def metrics(self) -> dict[str, float | None]:
        """Counts since `new_step`: compression_*, hint_* where hints are made, and what could not be shown as it should."""
        named = {
            f"compression_{f.name}": getattr(self.compressor.counts, f.name) for f in fields(self.compressor.counts)
        }
        if "hint" in self.needs:
            named |= {f"hint_{name}": value for name, value in asdict(self._hints).items() if name != "error"}
        return {name: float(value) for name, value in (asdict(self._counts) | named).items()}

    @property
    def error(self) -> str:
        """Why a compression or a hint did not come, the last such reason; "" where all came."""
        return self.compressor.error or self._hints.error

    def make(self, groups: Sequence[Group], pools: Pools, step: int) -> list[Material]:
        """Materials in the order of the groups, from their wrong rollouts and the correct teacher responses."""
        wrong = [_wrong(g) for g in groups]
        prepared = self._candidates(groups, wrong, pools, step)
        hints = self._make_hints(groups, pools, step)
        return [
            Material(
                question=g.question,
                pair=p.pair,
                wrong=p.wrong,
                wrong_answers=_listed(sources, g.question.gold),
                hint=hint,
                response_ids=self._response(g, pools, step),
            )
            for g, sources, p, hint in zip(groups, wrong, prepared, hints, strict=True)
        ]

    def _candidates(
        self, groups: Sequence[Group], wrong: Sequence[tuple[Source, ...]], pools: Pools, step: int
    ) -> list[Prepared]:
        if not self.needs & {"pair", "wrong"}:
            return [Prepared() for _ in groups]
        requests = [
            PairRequest(
                question_id=g.question.id,
                # Beside a negative, which always has an answer, a positive without one would stand out [zppo].
                positives=tuple(s for s in pools.get(g.question.id, ()) if s.answer is not None),
                negatives=tuple(s for s in sources if s.answer is not None),
                wrong=sources,
                want_pair="pair" in self.needs,
                want_wrong="wrong" in self.needs,
            )
            for g, sources in zip(groups, wrong, strict=True)
        ]
        prepared = self.compressor.prepare(requests, self.seed, step)
        self._counts.bcq_without_negative += sum(bool(r.want_pair and r.wrong and not r.negatives) for r in requests)
        self._counts.bcq_raw_pairs += sum(p.pair_raw for p in prepared)
        self._counts.ncq_raw_candidates += sum(p.wrong_raw for p in prepared)
        return prepared

    def _make_hints(self, groups: Sequence[Group], pools: Pools, step: int) -> list[str | None]:
        if "hint" not in self.needs or self.teacher is None:
            return [None] * len(groups)
        requests = [HintRequest(g.question, pools.get(g.question.id, ())) for g in groups]
        hints, counts = make_hints(requests, self.teacher, self.book, self.hint, seed=self.seed, step=step)
        had = self._hints
        self._hints = HintCounts(
            asked=had.asked + counts.asked,
            failed=had.failed + counts.failed,
            unreachable=had.unreachable + counts.unreachable,
            completion_tokens=had.completion_tokens + counts.completion_tokens,
            error=counts.error or had.error,
        )
        return hints

    def _response(self, group: Group, pools: Pools, step: int) -> tuple[int, ...]:
        """One correct teacher response, drawn uniformly, in the student's tokens."""
        pool = pools.get(group.question.id, ())
        if "prefix" not in self.needs or not pool:
            return ()
        return self.response_ids(keyed_random(self.seed, "prefix", step, group.question.id).choice(pool))


def drafts_of(reformulations: Sequence[Reformulation], material: Material, seed: int, step: int) -> list[Draft]:
    """What one question is asked again with, in building order (Alg. 1, l. 8-10)."""
    drafts = (
        r.draft(material, keyed_random(seed, "reformulate", step, material.question.id, r.kind)) for r in reformulations
    )
    return [draft for draft in drafts if draft is not None]


def _wrong(group: Group) -> tuple[Source, ...]:
    """W_x in rollout order."""
    return tuple(Source(r.text, r.answer, i) for i, r in enumerate(group.rollouts) if r.graded and not r.correct)


def _listed(wrong: Sequence[Source], gold: str) -> tuple[str, ...]:
    """The answers that NCQ lists."""
    answers = ((s.answer, "" if s.answer is None else normalise(s.answer)) for s in wrong)
    return distinct_answers(answers, normalise(gold))


@dataclass(frozen=True, slots=True)
class Reformulated:
    """The reformulated prompts of one step and what making them took.

    Attributes:
        prompts: at most floor(rho_aug * len(X_new)).
        pools: correct teacher responses of the hard questions that the teacher was asked about.
        metrics: numbers for the run log.
        teacher_error: why the teacher could not serve a request, the last such reason; "" where it served all.
    """

    prompts: list[Prompt] = field(default_factory=list)
    pools: Pools = field(default_factory=dict)
    metrics: dict[str, float | None] = field(default_factory=dict)
    teacher_error: str = ""


class Reformulator:
    """Makes the reformulated prompts of a step.

    Args:
        reformulations: in building order (BCQ before NCQ in the paper).
        teacher_sampler, materials: the teacher's responses; compressed candidates and hints.
        renderer: the student's words.
        context: the student's context in tokens, None if unbounded.
        max_new_tokens: limit of a student completion, counted against the context.
        lazy: ask the teacher hardest first until the cap is full (the same prompts), or as Algorithm 1 is written.
        teachers: whose replies the step waits for.
        every_hard_question: responses are wanted for all hard questions (Teacher response), not for prompts alone.
        scramble: exchange the candidates between questions (control).
    """

    def __init__(
        self,
        reformulations: Sequence[Reformulation],
        *,
        teacher_sampler: TeacherSampler,
        materials: CandidateMaker,
        renderer: PromptRenderer,
        settings: ZoneSettings,
        seed: int,
        context: int | None,
        max_new_tokens: int,
        lazy: bool = True,
        teachers: Sequence[TimedTeacher] = (),
        every_hard_question: bool = False,
        scramble: bool = False,
    ) -> None:
        self.reformulations = tuple(reformulations)
        self.teacher_sampler, self.materials, self.renderer = teacher_sampler, materials, renderer
        self.settings, self.seed, self.context, self.max_new_tokens = settings, seed, context, max_new_tokens
        self.lazy, self.every_hard_question, self.scramble = lazy, every_hard_question, scramble
        self.teachers = tuple(teachers)
        self.needs_responses = any(r.needs & RESPONSES for r in self.reformulations)

    def build(self, plain: Sequence[Group], new_count: int, step: int) -> Reformulated:
        """The reformulated prompts for a step's plain groups (new questions first), hardest questions first."""
        for teacher in self.teachers:
            teacher.seconds = 0.0
        cap = share_of(self.settings.rho_aug, new_count)
        hard = hard_groups(plain, self.settings.threshold, ties=self.settings.ties, seed=self.seed, step=step)
        self.teacher_sampler.new_step()
        self.materials.new_step()
        pools = self._ask_first(hard, cap, step)
        too_long = 0

        def build(wave: Sequence[Group]) -> list[list[tuple[Draft, Prompt]]]:
            nonlocal too_long
            if self.needs_responses:
                pools.update(self.teacher_sampler.ask([g.question for g in wave if g.question.id not in pools], step))
            materials = self.materials.make(wave, pools, step)
            drafts = [drafts_of(self.reformulations, material, self.seed, step) for material in materials]
            prompts = [[(draft, self.renderer.reformulated(draft)) for draft in row] for row in drafts]
            fitting = [[pair for pair in row if self._fits(pair[1])] for row in prompts]
            too_long += sum(map(len, prompts)) - sum(map(len, fitting))
            return fitting

        built = fill_slots(hard, cap, build, len(self.reformulations), lazy=self.lazy)
        prompts = [prompt for _, prompt in built]
        if self.scramble:
            exchanged = [self.renderer.reformulated(draft) for draft in scrambled([draft for draft, _ in built])]
            prompts = [prompt for prompt in exchanged if self._fits(prompt)]
            too_long += len(exchanged) - len(prompts)
        metrics: dict[str, float | None] = {
            **{f"{r.kind}_prompts": float(sum(p.kind == r.kind for p in prompts)) for r in self.reformulations},
            "hard_questions": float(len(hard)),
            "too_long": float(too_long),
            **self.teacher_sampler.metrics(),
            **self.materials.metrics(),
            **({"teacher_wait_seconds": sum(t.seconds for t in self.teachers)} if self.teachers else {}),
        }
        return Reformulated(prompts, pools, metrics, self.teacher_sampler.error or self.materials.error)

    def _ask_first(self, hard: Sequence[Group], cap: int, step: int) -> Pools:
        """Responses that are asked for before any slot is filled.

        Teacher response wants every hard question. Algorithm 1 asks about all of them too; Hint and Prefix about the capped set.
        """
        if self.every_hard_question:
            asked = hard
        elif not self.lazy and self.needs_responses:
            asked = hard if any("pair" in r.needs for r in self.reformulations) else hard[:cap]
        else:
            return {}
        return self.teacher_sampler.ask([g.question for g in asked], step)

    def _fits(self, prompt: Prompt) -> bool:
        needed = len(prompt.ids) + len(prompt.forced_ids) + self.max_new_tokens
        return self.context is None or needed <= self.context


def grades_while_sampling(settings: Settings, scorer: Scorer) -> bool:
    """Whether completions are graded while others are sampled.

    Not where grading would take the student's device (a judge in this process), nor by a user's reward function, which may count on
    being called in the main thread.
    """
    judge = settings.judging[0] if scorer.judge is not None and settings.judging is not None else None
    return settings.grading.reward is None and (judge is None or bool(judge.base_urls))


def make_teacher_sampler(
    settings: Settings, teachers: Sequence[Teacher], renderer: PromptRenderer, score: Score
) -> TeacherSampler:
    own = [t for t in (settings.teacher, *settings.more_teachers) if t is not None]
    return TeacherSampler(
        [(teacher, t.how(t.rollout)) for teacher, t in zip(teachers, own, strict=False)],
        renderer,
        score,
        group_size=settings.zone.teacher_group_size,
        seed=settings.seed,
    )


def _make_materials(
    settings: Settings, reformulations: Sequence[Reformulation], teacher: Teacher | None, renderer: PromptRenderer
) -> CandidateMaker:
    own, chat, student = settings.teacher, renderer.chat, settings.rollout.sampling()
    own = own if teacher is not None else None
    cap = own.compression.max_new_tokens if own else 1
    return CandidateMaker(
        frozenset(need for r in reformulations for need in r.needs),
        compressor=Compressor(
            teacher,
            renderer.book,
            own.how(own.compression) if own else TeacherSampling(student),
            token_tail(chat.tokenizer, cap),
            enabled=own is not None and own.compression.enabled,
        ),
        teacher=teacher,
        hint=own.how(own.hint) if own else TeacherSampling(student),
        book=renderer.book,
        response_ids=ResponseTokens(chat),
        seed=settings.seed,
    )


def make_reformulator(
    settings: Settings,
    reformulations: Sequence[Reformulation],
    teachers: Sequence[TimedTeacher],
    renderer: PromptRenderer,
    teacher_sampler: TeacherSampler,
    context: int | None,
) -> Reformulator:
    method, own = settings.method.resolve(), settings.teacher if teachers else None
    _check_templates(reformulations, renderer.book)
    return Reformulator(
        reformulations,
        teacher_sampler=teacher_sampler,
        materials=_make_materials(settings, reformulations, teachers[0] if teachers else None, renderer),
        renderer=renderer,
        settings=settings.zone,
        seed=settings.seed,
        context=context,
        max_new_tokens=settings.rollout.max_new_tokens,
        lazy=own is None or own.ask != "all",
        teachers=teachers,
        every_hard_question=method.teacher_response,
        scramble=method.control == "scrambled",
    )


def _check_templates(reformulations: Sequence[Reformulation], book: PromptBook) -> None:
    shows_nothing = (Placebo, PrefixQuestion)  # the plain question needs no template
    for r in reformulations:
        if r.kind not in book.names() and not isinstance(r, shows_nothing):
            raise SettingsError(
                f"the method asks again with {r.kind!r}, which has no template: add prompts.{r.kind} to the recipe"
            )
    known = [*VARIABLES, *(r.kind for r in reformulations)]
    for name in book.names():
        if name not in known:
            raise TemplateError(
                f"prompts.{name}: no prompt of this run is called {name!r}, so the template would never be shown (known: "
                f"{', '.join(dict.fromkeys(known))}); mend the name, or leave it out"
            )

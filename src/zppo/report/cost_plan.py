"""What a recipe will cost in FLOPs, part by part, in the convention of `cost` (Tab. 9): at most, or under assumptions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from zppo.config.settings import Settings, TeacherSettings
from zppo.core.select import share_of
from zppo.core.types import BCQ, NCQ
from zppo.errors import SettingsError
from zppo.report.cost import Cost, Work
from zppo.train.plan import Plan, make_plan


@dataclass(frozen=True, slots=True)
class Assumptions:
    """What a recipe cannot know. None and the defaults give the most that a run may cost.

    Attributes:
        prompt: mean tokens of a plain prompt; None: data.max_prompt_tokens.
        completion: mean tokens of a student rollout; None: rollout.max_new_tokens.
        teacher_completion: mean tokens of a teacher rollout; None: teacher.rollout.max_new_tokens.
        hard: share of plain questions that are hard.
        solved: share of hard questions on which a teacher rollout is right (without one an NCQ is all there is); for off-policy
            distillation the share of teacher rollouts that are right.
        live: share of the rollouts' tokens in rows whose advantage is not zero.
    """

    prompt: float | None = None
    completion: float | None = None
    teacher_completion: float | None = None
    hard: float = 1.0
    solved: float = 1.0
    live: float = 1.0

    def __post_init__(self) -> None:
        for name in ("hard", "solved", "live"):
            if not 0 <= (value := getattr(self, name)) <= 1:
                raise SettingsError(f"the share {name} is {value}; give a number from 0 to 1")
        for name in ("prompt", "completion", "teacher_completion"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise SettingsError(f"the mean length {name} is {value}; give a number of tokens above 0")


MOST = Assumptions()


@dataclass(frozen=True, slots=True)
class _Zone:
    """Questions and prompts that a step asks again, in means.

    Attributes:
        hard: hard questions.
        precap: of these, under the pre-cap; Algorithm 1 builds for all of them.
        asked: of these, those that the lazy order builds for.
        prompts: kind of reformulated prompt -> how many.
    """

    hard: float
    precap: float
    asked: float
    prompts: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class _Lengths:
    """Mean tokens of a plain prompt, a student rollout, a teacher rollout."""

    prompt: float
    completion: float
    answer: float


def planned(settings: Settings, questions: int, assumed: Assumptions = MOST, *, judged: float = 0.0) -> Cost:
    """The cost of a recipe on so many training questions, the share `judged` of them graded by a judge, at most or under assumptions.

    Every step counts as a full one: replay and buffer are taken to be full from the start (they need a few steps).
    """
    plan = make_plan(settings, questions)
    method, rollout, teacher = settings.method.resolve(), settings.rollout, settings.teacher
    lengths = _Lengths(
        settings.data.max_prompt_tokens if assumed.prompt is None else assumed.prompt,
        rollout.max_new_tokens if assumed.completion is None else assumed.completion,
        assumed.teacher_completion or (teacher.rollout.max_new_tokens if teacher else 0.0),
    )
    zone = _zone(settings, plan, assumed)
    plain = plan.batch + plan.replayed
    prompts = plain * lengths.prompt + sum(
        count * (lengths.prompt + _shown(kind, settings, lengths)) for kind, count in zone.prompts.items()
    )
    sampled = (plain + sum(zone.prompts.values())) * rollout.group_size * lengths.completion
    rows = prompts * rollout.group_size + sampled
    notes = [_stated(settings, assumed)]
    if method.distils:
        literal, saved = _planned_distillation(settings, plain, assumed, lengths)
    else:
        with_pass, why = _logprob_pass(settings)
        notes.append(why)
        live = assumed.live * rows
        literal = Work(sampling=rows, logprob=rows, update=rows)
        saved = Work(sampling=prompts + sampled, logprob=live if with_pass else 0.0, update=live)
        if method.needs_teacher and teacher is not None:
            literal_teacher, saved_teacher = _planned_teacher(settings, teacher, zone, assumed, lengths)
            literal, saved = literal + literal_teacher, saved + saved_teacher
    if judged:
        completions = (plain + sum(zone.prompts.values())) * rollout.group_size
        asked = _teacher_questions(settings, zone, plain)
        literal, saved = (
            work + _planned_judge(settings, judged, completions, count * settings.zone.teacher_group_size, lengths)
            for work, count in zip((literal, saved), asked, strict=True)
        )
    return Cost(literal.times(plan.steps), saved.times(plan.steps), plan.steps, tuple(notes))


def _zone(settings: Settings, plan: Plan, assumed: Assumptions) -> _Zone:
    """What a step asks again, with every share at its assumed mean (method.md section 3, 2 to 5)."""
    kinds = settings.method.resolve().reformulations
    hard = assumed.hard * (plan.batch + plan.replayed)
    cap = float(share_of(settings.zone.rho_aug, plan.batch))
    chance = {kind: 1.0 if kind == NCQ else assumed.solved for kind in kinds}  # only NCQ does without a right teacher
    per_question = sum(chance.values())
    precap = min(cap, hard) if kinds else 0.0
    asked = min(precap, cap / per_question) if per_question else precap
    return _Zone(hard, precap, asked, {kind: asked * share for kind, share in chance.items()})


def _shown(kind: str, settings: Settings, lengths: _Lengths) -> float:
    """Tokens that a reformulated prompt adds to the plain one, at most; a kind of the user's own is taken to add none."""
    if settings.method.resolve().control == "placebo" or settings.teacher is None:
        return 0.0
    cap = settings.teacher.compression.max_new_tokens
    return {
        BCQ: 2.0 * cap,
        NCQ: float(settings.rollout.group_size * cap),
        "hint": float(settings.teacher.hint.max_new_tokens),
        "prefix": settings.zone.prefix_fraction * lengths.answer,
    }.get(kind, 0.0)


def _planned_teacher(
    settings: Settings, teacher: TeacherSettings, zone: _Zone, assumed: Assumptions, lengths: _Lengths
) -> tuple[Work, Work]:
    """The teacher's work in a step, to the letter and as this recipe asks for it."""
    kinds = settings.method.resolve().reformulations
    draws, group = settings.zone.teacher_group_size, settings.rollout.group_size
    literal, saved = _teacher_questions(settings, zone, 0.0)
    cap = teacher.compression.max_new_tokens
    per_question = 0.0
    if teacher.compression.enabled:
        # Of a hardest question every rollout is wrong; with an NCQ the BCQ's negative is one of those.
        negatives = group if NCQ in kinds else assumed.solved * (BCQ in kinds)
        per_question = negatives * (lengths.completion + cap) + assumed.solved * (BCQ in kinds) * (lengths.answer + cap)
    if "hint" in kinds:
        per_question += assumed.solved * (lengths.prompt + lengths.answer + teacher.hint.max_new_tokens)
    built = zone.precap if teacher.ask == "all" else zone.asked
    return (
        Work(teacher=literal * draws * (lengths.prompt + lengths.answer), compression=zone.precap * per_question),
        Work(teacher=saved * (lengths.prompt + draws * lengths.answer), compression=built * per_question),
    )


def _teacher_questions(settings: Settings, zone: _Zone, plain: float) -> tuple[float, float]:
    """Questions of a step that the teacher answers, to the letter and as this recipe asks.

    Off-policy distillation asks about all of them, Algorithm 1 and Teacher response about every hard one, Hint and Prefix about the
    capped set, NCQ alone about none.
    """
    method = settings.method.resolve()
    kinds = set(method.reformulations)
    if method.loss == "off-distill":
        return plain, plain
    if method.teacher_response:
        return zone.hard, zone.hard
    if not kinds - {NCQ}:
        return 0.0, 0.0
    literal = zone.hard if BCQ in kinds else zone.precap
    return literal, literal if settings.teacher is not None and settings.teacher.ask == "all" else zone.asked


def _planned_judge(settings: Settings, share: float, student: float, teacher: float, lengths: _Lengths) -> Work:
    """Verdicts on the completions of a step, at most: each takes a call, which reads the question and what it may of the completion."""
    if settings.judging is None:
        return Work()
    use = settings.judging[1]
    around = lengths.prompt + use.max_new_tokens
    tokens = student * (around + min(lengths.completion, use.response_tokens))
    return Work(judge=share * (tokens + teacher * (around + min(lengths.answer, use.response_tokens))))


def _planned_distillation(settings: Settings, plain: int, assumed: Assumptions, lengths: _Lengths) -> tuple[Work, Work]:
    """Both kinds of distillation in a step (Algs. 2 and 3): nothing is saved but the shared reading of prompts."""
    group, draws = settings.rollout.group_size, settings.zone.teacher_group_size
    rows = plain * group * (lengths.prompt + lengths.completion)
    once = plain * (lengths.prompt + group * lengths.completion)
    if settings.method.resolve().loss == "on-distill":
        return Work(sampling=rows, update=rows, scoring=rows), Work(sampling=once, update=rows, scoring=rows)
    theirs = plain * draws * (lengths.prompt + lengths.answer)
    right = assumed.solved * theirs
    literal = Work(sampling=rows, update=right, teacher=theirs, scoring=right)
    theirs_once = plain * (lengths.prompt + draws * lengths.answer)
    return literal, Work(sampling=once, update=right, teacher=theirs_once, scoring=right)


def _logprob_pass(settings: Settings) -> tuple[bool, str]:
    """Whether old log-probs take a forward pass of their own, and why."""
    train = settings.train
    if train.old_logprobs != "auto":
        own = train.old_logprobs == "forward"
        return own, f"Old log-probs: train.old_logprobs is {train.old_logprobs}."
    if not settings.rollout.sampling().exact:
        return (
            True,
            "Old log-probs: from a forward pass, since top-p, top-k, min-p or a penalty changes what is sampled.",
        )
    if train.precision == "fp32" or (train.precision == "auto" and train.device == "cpu"):
        return False, "Old log-probs: the sampler's, which are exact in fp32."
    return (
        True,
        "Old log-probs: from a forward pass, as on a GPU in bf16; on a CPU in fp32 the sampler's are exact and cost nothing.",
    )


def _stated(settings: Settings, assumed: Assumptions) -> str:
    def length(given: float | None, most: int) -> str:
        return f"{most:,} (the limit)" if given is None else f"{given:,.0f}"

    parts = [
        f"plain prompts of {length(assumed.prompt, settings.data.max_prompt_tokens)} tokens",
        f"rollouts of {length(assumed.completion, settings.rollout.max_new_tokens)}",
    ]
    method = settings.method.resolve()
    if method.needs_teacher and settings.teacher is not None:
        answer = length(assumed.teacher_completion, settings.teacher.rollout.max_new_tokens)
        parts.append(f"teacher rollouts of {answer}")
        if not method.distils:
            parts.append(
                f"{assumed.hard:.0%} of the plain questions hard, {assumed.solved:.0%} of those solved by the teacher"
            )
        elif method.loss == "off-distill":
            parts.append(f"{assumed.solved:.0%} of these right")
        if set(method.reformulations) & {BCQ, NCQ}:
            parts.append(f"candidates at their cap of {settings.teacher.compression.max_new_tokens:,}")
    if not method.distils:
        parts.append(f"{assumed.live:.0%} of the tokens in rows with an advantage")
    return f"Assumed: {', '.join(parts)}."

"""What a run costs in FLOPs, part by part (Tab. 9): as run, from its metrics.jsonl, or as planned, from its recipe.

The convention is Tab. 9's: 2N FLOPs per token forward, 6N per token forward and backward, N the parameters of the model.
Attention, whose cost grows with the square of the length, padding and held-out evaluation are not counted.

Everything is counted twice. *To the letter*: Algorithm 1 with a trainer that reads the prompt for every rollout, takes old
log-probs from a forward pass over all rows, trains on all rows and asks the teacher about every hard question. *With the exact
savings*: what zppo does for the same gradients (method.md sections 3 and 6).

The end of the module counts Tab. 9 from the paper's own sizes; `docs/cost.md` says what follows. The paper gives one figure per method
and scale and no table of its parts: that count is our arithmetic, not the authors' word.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from zppo.config.methods import needs_of
from zppo.config.model_settings import TeacherSettings
from zppo.config.settings import Settings
from zppo.core.reformulate import RESPONSES
from zppo.core.select import share_of
from zppo.errors import CheckpointError, SettingsError
from zppo.planning.dry_run import Plan, make_plan
from zppo.planning.memory import shown_tokens

FORWARD, FORWARD_BACKWARD = 2, 6


@dataclass(frozen=True, slots=True)
class TokensByPart:
    """Tokens that pass through a model in a whole run, by part; floats, since a plan holds means.

    Attributes:
        sampling: student rollouts, prompts included.
        logprob: forward pass for old log-probs.
        update: forward and backward.
        teacher: teacher rollouts on hard questions, prompts included.
        compression: candidate compression and hints by the teacher, prompts included.
        scoring: completions that the teacher rescores for distillation (Algs. 2 and 3).
        judge: verdicts of an LLM judge on free-form answers, prompts included.
    """

    sampling: float = 0.0
    logprob: float = 0.0
    update: float = 0.0
    teacher: float = 0.0
    compression: float = 0.0
    scoring: float = 0.0
    judge: float = 0.0

    def __add__(self, other: TokensByPart) -> TokensByPart:
        return TokensByPart(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(TokensByPart)))

    def times(self, factor: float) -> TokensByPart:
        """Every part times `factor`."""
        return TokensByPart(*(getattr(self, f.name) * factor for f in fields(TokensByPart)))

    def flops(self, student: float, teacher: float, judge: float | None = None) -> dict[str, float]:
        """FLOPs by part for models of so many parameters; without a number of its own the judge is the teacher."""
        return {
            "sampling": FORWARD * student * self.sampling,
            "logprob": FORWARD * student * self.logprob,
            "update": FORWARD_BACKWARD * student * self.update,
            "teacher": FORWARD * teacher * self.teacher,
            "compression": FORWARD * teacher * self.compression,
            "scoring": FORWARD * teacher * self.scoring,
            "judge": FORWARD * (teacher if judge is None else judge) * self.judge,
        }


@dataclass(frozen=True, slots=True)
class Cost:
    """The work of a run.

    Attributes:
        literal: to the letter of Algorithm 1.
        saved: with the exact savings, as this recipe or run has them.
        steps: rollout steps counted.
        notes: what was assumed or estimated, one sentence each.
    """

    literal: TokensByPart
    saved: TokensByPart
    steps: int
    notes: tuple[str, ...]


def as_run(settings: Settings, records: Sequence[Mapping[str, Any]], source: Path) -> Cost:
    """The cost of what a run has done so far.

    Args:
        settings: of the run's recipe.yaml.
        records: lines of metrics.jsonl.
        source: that file, for errors.

    Raises:
        CheckpointError: there is no finished step, or a step lacks a number.
    """
    method = settings.method.resolve()
    steps = [record for record in records if record.get("event") == "step"]
    if not steps:
        raise CheckpointError(f"{source} holds no finished step; wait for the first one, or plan with `zppo cost RECIPE`")

    def total(name: str) -> float:
        for record in steps:
            if not isinstance(record.get(name), int | float):
                raise CheckpointError(
                    f"{source}, step {record.get('step')}: there is no number {name!r} (found: {record.get(name)!r}); "
                    "the run was made by another version: use that one"
                )
        return math.fsum(record[name] for record in steps)

    # As run: every number is in the log.
    per_rollout, sampled = total("prompt_tokens"), total("student_tokens")
    once = per_rollout / settings.rollout.group_size
    rows = per_rollout + sampled
    saved = TokensByPart(
        sampling=once + sampled,
        logprob=total("logprob_tokens"),
        update=total("train_tokens_needed"),
        teacher=total("teacher_prompt_tokens")
        + total("teacher_completion_tokens")
        + math.fsum(step.get(f"teacher_unused_{part}") or 0.0 for step in steps for part in ("prompt_tokens", "tokens")),
        compression=total("compression_prompt_tokens")
        + total("compression_completion_tokens")
        + (total("hint_completion_tokens") if "hint" in method.needs else 0.0),
        scoring=total("train_tokens_needed") if method.asks_distributions else 0.0,  # the teacher reads what the student learns from
        judge=math.fsum(step.get(f"judge_{part}_tokens") or 0.0 for step in steps for part in ("prompt", "completion")),
    )
    # To the letter: prompts once per rollout, every row trained, and the hard questions that the lazy order did not ask about.
    draws, lazy = settings.zone.teacher_group_size, settings.teacher is not None and settings.teacher.ask != "all"
    asked, hard = total("teacher_questions"), total("hard_questions")
    more = hard / asked if asked and lazy and "pair" in method.needs else 1.0
    teacher = total("teacher_prompt_tokens") * draws + total("teacher_completion_tokens")
    literal = TokensByPart(
        sampling=rows,
        logprob=saved.logprob if method.distils else rows,
        update=saved.update if method.distils else rows,
        teacher=teacher * more,
        compression=saved.compression * _unbuilt(settings, steps),
        scoring=saved.scoring,
        judge=saved.judge,
    )
    padding = total("train_tokens_computed") / saved.update - 1 if saved.update else 0.0
    notes = [f"Padding, not counted, adds {padding:.1%} to the tokens of forward and backward."]
    if more > 1:
        notes.append(
            f"The teacher was asked about {asked:,.0f} of {hard:,.0f} hard questions; what the others would have taken is an estimate "
            "from the means of these (they are easier)."
        )
    if "hint" in method.needs:
        notes.append("The prompts of hints are not in the log and not counted.")
    return Cost(literal, saved, len(steps), tuple(notes))


def _unbuilt(settings: Settings, steps: Sequence[Mapping[str, Any]]) -> float:
    """How many times as many questions Algorithm 1 builds prompts for: all under the pre-cap, some of which the post-cap cuts off."""
    if settings.teacher is None or settings.teacher.ask == "all" or len(settings.method.resolve().reformulations) < 2:
        return 1.0
    cap = share_of(settings.zone.rho_aug, settings.rollout.batch_size)
    built = math.fsum(record["teacher_questions"] for record in steps)
    precap = math.fsum(max(record["teacher_questions"], min(cap, record["hard_questions"])) for record in steps)
    return precap / built if built else 1.0


@dataclass(frozen=True, slots=True)
class Assumptions:
    """What a recipe cannot know. None and the defaults give the most that a run may cost.

    Attributes:
        prompt: mean tokens of a plain prompt; None: data.max_prompt_tokens.
        prompt_from: in words where that mean is from; "" for whoever gave it.
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
    prompt_from: str = ""

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


def planned(settings: Settings, questions: int, assumed: Assumptions = MOST, *, judged: float = 0.0, gpu: bool = True) -> Cost:
    """The cost of a recipe on so many training questions, the share `judged` of them graded by a judge, at most or under assumptions.

    `gpu`: whether it trains on one, which decides what `train.precision: auto` is.

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
    shown = {kind: 0.0 if method.control == "placebo" else shown_tokens(settings, kind, lengths.answer) for kind in zone.prompts}
    prompts = plain * lengths.prompt + sum(count * (lengths.prompt + shown[kind]) for kind, count in zone.prompts.items())
    sampled = (plain + sum(zone.prompts.values())) * rollout.group_size * lengths.completion
    rows = prompts * rollout.group_size + sampled
    notes = [_stated(settings, assumed)]
    if method.refill:
        notes.append("What is sampled in the place of all-right and all-wrong groups is not counted.")
    if method.distils:
        literal, saved = _planned_distillation(settings, plain, assumed, lengths)
    else:
        with_pass, why = _logprob_pass(settings, gpu=gpu)
        notes.append(why)
        live = assumed.live * rows
        literal = TokensByPart(sampling=rows, logprob=rows, update=rows)
        saved = TokensByPart(sampling=prompts + sampled, logprob=live if with_pass else 0.0, update=live)
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
    hard = (1.0 if settings.method.resolve().helped == "every" else assumed.hard) * (plan.batch + plan.replayed)
    cap = float(share_of(settings.zone.rho_aug, plan.batch))
    # What shows nothing of the teacher's (NCQ) can be built without a right teacher response.
    chance = {kind: assumed.solved if needs_of(kind) & RESPONSES else 1.0 for kind in kinds}
    per_question = sum(chance.values())
    precap = min(cap, hard) if kinds else 0.0
    asked = min(precap, cap / per_question) if per_question else precap
    return _Zone(hard, precap, asked, {kind: asked * share for kind, share in chance.items()})


def _planned_teacher(
    settings: Settings, teacher: TeacherSettings, zone: _Zone, assumed: Assumptions, lengths: _Lengths
) -> tuple[TokensByPart, TokensByPart]:
    """The teacher's work in a step, to the letter and as this recipe asks for it."""
    needs = settings.method.resolve().needs
    draws, group = settings.zone.teacher_group_size, settings.rollout.group_size
    literal, saved = _teacher_questions(settings, zone, 0.0)
    cap = teacher.compression.max_new_tokens
    per_question = 0.0
    if teacher.compression.enabled:
        # Of a hardest question every rollout is wrong; where all of them are compressed (NCQ), the negative of a pair (BCQ) is one.
        pairs = assumed.solved * ("pair" in needs)
        negatives = group if "wrong" in needs else pairs
        per_question = negatives * (lengths.completion + cap) + pairs * (lengths.answer + cap)
    if "hint" in needs:
        per_question += assumed.solved * (lengths.prompt + lengths.answer + teacher.hint.max_new_tokens)
    built = zone.precap if teacher.ask == "all" else zone.asked
    return (
        TokensByPart(teacher=literal * draws * (lengths.prompt + lengths.answer), compression=zone.precap * per_question),
        TokensByPart(teacher=saved * (lengths.prompt + draws * lengths.answer), compression=built * per_question),
    )


def _teacher_questions(settings: Settings, zone: _Zone, plain: float) -> tuple[float, float]:
    """Questions of a step that the teacher answers, to the letter and as this recipe asks.

    Off-policy distillation asks about all of them, Algorithm 1 and Teacher response about every hard one, Hint and Prefix about the
    capped set, NCQ alone about none.
    """
    method = settings.method.resolve()
    if method.loss == "off-distill":
        return plain, plain
    if method.teacher_response:
        return zone.hard, zone.hard
    if not method.needs & RESPONSES:
        return 0.0, 0.0
    literal = zone.hard if "pair" in method.needs else zone.precap
    return literal, literal if settings.teacher is not None and settings.teacher.ask == "all" else zone.asked


def _planned_judge(settings: Settings, share: float, student: float, teacher: float, lengths: _Lengths) -> TokensByPart:
    """Verdicts on the completions of a step, at most: each takes a call, which reads the question and what it may of the completion."""
    if settings.judging is None:
        return TokensByPart()
    use = settings.judging[1]
    around = lengths.prompt + use.max_new_tokens
    tokens = student * (around + min(lengths.completion, use.response_tokens))
    return TokensByPart(judge=share * (tokens + teacher * (around + min(lengths.answer, use.response_tokens))))


def _planned_distillation(settings: Settings, plain: int, assumed: Assumptions, lengths: _Lengths) -> tuple[TokensByPart, TokensByPart]:
    """All kinds of distillation in a step (Algs. 2 and 3, SDPO): nothing is saved but the shared reading of prompts."""
    method, group, draws = settings.method.resolve(), settings.rollout.group_size, settings.zone.teacher_group_size
    rows = plain * group * (lengths.prompt + lengths.completion)
    once = plain * (lengths.prompt + group * lengths.completion)
    if method.loss == "self-distill":  # the student reads every rollout again behind a right response
        shown = lengths.answer if method.teacher_response else lengths.completion
        again = rows + plain * group * shown
        asked = plain * draws * method.teacher_response
        literal = TokensByPart(sampling=rows, logprob=again, update=rows, teacher=asked * (lengths.prompt + lengths.answer))
        return literal, replace(literal, sampling=once, teacher=asked * lengths.answer + lengths.prompt * plain * method.teacher_response)
    if method.loss == "on-distill":
        return TokensByPart(sampling=rows, update=rows, scoring=rows), TokensByPart(sampling=once, update=rows, scoring=rows)
    theirs = plain * draws * (lengths.prompt + lengths.answer)
    right = assumed.solved * theirs
    literal = TokensByPart(sampling=rows, update=right, teacher=theirs, scoring=right)
    theirs_once = plain * (lengths.prompt + draws * lengths.answer)
    return literal, TokensByPart(sampling=once, update=right, teacher=theirs_once, scoring=right)


def _logprob_pass(settings: Settings, *, gpu: bool) -> tuple[bool, str]:
    """Whether old log-probs take a forward pass of their own, and why."""
    train = settings.train
    if train.old_logprobs != "auto":
        own = train.old_logprobs == "forward"
        return own, f"Old log-probs: train.old_logprobs is {train.old_logprobs}."
    if not settings.rollout.sampling().exact:
        return True, "Old log-probs: from a forward pass, since top-p or top-k changes what is sampled."
    on_gpu = gpu and train.device != "cpu"
    if train.precision == "fp32" or (train.precision == "auto" and not on_gpu):
        where = "" if train.precision == "fp32" else ": train.precision is auto, and this is counted for a CPU. On a GPU it is bf16"
        return False, f"Old log-probs: the sampler's, which are exact in fp32{where}."
    where = "train.precision is bf16" if train.precision == "bf16" else "train.precision is auto, and this is counted for a GPU"
    return True, f"Old log-probs: from a forward pass, in bf16 ({where}); in fp32, as on a CPU, the sampler's are exact and cost nothing."


def _stated(settings: Settings, assumed: Assumptions) -> str:
    def length(given: float | None, most: int) -> str:
        return f"{most:,} (the limit)" if given is None else f"{given:,.0f}"

    parts = [
        f"plain prompts of {length(assumed.prompt, settings.data.max_prompt_tokens)} tokens{assumed.prompt_from}",
        f"rollouts of {length(assumed.completion, settings.rollout.max_new_tokens)}",
    ]
    method = settings.method.resolve()
    if method.needs_teacher and settings.teacher is not None:
        answer = length(assumed.teacher_completion, settings.teacher.rollout.max_new_tokens)
        parts.append(f"teacher rollouts of {answer}")
        if not method.distils:
            parts.append(f"{assumed.hard:.0%} of the plain questions hard, {assumed.solved:.0%} of those solved by the teacher")
        elif method.loss == "off-distill":
            parts.append(f"{assumed.solved:.0%} of these right")
        if method.needs & {"pair", "wrong"}:
            parts.append(f"candidates at their cap of {settings.teacher.compression.max_new_tokens:,}")
    if not method.distils:
        parts.append(f"{assumed.live:.0%} of the tokens in rows with an advantage")
    return f"Assumed: {', '.join(parts)}."


DATA = Path(__file__).parents[1] / "report" / "data"
SCALES = {"0.8B": 0.8e9, "2B": 2e9, "4B": 4e9, "9B": 9e9}
TEACHER = 27e9

STEPS, BATCH, GROUP, TEACHER_GROUP, UPDATES = 200, 384, 8, 4, 4
LONGEST = 4_096 + 12_288  # tokens of a prompt and a rollout at their limits
REPLAY = AGAIN = 0.25  # rho_replay, rho_aug
HARD = 0.38  # hard questions per plain one, from the paper's buffer at 2B (docs/cost.md)
TEACHER_RIGHT = 0.62  # share of teacher rollouts that are right: fitted to Off-Distill
ROWS = STEPS * BATCH * GROUP * LONGEST  # tokens of all plain student rollouts without replay, at their limits


@dataclass(frozen=True, slots=True)
class PaperCost:
    """A row of Tab. 9."""

    method: str
    scale: str
    hours: float
    flops: float


def paper_costs() -> list[PaperCost]:
    """Tab. 9, in its order."""
    with open(DATA / "paper_cost.csv", encoding="utf-8", newline="") as file:
        return [PaperCost(r["method"], r["scale"], float(r["hours"]), float(r["flops"])) for r in csv.DictReader(file)]


def counted(method: str, student: float, *, teacher: float = TEACHER, updates: int = 1) -> float:
    """FLOPs of a method of Tab. 9 at the paper's sizes, every prompt and rollout at its limit of tokens.

    GRPO and ZPPO: 2N sampling, 2N old log-probs, 6N forward and backward for every token; ZPPO adds teacher rollouts on all hard
    questions (compression left out). On-Distill: 2N sampling, 6N training, 2 N_T scoring. Off-Distill: 2 N_T for teacher rollouts,
    and 2 N_T scoring and 6N training of the right ones among them; 2N for the student's own rollouts.

    Args:
        method: as in Tab. 9; a dagger adds full replay from the first step.
        student, teacher: parameters.
        updates: how often forward and backward is counted for GRPO and ZPPO: 1 is what the method does (every token is used once).
    """
    replay = method.endswith("†") or method == "ZPPO"
    rows = ROWS * (1 + REPLAY * replay + AGAIN * (method == "ZPPO"))
    if method.startswith("Off-Distill"):
        theirs = rows * TEACHER_GROUP / GROUP
        return theirs * (2 * teacher * (1 + TEACHER_RIGHT) + 6 * student * TEACHER_RIGHT) + rows * 2 * student
    if method.startswith("On-Distill"):
        return rows * (8 * student + 2 * teacher)
    asked = ROWS * (1 + REPLAY) * HARD * TEACHER_GROUP / GROUP if method == "ZPPO" else 0.0
    return rows * (4 + 6 * updates) * student + asked * 2 * teacher


def nearest_scale(parameters: float) -> str | None:
    """The paper's scale that a student of so many parameters belongs to, within a third; None: none."""
    name = min(SCALES, key=lambda scale: abs(SCALES[scale] - parameters))
    return name if abs(SCALES[name] - parameters) <= SCALES[name] / 3 else None

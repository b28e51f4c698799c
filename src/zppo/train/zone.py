"""From plain groups to reformulated prompts: hard questions -> teacher -> compression -> BCQ and NCQ (Alg. 1, l. 5-11)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from zppo.core.draws import draw_key, keyed_random
from zppo.core.reformulate import (
    BinaryCandidateQuestion,
    Material,
    NegativeCandidateQuestion,
    Reformulation,
    distinct_answers,
)
from zppo.core.select import fill_slots, hard_groups, share_of
from zppo.core.types import BCQ, NCQ, Group, Prompt
from zppo.grading import normalise
from zppo.teacher.base import Teacher, TeacherRequest, TeacherSampling
from zppo.teacher.compress import Compressor, PairRequest, Source
from zppo.train.rollouts import Answered, Score, Speaker
from zppo.train.settings import ZoneSettings

REFORMULATIONS: dict[str, Reformulation] = {BCQ: BinaryCandidateQuestion(), NCQ: NegativeCandidateQuestion()}
"""Kinds of reformulated prompts by name; the rows of the methods table name them."""


@dataclass(frozen=True, slots=True)
class Zone:
    """The reformulated prompts of one step and what making them took.

    Attributes:
        prompts: at most floor(rho_aug * len(X_new)).
        metrics: numbers for the run log.
        teacher_error: why the teacher could not serve a request, the last such reason; "" where it served all.
    """

    prompts: list[Prompt] = field(default_factory=list)
    metrics: dict[str, float | None] = field(default_factory=dict)
    teacher_error: str = ""


@dataclass(slots=True)
class _Counts:
    """What one step of the zone counts."""

    hard_questions: int = 0
    teacher_questions: int = 0
    teacher_rollouts: int = 0
    teacher_correct: int = 0
    teacher_unreachable: int = 0
    teacher_prompt_tokens: int = 0
    teacher_completion_tokens: int = 0
    teacher_solved_none: int = 0
    bcq_without_negative: int = 0
    bcq_raw_pairs: int = 0
    ncq_raw_candidates: int = 0
    too_long: int = 0


class ZoneBuilder:
    """Makes the reformulated prompts of a step.

    Args:
        kinds: which reformulations, in building order (BCQ before NCQ in the paper).
        teacher, teacher_rollout: the frozen teacher, None only without reformulations; how its rollouts are sampled.
        compressor: candidate compression.
        speaker, score: the student's words; the reward, which grades the teacher too.
        context: the student's context in tokens, None if unbounded.
        max_new_tokens: limit of a student completion, counted against the context.
        lazy: ask the teacher hardest first until the cap is full (the same prompts), or as Algorithm 1 is written.
    """

    def __init__(
        self,
        kinds: Sequence[str],
        *,
        teacher: Teacher | None,
        teacher_rollout: TeacherSampling,
        compressor: Compressor,
        speaker: Speaker,
        score: Score,
        settings: ZoneSettings,
        seed: int,
        context: int | None,
        max_new_tokens: int,
        lazy: bool,
    ) -> None:
        self.reformulations = [REFORMULATIONS[kind] for kind in kinds]
        self.needs = frozenset(need for r in self.reformulations for need in r.needs)
        self.teacher, self.teacher_rollout, self.compressor = teacher, teacher_rollout, compressor
        self.speaker, self.score, self.settings, self.seed = speaker, score, settings, seed
        self.context, self.max_new_tokens, self.lazy = context, max_new_tokens, lazy
        self._teacher_error = ""

    def build(self, plain: Sequence[Group], new_count: int, step: int) -> Zone:
        """The reformulated prompts for a step's plain groups (new questions first), hardest questions first."""
        cap = share_of(self.settings.rho_aug, new_count)
        hard = hard_groups(plain, self.settings.threshold, ties=self.settings.ties, seed=self.seed, step=step)
        counts = _Counts(hard_questions=len(hard))
        self.compressor.new_step()
        self._teacher_error = ""
        pools: dict[str, tuple[Source, ...]] = {}
        if not self.lazy and self.reformulations:
            self._ask_teacher(hard, pools, counts, step)

        def build(wave: Sequence[Group]) -> list[list[Prompt]]:
            self._ask_teacher([g for g in wave if g.question.id not in pools], pools, counts, step)
            return self._reformulate(wave, pools, counts, step)

        prompts = fill_slots(hard, cap, build, len(self.reformulations), lazy=self.lazy)
        return Zone(prompts, self._metrics(prompts, counts), self._teacher_error or self.compressor.error)

    def _ask_teacher(
        self, groups: Sequence[Group], pools: dict[str, tuple[Source, ...]], counts: _Counts, step: int
    ) -> None:
        """T_x: the correct ones of G_T fresh teacher rollouts per hard question (Alg. 1, l. 6), added to `pools`."""
        if "pair" not in self.needs or self.teacher is None or not groups:
            pools.update({g.question.id: () for g in groups})
            return
        indices = range(self.settings.teacher_group_size)
        requests = [
            TeacherRequest(
                self.speaker.book.plain(g.question),
                tuple(draw_key(self.seed, "teacher", step, g.question.id, i) for i in indices),
                g.question.images,
            )
            for g in groups
        ]
        replies = self.teacher.complete(requests, self.teacher_rollout)
        self._teacher_error = next((r.error for r in replies if r.error), self._teacher_error)
        answered = [
            (g.question.id, i, text, Answered(g.question, text, reply.think_open))
            for g, reply in zip(groups, replies, strict=True)
            for i, text in enumerate(reply.texts)
            if text is not None
        ]
        verdicts = self.score([a for *_, a in answered])
        found: dict[str, list[Source]] = {g.question.id: [] for g in groups}
        for (question_id, index, text, _), verdict in zip(answered, verdicts, strict=True):
            # Beside a negative, which always has an answer, a positive without one would stand out (ours).
            if verdict.graded and verdict.correct and verdict.answer is not None:
                found[question_id].append(Source(text, verdict.answer, index))
        pools.update({question_id: tuple(sources) for question_id, sources in found.items()})
        counts.teacher_questions += len(groups)
        counts.teacher_rollouts += len(answered)
        counts.teacher_correct += sum(len(sources) for sources in found.values())
        counts.teacher_unreachable += sum(text is None for reply in replies for text in reply.texts)
        counts.teacher_prompt_tokens += sum(reply.prompt_tokens for reply in replies)
        counts.teacher_completion_tokens += sum(reply.completion_tokens for reply in replies)
        counts.teacher_solved_none += sum(not sources for sources in found.values())

    def _reformulate(
        self, wave: Sequence[Group], pools: dict[str, tuple[Source, ...]], counts: _Counts, step: int
    ) -> list[list[Prompt]]:
        """Prompts per question of a wave, BCQ before NCQ; one that does not fit the context is not built."""
        wrong = [
            tuple(Source(r.text, r.answer, i) for i, r in enumerate(g.rollouts) if r.graded and not r.correct)
            for g in wave
        ]
        requests = [
            PairRequest(
                question_id=g.question.id,
                positives=pools[g.question.id],
                negatives=tuple(s for s in sources if s.answer is not None),
                wrong=sources,
                want_pair="pair" in self.needs,
                want_wrong="wrong" in self.needs,
            )
            for g, sources in zip(wave, wrong, strict=True)
        ]
        built = []
        for group, request, prepared in zip(
            wave, requests, self.compressor.prepare(requests, self.seed, step), strict=True
        ):
            counts.bcq_without_negative += bool(request.want_pair and request.wrong and not request.negatives)
            counts.bcq_raw_pairs += prepared.pair_raw
            counts.ncq_raw_candidates += prepared.wrong_raw
            answers = ((s.answer, normalise(s.answer) if s.answer is not None else "") for s in request.wrong)
            listed = distinct_answers(answers, normalise(group.question.gold))
            material = Material(group.question, prepared.pair, prepared.wrong, listed)
            built.append(self._prompts(material, counts, step))
        return built

    def _prompts(self, material: Material, counts: _Counts, step: int) -> list[Prompt]:
        prompts = []
        for reformulation in self.reformulations:
            rng = keyed_random(self.seed, "reformulate", step, material.question.id, reformulation.kind)
            if (draft := reformulation.draft(material, rng)) is None:
                continue
            prompt = self.speaker.reformulated(draft)
            if (
                self.context is not None
                and len(prompt.ids) + len(prompt.forced_ids) + self.max_new_tokens > self.context
            ):
                counts.too_long += 1
                continue
            prompts.append(prompt)
        return prompts

    def _metrics(self, prompts: Sequence[Prompt], counts: _Counts) -> dict[str, float | None]:
        compression: Any = self.compressor.counts
        return {
            **{f"{r.kind}_prompts": float(sum(p.kind == r.kind for p in prompts)) for r in self.reformulations},
            **{f.name: float(getattr(counts, f.name)) for f in fields(counts)},
            **{f"compression_{f.name}": float(getattr(compression, f.name)) for f in fields(compression)},
        }

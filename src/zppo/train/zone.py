"""From plain groups to reformulated prompts: hard questions -> teacher -> compression -> BCQ and NCQ (Alg. 1, l. 4-15)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from zppo.config.settings import ZoneSettings
from zppo.core.reformulate import RESPONSES, Reformulation, scrambled
from zppo.core.select import fill_slots, hard_groups, share_of
from zppo.core.types import Draft, Group, Prompt
from zppo.train.ask import Asker, Pools, TimedTeacher
from zppo.train.materials import MaterialMaker, drafts_of
from zppo.train.rollouts import Speaker


@dataclass(frozen=True, slots=True)
class Zone:
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


class ZoneBuilder:
    """Makes the reformulated prompts of a step.

    Args:
        reformulations: in building order (BCQ before NCQ in the paper).
        asker, materials: the teacher's responses; compressed candidates and hints.
        speaker: the student's words.
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
        asker: Asker,
        materials: MaterialMaker,
        speaker: Speaker,
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
        self.asker, self.materials, self.speaker = asker, materials, speaker
        self.settings, self.seed, self.context, self.max_new_tokens = settings, seed, context, max_new_tokens
        self.lazy, self.every_hard_question, self.scramble = lazy, every_hard_question, scramble
        self.teachers = tuple(teachers)
        self.needs_responses = any(r.needs & RESPONSES for r in self.reformulations)

    def build(self, plain: Sequence[Group], new_count: int, step: int) -> Zone:
        """The reformulated prompts for a step's plain groups (new questions first), hardest questions first."""
        for teacher in self.teachers:
            teacher.seconds = 0.0
        cap = share_of(self.settings.rho_aug, new_count)
        hard = hard_groups(plain, self.settings.threshold, ties=self.settings.ties, seed=self.seed, step=step)
        self.asker.new_step()
        self.materials.new_step()
        pools = self._ask_first(hard, cap, step)
        too_long = 0

        def build(wave: Sequence[Group]) -> list[list[tuple[Draft, Prompt]]]:
            nonlocal too_long
            if self.needs_responses:
                pools.update(self.asker.ask([g.question for g in wave if g.question.id not in pools], step))
            materials = self.materials.make(wave, pools, step)
            drafts = [drafts_of(self.reformulations, material, self.seed, step) for material in materials]
            prompts = [[(draft, self.speaker.reformulated(draft)) for draft in row] for row in drafts]
            fitting = [[pair for pair in row if self._fits(pair[1])] for row in prompts]
            too_long += sum(map(len, prompts)) - sum(map(len, fitting))
            return fitting

        built = fill_slots(hard, cap, build, len(self.reformulations), lazy=self.lazy)
        prompts = [prompt for _, prompt in built]
        if self.scramble:
            exchanged = [self.speaker.reformulated(draft) for draft in scrambled([draft for draft, _ in built])]
            prompts = [prompt for prompt in exchanged if self._fits(prompt)]
            too_long += len(exchanged) - len(prompts)
        metrics: dict[str, float | None] = {
            **{f"{r.kind}_prompts": float(sum(p.kind == r.kind for p in prompts)) for r in self.reformulations},
            "hard_questions": float(len(hard)),
            "too_long": float(too_long),
            **self.asker.metrics(),
            **self.materials.metrics(),
            **({"teacher_wait_seconds": sum(t.seconds for t in self.teachers)} if self.teachers else {}),
        }
        return Zone(prompts, pools, metrics, self.asker.error or self.materials.error)

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
        return self.asker.ask([g.question for g in asked], step)

    def _fits(self, prompt: Prompt) -> bool:
        needed = len(prompt.ids) + len(prompt.forced_ids) + self.max_new_tokens
        return self.context is None or needed <= self.context

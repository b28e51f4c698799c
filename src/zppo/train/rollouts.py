"""Student rollouts: prompts -> token ids -> completions -> verdicts -> groups (Alg. 1, l. 4 and 12)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from zppo.core.draws import draw_key
from zppo.core.types import PLAIN, Draft, Group, Message, Prompt, Question, Rollout
from zppo.engines.base import Completion, Engine, SampleRequest, Sampling
from zppo.engines.chat import Chat
from zppo.grading.base import Verdict
from zppo.prompts.book import PromptBook
from zppo.train.team import ALONE, Team


@dataclass(frozen=True, slots=True)
class Answered:
    """A completion that waits for its verdict."""

    question: Question
    completion: str
    think_open: bool


Score = Callable[[Sequence[Answered]], list[Verdict]]
"""Grades completions, in their order: the rule grader, or a user's reward function."""


@dataclass(frozen=True, slots=True)
class Speaker:
    """How questions become the student's prompts: the words and the chat template."""

    book: PromptBook
    chat: Chat

    def plain(self, question: Question) -> Prompt:
        """The question with the closing instruction."""
        return self._prompt(PLAIN, question, self.book.plain(question))

    def reformulated(self, draft: Draft) -> Prompt:
        """The prompt of a draft."""
        prompt = self._prompt(draft.kind, draft.question, self.book.render(draft))
        return Prompt(
            prompt.kind,
            prompt.question,
            prompt.messages,
            prompt.ids,
            prompt.think_open,
            prompt.images,
            draft.forced_ids,
            draft.audit,
        )

    def _prompt(self, kind: str, question: Question, messages: tuple[Message, ...]) -> Prompt:
        ids = self.chat.encode(messages, question.images)
        return Prompt(kind, question, messages, ids, self.chat.think_open(ids), question.images)


@dataclass(frozen=True, slots=True)
class Roller:
    """Samples and grades groups of student rollouts.

    Attributes:
        engine, speaker, score: the student, its words, its grading.
        sampling: how tokens are drawn.
        group_size: G_S.
        seed: keys the draw of every rollout by (seed, step, question id, kind, index).
        team: the processes that share the groups out; each samples and grades whole groups, and all get all of them.
        whole: inside it the engine has all weights.
    """

    engine: Engine
    speaker: Speaker
    score: Score
    sampling: Sampling
    group_size: int
    seed: int
    team: Team = ALONE
    whole: Callable[[], AbstractContextManager[None]] = nullcontext

    def roll(self, prompts: Sequence[Prompt], step: int, *, purpose: str = "rollout") -> list[Group]:
        """One group per prompt, in order. `purpose` keeps the draws of evaluation apart from those of training."""
        if not prompts:
            return []

        def work(mine: Sequence[Prompt]) -> list[tuple[Rollout, ...]]:
            return self._rollouts(mine, step, purpose)

        with self.whole():
            rolled = self.team.map(prompts, work, lambda p: float(len(p.ids) + self.sampling.max_new_tokens))
        return [Group(prompt, rollouts) for prompt, rollouts in zip(prompts, rolled, strict=True)]

    def _rollouts(self, prompts: Sequence[Prompt], step: int, purpose: str) -> list[tuple[Rollout, ...]]:
        """Of this process's prompts, in order."""
        requests = [
            SampleRequest(
                p.ids + p.forced_ids,
                tuple(draw_key(self.seed, purpose, step, p.question.id, p.kind, i) for i in range(self.group_size)),
                p.images,
            )
            for p in prompts
        ]
        completions = self.engine.sample(requests, self.sampling)
        decode = self.speaker.chat.decode
        texts = [
            [decode(prompt.forced_ids + tuple(c.ids.tolist())) for c in row]
            for prompt, row in zip(prompts, completions, strict=True)
        ]
        verdicts = iter(
            self.score(
                [
                    Answered(p.question, text, p.think_open)
                    for p, row in zip(prompts, texts, strict=True)
                    for text in row
                ]
            )
        )
        return [
            tuple(_rollout(c, text, next(verdicts)) for c, text in zip(row, row_texts, strict=True))
            for row, row_texts in zip(completions, texts, strict=True)
        ]


def _rollout(completion: Completion, text: str, verdict: Verdict) -> Rollout:
    return Rollout(
        ids=completion.ids,
        logprobs=completion.logprobs,
        text=text,
        answer=verdict.answer,
        correct=verdict.correct,
        reward=verdict.reward,
        truncated=completion.truncated,
        graded=verdict.graded,
        reason=verdict.reason,
        entropy=completion.entropy,
    )

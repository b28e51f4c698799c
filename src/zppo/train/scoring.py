"""Who grades: the rules, a reward function of the user's, or the judge, as each question says (method.md section 7)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict

from zppo.core.types import JUDGE, Question
from zppo.engines.chat import Chat
from zppo.grading import Grader
from zppo.grading.base import Verdict
from zppo.grading.reward import load_reward
from zppo.prompts.book import PromptBook
from zppo.prompts.neutralise import Neutraliser
from zppo.teacher.compress import token_tail
from zppo.teacher.judge import Case, Judge, Outcome, readable
from zppo.teacher.local import LocalTeacher
from zppo.train.plan import count_judged
from zppo.train.rollouts import Answered, Score
from zppo.train.settings import FrozenModelSettings, Settings

_FEW = 8  # replies on which nothing is concluded yet


@contextmanager
def scoring(settings: Settings) -> Iterator[Score]:
    """The recipe's grading for the length of a run, before any judge: a reward function of the user's, else the rules and their workers.

    Questions that want a judge go by the rules here: a reward function is not asked about them.
    """
    with Grader(deadline=settings.grading.deadline, workers=settings.grading.workers) as grader:

        def by_rule(answered: Sequence[Answered]) -> list[Verdict]:
            return grader.grade_many([(a.completion, a.question.gold, a.think_open) for a in answered])

        if not settings.grading.reward:
            yield by_rule
            return
        reward = load_reward(settings.grading.reward)

        def by_reward(answered: Sequence[Answered]) -> list[Verdict]:
            ruled = iter(by_rule([a for a in answered if a.question.grading == JUDGE]))
            return [
                next(ruled) if a.question.grading == JUDGE else reward(a.completion, a.question, a.think_open)
                for a in answered
            ]

        yield by_reward


class Scorer:
    """The `Score` of a run: the rules first, then the judge on what they do not accept of the questions that want one.

    (ours) An answer of a judge question that the rules find equal to the gold is right without a call. A malformed verdict is wrong; an
    unreachable judge leaves the completion ungraded; an empty completion is wrong and nobody is asked.

    Args:
        rule: grades by rule; a user's reward function on the questions that are not the judge's.
        judge: decides the rest; None where no question wants one.
    """

    def __init__(self, rule: Score, judge: Judge | None = None) -> None:
        self.rule, self.judge = rule, judge
        self._told_malformed = False
        self._spared = 0

    def __call__(self, answered: Sequence[Answered]) -> list[Verdict]:
        """Verdicts in the order of the completions; one call of the judge's model for all of them."""
        verdicts = self.rule(answered)
        if self.judge is None:
            return verdicts
        cases = {
            i: Case(a.question, text)
            for i, (a, verdict) in enumerate(zip(answered, verdicts, strict=True))
            if a.question.grading == JUDGE and not verdict.correct
            if (text := readable(a.completion, verdict.answer, a.think_open))
        }
        asked = self.judge.counts.asked
        for i, outcome in zip(cases, self.judge.decide(list(cases.values())), strict=True):
            verdicts[i] = _verdict(outcome, verdicts[i].answer)
        wanted = sum(a.question.grading == JUDGE for a in answered)
        self._spared += wanted - (self.judge.counts.asked - asked)
        return verdicts

    def new_step(self) -> None:
        """A step or an evaluation begins: verdicts and counts of the judge are forgotten."""
        self._spared = 0
        if self.judge is not None:
            self.judge.new_step()

    def metrics(self) -> dict[str, float]:
        """Counts since `new_step`, named judge_*; none without a judge.

        `judge_spared` are completions of judge questions that took no call of their own: the rules accepted them, their text came twice,
        or it was empty.
        """
        if self.judge is None:
            return {}
        counts = {"spared": self._spared, **asdict(self.judge.counts)}
        return {f"judge_{name}": float(value) for name, value in counts.items()}

    def warnings(self) -> list[str]:
        """What a person should know about the judging since `new_step`; that most replies are no verdicts is said once."""
        if self.judge is None:
            return []
        counts, said = self.judge.counts, []
        if counts.unreachable:
            said.append(
                f"{counts.unreachable:,} of {counts.asked:,} judge calls got no reply, and what they were about is ungraded: "
                f"{self.judge.error}"
            )
        if not self._told_malformed and counts.asked >= _FEW and 2 * counts.malformed > counts.asked:
            self._told_malformed = True
            said.append(
                f"{counts.malformed:,} of {counts.asked:,} judge replies were no verdict and count as wrong: take a judge that follows "
                "instructions, without thinking (docs/grading.md)"
            )
        return said


def make_scorer(
    settings: Settings,
    rule: Score,
    questions: Iterable[Question],
    chat: Chat,
    teachers: Sequence[LocalTeacher],
    load: Callable[[FrozenModelSettings], LocalTeacher],
) -> Scorer:
    """The score of a run; a judge is loaded where a question wants one, and only there.

    Args:
        questions: all that will be graded.
        chat: the student's, whose tokens the judge's reading is capped in.
        teachers: those that the method has loaded; the first one judges where the recipe names no judge.
        load: loads the judge's model, or a teacher that nothing else needs.

    Raises:
        SettingsError: there is nobody to judge.
        TeacherError, ModelError: the judge cannot be used.
    """
    if not count_judged(settings, questions):
        return Scorer(rule)
    assert settings.judging is not None
    own, use = settings.judging
    model = teachers[0] if settings.judge is None and teachers else load(own)
    how = own.how(use)
    model.check(how)
    book = PromptBook(settings.prompts, Neutraliser({*chat.special_texts, *model.special_texts}))
    judge = Judge(model, book, how, token_tail(chat.tokenizer, use.response_tokens), seed=settings.seed)
    return Scorer(rule, judge)


def _verdict(outcome: Outcome, answer: str | None) -> Verdict:
    correct = outcome == "correct"
    return Verdict(correct, answer, f"judge {outcome}", float(correct), graded=outcome != "unreachable")

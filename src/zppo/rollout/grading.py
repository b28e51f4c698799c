"""Who grades: the rules, a reward function of the user's, or the judge, as each question says (method.md section 7)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict

from zppo.config.models import FrozenModelSettings
from zppo.config.settings import Settings
from zppo.core.types import JUDGE, Question
from zppo.engines.chat import Chat
from zppo.grading import Grader, extract_boxed, normalise
from zppo.grading.grader import Verdict
from zppo.grading.reward_function import load_reward
from zppo.prompts.book import PromptBook
from zppo.prompts.neutralise import Neutraliser
from zppo.rollout.data import count_judged
from zppo.rollout.frozen_models import FrozenTeacher
from zppo.rollout.student import Answered, Score
from zppo.teacher.compression import token_tail
from zppo.teacher.judge import Case, Judge, readable

_FEW = 8  # replies on which nothing is concluded yet


@contextmanager
def scoring(settings: Settings) -> Iterator[Score]:
    """The recipe's grading for the length of a run, before any judge: a reward function of the user's, else the rules and their workers."""
    if settings.grading.reward:
        reward = load_reward(settings.grading.reward)
        yield lambda answered: [reward(a.completion, a.question, a.think_open) for a in answered]
        return
    with Grader(deadline=settings.grading.deadline, workers=settings.grading.workers) as grader:

        def score(answered: Sequence[Answered]) -> list[Verdict]:
            return grader.grade_many([(a.completion, a.question.gold, a.think_open) for a in answered])

        yield score


class Scorer:
    """The `Score` of a run: by rule, or by judge for the questions that want one.

    [zppo] An answer that has the gold's very words (section 9's normalisation) is right without a call. The rules' wider equality is not
    used here: to them "yes" equals "Yes, since ice floats". An empty completion is wrong, and nobody is asked. A malformed verdict is
    wrong; an unreachable judge leaves the completion ungraded.

    Args:
        rule: grades the questions that are not the judge's: by rule, or by a reward function of the user's.
        judge: grades the others; None where there are none.
    """

    def __init__(self, rule: Score, judge: Judge | None = None) -> None:
        self.rule, self.judge = rule, judge
        self._told_malformed = False
        self._spared = 0

    def __call__(self, answered: Sequence[Answered]) -> list[Verdict]:
        """Verdicts in the order of the completions; one call of the judge's model for all of them."""
        if self.judge is None:
            return self.rule(answered)
        judged = iter(self._by_judge(self.judge, [a for a in answered if a.question.grading == JUDGE]))
        ruled = iter(self.rule([a for a in answered if a.question.grading != JUDGE]))
        return [next(judged if a.question.grading == JUDGE else ruled) for a in answered]

    def _by_judge(self, judge: Judge, answered: Sequence[Answered]) -> list[Verdict]:
        verdicts = [_without_judge(a) for a in answered]
        texts = [readable(a.completion, v.answer, a.think_open) for a, v in zip(answered, verdicts, strict=True)]
        left = [
            i for i, (text, verdict) in enumerate(zip(texts, verdicts, strict=True)) if text and not verdict.correct
        ]
        before = judge.counts.asked
        outcomes = judge.decide([Case(answered[i].question, texts[i]) for i in left])
        self._spared += len(answered) - (judge.counts.asked - before)
        for i, outcome in zip(left, outcomes, strict=True):
            correct = outcome == "correct"
            graded = outcome != "unreachable"
            verdicts[i] = Verdict(correct, verdicts[i].answer, f"judge {outcome}", float(correct), graded)
        return verdicts

    def new_step(self) -> None:
        """A step or an evaluation begins: verdicts and counts of the judge are forgotten."""
        self._spared = 0
        if self.judge is not None:
            self.judge.new_step()

    def metrics(self) -> dict[str, float]:
        """Counts since `new_step`, named judge_*; none without a judge.

        `judge_spared` are completions of judge questions that took no call of their own: they had the gold's words, came twice, or were
        empty.
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
    teachers: Sequence[FrozenTeacher],
    load: Callable[[FrozenModelSettings], FrozenTeacher],
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
    model.check(how, "" if settings.judge else "judge")
    book = PromptBook(settings.prompts, Neutraliser({*chat.special_texts, *model.special_texts}))
    judge = Judge(model, book, how, token_tail(chat.tokenizer, use.response_tokens), seed=settings.seed)
    return Scorer(rule, judge)


def _without_judge(answered: Answered) -> Verdict:
    """What can be said of a completion of a judge question without asking."""
    answer = extract_boxed(answered.completion, answered.think_open)
    correct = answer is not None and normalise(answer) == normalise(answered.question.gold)
    return Verdict(correct, answer, "equal" if correct else "no answer", float(correct))

"""Who grades: the rules, a reward function of the user's, or the judge, as each question says (method.md section 7)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from zppo.config.model_settings import FrozenModelSettings
from zppo.config.settings import Settings
from zppo.core.types import JUDGE, Question
from zppo.engines.chat import Chat
from zppo.grading import Grader, extract_boxed, has_gold_words
from zppo.grading.answer_form import ANYWHERE, AnswerForm
from zppo.grading.grader import Verdict
from zppo.grading.workers import TimeOuts
from zppo.prompts.book import PromptBook
from zppo.prompts.neutralise import Neutraliser
from zppo.rollout.data import count_judged
from zppo.rollout.frozen_models import FrozenTeacher
from zppo.rollout.rewards import Rewards, make_rewards
from zppo.rollout.student import Answered
from zppo.step_log import StepLog
from zppo.teacher.compression import token_tail
from zppo.teacher.judge import Case, Judge, readable

_FEW = 8  # replies on which nothing is concluded yet


class Rule(Protocol):
    """Grades completions without a judge, in their order; `log` is of the step that they belong to."""

    def __call__(self, answered: Sequence[Answered], log: StepLog | None = None) -> list[Verdict]: ...


@contextmanager
def rule_grading(settings: Settings) -> Iterator[Rule]:
    """The recipe's grading for the length of a run, before any judge: reward functions of the user's, else the rules and their workers."""
    if settings.grading.rewards:
        rewards = make_rewards(settings.grading, settings.answer_form)
        rewards.steps = settings.train.steps or 0
        try:
            yield rewards
        finally:
            rewards.close()
        return
    own = settings.grading
    with Grader(own.deadline, own.workers, rounded_golds=own.rounded_golds, form=settings.answer_form) as grader:

        def grade(answered: Sequence[Answered], log: StepLog | None = None) -> list[Verdict]:
            log = log or StepLog()
            spent = log.known("grading").setdefault("time-outs", TimeOuts())
            untried = spent.untried
            items = [(a.completion, a.question.gold, a.think_open) for a in answered]
            verdicts = grader.grade_many(items, [(a.kind, a.question.id) for a in answered], spent)
            if spent.untried > untried:
                log.add_own(grading_untried=spent.untried - untried)
            return verdicts

        yield grade


class Scorer:
    """The `Score` of a run: by rule, or by judge for the questions that want one.

    [zppo] An answer that has the gold's very words (section 9's normalisation) is right without a call. The rules' wider equality is not
    used here: to them "yes" equals "Yes, since ice floats". An empty completion is wrong without a call. A malformed verdict is
    wrong; an unreachable judge leaves the completion ungraded.

    Args:
        rule: grades the questions that are not the judge's: by rule, or by a reward function of the user's.
        judge: grades the others; None where there are none.
        form: where the answer of a completion stands; None for the last box after the thoughts.
    """

    def __init__(self, rule: Rule, judge: Judge | None = None, form: AnswerForm | None = None) -> None:
        self.rule, self.judge, self.form = rule, judge, form or AnswerForm()
        self._warned_malformed = False  # said once a run

    def __call__(self, answered: Sequence[Answered], log: StepLog) -> list[Verdict]:
        """Verdicts in the order of the completions; one call of the judge's model for all of them.

        Counts `graded_answers` (by rule), `grading_untried` where there are any (answers that were wrong at once, see `TimeOuts`), and with
        a judge its own counts and `judge_spared`: completions of judge questions that took no call of their own, since they had the gold's
        words, came twice, or were empty.
        """
        if self.judge is None:
            return self._by_rule(answered, log)
        judged = iter(self._by_judge(self.judge, [a for a in answered if a.question.grading == JUDGE], log))
        ruled = iter(self._by_rule([a for a in answered if a.question.grading != JUDGE], log))
        return [next(judged if a.question.grading == JUDGE else ruled) for a in answered]

    def _by_rule(self, answered: Sequence[Answered], log: StepLog) -> list[Verdict]:
        log.add_own(graded_answers=len(answered))
        with log.time("grading"):  # a part of sampling and teacher
            return self.rule(answered, log)

    def _by_judge(self, judge: Judge, answered: Sequence[Answered], log: StepLog) -> list[Verdict]:
        spent = log.known("grading").setdefault("time-outs", TimeOuts())
        groups = [(a.kind, a.question.id) for a in answered]
        found = [answer for answer, _ in self.form.find_many([(a.completion, a.think_open) for a in answered], groups, spent)]
        verdicts = [_without_judge(a, answer) for a, answer in zip(answered, found, strict=True)]
        if self.form.place == ANYWHERE:  # a box in the thoughts is read with them, however it is extracted
            found = [extract_boxed(a.completion, a.think_open) for a in answered]
        texts = [readable(a.completion, answer, a.think_open) for a, answer in zip(answered, found, strict=True)]
        left = [i for i, (text, verdict) in enumerate(zip(texts, verdicts, strict=True)) if text and not verdict.correct]
        before = log.own.get("judge_asked", 0.0)
        outcomes = judge.decide([Case(answered[i].question, texts[i]) for i in left], log)
        log.add_own(judge_spared=len(answered) - (log.own["judge_asked"] - before))
        for i, outcome in zip(left, outcomes, strict=True):
            correct = outcome == "correct"
            graded = outcome != "unreachable"
            verdicts[i] = Verdict(correct, verdicts[i].answer, f"judge {outcome}", float(correct), graded)
        self._warn(log)
        return verdicts

    def _warn(self, log: StepLog) -> None:
        """What a person should know about the judging of this step up to now; that most replies are no verdicts is said once."""
        asked, unreachable, malformed = (int(log.own[f"judge_{name}"]) for name in ("asked", "unreachable", "malformed"))
        if unreachable:
            log.warnings["judge unreachable"] = (
                f"{unreachable:,} of {asked:,} judge calls got no reply, and what they were about is ungraded: "
                f"{log.errors.get('judge', '')}"
            )
        if not self._warned_malformed and asked >= _FEW and 2 * malformed > asked:
            self._warned_malformed = True
            log.warnings["judge malformed"] = (
                f"{malformed:,} of {asked:,} judge replies were no verdict and count as wrong: take a judge that follows "
                "instructions, without thinking (docs/grading.md)"
            )


def make_scorer(
    settings: Settings,
    rule: Rule,
    questions: Sequence[Question],
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
        SettingsError: no model can judge.
        RewardError: the questions lack a column that a reward function asks for.
        TeacherError, ModelError: the judge cannot be used.
    """
    if isinstance(rule, Rewards):
        rule.prepare(questions, lambda text: chat.tokenizer(text, add_special_tokens=False)["input_ids"])
    if not count_judged(settings, questions):
        return Scorer(rule, form=settings.answer_form)
    assert settings.judging is not None
    own, use = settings.judging
    model = teachers[0] if settings.judge is None and teachers else load(own)
    how = own.how(use)
    model.check(how, "" if settings.judge else "judge")
    book = PromptBook(settings.prompts, Neutraliser({*chat.special_texts, *model.special_texts}), settings.answer_form)
    judge = Judge(model, book, how, token_tail(chat.tokenizer, use.response_tokens), seed=settings.seed)
    return Scorer(rule, judge, settings.answer_form)


def _without_judge(answered: Answered, answer: str | None) -> Verdict:
    """What can be said of a completion of a judge question without asking; `answer` is what was found in it."""
    correct = answer is not None and has_gold_words(answered.question.gold, answer)
    return Verdict(correct, answer, "equal" if correct else "no answer", float(correct))


def grades_while_sampling(settings: Settings, scorer: Scorer) -> bool:
    """Whether completions are graded while others are sampled.

    Not where grading would take the student's device (a judge in this process), nor by a user's reward function, which may count on
    being called in the main thread.
    """
    judge = settings.judging[0] if scorer.judge is not None and settings.judging is not None else None
    return settings.grading.reward is None and (judge is None or bool(judge.base_urls))

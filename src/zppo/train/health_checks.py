"""Warnings with advice while a run goes on: what rots quietly shows in a few numbers of each step."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from zppo.config.settings import Settings
from zppo.runs.checkpoint import COLLAPSED
from zppo.runs.files import RECIPE

EVERY = 50
"""Steps after which the same warning may come again."""

Metrics = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Watch:
    """A number that should not rise above a limit.

    Attributes:
        value: the number of a step or an evaluation, None where it has none.
        limit: no warning up to here.
        text: the warning, or what makes one that fits the metrics; `{value}` in it is the number.
        own_reward: whether it means anything with a user's reward function, which may have no answers to find.
    """

    name: str
    value: Callable[[Metrics], float | None]
    limit: float
    text: str | Callable[[Metrics], str]
    own_reward: bool = True


def _slow_grading(metrics: Metrics) -> float | None:
    """Seconds per 1,000 answers, where grading takes more than a fifth of the step."""
    answers = metrics.get("graded_answers", 0)
    if not answers or (seconds := metrics["seconds"].get("grading", 0.0)) < 0.2 * metrics["seconds"]["step"]:
        return None
    return float(1000 * seconds / answers)


_NEVER = 0.95
"""Share without an answer from which on a student does not know the form at all, rather than now and then."""


def _no_answer(metrics: Metrics) -> str:
    """What to do about completions without an answer depends on whether they were cut, and on whether any has one."""
    evaluation = "truncated" in metrics
    section, what = ("eval", "held-out completions") if evaluation else ("rollout", "completions")
    cut = metrics.get("truncated" if evaluation else "truncated_share") or 0.0
    missing = metrics["no_answer_share"]
    head = f"{{value:.0%}} of the {what} have no {{form}} after their reasoning and count as wrong"
    if cut >= 0.5 * missing:
        return (
            f"{head}, most of them because they were cut off. Raise {section}.max_new_tokens; where a thinking student does not come to "
            "an end, student.template_args: {{enable_thinking: false}}"
        )
    if missing >= _NEVER:
        return (
            f"{head}: the student does not know the form. Ask for one that it keeps (prompts.closing: boxed or answer-line, or a template "
            "of yours); show it with data.examples: 2; start from an instruction-tuned checkpoint, or give a base model a "
            "student.template; or, if its answers have another form, read that with grading.answer_from or a function of yours "
            "(grading.reward)"
        )
    return (
        f"{head}. Look at some in the report, sorted by accuracy: where the answer stands in another form, prompts.closing can ask for "
        "yours more clearly, data.examples can show it, and grading.answer_from can read the other one"
    )


def _cut_off(metrics: Metrics) -> str:
    """What to do about completions that were cut off depends on whether their answer came before that."""
    evaluation = "truncated" in metrics
    section, what = ("eval", "held-out completions") if evaluation else ("rollout", "completions")
    cut, missing = metrics["truncated" if evaluation else "truncated_share"], metrics.get("no_answer_share")
    head = f"{{value:.0%}} of the {what} were cut off at {section}.max_new_tokens"
    if missing is not None and missing < 0.5 * cut:
        return (
            f"{head}, most of them after an answer, which counts: the student writes on where it should end. Lower train.learning_rate; "
            "or, with loss.mask_truncated: true, it learns nothing from what does not end"
        )
    if evaluation:
        return f"{head}, and most of those have no answer: the accuracy says little. Raise the limit"
    return (
        f"{head}, and most of those have no answer. Raise the limit; where the completions repeat themselves (see the report's stories), "
        "lower train.learning_rate instead"
    )


def _no_gradient(metrics: Metrics, before: float) -> str:
    """What to do depends on whether the rollouts of a group were all right or all wrong, and on how often they were right `before`."""
    plain = (metrics.get("accuracy") or {}).get("plain") or 0.0
    if plain > 0.5:
        return "the student solves what it is asked. It is done, or needs harder questions"
    if plain == 0 and before >= COLLAPSE_FROM:
        return (
            f"the student solves nothing any more, of which it solved {before:.0%} before. Its steps were too large: go back to a "
            "checkpoint from before that, with a third of train.learning_rate"
        )
    return (
        "the student solves nothing of it, so there is nothing to learn from. Look at some completions (`zppo inspect`, the report): start "
        "with questions that it solves now and then, show it the form of an answer, or give it a teacher that solves them"
    )


WATCHES = (
    Watch("truncated", lambda m: m.get("truncated_share"), 0.3, _cut_off),
    Watch("truncated evaluation", lambda m: m.get("truncated"), 0.3, _cut_off),
    Watch("no answer", lambda m: m.get("no_answer_share"), 0.5, _no_answer, own_reward=False),
    Watch(
        "grading time-outs",
        lambda m: m.get("grading_timeout_share"),
        0.02,
        "grading gave up on {value:.1%} of the answers and counted them wrong. Raise grading.deadline, or grading.workers where the "
        "machine has cores to spare",
    ),
    Watch(
        "slow grading",
        _slow_grading,
        50.0,
        "grading takes {value:.0f} seconds per 1,000 answers and much of the step. Raise grading.workers, or make your reward "
        "function faster",
    ),
)
"""What is watched; the limits are this project's [zppo]: far above what healthy runs show after their first steps."""


STEPS_WITHOUT_RIGHT = 3
"""Steps at the start of a run in which nothing was right before that is said."""

STEPS_WITHOUT_GRADIENT = 3
"""Steps in a row in which every advantage was 0 before that is said."""

ENTROPY_STEPS = 5
"""Steps whose mean entropy is compared: the first ones of a run, and the last ones."""

ENTROPY_LEFT = 0.15
"""Share of the first steps' entropy below which it has collapsed; runs on real models that went on learning kept a third and more."""

ENTROPY_GROWN, ACCURACY_LEFT = 2.0, 0.85
"""Entropy in that of the first steps from which on it runs away, while so much of the best plain accuracy is left or less. Healthy runs of
the lab stayed below 1.3 times; where a rate was too large by two to six, it doubled within ten steps, before accuracy had halved."""

COLLAPSE_STEPS = 3
"""Steps in a row without a right answer before a run can count as collapsed."""

COLLAPSE_WINDOW, COLLAPSE_GROUPS = 20, 50
"""Steps before them that say how often a group had right answers, and the groups that these count as at least: few prove little."""

COLLAPSE_FROM = 0.05
"""Plain accuracy of these steps from which on there was something to lose."""

COLLAPSE_CHANCE = 1e-6
"""Probability of so many groups without a right answer, had nothing changed, below which it is no chance."""

FALL_STEPS, FALL_ERRORS = 3, 4.0
"""Steps whose mean is held against the best, and the standard errors (of as many groups that are right or wrong) that are chance."""


class CollapseWatch:
    """Whether a run that had right answers has none any more, and no gradient to come back by.

    A group of a student with plain accuracy a has no right rollout with probability 1 - a at most, so n groups in a row have none with
    (1 - a)^n: below `COLLAPSE_CHANCE` the run has collapsed [zppo]. Few small batches prove nothing, and hard data takes long.

    Args:
        advantages: the method learns by them; distillation has a gradient where nothing is right.

    Attributes:
        good: the last step after which the weights were good: in the next one plain accuracy was half of the best mean of
            `COLLAPSE_WINDOW` steps or more. A fatal update is that of the last good-looking step, hence the one before it.
    """

    def __init__(self, *, advantages: bool = True) -> None:
        self.good = 0
        self._advantages = advantages
        self._best = 0.0
        self._before: deque[tuple[float, int]] = deque(maxlen=COLLAPSE_WINDOW)  # plain accuracy, plain groups
        self._none: list[tuple[int, int]] = []  # steps in a row with nothing right: number, plain groups
        self._last: deque[tuple[float, int]] = deque(maxlen=FALL_STEPS)

    @classmethod
    def of(cls, settings: Settings) -> CollapseWatch:
        """For a run with these settings."""
        return cls(advantages=not settings.method.resolve().distils)

    def see(self, step: int, metrics: Metrics) -> None:
        """Take in the metrics of a step."""
        accuracy = metrics.get("accuracy")
        plain = accuracy.get("plain") if isinstance(accuracy, Mapping) else None
        if accuracy is None or plain is None:  # nothing was graded, or an evaluation
            return
        groups = int(metrics.get("new_questions", 0)) + int(metrics.get("replayed_questions", 0))
        self._last.append((float(plain), groups))
        if self._advantages and not any(accuracy.values()) and metrics.get("nonzero_advantage_share") == 0:
            self._none.append((step, groups))
            return
        self._before.extend((0.0, n) for _, n in self._none)
        self._none.clear()
        self._before.append((float(plain), groups))
        self._best = max(self._best, self.before)
        if plain >= self._best / 2:
            self.good = step - 1

    @property
    def before(self) -> float:
        """Plain accuracy of the steps before those with nothing right."""
        return _mean(self._before, least=COLLAPSE_GROUPS)

    def fall(self, left: float = 0.5) -> tuple[float, float] | None:
        """(best mean plain accuracy of `COLLAPSE_WINDOW` steps, that of the last `FALL_STEPS`), where it has fallen to that share of it
        and by no chance; None where it has not."""
        groups, now = sum(n for _, n in self._last), _mean(self._last)
        chance = FALL_ERRORS * math.sqrt(self._best * (1 - self._best) / max(groups, 1)) if left <= 0.5 else 0.0
        fallen = len(self._last) == FALL_STEPS and now < left * self._best and self._best - now > chance
        return (self._best, now) if fallen else None

    @property
    def steps(self) -> tuple[int, int] | None:
        """First and last step with nothing right, where the run has collapsed; None where it has not."""
        if len(self._none) < COLLAPSE_STEPS or self.before < COLLAPSE_FROM:
            return None
        chance = (1 - self.before) ** sum(n for _, n in self._none)
        return (self._none[0][0], self._none[-1][0]) if chance < COLLAPSE_CHANCE else None

    def text(self, metrics: Metrics, settings: Settings, kept: Path | None) -> str:
        """The words for a run that has collapsed; `kept` is the checkpoint that it goes on from."""
        first, last = self.steps or (0, 0)
        rate, recipe = settings.train.learning_rate, (settings.output or Path()) / RECIPE
        cut, missing = metrics.get("truncated_share") or 0.0, metrics.get("no_answer_share") or 0.0
        look = f"{cut:.0%} of the completions were cut off" if cut > 0.5 else f"{missing:.0%} of the completions have no answer"
        go_on = (
            f"{kept} is from before that, and is gone on from; later ones are called *{COLLAPSED}. Set a third of it in {recipe}, then "
            f"`zppo resume {settings.output}`"
            if kept
            else f"No checkpoint is from before that (train.checkpoint_every: {settings.train.checkpoint_every}): start again with a third"
        )
        return (
            f"the run has collapsed: nothing was right in steps {first} to {last}, where {self.before:.0%} of the plain ones were before. "
            f"Now {look}, and no rollout has an advantage, so there is no gradient to come back by. Mostly the steps were too large "
            f"(train.learning_rate: {rate:g}). {go_on}; or let such a run go on with train.stop_on_collapse: false"
        )


def _mean(steps: Iterable[tuple[float, int]], least: int = 1) -> float:
    """Mean accuracy of steps, by their groups, which count as so many at least."""
    steps = list(steps)
    return sum(plain * n for plain, n in steps) / max(sum(n for _, n in steps), least)


class HealthChecks:
    """Warns of what a step's metrics show, each thing once in `EVERY` steps.

    Args:
        own_reward: the recipe grades with a user's reward function.
        advantages: the method learns by them; distillation has none.
        form: what completions should have, in a few words.
    """

    def __init__(self, *, own_reward: bool, advantages: bool = True, form: str = "\\boxed{} answer") -> None:
        self._advantages, self._form = advantages, form
        self._watches = [w for w in WATCHES if w.own_reward or not own_reward]
        self._said: dict[str, int] = {}
        self._some_right = own_reward  # which may be a number that never says right
        self._all_wrong = 0  # steps
        self._no_gradient = 0  # steps in a row
        self._collapse = CollapseWatch(advantages=advantages)
        self._entropies: list[float] = []  # of the first steps, then of the last ones

    @classmethod
    def of(cls, settings: Settings) -> HealthChecks:
        """What is worth watching in a run with these settings."""
        return cls(
            own_reward=settings.grading.reward is not None, advantages=not settings.method.resolve().distils, form=settings.answer_form.name
        )

    def remember(self, metrics: Metrics) -> None:
        """Take in a step of before the run was resumed; nothing is said about it."""
        self._nothing_right(metrics)
        self._count_steps(int(metrics.get("step", 0)), metrics)

    def advice(self, step: int, metrics: Metrics, example: str = "") -> list[str]:
        """Warnings that are due about the metrics of this step, or of an evaluation after it; `example` as `wrong_example` makes it."""
        due = []
        for watch in self._watches:
            value = watch.value(metrics)
            if value is not None and value > watch.limit and self._due(watch.name, step):
                text = watch.text if isinstance(watch.text, str) else watch.text(metrics)
                due.append(f"step {step}: {text.format(value=value, form=self._form)}")
        if self._nothing_right(metrics) and self._due("nothing right", step):
            due.append(
                f"step {step}: not one answer has been right in {self._all_wrong} steps, of the student's or a teacher's, though "
                f"{1 - (metrics.get('no_answer_share') or 0.0):.0%} of the completions have one. {example or 'See some in the report'}. "
                "Where they mean the same, the right answers stand in a form that the rules do not match: data.answer_after takes them out "
                "of a solution, a judge grades what has no one spelling (docs/data.md)"
            )
        self._count_steps(step, metrics)
        if self._advantages and self._no_gradient >= STEPS_WITHOUT_GRADIENT and self._due("no gradient", step):
            due.append(
                f"step {step}: no rollout of the last {self._no_gradient} steps has an advantage other than 0: "
                f"{_no_gradient(metrics, self._collapse.before)}"
            )
        if (fell := self._collapse.fall()) and "nonzero_advantage_share" in metrics and self._due("fall", step):
            due.append(
                f"step {step}: plain accuracy fell from {fell[0]:.0%} to {fell[1]:.0%}: the steps are too large. Stop (Ctrl-C), move the "
                f"checkpoints after step {self._collapse.good} away (the one before is kept), lower train.learning_rate to a third in the "
                "run's recipe.yaml, and resume"
            )
        if (rise := self._grown_entropy(metrics)) and self._due("entropy rises", step):
            due.append(
                f"step {step}: the entropy rose from {rise[0]:.2f} to {rise[1]:.2f} nats a token while plain accuracy falls: the updates "
                "of a step take the student too far, and it may lose all that it knows. Lower train.learning_rate to a third, or "
                "train.minibatches"
            )
        if (fall := self._lost_entropy(metrics)) and self._due("entropy", step):
            due.append(
                f"step {step}: the entropy fell from {fall[0]:.2f} to {fall[1]:.3f} nats a token: the student hardly explores any more, "
                "and what it does not solve by now it will not find. Go back to an earlier checkpoint with a lower train.learning_rate, or "
                "raise loss.clip_high"
            )
        return due

    def _count_steps(self, step: int, metrics: Metrics) -> None:
        self._collapse.see(step, metrics)
        share, entropy = metrics.get("nonzero_advantage_share"), metrics.get("entropy")
        if share is not None:  # a step's; an evaluation has no advantages
            self._no_gradient = 0 if share > 0 else self._no_gradient + 1
            if entropy is not None and math.isfinite(entropy):
                if len(self._entropies) == 2 * ENTROPY_STEPS:
                    del self._entropies[ENTROPY_STEPS]  # the oldest of the last ones
                self._entropies.append(float(entropy))

    def _lost_entropy(self, metrics: Metrics) -> tuple[float, float] | None:
        """(mean entropy of the first steps, of the last ones) where it has collapsed before the student had learned nearly everything."""
        if "nonzero_advantage_share" not in metrics or len(self._entropies) < 2 * ENTROPY_STEPS:
            return None
        first, last = fmean(self._entropies[:ENTROPY_STEPS]), fmean(self._entropies[-ENTROPY_STEPS:])
        plain = (metrics.get("accuracy") or {}).get("plain") or 0.0
        return (first, last) if last < ENTROPY_LEFT * first and plain < 0.9 else None

    def _grown_entropy(self, metrics: Metrics) -> tuple[float, float] | None:
        """(mean entropy of the first steps, of the last ones) where it has grown while accuracy falls."""
        if "nonzero_advantage_share" not in metrics or len(self._entropies) < 2 * ENTROPY_STEPS:
            return None
        first, last = fmean(self._entropies[:ENTROPY_STEPS]), fmean(self._entropies[-ENTROPY_STEPS:])
        return (first, last) if last >= ENTROPY_GROWN * first and self._collapse.fall(ACCURACY_LEFT) else None

    def _due(self, name: str, step: int) -> bool:
        """Whether a warning is not too soon; it counts as said."""
        if step - self._said.get(name, step - EVERY) < EVERY:
            return False
        self._said[name] = step
        return True

    def _nothing_right(self, metrics: Metrics) -> bool:
        """Whether every answer has been wrong for `STEPS_WITHOUT_RIGHT` steps: of people's runs the sign that no gold can match."""
        accuracy = metrics.get("accuracy")
        if isinstance(accuracy, Mapping) and accuracy:  # a step's, with something graded; an evaluation's is a number
            self._some_right |= any(accuracy.values()) or bool(metrics.get("teacher_correct"))
            self._all_wrong += (metrics.get("no_answer_share") or 0.0) < 1
            return not self._some_right and self._all_wrong >= STEPS_WITHOUT_RIGHT
        self._some_right |= bool(accuracy)
        return False

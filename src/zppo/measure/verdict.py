"""What a measurement says: histograms, shares, and in plain words whether the questions suit student and teacher."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from zppo.config.settings import Settings
from zppo.measure.answers import Answers
from zppo.report.charts import BLUE, GREEN, ORANGE, ChartSpec, Series
from zppo.report.page import page, sections
from zppo.report.tables import Table, percent
from zppo.runs.display import Whole

MUCH, SOME = 0.5, 0.2  # of the questions: shares that are useful, or that are worth a word [zppo]
FEW = 50  # questions on which shares are rough
UNREAD = 0.5  # of the answers without anything to read, from which on they say nothing of what a student knows
_MOST_LEVELS = 20


@dataclass(frozen=True, slots=True)
class Measured:
    """One question: its source and level, and what was answered to it; None where nobody was asked or reached."""

    source: str
    level: str
    student: Answers | None
    teacher: Answers | None


@dataclass(frozen=True, slots=True)
class Finding:
    """What the answers of a model to some questions say, or of both together. Shares are None where there is nothing to count.

    Attributes:
        count: questions with answers.
        accuracy: share of right answers.
        never, always: of the questions, those with no right answer, and with right ones alone.
        none, truncated: of the answers, those without an answer that could be extracted, and those that the limit stopped.
        tokens: mean of an answer.
    """

    count: int
    accuracy: float | None
    never: float | None
    always: float | None
    none: float | None
    truncated: float | None
    tokens: float | None


def finding(answers: Iterable[Answers | None]) -> Finding:
    """Of one model."""
    given = [each for each in answers if each is not None and each.n]
    total = sum(each.n for each in given)
    cut = [each.truncated for each in given if each.truncated is not None]
    return Finding(
        len(given),
        _share(sum(each.correct for each in given), total),
        _share(sum(each.correct == 0 for each in given), len(given)),
        _share(sum(each.correct == each.n for each in given), len(given)),
        _share(sum(each.none for each in given), total),
        _share(sum(cut), total) if len(cut) == len(given) else None,
        _share(sum(each.tokens for each in given), total),
    )


def _share(part: float, whole: int) -> float | None:
    return part / whole if whole else None


@dataclass(frozen=True, slots=True)
class DataVerdict:
    """All of it.

    Attributes:
        n: answers to each question.
        questions: every question.
        student, teacher: of each model; the teacher's count is 0 where it was not asked.
        hard: share of the questions with an accuracy below the threshold.
        solved: of the hard ones that the teacher was asked about, those that it got right at least once.
        neither: of the questions that both were asked about, those that nobody ever got right.
        useful: of the questions, those from which something can be learnt: the student gets some right, or none and the teacher some.
        unknown: of the questions, those that the student never gets right and the teacher was not asked about.
        words: sentences for a person, the verdict last.
    """

    n: int
    threshold: float
    questions: tuple[Measured, ...]
    student: Finding
    teacher: Finding
    hard: float
    solved: float | None
    neither: float | None
    useful: float
    unknown: float
    words: tuple[str, ...]


def judge_data(questions: Sequence[Measured], settings: Settings, n: int) -> DataVerdict:
    """What the answers say about a recipe's questions; there is at least one question that the student answered."""
    asked = [each for each in questions if each.student is not None and each.student.n]
    threshold = settings.zone.threshold
    hard = [each for each in asked if _accuracy(each.student) < threshold]
    shown = [each for each in hard if each.teacher is not None and each.teacher.n]
    both = [each for each in asked if each.teacher is not None and each.teacher.n]
    never = [each for each in asked if _accuracy(each.student) == 0]
    some = sum(0 < _accuracy(each.student) < 1 for each in asked)
    helped = sum(each.teacher is not None and each.teacher.correct > 0 for each in never)
    of = len(asked)
    verdict = DataVerdict(
        n,
        threshold,
        tuple(questions),
        finding(each.student for each in asked),
        finding(each.teacher for each in questions),
        len(hard) / of,
        _share(sum(each.teacher is not None and each.teacher.correct > 0 for each in shown), len(shown)),
        _share(sum(_accuracy(each.student) == 0 and _accuracy(each.teacher) == 0 for each in both), len(both)),
        (some + helped) / of,
        sum(each.teacher is None or not each.teacher.n for each in never) / of,
        (),
    )
    return replace(verdict, words=tuple(_words(verdict, settings)))


def _accuracy(answers: Answers | None) -> float:
    return (answers.accuracy if answers is not None else None) or 0.0


def _words(verdict: DataVerdict, settings: Settings) -> Iterable[str]:
    student, teacher = verdict.student, verdict.teacher
    yield (
        f"The student gets {percent(student.accuracy)} of its answers right. Of the questions, asked {verdict.n} times each, "
        f"{percent(student.never)} are never right and {percent(student.always)} always; {percent(verdict.hard)} are hard: below "
        f"zone.threshold = {verdict.threshold:g}."
    )
    if teacher.count:
        yield (
            f"The teacher gets {percent(teacher.accuracy)} of its answers right. Of the hard questions it gets "
            f"{percent(verdict.solved)} right at least once in {verdict.n}: so often there is one to show. On "
            f"{percent(verdict.neither)} of the questions neither is ever right."
        )
    yield from _mends(verdict, settings)
    if student.count < FEW:
        yield f"These are {student.count} questions: the shares are rough."
    yield _last_word(verdict, own_reward=settings.grading.reward is not None)


def _mends(verdict: DataVerdict, settings: Settings) -> Iterable[str]:
    """What could be better, and how."""
    student, teacher = verdict.student, verdict.teacher
    if (student.none or 0) >= SOME:
        cut = (student.truncated or 0) >= (student.none or 0) / 2
        mend = (
            f"most of these were cut off: raise rollout.max_new_tokens ({settings.rollout.max_new_tokens:,}), or take shorter tasks"
            if cut
            else "it does not end as the closing instruction asks: take one that follows it, words that it knows (prompts.closing: boxed "
            "or answer-line), or show it the form (data.examples: 2)"
        )
        yield f"In {percent(student.none)} of its answers nothing could be extracted from what the student wrote; {mend}."
    if (teacher.none or 0) >= SOME:
        yield (
            f"In {percent(teacher.none)} of its answers nothing could be extracted from what the teacher wrote: look at "
            "teacher.rollout.max_new_tokens and its chat template."
        )
    if (student.always or 0) >= SOME:
        yield "What is always right teaches nothing. Leave it out: data.filters: student_accuracy < 1"
    if (verdict.neither or 0) >= SOME / 2:
        yield (
            "Where neither is ever right, the right answer may be wrong, or one that no rule finds: look at some of them. Leave them "
            "out: data.filters: student_accuracy > 0 or teacher_accuracy > 0"
        )
    if teacher.count and verdict.solved is not None and verdict.solved < SOME:
        yield "On hardly any hard question there would be a right answer to show: take a stronger teacher, or easier questions."
    elif teacher.count and (teacher.accuracy or 0) <= (student.accuracy or 0):
        yield "The teacher is no better than the student: take a stronger one, or a method without a teacher (grpo-replay)."


def useful_filter(verdict: DataVerdict) -> str:
    """The filter that leaves the questions from which something can be learnt, as far as it is known."""
    return "student_accuracy < 1" + (" and (student_accuracy > 0 or teacher_accuracy > 0)" if verdict.teacher.count else "")


def _last_word(verdict: DataVerdict, *, own_reward: bool) -> str:
    useful, unknown, missing = verdict.useful, verdict.unknown, verdict.student.none or 0.0
    if missing >= UNREAD and not own_reward:  # which may have no answers to read
        return (
            f"Verdict: open. Nothing could be read in {percent(missing)} of the student's answers, so that what it knows was not measured: "
            "mend the form first, and measure again."
        )
    who = "student and teacher" if verdict.teacher.count else "the student"
    share = f"there is something to learn from {percent(useful)} of the questions"
    if useful and not verdict.student.accuracy:
        return (
            f"Verdict: the student is never right, so that its plain groups have no gradient: it can learn from the teacher's help alone, "
            f"on {percent(useful)} of the questions. Add easier ones, which it gets right now and then."
        )
    if useful >= MUCH:
        return f"Verdict: this data suits {who}; {share}."
    if unknown and useful + unknown >= SOME:
        return f"Verdict: {share}; whether help reaches the {percent(unknown)} that are never right is open: measure with --teacher."
    if useful >= SOME:
        return f"Verdict: this data suits {who} in part; {share}. Filters on what was measured leave that part."
    way = "too hard" if (verdict.student.never or 0) > (verdict.student.always or 0) else "too easy"
    return f"Verdict: this data does not suit {who}: it is {way}; {share}."


# --- how it is shown ------------------------------------------------------------------------------------------------

_EXACT = 12  # up to so many answers every number of right ones has a bar of its own


def bins(n: int) -> list[tuple[str, Callable[[Answers], bool]]]:
    """(name, whether answers belong to it), from none right to all right."""
    if n <= _EXACT:
        return [(f"{k} of {n}", lambda answers, k=k: answers.correct == k) for k in range(n + 1)]  # type: ignore[misc]
    tenths: list[tuple[str, Callable[[Answers], bool]]] = [
        (f"to {tenth + 1}0%", lambda answers, tenth=tenth: 0 < answers.correct < answers.n and _tenth(answers) == tenth)  # type: ignore[misc]
        for tenth in range(10)
    ]
    first: tuple[str, Callable[[Answers], bool]] = ("0%", lambda answers: answers.correct == 0)
    return [first, *tenths, ("100%", lambda answers: answers.correct == answers.n)]


def _tenth(answers: Answers) -> int:
    return min(9, (10 * answers.correct - 1) // answers.n)


def counts(answers: Sequence[Answers], n: int) -> list[int]:
    """How many questions are in each of `bins`."""
    return [sum(belongs(each) for each in answers) for _, belongs in bins(n)]


def print_verdict(verdict: DataVerdict, console: Console) -> None:
    """Histograms, tables and words."""
    columns = [("student", [each.student for each in verdict.questions])]
    columns += [("teacher", [each.teacher for each in verdict.questions])] if verdict.teacher.count else []
    table = RichTable(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column("right", justify="right", no_wrap=True)
    width = max(8, (min(console.width, 120) - 12) // len(columns) - 20)
    cells = []
    for name, answers in columns:
        given = [each for each in answers if each is not None and each.n]
        table.add_column(name, no_wrap=True)
        table.add_column("", justify="right", no_wrap=True)
        table.add_column("", justify="right", no_wrap=True)
        sizes = counts(given, verdict.n)
        cells.append([(_bar(size, max(sizes), width), f"{size:,}", percent(size / len(given))) for size in sizes])
    for number, (label, _) in enumerate(bins(verdict.n)):
        table.add_row(label, *(Text(text) for column in cells for text in column[number]))
    console.print(table)
    for each in tables(verdict):
        console.print()
        console.print(Whole(_rich(each)))
    console.print()
    for words in verdict.words:
        console.print(Text(words, style="bold" if words.startswith("Verdict") else ""), highlight=False)


def _bar(size: int, largest: int, width: int) -> str:
    eighths = round(8 * width * size / largest) if largest else 0
    return "█" * (eighths // 8) + ("", "▏", "▎", "▍", "▌", "▋", "▊", "▉")[eighths % 8] or ("▏" if size else "")


def _rich(table: Table) -> RichTable:
    shown = RichTable(title=table.title, title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for number, name in enumerate(table.columns):
        shown.add_column(name, justify="right" if number else "left", overflow="fold")
    for row in table.rows:
        shown.add_row(*map(Text, row))
    return shown


def tables(verdict: DataVerdict) -> list[Table]:
    """Both models, then sources and levels where there are several."""
    teacher = bool(verdict.teacher.count)
    whole = [("student", verdict.student), *([("teacher", verdict.teacher)] if teacher else [])]
    rows = tuple(
        (
            name,
            f"{found.count:,}",
            *map(percent, (found.accuracy, found.never, found.always, found.none, found.truncated)),
            "–" if found.tokens is None else f"{found.tokens:,.0f}",
        )
        for name, found in whole
    )
    columns = ("", "questions", "right", "never", "always", "no answer", "cut off", "tokens")
    made = [Table("models", _SECTION, "Both models" if teacher else "The student", columns, rows, _CAPTION)]
    for id, title in (("source", "By source"), ("level", "By level")):
        groups: dict[str, list[Measured]] = {}
        for each in verdict.questions:
            groups.setdefault(str(getattr(each, id)), []).append(each)
        if 1 < len(groups) <= _MOST_LEVELS:
            named = tuple(_group_row(name or "–", group, teacher) for name, group in groups.items())
            heads = ("", "questions", "student", "never", "always", *(("teacher", "neither") if teacher else ()))
            made.append(Table(id, _SECTION, title, heads, named))
    return made


def _group_row(name: str, group: Sequence[Measured], teacher: bool) -> tuple[str, ...]:
    student, other = finding(each.student for each in group), finding(each.teacher for each in group)
    both = [each for each in group if each.student and each.teacher and each.student.n and each.teacher.n]
    neither = _share(sum(_accuracy(each.student) == 0 and _accuracy(each.teacher) == 0 for each in both), len(both))
    more = (percent(other.accuracy), percent(neither)) if teacher else ()
    return (name, f"{len(group):,}", percent(student.accuracy), percent(student.never), percent(student.always), *more)


_SECTION = "Accuracies"
_CAPTION = "Right, no answer and cut off are shares of the answers; never and always (right) of the questions."


def charts(verdict: DataVerdict) -> list[ChartSpec]:
    """Histograms of each model, and of the teacher on the student's hard questions."""
    hard = [
        each for each in verdict.questions if each.student is not None and each.student.n and _accuracy(each.student) < verdict.threshold
    ]
    wanted = [
        ("student", "Student", BLUE, [each.student for each in verdict.questions], "How often the student is right."),
        ("teacher", "Teacher", ORANGE, [each.teacher for each in verdict.questions], "How often the teacher is right."),
        (
            "teacher-hard",
            "Teacher on hard questions",
            GREEN,
            [each.teacher for each in hard],
            f"On the questions that the student gets right less often than zone.threshold = {verdict.threshold:g}: what stands at the left "
            "nobody can help with.",
        ),
    ]
    made = []
    for id, title, colour, answers, caption in wanted:
        given = [each for each in answers if each is not None and each.n]
        if given:
            names = [name for name, _ in bins(verdict.n)]
            series = Series("questions", names, [float(size) for size in counts(given, verdict.n)], colour)
            made.append(
                ChartSpec(id, _SECTION, title, (series,), kind="bar", caption=caption, x_title="right answers", y_title="questions")
            )
    return made


def verdict_page(verdict: DataVerdict, title: str, head: Sequence[tuple[str, str]]) -> str:
    """A page that holds all it shows."""
    models = ["what the student does", *(["what the teacher does"] if verdict.teacher.count else [])]
    labels = [*models, *["to mend"] * len(verdict.words)]
    return page(
        {
            "title": title,
            "outcome": verdict.words[-1],
            "head": [*head, *zip(labels, verdict.words[:-1], strict=False)],
            "sections": sections(tables(verdict), charts(verdict)),
            "index": None,
            "footer": "Made by zppo data measure. Charts: plotly.js, under the MIT licence.",
        },
        [],
    )

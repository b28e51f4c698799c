"""Asks student and teacher about questions, with the prompts, sampling, engines and grading of a recipe, a few questions at a time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache, partial
from types import TracebackType
from typing import Self

from accelerate import Accelerator
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import PreTrainedModel

from zppo.config.settings import Settings
from zppo.core.draws import draw_key
from zppo.core.types import Question
from zppo.distributed.launcher import read_launch
from zppo.distributed.parallel import ReplicatedWeights, make_accelerator
from zppo.engines.base import Engine
from zppo.engines.loading import check_kernels
from zppo.errors import LauncherError, SettingsError
from zppo.measure.answers import AnswerFile, Answers, Who, of_rollouts, of_verdicts
from zppo.models.student_model import load_chat, load_student
from zppo.names import model_folder
from zppo.rollout.frozen_models import FrozenModels, FrozenTeacher
from zppo.rollout.grading import grades_while_sampling, make_scorer, rule_grading
from zppo.rollout.run_data import RunData, check_vocabulary, load_short
from zppo.rollout.step_parts import make_renderer
from zppo.rollout.student import Answered, PromptRenderer, Score, StudentSampler
from zppo.runs.display import Progress as Loading
from zppo.runs.display import show, warn
from zppo.step_log import StepLog
from zppo.teacher.interface import TeacherRequest
from zppo.train.assemble import autocast_type, make_engine, make_engine_check, make_forward, start_vllm

AT_ONCE = 64
"""Questions that are asked about together: what a kill can cost [zppo]."""
EVERY = 30.0
"""Seconds between lines where there is no terminal."""

Ask = Callable[[Sequence[Question], StepLog], list[Answers]]


@dataclass(frozen=True, slots=True)
class Asking:
    """Models that are ready to be asked.

    Attributes:
        questions: those whose prompts are short enough.
        ask: of each model: asks about some questions, and gives the answers in their order.
        at_once: questions that are asked about together.
    """

    questions: list[Question]
    ask: dict[Who, Ask]
    at_once: dict[Who, int]


@contextmanager
def ready_models(
    settings: Settings, data: RunData, n: int, wanted: Callable[[list[Question]], list[Who]], console: Console
) -> Iterator[Asking]:
    """Loads and checks what a measurement needs.

    Args:
        data: the questions; those with long prompts are left out here.
        n: answers to each question.
        wanted: which models are to be asked, given the questions; the others are not loaded.

    Raises:
        ZPPOError: what does not fit, by name.
    """
    with ExitStack() as stack:
        rule = stack.enter_context(rule_grading(settings))
        progress = stack.enter_context(Loading(console))
        launch = read_launch()
        if launch.processes > 1:
            raise LauncherError("a measurement runs in one process: start it without a launcher; a vLLM server may have many GPUs")
        accelerator = make_accelerator(settings, launch)
        inputs = data.image_inputs
        say = partial(warn, console)
        frozen = FrozenModels(settings, accelerator.device, inputs, doing=progress.doing, warn=say)
        stack.callback(frozen.close)
        chat = load_chat(settings.student, inputs.limits, inputs.cache) if inputs else load_chat(settings.student)
        renderer = make_renderer(settings, chat, examples=data.examples)
        progress.doing(f"reading the prompts of {len(data.train):,} questions")
        questions, _ = load_short(settings, data, renderer, cache(lambda question: len(renderer.plain(question).ids)), console)
        who = wanted(questions)
        ask: dict[Who, Ask] = {}
        own = settings.teacher
        if "teacher" in who and own is not None:
            frozen.teachers.append(frozen.load(own, "teacher"))
            frozen.settings_of.append(own)
            frozen.teachers[0].check(own.how(own.rollout), "rollout", n)
            frozen.check_images(max((len(question.images) for question in questions), default=0))
        if who:
            score = make_scorer(
                settings, rule, questions, chat, frozen.teachers, lambda own: frozen.load(own, "judge" if settings.judge else "teacher")
            )
        if frozen.teachers:
            ask["teacher"] = partial(_ask_teacher, settings, frozen.teachers[0], renderer, score, n)
        if "student" in who:
            check_kernels(model_folder(settings.student.model), accelerator.device, settings.student.revision)
            progress.doing(f"loading the student {settings.student.model}")
            student = load_student(settings, None, bf16=autocast_type(accelerator) is not None, images=inputs is not None)
            check_vocabulary(student.model, renderer, questions)
            progress.doing("starting vLLM" if settings.rollout.engine == "vllm" else "checking the sampler")
            engine = _checked_engine(settings, student.model, renderer, questions, accelerator, ReplicatedWeights(), say)
            background = grades_while_sampling(settings, score)
            sampler = StudentSampler(
                engine, renderer, score, settings.rollout.sampling(), n, settings.seed, grades_while_sampling=background
            )
            ask["student"] = partial(_ask_student, sampler)
        progress.end()
        at_once = max(AT_ONCE, 2 * own.concurrency) if own is not None and own.base_urls else AT_ONCE
        yield Asking(questions, ask, {"student": min(AT_ONCE, settings.rollout.batch_size), "teacher": at_once})


def _checked_engine(
    settings: Settings,
    model: PreTrainedModel,
    renderer: PromptRenderer,
    questions: Sequence[Question],
    accelerator: Accelerator,
    weights: ReplicatedWeights,
    say: Callable[[str], None],
) -> Engine:
    """What samples, with the student's weights, as in a run."""
    weights.prepare(model, accelerator)
    chat = renderer.chat
    engine: Engine = make_engine(settings, model, chat, autocast_type(accelerator), say)
    if settings.rollout.engine == "vllm":
        engine = start_vllm(settings, model, chat, accelerator)
    fixed = renderer.plain(next((question for question in questions if question.images), questions[0]))
    make_engine_check(settings, engine, make_forward(settings, model, chat), fixed, accelerator, weights).refresh(0)
    return engine


def _ask_student(sampler: StudentSampler, questions: Sequence[Question], log: StepLog) -> list[Answers]:
    sampler.renderer.chat.forget_images()
    groups = sampler.rollout([sampler.renderer.plain(question) for question in questions], log, purpose="measure")
    show = sampler.renderer.chat.show_short
    return [of_rollouts(group.rollouts, show(group.prompt.ids + group.prompt.forced_ids)) for group in groups]


def _ask_teacher(
    settings: Settings, teacher: FrozenTeacher, renderer: PromptRenderer, score: Score, n: int, questions: Sequence[Question], log: StepLog
) -> list[Answers]:
    own = settings.teacher
    assert own is not None
    requests = [
        TeacherRequest(
            renderer.book.plain(question),
            tuple(draw_key(settings.seed, "measure", "teacher", question.id, index) for index in range(n)),
            question.images,
        )
        for question in questions
    ]
    replies = teacher.complete(requests, own.how(own.rollout), log)
    for reply in replies:
        log.note_error("teacher", reply.error)
    given = [
        [Answered(question, text, reply.think_open, "teacher") for text in reply.texts if text is not None]
        for question, reply in zip(questions, replies, strict=True)
    ]
    verdicts = iter(score([each for texts in given for each in texts], log))
    prompts = ["\n\n".join(f"{message.role}: {message.content}" for message in request.messages) for request in requests]
    return [
        of_verdicts([each.completion for each in texts], [next(verdicts) for _ in texts], reply.completion_tokens, prompt)
        for texts, reply, prompt in zip(given, replies, prompts, strict=True)
    ]


def keyed_sample(questions: Sequence[Question], size: int | None, seed: int) -> list[Question]:
    """So many of the questions, in their order, drawn by (seed, question id): a larger sample adds to a smaller one."""
    if size is None or size >= len(questions):
        return list(questions)
    chosen = {question.id for question in sorted(questions, key=lambda question: draw_key(seed, "measure", question.id))[:size]}
    return [question for question in questions if question.id in chosen]


class Bar:
    """How far a measurement is, and how long it takes: a bar in a terminal, now and then a line elsewhere."""

    def __init__(self, console: Console, name: str, total: int) -> None:
        self._console, self._name, self._total = console, name, total
        self._began = self._said = time.monotonic()
        self._task = TaskID(0)
        clocks = TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn()
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), *clocks
        self._bar = Progress(*columns, console=console, transient=True) if console.is_terminal else None

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
            self._task = self._bar.add_task(self._name, total=self._total)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar:
            self._bar.stop()

    def part(self, before: int, name: str, done: int, total: int) -> None:
        """What a `StepLog` tells of the questions that are asked now, which so many answers came before."""
        if name == "sampling" and total:
            self.at(before + done)

    def at(self, done: int) -> None:
        """So many answers are there."""
        now = time.monotonic()
        if self._bar:
            self._bar.update(self._task, completed=done)
        elif done and now - self._said >= EVERY:
            self._said = now
            left = (now - self._began) / done * (self._total - done)
            show(self._console, f"{self._name}: {done:,} of {self._total:,} answers, about {left / 60:,.0f} min left")


def ask_all(asking: Asking, who: Who, questions: Sequence[Question], n: int, answers: AnswerFile, console: Console) -> int:
    """Asks a model about the questions that it was not asked about yet; how many stay open, since model or judge could not be reached.

    Raises:
        StorageError: the answers cannot be kept.
    """
    todo = [question for question in questions if answers.get(who, question) is None]
    if not todo:
        return 0
    size, opened = asking.at_once[who], 0
    with Bar(console, f"asking the {who}", n * len(todo)) as bar:
        for first in range(0, len(todo), size):
            part = todo[first : first + size]
            log = StepLog(watch=partial(bar.part, n * first))
            given = list(zip(part, asking.ask[who](part, log), strict=True))
            answers.add(who, [(question, each) for question, each in given if each.n == n])
            for text in log.warnings.values():
                warn(console, text)
            missing = sum(each.n < n for _, each in given)
            opened += missing
            bar.at(n * (first + len(part)))
            if missing == len(part):  # nobody answers any more
                opened += len(todo) - first - len(part)
                warn(console, f"the {who}'s answers cannot be had any more: {'; '.join(log.errors.values()) or 'no reply'}")
                break
    return opened


def check_teacher(settings: Settings) -> None:
    """Whether the recipe has a teacher to ask. SettingsError where not."""
    if settings.teacher is None:
        raise SettingsError("--teacher asks the recipe's teacher too, and it has none: set teacher.model, or leave --teacher out")

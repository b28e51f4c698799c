"""Puts the parts of a run together from its settings; everything is checked here, before the run folder is made."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console
from transformers import PreTrainedModel

from zppo.config.recipe import dump_recipe
from zppo.config.settings import Settings
from zppo.core.replay import PromptReplayBuffer
from zppo.core.types import Question
from zppo.data.order import steps_per_epochs
from zppo.distributed.parallel import Weights
from zppo.engines.chat import Chat
from zppo.engines.image_check import check_sight
from zppo.engines.transformers import TransformersEngine
from zppo.engines.vllm import require_vllm
from zppo.errors import SettingsError
from zppo.models.student import Student, context_length, load_chat, load_student
from zppo.prompts.book import PromptBook
from zppo.prompts.neutralise import Neutraliser
from zppo.rollout.frozen_models import Staff
from zppo.rollout.grading import make_scorer
from zppo.rollout.questions import RunData, check_vocabulary, load_short
from zppo.rollout.reformulated import grades_beside, make_asker, make_zone
from zppo.rollout.student import Roller, Score, Speaker
from zppo.rollout.teacher import TimedTeacher
from zppo.runs.display import Progress, warn
from zppo.runs.log import RunLog, SilentLog
from zppo.runs.signals import Stop
from zppo.train.advice import Adviser, TimedScore
from zppo.train.checkpointer import Checkpointer
from zppo.train.make_learner import make_learner, make_reformulations
from zppo.train.origin import origin_of
from zppo.train.student_engine import StudentEngine, make_guard, start_vllm
from zppo.train.trainer import Trainer


@dataclass(frozen=True, slots=True)
class Assembled:
    """A run that is ready to go."""

    trainer: Trainer
    student: Student
    chat: Chat
    origin: dict[str, Any]  # what it trains from; every checkpoint says so
    weights: Weights


def autocast_type(accelerator: Accelerator) -> torch.dtype | None:
    """What a run computes in, where that is not the type of its weights."""
    return torch.bfloat16 if accelerator.mixed_precision == "bf16" else None


def make_engine(
    settings: Settings,
    model: PreTrainedModel,
    chat: Chat,
    autocast_dtype: torch.dtype | None = None,
    say: Callable[[str], None] | None = None,
) -> TransformersEngine:
    """The sampling engine over a model's current weights.

    Args:
        autocast_dtype: bf16 where the run is: weights are then turned into it once for all tokens, instead of once a token.
        say: told when memory has run out and what fits from then on.
    """
    return TransformersEngine(
        model,
        chat.eos_ids(model),
        chat.pad_id(model),
        chat.banned_ids(model),
        max_rows=settings.rollout.max_rows,
        autocast_dtype=autocast_dtype,
        say=say,
        sight=chat.sight,
    )


def assemble(
    settings: Settings,
    data: RunData,
    run: Path,
    start: Path | None,
    score: Score,
    staff: Staff,
    accelerator: Accelerator,
    weights: Weights,
    console: Console,
    stop: Stop,
) -> Assembled:
    """Loads models and templates, checks that they fit together, and builds the trainer.

    Args:
        data: the questions, and how the models see.
        run: where the trainer will write; nothing is written here.
        start: a checkpoint to take weights and optimizer from; the trainer's state is the caller's.
        staff: the frozen models.
        weights: the processes of the run; its data must be the same in all of them.
        stop: ends the run where nothing is lost by it.

    Raises:
        ZPPOError: what does not fit, by name.
    """
    if settings.rollout.engine == "vllm":
        require_vllm()  # before models are loaded
    rule, method = TimedScore(score), settings.method.resolve()
    reformulations = make_reformulations(method, settings.zone.prefix_fraction)
    seeing, teachers = data.seeing, staff.teachers
    chat = load_chat(settings.student, seeing.limits, seeing.cache) if seeing else load_chat(settings.student)
    special = {*chat.special_texts, *(text for t in teachers for text in t.special_texts)}
    speaker = Speaker(PromptBook(settings.prompts, Neutraliser(special)), chat)
    length = cache(lambda question: len(speaker.plain(question).ids))  # two checks ask for it
    questions, held_out = load_short(settings, data, speaker, length, console)
    staff.check_images(max((len(question.images) for question in questions), default=0))
    scorer = make_scorer(
        settings,
        rule,
        [*questions, *held_out],
        chat,
        teachers,
        lambda own: staff.load(own, "judge" if settings.judge else "teacher"),
    )
    student = load_student(settings, start, bf16=autocast_type(accelerator) is not None, images=seeing is not None)
    model, say = student.model, partial(warn, console)
    check_vocabulary(model, speaker, questions)
    _check_context(settings, context_length(model), questions, held_out, length)  # an engine may take minutes to start
    team = weights.team
    team.check_same("recipe and questions", (dump_recipe(settings), questions, held_out))
    asked = [TimedTeacher(team.teacher(teacher)) for teacher in teachers]
    asker = make_asker(settings, asked, speaker, team.score(scorer))
    sampling = settings.rollout.sampling()
    steps = settings.train.steps
    if steps is None:
        steps = steps_per_epochs(len(questions), settings.rollout.batch_size, settings.train.epochs)
    origin = origin_of(settings, questions, model.config, accelerator.num_processes)
    learner, optimizer = make_learner(
        settings, model, chat, start, accelerator, teachers, asker, weights, say, lambda: stop.wanted
    )
    own = make_engine(settings, model, chat, autocast_type(accelerator), say)
    if chat.sight is not None:
        check_sight(own, chat, settings.student.model)  # whoever samples, it is trained here
    engine: StudentEngine = own if settings.rollout.engine != "vllm" else start_vllm(settings, model, chat, accelerator)
    _check_context(settings, engine.context, questions, held_out, length)
    watched = speaker.plain(next((q for q in questions if q.images), questions[0]))  # the tower is watched too
    if chat.sight is not None:
        chat.sight.cache.pin({image.sha256 for image in watched.images})
    guard = make_guard(settings, engine, model, watched, chat, accelerator, weights)
    guard.refresh(0)  # a wrong engine is found before anything is written
    trainer = Trainer(
        settings,
        steps=steps,
        questions=questions,
        held_out=held_out,
        roller=Roller(
            engine,
            speaker,
            scorer,
            sampling,
            settings.rollout.group_size,
            settings.seed,
            team,
            weights.whole,
            beside=grades_beside(settings, scorer),
        ),
        zone=make_zone(settings, reformulations, asked, speaker, asker, engine.context),
        learner=learner,
        guard=guard,
        rule=rule,
        adviser=Adviser(own_reward=settings.grading.reward is not None),
        buffer=PromptReplayBuffer(settings.zone.buffer_capacity, settings.zone.threshold, settings.seed),
        log=RunLog(run) if team.main else SilentLog(run),
        progress=Progress(console, steps, ("plain", *(r.kind for r in reformulations)), replay=method.replay),
        checkpoint=Checkpointer(settings.train, run, student, optimizer, origin, weights),
        stop=stop,
        scorer=scorer,
        service=staff.take_service,
        team=team,
    )
    return Assembled(trainer, student, chat, origin, weights)


def _check_context(
    settings: Settings,
    context: int | None,
    questions: Sequence[Question],
    held_out: Sequence[Question],
    length: Callable[[Question], int],
) -> None:
    """Every plain prompt plus its token limit must fit the model."""
    uses = (("rollout", questions, settings.rollout), ("eval", held_out, settings.eval))
    for name, asked, sampling in uses:
        tokens, longest = max(((length(q), q.id) for q in asked), default=(0, ""))
        if context is not None and asked and tokens + sampling.max_new_tokens > context:
            raise SettingsError(
                f"{name}.max_new_tokens is {sampling.max_new_tokens}, and the prompt of question {longest!r} has {tokens} tokens: "
                f"together more than the model's context of {context}. Lower {name}.max_new_tokens or data.max_prompt_tokens"
            )

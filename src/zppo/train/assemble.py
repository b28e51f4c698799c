"""Puts the parts of a run together from its settings; everything is checked here, before the run folder is made."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console
from transformers import PreTrainedModel

from zppo.core.replay import PromptReplayBuffer
from zppo.core.types import Question
from zppo.data.load import drop_long, load_questions
from zppo.data.order import steps_per_epochs
from zppo.engines.chat import Chat
from zppo.engines.transformers import TransformersEngine
from zppo.errors import DataError, SettingsError
from zppo.grading import Grader
from zppo.grading.base import Verdict
from zppo.grading.reward import load_reward
from zppo.prompts.book import PromptBook
from zppo.prompts.neutralise import Neutraliser
from zppo.teacher.base import Teacher, TeacherSampling
from zppo.teacher.compress import Compressor, token_tail
from zppo.teacher.local import LocalTeacher
from zppo.train import checkpoint
from zppo.train.models import context_length, load_chat, load_model, read_template, resolve_model
from zppo.train.progress import Progress
from zppo.train.rollouts import Answered, Roller, Score, Speaker
from zppo.train.runlog import RunLog
from zppo.train.settings import Settings
from zppo.train.trainer import Trainer
from zppo.train.update import Updater
from zppo.train.zone import ZoneBuilder


@dataclass(frozen=True, slots=True)
class Assembled:
    """A run that is ready to go."""

    trainer: Trainer
    model: PreTrainedModel
    chat: Chat


@contextmanager
def scoring(settings: Settings) -> Iterator[Score]:
    """The recipe's grading for the length of a run: a reward function of the user's, else the rule grader and its workers."""
    if settings.grading.reward:
        reward = load_reward(settings.grading.reward)
        yield lambda answered: [reward(a.completion, a.question, a.think_open) for a in answered]
        return
    with Grader(deadline=settings.grading.deadline, workers=settings.grading.workers) as grader:

        def score(answered: Sequence[Answered]) -> list[Verdict]:
            return grader.grade_many([(a.completion, a.question.gold, a.think_open) for a in answered])

        yield score


def make_accelerator(settings: Settings) -> Accelerator:
    """Device and precision by the recipe.

    Raises:
        SettingsError: several processes were launched.
    """
    on_cpu = settings.train.device == "cpu" or not torch.cuda.is_available()
    bf16 = settings.train.precision == "bf16" or (settings.train.precision == "auto" and not on_cpu)
    accelerator = Accelerator(cpu=on_cpu, mixed_precision="bf16" if bf16 else "no")
    if accelerator.num_processes > 1:
        raise SettingsError(
            f"{accelerator.num_processes} processes were started, but training runs in one process so far: start `zppo train` "
            "without a launcher"
        )
    return accelerator


def make_engine(settings: Settings, model: PreTrainedModel, chat: Chat) -> TransformersEngine:
    """The sampling engine over a model's current weights."""
    return TransformersEngine(
        model, chat.eos_ids(model), chat.pad_id(model), chat.banned_ids(model), max_rows=settings.rollout.max_rows
    )


def assemble(
    settings: Settings, run: Path, start: Path | None, score: Score, accelerator: Accelerator, console: Console
) -> Assembled:
    """Loads data, models and templates, checks that they fit together, and builds the trainer.

    Args:
        run: where the trainer will write; nothing is written here.
        start: a checkpoint to take weights and optimizer from; the trainer's state is the caller's.

    Raises:
        ZPPOError: what does not fit, by name.
    """
    method = settings.method.resolve()
    chat = load_chat(settings.student)
    teacher = _load_teacher(settings, accelerator) if method.needs_teacher else None
    teacher_texts = teacher.special_texts if teacher else ()
    speaker = Speaker(PromptBook(settings.prompts, Neutraliser({*chat.special_texts, *teacher_texts})), chat)
    _check_templates(method.reformulations, speaker.book)
    questions = _load_questions(settings, settings.data.train, settings.data.limit, speaker, console)
    held_out = (
        _load_questions(settings, settings.data.eval, settings.data.eval_limit, speaker, console)
        if settings.data.eval
        else []
    )
    model = load_model(
        checkpoint.model_folder(start) if start else resolve_model(settings.student.model),
        dtype=torch.float32,
        revision=None if start else settings.student.revision,
        attention=settings.student.attention,
    )
    _check_context(settings, model, [*questions, *held_out], speaker)
    updater, optimizer = _make_updater(settings, model, chat, start, accelerator)
    sampling = settings.rollout.sampling()
    epochs = settings.train.epochs
    steps = (
        settings.train.steps
        if settings.train.steps is not None
        else steps_per_epochs(len(questions), settings.rollout.batch_size, epochs)
    )
    trainer = Trainer(
        settings,
        steps=steps,
        questions=questions,
        held_out=held_out,
        roller=Roller(
            make_engine(settings, model, chat), speaker, score, sampling, settings.rollout.group_size, settings.seed
        ),
        zone=_make_zone(settings, teacher, speaker, score, context_length(model)),
        updater=updater,
        buffer=PromptReplayBuffer(settings.zone.buffer_capacity, settings.zone.threshold, settings.seed),
        log=RunLog(run),
        progress=Progress(console, steps, ("plain", *method.reformulations), replay=method.replay),
        checkpoint=_checkpointer(settings, run, model, optimizer),
    )
    return Assembled(trainer, model, chat)


def _load_teacher(settings: Settings, accelerator: Accelerator) -> LocalTeacher | None:
    teacher = settings.teacher
    if teacher is None:
        return None
    device = accelerator.device if teacher.device == "auto" else torch.device(teacher.device)
    loaded = LocalTeacher.load(
        resolve_model(teacher.model),
        revision=teacher.revision,
        device=device,
        dtype=torch.float32 if device.type == "cpu" else torch.bfloat16,
        template=read_template(teacher),
        attention=teacher.attention,
        max_rows=settings.rollout.max_rows,
    )
    for use in (teacher.rollout, teacher.compression):
        loaded.check(teacher.how(use))
    return loaded


def _make_zone(
    settings: Settings, teacher: Teacher | None, speaker: Speaker, score: Score, context: int | None
) -> ZoneBuilder:
    method, student = settings.method.resolve(), settings.rollout.sampling()
    if settings.teacher is None:
        rollout, compression, cap, enabled, lazy = TeacherSampling(student), TeacherSampling(student), 1, False, True
    else:
        use = settings.teacher.compression
        rollout, compression = settings.teacher.how(settings.teacher.rollout), settings.teacher.how(use)
        cap, enabled, lazy = use.max_new_tokens, use.enabled, settings.teacher.ask == "lazy"
    return ZoneBuilder(
        method.reformulations,
        teacher=teacher,
        teacher_rollout=rollout,
        compressor=Compressor(
            teacher, speaker.book, compression, token_tail(speaker.chat.tokenizer, cap), enabled=enabled
        ),
        speaker=speaker,
        score=score,
        settings=settings.zone,
        seed=settings.seed,
        context=context,
        max_new_tokens=student.max_new_tokens,
        lazy=lazy,
    )


def _make_updater(
    settings: Settings, model: PreTrainedModel, chat: Chat, start: Path | None, accelerator: Accelerator
) -> tuple[Updater, torch.optim.Optimizer]:
    train, sampling = settings.train, settings.rollout.sampling()
    if train.old_logprobs == "sampler" and not sampling.exact:
        raise SettingsError(
            "train.old_logprobs is sampler, but rollout.top_p, top_k, min_p or a penalty is active: the sampler's log-probs are no old "
            "log-probs then. Use train.old_logprobs=auto"
        )
    model.requires_grad_(True)
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=train.learning_rate,
        betas=train.betas,
        eps=train.adam_eps,
        weight_decay=train.weight_decay,
    )
    prepared, optimizer = accelerator.prepare(model, optimizer)
    if start:
        checkpoint.load_optimizer(start, optimizer)
    exact = sampling.exact and accelerator.mixed_precision == "no"
    updater = Updater(
        prepared,
        optimizer,
        accelerator,
        train=train,
        loss=settings.loss,
        seed=settings.seed,
        temperature=sampling.temperature,
        banned_ids=tuple(sorted(chat.banned_ids(model))),
        pad_id=chat.pad_id(model),
        sampler_is_exact=train.old_logprobs == "sampler" or (train.old_logprobs == "auto" and exact),
    )
    return updater, optimizer


def _checkpointer(
    settings: Settings, run: Path, model: PreTrainedModel, optimizer: torch.optim.Optimizer
) -> Callable[[int, Mapping[str, Any]], Path]:
    def save(step: int, state: Mapping[str, Any]) -> Path:
        return checkpoint.save(run, step, model, optimizer, state, keep=settings.train.keep_checkpoints)

    return save


def _load_questions(
    settings: Settings, source: str, limit: int | None, speaker: Speaker, console: Console
) -> list[Question]:
    """Questions whose plain prompt is short enough; how many were dropped is said."""
    questions = load_questions(source, settings.data.columns, limit)
    for question in questions:
        if question.images:
            raise DataError(
                f"{source}: question {question.id!r} has images, and training on images is not built yet: leave the column out"
            )
    most = settings.data.max_prompt_tokens
    kept, dropped = drop_long(questions, lambda q: len(speaker.plain(q).ids), most)
    if not kept:
        raise DataError(f"{source}: all {dropped} prompts have more than {most} tokens: raise data.max_prompt_tokens")
    if dropped:
        console.print(
            f"{source}: {dropped} of {len(questions)} questions dropped, their prompts have more than {most} tokens"
        )
    return kept


def _check_templates(kinds: Sequence[str], book: PromptBook) -> None:
    for kind in kinds:
        if kind not in book.names():
            raise SettingsError(
                f"the method asks again with {kind!r}, which has no template: add prompts.{kind} to the recipe"
            )


def _check_context(settings: Settings, model: PreTrainedModel, questions: Sequence[Question], speaker: Speaker) -> None:
    """Every plain prompt plus the token limit must fit the model."""
    context = context_length(model)
    if context is None:
        return
    longest = max(questions, key=lambda q: len(speaker.plain(q).ids))
    tokens = len(speaker.plain(longest).ids)
    for name, limit in (("rollout", settings.rollout.max_new_tokens), ("eval", settings.eval.max_new_tokens)):
        if tokens + limit > context:
            raise SettingsError(
                f"{name}.max_new_tokens is {limit}, and the prompt of question {longest.id!r} has {tokens} tokens: together more than the "
                f"model's context of {context}. Lower {name}.max_new_tokens or data.max_prompt_tokens"
            )

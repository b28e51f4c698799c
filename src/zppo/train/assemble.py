"""Puts the parts of a run together from its settings: engine and its check, learner, trainer.

Everything is checked here, before the run folder is made.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from huggingface_hub import snapshot_download
from transformers import PreTrainedModel

from zppo.config.model_settings import ModelSettings
from zppo.config.recipe import dump_recipe
from zppo.config.settings import Settings
from zppo.core.minibatch import Sharing
from zppo.core.types import Prompt, Rollout
from zppo.distributed.parallel import ReplicatedWeights
from zppo.distributed.processes import ONE_PROCESS, Processes
from zppo.engines.base import Engine
from zppo.engines.chat import Chat
from zppo.engines.image_check import check_image_input
from zppo.engines.loading import check_kernels
from zppo.engines.logprobs import ForwardPass, sharing_of
from zppo.engines.tinker import TinkerEngine
from zppo.engines.transformers import TransformersEngine
from zppo.engines.vllm.vllm_engine import VLLMEngine, open_vllm, require_vllm
from zppo.errors import SettingsError
from zppo.models.optimizer import make_optimizer
from zppo.models.student_model import Student, context_length, load_chat, load_student, recompute_layers, unread_student
from zppo.models.vision_parts import freeze_parts, parameter_groups
from zppo.names import model_folder
from zppo.rollout.frozen_models import FrozenModels, FrozenTeacher, in_process
from zppo.rollout.grading import Rule
from zppo.rollout.reformulated import make_reformulations
from zppo.rollout.rewards import Rewards
from zppo.rollout.run_data import RunData, check_context, check_vocabulary, load_short
from zppo.rollout.step_parts import make_renderer
from zppo.rollout.step_parts import parts as make_parts
from zppo.rollout.teacher import ResponseTokens, TeacherSampler
from zppo.runs.checkpoint import HoldsState
from zppo.runs.display import Progress, warn
from zppo.runs.log import RunLog, SilentLog
from zppo.teacher.compression import Source
from zppo.teacher.local import LocalTeacher
from zppo.train.checkpointer import Checkpointer
from zppo.train.cluster.tinker_student import NoState, TinkerStudent, open_student
from zppo.train.distillation import Distillation, Privileged
from zppo.train.engine_checks import TOLERANCE_FP32, TOLERANCE_ROUNDED, TOLERANCE_ROUNDED_SHARED, EngineCheck, make_check
from zppo.train.learner import Learner, OptimizerStep
from zppo.train.policy_gradient import PolicyGradient, make_budget
from zppo.train.provenance import origin_of
from zppo.train.trainer import Trainer, total_steps

StudentEngine = TransformersEngine | VLLMEngine | TinkerEngine


def start_vllm(
    settings: Settings, model: PreTrainedModel, chat: Chat, accelerator: Accelerator, processes: Processes = ONE_PROCESS
) -> VLLMEngine:
    """vLLM in this process, or the connection to its servers.

    Raises:
        SettingsError: vLLM is not installed, or the servers cannot be shared out over the processes.
        EngineError: vLLM cannot be used; the message says why.
    """
    vllm = settings.rollout.vllm
    return open_vllm(
        model,
        _checkpoint(settings.student),
        accelerator,
        eos_ids=chat.eos_ids(model),
        banned_ids=chat.banned_ids(model),
        servers=vllm.servers,
        image_processor=chat.image_processor,
        max_model_length=vllm.max_model_length,
        gpu_memory_utilization=vllm.gpu_memory_utilization,
        max_num_seqs=settings.rollout.max_rows,
        enable_sleep_mode=vllm.enable_sleep_mode,
        group_port=vllm.group_port,
        weights_folder=vllm.weights_folder,
        gather=processes.gather,
    )


def _checkpoint(student: ModelSettings) -> str:
    """What vLLM loads. It is not passed a revision, so a revision of a hub model is given as the folder that holds it."""
    name = model_folder(student.model)
    if student.revision is None or Path(name).exists():
        return name
    return snapshot_download(name, revision=student.revision, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.jinja"])


def make_engine_check(
    settings: Settings, engine: Engine, forward: ForwardPass, prompt: Prompt, accelerator: Accelerator, weights: ReplicatedWeights
) -> EngineCheck:
    """The check of the run's engine; `prompt` is the fixed one."""
    ours = isinstance(engine, TransformersEngine)
    rounded = TOLERANCE_ROUNDED_SHARED if ours else TOLERANCE_ROUNDED
    return EngineCheck(
        engine,
        forward,
        prompt,
        tolerance=settings.train.engine_tolerance or (TOLERANCE_FP32 if ours and accelerator.mixed_precision == "no" else rounded),
        every=settings.train.check_engine_every,
        seed=settings.seed,
        weights=weights,
        rounded=accelerator.mixed_precision != "no" or bool(getattr(engine, "rounded", False)),  # a server has its own precision
        exact=settings.rollout.sampling().exact,
    )


def make_forward(settings: Settings, model: PreTrainedModel, chat: Chat) -> ForwardPass:
    """The student's training forward, under the distribution that its rollouts are sampled from."""
    banned = tuple(sorted(chat.banned_ids(model)))
    return ForwardPass(model, chat.pad_id(model), settings.rollout.temperature, banned, chat.image_processor)


def make_learner(
    settings: Settings,
    model: PreTrainedModel,
    chat: Chat,
    start: Path | None,
    accelerator: Accelerator,
    teachers: Sequence[FrozenTeacher],
    teacher_sampler: TeacherSampler,
    weights: ReplicatedWeights,
    say: Callable[[str], None] | None = None,
) -> tuple[Learner, OptimizerStep]:
    """The learner of a recipe's method, and the optimizer over all trained weights, with the state of a checkpoint where there is one.

    Args:
        model: with all weights to train, or with adapters in it and the rest frozen.
        weights: how they lie over the processes.
        say: called with a message where parts are frozen by default, and when memory has run out and what fits from then on.
    """
    train, method = settings.train, settings.method.resolve()
    if train.lora is None:
        model.requires_grad_(True)
    freeze_parts(model, train, images=chat.image_processor is not None, say=say)
    if train.gradient_checkpointing:
        recompute_layers(model)
    width = model.config.get_text_config().hidden_size
    budget = make_budget(train, say, gpu=accelerator.device.type != "cpu", width=width)
    # Whole weights are tried before autocast is around them: rounding hides a difference, or feigns one. Sharded ones are nowhere whole.
    sharing = None if weights.sharded else _make_sharing(settings, model, accelerator)
    prepared = weights.prepare(model, accelerator)
    if weights.sharded:
        with weights.scoring():
            sharing = _make_sharing(settings, model, accelerator, rounded=accelerator.mixed_precision != "no")
    made = make_optimizer(train, parameter_groups(prepared, train), accelerator.device, offloaded=weights.offload)
    optimizer = accelerator.prepare_optimizer(made)
    if start:
        weights.load_optimizer(start, optimizer, prepared)
    forward = replace(make_forward(settings, model, chat), model=prepared)
    step = OptimizerStep(prepared, optimizer, accelerator, train.max_grad_norm, weights)
    respond = _make_respond(settings, chat, model)
    if method.loss == "self-distill":
        privileged = Privileged(teacher_sampler.renderer, method.teacher_response, context_length(model), settings.seed)
        return Distillation(forward, forward, step, budget, respond=respond, teacher_sampler=None, privileged=privileged), step
    if method.distils:
        teacher = in_process(teachers[0])
        _check_shared_tokenizer(settings, chat, teacher)
        learner: Learner = Distillation(
            forward,
            ForwardPass(teacher.network, forward.pad_id, image_processor=teacher.image_processor),
            step,
            budget,
            respond=respond,
            teacher_sampler=teacher_sampler if method.loss == "off-distill" else None,
        )
        return learner, step
    sampling, old = settings.rollout.sampling(), train.old_logprobs
    if old == "sampler" and not sampling.exact:
        raise SettingsError(
            "train.old_logprobs is sampler, but rollout.top_p or top_k is active: the sampler's log-probs are no old log-probs "
            "then. Use train.old_logprobs=auto"
        )
    # vLLM computes in another precision and with other kernels: near is not exact.
    exact = sampling.exact and accelerator.mixed_precision == "no" and settings.rollout.engine == "transformers"
    learner = PolicyGradient(
        settings,
        forward,
        step,
        budget,
        sampler_is_exact=old == "sampler" or (old == "auto" and exact),
        check=make_check(train, exact, say, weights.processes),
        sharing=sharing,
        respond=respond if method.teacher_response else None,
    )
    return learner, step


def _make_respond(settings: Settings, chat: Chat, model: PreTrainedModel) -> Callable[[Source], Rollout | None]:
    tokens, ends = ResponseTokens(chat), chat.eos_ids(model)
    end = chat.tokenizer.eos_token_id if chat.tokenizer.eos_token_id in ends else min(ends)

    def respond(source: Source) -> Rollout | None:
        """A teacher response as a rollout that the student did not sample; None where it is over the student's limit."""
        ids = torch.tensor([*tokens(source), end])
        if len(ids) > settings.rollout.max_new_tokens:
            return None
        unknown = torch.full(ids.shape, torch.nan)
        return Rollout(ids, unknown, source.text, source.answer, True, source.reward, reason="teacher response")

    return respond


def _make_sharing(settings: Settings, model: PreTrainedModel, accelerator: Accelerator, *, rounded: bool = False) -> Sharing | None:
    wanted = settings.train.share_prompts
    cpu = accelerator.device.type == "cpu"
    return sharing_of(model, rounded=rounded) if wanted == "on" or (wanted == "auto" and cpu) else None


def _check_shared_tokenizer(settings: Settings, chat: Chat, teacher: LocalTeacher) -> None:
    if teacher.tokenizer.get_vocab() != chat.tokenizer.get_vocab():
        name = settings.teacher.model if settings.teacher else ""
        raise SettingsError(
            f"method {settings.method.name!r} compares next-token distributions, so student and teacher must share a tokenizer, and "
            f"{settings.student.model!r} and {name!r} do not: their vocabularies differ. Take a teacher of the student's family, or a "
            "method that keeps the teacher in the prompt (zppo)"
        )
    if chat.image_processor is not None and (teacher.image_processor is None or not chat.image_processor.same_as(teacher.image_processor)):
        why = "the teacher reads text only" if teacher.image_processor is None else "their image processors differ"
        raise SettingsError(
            f"method {settings.method.name!r} compares next-token distributions on prompts with images, which student and teacher must "
            f"see alike, and {why}: take a teacher of the student's family, or a method that keeps the teacher in the prompt (zppo)"
        )


@dataclass(frozen=True, slots=True)
class Assembled:
    """A run that is ready to go."""

    trainer: Trainer
    checkpointer: Checkpointer
    student: Student
    chat: Chat
    origin: dict[str, Any]  # what it trains from; every checkpoint says so
    weights: ReplicatedWeights

    def close(self) -> None:
        """Ends the sampling engine, and with vLLM the process groups: the last thing that a run does."""
        engine = self.trainer.student.engine
        if isinstance(engine, VLLMEngine):
            engine.close()
        if isinstance(self.student, TinkerStudent):
            self.student.service.close()


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
        say: called with a message when memory has run out and what fits from then on.
    """
    return TransformersEngine(
        model,
        chat.eos_ids(model),
        chat.pad_id(model),
        chat.banned_ids(model),
        max_rows=settings.rollout.max_rows,
        autocast_dtype=autocast_dtype,
        say=say,
        image_processor=chat.image_processor,
    )


def _start_engine(
    settings: Settings,
    student: Student,
    chat: Chat,
    accelerator: Accelerator,
    weights: ReplicatedWeights,
    progress: Progress,
    say: Callable[[str], None],
) -> StudentEngine:
    """What samples the student."""
    model, vllm = student.model, settings.rollout.engine == "vllm"
    if isinstance(student, TinkerStudent):
        own: StudentEngine = student.engine(chat)
    else:
        own = make_engine(settings, model, chat, autocast_type(accelerator), say)
        if chat.image_processor is not None:
            with weights.whole():
                check_image_input(own, chat, settings.student.model)  # it is trained here, whatever samples
    progress.doing("starting vLLM" if vllm else "checking the sampler against the trainer")
    return start_vllm(settings, model, chat, accelerator, weights.processes) if vllm else own


def assemble(
    settings: Settings,
    data: RunData,
    run: Path,
    start: Path | None,
    rule: Rule,
    frozen_models: FrozenModels,
    accelerator: Accelerator,
    weights: ReplicatedWeights,
    progress: Progress,
) -> Assembled:
    """Loads models and templates, checks that they fit together, and builds the trainer.

    Args:
        data: the questions, and how images are brought into the models.
        run: where the trainer will write; nothing is written here.
        start: a checkpoint to take weights and optimizer from; the trainer's state is the caller's.
        rule: grades what no judge grades.
        frozen_models: the frozen models.
        weights: the processes of the run; its data must be the same in all of them.

    Raises:
        ZPPOError: what does not fit, by name.
    """
    vllm = settings.rollout.vllm
    if settings.rollout.engine == "vllm" and vllm.runs_here:
        require_vllm(server=bool(vllm.servers))  # before models are loaded
    make_reformulations(settings.method.resolve())  # one that cannot be imported is found now
    check_kernels(model_folder(settings.student.model), accelerator.device, settings.student.revision)
    # Words: the chat template and the templates of prompts.
    image_inputs, teachers = data.image_inputs, frozen_models.teachers
    chat = load_chat(settings.student, image_inputs.limits, image_inputs.cache) if image_inputs else load_chat(settings.student)
    renderer = make_renderer(settings, chat, teachers, data.examples)
    # Questions whose prompts are short enough; and the pieces of a step.
    progress.doing(f"reading the prompts of {len(data.train) + len(data.held_out):,} questions")
    console = progress.console
    length = cache(lambda question: len(renderer.plain(question).ids))  # two checks ask for it
    questions, held_out = load_short(settings, data, renderer, length, console)
    frozen_models.check_images(max((len(question.images) for question in questions), default=0))
    processes = weights.processes
    parts = make_parts(settings, [*questions, *held_out], renderer, teachers=frozen_models, rule=rule, processes=processes)
    if isinstance(rule, Rewards):
        rule.steps = total_steps(settings, len(questions))
    # The student; whatever does not fit it is found now, since an engine may take minutes to start.
    progress.doing(f"loading the student {settings.student.model}")
    bf16, images = autocast_type(accelerator) is not None, image_inputs is not None
    remote = open_student(settings, start, run, images=images, processes=processes.size) if settings.student.tinker else None
    say = partial(warn, console)
    student = remote or weights.load(
        partial(load_student, settings, start, bf16=bf16, images=images), partial(unread_student, settings, start, images=images), say
    )
    model = student.model
    check_vocabulary(model, renderer, questions)
    check_context(settings, context_length(model), questions, held_out, length)
    processes.check_same("recipe and questions", (dump_recipe(settings), questions, held_out))
    # What learns from groups, and the teachers that it may ask.
    origin = origin_of(settings, questions, model.config, accelerator.num_processes)
    learner: Learner
    state: HoldsState
    if remote:
        respond = _make_respond(settings, chat, model) if settings.method.resolve().teacher_response else None
        learner, state = remote.learner(settings, accelerator, weights, respond, say), NoState()
    else:
        learner, step = make_learner(settings, model, chat, start, accelerator, teachers, parts.teacher, weights, say)
        state = step.optimizer
    # What samples, and the check that it holds the student's weights: a wrong engine is found before anything is written.
    engine = _start_engine(settings, student, chat, accelerator, weights, progress, say)
    check_context(settings, engine.context, questions, held_out, length)
    fixed = renderer.plain(next((q for q in questions if q.images), questions[0]))  # the vision tower is compared too
    if chat.image_processor is not None:
        chat.image_processor.cache.pin({image.sha256 for image in fixed.images})
    forward = remote.scorer if remote else make_forward(settings, model, chat)
    check = make_engine_check(settings, engine, forward, fixed, accelerator, weights)
    check.refresh(0)
    parts = parts.within(engine.context)
    trainer = Trainer(
        settings,
        RunData(questions, held_out, image_inputs),
        parts,
        parts.student(engine, weights.whole if isinstance(engine, TransformersEngine) else nullcontext),  # others have a copy
        learner,
        check,
        RunLog(run) if processes.main else SilentLog(run),
    )
    checkpointer = Checkpointer(settings.train, run, student, state, origin, weights)
    return Assembled(trainer, checkpointer, student, chat, origin, weights)

"""Builds what a method learns by: optimizer, policy gradient or distillation; and the reformulations that it names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel

from zppo.config.methods import Method
from zppo.config.settings import Settings
from zppo.core.reformulate import (
    BinaryCandidateQuestion,
    HintQuestion,
    NegativeCandidateQuestion,
    Placebo,
    PrefixQuestion,
    Reformulation,
)
from zppo.core.types import BCQ, HINT, NCQ, PLAIN, PREFIX, Rollout
from zppo.distributed.parallel import Weights
from zppo.engines.chat import Chat
from zppo.engines.logprobs import Sharing, sharing_of
from zppo.errors import SettingsError
from zppo.imports import load_object
from zppo.models.optimizer import make_optimizer
from zppo.models.parts import freeze_parts, parameter_groups
from zppo.models.student import recompute_layers
from zppo.rollout.frozen_models import FrozenTeacher, in_process
from zppo.rollout.teacher import Asker, ResponseTokens
from zppo.runs import checkpoint
from zppo.teacher.compression import Source
from zppo.teacher.local import LocalTeacher
from zppo.train.budget import TokenBudget, make_budget
from zppo.train.distill import Distiller
from zppo.train.learn import Learner, PolicyLearner
from zppo.train.sampler_check import make_check
from zppo.train.update import Updater


def make_reformulations(method: Method, prefix_fraction: float) -> list[Reformulation]:
    """The reformulations of a method, in building order.

    Raises:
        SettingsError: one of the user's own cannot be imported or is none; the message says why.
    """
    own: dict[str, Reformulation] = {
        BCQ: BinaryCandidateQuestion(),
        NCQ: NegativeCandidateQuestion(),
        HINT: HintQuestion(),
        PREFIX: PrefixQuestion(prefix_fraction),
    }
    made = [own[kind] if kind in own else _imported(kind) for kind in method.reformulations]
    kinds = [r.kind for r in made]
    if len(set(kinds)) != len(kinds) or PLAIN in kinds:
        raise SettingsError(
            f"the reformulations are of the kinds {', '.join(kinds)}: each needs a kind of its own, other than 'plain'"
        )
    return [Placebo(r) for r in made] if method.control == "placebo" else made


def _imported(spec: str) -> Reformulation:
    made = load_object(spec, "reformulation", SettingsError)()
    missing = [name for name in ("kind", "needs", "draft") if not hasattr(made, name)]
    if missing:
        raise SettingsError(
            f"reformulation {spec!r} has no {', '.join(missing)}: a reformulation is a class with `kind`, `needs` and `draft` "
            "(zppo.core.reformulate.Reformulation)"
        )
    reformulation: Reformulation = made
    return reformulation


def make_learner(
    settings: Settings,
    model: PreTrainedModel,
    chat: Chat,
    start: Path | None,
    accelerator: Accelerator,
    teachers: Sequence[FrozenTeacher],
    asker: Asker,
    weights: Weights,
    say: Callable[[str], None] | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> tuple[Learner, torch.optim.Optimizer]:
    """The optimizer over all trained weights, with the state of a checkpoint where there is one, and the learner around it.

    Args:
        model: with all weights to train, or with adapters in it and the rest frozen.
        weights: how they lie over the processes.
        say: told what is frozen unasked, and when memory has run out and what fits from then on.
        stop: asked between two optimizer steps: whether to leave the step there.
    """
    train, method = settings.train, settings.method.resolve()
    if train.lora is None:
        model.requires_grad_(True)
    freeze_parts(model, train, images=chat.sight is not None, say=say)
    if train.gradient_checkpointing:
        recompute_layers(model)
    budget = make_budget(train, weights.sharded, say, gpu=accelerator.device.type != "cpu")
    sharing = _make_sharing(settings, model, accelerator)
    prepared = weights.prepare(model, accelerator)
    optimizer = accelerator.prepare_optimizer(
        make_optimizer(train, parameter_groups(prepared, train), accelerator.device)
    )
    if start:
        checkpoint.load_optimizer(start, weights.state_of(optimizer))
    tokens, ends = ResponseTokens(chat), chat.eos_ids(model)
    end = chat.tokenizer.eos_token_id if chat.tokenizer.eos_token_id in ends else min(ends)

    def respond(source: Source) -> Rollout | None:
        """A teacher response as a rollout that the student did not sample; None where it is over the student's limit."""
        ids = torch.tensor([*tokens(source), end])
        if len(ids) > settings.rollout.max_new_tokens:
            return None
        unknown = torch.full(ids.shape, torch.nan)
        return Rollout(ids, unknown, source.text, source.answer, True, source.reward, reason="teacher response")

    if method.distils:
        teacher = in_process(teachers[0])
        _check_shared_tokenizer(settings, chat, teacher)
        learner: Learner = Distiller(
            prepared,
            optimizer,
            accelerator,
            teacher=teacher.network,
            asker=asker if method.loss == "off-distill" else None,
            respond=respond,
            train=train,
            pad_id=chat.pad_id(model),
            budget=budget,
            weights=weights,
            sight=chat.sight,
            teacher_sight=teacher.sight,
        )
        return learner, optimizer
    updater = _make_updater(
        settings, model, prepared, optimizer, accelerator, chat, budget, stop, weights, say, sharing
    )
    learner = PolicyLearner(
        updater,
        settings.advantage,
        respond=respond if method.teacher_response else None,
        drop_trivial=settings.zone.dynamic_sampling == "after-reformulation",
        seed=settings.seed,
    )
    return learner, optimizer


def _make_updater(
    settings: Settings,
    model: PreTrainedModel,
    prepared: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    accelerator: Accelerator,
    chat: Chat,
    budget: TokenBudget,
    stop: Callable[[], bool],
    weights: Weights,
    say: Callable[[str], None] | None,
    sharing: Sharing | None,
) -> Updater:
    sampling, old = settings.rollout.sampling(), settings.train.old_logprobs
    if old == "sampler" and not sampling.exact:
        raise SettingsError(
            "train.old_logprobs is sampler, but rollout.top_p, top_k, min_p or a penalty is active: the sampler's log-probs are no "
            "old log-probs then. Use train.old_logprobs=auto"
        )
    # vLLM computes in another precision and with other kernels: near is not exact.
    exact = sampling.exact and accelerator.mixed_precision == "no" and settings.rollout.engine == "transformers"
    return Updater(
        prepared,
        optimizer,
        accelerator,
        train=settings.train,
        loss=settings.loss,
        seed=settings.seed,
        temperature=sampling.temperature,
        banned_ids=tuple(sorted(chat.banned_ids(model))),
        pad_id=chat.pad_id(model),
        sampler_is_exact=old == "sampler" or (old == "auto" and exact),
        check=make_check(settings.train, exact, say, weights.team),
        budget=budget,
        stop=stop,
        weights=weights,
        sight=chat.sight,
        sharing=sharing,
    )


def _make_sharing(settings: Settings, model: PreTrainedModel, accelerator: Accelerator) -> Sharing | None:
    wanted = settings.train.share_prompts
    cpu = accelerator.device.type == "cpu"
    return sharing_of(model) if wanted == "on" or (wanted == "auto" and cpu) else None


def _check_shared_tokenizer(settings: Settings, chat: Chat, teacher: LocalTeacher) -> None:
    if teacher.tokenizer.get_vocab() != chat.tokenizer.get_vocab():
        name = settings.teacher.model if settings.teacher else ""
        raise SettingsError(
            f"method {settings.method.name!r} compares next-token distributions, so student and teacher must share a tokenizer, and "
            f"{settings.student.model!r} and {name!r} do not: their vocabularies differ. Take a teacher of the student's family, or a "
            "method that keeps the teacher in the prompt (zppo)"
        )
    if chat.sight is not None and (teacher.sight is None or not chat.sight.same_as(teacher.sight)):
        why = "the teacher reads text only" if teacher.sight is None else "their image processors differ"
        raise SettingsError(
            f"method {settings.method.name!r} compares next-token distributions on prompts with images, which student and teacher must "
            f"see alike, and {why}: take a teacher of the student's family, or a method that keeps the teacher in the prompt (zppo)"
        )

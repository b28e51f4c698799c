"""Starts vLLM by a recipe, and the guard that watches whichever engine samples."""

from __future__ import annotations

from pathlib import Path

from accelerate import Accelerator
from huggingface_hub import snapshot_download
from transformers import PreTrainedModel

from zppo.config.settings import Settings, StudentSettings
from zppo.core.types import Prompt
from zppo.distributed.parallel import Weights
from zppo.engines.base import Engine
from zppo.engines.chat import Chat
from zppo.engines.transformers import TransformersEngine
from zppo.engines.vllm import VLLMEngine, open_vllm
from zppo.errors import SettingsError
from zppo.models.student import resolve_model
from zppo.train.engine_guard import TOLERANCE_FP32, TOLERANCE_ROUNDED, EngineGuard

StudentEngine = TransformersEngine | VLLMEngine


def start_vllm(settings: Settings, model: PreTrainedModel, chat: Chat, accelerator: Accelerator) -> VLLMEngine:
    """vLLM in this process, or the connection to its server.

    Raises:
        SettingsError: several processes train, or vLLM is not installed.
        EngineError: vLLM cannot be used; the message says why.
    """
    if accelerator.num_processes > 1:
        raise SettingsError(
            f"rollout.engine is vllm and {accelerator.num_processes} processes train, which is not built yet: train in one process "
            "with rollout.vllm.mode=server and as many GPUs for the server as you like, or set rollout.engine to transformers"
        )
    vllm, server = settings.rollout.vllm, settings.rollout.vllm.mode == "server"
    options = (
        {"server_timeout": vllm.wait, "group_port": vllm.group_port}
        if server
        else {
            "gpu_memory_utilization": vllm.gpu_memory_utilization,
            "max_num_seqs": settings.rollout.max_rows,
            "enable_sleep_mode": vllm.enable_sleep_mode,
            "model_impl": vllm.model_impl,
        }
    )
    return open_vllm(
        model,
        _checkpoint(settings.student),
        chat.tokenizer,
        accelerator,
        eos_ids=chat.eos_ids(model),
        banned_ids=chat.banned_ids(model),
        server=vllm.base_url.rstrip("/") if server else None,
        max_model_length=vllm.max_model_length,
        sight=chat.sight,
        **options,
    )


def _checkpoint(student: StudentSettings) -> str:
    """Where vLLM loads from: it is told no revision, so one of a hub model is given as the folder that holds it."""
    name = resolve_model(student.model)
    if student.revision is None or Path(name).exists():
        return name
    return snapshot_download(
        name, revision=student.revision, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.jinja"]
    )


def make_guard(
    settings: Settings,
    engine: Engine,
    model: PreTrainedModel,
    prompt: Prompt,
    chat: Chat,
    accelerator: Accelerator,
    weights: Weights,
) -> EngineGuard:
    """The guard over the run's engine; `prompt` is the fixed one."""
    exact = isinstance(engine, TransformersEngine) and accelerator.mixed_precision == "no"
    return EngineGuard(
        engine,
        model,
        prompt.ids,
        temperature=settings.rollout.temperature,
        banned_ids=tuple(sorted(chat.banned_ids(model))),
        pad_id=chat.pad_id(model),
        tolerance=settings.train.engine_tolerance or (TOLERANCE_FP32 if exact else TOLERANCE_ROUNDED),
        every=settings.train.check_engine_every,
        seed=settings.seed,
        team=weights.team,
        whole=weights.whole,
        images=prompt.images,
        sight=chat.sight,
    )

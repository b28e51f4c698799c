"""Sampling with vLLM: in the training process, next to the trainer (colocate), or in a server, by way of TRL's `VLLMGeneration`.

vLLM holds a copy of the weights: `sync` sends them over, and its log-probs are close to the trainer's, never equal. In the training
process every rollout has a seed, made from its key, so that its tokens do not depend on order or company beyond the rounding of vLLM's
kernels. A server is asked for a group at once: two runs of one seed differ then, and so does a resumed one.
"""

from __future__ import annotations

import importlib.util
import json
import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, Protocol, cast

import torch
from accelerate import Accelerator
from safetensors import safe_open
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.hub import cached_file

from zppo.engines.base import Completion, Ended, SampleRequest, Sampling, check_end_tokens, check_requests, in_order
from zppo.engines.vllm_colocate import LOGPROBS_MODE, ColocatedVLLM, Draw, ProcessPlace
from zppo.errors import EngineError, ModelError, SettingsError
from zppo.images.processor import ImageProcessor

_NEVER = -100.0  # the lowest logit bias that vLLM's server takes
_SEEDS = 1 << 31
SERVER_WAIT = 240.0
"""Seconds that a server is waited for at the start."""

SERVE = f"""VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --logprobs-mode {LOGPROBS_MODE} --weight-transfer-config '{{"backend": "nccl"}}'"""


class Generation(Protocol):
    """What is used of `trl.generation.vllm_generation.VLLMGeneration`; the sampling fields are read anew by every call."""

    model: Any
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    max_completion_length: int
    generation_kwargs: dict[str, Any]

    def sync_weights(self) -> None: ...

    def generate(
        self, prompts: list[list[int]], images: list[list[Any] | None] | None, num_generations: int
    ) -> tuple[list[list[int]], list[list[int]], list[list[list[float | None]]] | None, list[list[list[int]]] | None]: ...


class VLLMEngine:
    """Samples with a vLLM server from the weights of the last `sync`.

    Args:
        generation: the connection to it.
        eos_ids: ids that end a completion; the end token is part of it.
        banned_ids: ids that are never drawn (image tokens), by a logit bias of -100.
        vocab_size: ids that the model knows.
        context: most tokens of prompt and completion together; None where unknown.
        where: the server's address for messages; "" where there is none.
        image_processor: the trainer's; vLLM gets the pictures in that size. None for text only.
    """

    def __init__(
        self,
        generation: Generation,
        eos_ids: Collection[int],
        banned_ids: Collection[int] = (),
        *,
        vocab_size: int,
        context: int | None,
        where: str = "",
        image_processor: ImageProcessor | None = None,
    ) -> None:
        check_end_tokens(eos_ids, banned_ids)
        self.image_processor = image_processor
        self.generation = generation
        self.eos_ids, self.banned_ids = frozenset(eos_ids), frozenset(banned_ids)
        self.vocab_size, self.context, self.where = vocab_size, context, where

    def sync(self) -> None:
        """Sends the trainer's weights to vLLM and empties its prefix cache.

        Raises:
            EngineError: the server cannot be reached or refuses them.
        """
        self._guarded(self.generation.sync_weights)

    def rest(self) -> None:
        """Nothing is sampled until the next call: a server keeps its memory."""

    def close(self) -> None:
        """Ends what the run started; a server goes on."""

    def sample_from(self, model: PreTrainedModel) -> None:
        """Samples from another model of the same shape from now on (what a run saved, for its last evaluation)."""
        self.generation.model = model
        self.sync()

    def sample(self, requests: Sequence[SampleRequest], sampling: Sampling) -> list[list[Completion]]:
        """Completions per request, as many as it has keys; see `stream`."""
        return in_order(requests, list(self.stream(requests, sampling)))

    def stream(self, requests: Sequence[SampleRequest], sampling: Sampling) -> Iterator[Ended]:
        """Completions when a call returns: all that have one group size and one limit. Entropies are NaN, since vLLM does not tell them.

        A key is used only where a call asks for a single completion: `VLLMGeneration` takes one seed a call, and one seed would
        give all rollouts of a prompt the same tokens.

        Raises:
            ModelError: see `check_requests`; or log-probs that are not numbers.
            EngineError: the server cannot be reached; or an answer without what was asked for.
        """
        check_requests(requests, sampling, self.vocab_size, self.context)
        calls: dict[tuple[int, int], list[int]] = defaultdict(list)  # one call has one group size and one limit
        for i, request in enumerate(requests):
            calls[len(request.keys), self._room(request, sampling)].append(i)
        for (size, limit), places in calls.items():
            found = iter(self._call([requests[i] for i in places], size, limit, sampling))
            yield from ((i, key, next(found)) for i in places for key in range(size))

    def _call(self, requests: Sequence[SampleRequest], size: int, limit: int, sampling: Sampling) -> list[Completion]:
        """`size` completions of every request, request by request."""
        generation = self.generation
        generation.temperature, generation.top_p = sampling.temperature, sampling.top_p
        generation.top_k, generation.min_p = sampling.top_k, sampling.min_p
        generation.repetition_penalty, generation.max_completion_length = sampling.repetition_penalty, limit
        generation.generation_kwargs = {"presence_penalty": sampling.presence_penalty, "stop_token_ids": sorted(self.eos_ids)}
        if self.banned_ids:
            generation.generation_kwargs["logit_bias"] = dict.fromkeys(sorted(self.banned_ids), _NEVER)
        if len(requests) == size == 1:
            generation.generation_kwargs["seed"] = requests[0].keys[0] % _SEEDS
        prompts = [list(request.prompt_ids) for request in requests for _ in range(size)]
        images = self._pictures(requests, size)
        _, ids, logprobs, scored = self._guarded(lambda: generation.generate(prompts, images, size))
        if logprobs is None or scored is None or not len(ids) == len(logprobs) == len(scored) == len(prompts):
            raise EngineError(
                f"vLLM{self.where} answered {len(prompts)} prompts with {len(ids)} completions"
                f"{'' if logprobs is not None else ' without log-probs'}: use a version of vLLM and TRL that "
                "constraints-vllm.txt allows"
            )
        return [self._completion(*row, limit) for row in zip(ids, logprobs, scored, strict=True)]

    def _pictures(self, requests: Sequence[SampleRequest], size: int) -> list[list[Any] | None] | None:
        """Of every prompt as often as it is sampled; None where none has any."""
        if not any(request.images for request in requests):
            return None
        return [pictures for pictures in map(self._shown, requests) for _ in range(size)]

    def _shown(self, request: SampleRequest) -> list[Any] | None:
        """A prompt's pictures; None where it has none."""
        if not request.images:
            return None
        if self.image_processor is None:
            raise ModelError("the prompts have images, and vLLM was started for text only: load the student's image processor")
        return [self.image_processor.picture(ref) for ref in request.images]

    def _room(self, request: SampleRequest, sampling: Sampling) -> int:
        """Most tokens of a completion."""
        room = sampling.max_new_tokens if self.context is None else self.context - len(request.prompt_ids)
        return min(room, sampling.max_new_tokens)

    def _completion(
        self, ids: Sequence[int], logprobs: Sequence[Sequence[float | None]], scored: Sequence[Sequence[int]], limit: int
    ) -> Completion:
        """One completion; every token comes with the log-probs of one or more ids, its own among them."""
        own = [dict(zip(names, values, strict=True)).get(token) for token, names, values in zip(ids, scored, logprobs, strict=True)]
        if not own or any(value is None or math.isnan(value) for value in own):
            raise ModelError(
                f"vLLM{self.where} returned {'log-probs that are not numbers' if own else 'an empty completion'}: the weights have "
                "diverged or its precision overflows; go back to a checkpoint with a lower learning rate"
            )
        return Completion(
            torch.tensor(ids, dtype=torch.int64),
            torch.tensor(own, dtype=torch.float32),
            ids[-1] not in self.eos_ids and len(ids) >= limit,
            math.nan,
        )

    def _guarded(self, call: Callable[[], Any]) -> Any:
        """The call's result; a server's failures as `EngineError`, those of vLLM in this process as they are."""
        if not self.where:
            return call()
        try:
            return call()
        except Exception as error:  # the client raises whatever its libraries raise
            raise EngineError(
                f"the vLLM server{self.where} failed: {_short(error)}. Look at its log, start it again, and continue with `zppo resume RUN`"
            ) from error


class ColocatedEngine(VLLMEngine):
    """Samples with vLLM in this process; rollouts come as they end, each drawn from a seed of its own.

    Args:
        llm: vLLM, which is this engine's from now on.
        model: the trainer's model, whose weights `sync` sends.
        names: what the checkpoint calls parameters, where it calls them otherwise.
        more: as for `VLLMEngine`.
    """

    def __init__(self, llm: ColocatedVLLM, model: torch.nn.Module, names: Mapping[str, str], *more: Any, **limits: Any) -> None:
        super().__init__(cast(Generation, None), *more, **limits)
        self.llm, self.model, self.names = llm, model, names

    def sync(self) -> None:
        """Takes over the model's weights, one parameter at a time. Where they are sharded, every process must call it."""
        self.llm.load((self.names.get(name, name), value) for name, value in merged_weights(self.model))

    def rest(self) -> None:
        """Gives vLLM's memory back until the next call (sleep mode)."""
        self.llm.rest()

    def close(self) -> None:
        """Ends vLLM, and with it all process groups of this process."""
        self.llm.close()

    def sample_from(self, model: PreTrainedModel) -> None:
        self.model = model
        self.sync()

    def stream(self, requests: Sequence[SampleRequest], sampling: Sampling) -> Iterator[Ended]:
        """Completions as they end. Entropies are NaN, since vLLM does not tell them.

        Raises:
            ModelError: see `check_requests`; or log-probs that are not numbers.
        """
        check_requests(requests, sampling, self.vocab_size, self.context)
        shown = [self._shown(request) for request in requests]
        places = [(i, j) for i, request in enumerate(requests) for j in range(len(request.keys))]
        draws = [Draw(requests[i].prompt_ids, shown[i], requests[i].keys[j] % _SEEDS, self._room(requests[i], sampling)) for i, j in places]
        how: dict[str, Any] = {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "min_p": sampling.min_p,
            "presence_penalty": sampling.presence_penalty,
            "repetition_penalty": sampling.repetition_penalty,
            "stop_token_ids": sorted(self.eos_ids),
        }
        if self.banned_ids:
            how["logit_bias"] = dict.fromkeys(sorted(self.banned_ids), _NEVER)
        for place, ids, scored in self.llm.run(draws, how):
            names = [list(each) for each in scored or ()]
            logprobs = [[found.logprob for found in each.values()] for each in scored or ()]
            if len(names) != len(ids):
                raise EngineError("vLLM answered without log-probs: use a version of vLLM that constraints-vllm.txt allows")
            yield (*places[place], self._completion(ids, logprobs, names, draws[place].limit))


def require_vllm(*, server: bool = False) -> None:
    """Raises `SettingsError` where vLLM is not installed, or TRL, which talks to its server."""
    needed = ("vllm", "trl") if server else ("vllm",)
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise SettingsError(
            f"rollout.engine is vllm, and {' and '.join(missing)} cannot be imported here: run "
            "`pip install -c constraints-vllm.txt '.[vllm]'` on a machine with a GPU, or set rollout.engine to transformers"
        )


def open_vllm(
    model: PreTrainedModel,
    checkpoint: str,
    tokenizer: PreTrainedTokenizerBase,
    accelerator: Accelerator,
    *,
    eos_ids: Collection[int],
    banned_ids: Collection[int],
    server: str | None,
    image_processor: ImageProcessor | None = None,
    max_model_length: int | None = None,
    gpu_memory_utilization: float = 0.3,
    max_num_seqs: int | None = None,
    enable_sleep_mode: bool = False,
    group_port: int = 51216,
) -> VLLMEngine:
    """Starts vLLM in this process, or connects to a server, and makes an engine of it; weights come with the first `sync`.

    Args:
        model: the trainer's model, without a wrapper of a distributed trainer.
        checkpoint: folder or hub name that vLLM loads the architecture (and first weights) from.
        server: base URL; None for colocate.
        image_processor: the model's; None for text only.
        max_model_length: most tokens of prompt and completion; None for the model's own.
        gpu_memory_utilization, max_num_seqs, enable_sleep_mode: of a vLLM in this process.
        group_port: on which weights are sent to a server.

    Raises:
        SettingsError: vLLM is not installed.
        EngineError: vLLM cannot start or the server cannot be used; the message says why.
    """
    require_vllm(server=bool(server))
    if image_processor is not None:
        _check_limits(image_processor)
        image_processor.keeps_pictures = True
    names = _checkpoint_names(model, _tensor_names(checkpoint))
    config = model.config.get_text_config(decoder=True)
    known = [getattr(config, "max_position_embeddings", None), max_model_length]
    limits: dict[str, Any] = {"vocab_size": config.vocab_size, "image_processor": image_processor}
    if server is None:
        place = ProcessPlace(accelerator.process_index, accelerator.local_process_index, accelerator.num_processes)
        dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32
        try:
            llm = ColocatedVLLM(
                checkpoint,
                dtype,
                place,
                memory=gpu_memory_utilization,
                rows=max_num_seqs,
                context=max_model_length,
                sleeps=enable_sleep_mode,
            )
        except Exception as error:  # vLLM and CUDA have errors of their own
            raise EngineError(
                f"vLLM cannot be used: {_short(error)}. Lower rollout.vllm.gpu_memory_utilization or set "
                "rollout.vllm.max_model_length if memory is short; it needs a GPU, or vLLM's build for CPUs"
            ) from error
        return ColocatedEngine(llm, model, names, eos_ids, banned_ids, context=_least(known), **limits)
    if image_processor is not None:
        tokenizer.image_token_id = min(image_processor.image_ids)  # TRL looks for the places of images by it
    generation, found = _connect(model, checkpoint, tokenizer, accelerator, names, server, group_port)
    where, context = f" at {server}", _least([*known, found.get("max_model_len")])
    return VLLMEngine(generation, eos_ids, banned_ids, context=context, where=where, **limits)


def _least(limits: Sequence[int | None]) -> int | None:
    return min((limit for limit in limits if limit), default=None)


def _connect(
    model: PreTrainedModel,
    checkpoint: str,
    tokenizer: PreTrainedTokenizerBase,
    accelerator: Accelerator,
    names: Mapping[str, str],
    server: str,
    group_port: int,
) -> tuple[Any, dict[str, Any]]:
    """TRL's connection to a server, and the server's `model_config`."""
    from trl.generation.vllm_generation import VLLMGeneration

    class NamedGeneration(VLLMGeneration):
        """Sends what `merged_weights` gives, under the checkpoint's names."""

        def _iter_named_params(self) -> Iterator[tuple[str, torch.Tensor]]:
            return ((names.get(name, name), value) for name, value in merged_weights(self.model))

    model.name_or_path = checkpoint
    options: dict[str, Any] = {"server_base_url": server, "server_timeout": SERVER_WAIT, "group_port": group_port}
    try:
        generation = NamedGeneration(model, accelerator, tokenizer, mode="server", **options)
        generation.vllm_client.session.max_redirects = 0  # prompts go where the recipe says, nowhere else
        found = dict(generation.vllm_client.get_server_info()["model_config"])
    except Exception as error:  # vLLM, NCCL, HTTP and CUDA all have errors of their own
        raise EngineError(f"vLLM at {server} cannot be used: {_short(error)}. Start it with: {SERVE}") from error
    if found.get("logprobs_mode") != LOGPROBS_MODE:
        raise EngineError(
            f"the vLLM server at {server} returns {found.get('logprobs_mode')}, but training needs the log-probs that tokens were drawn "
            f"from. Start it with: {SERVE}"
        )
    return generation, found


def _check_limits(image_processor: ImageProcessor) -> None:
    """vLLM brings pictures into the limits of the checkpoint; those of the recipe must be within. SettingsError where not."""
    own, limits = image_processor.own_limits, image_processor.limits
    if own is not None and (limits.min_pixels < own.min_pixels or limits.max_pixels > own.max_pixels):
        raise SettingsError(
            f"data.images.min_pixels and max_pixels are {limits.min_pixels} and {limits.max_pixels}, and vLLM resizes images to the "
            f"checkpoint's own {own.min_pixels} to {own.max_pixels} (preprocessor_config.json): choose limits within these, or set "
            "rollout.engine to transformers"
        )


def _tensor_names(checkpoint: str) -> frozenset[str]:
    """Names of a checkpoint's tensors on disk; empty where it has no safetensors."""
    quiet = {"_raise_exceptions_for_missing_entries": False}
    if index := cached_file(checkpoint, "model.safetensors.index.json", **quiet):
        with open(index, encoding="utf-8") as file:
            return frozenset(json.load(file)["weight_map"])
    if whole := cached_file(checkpoint, "model.safetensors", **quiet):
        with safe_open(whole, "pt") as file:
            return frozenset(file.keys())
    return frozenset()


def merged_weights(
    model: torch.nn.Module, *, unpack: Callable[[torch.nn.Module], torch.Tensor] | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and values of a model's weights with LoRA adapters added to them; the model's own weights are not touched.

    Merging in place and taking it back, once an update, would wear frozen bf16 weights away by their rounding. A sharded parameter is
    gathered when its turn comes, by all processes together.

    Args:
        unpack: gives the weight of a layer that is held in 4 bits.
    """

    def value_of(name: str, parameter: torch.nn.Parameter) -> torch.Tensor:
        if unpack is not None and not parameter.is_floating_point():
            return unpack(model.get_submodule(name.rpartition(".")[0]))
        return _gathered(parameter)

    adapted = {
        name: module for name, module in model.named_modules() if hasattr(module, "base_layer") and hasattr(module, "get_delta_weight")
    }
    for name, parameter in model.named_parameters():
        owner = next((owner for owner in adapted if name.startswith(f"{owner}.")), None)
        if owner is None:
            yield name, value_of(name, parameter)
        elif name.startswith(f"{owner}.base_layer."):
            value, layer = value_of(name, parameter), adapted[owner]
            if name == f"{owner}.base_layer.weight":
                value = sum((layer.get_delta_weight(a).detach().float() for a in layer.active_adapters), value.float())
            yield name.replace(".base_layer.", "."), value


def _gathered(parameter: torch.nn.Parameter) -> torch.Tensor:
    value = parameter.detach()
    return value.full_tensor() if isinstance(value, DTensor) else value


def _checkpoint_names(model: PreTrainedModel, theirs: Collection[str]) -> dict[str, str]:
    """What the checkpoint calls the model's parameters, where it calls them otherwise.

    vLLM expects the names on disk. The text model of an image checkpoint (Qwen3.5) lies there under a prefix of its own, which
    `transformers` takes off, and vLLM passes over names that it does not know. The token embeddings show both prefixes.
    """
    table = next(name for name, value in model.named_parameters() if value is model.get_input_embeddings().weight)
    last = ".".join(table.rsplit(".", 2)[1:])  # embed_tokens.weight
    tables = [name for name in theirs if name == last or name.endswith(f".{last}")]
    if table in theirs or len(tables) != 1:
        return {}
    before, after = table.removesuffix(last), tables[0].removesuffix(last)
    own = (name.replace(".base_layer.", ".") for name, _ in model.named_parameters())
    moved = ((name, after + name.removeprefix(before)) for name in own if name.startswith(before))
    return {name: new for name, new in moved if new in theirs}


def _short(error: Exception) -> str:
    """The error on one line of bounded length: servers answer with pages."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= 500 else text[:500] + " ..."

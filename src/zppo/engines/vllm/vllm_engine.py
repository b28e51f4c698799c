"""Sampling with vLLM: in the training process, next to the trainer (colocate), or in servers of its own.

vLLM holds a copy of the weights: `sync` sends them over, and its log-probs are close to the trainer's, never equal. Every rollout has a
seed, made from its key, so that its tokens do not depend on order or company beyond the rounding of vLLM's kernels.
"""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from safetensors import safe_open
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.utils.hub import cached_file

from zppo.engines.base import Completion, Ended, SampleRequest, Sampling, check_end_tokens, check_requests, in_order
from zppo.engines.vllm.vllm_colocate import ColocatedVLLM, Draw, ProcessPlace, Sampled
from zppo.engines.vllm.vllm_server import ServedVLLM, connect
from zppo.errors import EngineError, ModelError, SettingsError, one_line
from zppo.images.processor import ImageProcessor

_NEVER = -100.0  # the lowest logit bias that vLLM takes
_LOWEST = -9999.0  # what vLLM's server says for a log-prob that is no number
_SEEDS = 1 << 31


class Driver(Protocol):
    """A vLLM, wherever it runs. `dtype`: what it computes in."""

    @property
    def dtype(self) -> torch.dtype: ...

    def load(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None: ...

    def run(self, draws: Sequence[Draw], how: dict[str, Any]) -> Iterator[Sampled]: ...

    def rest(self) -> None: ...

    def close(self) -> None: ...


class VLLMEngine:
    """Samples with vLLM from the weights of the last `sync`; rollouts come as they end, each drawn from a seed of its own.

    Args:
        driver: vLLM, which is this engine's from now on.
        model: the trainer's model, whose weights `sync` sends.
        names: what the checkpoint calls parameters, where it calls them otherwise.
        eos_ids: ids that end a completion; the end token is part of it.
        banned_ids: ids that are never drawn (image tokens), by a logit bias of -100.
        vocab_size: ids that the model knows.
        context: most tokens of prompt and completion together; None where unknown.
        image_processor: the trainer's; vLLM gets the pictures in that size. None for text only.
    """

    def __init__(
        self,
        driver: Driver,
        model: torch.nn.Module,
        names: Mapping[str, str],
        eos_ids: Collection[int],
        banned_ids: Collection[int] = (),
        *,
        vocab_size: int,
        context: int | None,
        image_processor: ImageProcessor | None = None,
    ) -> None:
        check_end_tokens(eos_ids, banned_ids)
        self.driver, self.model, self.names = driver, model, names
        self.eos_ids, self.banned_ids = frozenset(eos_ids), frozenset(banned_ids)
        self.vocab_size, self.context, self.image_processor = vocab_size, context, image_processor

    @property
    def rounded(self) -> bool:
        """Whether vLLM computes in less than fp32."""
        return self.driver.dtype != torch.float32

    def sync(self) -> None:
        """Sends the model's weights to vLLM, one parameter at a time, and empties its caches. Every process must call it.

        Raises:
            EngineError: a server cannot be reached or does not take them; in all processes.
        """
        self.driver.load(_NamedWeights(self.model, self.names, self.driver.dtype))

    def rest(self) -> None:
        """Nothing is sampled until the next call: vLLM in this process gives its memory back (sleep mode)."""
        self.driver.rest()

    def close(self) -> None:
        """Ends vLLM in this process, and with it all process groups of the process; a server goes on."""
        self.driver.close()

    def sample_from(self, model: PreTrainedModel) -> None:
        """Samples from another model of the same shape from now on (what a run saved, for its last evaluation)."""
        self.model = model
        self.sync()

    def sample(self, requests: Sequence[SampleRequest], sampling: Sampling) -> list[list[Completion]]:
        """Completions per request, as many as it has keys; see `stream`."""
        return in_order(requests, list(self.stream(requests, sampling)))

    def stream(self, requests: Sequence[SampleRequest], sampling: Sampling) -> Iterator[Ended]:
        """Completions as they end. Entropies are NaN, since vLLM does not tell them.

        Raises:
            ModelError: see `check_requests`; or log-probs that are not numbers.
            EngineError: a server cannot be reached; or an answer that is none to what was asked.
        """
        check_requests(requests, sampling, self.vocab_size, self.context)
        shown = [self._shown(request) for request in requests]
        places = [(i, j) for i, request in enumerate(requests) for j in range(len(request.keys))]
        draws = [Draw(*shown[i], requests[i].keys[j] % _SEEDS, self._room(requests[i], sampling), i) for i, j in places]
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
        for found in self.driver.run(draws, how):
            i, j = places[found.place]
            yield i, j, self._completion(found, requests[i], draws[found.place].limit)

    def _shown(self, request: SampleRequest) -> tuple[list[int], list[Any] | None]:
        """A prompt's ids, in which one token stands for each picture, and its pictures; None where it has none."""
        if not request.images:
            return list(request.prompt_ids), None
        if self.image_processor is None:
            raise ModelError("the prompts have images, and vLLM was started for text only: load the student's image processor")
        ids = self.image_processor.as_written(request.prompt_ids, request.images)
        return ids, [self.image_processor.picture(ref) for ref in request.images]

    def _room(self, request: SampleRequest, sampling: Sampling) -> int:
        """Most tokens of a completion."""
        room = sampling.max_new_tokens if self.context is None else self.context - len(request.prompt_ids)
        return min(room, sampling.max_new_tokens)

    def _completion(self, found: Sampled, request: SampleRequest, limit: int) -> Completion:
        """One completion, after a look at whether it can be one."""
        ids, logprobs = found.ids, found.logprobs
        if fault := self._fault(found, request, limit):
            raise EngineError(
                f"vLLM{found.where} {fault}: such a rollout cannot be trained on. Use a version of vLLM that constraints-vllm.txt allows, "
                "and a server whose settings are those of docs/vllm.md; continue with `zppo resume RUN`"
            )
        assert logprobs is not None  # see above
        known = [value for value in logprobs if value is not None and _LOWEST < value <= 1e-3]
        if len(known) != len(ids):
            raise ModelError(
                f"vLLM{found.where} returned log-probs that are not numbers: the weights have diverged or its precision overflows; go back "
                "to a checkpoint with a lower learning rate"
            )
        return Completion(
            torch.tensor(ids, dtype=torch.int64), torch.tensor(known, dtype=torch.float32), ids[-1] not in self.eos_ids, math.nan
        )

    def _fault(self, found: Sampled, request: SampleRequest, limit: int) -> str:
        """Why an answer is none to what was asked; "" where it is one."""
        ids, logprobs, read = found.ids, found.logprobs, found.prompt_ids
        if read is None or tuple(read) != request.prompt_ids:
            length = "no prompt" if read is None else f"one of {len(read)} tokens"
            return f"was given a prompt of {len(request.prompt_ids)} tokens and says that it read {length}, or other ones"
        if not ids:
            return "returned an empty completion"
        if logprobs is None or len(logprobs) != len(ids):
            return f"returned {len(ids)} tokens with {0 if logprobs is None else len(logprobs)} log-probs"
        if not 0 <= min(ids) <= max(ids) < self.vocab_size:
            return f"returned token ids {min(ids)} to {max(ids)}, and the model knows 0 to {self.vocab_size - 1}"
        if len(ids) > limit or not self.eos_ids.isdisjoint(ids[:-1]):
            return f"returned {len(ids)} tokens, over the limit of {limit} or after an end token"
        if len(ids) < limit and ids[-1] not in self.eos_ids:
            return f"ended a completion after {len(ids)} of {limit} tokens with token {ids[-1]}, which is no end token"
        return ""


def require_vllm(*, server: bool = False) -> None:
    """Raises `SettingsError` where vLLM is not installed; `server`: weights go to servers over NCCL, which vLLM does too."""
    if importlib.util.find_spec("vllm") is None:
        other = "set rollout.vllm.weights_folder, which needs none here" if server else "set rollout.engine to transformers"
        raise SettingsError(
            "rollout.engine is vllm, and vllm cannot be imported here: run "
            f"`pip install -c constraints-vllm.txt '.[vllm]'` on a machine with a GPU, or {other}"
        )


def open_vllm(
    model: PreTrainedModel,
    checkpoint: str,
    accelerator: Accelerator,
    *,
    eos_ids: Collection[int],
    banned_ids: Collection[int],
    servers: Sequence[str] = (),
    image_processor: ImageProcessor | None = None,
    max_model_length: int | None = None,
    gpu_memory_utilization: float = 0.3,
    max_num_seqs: int | None = None,
    enable_sleep_mode: bool = False,
    group_port: int = 51216,
    weights_folder: Path | None = None,
    gather: Callable[[str], list[str]] = lambda text: [text],
) -> VLLMEngine:
    """Starts vLLM in this process, or connects to servers, and makes an engine of it; weights come with the first `sync`.

    Args:
        model: the trainer's model, without a wrapper of a distributed trainer.
        checkpoint: folder or hub name that vLLM loads the architecture (and first weights) from.
        servers: base URLs; none for colocate.
        image_processor: the model's; None for text only.
        max_model_length: most tokens of prompt and completion; None for the model's own.
        gpu_memory_utilization, enable_sleep_mode: of a vLLM in this process.
        max_num_seqs: most rollouts at once.
        group_port: on which weights are sent to servers over NCCL,
        weights_folder: and the folder through which they are sent instead.
        gather: what all training processes say, in the order of ranks.

    Raises:
        SettingsError: vLLM is not installed, or the servers cannot be shared out.
        EngineError: vLLM cannot start or a server cannot be used; the message says why.
    """
    if not servers or weights_folder is None:
        require_vllm(server=bool(servers))
    if image_processor is not None:
        _check_limits(image_processor)
        image_processor.keeps_pictures = True
    names = _checkpoint_names(model, _tensor_names(checkpoint))
    config = model.config.get_text_config(decoder=True)
    known = [getattr(config, "max_position_embeddings", None), max_model_length]
    place = ProcessPlace(accelerator.process_index, accelerator.local_process_index, accelerator.num_processes)
    dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32
    driver: ColocatedVLLM | ServedVLLM
    if servers:
        driver = connect(servers, place, gather, port=group_port, folder=weights_folder, rows=max_num_seqs, device=accelerator.device)
        known.append(driver.context)
    else:
        try:
            driver = ColocatedVLLM(
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
                f"vLLM cannot be used: {one_line(error)}. Lower rollout.vllm.gpu_memory_utilization or set "
                "rollout.vllm.max_model_length if memory is short; it needs a GPU, or vLLM's build for CPUs"
            ) from error
    context = min((limit for limit in known if limit), default=None)
    limits: dict[str, Any] = {"vocab_size": config.vocab_size, "context": context, "image_processor": image_processor}
    return VLLMEngine(driver, model, names, eos_ids, banned_ids, **limits)


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


class _NamedWeights:
    """Weights by their names in the checkpoint, anew each time they are gone through."""

    def __init__(self, model: torch.nn.Module, names: Mapping[str, str], dtype: torch.dtype) -> None:
        self._model, self._names, self._dtype = model, names, dtype

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return ((self._names.get(name, name), value) for name, value in merged_weights(self._model, self._dtype))


def merged_weights(
    model: torch.nn.Module, dtype: torch.dtype | None = None, *, unpack: Callable[[torch.nn.Module], torch.Tensor] | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and values of a model's weights with LoRA adapters added to them; the model's own weights are not touched.

    Merging in place and taking it back, once an update, would wear frozen bf16 weights away by their rounding. A sharded parameter is
    gathered when its turn comes, by all processes together.

    Args:
        dtype: what sharded parameters are gathered in, as the trainer's own passes gather them; None for their own.
        unpack: gives the weight of a layer that is held in 4 bits.
    """

    def value_of(name: str, parameter: torch.nn.Parameter) -> torch.Tensor:
        if unpack is not None and not parameter.is_floating_point():
            return unpack(model.get_submodule(name.rpartition(".")[0]))
        return gathered(parameter, dtype)

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


def gathered(parameter: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """A sharded parameter whole, on its processes' kind of device; one that is not sharded as it is."""
    value = parameter.detach()
    if not isinstance(value, DTensor):
        return value
    moved: Any = value.to(value.device_mesh.device_type, dtype)
    whole: torch.Tensor = moved.full_tensor()
    return whole


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

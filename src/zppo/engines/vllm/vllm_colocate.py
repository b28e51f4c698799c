"""vLLM in the training process, driven request by request: one seed a rollout, and rollouts come out as they end.

Each training process has a vLLM of its own, which knows nothing of the others.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

LOGPROBS_MODE = "processed_logprobs"
"""Log-probs of the distribution that tokens are drawn from, after temperature; vLLM's default is before it."""

BATCHED_TOKENS = 4096
"""Most tokens of one of vLLM's passes: its own default of 32,768 makes it reserve memory that the trainer needs."""


@dataclass(frozen=True, slots=True)
class Draw:
    """One rollout to sample: token ids of the prompt, its pictures, its seed, its token limit, and the place of its prompt.

    In the ids one token stands for each picture.
    """

    prompt_ids: Sequence[int]
    pictures: Sequence[Any] | None
    seed: int
    limit: int
    group: int = 0


class Sampled(NamedTuple):
    """What came of a `Draw`.

    Attributes:
        place: the draw's place in its list.
        ids, logprobs: its tokens, and the log-prob of each; None where vLLM does not say.
        prompt_ids: the prompt as vLLM read it, with a token for every feature of a picture.
        where: the server, for messages; "" in this process.
    """

    place: int
    ids: list[int]
    logprobs: list[float | None] | None
    prompt_ids: Sequence[int] | None
    where: str = ""


@dataclass(frozen=True, slots=True)
class ProcessPlace:
    """Which training process this is, and how many there are."""

    rank: int = 0
    local_rank: int = 0
    processes: int = 1


def named_dtype(name: str) -> torch.dtype:
    """The type that vLLM calls by a name. ValueError where torch has none."""
    found = getattr(torch, name.removeprefix("torch."), None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"dtype {name[:40]!r}")
    return found


class ColocatedVLLM:
    """A `vllm.LLM` in this process.

    Args:
        checkpoint: folder or hub name of architecture and first weights.
        dtype: what it computes in.
        place: this training process.
        memory: vLLM's share of the GPU.
        rows: most sequences at once; None for vLLM's default.
        context: longest prompt with its completion; None for the model's own.
        sleeps: whether `rest` gives its memory back.

    Raises:
        Exception: whatever vLLM raises where it cannot start.
    """

    def __init__(
        self,
        checkpoint: str,
        dtype: torch.dtype,
        place: ProcessPlace,
        *,
        memory: float,
        rows: int | None,
        context: int | None,
        sleeps: bool,
    ) -> None:
        # vLLM joins the processes of a launcher by these; without a launcher there are none.
        os.environ |= {"RANK": str(place.rank), "LOCAL_RANK": str(place.local_rank), "WORLD_SIZE": str(place.processes)}
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", str(_free_port()))
        from vllm import LLM

        self.dtype, self.sleeps, self._asleep = dtype, sleeps, False
        self._llm: Any = LLM(
            model=checkpoint,
            dtype=str(dtype).removeprefix("torch."),
            tensor_parallel_size=1,
            gpu_memory_utilization=memory,
            max_model_len=context,
            max_num_seqs=rows,
            max_num_batched_tokens=BATCHED_TOKENS,
            enable_sleep_mode=sleeps,
            distributed_executor_backend="external_launcher",
            logprobs_mode=LOGPROBS_MODE,
            seed=0,
        )
        self._engine: Any = self._llm.llm_engine

    def load(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Takes weights by their names in the checkpoint, one at a time, and forgets what it has cached of prompts."""
        if self._asleep:
            self._llm.wake_up(tags=["weights"])
        model = self._engine.model_executor.driver_worker.model_runner.model
        for name, value in weights:
            # Vectors stay as they are: some are kept in fp32 (the decay of a recurrence).
            model.load_weights([(name, value.to(self.dtype) if value.dim() > 1 else value)])
        self._llm.reset_prefix_cache()
        self._engine.reset_encoder_cache()

    def run(self, draws: Sequence[Draw], how: dict[str, Any]) -> Iterator[Sampled]:
        """What came of each draw, as it ends; `how` are vLLM's sampling parameters."""
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        if self._asleep:
            self._llm.wake_up()
            self._asleep = False
        waiting = set[str]()
        try:
            for i, draw in enumerate(draws):
                prompt: dict[str, Any] = {"prompt_token_ids": list(draw.prompt_ids)}
                if draw.pictures:
                    prompt["multi_modal_data"] = {"image": list(draw.pictures)}
                final = {"logprobs": 0, "detokenize": False, "output_kind": RequestOutputKind.FINAL_ONLY}
                waiting.add(str(i))
                self._engine.add_request(str(i), prompt, SamplingParams(**how, **final, seed=draw.seed, max_tokens=draw.limit))
            while waiting:
                for output in self._engine.step():
                    if output.finished and output.request_id in waiting:
                        waiting.remove(output.request_id)
                        yield _sampled(output)
        finally:
            if waiting:  # a signal, or an error: the next call must not find them
                self._engine.abort_request(sorted(waiting))

    def rest(self) -> None:
        """Gives its memory back until the next call: its weights wait on the CPU, what it has cached of prompts is lost."""
        if self.sleeps and not self._asleep:
            self._llm.sleep(level=1)
            self._asleep = True

    def close(self) -> None:
        """Ends vLLM and all process groups of this process, those of the run among them: it must not need them any more.

        vLLM would look for its groups when the interpreter ends, after those of the run are gone.
        """
        if self._llm is None:
            return
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        engine, self._llm, self._engine = self._engine, None, None
        engine.engine_core.shutdown()
        cleanup_dist_env_and_memory()


def _sampled(output: Any) -> Sampled:
    (found,) = output.outputs
    ids = list(found.token_ids)
    logprobs: list[float | None] | None = None
    if found.logprobs is not None and len(found.logprobs) == len(ids):
        logprobs = [each[token].logprob if token in each else None for token, each in zip(ids, found.logprobs, strict=True)]
    return Sampled(int(output.request_id), ids, logprobs, output.prompt_token_ids)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])

"""A stand-in for vLLM: the calls of the project, checked, and answered by a real `transformers` model with what it was sent.

It knows nothing of GPUs, batches or paging. `FAULTS` makes it go wrong on purpose, `ENGINES` keeps every engine for the tests.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from vllm.model import Model
from vllm.sampling_params import SamplingParams

__version__ = "0.31.0"
__all__ = ["ENGINES", "FAULTS", "LLM", "CompletionOutput", "RequestOutput", "SamplingParams"]

FAULTS: set[str] = set()
ENGINES: list[LLM] = []


class CompletionOutput(SimpleNamespace):
    """token_ids, logprobs: what one rollout is."""


class RequestOutput(SimpleNamespace):
    """prompt_token_ids, outputs: what one prompt got."""


class LLM:
    """vLLM inside the trainer's process; unknown arguments are refused."""

    def __init__(
        self,
        model: str,
        *,
        dtype: str,
        tensor_parallel_size: int,
        gpu_memory_utilization: float,
        max_model_len: int | None,
        max_num_seqs: int | None,
        enable_sleep_mode: bool,
        distributed_executor_backend: str,
        seed: int,
        max_num_batched_tokens: int,
        logprobs_mode: str,
    ) -> None:
        if "no memory" in FAULTS:
            raise ValueError("No available memory for the cache blocks.")
        self.arguments = {k: v for k, v in locals().items() if k != "self"}
        assert logprobs_mode == "processed_logprobs" and tensor_parallel_size == 1 and dtype in ("float32", "bfloat16")
        self.model = Model(model, max_model_len, FAULTS)
        self.sleeping: set[str] = set()
        self.slept = self.resets = 0
        self.llm_engine = Engine(self)
        self.calls: list[tuple[list[int], SamplingParams]] = self.llm_engine.calls
        ENGINES.append(self)

    def load_weights(self, weights: list[tuple[str, Any]]) -> None:
        assert "weights" not in self.sleeping, "weights were loaded into memory that is not there"
        self.model.load(weights)

    def reset_prefix_cache(self) -> None:
        self.resets += 1

    def sleep(self, level: int) -> None:
        assert self.arguments["enable_sleep_mode"] and level == 1 and not self.llm_engine.waiting
        self.slept += 1
        self.sleeping = {"weights", "kv_cache"}

    def wake_up(self, tags: list[str] | None = None) -> None:
        self.sleeping -= set(tags or ("weights", "kv_cache"))


class Engine:
    """Takes requests and gives back, step by step, those that have ended; the last that came first, since no order is promised."""

    def __init__(self, llm: LLM) -> None:
        self.llm, self.calls, self.ended, self.emptied = llm, [], 0, 0
        self.waiting: dict[str, tuple[dict[str, Any], SamplingParams]] = {}
        self.engine_core = SimpleNamespace(shutdown=lambda: setattr(self, "ended", self.ended + 1))
        self.model_executor = SimpleNamespace(driver_worker=SimpleNamespace(model_runner=SimpleNamespace(model=llm)))

    def add_request(self, request_id: str, prompt: dict[str, Any], params: SamplingParams) -> None:
        assert isinstance(request_id, str) and request_id not in self.waiting and params.n == 1
        assert prompt["prompt_token_ids"] and set(prompt) <= {"prompt_token_ids", "multi_modal_data"}
        self.calls.append((prompt["prompt_token_ids"], params))
        self.waiting[request_id] = prompt, params

    def reset_encoder_cache(self) -> None:
        self.emptied += 1

    def abort_request(self, request_ids: list[str]) -> None:
        for name in request_ids:
            self.waiting.pop(name, None)  # one that has ended is passed over

    def step(self) -> list[RequestOutput]:
        """A batch is the requests of one kind, seeds and limits apart."""
        assert not self.llm.sleeping
        last = next(reversed(self.waiting.values()))[1]
        batch = [
            name
            for name in reversed(self.waiting)
            if replace(self.waiting[name][1], seed=0, max_tokens=1) == replace(last, seed=0, max_tokens=1)
        ]
        given = [self.waiting.pop(name) for name in batch]
        shown = [prompt.get("multi_modal_data", {}).get("image") for prompt, _ in given]
        prompts = [
            self.llm.model.expanded(prompt["prompt_token_ids"], images or ()) for (prompt, _), images in zip(given, shown, strict=True)
        ]
        made = self.llm.model.generate(prompts, [how for _, how in given], shown)
        return [
            RequestOutput(
                request_id=name, finished=True, prompt_token_ids=ids, outputs=[CompletionOutput(token_ids=tokens, logprobs=logprobs)]
            )
            for name, ids, (tokens, logprobs) in zip(batch, prompts, made, strict=True)
        ]

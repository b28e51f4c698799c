"""A stand-in for vLLM: the calls that TRL makes, checked, and answered by a real `transformers` model with the weights that were sent.

It knows nothing of GPUs, batches or paging. `FAULTS` makes it go wrong on purpose, `ENGINES` keeps every engine for the tests.
"""

from __future__ import annotations

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
        tensor_parallel_size: int,
        gpu_memory_utilization: float,
        max_model_len: int | None,
        max_num_seqs: int | None,
        enable_sleep_mode: bool,
        model_impl: str,
        distributed_executor_backend: str,
        seed: int,
        max_num_batched_tokens: int,
        logprobs_mode: str,
        quantization: str | None,
        trust_remote_code: bool,
    ) -> None:
        if "no memory" in FAULTS:
            raise ValueError("No available memory for the cache blocks.")
        self.arguments = {k: v for k, v in locals().items() if k != "self"}
        assert logprobs_mode == "processed_logprobs" and not trust_remote_code
        self.model = Model(model, max_model_len, FAULTS)
        self.sleeping: set[str] = set()
        self.slept = self.resets = 0
        self.calls: list[tuple[list[list[int]], SamplingParams]] = []
        runner = SimpleNamespace(model=self)
        worker = SimpleNamespace(driver_worker=SimpleNamespace(model_runner=runner))
        self.llm_engine = SimpleNamespace(model_executor=worker)
        ENGINES.append(self)

    def load_weights(self, weights: list[tuple[str, Any]]) -> None:
        assert "weights" not in self.sleeping, "weights were loaded into memory that is not there"
        self.model.load(weights)

    def reset_prefix_cache(self) -> None:
        self.resets += 1

    def sleep(self, level: int) -> None:
        assert self.arguments["enable_sleep_mode"] and level == 2
        self.slept += 1
        self.sleeping = {"weights", "kv_cache"}
        self.model.forget()

    def wake_up(self, tags: list[str]) -> None:
        self.sleeping -= set(tags)

    def generate(self, prompts: list[dict[str, Any]], sampling_params: SamplingParams, use_tqdm: bool) -> list[RequestOutput]:
        assert not self.sleeping and not use_tqdm
        ids = [prompt["prompt_token_ids"] for prompt in prompts]
        images = [prompt.get("multi_modal_data", {}).get("image") for prompt in prompts]
        self.calls.append((ids, sampling_params))
        return [
            RequestOutput(prompt_token_ids=row, outputs=[CompletionOutput(token_ids=tokens, logprobs=logprobs)])
            for row, (tokens, logprobs) in zip(ids, self.model.generate(ids, sampling_params, images), strict=True)
        ]

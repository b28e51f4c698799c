"""`zppo` with real vLLM in its process on a CPU. `--deaf` first: a vLLM, or a server, that gets no weights after the first ones. `--beside`
first: a user's reward function grades rollouts as they end, and what the teacher is asked while the student samples is counted.

vLLM's linear layers for CPUs pack their weights and throw the originals away, so that none could be loaded later. Here they keep them. And
a seeded prompt must not be computed in parts: vLLM would take back what its generator has drawn, and that of a CPU cannot.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any

import torch
import vllm
import vllm.model_executor.layers.linear  # it takes the function below by name
import vllm.model_executor.layers.utils as utils

from zppo.engines.vllm.vllm_colocate import ColocatedVLLM
from zppo.engines.vllm.vllm_server import FileSender


def keep(layer: Any, remove_weight: bool) -> None:
    """In place of `dispatch_cpu_unquantized_gemm`: the layer multiplies with its weights as they are."""
    layer.cpu_linear = torch.nn.functional.linear


original = utils.dispatch_cpu_unquantized_gemm
for module in [m for name, m in sys.modules.items() if name.startswith("vllm.")]:
    if vars(module).get("dispatch_cpu_unquantized_gemm") is original:
        module.dispatch_cpu_unquantized_gemm = keep  # type: ignore[attr-defined]
vllm.LLM = functools.partial(vllm.LLM, enable_chunked_prefill=False)  # type: ignore[misc, assignment, call-arg]

if __name__ == "__main__":
    from zppo.cli import main

    arguments = sys.argv[1:]
    if arguments[:1] == ["--deaf"]:
        load, calls, first = ColocatedVLLM.load, list[None](), list[tuple[str, torch.Tensor]]()

        def once(self: ColocatedVLLM, weights: Any) -> None:
            calls.append(None)
            load(self, weights if len(calls) == 1 else ())

        write = FileSender._write

        def the_first(self: FileSender, weights: Any, place: Path) -> None:
            given = [(name, value.clone()) for name, value in weights]
            first[:] = first or given
            write(self, first, place)

        ColocatedVLLM.load = once  # type: ignore[method-assign]
        FileSender._write = the_first  # type: ignore[method-assign]
        arguments = arguments[1:]
    if arguments[:1] == ["--beside"]:
        import zppo.rollout.step_parts
        from zppo.rollout.reformulated import AskAhead

        sampled = AskAhead.sampled

        def counted(self: AskAhead, hard: Any, log: Any) -> None:
            print(f"begun while sampling: {sum(seen.begun for seen in self._seen.values())}")
            sampled(self, hard, log)

        AskAhead.sampled = counted  # type: ignore[method-assign]
        zppo.rollout.step_parts.grades_while_sampling = lambda settings, scorer: True
        arguments = arguments[1:]
    sys.exit(main(arguments))

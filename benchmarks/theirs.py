"""The peer: stock `trl.GRPOTrainer`, in its own `train()`, halted between two steps.

Its defaults stand, but for what would slow it down here (gradient checkpointing, bf16 on a CPU) or what it is not asked to do (services
that log, checkpoints). One rollout batch makes one optimizer step, which is its default and spares it the pass for old log-probs. The
reward function looks rewards up by place in the batch. For the training part `rollout_func`, its own way in for rollouts from
elsewhere, hands it the same token ids as our side has.
"""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.workers import PeakMemory, Stopwatch
from benchmarks.world import ENDS, Shape, completions, correct, lengths, user_turn


@dataclasses.dataclass(frozen=True)
class Theirs:
    """What the peer runs.

    Attributes:
        model, shape, threads: as on our side.
        questions: rows in the order of our batches.
        rows: `per_device_train_batch_size`, rollouts per forward and backward.
        settings: more fields of `GRPOConfig`.
    """

    model: Path
    shape: Shape
    questions: list[dict[str, str]]
    threads: int
    rows: int
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)


def config_of(own: Theirs, folder: str) -> Any:
    """Its configuration."""
    from trl import GRPOConfig

    shape = own.shape
    given = {
        "output_dir": folder,
        "per_device_train_batch_size": own.rows,
        "gradient_accumulation_steps": shape.questions * shape.group // own.rows,
        "num_generations": shape.group,
        "max_completion_length": shape.limit,
        "max_steps": shape.steps,
        "learning_rate": 1e-6,
        "lr_scheduler_type": "constant",
        "epsilon_high": 0.28,
        "beta": 0.0,
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "shuffle_dataset": False,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    return GRPOConfig(**{**given, **own.settings})


class GivenLengths:
    """A logits processor of `generate`: completions end where it is said, see `world.lengths`."""

    def __init__(self, shape: Shape) -> None:
        self.shape, self.step, self._width, self._start, self._lengths = shape, 0, 0, 0, list[int]()

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """Nothing but the end token can be drawn where a completion is to end."""
        rows, width = input_ids.shape
        if width != self._width + 1:  # another batch
            self.step += 1
            self._start, self._lengths = width, lengths(self.shape, rows, self.step)
        self._width = width
        ending = [row for row, length in enumerate(self._lengths) if length == width - self._start + 1]
        if ending:
            scores[ending] = float("-inf")
            scores[ending, ENDS[0]] = 0.0
        return scores


class Peer:
    """The trainer and what is written down about it.

    Attributes:
        trivial: share of the next step's groups that are all-right or all-wrong.
        watch: parts of the step.
    """

    def __init__(self, own: Theirs, folder: str) -> None:
        import torch
        from datasets import Dataset
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from trl import GRPOTrainer

        torch.set_num_threads(own.threads)
        self.own, self.trivial, self.watch = own, 0.5, Stopwatch()
        self.tokenizer: Any = AutoTokenizer.from_pretrained(own.model)
        self.sampled = 0
        prompts = [[{"role": "user", "content": user_turn(row["prompt"])}] for row in own.questions]
        self.trainer: Any = GRPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(own.model, dtype=torch.float32),
            reward_funcs=self.reward,
            args=config_of(own, folder),
            train_dataset=Dataset.from_dict({"prompt": prompts}),
            processing_class=self.tokenizer,
        )
        if own.shape.lognormal is not None:
            model: Any = self.trainer.model
            model.generate = functools.partial(model.generate, logits_processor=[GivenLengths(own.shape)])
        self._wrap()

    def reward(self, completion_ids: list[list[int]], **_: Any) -> list[float | None]:
        """Rewards by place in the batch."""
        size = self.own.shape.group
        self.sampled = sum(map(len, completion_ids))
        rows = correct(len(completion_ids) // size, size, self.trivial, 1)
        return [float(flag) for row in rows for flag in row]

    def replay(self, prompts: list[Any], trainer: Any) -> dict[str, Any]:
        """`rollout_func`: the same completions on every call."""
        shape = self.own.shape
        ids = self.tokenizer.apply_chat_template(prompts, add_generation_prompt=True)["input_ids"]
        rows = [ids for group in completions(shape, seed=0) for ids in group]
        return {"prompt_ids": ids, "completion_ids": rows, "logprobs": None}

    def _wrap(self) -> None:
        """Stopwatches around what belongs to no public hook; two clock readings each."""
        trainer, watch = self.trainer, self.watch
        trainer._generate = watch.timed("sampling", trainer._generate)
        trainer._prepare_inputs = watch.timed("inputs", trainer._prepare_inputs)
        trainer.training_step = watch.timed("passes", trainer.training_step)
        scores = trainer._get_per_token_logps_and_entropies
        import torch

        old = watch.timed("logprobs", scores)
        trainer._get_per_token_logps_and_entropies = lambda *a, **k: scores(*a, **k) if torch.is_grad_enabled() else old(*a, **k)


def serve(pipe: Connection, own: Theirs) -> None:
    """Steps on demand, as `ours.serve`."""
    from transformers import TrainerCallback

    with tempfile.TemporaryDirectory() as folder:
        peer = Peer(own, folder)
        memory = PeakMemory()

        def wait() -> None:
            asked = pipe.recv()
            peer.trivial = asked["trivial"]
            peer.trainer.rollout_func = peer.replay if asked.get("replay") else None
            peer.watch.start()

        class Halt(TrainerCallback):
            def on_train_begin(self, *_: Any, **__: Any) -> None:
                pipe.send(("ready", None))
                wait()

            def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
                self.began = peer.watch.seconds()["step"]

            def on_step_end(self, *_: Any, **__: Any) -> None:
                found = by_part(peer.watch.seconds(), self.began)
                counts = {"student_tokens": float(peer.sampled), "memory": memory.above()}
                pipe.send(("step", {**found, **counts}))
                wait()

        peer.trainer.add_callback(Halt())
        peer.trainer.train()


def by_part(watched: dict[str, float], clipped: float) -> dict[str, float]:
    """Seconds by part; the optimizer's step is part of the update."""
    logprobs, optimizer = watched.get("logprobs", 0.0), watched["step"] - clipped
    parts = {
        "sampling": watched["sampling"],
        "logprobs": logprobs,
        "update": watched["passes"] - watched["inputs"] + optimizer,
        "teacher": 0.0,
    }
    return {**parts, "other": watched["step"] - sum(parts.values()), "step": watched["step"], "cpu": watched["cpu"]}

"""One of the processes of tests/test_trl.py: trains with TRL and writes down what it got."""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path
from typing import Any

from datasets import Dataset
from safetensors.torch import save_file

from zppo.core.types import Group
from zppo.integrations.trl import ZPPOConfig, ZPPOTrainer

RECIPE = {
    "teacher": {"rollout": {"max_new_tokens": 6}, "compression": {"max_new_tokens": 12}},
    "zone": {"rho_aug": 0.5, "buffer_capacity": 6},
}


def luck(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """A random model boxes no answer, so one text in three is right; each row's `bonus` is added."""
    digests = [hashlib.sha256((p + c).encode("utf-8", "surrogatepass")).digest()[0] for p, c in zip(prompts, completions, strict=True)]
    return [float(d % 3 == 0) * (1 + bonus) for d, bonus in zip(digests, columns["bonus"], strict=True)]


def rows(count: int = 24) -> Dataset:
    return Dataset.from_list([{"prompt": f"What is {i} plus {i + 1}?", "answer": str(2 * i + 1), "bonus": i / 100} for i in range(count)])


def make_trainer(folder: Path, out: Path, **changes: Any) -> ZPPOTrainer:
    """A tiny random student and teacher: steps of 8 questions with 4 completions each, in 2 updates; `changes` of the configuration."""
    given: dict[str, Any] = {
        name: changes.pop(name) for name in ("teacher_model", "reward_funcs", "train_dataset", "eval_dataset", "model") if name in changes
    }
    more: dict[str, Any] = {name: changes.pop(name) for name in ("peft_config", "tools", "rollout_func", "args") if name in changes}
    config: dict[str, Any] = {
        "output_dir": str(out),
        "per_device_train_batch_size": 16,
        "steps_per_generation": 2,
        "num_generations": 4,
        "max_completion_length": 12,
        "max_steps": 6,
        "save_steps": 4,
        "learning_rate": 1e-3,
        "recipe": RECIPE,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": 2,
    }
    parts: dict[str, Any] = {
        "model": str(folder / "student"),
        "teacher_model": str(folder / "teacher"),
        "reward_funcs": luck,
        "train_dataset": rows(),
    }
    return ZPPOTrainer(**{**parts, "args": ZPPOConfig(**{**config, **changes}), **more, **given})


def watch(trainer: ZPPOTrainer) -> list[dict[str, Any]]:
    """What every step makes, as it goes on: its groups, and what TRL's loss is given."""
    steps: list[dict[str, Any]] = []
    take, live = trainer._take_step, trainer._live

    def taken(asked: Any) -> list[Group]:
        steps.append({"groups": take(asked)})
        return steps[-1]["groups"]  # type: ignore[no-any-return]

    def given(output: dict[str, Any]) -> dict[str, Any]:
        steps[-1]["output"] = live(output)
        return steps[-1]["output"]  # type: ignore[no-any-return]

    trainer._take_step, trainer._live = taken, given  # type: ignore[method-assign]
    return steps


def main(arguments: list[str]) -> int:
    """Arguments: the folder of the models, the folder to write to."""
    import torch.distributed as dist

    out = Path(arguments[1])
    trainer = make_trainer(Path(arguments[0]), out / "run", per_device_train_batch_size=8, max_steps=4)
    steps = watch(trainer)
    trainer.train()
    rank = dist.get_rank()
    (out / f"final-{rank}").mkdir()
    save_file({name: p.detach().clone() for name, p in trainer.model.named_parameters()}, out / f"final-{rank}" / "model.safetensors")
    kept = [{"texts": [r.text for g in s["groups"] for r in g.rollouts], **s["output"]} for s in steps]
    (out / f"{rank}.pickle").write_bytes(pickle.dumps((kept, trainer.parts.buffer.state_dict())))
    dist.barrier()
    return 0

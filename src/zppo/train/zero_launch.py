"""What an accelerate configuration asks of DeepSpeed, and whether that is what stands. No torch, as in launch.py."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from zppo.errors import LauncherError

Stage = Literal[2, 3]

_TUNING = frozenset(
    "allgather_bucket_size allgather_partitions contiguous_gradients overlap_comm reduce_bucket_size reduce_scatter "
    "stage3_max_live_parameters stage3_max_reuse_distance stage3_param_persistence_threshold stage3_prefetch_bucket_size "
    "sub_group_size use_multi_rank_bucket_allreduce".split()
)
"""Fields of `zero_optimization` that change how fast it is and how much memory it takes, and not what comes out."""

_OF_THE_RECIPE = {
    "optimizer": "train.optimizer, train.learning_rate and train.weight_decay",
    "scheduler": "train.learning_rate, which is constant",
    "train_batch_size": "rollout.batch_size and train.minibatches",
    "train_micro_batch_size_per_gpu": "train.tokens_per_microbatch",
    "gradient_accumulation_steps": "train.minibatches and train.tokens_per_microbatch",
    "gradient_clipping": "train.max_grad_norm",
    "fp16": "train.precision, fp32 or bf16 autocast",
    "bf16": "train.precision",
    "torch_autocast": "train.precision",
    "activation_checkpointing": "train.gradient_checkpointing",
}
"""What a recipe says, and where: two places for one number would let one of them be wrong."""

_MEANINGLESS = ("stage3_gather_16bit_weights_on_model_save", "steps_per_print")  # what is saved are whole fp32 weights


@dataclass(frozen=True, slots=True)
class ZeroWish:
    """ZeRO as an accelerate configuration wants it.

    Attributes:
        stage: 2 or 3.
        clipping: the gradient norm that it would clip at, None where it says nothing.
        tuning: fields of DeepSpeed's `zero_optimization`.
    """

    stage: Stage
    clipping: float | None = None
    tuning: Mapping[str, Any] = field(default_factory=dict)

    def check_clipping(self, max_norm: float) -> None:
        """Raises LauncherError where it names another norm than `train.max_grad_norm`."""
        if self.clipping not in (None, max_norm):
            raise LauncherError(
                f"the accelerate configuration sets gradient_clipping to {self.clipping:g}, and train.max_grad_norm is {max_norm:g}: "
                "leave gradient_clipping out"
            )


def read_zero(env: Mapping[str, str]) -> ZeroWish:
    """Reads the environment that `accelerate launch` made of a `deepspeed_config`, and the file that it names.

    Raises:
        LauncherError: it asks for something that would silently be something else, or that is not built.
    """
    smaller = "none, and shard over more GPUs or lower train.tokens_per_microbatch"
    for name, what, mend in (
        ("OFFLOAD_OPTIMIZER_DEVICE", "offload_optimizer_device", smaller),
        ("OFFLOAD_PARAM_DEVICE", "offload_param_device", smaller),
        ("ZERO3_INIT", "zero3_init_flag", "false; every process reads the whole checkpoint before it is sharded"),
        ("MOE_LAYER_CLS_NAMES", "deepspeed_moe_layer_cls_names", "nothing; a layer is gathered module by module"),
    ):
        value = env.get(f"ACCELERATE_DEEPSPEED_{name}", "")
        if value.lower() not in ("", "none", "false", "0"):
            raise LauncherError(
                f"the accelerate configuration sets {what} to {value!r}, which zppo does not do: set it to {mend}"
            )
    file = env.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "")
    section = _read_file(Path(file)) if file not in ("", "none") else {}
    stage = section.pop("stage", env.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"))
    return ZeroWish(_stage(stage), _clipping(env), section)


def _stage(value: object) -> Stage:
    for stage in get_args(Stage):
        if str(value) == str(stage):
            return stage  # type: ignore[no-any-return]
    raise LauncherError(
        f"the accelerate configuration asks for ZeRO stage {value}: zppo trains with zero_stage 2 (gradients and optimizer are "
        "sharded) and 3 (weights too), and without sharding by recipes/accelerate/ddp.yaml"
    )


def _clipping(env: Mapping[str, str]) -> float | None:
    value = env.get("ACCELERATE_GRADIENT_CLIPPING", "none").lower()
    try:
        return None if value in ("none", "auto") else float(value)
    except ValueError:
        raise LauncherError(
            f"the accelerate configuration sets gradient_clipping to {value!r}: leave it out; it is train.max_grad_norm"
        ) from None


def _read_file(path: Path) -> dict[str, Any]:
    """`zero_optimization` of a DeepSpeed configuration, reduced to what zppo takes."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        section = dict(config.pop("zero_optimization", {}))
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise LauncherError(
            f"deepspeed_config_file {path} cannot be read ({error}): it must be a JSON file with an object in it; or leave it out"
        ) from error
    for name, value in config.items():
        if not _says_nothing(name, value):
            where = f"; that is {_OF_THE_RECIPE[name]} of the recipe" if name in _OF_THE_RECIPE else ""
            raise LauncherError(
                f"deepspeed_config_file {path} sets {name}, which zppo does not take from it: leave it out{where}"
            )
    taken = {name: value for name, value in section.items() if not _says_nothing(name, value)}
    if foreign := [name for name in taken if name not in _TUNING and name != "stage"]:
        raise LauncherError(
            f"deepspeed_config_file {path} sets zero_optimization.{foreign[0]}, which zppo does not do: leave it out (it takes "
            f"stage, {', '.join(sorted(_TUNING))})"
        )
    return {**taken, **{name: value for name, value in section.items() if name in _TUNING and value is False}}


def _says_nothing(name: str, value: Any) -> bool:
    """Whether a field leaves things as they are: a default, `auto`, something that is off."""
    if isinstance(value, dict):
        return value.get("enabled") in (False, "auto") or value.get("device") == "none"
    return value in (None, False, "auto") or name in _MEANINGLESS

"""What is taken from a DeepSpeed configuration, and what is refused by name."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from test_distributed import CONFIGS, accelerate_environment, launched
from zppo.errors import LauncherError
from zppo.train.launch import Launch, read_launch
from zppo.train.zero import import_deepspeed
from zppo.train.zero_launch import ZeroWish, read_zero


def read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str, **config: Any) -> Launch:
    """By way of accelerate's own code, from deepspeed-zero3.yaml with a DeepSpeed configuration, where one is given."""
    if config:
        path = tmp_path / "deepspeed.json"
        path.write_text(json.dumps(config), encoding="utf-8")
        arguments = (*arguments, "--deepspeed_config_file", str(path))
    env = accelerate_environment(monkeypatch, "--config_file", str(CONFIGS / "deepspeed-zero3.yaml"), *arguments)
    return read_launch(launched(env))


def test_what_changes_speed_and_memory_alone_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A configuration as people have it: much is auto, which leaves it to the recipe."""
    launch = read(
        tmp_path,
        monkeypatch,
        zero_optimization={
            "stage": 2,
            "overlap_comm": False,
            "reduce_bucket_size": 1000,
            "allgather_bucket_size": "auto",
            "offload_optimizer": {"device": "none"},
            "stage3_gather_16bit_weights_on_model_save": True,
        },
        train_batch_size="auto",
        gradient_accumulation_steps="auto",
        gradient_clipping="auto",
        bf16={"enabled": "auto"},
        fp16={"enabled": False},
        steps_per_print=100,
        wall_clock_breakdown=False,
    )
    assert launch.sharding == "zero2"
    assert launch.zero == ZeroWish(2, None, {"overlap_comm": False, "reduce_bucket_size": 1000})


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"zero_optimization": {"stage": 1}}, "ZeRO stage 1"),
        ({"zero_optimization": {"stage": True}}, "ZeRO stage True"),
        (
            {"zero_optimization": {"offload_param": {"device": "cpu"}}},
            "zero_optimization.offload_param, which zppo does not do",
        ),
        ({"zero_optimization": {"zero_quantized_weights": True}}, "zero_optimization.zero_quantized_weights"),
        ({"zero_optimization": True}, "cannot be read"),
        (
            {"optimizer": {"type": "AdamW", "params": {"lr": 1e-5}}},
            "sets optimizer.*that is train.optimizer, train.learning_rate",
        ),
        ({"scheduler": {"type": "WarmupLR"}}, "train.learning_rate, which is constant"),
        ({"train_batch_size": 64}, "that is rollout.batch_size"),
        ({"train_micro_batch_size_per_gpu": 2}, "that is train.tokens_per_microbatch"),
        ({"gradient_accumulation_steps": 8}, "that is train.minibatches"),
        ({"gradient_clipping": 0.5}, "that is train.max_grad_norm"),
        ({"fp16": {"enabled": True}}, "sets fp16.*that is train.precision"),
        ({"bf16": {"enabled": True}}, "sets bf16.*that is train.precision"),
        ({"tensorboard": {"enabled": True}}, "sets tensorboard, which zppo does not take from it: leave it out$"),
    ],
)
def test_what_a_configuration_file_may_not_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: dict[str, Any], said: str
) -> None:
    with pytest.raises(LauncherError, match=said):
        read(tmp_path, monkeypatch, **config)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--zero_stage", "1"), "ZeRO stage 1"),
        (("--offload_optimizer_device", "cpu"), "offload_optimizer_device to 'cpu'"),
        (("--offload_param_device", "nvme"), "offload_param_device to 'nvme'"),
        (("--zero3_init_flag", "true"), "zero3_init_flag to 'true'"),
        (("--deepspeed_moe_layer_cls_names", "Block"), "deepspeed_moe_layer_cls_names to 'Block'"),
        (("--gradient_accumulation_steps", "4"), "train.tokens_per_microbatch"),
        (("--deepspeed_config_file", "none.json"), "none.json cannot be read"),
    ],
)
def test_what_an_accelerate_configuration_may_not_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], said: str
) -> None:
    with pytest.raises(LauncherError, match=said):
        read(tmp_path, monkeypatch, *arguments)


def test_clipping_is_the_recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zero = read(tmp_path, monkeypatch, "--gradient_clipping", "0.5").zero
    assert zero is not None and zero.clipping == 0.5
    zero.check_clipping(0.5)
    with pytest.raises(LauncherError, match="gradient_clipping to 0.5, and train.max_grad_norm is 1"):
        zero.check_clipping(1.0)
    ZeroWish(2).check_clipping(1.0)
    with pytest.raises(LauncherError, match="gradient_clipping to 'much'"):
        read_zero({"ACCELERATE_GRADIENT_CLIPPING": "much"})


def test_deepspeed_must_be_there_and_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    other = SimpleNamespace(get_accelerator=lambda: SimpleNamespace(device_name=lambda: "cuda"))
    monkeypatch.setitem(sys.modules, "deepspeed", other)
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    with pytest.raises(LauncherError, match="DS_ACCELERATOR=cpu"):
        import_deepspeed("cpu")
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(LauncherError, match=r"pip install 'zppo\[deepspeed\]'"):
        import_deepspeed("cpu")

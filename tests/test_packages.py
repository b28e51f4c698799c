"""What a recipe needs beside `pip install zppo`: kernels on a GPU, and packages of extras."""

from __future__ import annotations

import re
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from seeing import make_seeing
from zppo.cli import main
from zppo.config.recipe import load_recipe
from zppo.engines.loading import check_kernels, load_network
from zppo.errors import ModelError
from zppo.packages import EXTRAS, distribution, install_line, kernels_of
from zppo.planning.machine import Machine
from zppo.planning.memory import GIB
from zppo.planning.needed import missing_rows, packages_needed

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def linear(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen3.5."""
    return make_seeing(tmp_path_factory.mktemp("linear") / "qwen3_5", "qwen3_5")


def test_a_gpu_without_kernels_is_an_error_and_may_be_insisted_on(linear: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("fla", "causal_conv1d"):
        monkeypatch.setitem(sys.modules, module, None)  # an import fails, whatever is installed here
    with pytest.raises(ModelError, match=r"cuda:1, up to five times slower \(causal-conv1d: .*; flash-linear-attention: .*zppo\[gpu\]"):
        check_kernels(linear, "cuda:1")
    with pytest.raises(ModelError, match="up to five times slower"):
        load_network(linear, dtype="auto", device_map="cuda")  # a teacher, a judge, a model that is served: before its weights are read
    check_kernels(linear, "cpu")
    monkeypatch.setenv("ZPPO_SLOW_KERNELS", "1")
    check_kernels(linear, "cuda:1")


def test_one_that_cannot_be_imported_is_named_with_the_reason(linear: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "fla", ModuleType("fla"))
    monkeypatch.delitem(sys.modules, "causal_conv1d", raising=False)
    (tmp_path / "causal_conv1d.py").write_text("raise OSError('undefined symbol: _ZN3c10')", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModelError, match=r"\(causal-conv1d: undefined symbol: _ZN3c10\)"):
        check_kernels(linear, "cuda")
    monkeypatch.setitem(sys.modules, "causal_conv1d", ModuleType("causal_conv1d"))
    check_kernels(linear, "cuda")


def test_models_without_such_layers_need_nothing(tiny_qwen3_dir: Path) -> None:
    check_kernels(tiny_qwen3_dir, "cuda")
    assert kernels_of("qwen3") == kernels_of("nothing-known") == kernels_of("../qwen3_5") == ()
    assert kernels_of("qwen3_5_text") == kernels_of("qwen3_5") == kernels_of("qwen3_next") == ("causal_conv1d", "fla")


@pytest.mark.skipif(find_spec("fla") is not None, reason="the kernels are here")
def test_the_functions_that_stand_in_for_kernels_are_those_of_the_library(linear: Path) -> None:
    """What is read off the library's file is what its functions say they lack when they run."""
    import logging

    import torch

    model: Any = load_network(linear, dtype=torch.float32, images=True).model.language_model
    said: list[str] = []
    logger = logging.getLogger("transformers.integrations.hub_kernels")
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    type(logger).warning_once.cache_clear()  # type: ignore[attr-defined]
    try:
        model(input_ids=torch.ones(1, 4, dtype=torch.long))
    finally:
        logger.removeHandler(handler)
    named = {name for text in said for name in re.findall(r"because `([\w-]+)` is not installed", text)}
    assert {name.replace("_", "-") for name in named} == set(map(distribution, kernels_of("qwen3_5")))


def test_a_student_is_looked_at_before_anything_is_loaded(recipe: Path, linear: Path, tmp_path: Path) -> None:
    from zppo.train.assemble import assemble

    settings = load_recipe(recipe, [f"--student.model={linear}"])
    accelerator: Any = SimpleNamespace(device="cuda:0")
    nothing: Any = None
    with pytest.raises(ModelError, match="ZPPO_SLOW_KERNELS"):
        assemble(settings, nothing, tmp_path, None, nothing, nothing, accelerator, nothing, nothing)


def test_what_a_recipe_needs(recipe: Path, linear: Path) -> None:
    def needed(*overrides: str, gpu: bool = True) -> list[str]:
        return packages_needed(load_recipe(recipe, overrides), gpu=gpu)

    assert needed() == []
    assert needed("--rollout.engine=vllm", "--train.trackers=[wandb,swanlab]") == ["vllm", "wandb", "swanlab"]
    assert needed("--train.lora={}", "--student.quantize=4bit") == ["peft", "bitsandbytes"]
    assert needed("--train.optimizer=adamw-8bit") == ["bitsandbytes"]
    assert needed("--data.train=reasoning_gym:basic_arithmetic", "--data.eval=hub:a/b") == ["reasoning_gym", "datasets"]
    assert needed(f"--student.model={linear}") == ["causal_conv1d", "fla"] and needed(f"--student.model={linear}", gpu=False) == []
    assert needed("--student.model=Qwen/Qwen3.5-9B") == needed("--teacher.model=Qwen/Qwen3.5-27B-FP8") == ["causal_conv1d", "fla"]
    assert needed("--teacher.model=Qwen/Qwen3.5-27B-FP8", "--teacher.base_urls=[http://a:1/v1]") == []


def test_what_is_missing_is_named_with_what_installs_it(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zppo.packages.find_spec", lambda module: None)
    settings = load_recipe(recipe, ["--rollout.engine=vllm", "--train.lora={}", "--train.trackers=[wandb,comet_ml]"])
    line = "pip install 'zppo[lora,trackers,vllm]' comet-ml"
    assert missing_rows(settings, gpu=True) == [("not installed here", f"vllm, peft, wandb, comet-ml; {line}")]
    assert install_line(["fla", "causal_conv1d"]) == "pip install --no-build-isolation 'zppo[gpu]'"
    monkeypatch.setattr("zppo.packages.find_spec", lambda module: ModuleType(module))
    assert missing_rows(settings, gpu=True) == []


def test_extras_have_what_they_are_said_to_have() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    for module, extra in EXTRAS.items():
        assert any(re.split(r"[<>=!]", line)[0] == distribution(module) for line in extras[extra]), module


def test_the_dry_run_says_what_is_not_installed(recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("zppo.planning.machine.find_machine", lambda device: Machine("H200", True, 141 * GIB))
    monkeypatch.setattr("zppo.packages.find_spec", lambda module: None if module in ("fla", "vllm") else ModuleType(module))
    monkeypatch.setattr("zppo.planning.needed.kernels_of", lambda family: ("fla",) if family == "qwen3_5" else ())
    assert main(["train", str(recipe), "--dry-run", "--student.model=Qwen/Qwen3.5-2B", "--rollout.engine=vllm", "--train.device=auto"]) == 0
    assert "not installed here  vllm, flash-linear-attention; pip install 'zppo[gpu,vllm]'" in capsys.readouterr().out

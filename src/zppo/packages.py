"""What `pip install zppo` alone does not bring: which extra has a package, and whether it is here. No torch, and nothing is imported."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path

EXTRAS = {
    "bitsandbytes": "8bit",
    "causal_conv1d": "gpu",
    "fla": "gpu",
    "peft": "lora",
    "reasoning_gym": "gym",
    "tensorboard": "trackers",
    "trackio": "trackers",
    "vllm": "vllm",
    "wandb": "trackers",
}
"""By the name that is imported."""

_DISTRIBUTIONS = {"fla": "flash-linear-attention"}
"""The name that pip knows, where it is another one than that of the import with dashes."""

_COMPILED = {"causal_conv1d", "mamba_ssm"}  # where they are installed, against the torch that is there
_KERNEL = re.compile(r"""use_kernel_func_from_hub_with_fallback\(\s*["'][\w.]+["'],\s*["'](\w+)["']""")
SLOW_KERNELS = "ZPPO_SLOW_KERNELS"


def distribution(module: str) -> str:
    """The name under which pip knows what is imported as `module`."""
    return _DISTRIBUTIONS.get(module, module.replace("_", "-"))


def missing(modules: Iterable[str]) -> list[str]:
    """Those that are not installed here, in order."""
    return [module for module in modules if find_spec(module) is None]


def install_line(modules: Iterable[str]) -> str:
    """What installs them: by the project's extras, and by name where no extra has one."""
    wanted = list(modules)
    extras = sorted({EXTRAS[module] for module in wanted if module in EXTRAS})
    others = [distribution(module) for module in wanted if module not in EXTRAS]
    options = ["--no-build-isolation"] if _COMPILED & set(wanted) else []
    return " ".join(["pip install", *options, *([f"'zppo[{','.join(extras)}]'"] if extras else []), *others])


def slow_allowed(env: Mapping[str, str] = os.environ) -> bool:
    """Whether this machine may train without the kernels of a model's layers.

    A variable and no setting: it says something about the machine, and a recipe is carried from one to another.
    """
    return env.get(SLOW_KERNELS, "").lower() in ("1", "true", "yes", "on")


@cache
def kernels_of(model_type: str) -> tuple[str, ...]:
    """The packages without which transformers computes layers of this kind of model in plain PyTorch, several times slower on a GPU.

    Read off the library's own file of that model, which names each with the function that it stands in for. Empty for a kind that has no
    such layers, or is not known.

    Args:
        model_type: as in config.json; that of a text model (`qwen3_5_text`) means its family.
    """
    library = find_spec("transformers")
    name = model_type.replace("-", "_")
    if library is None or library.origin is None or not re.fullmatch(r"\w+", name):
        return ()
    for family in (name, name.removesuffix("_text")):
        file = Path(library.origin).parent / "models" / family / f"modeling_{family}.py"
        if file.is_file():
            return tuple(sorted(set(_KERNEL.findall(file.read_text(encoding="utf-8")))))
    return ()

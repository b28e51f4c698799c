"""What a recipe cannot ask of a student on a Tinker server: refused by name."""

from __future__ import annotations

import importlib.util
import os
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

if TYPE_CHECKING:
    from zppo.config.settings import Settings

KEY = "TINKER_API_KEY"
"""The environment variable that the SDK takes the key from; it stands nowhere else."""

_SERVERS = "the server decides it"
_UNKNOWN = "the API does not know it"

_DEFAULTS: dict[str, str] = {
    "student.quantize": _SERVERS,
    "student.attention": _SERVERS,
    "rollout.engine": "the server samples",
    "rollout.max_rows": _SERVERS,
    "rollout.temperature": "the API gives log-probs at temperature 1",
    "eval.min_p": _UNKNOWN,
    "eval.repetition_penalty": _UNKNOWN,
    "train.lora.alpha": "the API's adapters have that one",
    "train.lora.targets": "the API's adapters are on all of attention and MLP",
    "train.optimizer": "the API has no other",
    "train.precision": _SERVERS,
    "train.sharding": _SERVERS,
    "train.gradient_checkpointing": _SERVERS,
    "train.tokens_per_microbatch": _SERVERS,
    "train.share_prompts": _SERVERS,
    "train.vision": "the student reads text only",
    "train.checkpoint_in_background": "the weights of a checkpoint stay on the server",
    "push": "final/ holds adapters and no whole model",
}
"""Settings that must be as they are by default, and why."""


def cluster_problem(settings: Settings) -> str:
    """Why a recipe with `student.tinker` cannot train; "" where it can, or has none."""
    tinker, train, method = settings.student.tinker, settings.train, settings.method.resolve()
    if tinker is None:
        return ""
    if method.distils:
        return f"method {method.name!r} compares next-token distributions, which the API does not give: take a method that does not (zppo)"
    if train.lora is None:
        return "the API trains low-rank adapters, and train.lora is empty: set train.lora to {}"
    if tinker.server == "skyrl-jax" and train.max_grad_norm is not None:
        return f"SkyRL's JAX backend clips no gradients, and train.max_grad_norm is {train.max_grad_norm:g}: set it to null"
    if settings.eval.presence_penalty:
        return f"eval.presence_penalty is {settings.eval.presence_penalty:g}, and {_UNKNOWN}: set it to 0"
    for key, why in _DEFAULTS.items():
        section: Any = settings
        *above, last = key.split(".")
        for name in above:
            section = getattr(section, name)
        value, default = getattr(section, last), type(section).model_fields[last].default
        if value != default:
            shown = ("set", "left out") if default is None or isinstance(default, BaseModel) else (str(value).lower(), str(default).lower())
            return f"{key} is {shown[0]}, and must be {shown[1]}: {why}"
    return ""


def missing_for_tinker() -> str:
    """What this machine lacks for a student on a Tinker server, and how to mend it; "" where nothing is."""
    if importlib.util.find_spec("tinker") is None:
        return "its SDK cannot be imported here: run `pip install 'zppo[tinker]'`"
    if not os.environ.get(KEY):
        return f"{KEY} is not set: put the key of the service into it; a server of your own takes any word that begins with tml-"
    return ""

"""ZPPO: Zone of Proximal Policy Optimization (arXiv 2606.18216), an independent open implementation.

Nothing is loaded before a name is used: `import zppo` imports neither torch nor pydantic.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from zppo.api import Evaluated, TrainedRun, evaluate, resume, train
    from zppo.config.methods import METHODS
    from zppo.config.recipe import load_recipe
    from zppo.config.settings import Settings
    from zppo.core.advantages import two_step_advantages
    from zppo.core.loss import clipped_surrogate
    from zppo.core.reformulate import Reformulation
    from zppo.core.replay import PromptReplayBuffer
    from zppo.core.types import Group, Question
    from zppo.rollout.data import load_data
    from zppo.rollout.step_parts import Parts, parts
    from zppo.step_log import StepLog

_HOMES = {
    "METHODS": "config.methods",
    "Evaluated": "api",
    "Group": "core.types",
    "Parts": "rollout.step_parts",
    "PromptReplayBuffer": "core.replay",
    "Question": "core.types",
    "Reformulation": "core.reformulate",
    "Settings": "config.settings",
    "StepLog": "step_log",
    "TrainedRun": "api",
    "clipped_surrogate": "core.loss",
    "evaluate": "api",
    "load_data": "rollout.data",
    "load_recipe": "config.recipe",
    "parts": "rollout.step_parts",
    "resume": "api",
    "two_step_advantages": "core.advantages",
}

__all__ = [
    "METHODS",
    "Evaluated",
    "Group",
    "Parts",
    "PromptReplayBuffer",
    "Question",
    "Reformulation",
    "Settings",
    "StepLog",
    "TrainedRun",
    "clipped_surrogate",
    "evaluate",
    "load_data",
    "load_recipe",
    "parts",
    "resume",
    "train",
    "two_step_advantages",
]


def __getattr__(name: str) -> Any:
    if name == "train":  # a room of the package and a function at once, see there
        return importlib.import_module("zppo.train")
    if name not in _HOMES:
        raise AttributeError(f"module 'zppo' has no attribute {name!r}")
    return getattr(importlib.import_module(f"zppo.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

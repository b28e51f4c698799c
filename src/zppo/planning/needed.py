"""What must be installed for a recipe beside what every installation has. No torch, and nothing is imported."""

from __future__ import annotations

from zppo.config.settings import Settings
from zppo.data.reasoning_gym import SCHEME
from zppo.packages import distribution, install_line, kernels_of, missing
from zppo.planning.model_shapes import family_of


def packages_needed(settings: Settings, *, gpu: bool) -> list[str]:
    """The packages, by the names that are imported, in the order in which a run would miss them.

    Args:
        gpu: whether it trains on one: kernels are for GPUs.
    """
    train, rollout = settings.train, settings.rollout
    needed = []
    if rollout.engine == "vllm":
        needed.append("vllm")
    sources = [settings.data.train] if isinstance(settings.data.train, str) else [part.source for part in settings.data.train]
    for source in (*sources, settings.data.eval or ""):
        needed += [SCHEME] * source.startswith(f"{SCHEME}:") + ["datasets"] * source.startswith("hub:")
    if gpu:
        frozen = [m for m in (settings.teacher, *settings.more_teachers, settings.judge) if m is not None and not m.base_urls]
        for model in (settings.student, *frozen):
            needed += kernels_of(family_of(model.model) or "")
    needed += ["peft"] * (train.lora is not None)
    needed += ["bitsandbytes"] * (settings.student.quantize is not None or train.optimizer == "adamw-8bit")
    needed += train.trackers
    return list(dict.fromkeys(needed))


def missing_rows(settings: Settings, *, gpu: bool) -> list[tuple[str, str]]:
    """(what, how it gets here) for the plan, where something is not installed on this machine."""
    absent = missing(packages_needed(settings, gpu=gpu))
    return [("not installed here", f"{', '.join(map(distribution, absent))}; {install_line(absent)}")] if absent else []

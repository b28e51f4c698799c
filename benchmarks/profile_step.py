"""Where the time of our steps goes: the operators that take most of it, by part, and what no operator accounts for."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.common import Options, run
from benchmarks.ours import Ours, Script, assembled, in_order
from benchmarks.tables import markdown
from benchmarks.world import QUICK, Shape, make_model, questions

SHARE = 0.5
WARM, STEPS, TOP = 1, 1, 8


def measure(options: Options) -> Mapping[str, Any]:
    """Operators of a GRPO and of a ZPPO step, half of the groups without a gradient; per step."""
    shape = QUICK if options.quick else Shape()
    with tempfile.TemporaryDirectory() as folder:
        model, asked = make_model(Path(folder) / "model", shape), questions(shape)
        found = {method: _profile(Ours(model, shape, asked, options.threads, method=method)) for method in ("grpo", "zppo")}
    return {"shape": vars(shape), "trivial": SHARE, "steps": STEPS, "methods": found}


def _profile(own: Ours) -> dict[str, Any]:
    script = Script(own.shape)
    with assembled(own, script) as parts:
        trainer, profiles = parts.trainer, {"sampling": Profile(), "update": Profile()}
        sampler = in_order(trainer)
        for _ in range(WARM):
            script.new_step(SHARE)
            trainer.step(trainer.done + 1)
        engine = sampler.engine
        engine.sample = profiles["sampling"].around(engine.sample)
        trainer.learner.update = profiles["update"].around(trainer.learner.update)
        for _ in range(STEPS):
            script.new_step(SHARE)
            trainer.step(trainer.done + 1)
    return {name: profile.result() for name, profile in profiles.items()}


class Profile:
    """Self time on the processor by operator, over several calls of one function."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.operators: dict[str, list[float]] = {}

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, profiled."""
        from torch.profiler import ProfilerActivity, profile

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            with profile(activities=[ProfilerActivity.CPU], acc_events=True) as found:
                began = time.perf_counter()
                result = function(*args, **kwargs)
                self.seconds += time.perf_counter() - began
            for event in found.key_averages():
                seen = self.operators.setdefault(event.key, [0.0, 0])
                seen[0] += event.self_cpu_time_total / 1e6
                seen[1] += event.count
            return result

        return wrapped

    def result(self) -> dict[str, Any]:
        """Per step: seconds, the largest operators, the sum of all others, and Python between them."""
        rows = sorted(self.operators.items(), key=lambda item: -item[1][0])
        inside = sum(seconds for _, (seconds, _) in rows)
        top = [{"operator": name, "seconds": s / STEPS, "calls": n / STEPS} for name, (s, n) in rows[:TOP]]
        rest = sum(seconds for _, (seconds, _) in rows[TOP:])
        return {
            "seconds": self.seconds / STEPS,
            "operators": top,
            "other_operators": rest / STEPS,
            "outside_of_operators": max(0.0, self.seconds - inside) / STEPS,
        }


def table(result: Mapping[str, Any]) -> str:
    """Shares of each part."""
    blocks = []
    for part in ("sampling", "update"):
        rows = []
        for method, found in result["methods"].items():
            whole = found[part]["seconds"]
            rows += [
                (method, f"`{o['operator']}`", o["calls"], o["seconds"], f"{o['seconds'] / whole:.0%}") for o in found[part]["operators"]
            ]
            for name in ("other_operators", "outside_of_operators"):
                rows.append((method, name.replace("_", " "), "", found[part][name], f"{found[part][name] / whole:.0%}"))
        blocks.append(markdown([part, "operator", "calls a step", "seconds", "share"], rows))
    return "\n\n".join(blocks)


if __name__ == "__main__":
    sys.exit(run("profile_step", measure))

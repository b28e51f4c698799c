"""The exact savings of an update, each against the same update without it: dropped rows, micro-batches, prompts, old log-probs.

One process holds one model and lets the variants compute the gradients of the same batch in turn; the weights never move. Each variant's
gradients are compared with those of the plain one.
"""

from __future__ import annotations

import random
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.common import Options, interleaved, medians, ratio, run
from benchmarks.tables import markdown
from benchmarks.world import QUICK, Shape, completions, correct, make_model

SHARES = (0.3, 0.5, 0.7)
FIXED_ROWS = (8, 16, 32)  # of a micro-batch that knows nothing of lengths
LONG = (200, 600)  # tokens of reformulated prompts


class Variants:
    """One model, and updaters over it that differ in a single saving."""

    def __init__(self, shape: Shape, folder: Path) -> None:
        import torch
        from accelerate import Accelerator

        from zppo.engines.logprobs import sharing_of
        from zppo.models.student_model import load_model

        torch.manual_seed(0)
        self.shape = shape
        self.model = load_model(make_model(folder / "model", shape), dtype=torch.float32)
        self.accelerator, self.sharing = Accelerator(cpu=True), sharing_of(self.model)

    def batch(self, trivial: float, reformulated: int = 0) -> tuple[list[Any], Any]:
        """Plain groups, and groups whose prompts are several hundred tokens long; log-probs are the model's own."""
        import torch

        from zppo.core.advantages import step_advantages
        from zppo.core.types import Group, Message, Prompt, Question, Rollout
        from zppo.engines.logprobs import completion_logprobs

        rng, shape, groups = random.Random(0), self.shape, []
        said = completions(shape, seed=0) + completions(shape, seed=1)
        count = shape.questions + reformulated
        for i, (row, flags) in enumerate(zip(said[:count], correct(count, shape.group, trivial, seed=2), strict=True)):
            limits = shape.prompt if i < shape.questions else LONG
            ids = tuple(rng.randrange(10, 200) for _ in range(rng.randint(*limits)))
            with torch.no_grad():
                logprobs, _ = completion_logprobs(self.model, [(ids, c) for c in row])
            question = Question(f"q{i}", (Message("user", "?"),), "1")
            rollouts = tuple(
                Rollout(torch.tensor(c), lp[: len(c)].clone(), "", None, flag, float(flag), False)
                for c, lp, flag in zip(row, logprobs, flags, strict=True)
            )
            groups.append(Group(Prompt("plain", question, question.messages, ids), rollouts))
        return groups, step_advantages(groups, "nontrivial")

    def learner(self, *, share: bool = False, sampler: bool = True) -> Any:
        """One whose optimizer never steps: what is measured is the gradient."""
        import torch

        from zppo.config.settings import Settings
        from zppo.engines.logprobs import ForwardPass
        from zppo.train.learner import OptimizerStep
        from zppo.train.policy_gradient import PolicyGradient, make_budget

        settings = Settings(method="grpo", student={"model": "-"}, data={"train": "-"}, train={"minibatches": 4, "max_grad_norm": 1e9})
        still = torch.optim.SGD(self.model.parameters(), lr=0.0)
        step = OptimizerStep(self.model, still, self.accelerator, settings.train.max_grad_norm)
        budget, sharing = make_budget(settings.train), self.sharing if share else None
        return PolicyGradient(settings, ForwardPass(self.model), step, budget, sampler_is_exact=sampler, sharing=sharing)

    def undropped(self) -> Any:
        """Every row goes through the model, whatever its advantage."""
        import zppo.train.policy_gradient as module
        from zppo.core.minibatch import Share

        learner, real = self.learner(), module.share_minibatch

        def everything(samples: Any, dealt: Sequence[int], **_: Any) -> Share:
            return Share([(g, i) for g in dealt for i in range(len(samples[g]))], [])

        inner = learner.optimizer_steps

        def optimizer_steps(*given: Any) -> Any:
            module.share_minibatch = everything
            try:
                return inner(*given)
            finally:
                module.share_minibatch = real

        learner.optimizer_steps = optimizer_steps
        return learner

    def fixed_rows(self, rows: int) -> Any:
        """So many rows a micro-batch, in the order in which they come, each padded to its longest."""
        from zppo.core.minibatch import MicroBatch

        learner = self.learner()

        def split(given: Sequence[Any]) -> list[MicroBatch]:
            cut = [list(range(len(given)))[i : i + rows] for i in range(0, len(given), rows)]
            return [MicroBatch([[i] for i in part], max(given[i].length for i in part)) for part in cut]

        learner._split = split
        return learner


def timed(learner: Any, groups: Any, advantages: Any) -> dict[str, float]:
    """Seconds of an update, of the wall clock and of the processor, and its tokens."""
    from zppo.step_log import StepLog

    wall, cpu = time.perf_counter(), time.process_time()
    log = StepLog(1)
    learner.optimizer_steps(groups, advantages, log)
    metrics: Any = log.counts
    return {
        "seconds": time.perf_counter() - wall,
        "cpu": time.process_time() - cpu,
        "needed": metrics["train_tokens_needed"],
        "computed": metrics["train_tokens_computed"],
    }


def gradients(learner: Any, groups: Any, advantages: Any) -> list[list[Any]]:
    """Of every minibatch."""
    from zppo.step_log import StepLog

    found: list[list[Any]] = []
    step = learner.optimizer.step

    def keep(loss: float) -> Any:
        found.append([p.grad.clone() for p in learner.optimizer.model.parameters() if p.grad is not None])
        return step(loss)

    learner.optimizer.step = keep
    try:
        learner.optimizer_steps(groups, advantages, StepLog(1))
    finally:
        learner.optimizer.step = step
    return found


def difference(ours: list[list[Any]], theirs: list[list[Any]]) -> float:
    """Largest one, relative to the largest gradient of its minibatch; a minibatch with nothing left must be 0 in both."""
    worst = 0.0
    for one, other in zip(ours, theirs, strict=True):
        biggest = max(float(g.abs().max()) for g in other) or 1.0
        worst = max(worst, *(float((a - b).abs().max()) / biggest for a, b in zip(one, other, strict=True)))
    return worst


def against(plain: Any, others: Mapping[str, Any], batch: tuple[Any, Any], repetitions: int) -> dict[str, Any]:
    """Each of `others` beside `plain`: ratios of time (below 1 is faster), gradient difference, tokens."""
    names = {"plain": plain, **others}
    expected = gradients(plain, *batch)
    gaps = {name: difference(gradients(learner, *batch), expected) for name, learner in others.items()}
    works: dict[str, Callable[[], Mapping[str, float]]] = {n: partial(timed, u, *batch) for n, u in names.items()}
    rows = interleaved(repetitions, works)
    return {
        name: {
            **medians(rows[name]),
            **{clock: ratio(rows[name], rows["plain"], clock) for clock in ("seconds", "cpu")},
            "difference": gaps.get(name, 0.0),
        }
        for name in names
    }


def measure(options: Options) -> Mapping[str, Any]:
    """Each saving alone."""
    import torch

    torch.set_num_threads(options.threads)
    shape, repetitions = (QUICK, 1) if options.quick else (Shape(), 9)
    found: dict[str, Any] = {"repetitions": repetitions, "shape": vars(shape)}
    with tempfile.TemporaryDirectory() as folder:
        made = Variants(shape, Path(folder))
        again = shape.questions // 2
        fixed = {f"{rows} rows": made.fixed_rows(rows) for rows in FIXED_ROWS}
        found["dropped rows"] = {
            f"{share:.0%}": against(made.undropped(), {"dropped": made.learner()}, made.batch(share), repetitions) for share in SHARES
        }
        for name, long in (("plain", 0), ("with reformulated prompts", again)):
            batch = made.batch(0.5, long)
            found[f"micro-batches, {name}"] = against(made.learner(), fixed, batch, repetitions)
            found[f"shared prompts, {name}"] = against(made.learner(), {"shared": made.learner(share=True)}, batch, repetitions)
        found["old log-probs"] = against(made.learner(sampler=False), {"the sampler's": made.learner()}, made.batch(0.5), repetitions)
    return found


def table(result: Mapping[str, Any]) -> str:
    """A row per saving: time with it as a share of the time without."""
    rows = []
    for share, pair in result["dropped rows"].items():
        rows.append(line(f"rows without a gradient dropped, {share} of the groups", pair["plain"], pair["dropped"]))
    for batch in ("plain", "with reformulated prompts"):
        pair = result[f"micro-batches, {batch}"]
        fixed = [name for name in pair if name != "plain"]
        rows += [line(f"sorted micro-batches, not {name} each, {batch}", pair[name], pair["plain"]) for name in fixed]
        pair = result[f"shared prompts, {batch}"]
        rows.append(line(f"prompts shared, {batch}", pair["plain"], pair["shared"]))
    pair = result["old log-probs"]
    rows.append(line("the sampler's log-probs, not a forward pass", pair["plain"], pair["the sampler's"]))
    header = ["saving, alone", "processor time with / without", "computed / needed without", "with", "gradient difference"]
    return markdown(header, rows)


def line(what: str, without: Mapping[str, Any], saved: Mapping[str, Any]) -> list[Any]:
    """One of the two is the variant that all were compared with: its own ratio is 1."""
    a, b = saved["cpu"], without["cpu"]
    low, high = sorted((a["low"] / b["high"], a["high"] / b["low"]))
    padding = (f"{x['computed'] / x['needed']:.2f}" for x in (without, saved))
    difference = max(without["difference"], saved["difference"])
    return [what, f"**{a['median'] / b['median']:.2f}** ({low:.2f}-{high:.2f})", *padding, f"{difference:.0e}"]


if __name__ == "__main__":
    sys.exit(run("update_savings", measure))
